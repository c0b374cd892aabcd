"""Memory-mapped tensors in a file, filled part by part: for data that grows with the number of images.

The file is an ordinary safetensors file, which any safetensors reader can read.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from finealign.errors import OutputError
from finealign.runtime.atomic import save_text


class MemmapTensors:
    """A file being written: float32 ``tensors`` by name, to be filled in place.

    The file has a temporary name until ``finish`` gives it its own. ``mark`` notes beside it how far it is filled, so
    that another process can go on.
    """

    done = 0  # rows that were filled by an earlier process

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        """Reserve the disk space for tensors of these shapes. Raises OutputError if there is not enough."""
        self.path, self._aside = path, path.with_suffix(".part")
        header: dict[str, Any] = {}
        self._total = 0
        for name, shape in shapes.items():
            end = self._total + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [self._total, end]}
            self._total = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # safetensors aligns the tensors to 8 bytes
        start = 8 + len(text)
        try:
            _mark_of(path).unlink(missing_ok=True)  # of what is replaced
            with self._aside.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                # Reserved now: if the disk filled up later, writing into the memory map would kill the process.
                if hasattr(os, "posix_fallocate") and self._total:
                    os.posix_fallocate(file.fileno(), start, self._total)
                file.truncate(start + self._total)
            self.tensors = _map(self._aside, header, start, writable=True)
        except OSError as error:
            with suppress(OSError):
                self._aside.unlink(missing_ok=True)
            raise OutputError(
                f"{path} cannot be written: {error}. It needs {(start + self._total) / 1e9:.1f} GB there; free some."
            ) from error

    @classmethod
    def resumed(cls, path: Path, key: str) -> "MemmapTensors | None":
        """The file that an earlier process has filled up to row ``done`` and marked with ``key``, complete or not.

        None if there is none.
        """
        try:
            mark = json.loads(_mark_of(path).read_text(encoding="utf-8"))
            if mark["key"] != key:
                return None
            found = cls.__new__(cls)
            found.path, found._aside = path, path.with_suffix(".part")
            if not found._aside.exists():
                path.replace(found._aside)  # complete: ``finish`` gives it its name again
            start, header = _read_header(found._aside)
            found.tensors = _map(found._aside, header, start, writable=True)
            found.done = int(mark["rows"])
        except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError, RuntimeError):
            return None
        return found if all(0 <= found.done <= len(tensor) for tensor in found.tensors.values()) else None

    def mark(self, rows: int, key: str) -> None:
        """Flush the file to disk, and note that this many rows of each tensor are filled. Raises OutputError."""
        try:
            self._flush()
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error}.") from error
        save_text(json.dumps({"key": key, "rows": rows}), _mark_of(self.path))

    def _flush(self) -> None:
        with self._aside.open("rb+") as file:
            os.fsync(file.fileno())

    def finish(self) -> dict[str, Tensor]:
        """Flush the file to disk, rename it to its own name, and return the tensors. Raises OutputError."""
        try:
            self._flush()
            self._aside.replace(self.path)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error}.") from error
        return self.tensors


def read_memmap(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a file that ``MemmapTensors`` finished.

    Raises OSError if the file cannot be read, or ValueError if it is not complete and valid.
    """
    try:
        start, header = _read_header(path)
        return _map(path, header, start, writable=False)
    except (AttributeError, KeyError, TypeError, RecursionError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold mapped tensors: {error!r}") from error


def finished_memmap(path: Path, key: str) -> dict[str, Tensor] | None:
    """The tensors of a file that was finished and marked with this key; None if there is none."""
    try:
        mark = json.loads(_mark_of(path).read_text(encoding="utf-8"))
        found = read_memmap(path) if mark["key"] == key else None
        return found if found and all(len(tensor) == mark["rows"] for tensor in found.values()) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def forget(path: Path) -> None:
    """Remove a file that ``MemmapTensors`` wrote, and what was noted of it. Where that fails, nothing is said."""
    for part in (path, _mark_of(path)):
        with suppress(OSError):  # a file too many does no harm
            part.unlink(missing_ok=True)


def _mark_of(path: Path) -> Path:
    """The file that says how far the file at ``path`` is filled."""
    return path.with_name(f"done-{path.stem}.json")


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a file begin, in bytes, and its header. Raises nearly anything for what is no such file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(min(size, 100_000))  # a damaged file may claim any size
        length = file.seek(0, os.SEEK_END)
    header: dict[str, Any] = json.loads(text)
    end = 0
    for name, entry in header.items():
        shape, offsets = entry["shape"], entry["data_offsets"]
        if entry["dtype"] != "F32" or not all(type(side) is int and side >= 0 for side in [*shape, *offsets]):
            raise ValueError(f"{path} holds {name!r:.100}, which is no float32 tensor")
        if offsets != [end, end + 4 * math.prod(shape)]:
            raise ValueError(f"{path} holds {name!r:.100} of shape {shape} in another place than it should")
        end = offsets[1]
    if length != 8 + size + end:
        raise ValueError(f"{path} has {length} bytes, not the {8 + size + end} of its header")
    return 8 + size, header


def _map(path: Path, header: dict[str, Any], start: int, *, writable: bool) -> dict[str, Tensor]:
    tensors = {}
    # "c" is copy-on-write: torch warns about read-only arrays, and with "c" a write would not reach the file.
    mode: Literal["r+", "c"] = "r+" if writable else "c"
    for name, entry in header.items():
        if math.prod(entry["shape"]):
            array = np.memmap(path, np.float32, mode, start + entry["data_offsets"][0], tuple(entry["shape"]))
            tensors[name] = torch.from_numpy(array.view(np.ndarray))
        else:  # nothing to map, which np.memmap refuses
            tensors[name] = torch.empty(entry["shape"])
    return tensors
