"""The grid: every method on every data set with every seed. Each combination is a cell, run once and saved as a file.

``OUT/cells/SET/METHOD-seedN.json`` is a finished cell. A running cell has a ``.claim`` file beside it, created
atomically, so that several processes or machines that share OUT never run the same cell twice. A claim whose process
has died on this machine is taken over.
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

from finealign.backbone.base import Backbone
from finealign.benchmark.catalogue import LabelledSet, load_set
from finealign.classifier import FineAlign
from finealign.config import Config, make_config, merged
from finealign.errors import FinealignError, OutputError
from finealign.method.registry import method_settings
from finealign.model.known_labels import check_taken
from finealign.model.prepare import Prepared
from finealign.run.folder import versions
from finealign.run.verdict import judge_model, why_unjudged
from finealign.runtime.atomic import save_text
from finealign.runtime.devices import hardware
from finealign.runtime.progress import Progress
from finealign.types import ImageFeatures, TextFeatures

CELLS, PLAN, CLAIM = "cells", "grid.json", ".claim"


@dataclass(frozen=True)
class Cell:
    """A finished run of the grid: the accuracy of one method on the test images of one data set with one seed."""

    dataset: str
    method: str  # a name, or NAME@PRESET
    seed: int
    score: str  # the method's default score
    top1: dict[str, float]  # by score, for all scores of the method and "start" (the model before adaptation)
    correct: dict[str, str]  # by score, likewise: "1" (right) or "0" per image, in the order of the truth
    images: int  # number of images adapted to
    seconds: dict[str, float]  # "fit", and "predict": encoding the test images and scoring them by all scores
    epochs: int
    verdict: dict[str, Any] | None  # the estimate without labels; None where nothing was learned
    settings: dict[str, Any]  # resolved, with all defaults
    versions: dict[str, str]
    changed: list[float] = field(default_factory=list)  # share of pseudo-labels that changed, by epoch
    hardware: dict[str, str] = field(default_factory=dict)  # what it was run on; empty in cells of earlier versions
    weights: dict[str, str] = field(default_factory=dict)  # the backbone's checksum, and its hub's revision

    @property
    def right(self) -> NDArray[np.bool_]:
        """Whether each test image is labelled correctly by the method's default score: (n,)."""
        return np.array([letter == "1" for letter in self.correct[self.score]])

    @property
    def start_right(self) -> NDArray[np.bool_]:
        """Whether each test image is labelled correctly by the start: (n,)."""
        return np.array([letter == "1" for letter in self.correct["start"]])


@dataclass(frozen=True)
class Grid:
    """Which cells to run, with which backbone and settings, and where to save them."""

    datasets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    backbone: str
    data_root: Path
    out: Path
    settings: Mapping[str, Any] = field(default_factory=dict)  # of all cells; override the methods' presets
    download: bool = False

    def config(self, method: str, seed: int) -> Config:
        """The settings of the cells of a method and seed. Raises FinealignError where they are not valid."""
        common = {
            "backbone": self.backbone,
            "seed": seed,
            "prediction": {"calibrate": False},
        }  # no table has confidences
        return make_config(merged(merged(method_settings(method), self.settings), common))

    def path(self, dataset: str, method: str, seed: int) -> Path:
        """The file of a cell, whether or not it exists."""
        return self.out / CELLS / file_name(dataset) / f"{method}-seed{seed}.json"


def file_name(dataset: str) -> str:
    """A data set's name as a folder name; for ``path:DIR``, the last part of DIR with a checksum of the whole path."""
    if not dataset.startswith("path:"):
        return dataset
    folder = Path(dataset.removeprefix("path:")).expanduser().resolve()
    return f"{folder.name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:6]}"


def run_grid(
    grid: Grid,
    *,
    sets: Mapping[str, LabelledSet] | None = None,
    progress: Progress | None = None,
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Run the cells that are not finished and return all finished ones, in the order of sets, methods, seeds.

    Cells that another process is running are skipped. ``sets`` are the grid's data sets by name, where they are loaded
    already. ``on_cell`` is called with each cell that this call has run.

    Raises FinealignError before the first cell for an unknown data set or method, invalid settings, or a data set that
    is not on disk, and OutputError when OUT holds another grid.
    """
    progress = progress or Progress()
    check_methods(grid)
    if sets is None:
        sets = {name: load_set(name, grid.data_root, download=grid.download) for name in grid.datasets}
    begin_or_resume(grid)
    runner = _Runner(grid, progress)
    for name, method, seed in product(grid.datasets, grid.methods, grid.seeds):
        path = grid.path(name, method, seed)
        if path.exists():
            _drop_dead(path.with_suffix(CLAIM))  # of a process that was killed just after it wrote the cell
            continue
        with _claimed(path) as claimed:
            # Checked again, because another process may have finished the cell just before it was claimed.
            if claimed and not path.exists():
                cell = runner.run(sets[name], method, seed)
                save_text(json.dumps(asdict(cell)) + "\n", path)
                on_cell(cell)
    return read_cells(grid)


def check_methods(grid: Grid) -> None:
    """Raises FinealignError for an unknown method, one that needs labels, or settings that are not valid for one."""
    for method, seed in product(grid.methods, grid.seeds):
        check_taken(grid.config(method, seed).method.name, given=False)


def read_cells(grid: Grid) -> list[Cell]:
    """The finished cells of a grid. Raises OutputError for one that cannot be read."""
    return [
        # When the cell was run, a ``path:`` set may have been spelled differently.
        replace(read_cell(path), dataset=cell[0])
        for cell in product(grid.datasets, grid.methods, grid.seeds)
        if (path := grid.path(*cell)).exists()
    ]


def claims(grid: Grid) -> list[Path]:
    """The claims on cells of the grid that are not finished: another process runs each, or did and was lost."""
    paths = [grid.path(*cell) for cell in product(grid.datasets, grid.methods, grid.seeds)]
    return [claim for path in paths if not path.exists() and (claim := path.with_suffix(CLAIM)).exists()]


def read_cell(path: Path) -> Cell:
    """Read a finished cell. Raises OutputError when the file cannot be read or is of another version."""
    try:
        return Cell(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{path} is not a cell of this version ({error}). Remove it to run it again.") from error


def begin_or_resume(grid: Grid) -> None:
    """Record the grid's backbone and settings in OUT, unless it is a grid of the same.

    Raises OutputError where OUT has cells with other settings or another backbone, which must not share a table.
    """
    plan = {"backbone": grid.backbone, "settings": dict(grid.settings)}
    path = grid.out / PLAN
    if path.exists():
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} cannot be read: {error}. Choose another --out.") from error
        if recorded != plan:
            raise OutputError(
                f"{grid.out} holds a grid of backbone {recorded.get('backbone')!r} with settings "
                f"{recorded.get('settings')!r}; this one has {grid.backbone!r} and {dict(grid.settings)!r}. Give the "
                "same, or choose another --out."
            )
        return
    if grid.out.exists() and any(grid.out.iterdir()):
        raise OutputError(f"{grid.out} is not empty and holds no grid ({PLAN} is missing). Choose another --out.")
    save_text(json.dumps(plan, indent=1) + "\n", path)


@contextmanager
def _claimed(cell: Path) -> Iterator[bool]:
    """Claim a cell; gives whether this process may run it: no other live process has claimed it."""
    claim = cell.with_suffix(CLAIM)
    cell.parent.mkdir(parents=True, exist_ok=True)
    _drop_dead(claim)
    # Known beforehand: a process that is killed between making the file and writing it holds the cell for a minute.
    owner = {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}
    try:
        handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        yield False
        return
    with os.fdopen(handle, "wb", buffering=0) as file:
        file.write(json.dumps(owner).encode())
    try:
        yield True
    finally:
        claim.unlink(missing_ok=True)


def _drop_dead(claim: Path) -> None:
    """Remove a claim whose process is known to have ended."""
    if claim.exists() and _dead(claim):
        claim.unlink(missing_ok=True)


def _dead(claim: Path) -> bool:
    """Whether the process that made a claim is known to have ended; of other machines nothing is known."""
    try:
        owner = json.loads(claim.read_text(encoding="utf-8"))
        if owner["host"] != platform.node():
            return False
        process = psutil.Process(int(owner["pid"]))
        reused = abs(process.create_time() - owner["started"]) > 1  # the process id now belongs to another process
        return reused or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except (FileNotFoundError, psutil.AccessDenied):
        return False
    except (OSError, ValueError, KeyError, TypeError):
        return time.time() - claim.stat().st_mtime > 60  # incomplete: its owner died while writing it


class _Runner:
    """Runs cells one after the other. The backbone is loaded once, and the texts of each set are encoded once."""

    def __init__(self, grid: Grid, progress: Progress) -> None:
        self.grid, self.progress = grid, progress
        self.backbone: Backbone | None = None
        self.weights: dict[str, str] = {}
        self.texts: dict[str, TextFeatures] = {}  # by set
        self.start: dict[str, NDArray[np.bool_]] = {}  # by set: which test images the start labels correctly

    def run(self, task: LabelledSet, method: str, seed: int) -> Cell:
        model = FineAlign(
            task.texts.classes,
            descriptions=dict(zip(task.texts.classes, task.texts.descriptions, strict=True)),
            templates=task.texts.templates,
            config=self.grid.config(method, seed),
        )
        prepared = self._prepared(model, task)
        began = time.perf_counter()
        model.fit(prepared, progress=self.progress)
        fitted = time.perf_counter()
        crops = any(score != "global" for score in model.method_.scores)
        test = self._test_features(model, task, crops=crops)
        labels = torch.tensor(task.test.labels)
        right: dict[str, NDArray[np.bool_]] = {  # by score
            score: _right(model.model_.score(test, score), labels) for score in model.method_.scores
        }
        scored = time.perf_counter()
        if task.name not in self.start:
            same = model.model_.encodes_as_start
            at_start = test if same else self._test_features(model, task, at_start=True, crops=False)
            self.start[task.name] = _right(model.start_method_.score(at_start, "global"), labels)
        right["start"] = self.start[task.name]
        verdict = None if why_unjudged(model) else judge_model(model, model.paths_)  # of which it keeps features
        return Cell(
            dataset=task.name,
            method=method,
            seed=seed,
            score=model.score_,
            top1={score: float(hits.mean()) for score, hits in right.items()},
            correct={score: _letters(hits) for score, hits in right.items()},
            images=len(task.unlabelled),
            seconds={"fit": round(fitted - began, 2), "predict": round(scored - fitted, 2)},
            epochs=len(model.history_),
            verdict=asdict(verdict) if verdict else None,
            settings=model.config_.model_dump(),
            versions=versions(model.model_.name),
            changed=[record.changed for record in model.history_],
            hardware=hardware(model.backbone_.device, model.backbone_.precision),
            weights=self.weights,
        )

    def _prepared(self, model: FineAlign, task: LabelledSet) -> Prepared:
        """What the fit gets: of the data set only the unlabelled images and the texts."""
        images = list(task.unlabelled)
        features = self.texts.get(task.name)
        prepared = model.prepare(images, backbone=self.backbone, text_features=features, progress=self.progress)
        if self.backbone is None:  # before the first fit: these are the weights that were loaded
            self.weights = {"checksum": prepared.backbone.checksum, **prepared.backbone.origin}
        self.backbone, self.texts[task.name] = prepared.backbone, prepared.text_features
        return prepared

    def _test_features(
        self, model: FineAlign, task: LabelledSet, *, crops: bool, at_start: bool = False
    ) -> ImageFeatures:
        """The model's features of the test images. Raises FinealignError where one of them cannot be read."""
        with self.progress.stage("test images", None):
            features, set_aside = model.features(task.test.paths, at_start=at_start, crops=crops)
        if set_aside:
            first = set_aside[0]
            raise FinealignError(
                f"{len(set_aside)} test images cannot be read, the first {first.path} ({first.reason}). "
                "A table over fewer images would not compare: mend or remove them."
            )
        return features


def _right(scores: Tensor, labels: Tensor) -> NDArray[np.bool_]:
    hits: NDArray[np.bool_] = (scores.argmax(1).cpu() == labels).numpy()
    return hits


def _letters(right: NDArray[np.bool_]) -> str:
    return "".join("1" if hit else "0" for hit in right)
