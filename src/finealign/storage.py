"""Files that are whole or not there: written aside, flushed to disk, renamed."""

import csv
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from finealign.errors import OutputError

if TYPE_CHECKING:  # settings are written without torch
    from torch import Tensor


def make_folder(path: Path) -> None:
    """Make the folder, and those above it, unless it is there. Raises OutputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {path} cannot be made: {error}.") from error


def require_folder(path: Path) -> None:
    """Raises OutputError where a folder that was there has gone: made anew, it would hold half of a run."""
    if not path.is_dir():
        raise OutputError(f"The folder {path} was removed during the run. Put it back, or start again.")


def save_text(text: str, path: Path) -> None:
    """Write UTF-8 so that no reader ever sees half a file. Raises OutputError; what was there stays."""

    def write(aside: Path) -> None:
        aside.write_text(text, encoding="utf-8")

    _write_aside(path, write)


def save_bytes(content: bytes, path: Path) -> None:
    """As ``save_text``, for what is no text."""

    def write(aside: Path) -> None:
        aside.write_bytes(content)

    _write_aside(path, write)


def row_writer(stream: TextIO) -> Callable[[Iterable[object]], None]:
    """What writes a row of CSV with lines ending in a bare newline, whatever its values hold.

    Python's own writer leaves a carriage return unquoted then, and readers take it for the end of the line.
    """
    plain = csv.writer(stream, lineterminator="\n")
    quoted = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def write(row: Iterable[object]) -> None:
        values = list(row)
        returns = any(isinstance(value, str) and "\r" in value for value in values)
        (quoted if returns else plain).writerow(values)

    return write


def save_tensors(tensors: "Mapping[str, Tensor]", path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write safetensors so that no reader ever sees half a file. Raises OutputError; what was there stays."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(aside: Path) -> None:
        try:
            aside.touch()
            usual = aside.stat().st_mode  # safetensors would leave the file to its owner alone
            save_file(_apart(tensors), aside, metadata=metadata)
            aside.chmod(usual)
        except SafetensorError as error:  # a full disk comes as this
            raise OSError(str(error)) from error

    _write_aside(path, write)


def _write_aside(path: Path, write: Callable[[Path], None]) -> None:
    aside = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with aside.open("rb+") as written:
            os.fsync(written.fileno())
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error}. What was there before is untouched.") from error


def _apart(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Contiguous tensors on the CPU that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        separate[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return separate
