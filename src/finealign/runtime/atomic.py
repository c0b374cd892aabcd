"""Atomic writes: a file is written under a temporary name, flushed to disk, and then renamed."""

import csv
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from finealign.errors import OutputError

if TYPE_CHECKING:  # so that settings can be written without importing torch
    from torch import Tensor


def make_folder(path: Path) -> None:
    """Create the folder and its parents unless they exist. Raises OutputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The folder {path} cannot be made: {error}.") from error


def require_folder(path: Path) -> None:
    """Raise OutputError where the run's folder no longer exists.

    It is not created again, because it would then hold only a part of the run.
    """
    if not path.is_dir():
        raise OutputError(f"The folder {path} was removed during the run. Put it back, or start again.")


def save_text(text: str, path: Path) -> None:
    """Write ``text`` to ``path`` as UTF-8, atomically: a reader never sees a part of it.

    Raises OutputError; an existing file is then unchanged.
    """

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    _write_aside(path, write)


def save_bytes(content: bytes, path: Path) -> None:
    """Write ``content`` to ``path`` atomically, as ``save_text`` does. Raises OutputError."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    _write_aside(path, write)


def row_writer(stream: TextIO) -> Callable[[Iterable[object]], None]:
    """Return a function that writes one row of CSV to ``stream``. Lines end in a bare newline.

    A row in which a value contains a carriage return is quoted: with this line ending Python's csv writer leaves it
    unquoted, and readers would take it for the end of the line.
    """
    plain = csv.writer(stream, lineterminator="\n")
    quoted = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def write(row: Iterable[object]) -> None:
        values = list(row)
        has_return = any(isinstance(value, str) and "\r" in value for value in values)
        (quoted if has_return else plain).writerow(values)

    return write


def save_tensors(tensors: "Mapping[str, Tensor]", path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write tensors to ``path`` in the safetensors format, atomically: a reader never sees a part of the file.

    ``metadata`` goes into the file's header. Raises OutputError; an existing file is then unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    def write(temporary: Path) -> None:
        try:
            temporary.touch()
            mode = temporary.stat().st_mode  # safetensors would make the file readable by its owner only
            save_file(_apart(tensors), temporary, metadata=metadata)
            temporary.chmod(mode)
        except SafetensorError as error:  # a full disk, for example
            raise OSError(str(error)) from error

    _write_aside(path, write)


def _write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` write a temporary file beside ``path``, flush it to disk, and rename it to ``path``."""
    temporary = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error}. What was there before is untouched.") from error


def _apart(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Contiguous tensors on the CPU that share no memory, as safetensors requires."""
    addresses: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        separate[name] = value.clone() if value.data_ptr() in addresses else value
        addresses.add(value.data_ptr())
    return separate
