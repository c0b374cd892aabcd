"""Check a method of one's own: what it gives, that its state is whole, and that it runs as the others do."""

import inspect
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from finealign.backbone.base import Backbone
from finealign.classifier import FineAlign
from finealign.config import MethodSettings, make_config, merged
from finealign.errors import FinealignError, StoppedError, sentence
from finealign.method.base import Method
from finealign.method.registry import bare_method, create_method, method_options, method_settings, name_of
from finealign.runtime.progress import Progress
from finealign.testing.findings import CheckError, Findings, near
from finealign.testing.toy import COLOURS, ToyBackbone, draw_images
from finealign.types import ImageFeatures, PseudoLabels, Score, TextFeatures

# What each function of a method is given. More is never given, labels least of all.
GIVEN: Mapping[str, tuple[str, ...]] = {
    "__init__": ("options", "texts", "logit_scale"),
    "study": ("texts",),
    "suit_tower": ("width",),
    "survey": ("weak",),
    "pseudo_label": ("features",),
    "loss": ("strong", "pseudo"),
    "score": ("features", "kind"),
}
CLASSES, WIDTH, SCALE = 3, 8, 20.0
STEPS = 3


def check_method(method: type[Method], *, backbone: Backbone | None = None, **options: Any) -> None:
    """Check that a method keeps to what is asked of one; to be called in the method's tests.

    ``options`` are options of the method, for those whose defaults take long. ``backbone`` is the one that a model is
    fitted with, by default a tiny one with random weights. The method is made, takes a few steps on drawn features and
    two epochs on drawn images. Its labels, loss and scores have to be of the right shapes and finite, also with two
    classes, one image, images of one class, and no crops; it is never given labels; its state is saved and loaded again
    alike; a run that is stopped and resumed ends as one that is not; and a saved model predicts as the one that was
    saved. Takes seconds.

    Raises CheckError with a sentence for each fault.
    """
    found = Findings()
    try:
        name = name_of(method)
        settings = MethodSettings(name=name, **options)
        method_options(settings)
        for preset in method.presets:
            method_options(make_config(method_settings(f"{name}@{preset}")).method)
    except FinealignError as error:
        raise CheckError(f"{sentence(error)}") from error
    _check_declared(method, found)
    if not found.faults:
        case = _Case(method, settings)
        with found.during("to be made, twice alike, for drawn texts"):
            _check_made(case, found)
    if not found.faults:
        for check in (_check_scores, _check_training, _check_state):
            check(case, found)
    if not found.faults:
        with found.during("to fit a model to drawn images"), tempfile.TemporaryDirectory() as folder:
            _check_fit(method, name, options, backbone, Path(folder), found)
    found.close(f"The method {method.__name__}")


@dataclass(frozen=True)
class _Case:
    """A method and its options, with texts and images drawn for it."""

    kind: type[Method]
    settings: MethodSettings

    def make(self, classes: int = CLASSES, *, seed: int = 0, bare: bool = False) -> Method:
        make = bare_method if bare else create_method
        return make(self.settings, texts(classes, seed=seed), logit_scale=SCALE, token_width=WIDTH)

    def images(self, count: int, *, seed: int = 0, crops: bool | None = None) -> ImageFeatures:
        """Features with crops, or without where the method says that it uses none."""
        found = images(count, seed=seed)
        if self._uses_crops if crops is None else crops:
            return found
        return ImageFeatures(found.weak, found.crops[:, :0])

    @cached_property
    def _uses_crops(self) -> bool:
        return self.make(bare=True).uses_crops

    def scored(self, kind: Score, count: int, *, seed: int = 0) -> ImageFeatures:
        """Features for a score: those of whole images alone for ``global``."""
        return self.images(count, seed=seed, crops=kind != "global")

    def trained(self, steps: int = STEPS) -> Method:
        """A method after some steps, or after a survey."""
        method = self.make()
        if method.surveys:
            _survey(method, self.images(6).weak)
        for _ in zip(range(steps), self.steps(method), strict=False):
            pass
        return method

    def steps(
        self, method: Method, *, count: int = 5, seed: int = 10, alike: bool = False
    ) -> Iterator[tuple[PseudoLabels, float]]:
        """Steps without end: the labels and the loss of each. ``alike`` are all images the same."""
        learning = [parameter for parameter in method.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-2) if learning else None
        while method.trains:
            drawn = self.images(count, seed=seed)
            if alike:
                drawn = ImageFeatures(drawn.weak[:1].repeat(count, 1), drawn.crops[:1].repeat(count, 1, 1))
            strong = (drawn if alike else images(count, seed=seed + 1)).weak.clone().requires_grad_()
            pseudo = method.pseudo_label(drawn)
            loss = method.loss(strong, pseudo)
            torch.autograd.backward(loss.total)
            if optimizer:
                optimizer.step()
                optimizer.zero_grad()
            seed += 2
            yield pseudo, float(loss.total.detach())


def texts(classes: int, *, seed: int = 0) -> TextFeatures:
    """Drawn text features, of three descriptions a class."""
    class_of = torch.arange(classes).repeat_interleave(3)
    return TextFeatures(_unit(seed, classes, WIDTH), _unit(seed + 1, len(class_of), WIDTH), class_of)


def images(count: int, *, seed: int = 0) -> ImageFeatures:
    """Drawn features of whole images and of four crops each, which resemble them."""
    weak = _unit(seed + 100, count, WIDTH)
    return ImageFeatures(weak, normalize(weak[:, None] + _unit(seed + 200, count, 4, WIDTH), dim=-1))


def _unit(seed: int, *shape: int) -> Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _check_declared(method: type[Method], found: Findings) -> None:
    """The scores it names, and that it asks for nothing that it is not given."""
    known = get_args(Score)
    found.expect(
        bool(method.scores) and set(method.scores) <= set(known),
        f"Its scores are {method.scores!r}. Wanted: some of {', '.join(known)}, the default first.",
    )
    for name, given in GIVEN.items():
        parameters = list(inspect.signature(getattr(method, name)).parameters.values())[1:]
        extra = [
            parameter.name
            for place, parameter in enumerate(parameters)
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY, parameter.KEYWORD_ONLY)
            and parameter.default is parameter.empty
            and place >= len(given)
        ]
        found.expect(
            not extra,
            f"Its {name} asks for {', '.join(extra)}, which it is never given: a method sees features and its own "
            f"labels. Wanted: {name}({', '.join(given)}).",
        )
    if method.trains:
        labels = method.pseudo_label is not Method.pseudo_label
        found.expect(labels, "It has a loss and no pseudo_label, which labels the images that the loss is of.")


def _check_made(case: _Case, found: Findings) -> None:
    """Made twice it is the same, it leaves the texts as they are, and all its tensors are state."""
    known = texts(CLASSES)
    method = create_method(case.settings, known, logit_scale=SCALE, token_width=WIDTH)
    for field in fields(TextFeatures):
        unchanged = torch.equal(getattr(known, field.name), getattr(texts(CLASSES), field.name))
        found.expect(unchanged, f"It changes the texts' {field.name} in place. Wanted: a copy.")
    other = case.make()
    for name in _different(method.state_dict(), other.state_dict()):
        found.expect(False, f"Made twice, its {name!r} differs. Wanted: draws from a generator with a seed of its own.")
    for name, value in vars(method).items():
        held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        if name not in ("_parameters", "_buffers", "_modules") and any(isinstance(one, Tensor) for one in held):
            found.expect(
                False,
                f"It keeps a tensor in {name!r}, which is neither moved to a device nor saved. Wanted: "
                "register_buffer, or nn.Parameter for what it learns.",
            )


def _survey(method: Method, weak: Tensor) -> None:
    """Have the method see all images, and labels of them if it needs some."""
    if method.known_labels == "needed":
        method.survey(weak, torch.arange(len(weak)) % method.num_classes)
    else:
        method.survey(weak)


def _check_scores(case: _Case, found: Findings) -> None:
    """Scores are finite, one a class, with and without crops, with two classes, and do not depend on other images."""
    for kind in case.kind.scores:
        with found.during(f"to score images by {kind!r}"), torch.no_grad():
            for classes in (CLASSES, 2):
                method = case.make(classes)
                if method.surveys:
                    _survey(method, images(6).weak)
                features = case.scored(kind, 5)
                scores = method.score(features, kind)
                _expect_matrix(scores, (5, classes), f"its score {kind!r} of {classes} classes", found)
                if scores.shape != (5, classes):
                    continue
                alone = method.score(ImageFeatures(features.weak[:1], features.crops[:1]), kind)
                same = alone.shape == (1, classes) and near(alone, scores[:1])
                found.expect(
                    same,
                    f"Its score {kind!r} of an image depends on the images beside it. Wanted: on that image alone.",
                )
                probabilities = method.probabilities(scores)
                found.expect(
                    near(probabilities.sum(1), torch.ones(5)),
                    f"Its probabilities by {kind!r} do not sum to 1.",
                )
    if case.kind.has_classifier:
        with found.during("to give its class vectors"):
            vectors = case.trained().classifier()
            shaped = vectors.ndim == 3 and vectors.shape[0] == CLASSES and vectors.shape[2] == WIDTH
            found.expect(
                shaped and near(vectors.norm(dim=-1), torch.ones(vectors.shape[:2])),
                f"Its class vectors are of shape {tuple(vectors.shape)}, or not of length 1. Wanted: (classes, J, D).",
            )
    else:
        own = case.kind.score is not Method.score
        found.expect(own, "It has neither a classifier nor a score. Wanted: one of them.")


def _check_training(case: _Case, found: Findings) -> None:
    """Labels, weights and losses are what the loop takes, and nothing becomes infinite."""
    if not case.kind.trains:
        return
    for what, classes, count, alike in (
        ("", CLASSES, 5, False),
        ("with two classes", 2, 5, False),
        ("with a single image", CLASSES, 1, False),
        ("with images that are all of one class", CLASSES, 5, True),
    ):
        with found.during(f"to take steps {what}".rstrip()):
            method = case.make(classes)
            if method.surveys:
                _survey(method, case.images(6).weak)
            for _, (pseudo, loss) in zip(range(STEPS), case.steps(method, count=count, alike=alike), strict=False):
                _expect_labels(pseudo, count, classes, what, found)
                found.expect(np.isfinite(loss), f"Its loss {what} is {loss}. Wanted: a finite number.")
            for name, value in method.state_dict().items():
                whole = not value.is_floating_point() or bool(value.isfinite().all())
                found.expect(whole, f"After {STEPS} steps {what} its {name!r} is no longer finite.")


def _expect_labels(pseudo: PseudoLabels, count: int, classes: int, what: str, found: Findings) -> None:
    labels, weights = pseudo.labels, pseudo.weights
    found.expect(
        labels.shape == (count,) and labels.dtype == torch.int64 and bool(((labels >= 0) & (labels < classes)).all()),
        f"Its labels are {labels.dtype} of shape {tuple(labels.shape)} {what}. Wanted: a class, int64, for each image.",
    )
    found.expect(
        weights.shape == (count,) and bool(((weights >= 0) & (weights <= 1)).all()),
        f"Its weights are not one in [0, 1] for each image {what}.",
    )
    _expect_matrix(pseudo.probabilities, (count, classes), f"its label probabilities {what}", found)
    carried = any(tensor.requires_grad for tensor in (weights, pseudo.probabilities))
    found.expect(not carried, "Its labels carry a gradient. Wanted: pseudo_label under torch.no_grad().")


def _check_state(case: _Case, found: Findings) -> None:
    """The state is all that later steps and scores depend on, and so is its part for classifying for scores."""
    with found.during("to load its state into another instance"):
        trained, resumed = case.trained(), case.make(seed=50, bare=True)
        resumed.load_state_dict(trained.state_dict())
        for _, (_, here), (_, there) in zip(range(2), case.steps(trained), case.steps(resumed), strict=False):
            found.expect(here == there, "Loaded again, it goes on otherwise. Wanted: all that it remembers in buffers.")
        for name in _different(trained.state_dict(), resumed.state_dict()):
            found.expect(False, f"Loaded again, its {name!r} goes on otherwise.")
    with found.during("to load what a saved model keeps of it"):
        trained, loaded = case.trained(), case.make(bare=True)
        loaded.load_inference_tensors(trained.inference_tensors())
        for kind in case.kind.scores:
            features = case.scored(kind, 5, seed=30)
            with torch.no_grad():
                alike = torch.equal(trained.score(features, kind), loaded.score(features, kind))
            found.expect(
                alike,
                f"Saved and loaded, its score {kind!r} differs. Wanted: in training_state what scores do not need.",
            )


class _Stopping(Progress):
    """Stops when it is told to, and keeps cautions to itself: the drawn images are few."""

    asked_to_stop = False

    def caution(self, message: str) -> None:
        """Say nothing."""


def _check_fit(
    method: type[Method],
    name: str,
    options: Mapping[str, Any],
    backbone: Backbone | None,
    folder: Path,
    found: Findings,
) -> None:
    """A fit ends the same if it is stopped on the way, and a saved model predicts as the one that was saved."""
    paths, encoder = draw_images(folder), backbone or ToyBackbone()
    pace = {"epochs": 2, "batch_size": 6, "anchor_steps": 4}
    settings: dict[str, Any] = {"views": {"crops": 2}, "data": {"cache": "temporary", "workers": 0}, "training": pace}
    config = make_config(merged(settings, {"method": {"name": name, **options}}))
    labels = None
    if method.known_labels == "needed":  # they are drawn class by class in turn
        labels = [list(COLOURS)[place % len(COLOURS)] if place % 2 else None for place in range(len(paths))]

    def fit(progress: _Stopping, on_epoch: Callable[[Any], None] = lambda record: None, **how: Any) -> FineAlign:
        model = FineAlign(list(COLOURS), config=config, method=method, backbone=encoder)
        return model.fit(paths, labels=labels, progress=progress, on_epoch=on_epoch, **how)

    whole = fit(_Stopping())
    if method.trains:
        stopping = _Stopping()
        try:
            fit(stopping, lambda record: setattr(stopping, "asked_to_stop", True), checkpoints=folder / "checkpoints")
        except StoppedError:
            resumed = fit(_Stopping(), checkpoints=folder / "checkpoints")
            for part in _different(whole.method_.state_dict(), resumed.method_.state_dict()):
                found.expect(False, f"Stopped and resumed, a run ends with another {part!r} than one that is not.")
    whole.save(folder / "model")
    given = encoder if (folder / "model" / "backbone").is_dir() else None
    by = whole.backbone_
    opened = FineAlign.load(folder / "model", backbone=given, device=str(by.device), precision=by.precision)
    expected, predicted = whole.predict_proba(paths), opened.predict_proba(paths)
    found.expect(bool(np.isfinite(expected).all()), "A fitted model's probabilities are not finite.")
    found.expect(np.array_equal(expected, predicted), "A saved model predicts otherwise than the one that was saved.")


def _different(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that differ, or that only one has."""
    alike = [name for name in one if name in other and torch.equal(one[name], other[name])]
    return sorted({*one, *other} - set(alike))


def _expect_matrix(values: Tensor, shape: tuple[int, int], what: str, found: Findings) -> None:
    found.expect(
        tuple(values.shape) == shape and bool(values.isfinite().all()),
        f"{what[:1].upper()}{what[1:]} are of shape {tuple(values.shape)} or not finite. Wanted: {shape}.",
    )
