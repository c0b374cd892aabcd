"""Tensors that lie on disk, are filled part by part and mapped into memory: for what grows with the number of images.

The file is an ordinary safetensors file, so anything that reads those reads it.
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


class MappedTensors:
    """float32 tensors by name, to be filled in place; ``finish`` makes the file whole under its name."""

    def __init__(self, path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        """Make room for them beside ``path``. Raises OutputError when there is none."""
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
            with self._aside.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                # Reserved now: a disk that fills up later would end the process while it writes into the map.
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

    def finish(self) -> dict[str, Tensor]:
        """The tensors, under the file's own name from now on. Raises OutputError."""
        try:
            with self._aside.open("rb+") as file:
                os.fsync(file.fileno())
            self._aside.replace(self.path)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error}.") from error
        return self.tensors


def read_mapped(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``MappedTensors`` finished. Raises OSError or ValueError when it is not whole."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(min(size, 100_000))
        length = file.seek(0, os.SEEK_END)
    end = 0
    try:
        header = json.loads(text)
        for name, entry in header.items():
            shape, offsets = entry["shape"], entry["data_offsets"]
            if entry["dtype"] != "F32" or not all(type(side) is int and side >= 0 for side in [*shape, *offsets]):
                raise ValueError(f"{path} holds {name!r:.100}, which is no float32 tensor")
            if offsets != [end, end + 4 * math.prod(shape)]:
                raise ValueError(f"{path} holds {name!r:.100} of shape {shape} in another place than it should")
            end = offsets[1]
        if length != 8 + size + end:
            raise ValueError(f"{path} has {length} bytes, not the {8 + size + end} of its header")
        return _map(path, header, 8 + size, writable=False)
    except (AttributeError, KeyError, TypeError, RecursionError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold mapped tensors: {error!r}") from error


def _map(path: Path, header: dict[str, Any], start: int, *, writable: bool) -> dict[str, Tensor]:
    found = {}
    # "c": torch warns of arrays it may not write to, and what is written there stays in memory.
    mode: Literal["r+", "c"] = "r+" if writable else "c"
    for name, entry in header.items():
        if math.prod(entry["shape"]):
            array = np.memmap(path, np.float32, mode, start + entry["data_offsets"][0], tuple(entry["shape"]))
            found[name] = torch.from_numpy(array.view(np.ndarray))
        else:
            found[name] = torch.empty(entry["shape"])
    return found
