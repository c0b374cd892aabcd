"""Did adaptation help? Judged without labels, from what the model makes of images before and after.

Each piece of evidence is a number that tended to go with the change in accuracy over the runs of
``benchmarks/verdict.py``, good and bad; their weights were fitted there. It is an estimate, not a measurement:
``finealign evaluate`` measures, on labelled images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finealign.classifier import FineAlign
from finealign.progress import Progress
from finealign.types import ImageFeatures

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Call = Literal["helped", "unclear", "hurt"]

SAMPLE = 256  # images judged by; a sample drawn by the model's seed where there are more
MANY_A_CLASS = 100.0  # more images a class than this are no better evidence

# Fitted by benchmarks/verdict.py to changes of accuracy in points, none counted as more than 8: the score of a run is
# the weighted sum of the evidence plus the constant. docs/ABLATION.md has how often its sign is right.
WEIGHTS = {"structure": 11.978, "images_a_class": 2.011, "confidence": 11.214, "anchors_kept": 11.846}
CONSTANT = -22.499
HELPED, HURT = 5.05, 0.0  # a score above the first is called helped, below the second hurt


@dataclass(frozen=True)
class Verdict:
    """What the judge says.

    There is no estimate of the accuracy: nine in ten scores lay within 4.7 points of the true change, which is no
    better than saying "helped". The bound is exact.
    """

    call: Call
    score: float  # the weighted evidence; its sign is what counts
    most: float  # percent of the judged images relabelled: accuracy on them changed by no more points
    advice: str
    evidence: dict[str, float]
    images: int  # judged by


def judge_model(
    model: FineAlign, images: Sequence[Path], *, start: ImageFeatures | None = None, progress: Progress | None = None
) -> Verdict:
    """Judge a fitted model on the images it was adapted to, or a sample of them; no label is read.

    ``start`` spares encoding them as the backbone was before: what ``start_features`` gave for the same model.
    Raises ImageInputError when none of the images can be read.
    """
    paths = sample(images, seed=model.config_.seed)
    set_aside = model.set_aside_
    with (progress or Progress()).stage("judging without labels", None):
        before = start or start_features(model, images)
        after = model.features(paths, crops=model.score_ != "global")
    model.set_aside_ = set_aside  # those of the run, which are reported
    method, first = model.method_, model.start_method_
    scores = method.score(after, model.score_)
    found = gather(
        crops=before.crops.mean(1).cpu().numpy(),
        start=first.score(before, "global").cpu().numpy(),
        end=scores.detach().cpu().numpy(),
        end_probabilities=method.probabilities(scores).detach().cpu().numpy(),
        start_anchors=first.classifier().mean(1).cpu().numpy(),
        end_anchors=method.classifier().mean(1).detach().cpu().numpy(),
        images=len(images),
    )
    return judge(found, images=len(paths))


def start_features(model: FineAlign, images: Sequence[Path]) -> ImageFeatures:
    """What ``judge_model`` sees of the images before adaptation: the same for every model of a seed and backbone."""
    return model.features(sample(images, seed=model.config_.seed), at_start=True)


def sample(images: Sequence[Path], *, seed: int) -> list[Path]:
    """At most SAMPLE of the images, in their order."""
    if len(images) <= SAMPLE:
        return list(images)
    chosen = np.random.default_rng(seed).choice(len(images), SAMPLE, replace=False)
    return [images[i] for i in sorted(chosen)]


def gather(
    *,
    crops: Floats,
    start: Floats,
    end: Floats,
    end_probabilities: Floats,
    start_anchors: Floats,
    end_anchors: Floats,
    images: int,
) -> dict[str, float]:
    """The evidence, by name.

    crops (n, D): each image's mean crop before adaptation. start, end (n, C): the scores of the start by the whole
    image, and of the adapted model by its own score. start_anchors, end_anchors (C, D): the class vectors before and
    after. images: how many were adapted to.

    - structure: how much more of the variance of ``crops`` the new labels explain than the old ones, as a share;
    - images_a_class: log of the images a class, where MANY_A_CLASS is the most;
    - confidence: mean probability of the new label;
    - anchors_kept: mean cosine of each class's vector before and after, both less the mean of the classes;
    - relabelled: share of images whose label is not the start's; not weighed, it bounds the change.
    """
    before, after = start.argmax(1), end.argmax(1)
    old, new = explained_variance(crops, before), explained_variance(crops, after)
    return {
        "structure": (new - old) / max(old, 0.01),
        "images_a_class": float(np.log(min(images / start.shape[1], MANY_A_CLASS))),
        "confidence": float(end_probabilities.max(1).mean()),
        "anchors_kept": anchors_kept(start_anchors, end_anchors),
        "relabelled": float((after != before).mean()),
    }


def explained_variance(features: Floats, labels: Ints) -> float:
    """Between-class share of the features' variance, in [0, 1]: features (n, D), labels (n,). 0 for one class."""
    centred = features - features.mean(0)
    total = float((centred**2).sum())
    if total <= 0:
        return 0.0
    sums = np.zeros((int(labels.max()) + 1, features.shape[1]))
    np.add.at(sums, labels, centred)
    counts = np.bincount(labels, minlength=len(sums))
    between = float(((sums**2).sum(1) / np.maximum(counts, 1)).sum())
    return between / total


def anchors_kept(before: Floats, after: Floats) -> float:
    """Mean over classes of the cosine between a class's vector before and after (C, D), both less the classes' mean.

    CLIP's texts lie in a narrow cone; what tells classes apart is what is left when their mean is gone.
    """
    one, other = before - before.mean(0), after - after.mean(0)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(1) / np.maximum(lengths, 1e-12)).mean())


def judge(evidence: dict[str, float], *, images: int) -> Verdict:
    """Weigh the evidence of ``gather``."""
    score = CONSTANT + sum(weight * evidence[name] for name, weight in WEIGHTS.items())
    call: Call = "helped" if score > HELPED else "hurt" if score < HURT else "unclear"
    if not evidence["relabelled"]:
        call = "unclear"  # with every label as it was, accuracy is too
    return Verdict(
        call=call,
        score=round(score, 3),
        most=round(100 * evidence["relabelled"], 2),
        advice=_advice(call, evidence),
        evidence={name: round(value, 5) for name, value in evidence.items()},
        images=images,
    )


def _advice(call: Call, evidence: dict[str, float]) -> str:
    if call == "helped":
        return "Use the adapted model; a few dozen labelled images and `finealign evaluate` would measure by how much."
    few = evidence["images_a_class"] < np.log(10)
    if call == "unclear":
        more = "More images a class would tell, and help" if few else "More descriptions of each class may help"
        return f"Measure on some labelled images with `finealign evaluate` before you rely on it. {more}."
    cause = "there are few images a class: add some" if few else "check class names and descriptions against the images"
    return f"Do not use the adapted model as it is: {cause}, or lower training.anchor_learning_rate."
