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


class MemmapTensors:
    """A file being written: float32 ``tensors`` by name, to be filled in place.

    The file has a temporary name until ``finish`` gives it its own.
    """

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

    def finish(self) -> dict[str, Tensor]:
        """Flush the file to disk, rename it to its own name, and return the tensors. Raises OutputError."""
        try:
            with self._aside.open("rb+") as file:
                os.fsync(file.fileno())
            self._aside.replace(self.path)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written: {error}.") from error
        return self.tensors


def read_memmap(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a file that ``MemmapTensors`` finished.

    Raises OSError if the file cannot be read, or ValueError if it is not complete and valid.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(min(size, 100_000))  # a damaged file may claim any size
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
