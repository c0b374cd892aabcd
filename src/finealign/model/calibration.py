"""Calibration without labels: temperatures that bring a model's confidences near its accuracy.

Four witnesses are adapted as the model was, but on the features before adaptation: each on one half of the images and
from one half of each class's descriptions. A label is confirmed by a pair of witnesses if both give it too, and how far
it is taken for right is the share of pairs that confirm it. Models that learned apart agree about as often as they are
right ("Generalization Disagreement Equality", Jiang et al., ICLR 2022, arXiv 2106.13799); that pairs have to confirm
makes up for what the witnesses have in common, and four make one unlucky half count for less. The temperature is
fitted to the confirmations as Platt (1999) and Guo et al. (ICML 2017) fit it to true labels. No number here was fitted.

The start (the model before adaptation) is calibrated likewise; its labels are confirmed by those of the adapted model.
docs/ABLATION.md has what this gives; ``benchmarks/confidence.py`` measures it.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finealign.backbone.base import Backbone
from finealign.config import ANCHOR_STEPS, Config, MethodSettings
from finealign.method.base import Method, SelfTrainingMethod
from finealign.method.crop_trust import EQUAL
from finealign.method.registry import create_method, find_method
from finealign.model.fitted import FittedModel
from finealign.runtime.progress import Progress
from finealign.training.loop import run_epochs
from finealign.training.state import begin
from finealign.types import ImageFeatures, Score, TextFeatures

Item = TypeVar("Item")
Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

SAMPLE = 256  # most images to judge and calibrate by; where there are more, a sample is drawn with the model's seed
ENCODED = 1024  # most images to calibrate by where the run has their features anyway
COOLEST, HOTTEST = 0.05, 20.0  # the range of temperatures
_STEPS = 121  # temperatures tried in that range, each 5 % above the one before
_HALVES = 4  # with the seed, seeds the generator that halves the images; other numbers are in training/loop.py


@dataclass(frozen=True)
class Calibration:
    """Temperatures of a model and of its start, and the accuracies that they were fitted to.

    The accuracies are estimates, for the images adapted to, of the share of right labels, in (0, 1).
    """

    temperatures: Mapping[Score, float]  # by score, in [COOLEST, HOTTEST]
    start_temperature: float  # of the start's score of whole images
    accuracy: float  # by the model's own score
    start_accuracy: float
    images: int  # number of images that it was calibrated on


def sample(images: Sequence[Item], *, seed: int) -> list[Item]:
    """All images, or SAMPLE of them drawn with the seed, in the order given."""
    return [images[i] for i in sampled(len(images), seed=seed)]


def sampled(images: int, *, seed: int, most: int | None = None) -> list[int]:
    """The positions of the images that ``sample`` takes of so many. ``most`` is SAMPLE by default."""
    most = SAMPLE if most is None else most
    if images <= most:
        return list(range(images))
    return sorted(np.random.default_rng(seed).choice(images, most, replace=False).tolist())


def calibrate(
    model: FittedModel,
    config: Config,
    before: ImageFeatures,
    after: ImageFeatures,
    *,
    images: int,
    known: Tensor | None = None,
) -> Calibration:
    """Calibrate an adapted model. No true label is read, and neither the model nor the backbone is changed.

    Args:
        model: the adapted model, whose method trains.
        config: the settings it was adapted with, resolved.
        before: the features of n images by the start, n >= 1, with crops if the method uses them.
        after: their features by the adapted model, with crops for the scores that are to be calibrated besides global.
        images: how many images the model was adapted to.
        known: (n,), the labels that the model was given, as in ``method.few_labels``; None if it was given none.
    """
    witnesses = adapted_witnesses(
        before,
        model.text_features,
        config,
        model.backbone,
        like=model.method,
        images=images,
        known=known,
    )
    with torch.no_grad():
        opinions = [_labels(witness.score(before, _fitting(witness.scores, before))) for witness in witnesses]
        own = model.inference.score
        kinds: list[Score] = [kind for kind in model.method.scores if kind == "global" or after.crops.shape[1]]
        temperatures, accuracy = {}, 0.0
        for kind in kinds:
            scores = model.method.score(after, kind)
            right = confirmed(_labels(scores), opinions)
            temperatures[kind] = fit_temperature(_logits(model.method, scores), right)
            if kind == own:
                accuracy, labels = estimate_accuracy(right), _labels(scores)
        first = model.start().method
        start_scores = first.score(before, "global")
        right_at_start = confirmed(_labels(start_scores), [labels])
        return Calibration(
            temperatures=temperatures,
            start_temperature=fit_temperature(_logits(first, start_scores), right_at_start),
            accuracy=accuracy,
            start_accuracy=estimate_accuracy(right_at_start),
            images=len(before.weak),
        )


def confirmed(labels: Ints, opinions: Sequence[Ints]) -> Floats:
    """The share of pairs of opinions that both give the image's label: labels and each opinion (n,) -> (n,) in [0, 1].

    A single opinion confirms by itself.
    """
    agree = [opinion == labels for opinion in opinions]
    pairs = [one & other for one, other in combinations(agree, 2)] or agree
    share: Floats = np.mean(pairs, axis=0)
    return share


def estimate_accuracy(right: Floats) -> float:
    """The share of labels taken for right, by Laplace's rule of succession: (n,) in [0, 1] -> (k + 1) / (n + 2)."""
    return float((right.sum() + 1) / (len(right) + 2))


def confidences(logits: Floats, temperature: float) -> Floats:
    """The largest probability of softmax(logits / temperature) of each image: (n, C) -> (n,) in [1 / C, 1]."""
    below = (logits - logits.max(axis=1, keepdims=True)) / temperature
    found: Floats = 1 / np.exp(below).sum(axis=1)
    return found


def fit_temperature(logits: Floats, right: Floats) -> float:
    """The temperature under which the labels taken for right are most likely, given each image's confidence.

    logits (n, C), right (n,) in [0, 1] -> a number in [COOLEST, HOTTEST]. The likelihood is that of ``right`` as
    independent draws whose chances are the confidences, with the targets of Platt (1999, section 2.2): where k of n
    are right, (k + 1) / (k + 2) for those and 1 / (n - k + 2) for the others, so that n confirmations make nothing
    certain. It may have more than one maximum, so evenly spaced logarithms of the temperature are compared. Of equally
    good ones the one nearest to 1 is returned, which is 1 if all classes score the same.
    """
    k, n = right.sum(), len(right)
    target = right * (k + 1) / (k + 2) + (1 - right) / (n - k + 2)
    tried = np.exp(np.linspace(np.log(COOLEST), np.log(HOTTEST), _STEPS))
    tried = np.array(sorted(tried, key=lambda value: abs(np.log(value))))
    tried[0] = 1.0  # which the middle of the range is, but for rounding
    likelihood = np.empty(_STEPS)
    for place, temperature in enumerate(tried):
        chance = np.clip(confidences(logits, float(temperature)), 1e-6, 1 - 1e-6)
        likelihood[place] = (target * np.log(chance) + (1 - target) * np.log(1 - chance)).mean()
    return float(tried[np.argmax(likelihood > likelihood.max() - 1e-9)])


def temperature_for(logits: Floats, target: float) -> float:
    """The temperature at which the mean confidence is ``target``: (n, C) -> a number in [COOLEST, HOTTEST].

    The mean confidence falls as the temperature rises, so it is found by bisection. A target out of reach gives the end
    of the range that comes nearest to it.
    """
    low, high = np.log(COOLEST), np.log(HOTTEST)
    for _ in range(50):
        middle = (low + high) / 2
        surer = confidences(logits, float(np.exp(middle))).mean() > target
        low, high = (middle, high) if surer else (low, middle)
    return float(np.clip(np.exp((low + high) / 2), COOLEST, HOTTEST))


# --- the witnesses ----------------------------------------------------------------------------------------------------


def adapted_witnesses(
    before: ImageFeatures,
    texts: TextFeatures,
    config: Config,
    backbone: Backbone,
    *,
    like: Method,
    images: int,
    known: Tensor | None = None,
) -> list[Method]:
    """Adapt four methods: on each half of the images, from each half of each class's descriptions. No encoder learns.

    before: weak (n, D) and crops (n, N, D), N >= 1 where the method uses crops. A single image is in both halves, and
    so is a class's single description. ``config`` is resolved. A method whose anchors settle takes these steps and one
    pass over the images; another takes the steps of a run on ``images`` images. Crops stand for strong views. FAIR
    stands for a method that pools patches, as no features are kept of these. All have the logit scale of ``like``, the
    adapted method, expect the shares of classes that it expects, and trust crops as it does. Each is given the labels
    of the images in its half that are ``known``, (n,) or None. A method without parameters takes no step.
    """
    settings = MethodSettings(name="fair") if like.gaze and like.gaze.salient else config.method
    taught = like if isinstance(like, SelfTrainingMethod) else None
    share = float(taught.whole_share) if taught else EQUAL
    told = {"class_prior": "even", "whole_share": share}  # the prior till it is told below
    has = find_method(settings.name).Options.model_fields
    told = {name: value for name, value in told.items() if name in has}
    settings = MethodSettings(name=settings.name, **{**settings.options, **told})
    order = np.random.default_rng((config.seed, _HALVES)).permutation(len(before.weak))
    halves = order[: (len(order) + 1) // 2], order[len(order) // 2 :]
    pace: dict[str, Any] = {"encoder": "frozen", "learn": "anchors", "strangers": "off"}
    pace["epochs"] = _as_many_steps(config, images, len(halves[0]))
    if not config.training.anchor_steps:  # as where the run keeps no features of crops
        pace["anchor_steps"] = ANCHOR_STEPS
    config = config.model_copy(update={"training": config.training.model_copy(update=pace)})
    found = []
    for chosen, number in product(halves, (0, 1)):
        places = torch.from_numpy(chosen).to(before.weak.device)
        source = _Kept(ImageFeatures(before.weak[places], before.crops[places]), seed=config.seed)
        method = create_method(settings, half_of_texts(texts, number), logit_scale=like.logit_scale)
        method = method.to(before.weak.device)
        if taught and isinstance(method, SelfTrainingMethod):
            method.expect(taught.class_prior)
            method.pull.copy_(taught.pull)
        epochs = 1 if method.settles else pace["epochs"]
        if any(True for _ in method.parameters()):
            with torch.inference_mode(False), torch.enable_grad():
                labelled = None if known is None else known[torch.from_numpy(chosen)]
                state = begin(backbone, method, config, images=len(chosen), known=labelled)
                for _ in run_epochs(state, source, config, range(epochs), Progress()):
                    pass
        found.append(method.requires_grad_(False))
    return found


def _as_many_steps(config: Config, images: int, there: int) -> int:
    """The epochs in which a run on ``there`` images takes the steps that the settings give one on ``images`` images."""
    training = config.training
    if training.epochs == "auto":
        raise ValueError("the configuration is not resolved")
    steps = training.epochs * math.ceil(images / training.batch_size)
    return min(training.max_epochs, max(1, round(steps / math.ceil(there / training.batch_size))))


def half_of_texts(texts: TextFeatures, number: int) -> TextFeatures:
    """Every second description of each class, from the first or, with ``number`` 1, from the second on.

    A class with one description keeps it. The names stay.
    """
    classes = texts.class_of.tolist()
    of_class, seen = Counter(classes), Counter[int]()
    places = []
    for place, label in enumerate(classes):
        if seen[label] % 2 == number or of_class[label] == 1:
            places.append(place)
        seen[label] += 1
    chosen = torch.tensor(places, device=texts.class_of.device)
    return replace(texts, descriptions=texts.descriptions[chosen], class_of=texts.class_of[chosen])


@dataclass(frozen=True)
class _Kept:
    """Features encoded once, as ``training.features.ImageSource``; a crop stands for each strong view."""

    features: ImageFeatures
    seed: int

    def start_epoch(self, epoch: int, images: Tensor | None = None) -> bool:
        return epoch == 0

    def renew(self, epoch: int, images: Tensor | None = None) -> bool:
        return False

    def label_features(self, batch: Tensor, epoch: int) -> ImageFeatures:
        return ImageFeatures(self.features.weak[batch], self.features.crops[batch])

    def whole_images(self, epoch: int) -> Tensor:
        return self.features.weak

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        rng = np.random.default_rng((self.seed, epoch, _HALVES))
        for batch in batches:
            crops = self.features.crops[batch]
            chosen = torch.from_numpy(rng.integers(max(1, crops.shape[1]), size=len(batch))).to(crops.device)
            yield crops[torch.arange(len(batch)), chosen] if crops.shape[1] else self.features.weak[batch]


def _fitting(scores: Sequence[Score], features: ImageFeatures) -> Score:
    """The first of a method's scores that these features suffice for."""
    return next(score for score in scores if score == "global" or features.crops.shape[1])


def _labels(scores: Tensor) -> Ints:
    found: Ints = scores.argmax(1).cpu().numpy()
    return found


def _logits(method: Method, scores: Tensor) -> Floats:
    found: Floats = (method.logit_scale * scores).double().cpu().numpy()
    return found
