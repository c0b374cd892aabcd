"""Check that zero-shot accuracy on this machine is what is known of the backbone, before anything is adapted.

Weights that are not what they are called, another split, other prompts or other class names change every figure of a
table, and none of them by an error. Zero-shot accuracy shows it in minutes: it is known to a decimal for OpenAI's
models, with OpenAI's prompts, on the test images that torchvision gives.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from finealign.benchmark.catalogue import DATA_SETS, LabelledSet
from finealign.benchmark.grid import Cell, Grid, claims, run_grid
from finealign.config import DEFAULT_BACKBONE
from finealign.errors import FinealignError
from finealign.runtime.progress import Progress

TOLERANCE = 1.0  # points
FOLDER = "zero-shot"  # under the grid's folder; in it a grid for each wording
OPENAI = "OpenAI's prompts"


@dataclass(frozen=True)
class Known:
    """A zero-shot accuracy that is known of a backbone, in percent, and what it was measured on and with."""

    dataset: str
    top1: float
    images: int  # test images
    prompts: tuple[str, ...]
    name: str  # of one of the classes, as the figure's


@dataclass(frozen=True)
class Checked:
    """What a check of one data set found, in percent."""

    dataset: str
    known: float
    found: float  # with OpenAI's prompts
    images: int  # test images here
    known_images: int  # test images behind the known figure
    others: dict[str, float] = field(default_factory=dict)  # by wording, where the check was out of tolerance
    advice: str = ""  # what differs, or what to look at; empty where nothing is out

    @property
    def within(self) -> bool:
        """Whether the accuracy is within TOLERANCE of what is known."""
        return _near(self.found, self.known)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "within": self.within}


# OpenAI's prompts for these sets: https://github.com/openai/CLIP/blob/d05afc436d78f1c48dc0dbf8e5980a9d471f35f6/data/prompts.md
_ARTICLES = ("a", "the")
_TEXTURES = tuple(
    f"a photo of {a} {{}} {noun}." for a in _ARTICLES for noun in ("texture", "pattern", "thing", "object")
)
_CARS = (
    *(f"a photo of {whose} {{}}." for whose in (*_ARTICLES, "my", "my dirty", "my clean", "my new", "my old")),
    "i love my {}!",
)
_SMALL = (
    *(f"a {kind}photo of {a} {{}}." for a in _ARTICLES
      for kind in ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")),
    *(f"a photo of {a} {size} {{}}." for a in _ARTICLES for size in ("small", "big")),
)  # fmt: skip
# What is known, by backbone. open_clip's own table of the same weights (docs/openclip_results.csv) is within 0.4:
# DTD 44.36, Pets 87.00, Food 84.00, Cars 59.63, CIFAR-100 64.23. On DTD in CoOp's split (1,692 images) it is 44.7.
KNOWN = {
    DEFAULT_BACKBONE: (
        Known("dtd", 44.4, 1880, _TEXTURES, "banded"),
        Known("oxford_pets", 87.3, 3669, ("a photo of a {}, a type of pet.",), "abyssinian"),
        Known("food101", 84.0, 25250, ("a photo of {}, a type of food.",), "apple pie"),
        Known("stanford_cars", 59.6, 8041, _CARS, "AM General Hummer SUV 2000"),
        Known("cifar100", 64.4, 10000, _SMALL, "aquarium fish"),
    )
}


def known_of(backbone: str, datasets: Sequence[str]) -> tuple[Known, ...]:
    """What is known of the backbone on these data sets; empty where that is nothing."""
    return tuple(known for known in KNOWN.get(backbone, ()) if known.dataset in datasets)


def check_zero_shot(
    grid: Grid,
    sets: Mapping[str, LabelledSet],
    *,
    progress: Progress | None = None,
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> list[Checked]:
    """Measure zero-shot on those of the grid's sets of which it is known for the grid's backbone.

    A set that is out of tolerance is measured with other wordings as well, and what differs is said. Each measurement
    is a cell of a grid under ``grid.out``, and so is made once. ``sets`` are the grid's data sets by name.

    Raises FinealignError as ``run_grid`` does, and where another process is measuring.
    """
    known = {one.dataset: one for one in known_of(grid.backbone, grid.datasets)}

    def measured(wording: str, prompts: Mapping[str, tuple[str, ...]]) -> dict[str, float]:
        return _measured(
            grid, wording, {name: _worded(sets[name], one) for name, one in prompts.items()}, progress, on_cell
        )

    found = measured(OPENAI, {name: one.prompts for name, one in known.items()})
    out = [name for name, top1 in found.items() if not _near(top1, known[name].top1)]
    others: dict[str, dict[str, float]] = {name: {} for name in known}
    for wording, prompts_of in _OTHER_WORDINGS.items():
        prompts = {name: prompts_of(sets[name]) for name in out}
        differing = {name: texts for name, texts in prompts.items() if set(texts) != set(known[name].prompts)}
        for name, top1 in measured(wording, differing).items():
            others[name][wording] = top1
    return [_checked(grid.backbone, one, found[name], sets[name], others[name]) for name, one in known.items()]


# Other wordings that figures in papers are of, and how this project words by default.
_OTHER_WORDINGS: dict[str, Callable[[LabelledSet], tuple[str, ...]]] = {
    "one prompt of the set": lambda task: (DATA_SETS[task.name].template or "a photo of a {}.",),
    "a photo of a ...": lambda task: ("a photo of a {}.",),
    "this project's prompts": lambda task: task.texts.templates,
}


def _worded(task: LabelledSet, prompts: tuple[str, ...]) -> LabelledSet:
    return replace(task, texts=replace(task.texts, templates=prompts))


def _measured(
    grid: Grid,
    wording: str,
    sets: Mapping[str, LabelledSet],
    progress: Progress | None,
    on_cell: Callable[[Cell], None],
) -> dict[str, float]:
    """Zero-shot top-1 in percent by data set, with the prompts that ``sets`` have."""
    if not sets:
        return {}
    folder = (
        grid.out / FOLDER / "".join(letter if letter.isalnum() else "-" for letter in wording.casefold()).strip("-")
    )
    settings = {name: value for name, value in grid.settings.items() if name != "method"}  # those are other methods'
    zero_shot = replace(grid, datasets=tuple(sets), methods=("zero-shot",), seeds=(0,), settings=settings, out=folder)
    cells = run_grid(zero_shot, sets=sets, progress=progress, on_cell=on_cell)
    if missing := len(sets) - len(cells):
        raise FinealignError(f"Zero-shot accuracy is not known yet. {how_to_wait(missing, claims(zero_shot))}")
    return {cell.dataset: 100 * cell.top1["global"] for cell in cells}


def how_to_wait(missing: int, waiting: Sequence[Path]) -> str:
    """What to do where cells of a grid are missing as other processes run them, by the claims of ``grid.claims``."""
    told = f"Other processes run {missing} of the cells; when they are done, the same command goes on."
    lost = f" If one of them was lost with its machine, remove its claim, as {waiting[0]}." if waiting else ""
    return told + lost


def _checked(backbone: str, known: Known, found: float, task: LabelledSet, others: Mapping[str, float]) -> Checked:
    images = len(task.test.paths)
    advice = "" if _near(found, known.top1) else _advice(backbone, known, task, others)
    return Checked(known.dataset, known.top1, found, images, known.images, dict(others), advice)


def _advice(backbone: str, known: Known, task: LabelledSet, others: Mapping[str, float]) -> str:
    """Which wording or split differs, as far as the measurements tell; else what to look at."""
    data_set, images = DATA_SETS[known.dataset], len(task.test.paths)
    reasons = []
    if images != known.images:
        reasons.append(
            f"The split differs: {images} test images here, {known.images} behind the known figure, which are those "
            "of torchvision. A folder with train/ and test/ is read before a split file of CoOp, and that before "
            "torchvision's layout."
        )
    known_names = known.name.casefold() in {name.casefold() for name in task.texts.classes}
    if not known_names or (data_set.texts and not task.described):
        reasons.append(
            f"The class names differ, in part at least: here they are as {task.texts.classes[0]!r}, those of the known "
            f"figure are as {known.name!r}. Names are made from labels on disk where not all of those are known."
        )
    reached = [f"with {wording} it is {top1:.1f}" for wording, top1 in others.items() if _near(top1, known.top1)]
    if reached:
        reasons.append(f"The wording differs: {' and '.join(reached)}.")
    if not reasons:
        reasons.append(
            "Neither split nor wording explains it. Look at the weights (finealign doctor --verify --backbone "
            f"{backbone}), and whether images or labels were changed, as in smaller copies."
        )
    return " ".join(reasons)


def _near(found: float, known: float) -> bool:
    return abs(found - known) <= TOLERANCE + 1e-9
