"""Write an export to a temporary folder and move it into place only if it agrees with FineAlign.

The scores for this check are computed by the library that the export is for.
"""

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finealign import __version__
from finealign.classifier import FineAlign
from finealign.errors import ModelError, OutputError
from finealign.export.checks import Checked, Exported, Format, Measure
from finealign.export.companions import CARD, PARITY, export_card
from finealign.export.onnx import write_onnx
from finealign.export.open_clip import write_open_clip
from finealign.export.refusals import refuse_unfit
from finealign.export.transformers import write_clip
from finealign.runtime.atomic import make_folder, save_text
from finealign.runtime.replace import names_in, require_replaceable
from finealign.types import Score

# Arguments: the model, the score that the export computes, the folder to write, a folder for temporary files.
Writer = Callable[[FineAlign, Score, Path, Path], Checked]

WRITERS: Mapping[Format, Writer] = {"open_clip": write_open_clip, "hf": write_clip, "onnx": write_onnx}
LEFT_BY_PYTHON = "__pycache__"  # left beside usage.py when it is imported
TALKERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "transformers")  # loggers to silence


def export(
    model: FineAlign, folder: Path, *, format: Format, score: Score | None = None, overwrite: bool = False
) -> Exported:
    """Write a fitted model for another library into ``folder``, checked against FineAlign in float32 on the CPU.

    The export holds the model in use, the adapted one or the start, and not the other one.

    ``score`` is what the export computes. None means the model's own score for ONNX, and ``global`` for the other
    formats, which hold no other score. With ``overwrite`` an earlier export is replaced, but nothing else. Raises
    ConfigError for what the format cannot hold and for a package that is not installed, ModelError when the export
    differs from FineAlign, and OutputError when the folder cannot be used.
    """
    own = model.score_  # read first, because it raises the proper error when the model is not fitted
    kind: Score = score or (own if format == "onnx" else "global")
    refuse_unfit(model, format, kind)
    replaces = _replaced(folder, overwrite=overwrite)
    make_folder(folder.parent)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name, _quiet():
            aside = Path(name).resolve()  # absolute, because usage.py runs in another working directory
            model.save(aside / "saved")
            saved = FineAlign.load(aside / "saved", device="cpu", precision="fp32")
            saved.method_.requires_grad_(False)
            staged = aside / "export"
            staged.mkdir()
            checked = WRITERS[format](saved, kind, staged, aside)
            _refuse_differing(checked.parity, format)
            save_text(export_card(model, format), staged / CARD)
            files = tuple(sorted({*names_in(staged, kind="export"), PARITY} - {LEFT_BY_PYTHON}))
            about: dict[str, Any] = {"finealign": __version__, "format": format, "use": model.use_, "score": kind}
            about |= {"class_prior": model.class_prior_, "files": files, "notes": checked.notes}
            measured = {name: asdict(measure) for name, measure in checked.parity.items()}
            save_text(json.dumps({**about, "parity": measured}, indent=1) + "\n", staged / PARITY)
            _put(staged, folder, replaces, aside)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error}. Choose another with --out.") from error
    return Exported(folder, format, model.use_, model.class_prior_, kind, files, checked.parity, checked.notes)


def _refuse_differing(parity: Mapping[str, Measure], format: Format) -> None:
    broken = [
        f"{name} by {measure.largest:.2g}, over {measure.promised:.2g}"
        for name, measure in parity.items()
        if not measure.kept
    ]
    if broken:
        raise ModelError(
            f"The {format} export differs from FineAlign in {'; '.join(broken)}. It was removed. Wanted: another "
            "--format; `finealign doctor` lists the versions that a report of this should name."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the context, warnings and log messages that the libraries write for developers are not shown."""
    loggers = [logging.getLogger(name) for name in TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _replaced(folder: Path, *, overwrite: bool) -> bool:
    """Whether the folder holds an earlier export to replace. Raises OutputError when it may not be replaced."""

    def foreign(names: set[str]) -> str:
        own_names: set[str] = set()
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            own_names = set(json.loads((folder / PARITY).read_text(encoding="utf-8"))["files"])
        foreign_names = sorted(names - own_names)
        return f"holds {foreign_names[0]!r}, which is of no export" if foreign_names else ""

    return bool(
        require_replaceable(folder, kind="export", foreign=foreign, overwrite=overwrite, ignored=[LEFT_BY_PYTHON])
    )


def _put(staged: Path, folder: Path, replaces: bool, aside: Path) -> None:
    """Move the finished export into place. An earlier one is moved away first, and back if that fails."""
    if replaces:
        folder.rename(aside / "old")
    elif folder.is_dir():
        folder.rmdir()  # it is empty: any other folder has been refused
    try:
        staged.rename(folder)
    except OSError:
        if replaces:
            (aside / "old").rename(folder)
        raise
    if replaces:
        shutil.rmtree(aside / "old", ignore_errors=True)
