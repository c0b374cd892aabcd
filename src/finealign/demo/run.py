"""`finealign demo`: the methods side by side in the drawn world, by the code that `finealign adapt` runs.

The folder it leaves holds ``world/``, a run folder for each method that trains, ``demo.png``, ``demo.json`` and
``report.md``. The labels of the test images are read here, to measure with, and reach no method.
"""

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from finealign.classifier import FineAlign
from finealign.config import Config, make_config
from finealign.demo.model import demo_model
from finealign.demo.picture import EXAMPLES, Example, Panels, draw
from finealign.demo.species import GENUS_SIZE
from finealign.demo.world import World, make_world
from finealign.errors import ImageInputError, OutputError
from finealign.evaluate import Evaluation, Interval, evaluate_scores, paired_difference, read_truth, top_k_accuracy
from finealign.images import list_images
from finealign.progress import Progress
from finealign.run_folder import adapt_into, make_room, names_in
from finealign.storage import save_bytes, save_text
from finealign.training import EpochRecord
from finealign.types import Prediction, SetAside, Truth

METHODS = {  # in the order they are run and shown, with what each is in a few words
    "zero-shot": "class names in templates",
    "cupl": "mean of class descriptions",
    "wca": "weighted crops and descriptions",
    "self-training": "learns from the start's labels",
    "fair": "learns, relabelling by crops",
}
TRAINED = ("self-training", "fair")
START = "cupl"  # what both trained methods start from, so what they are held against
ADAPTED = "fair"

WORLD, PICTURE, RESULT, REPORT = "world", "demo.png", "demo.json", "report.md"
CONTENTS = (WORLD, *TRAINED, PICTURE, RESULT, REPORT)

# What differs from the defaults of `finealign adapt`, as `make_config` takes it; the same for all methods.
DEMO_SETTINGS: dict[str, Any] = {"views": {"crops": 8, "refresh_epochs": 2}, "training": {"epochs": 4}}
QUICK_SETTINGS: dict[str, Any] = {"views": {"crops": 4, "refresh_epochs": 2}, "training": {"epochs": 4}}
# WCA as published draws 60 crops an image, which alone would take longer than the rest of the demo.
DEMO_WCA_CROPS, QUICK_WCA_CROPS = 16, 8
DEMO_IMAGES = {"unlabelled": 1200, "test": 600}
QUICK_IMAGES = {"unlabelled": 384, "test": 192}

WARM_UP = 32  # images scored before the clock runs
SYNTHETIC = (
    "The world is synthetic: a program draws the birds and their names are invented. "
    "The figures compare the methods here and say nothing about photos."
)


@dataclass(frozen=True)
class MethodResult:
    """How one method did on the test images, by its default score."""

    method: str
    top1: Interval  # a fraction in [0, 1], with its 95 % interval
    gain: Interval | None  # the paired difference to START on the same images; None for START itself
    seconds: float  # adapting and scoring the test images: without loading, drawing the world, measuring epochs
    images_per_second: float  # test images scored
    curve: tuple[float, ...]  # top-1 by this method's score after epoch 0 (nothing learned), 1, ...; or empty
    run: Path | None  # the run folder of a method that trains


@dataclass(frozen=True)
class DemoResult:
    """What a demo found, and where it left it."""

    folder: Path
    methods: tuple[MethodResult, ...]
    chance: float  # the accuracy of guessing: one over the number of classes
    seconds: float  # of the whole demo
    seed: int
    quick: bool
    unlabelled: int  # images adapted to
    test: int  # images measured on

    @property
    def picture(self) -> Path:
        return self.folder / PICTURE

    @property
    def report(self) -> Path:
        return self.folder / REPORT

    def as_json(self) -> dict[str, Any]:
        return {
            "results": [
                {
                    "method": found.method,
                    "top1": found.top1.mean,
                    "seconds": round(found.seconds, 3),
                    "images_per_second": round(found.images_per_second, 1),
                }
                for found in self.methods
            ],
            "chance": self.chance,
            "out": str(self.folder),
            "picture": str(self.picture),
            "report": str(self.report),
            "seconds": round(self.seconds, 2),
            "seed": self.seed,
            "quick": self.quick,
            "images": {"unlabelled": self.unlabelled, "test": self.test},
        }


def default_folder(*, seed: int, quick: bool) -> Path:
    """Where a demo goes when no folder is named."""
    return Path("runs") / f"demo-seed{seed}{'-quick' if quick else ''}"


def run_demo(
    folder: Path, *, seed: int = 0, quick: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> DemoResult:
    """Draw the world, run every method on it, and leave picture, figures and report in ``folder``.

    Raises OutputError when the folder holds something and ``overwrite`` is not given, or holds anything but a demo;
    ModelError when the weights that ship with the package are not whole; ConfigError for a seed that is none.
    """
    progress = progress or Progress()
    began = time.perf_counter()
    settings = QUICK_SETTINGS if quick else DEMO_SETTINGS
    configs = _configs(settings, wca_crops=QUICK_WCA_CROPS if quick else DEMO_WCA_CROPS, seed=seed)
    make_room(folder, _replaced(folder, overwrite=overwrite))
    _write_json({"status": "running", "seed": seed, "quick": quick}, folder / RESULT)
    images = QUICK_IMAGES if quick else DEMO_IMAGES
    try:
        world = make_world(folder / WORLD, seed=seed, **images, progress=progress)
    except OSError as error:
        raise OutputError(f"The world cannot be drawn in {folder}: {error}. Choose another with --out.") from error
    truth = read_truth(world.truth, world.classes)
    found = _compare(folder, configs, world, truth, progress)
    with progress.stage("drawing the picture", None):
        save_bytes(draw(_panels(found, truth, world.classes)), folder / PICTURE)
    result = DemoResult(
        folder=folder,
        methods=_results(found),
        chance=1 / len(world.classes),
        seconds=time.perf_counter() - began,
        seed=seed,
        quick=quick,
        unlabelled=len(list_images(world.unlabelled)),
        test=len(truth.paths),
    )
    save_text(_report(result, world, settings, configs), result.report)
    _write_json(result.as_json(), folder / RESULT)
    return result


# --- the methods ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Measured:
    """A method's model and what was measured of it: n test images."""

    model: FineAlign
    evaluation: Evaluation
    labels: NDArray[np.int64]  # (n,) what the method made of the images, in the order of the truth
    seconds: float
    images_per_second: float
    curve: tuple[float, ...]
    run: Path | None


def _configs(settings: dict[str, Any], *, wca_crops: int, seed: int) -> dict[str, Config]:
    """The configuration of each method."""
    common = {**settings, "backbone": demo_model(), "seed": seed}
    crops = {"wca": {"views": {**settings.get("views", {}), "crops": wca_crops}}}
    return {name: make_config({**common, **crops.get(name, {}), "method": {"name": name}}) for name in METHODS}


def _compare(
    folder: Path, configs: dict[str, Config], world: World, truth: Truth, progress: Progress
) -> dict[str, _Measured]:
    """Every method in turn, in the order of ``METHODS``."""
    found: dict[str, _Measured] = {}
    untouched = None  # the backbone of the methods that train nothing
    for name, config in configs.items():
        model = FineAlign(world.classes, descriptions=world.descriptions, config=config)
        curve: list[float] = []
        run = None
        if name in TRAINED:
            run = folder / name
            before = FineAlign(world.classes, descriptions=world.descriptions, config=config)
            _measure(before.unlearned(backbone=untouched), truth, f"{name} with nothing learned", curve, progress)
            seconds = _train(run, model, world, truth, curve, progress)
        else:
            untouched = untouched or model.load_backbone(config, progress)
            started = time.perf_counter()
            model.fit(world.unlabelled, backbone=untouched, progress=progress)
            seconds = time.perf_counter() - started
            if not found:  # or the first method would pay for what all need, as the kernels torch chooses
                _predict(model, truth.paths[:WARM_UP], "warming up", progress)
        started = time.perf_counter()
        predictions = _predict(model, truth.paths, f"{name}: test images", progress)
        scoring = time.perf_counter() - started
        scores = np.stack([one.scores for one in predictions])
        probabilities = np.stack([one.probabilities for one in predictions])
        found[name] = _Measured(
            model=model,
            evaluation=evaluate_scores(scores, probabilities, np.array(truth.labels), world.classes),
            labels=scores.argmax(axis=1),
            seconds=seconds + scoring,
            images_per_second=len(predictions) / max(scoring, 1e-6),  # a clock may be too coarse for a handful
            curve=tuple(curve),
            run=run,
        )
    return found


def _results(found: dict[str, _Measured]) -> tuple[MethodResult, ...]:
    start = found[START].evaluation.correct
    return tuple(
        MethodResult(
            method=name,
            top1=one.evaluation.top1,
            gain=None if name == START else paired_difference(one.evaluation.correct, start),
            seconds=one.seconds,
            images_per_second=one.images_per_second,
            curve=one.curve,
            run=one.run,
        )
        for name, one in found.items()
    )


def _train(run: Path, model: FineAlign, world: World, truth: Truth, curve: list[float], progress: Progress) -> float:
    """Adapt into a run folder: the seconds it took, and in ``curve`` the accuracy after each epoch."""

    def measure(record: EpochRecord) -> None:
        _measure(model, truth, f"test images after epoch {record.epoch}", curve, progress)

    return adapt_into(run, model, world.unlabelled, keep_adapted=True, on_epoch=measure, progress=progress).fit_seconds


def _measure(model: FineAlign, truth: Truth, stage_name: str, curve: list[float], progress: Progress) -> None:
    scores = np.stack([one.scores for one in _predict(model, truth.paths, stage_name, progress)])
    curve.append(top_k_accuracy(scores, np.array(truth.labels), 1))


def _predict(model: FineAlign, paths: Sequence[Path], stage_name: str, progress: Progress) -> list[Prediction]:
    """The prediction of every image by the model's default score. Raises ImageInputError if one cannot be read."""
    predictions = []
    with progress.stage(stage_name, len(paths)) as stage:
        for found in model.iter_predictions(paths):
            if isinstance(found, SetAside):
                raise ImageInputError(
                    f"{found.path} of the demo's world cannot be read any more: {found.reason}. "
                    "Run the demo again with --overwrite and leave its folder alone until it is done."
                )
            predictions.append(found)
            stage.advance(1)
    return predictions


# --- picture and report -----------------------------------------------------------------------------------------------


def _panels(found: dict[str, _Measured], truth: Truth, classes: tuple[str, ...]) -> Panels:
    start, adapted = found[START], found[ADAPTED]
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
        curves={name: one.curve for name, one in found.items() if one.curve},
        levels={name: one.evaluation.top1.mean for name, one in found.items() if not one.curve},
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
    """Up to ``most`` images whose label changed, by their index: mended ones first, then those made wrong.

    The two come in proportion to their numbers, with at least one made wrong where there is any; those wrong before
    and after fill what is left. Within each the choice is spread evenly over the true classes. All (n,).
    """
    order = np.argsort(truth, kind="stable")
    was_right, is_right = (before == truth)[order], (after == truth)[order]
    mended, broken = order[is_right & ~was_right], order[was_right & ~is_right]
    still = order[(before != after)[order] & ~was_right & ~is_right]
    share = len(broken) / max(1, len(mended) + len(broken))
    wanted = max(min(1, len(broken)), round(most * share))
    first = min(len(mended), most - wanted)
    second = min(len(broken), most - first)
    third = min(len(still), most - first - second)
    return [*_spaced(mended, first), *_spaced(broken, second), *_spaced(still, third)]


def _spaced(indices: NDArray[np.intp], count: int) -> list[int]:
    """``count`` of the indices, evenly spaced; there are at least as many."""
    places = np.floor((np.arange(count) + 0.5) * len(indices) / max(1, count)).astype(int)
    return [int(index) for index in indices[places]]


def _report(result: DemoResult, world: World, settings: dict[str, Any], configs: dict[str, Config]) -> str:
    rows = [
        f"| {one.method} | {METHODS[one.method]} | {one.top1.mean:.1%} | {one.top1.low:.1%} to {one.top1.high:.1%} "
        f"| {points(one.gain) if one.gain else '-'} | {one.seconds:.1f} | {one.images_per_second:.0f} |"
        for one in result.methods
    ]
    runs = [f"- `{one.run}`: {one.method}, {METHODS[one.method]}" for one in result.methods if one.run]
    adapted = shlex.quote(str(result.folder / ADAPTED))
    unlabelled, labelled = shlex.quote(str(world.unlabelled)), shlex.quote(str(world.truth))
    labels = shlex.quote(str(result.folder / "labels.csv"))
    return f"""# finealign demo

{len(world.classes)} species of birds, {result.unlabelled} images without a label to adapt to, {result.test} others to \
measure on. Seed {result.seed}, {result.seconds:.0f} seconds in all.

**{SYNTHETIC}** The backbone is a small one that ships with finealign and was never shown this style of drawing.

| method | what it is | top-1 | 95 % interval | against {START}, points | seconds | images/s |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Chance is {result.chance:.1%}. Points against {START} are paired, image by image, with their 95 % interval. Seconds are
for adapting and scoring the test images, images/s for the scoring alone. Each method is measured by its default score,
those that train after their last epoch. Intervals are bootstrapped over the test images of this one run; another seed
moves the figures as well.

![accuracy by epoch, confusions, and labels that changed]({PICTURE})

Epoch 0 is each method's own score with nothing learned: the descriptions on the whole image for self-training, on the
crops for fair. The test images are scored after each epoch to draw the curves; their labels reach no method.

## Settings

Beside the defaults of `finealign adapt`; {configs["wca"].views.crops} crops for wca, whose published setting is 60:

```yaml
{yaml.safe_dump(settings, sort_keys=False).rstrip()}
```

All of them, resolved, are in `config.yaml` of each run folder:

{chr(10).join(runs)}

## Go on

```bash
finealign predict {adapted} {unlabelled} --out {labels}
finealign evaluate {adapted} {labelled}
```

The same with images of your own: `finealign adapt IMAGES --classes NAMES --descriptions SENTENCES.json`.
"""


def points(difference: Interval) -> str:
    """A difference of two accuracies, and its interval, in points."""
    return f"{100 * difference.mean:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


# --- the folder -------------------------------------------------------------------------------------------------------


def _replaced(folder: Path, *, overwrite: bool) -> list[Path]:
    """What has to go for the demo to begin; raises OutputError where it may not begin."""
    there = names_in(folder)
    if not there:
        return []
    missing = [name for name in (RESULT, WORLD) if name not in there]
    if missing:
        raise OutputError(
            f"{folder} holds {len(there)} things and is not the folder of a demo ({' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing), so nothing in it is touched. Choose another with --out."
        )
    if not overwrite:
        raise OutputError(f"{folder} already holds a demo. Use --overwrite to replace it, or another --out.")
    return [folder / name for name in CONTENTS if name in there]


def _write_json(values: dict[str, Any], path: Path) -> None:
    save_text(json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n", path)
