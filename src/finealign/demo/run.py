"""`finealign demo`: compare the methods on the drawn world, with the code that `finealign adapt` runs.

The demo's folder holds ``world/``, a run folder for each method that trains, ``demo.png``, ``demo.json`` and
``report.md``. The labels of the test images are read here for measuring only; no method gets them.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finealign.backbone.base import Backbone
from finealign.classifier import FineAlign
from finealign.config import Config, make_config
from finealign.demo.model import demo_model
from finealign.demo.picture import EXAMPLES, Example, Panels, draw
from finealign.demo.report import write_up
from finealign.demo.result import (
    ADAPTED,
    CONTENTS,
    METHODS,
    PICTURE,
    RESULT,
    START,
    SYNTHETIC,
    TRAINED,
    WORLD,
    DemoResult,
    MethodResult,
)
from finealign.demo.species import GENUS_SIZE
from finealign.demo.world import World, make_world
from finealign.errors import ImageInputError, OutputError
from finealign.evaluate.metrics import paired_difference, top_k_accuracy
from finealign.evaluate.summary import Evaluation, evaluate_scores
from finealign.evaluate.truth import read_truth
from finealign.images.listing import list_images
from finealign.model.inference import Predictor
from finealign.model.prepare import Prepared
from finealign.run.adapt import adapt_into
from finealign.runtime.atomic import save_bytes, save_text
from finealign.runtime.progress import Progress
from finealign.runtime.replace import make_room, require_replaceable
from finealign.training.state import EpochRecord
from finealign.types import ImageFeatures, TextFeatures, Truth

# Settings that differ from the defaults of `finealign adapt`, as `make_config` takes them; the same for all methods.
SETTINGS: dict[str, Any] = {"views": {"crops": 5}, "training": {"epochs": 2, "batch_size": 32}}
DEMO_IMAGES = {"unlabelled": 1200, "test": 600}
QUICK_IMAGES = {"unlabelled": 384, "test": 192}

WARM_UP = 32  # images encoded before anything is timed


def default_folder(*, seed: int, quick: bool) -> Path:
    """The demo's folder when none is given."""
    return Path("runs") / f"demo-seed{seed}{'-quick' if quick else ''}"


def run_demo(
    folder: Path,
    *,
    seed: int = 0,
    quick: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> DemoResult:
    """Draw the world, run every method on it, and write picture, results and report into ``folder``.

    ``quick`` uses fewer images. ``device`` is as in the settings.

    Raises OutputError when ``folder`` holds a demo and ``overwrite`` is not given, when it holds anything else, or when
    it cannot be written; ModelError when the weights that ship with the package are missing or damaged; ConfigError for
    an invalid seed.
    """
    progress = progress or Progress()
    began = time.perf_counter()
    configs = _configs({**SETTINGS, "device": device}, seed=seed)
    make_room(folder, _replaced(folder, overwrite=overwrite))
    _write_json({"status": "running", "seed": seed, "quick": quick}, folder / RESULT)
    images = QUICK_IMAGES if quick else DEMO_IMAGES
    try:
        world = make_world(folder / WORLD, seed=seed, **images, progress=progress)
    except OSError as error:
        raise OutputError(f"The world cannot be drawn in {folder}: {error}. Choose another with --out.") from error
    truth = read_truth(world.truth, world.classes)
    by_method = _compare(folder, configs, world, truth, progress)
    with progress.stage("drawing the picture", None):
        save_bytes(draw(_panels(by_method, truth, world.classes)), folder / PICTURE)
    result = DemoResult(
        folder=folder,
        methods=_results(by_method),
        chance=1 / len(world.classes),
        seconds=time.perf_counter() - began,
        seed=seed,
        quick=quick,
        unlabelled=len(list_images(world.unlabelled)),
        test=len(truth.paths),
    )
    save_text(write_up(result, world, SETTINGS), result.report)
    _write_json(result.as_json(), folder / RESULT)
    return result


# --- the methods ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Measured:
    """A method's model and its results on the n test images; the last four fields are those of ``MethodResult``."""

    model: FineAlign
    evaluation: Evaluation
    labels: NDArray[np.int64]  # (n,) the predicted class of each image, in the order of the truth
    seconds: float
    images_per_second: float
    curve: tuple[float, ...]
    run: Path | None


def _configs(settings: dict[str, Any], *, seed: int) -> dict[str, Config]:
    """The configuration of each method."""
    common = {**settings, "backbone": demo_model(), "seed": seed}
    return {name: make_config({**common, "method": {"name": name}}) for name in METHODS}


def _compare(
    folder: Path, configs: dict[str, Config], world: World, truth: Truth, progress: Progress
) -> dict[str, _Measured]:
    """Run and measure each method in the order of ``METHODS``; the results by method."""
    by_method: dict[str, _Measured] = {}
    test = _TestImages(truth, progress)
    backbone: Backbone | None = None
    text_features: TextFeatures | None = None
    for name, config in configs.items():
        model = FineAlign(world.classes, descriptions=world.descriptions, config=config)
        # The first one loads the backbone and encodes the texts; the others are given both.
        prepared = model.prepare(world.unlabelled, backbone=backbone, text_features=text_features, progress=progress)
        backbone, text_features = prepared.backbone, prepared.text_features
        curve: list[float] = []
        run = None
        if name in TRAINED:
            run = folder / name
            curve.append(test.top1(test.by_start(model.unlearned(backbone=backbone))))
            seconds = _train(run, model, prepared, test, curve, progress)
            seen = test.by_own(model, f"{name}: test images")
            curve.append(test.top1(seen))
        else:
            began = time.perf_counter()
            model.fit(prepared, progress=progress)
            seconds = time.perf_counter() - began
            if not by_method:  # one-off costs, such as torch choosing kernels, must not count against the first method
                model.features(truth.paths[:WARM_UP], crops=False)
            seen = test.by_start(model)
        by_method[name] = _Measured(
            model=model,
            evaluation=evaluate_scores(seen.scores, seen.probabilities, np.array(truth.labels), world.classes),
            labels=seen.scores.argmax(axis=1),
            seconds=seconds + seen.seconds,
            images_per_second=len(seen.scores) / max(seen.seconds, 1e-6),  # a clock may be too coarse for a few images
            curve=tuple(curve),
            run=run,
        )
    return by_method


@dataclass(frozen=True, eq=False)
class _Seen:
    """The n test images as a model scores them by its default score."""

    scores: NDArray[np.float32]  # (n, C)
    probabilities: NDArray[np.float32]  # (n, C)
    seconds: float  # encoding and scoring


class _TestImages:
    """The test images. As the backbone sees them before it learns, they are encoded once for all methods."""

    def __init__(self, truth: Truth, progress: Progress) -> None:
        self.truth, self.progress = truth, progress
        self.start: dict[bool, tuple[ImageFeatures, float]] = {}  # with crops or without: features, and the seconds

    def by_start(self, model: FineAlign) -> _Seen:
        """The test images as scored by a model whose backbone has not learned."""
        crops = model.score_ != "global"
        if crops not in self.start:
            self.start[crops] = self._encoded(model, f"test images{' and their crops' if crops else ''}")
        return _seen(model, *self.start[crops])

    def by_own(self, model: FineAlign, stage_name: str) -> _Seen:
        """The test images as encoded and scored by a model as it is now."""
        return _seen(model, *self._encoded(model, stage_name))

    def top1(self, seen: _Seen) -> float:
        return top_k_accuracy(seen.scores, np.array(self.truth.labels), 1)

    def _encoded(self, model: FineAlign, stage_name: str) -> tuple[ImageFeatures, float]:
        """What the model's default score needs, and the seconds. Raises ImageInputError if an image cannot be read."""
        began = time.perf_counter()
        with self.progress.stage(stage_name, None):
            features, set_aside = model.features(self.truth.paths, crops=model.score_ != "global")
        for image in set_aside:
            raise ImageInputError(
                f"{image.path} of the demo's world cannot be read any more: {image.reason}. "
                "Run the demo again with --overwrite and leave its folder alone until it is done."
            )
        return features, time.perf_counter() - began


@torch.inference_mode()
def _seen(model: FineAlign, features: ImageFeatures, seconds: float) -> _Seen:
    """Score features that took so many seconds to encode."""
    began = time.perf_counter()
    scores, probabilities = Predictor.scored(model.model_, features, model.score_)
    return _Seen(scores, probabilities, seconds + time.perf_counter() - began)


def _results(by_method: dict[str, _Measured]) -> tuple[MethodResult, ...]:
    start = by_method[START].evaluation.correct
    return tuple(
        MethodResult(
            method=name,
            top1=measured.evaluation.top1,
            gain=None if name == START else paired_difference(measured.evaluation.correct, start),
            seconds=measured.seconds,
            images_per_second=measured.images_per_second,
            curve=measured.curve,
            run=measured.run,
        )
        for name, measured in by_method.items()
    )


def _train(
    run: Path, model: FineAlign, prepared: Prepared, test: _TestImages, curve: list[float], progress: Progress
) -> float:
    """Adapt into a run folder, and return the seconds of the fit.

    The accuracy after each epoch but the last, which is measured as the result, is appended to ``curve``.
    """

    def measure(record: EpochRecord) -> None:
        if record.epoch != model.config_.training.epochs:
            curve.append(test.top1(test.by_own(model, f"test images after epoch {record.epoch}")))

    return adapt_into(run, model, prepared, keep_adapted=True, on_epoch=measure, progress=progress).fit_seconds


# --- picture and report -----------------------------------------------------------------------------------------------


def _panels(by_method: dict[str, _Measured], truth: Truth, classes: tuple[str, ...]) -> Panels:
    start, adapted = by_method[START], by_method[ADAPTED]
    was_right, is_right = start.evaluation.correct, adapted.evaluation.correct
    changed = start.labels != adapted.labels
    mended, broken = int((is_right & ~was_right).sum()), int((was_right & ~is_right).sum())
    still = int(changed.sum()) - mended - broken
    examples = [
        Example(
            path=truth.paths[index],
            explanation=adapted.model.explain(truth.paths[index], score="las"),
            before=int(start.labels[index]),
            after=int(adapted.labels[index]),
            truth=truth.labels[index],
        )
        for index in choose_examples(start.labels, adapted.labels, np.array(truth.labels), most=EXAMPLES)
    ]
    return Panels(
        title=f"finealign demo: {len(classes)} species of drawn birds, told apart without a label",
        note=SYNTHETIC,
        classes=classes,
        curves={name: measured.curve for name, measured in by_method.items() if measured.curve},
        levels={name: measured.evaluation.top1.mean for name, measured in by_method.items() if not measured.curve},
        chance=1 / len(classes),
        before=start.evaluation.confusion,
        after=adapted.evaluation.confusion,
        before_name=f"Before: descriptions ({START})",
        after_name=f"After: {ADAPTED}",
        examples=examples,
        strip=f"{int(changed.sum())} of {len(truth.paths)} test images: {mended} mended, {broken} made wrong, {still} "
        f"wrong before and after. Frames: the crops {ADAPTED} looks at, the heavier the more a crop counts.",
        group=GENUS_SIZE if len(classes) % GENUS_SIZE == 0 else None,
    )


def choose_examples(
    before: NDArray[np.int64], after: NDArray[np.int64], truth: NDArray[np.int64], *, most: int
) -> list[int]:
    """The indices of up to ``most`` images whose label changed: first those corrected, then those made wrong.

    The two kinds are chosen in proportion to their numbers, with at least one image made wrong if there is any. Images
    that were wrong before and after fill the remaining places. Within each kind the choice is spread evenly over the
    true classes.

    Args:
        before: (n,) the start's labels, as class indices.
        after: (n,) the adapted model's labels.
        truth: (n,) the true classes.
        most: how many to choose.
    """
    order = np.argsort(truth, kind="stable")
    was_right, is_right = (before == truth)[order], (after == truth)[order]
    mended, broken = order[is_right & ~was_right], order[was_right & ~is_right]
    still = order[(before != after)[order] & ~was_right & ~is_right]
    share = len(broken) / max(1, len(mended) + len(broken))
    reserved = max(min(1, len(broken)), round(most * share))
    first = min(len(mended), most - reserved)
    second = min(len(broken), most - first)
    third = min(len(still), most - first - second)
    return [*_spaced(mended, first), *_spaced(broken, second), *_spaced(still, third)]


def _spaced(indices: NDArray[np.intp], count: int) -> list[int]:
    """``count`` evenly spaced items of ``indices``, which has at least as many."""
    places = np.floor((np.arange(count) + 0.5) * len(indices) / max(1, count)).astype(int)
    return [int(index) for index in indices[places]]


# --- the folder -------------------------------------------------------------------------------------------------------


def _replaced(folder: Path, *, overwrite: bool) -> list[Path]:
    """The paths to remove before the demo begins; raises OutputError where it may not begin."""

    def foreign(names: set[str]) -> str:
        missing = [name for name in (RESULT, WORLD) if name not in names]
        if not missing:
            return ""
        verb = "is" if len(missing) == 1 else "are"
        return f"holds {len(names)} things and is not the folder of a demo ({' and '.join(missing)} {verb} missing)"

    names = require_replaceable(folder, kind="demo", foreign=foreign, overwrite=overwrite)
    return [folder / name for name in CONTENTS if name in names]


def _write_json(values: dict[str, Any], path: Path) -> None:
    save_text(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n", path)
