"""The work of `finealign adapt`: fit a model and write its run folder while the run proceeds.

``contract.py`` lists the files of a run folder. An existing run is replaced only on request; a run can be resumed only
with the images, texts, settings and weights that it began with.
"""

import io
import json
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from finealign.classifier import FineAlign
from finealign.config import Config, write_config
from finealign.errors import FinealignError, NotFiniteError, OutputError, StoppedError, display_path
from finealign.images.datasets_by_name import PREFIX
from finealign.images.held import Images
from finealign.images.listing import left_out_of
from finealign.images.tables import set_aside_csv
from finealign.method.few_labels import STRANGER
from finealign.model.inference import readable, tell_blank
from finealign.model.known_labels import Labels, told_labels
from finealign.model.predictions import write_predictions
from finealign.model.prepare import Prepared
from finealign.model.refusal import NONE_OF_THESE
from finealign.model.shares import told_shares
from finealign.model.trust import told_trust
from finealign.run.contract import (
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    EXAMPLES,
    LEARNED_FROM,
    METRICS,
    MODEL,
    PREDICTIONS,
    RUN,
    SET_ASIDE,
)
from finealign.run.examples import Strangers, Watch, write_examples
from finealign.run.folder import Metrics, check_room, identity_of, versions, write_json
from finealign.run.lock import held, refuse_held
from finealign.run.report import write_report
from finealign.run.verdict import Verdict, judge_model, why_unjudged
from finealign.runtime.atomic import row_writer, save_text
from finealign.runtime.distributed import Ranks
from finealign.runtime.progress import Progress
from finealign.runtime.replace import make_room
from finealign.training.state import EpochRecord
from finealign.types import SetAside, Use


@dataclass(frozen=True)
class RunSummary:
    """The result of a finished run."""

    folder: Path
    method: str
    images: int  # images that could be read
    set_aside: tuple[SetAside, ...]
    left_out: str  # what else was in the folder of images, as a sentence
    blank: str  # which images are all but black or white, as a sentence
    epochs: int
    seconds: float  # the whole run, without the time spent in ``on_epoch``
    fit_seconds: float  # the fit alone, without loading, predicting and writing the predictions
    stopped: str  # why training ended
    model: FineAlign
    verdict: Verdict | None  # whether adaptation helped, judged without labels; None where nothing was learned
    kept: Use  # which of the two models that were saved is the one in use
    why_kept: str  # why it is, as a clause
    strangers: Strangers | None  # images that seem to show none of the classes; None where the model cannot say
    report: Path | None  # report.html; None on all ranks but the first, and where it could not be written
    report_problem: str  # why the report could not be written, otherwise empty

    def as_json(self) -> dict[str, Any]:
        """The result as JSON values, without the model and ``fit_seconds``."""
        return {
            "out": str(self.folder),
            "method": self.method,
            "backbone": self.model.model_.inference.backbone,
            "classes": list(self.model.texts_.classes),
            "images": self.images,
            "set_aside": [asdict(row) for row in self.set_aside],
            "left_out": self.left_out,
            "blank": self.blank,
            "epochs": self.epochs,
            "seconds": round(self.seconds, 2),
            "stopped": self.stopped,
            "verdict": _told(self.verdict),
            "kept": self.kept,
            "why_kept": self.why_kept,
            "strangers": _strangers_told(self.strangers),
            **({"labels": self.model.labels_} if self.model.labels_ else {}),
            "report": str(self.report) if self.report else None,
            "report_problem": self.report_problem,
        }


def adapt_into(
    folder: Path,
    model: FineAlign,
    images: Images | Prepared,
    labels: Labels | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_adapted: bool = False,
    on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    progress: Progress | None = None,
) -> RunSummary:
    """Fit the model and write the run folder while the fit proceeds.

    ``images`` and ``labels`` are anything that ``FineAlign.fit`` accepts. Both models are saved, the adapted one and
    the start (the model before adaptation). In use is the one that the verdict favours, which after "hurt" is the
    start, or the adapted one if ``keep_adapted`` is set.

    ``on_epoch`` is called after the metrics of an epoch are written. It may predict with the model in its current
    state; the time it takes is left out of all timings. With several ranks only the first one writes, and all of them
    must see the same folder.

    Raises OutputError when another process writes the folder, when it is not empty and neither ``resume`` nor
    ``overwrite`` is given, when it is not a run folder, or when the run to resume had other images, texts, settings or
    weights. Also raises whatever ``FineAlign.fit`` raises.
    """
    progress = progress or Progress()
    began = time.time()
    refuse_early(folder, resume=resume, overwrite=overwrite, ranks=model.ranks)
    prepared = images if isinstance(images, Prepared) else model.prepare(images, labels=labels, progress=progress)
    run = _Run(folder, model, prepared, progress, began)
    with ExitStack() as lock:
        run.open(lock, resume=resume, overwrite=overwrite)
        with run.told_of_failure():
            run.fit(on_epoch)
            run.judge(keep_adapted=keep_adapted)
            run.save()
            run.predict()
        return run.close()


def refuse_early(folder: Path, *, resume: bool, overwrite: bool, ranks: Ranks | None = None) -> None:
    """Raise OutputError where it is known without images and weights that a run may not begin in ``folder``.

    ``adapt_into`` and ``plan`` raise the same. Where those are slow to load, this tells it before. Nothing is written.
    """

    def look() -> None:
        refuse_held(folder)
        check_room(folder, None, resume=resume, overwrite=overwrite)

    _by_first(ranks or Ranks(), look)


class _Run:
    """One run, step by step. Every rank takes every step; only the first rank writes files."""

    def __init__(self, folder: Path, model: FineAlign, prepared: Prepared, progress: Progress, began: float) -> None:
        self.folder, self.model, self.prepared, self.progress = folder, model, prepared, progress
        self.ranks = model.ranks or Ranks()
        self.metrics = Metrics(folder / METRICS)
        self.began = began
        self.listening = 0.0  # seconds spent in ``on_epoch``, left out of the timings
        self.told: dict[str, Any] = {}  # the contents of run.json
        self.verdict: Verdict | None = None
        self.kept: Use = "adapted"
        self.why_kept = ""
        self.set_aside: list[SetAside] = []
        self.strangers: Strangers | None = None
        self.blank = ""

    def open(self, lock: ExitStack, *, resume: bool, overwrite: bool) -> None:
        """Remove what the run replaces and write its first files, with the folder locked until ``lock`` is closed.

        Raises OutputError where the run may not begin.
        """
        identity = identity_of(self.prepared)
        found = versions(self.prepared.config.method.name)
        self.ranks.refuse_different("images, texts, settings or versions", [identity, found])
        replaced: list[Path] = []

        def take() -> None:
            lock.enter_context(held(self.folder))
            # Again, as another process may have begun and ended a run in between.
            replaced.extend(check_room(self.folder, identity, resume=resume, overwrite=overwrite))

        _by_first(self.ranks, lambda: refuse_held(self.folder))
        check_room(self.folder, identity, resume=resume, overwrite=overwrite)
        self.ranks.wait()  # every rank checks the folder before the first rank changes it
        _by_first(self.ranks, take)
        config = self.prepared.config
        self.told = {
            "status": "running",
            "identity": identity,
            "images": len(self.prepared.paths),
            "left_out": left_out_of(self.prepared.paths),
            "classes": list(self.prepared.texts.classes),
            "seed": config.seed,
            "backbone": config.backbone,
            "origin": self.prepared.backbone.origin,
            "method": config.method.name,
            "versions": found,
            "resumed": resume,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self.began)),
        }
        if self.ranks.first:
            make_room(self.folder, replaced)
            write_json(self.folder / RUN, self.told)  # written first: this file marks the folder as a run folder
            make_room(self.folder / CHECKPOINTS, [])
            write_config(config, self.folder / CONFIG)
            if not resume:
                save_text("", self.metrics.path)
            if self.told["left_out"]:
                self.progress.caution(self.told["left_out"])
        self.ranks.wait()

    def fit(self, on_epoch: Callable[[EpochRecord], None]) -> None:
        """Adapt the model, writing a checkpoint and a line of metrics for each epoch."""

        def after_epoch(record: EpochRecord) -> None:
            if self.ranks.first:
                self.metrics.add(record)
            called = time.time()
            on_epoch(record)
            self.listening += time.time() - called

        self.ready = time.time()
        checkpoints = self.folder / CHECKPOINTS
        self.model.fit(self.prepared, checkpoints=checkpoints, on_epoch=after_epoch, progress=self.progress)
        self.fitted = time.time() - self.listening
        self.stopped = _why_stopped(self.model)

    def judge(self, *, keep_adapted: bool) -> None:
        """Judge without labels whether adaptation helped, and take the model favoured, unless ``keep_adapted``."""
        self.why_kept = why_unjudged(self.model)
        if self.why_kept:
            return
        self.verdict = judge_model(self.model, self.prepared.paths, progress=self.progress)
        if keep_adapted:
            self.why_kept = "that was asked for, whatever the verdict"
        else:
            self.kept, self.why_kept = _favoured(self.verdict)
            self.model.use(self.kept)

    def save(self) -> None:
        """Write both models."""
        if not self.ranks.first:
            return
        self.told |= {
            "cautions": [asdict(caution) for caution in self.model.cautions_],
            "learned": self.model.model_.using("adapted").learned,
            "class_prior": told_shares(self.model.model_, self.prepared.config),
            "crop_trust": told_trust(self.model.model_, self.prepared.config, self.model.explained_),
            "verdict": _told(self.verdict),
            "kept": self.kept,
            "why_kept": self.why_kept,
            "set_aside": len(self.model.set_aside_),
        }
        if self.model.labels_:
            self.told["labels"] = self.model.labels_
            self._write_labels()
        (self.folder / EVALUATION).unlink(missing_ok=True)  # it measured the model that is replaced here
        self.model.save(self.folder / MODEL, run=self.told)

    def _write_labels(self) -> None:
        """Write the labels that were learned from."""
        labels, classes = self.prepared.labels, self.prepared.texts.classes
        rows = io.StringIO()
        write = row_writer(rows)
        write(["path", "label"])
        for path in map(os.fspath, self.model.paths_):
            if labels and (known := labels.classes.get(path)) is not None:
                write([display_path(path), NONE_OF_THESE if known == STRANGER else classes[known]])
        save_text(rows.getvalue(), self.folder / LEARNED_FROM)

    def predict(self) -> None:
        """Write the predictions of the model in use and of the start, and the example images of the report."""
        watch = Watch()
        with self.progress.stage("predicting", len(self.prepared.paths)) as stage:
            outcomes = self.model.iter_predictions(self.prepared.paths, with_start=True)
            predictions = watch.over(
                readable(outcomes, self.set_aside, self.progress.between(stage, self.ranks)),
            )
            if self.ranks.first:
                classes = self.model.texts_.classes
                write_predictions(predictions, classes, self.folder / PREDICTIONS, top_k=2, with_start=True)
            else:
                deque(predictions, maxlen=0)  # predicting is shared by the ranks, so each has to consume the iterator
        self.strangers, self.blank = watch.strangers, tell_blank(watch.blanks, watch.first_blank)
        if self.ranks.first:
            with self.progress.stage("drawing the report", None):
                write_examples(self.model, watch.chosen, self.folder / EXAMPLES)

    def close(self) -> RunSummary:
        """Mark the run as complete in run.json and write its report."""
        seconds = time.time() - self.began - self.listening
        epochs = len(self.metrics.records())
        self.told |= {
            "status": "complete",
            "stopped": self.stopped,
            "device": str(self.model.backbone_.device),
            "precision": self.model.backbone_.precision,
            "processes": self.ranks.count,
            "set_aside": len(self.set_aside),
            "strangers": _strangers_told(self.strangers),
            "blank": self.blank,
            "epochs": epochs,
            "seconds": {"fit": round(self.fitted - self.began, 2), "total": round(seconds, 2)},
        }
        report, report_problem = None, ""
        if self.ranks.first:
            set_aside_csv(self.set_aside, self.folder / SET_ASIDE)
            write_json(self.folder / RUN, self.told)
            report, report_problem = _draw(self.folder)
        return RunSummary(
            folder=self.folder,
            method=self.prepared.config.method.name,
            images=len(self.prepared.paths) - len(self.set_aside),
            set_aside=tuple(self.set_aside),
            left_out=left_out_of(self.prepared.paths),
            blank=self.blank,
            epochs=epochs,
            seconds=seconds,
            fit_seconds=self.fitted - self.ready,
            stopped=self.stopped,
            model=self.model,
            verdict=self.verdict,
            kept=self.kept,
            why_kept=self.why_kept,
            strangers=self.strangers,
            report=report,
            report_problem=report_problem,
        )

    @contextmanager
    def told_of_failure(self) -> Iterator[None]:
        """Record in run.json why the run ended before it was complete, and let the error through."""
        try:
            yield
        except BaseException as error:
            if self.ranks.first and self.folder.is_dir():
                with suppress(OutputError):  # the original error matters more to the user
                    write_json(self.folder / RUN, self.told | _why_unfinished(error))
            raise


def _by_first(ranks: Ranks, work: Callable[[], None]) -> None:
    """Do what only the first rank may do. Its OutputError is raised on every rank."""
    problem = ""
    if ranks.first:
        try:
            work()
        except OutputError as error:
            problem = str(error)
    if told := json.loads(ranks.texts(json.dumps(problem))[0]):
        raise OutputError(told)


def _draw(folder: Path) -> tuple[Path | None, str]:
    """Write the report and return its path, or return why it failed: the run is complete without a report."""
    try:
        return write_report(folder), ""
    except FinealignError as error:
        return None, str(error)


def default_folder(images: Images, config: Config) -> Path:
    """The run folder used when none is given: ``runs/IMAGES-METHOD-seedN``.

    It depends on the images, method and seed alone, so that the same command finds the same folder again.
    """
    name = "images"
    if isinstance(images, str) and images.startswith(PREFIX):
        name = re.sub(r"[^\w.-]+", "-", images.removeprefix(PREFIX)).strip("-.") or name
    elif isinstance(images, str | Path):
        name = Path(images).resolve().name
    return Path("runs") / f"{name}-{config.method.name}-seed{config.seed}"


def plan(folder: Path, prepared: Prepared, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Describe, as JSON values, what ``adapt_into`` would do. Nothing is written.

    The folder is checked as ``adapt_into`` checks it, so the same OutputErrors are raised.
    """
    refuse_held(folder)
    check_room(folder, identity_of(prepared), resume=resume, overwrite=overwrite)
    config, texts, images = prepared.config, prepared.texts, len(prepared.paths)
    return {
        "out": str(folder),
        "images": images,
        "left_out": left_out_of(prepared.paths),
        "classes": list(texts.classes),
        "descriptions": sum(len(group) for group in texts.descriptions),
        **({"labels": told_labels(prepared.labels, prepared.paths, texts.classes)} if prepared.labels else {}),
        "epochs": config.training.epochs,
        "steps_an_epoch": math.ceil(images / config.training.batch_size),
        "settings": yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True),
    }


def _favoured(verdict: Verdict) -> tuple[Use, str]:
    """The model to use after a verdict, and why: the start after "hurt", after "unclear" the one favoured."""
    if verdict.call == "unclear":
        return verdict.favours, "the evidence, though unclear, favours it"
    return "start" if verdict.call == "hurt" else "adapted", f"the verdict is that adaptation {verdict.call}"


def _told(verdict: Verdict | None) -> dict[str, Any] | None:
    """The verdict as JSON values."""
    return asdict(verdict) | {"favours": verdict.favours} if verdict else None


def _strangers_told(strangers: Strangers | None) -> dict[str, Any] | None:
    """The images that seem to show none of the classes as JSON values."""
    return {"share": round(strangers.share, 6), "likely": strangers.likely} if strangers else None


def _why_stopped(model: FineAlign) -> str:
    if not model.method_.trains:
        return f"{model.model_.name} does not train"
    return f"all {model.config_.training.epochs} epochs done; the last one is kept"


def _why_unfinished(error: BaseException) -> dict[str, Any]:
    if isinstance(error, StoppedError):
        return {"status": "stopped", "stopped": str(error)}
    if isinstance(error, NotFiniteError):
        return {"status": "failed", "stopped": str(error), "batch": error.images}
    if isinstance(error, FinealignError):
        return {"status": "failed", "stopped": str(error)}
    return {"status": "failed", "stopped": f"{type(error).__name__}: {error}"}
