"""The run folder: what `finealign adapt` leaves behind, written as the run goes on.

``layout.py`` names what is in it. Nothing that is there is overwritten unless asked; a resumed run must be the same
run.
"""

import hashlib
import json
import math
import platform
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import yaml

from finealign.backbone import Backbone
from finealign.classifier import FineAlign, Images
from finealign.config import Config, resolve, write_config
from finealign.errors import FinealignError, NotFiniteError, OutputError, StoppedError
from finealign.examples import Watch, write_examples
from finealign.images import display_path, file_size, list_images, set_aside_csv
from finealign.layout import (
    CHECKPOINTS,
    CONFIG,
    CONTENTS,
    EVALUATION,
    EXAMPLES,
    METRICS,
    MODEL,
    PREDICTIONS,
    RUN,
    SET_ASIDE,
)
from finealign.model_card import what_learned
from finealign.predictions import write_predictions
from finealign.progress import Progress
from finealign.ranks import Ranks
from finealign.report import read_metrics, write_report
from finealign.storage import require_folder, save_text
from finealign.training import EpochRecord
from finealign.types import SetAside, Texts
from finealign.verdict import Verdict, judge_model


@dataclass(frozen=True)
class RunSummary:
    """What a finished run has to say."""

    folder: Path
    method: str
    images: int
    set_aside: tuple[SetAside, ...]
    epochs: int
    seconds: float
    fit_seconds: float  # of those, the fit alone: without loading, predicting and writing what was predicted
    stopped: str
    model: FineAlign
    verdict: Verdict | None  # whether adaptation helped, judged without labels; None where nothing was learned
    kept: Literal["adapted", "start"]  # which model was saved
    report: Path | None  # of ranks, the first alone has one
    report_problem: str  # why there is none

    def as_json(self) -> dict[str, Any]:
        return {
            "out": str(self.folder),
            "method": self.method,
            "backbone": self.model.config_.backbone,
            "classes": list(self.model.texts_.classes),
            "images": self.images,
            "set_aside": [asdict(row) for row in self.set_aside],
            "epochs": self.epochs,
            "seconds": round(self.seconds, 2),
            "stopped": self.stopped,
            "verdict": asdict(self.verdict) if self.verdict else None,
            "kept": self.kept,
            "report": str(self.report) if self.report else None,
            "report_problem": self.report_problem,
        }


def adapt_into(
    folder: Path,
    model: FineAlign,
    images: Images,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_adapted: bool = False,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    progress: Progress | None = None,
) -> RunSummary:
    """Fit the model and write the run folder as it goes.

    When the verdict is that adaptation hurt, the model it started from is saved, unless ``keep_adapted``.

    ``on_epoch`` is called when an epoch's metrics are written, and may predict with the model as it is then; the time
    it takes is in none of the timings. Of several ranks the first writes, in a folder that all of them see.

    Raises OutputError when the folder holds something and neither ``resume`` nor ``overwrite`` is given, when it is
    not a run of ours, or when the run to resume had other images, texts or settings; and what ``FineAlign.fit`` raises.
    """
    progress = progress or Progress()
    began = time.time()
    ranks = model.ranks or Ranks()
    texts, config, paths, backbone = _prepare(model, images, progress)
    identity = _identity(config, texts, paths, backbone)
    ranks.refuse_different("images, texts, settings or versions", [identity, versions()])
    replaced = _check_room(folder, identity, resume=resume, overwrite=overwrite)
    ranks.wait()  # all have looked before the first changes anything
    run: dict[str, Any] = {
        "status": "running",
        "identity": identity,
        "images": len(paths),
        "classes": list(texts.classes),
        "seed": config.seed,
        "backbone": config.backbone,
        "origin": backbone.origin,
        "method": config.method.name,
        "versions": versions(),
        "resumed": resume,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(began)),
    }
    metrics = _Metrics(folder / METRICS)
    if ranks.first:
        make_room(folder, replaced)
        _write_json(folder / RUN, run)  # first of all: without it the folder is not known for a run's
        make_room(folder / CHECKPOINTS, [])
        write_config(config, folder / CONFIG)
        if not resume:
            save_text("", metrics.path)
    ranks.wait()
    listening = 0.0

    def after_epoch(record: EpochRecord) -> None:
        nonlocal listening
        if ranks.first:
            metrics.add(record)
        paused = time.time()
        on_epoch(record)
        listening += time.time() - paused

    prepared = time.time()
    try:
        model.fit(paths, backbone=backbone, checkpoints=folder / CHECKPOINTS, on_epoch=after_epoch, progress=progress)
        fitted = time.time() - listening
        if ranks.first:
            write_config(model.config_, folder / CONFIG)
        stopped = _why_stopped(model)
        verdict = judge_model(model, paths, progress=progress) if model.method_.trains else None
        kept: Literal["adapted", "start"] = "adapted"
        if verdict and verdict.call == "hurt" and not keep_adapted:
            kept = "start"
            model.revert()
        if ranks.first:
            run |= {
                "learned": what_learned(model.config_, model.method_),
                "verdict": asdict(verdict) if verdict else None,
                "kept": kept,
                "set_aside": len(model.set_aside_),
            }
            (folder / EVALUATION).unlink(missing_ok=True)  # of the model that was there
            model.save(folder / MODEL, run=run)
        with progress.stage("predicting", len(paths)) as stage:
            watch = Watch()
            found = watch.over(
                model.readable_predictions(paths, with_start=True, advance=progress.between(stage, ranks))
            )
            if ranks.first:
                write_predictions(found, model.texts_.classes, folder / PREDICTIONS, top_k=2, with_start=True)
            else:
                deque(found, maxlen=0)
        set_aside = model.set_aside_
        if ranks.first:
            with progress.stage("drawing the report", None):
                write_examples(model, watch.chosen, folder / EXAMPLES)
    except FinealignError as error:
        if ranks.first and folder.is_dir():
            with suppress(OutputError):  # the error itself says more
                _write_json(folder / RUN, run | _why_unfinished(error))
        raise
    except BaseException as error:
        if ranks.first and folder.is_dir():
            with suppress(OutputError):
                _write_json(folder / RUN, run | {"status": "failed", "stopped": f"{type(error).__name__}: {error}"})
        raise
    seconds = time.time() - began - listening
    run |= {
        "status": "complete",
        "stopped": stopped,
        "device": str(model.backbone_.device),
        "precision": model.backbone_.precision,
        "processes": ranks.count,
        "set_aside": len(set_aside),
        "epochs": len(metrics.records()),
        "seconds": {"fit": round(fitted - began, 2), "total": round(seconds, 2)},
    }
    if ranks.first:
        set_aside_csv(set_aside, folder / SET_ASIDE)
        _write_json(folder / RUN, run)
    report, report_problem = _draw(folder) if ranks.first else (None, "")
    return RunSummary(
        folder=folder,
        method=config.method.name,
        images=len(paths) - len(set_aside),
        set_aside=tuple(set_aside),
        epochs=len(metrics.records()),
        seconds=seconds,
        fit_seconds=fitted - prepared,
        stopped=stopped,
        model=model,
        verdict=verdict,
        kept=kept,
        report=report,
        report_problem=report_problem,
    )


def _draw(folder: Path) -> tuple[Path | None, str]:
    """The report, or why there is none: the run is done and good without it."""
    try:
        return write_report(folder), ""
    except FinealignError as error:
        return None, str(error)


def default_folder(images: Images, config: Config) -> Path:
    """The run folder when none is named: the same command finds the same folder again."""
    name = Path(str(images)).resolve().name if isinstance(images, str | Path) else "images"
    return Path("runs") / f"{name}-{config.method.name}-seed{config.seed}"


def plan(
    folder: Path, model: FineAlign, images: Images, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """What ``adapt_into`` would do, everything checked and nothing written. Raises what it would raise."""
    texts, config, paths, backbone = _prepare(model, images, Progress())
    _check_room(folder, _identity(config, texts, paths, backbone), resume=resume, overwrite=overwrite)
    resolved = resolve(config, images=len(paths), classes=len(texts.classes), input_size=backbone.input_size)
    return {
        "out": str(folder),
        "images": len(paths),
        "classes": list(texts.classes),
        "descriptions": sum(len(group) for group in texts.descriptions),
        "epochs": resolved.training.epochs,
        "steps_an_epoch": math.ceil(len(paths) / resolved.training.batch_size),
        "settings": yaml.safe_dump(resolved.model_dump(), sort_keys=False, allow_unicode=True),
    }


def versions() -> dict[str, str]:
    """The versions a result depends on."""
    packages = ("finealign", "torch", "torchvision", "open_clip_torch", "timm", "accelerate", "pillow", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _why_stopped(model: FineAlign) -> str:
    if not model.method_.trains:
        return f"{model.config_.method.name} does not train"
    return f"all {model.config_.training.epochs} epochs done; the last one is kept"


def _why_unfinished(error: FinealignError) -> dict[str, Any]:
    if isinstance(error, StoppedError):
        return {"status": "stopped", "stopped": str(error)}
    batch = {"batch": error.images} if isinstance(error, NotFiniteError) else {}
    return {"status": "failed", "stopped": str(error), **batch}


def _identity(config: Config, texts: Texts, paths: Sequence[Path], backbone: Backbone) -> dict[str, str]:
    """What must be the same for a run to be resumed, one checksum a part. Where it runs may differ."""
    unimportant: Any = {"device": True, "data": {"cache", "cache_gb", "workers"}, "training": {"checkpoint_minutes"}}
    settings = config.model_dump(exclude=unimportant)
    images = hashlib.sha256()  # one by one: there may be millions
    for path in paths:
        images.update(f"{json.dumps([display_path(path), file_size(path)])}\n".encode())
    parts = {"settings": settings, "texts": asdict(texts)}
    found = {
        name: hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()
        for name, part in parts.items()
    }
    return found | {"images": images.hexdigest(), "weights": backbone.checksum}


def _prepare(model: FineAlign, images: Images, progress: Progress) -> tuple[Texts, Config, Sequence[Path], Backbone]:
    """Everything that can be wrong before the first image is read, found before anything is written or removed."""
    texts, config = model.check()
    paths = list_images(images)
    backbone = model.load_backbone(config, progress)
    backbone.encode_texts(texts)
    return texts, config, paths, backbone


def _check_room(folder: Path, identity: dict[str, str], *, resume: bool, overwrite: bool) -> list[Path]:
    """What has to go for the run to begin; raises OutputError where it may not begin."""
    there = names_in(folder) - {Path(RUN).with_suffix(".part").name}  # left by a run killed as it began
    if not there:
        if resume:
            raise OutputError(f"Nothing to resume: {folder} holds no run. Leave --resume out to start one.")
        return []
    if RUN not in there:
        raise OutputError(
            f"{folder} holds {len(there)} things and is not a run folder ({RUN} is missing), so nothing in it is "
            "touched. Choose another with --out."
        )
    if resume:
        before = _read_identity(folder / RUN)
        differing = [name for name, value in identity.items() if before.get(name) != value]
        if differing:
            raise OutputError(
                f"The run in {folder} had other {' and '.join(differing)}, so it cannot be resumed with these. "
                "Give the same ones, or choose another folder with --out."
            )
        return []
    if not overwrite:
        raise OutputError(
            f"{folder} already holds a run. Use --resume to continue it, --overwrite to replace it, or another --out."
        )
    # Its run.json is written over: without it what a kill leaves would not be known for a run's.
    return [folder / name for name in CONTENTS if name in there and name != RUN]


def names_in(folder: Path) -> set[str]:
    """The names of what a folder for results holds, none if it is not there yet. Raises OutputError if it is none."""
    try:
        return {path.name for path in folder.iterdir()} if folder.exists() else set()
    except NotADirectoryError:
        raise OutputError(f"{folder} is a file. Wanted: a folder for the run; choose another with --out.") from None
    except OSError as error:
        raise OutputError(f"{folder} cannot be used: {error}. Choose another with --out.") from error


def make_room(folder: Path, replaced: Sequence[Path]) -> None:
    """Remove what is replaced, files and folders, and make the folder. Raises OutputError."""
    try:
        for path in replaced:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be used: {error}. Choose another with --out.") from error


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(f"{path} cannot be read ({error}), so the run cannot be resumed. Use --overwrite.") from error
    return identity if isinstance(identity, dict) else {}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    save_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", path)


class _Metrics:
    """One JSON object a line and epoch. A resumed run drops the lines of epochs it does again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, record: EpochRecord) -> None:
        require_folder(self.path.parent)
        kept = [found for found in self.records() if found["epoch"] < record.epoch]
        save_text("".join(f"{json.dumps(found)}\n" for found in [*kept, asdict(record)]), self.path)

    def records(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)
