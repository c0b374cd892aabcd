"""The grid: every method on every set with every seed, each cell run once and kept as a file.

``OUT/cells/SET/METHOD-seedN.json`` is a finished cell. A cell being run has a ``.claim`` beside it, made atomically,
so that several processes or machines that share OUT never run one twice; the claim of a process that has died on this
machine is taken over.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from finealign.backbone import Backbone
from finealign.benchmark.catalogue import LabelledSet, load_set
from finealign.classifier import FineAlign
from finealign.config import Config, make_config, merged
from finealign.errors import BackboneError, FinealignError, OutputError
from finealign.methods import method_settings
from finealign.progress import Progress
from finealign.run_folder import versions
from finealign.storage import save_text
from finealign.types import ImageFeatures, Truth
from finealign.verdict import Verdict, judge_model, start_features

CELLS, PLAN = "cells", "grid.json"


@dataclass(frozen=True)
class Cell:
    """One run of the grid, finished: how a method did on the test images of a set."""

    dataset: str
    method: str  # a name, or NAME@PRESET
    seed: int
    score: str  # the method's own
    top1: dict[str, float]  # by each score the method has, and "start": zero-shot with the same descriptions
    correct: dict[str, str]  # likewise: "0" or "1" an image, in the order of the truth
    images: int  # learned from
    seconds: dict[str, float]  # "fit"; "predict", of the test images by all scores
    epochs: int
    verdict: dict[str, Any] | None  # of the label-free judge; None where nothing was learned
    settings: dict[str, Any]  # resolved
    versions: dict[str, str]
    changed: list[float] = field(default_factory=list)  # share of pseudo-labels that changed, by epoch

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each test image is right by the method's own score."""
        return np.array([letter == "1" for letter in self.correct[self.score]])

    @property
    def start_right(self) -> NDArray[np.bool_]:
        return np.array([letter == "1" for letter in self.correct["start"]])


@dataclass(frozen=True)
class Grid:
    """What is to be run, and where."""

    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    backbone: str
    data_root: Path
    out: Path
    settings: Mapping[str, Any] = field(default_factory=dict)  # for every cell alike, over the methods' presets
    download: bool = False

    def config(self, method: str, seed: int) -> Config:
        common = {"backbone": self.backbone, "seed": seed}
        return make_config(merged(merged(method_settings(method), self.settings), common))

    def path(self, dataset: str, method: str, seed: int) -> Path:
        return self.out / CELLS / file_name(dataset) / f"{method}-seed{seed}.json"


def file_name(dataset: str) -> str:
    """A set's name as a folder's; of ``path:DIR`` the last part and what tells two such folders apart."""
    if not dataset.startswith("path:"):
        return dataset
    folder = Path(dataset.removeprefix("path:")).expanduser().resolve()
    return f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}"


def run_grid(
    grid: Grid, *, progress: Progress | None = None, on_cell: Callable[[Cell], None] = lambda cell: None
) -> list[Cell]:
    """Run the cells that are not there yet and return all that are, in the order sets, methods, seeds.

    Cells another process is running are left to it. Raises FinealignError: an unknown set or method, wrong settings
    or a set that is not on disk stop the grid before its first cell; OutputError when OUT holds another grid.
    """
    progress = progress or Progress()
    for method, seed in product(grid.methods, grid.seeds):
        grid.config(method, seed)
    sets = {name: load_set(name, grid.data_root, download=grid.download) for name in grid.datasets}
    _same_grid(grid)
    runner = _Runner(grid, progress)
    for name, method, seed in product(grid.datasets, grid.methods, grid.seeds):
        path = grid.path(name, method, seed)
        if path.exists():
            continue
        with _claimed(path) as ours:
            if ours and not path.exists():
                cell = runner.run(sets[name], method, seed)
                save_text(json.dumps(asdict(cell)) + "\n", path)
                on_cell(cell)
    return read_cells(grid)


def read_cells(grid: Grid) -> list[Cell]:
    """The finished cells of a grid. Raises OutputError for one that cannot be read."""
    return [
        replace(read_cell(path), dataset=cell[0])  # a folder may have been named another way then
        for cell in product(grid.datasets, grid.methods, grid.seeds)
        if (path := grid.path(*cell)).exists()
    ]


def read_cell(path: Path) -> Cell:
    """A finished cell. Raises OutputError."""
    try:
        return Cell(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{path} is not a cell of this version ({error}). Remove it to run it again.") from error


def _same_grid(grid: Grid) -> None:
    """Cells of other settings or another backbone must not stand in one table."""
    wanted = {"backbone": grid.backbone, "settings": dict(grid.settings)}
    path = grid.out / PLAN
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} cannot be read: {error}. Choose another --out.") from error
        if found != wanted:
            raise OutputError(
                f"{grid.out} holds a grid of backbone {found.get('backbone')!r} with settings "
                f"{found.get('settings')!r}; this one has {grid.backbone!r} and {dict(grid.settings)!r}. Give the "
                "same, or choose another --out."
            )
        return
    if grid.out.exists() and any(grid.out.iterdir()):
        raise OutputError(f"{grid.out} is not empty and holds no grid ({PLAN} is missing). Choose another --out.")
    save_text(json.dumps(wanted, indent=1) + "\n", path)


@contextmanager
def _claimed(cell: Path) -> Iterator[bool]:
    """Whether the cell is ours to run: no one else has claimed it and lives."""
    claim = cell.with_suffix(".claim")
    cell.parent.mkdir(parents=True, exist_ok=True)
    if claim.exists() and _dead(claim):
        claim.unlink(missing_ok=True)
    try:
        handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        yield False
        return
    with os.fdopen(handle, "w", encoding="utf-8") as opened:
        owner = {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        json.dump(owner, opened)
    try:
        yield True
    finally:
        claim.unlink(missing_ok=True)


def _dead(claim: Path) -> bool:
    """Whether the process that made a claim is known to be gone: on another machine nothing is known."""
    try:
        owner = json.loads(claim.read_text(encoding="utf-8"))
        if owner["host"] != platform.node():
            return False
        found = psutil.Process(int(owner["pid"]))
        again = abs(found.create_time() - owner["started"]) > 1  # the number was given to another process
        return again or found.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (FileNotFoundError, psutil.AccessDenied):
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return time.time() - claim.stat().st_mtime > 60  # torn: its owner died while writing it


class _Runner:
    """Runs cells one after the other with one backbone, put back to its start before each."""

    def __init__(self, grid: Grid, progress: Progress) -> None:
        self.grid, self.progress = grid, progress
        self.backbone: Backbone | None = None
        self.norms: dict[str, Tensor] = {}
        self.start: dict[str, NDArray[np.bool_]] = {}
        self.judged: dict[tuple[str, int, str], ImageFeatures] = {}

    def run(self, found: LabelledSet, method: str, seed: int) -> Cell:
        model = FineAlign(
            found.texts.classes,
            descriptions=dict(zip(found.texts.classes, found.texts.descriptions, strict=True)),
            templates=found.texts.templates,
            config=self.grid.config(method, seed),
        )
        backbone = self._fresh(model)
        began = time.perf_counter()
        model.fit(list(found.unlabelled), backbone=backbone, progress=self.progress)
        fitted = time.perf_counter()
        crops = any(score != "global" for score in model.method_.scores)
        with self.progress.stage("test images", None):
            seen = self._all(model.features(found.test.paths, crops=crops), found.test, model)
        labels = torch.tensor(found.test.labels)
        right: dict[str, NDArray[np.bool_]] = {
            score: _right(model.method_.score(seen, score), labels) for score in model.method_.scores
        }
        scored = time.perf_counter()
        if found.name not in self.start:
            self.start[found.name] = self._start_right(model, found)
        right["start"] = self.start[found.name]
        verdict = self._verdict(model, found, seed) if model.method_.trains else None
        return Cell(
            dataset=found.name,
            method=method,
            seed=seed,
            score=model.score_,
            top1={score: float(one.mean()) for score, one in right.items()},
            correct={score: _letters(one) for score, one in right.items()},
            images=len(found.unlabelled),
            seconds={"fit": round(fitted - began, 2), "predict": round(scored - fitted, 2)},
            epochs=len(model.history_),
            verdict=asdict(verdict) if verdict else None,
            settings=model.config_.model_dump(),
            versions=versions(),
            changed=[record.changed for record in model.history_],
        )

    def _verdict(self, model: FineAlign, found: LabelledSet, seed: int) -> Verdict:
        views = model.config_.views.model_dump(exclude={"refresh_epochs"})
        key = (found.name, seed, json.dumps(views))
        if key not in self.judged:
            self.judged[key] = start_features(model, found.unlabelled)
        return judge_model(model, found.unlabelled, start=self.judged[key])

    def _fresh(self, model: FineAlign) -> Backbone:
        """The backbone as it was loaded."""
        _, config = model.check()
        if self.backbone is None:
            self.backbone = model.load_backbone(config, self.progress)
            try:
                norms = self.backbone.norm_parameters()
            except BackboneError:  # a tower without any: nothing of it ever changes
                norms = {}
            self.norms = {name: value.detach().clone() for name, value in norms.items()}
        if self.norms:
            self.backbone.load_norms(self.norms)
        self.backbone.model.requires_grad_(False)
        return self.backbone

    def _start_right(self, model: FineAlign, found: LabelledSet) -> NDArray[np.bool_]:
        seen = self._all(model.features(found.test.paths, at_start=True, crops=False), found.test, model)
        return _right(model.start_method_.score(seen, "global"), torch.tensor(found.test.labels))

    @staticmethod
    def _all(seen: ImageFeatures, truth: Truth, model: FineAlign) -> ImageFeatures:
        if len(seen.weak) != len(truth.paths):
            first = model.set_aside_[0]
            raise FinealignError(
                f"{len(model.set_aside_)} test images cannot be read, the first {first.path} ({first.reason}). "
                "A table over fewer images would not compare: mend or remove them."
            )
        return seen


def _right(scores: Tensor, labels: Tensor) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = (scores.argmax(1).cpu() == labels).numpy()
    return found


def _letters(right: NDArray[np.bool_]) -> str:
    return "".join("1" if one else "0" for one in right)
