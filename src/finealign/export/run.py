"""Write an export aside, have its own library read it back, and put it in its place only if it scores as FineAlign."""

import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from finealign import __version__
from finealign.classifier import FineAlign
from finealign.errors import ModelError, OutputError
from finealign.export.card import export_card
from finealign.export.clip import write_clip
from finealign.export.folder import check_room, names_in, put
from finealign.export.layout import CARD, PARITY
from finealign.export.onnx_file import write_onnx
from finealign.export.openclip import write_open_clip
from finealign.export.record import Checked, Exported, Format, Measure
from finealign.export.refusals import refuse_unfit
from finealign.storage import make_folder, save_text
from finealign.types import Score

Writer = Callable[[FineAlign, Score, Path, Path], Checked]  # of a model, into a folder, with another for its own use

WRITERS: Mapping[Format, Writer] = {"open_clip": write_open_clip, "hf": write_clip, "onnx": write_onnx}
TALKERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "transformers")


def export(
    model: FineAlign, folder: Path, *, format: Format, score: Score | None = None, overwrite: bool = False
) -> Exported:
    """Write a fitted model for another library into ``folder``, checked there against FineAlign in float32 on a CPU.

    ``score`` is what the export computes: of ONNX the model's own choice if None, of the other two always ``global``.
    With ``overwrite`` an earlier export is replaced, nothing else. Raises ConfigError for what the format cannot hold
    or what is not installed, ModelError when the export differs from FineAlign, and OutputError.
    """
    own = model.score_  # first of all, as it says so of a model that is not fitted
    kind: Score = score or (own if format == "onnx" else "global")
    refuse_unfit(model, format, kind)
    old = check_room(folder, overwrite=overwrite)
    make_folder(folder.parent)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name, _quiet():
            aside = Path(name).resolve()  # usage.py runs elsewhere
            model.save(aside / "saved")
            saved = FineAlign.load(aside / "saved", device="cpu", precision="fp32")
            saved.method_.requires_grad_(False)
            made = aside / "export"
            made.mkdir()
            checked = WRITERS[format](saved, kind, made, aside)
            _refuse_differing(checked.parity, format)
            save_text(export_card(model, format), made / CARD)
            files = tuple(sorted([*names_in(made), PARITY]))
            about = {"finealign": __version__, "format": format, "score": kind, "files": files, "notes": checked.notes}
            measured = {name: asdict(one) for name, one in checked.parity.items()}
            save_text(json.dumps({**about, "parity": measured}, indent=1) + "\n", made / PARITY)
            put(made, folder, old, aside)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error}. Choose another with --out.") from error
    return Exported(folder, format, kind, files, checked.parity, checked.notes)


def _refuse_differing(parity: Mapping[str, Measure], format: Format) -> None:
    broken = [f"{name} by {one.largest:.2g}, over {one.promised:.2g}" for name, one in parity.items() if not one.kept]
    if broken:
        raise ModelError(
            f"The {format} export differs from FineAlign in {'; '.join(broken)}. It was removed. Wanted: another "
            "--format; `finealign doctor` lists the versions that a report of this should name."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """What the libraries tell their developers while it lasts is not for the user's screen."""
    loggers = [logging.getLogger(name) for name in TALKERS]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
