"""A compact list of paths: it stores their bytes back to back and makes a ``Path`` only on access."""

import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import overload

from finealign.types import HeldImage, ImagePath


class PathList(Sequence[Path]):
    """A sequence of paths that takes about as much memory as their text. Equal to any sequence of the same paths."""

    def __init__(self, paths: Iterable[str | Path | bytes]) -> None:
        text, ends = bytearray(), array("Q", [0])
        for path in paths:
            text += os.fsencode(path)
            ends.append(len(text))
        self._text, self._ends = bytes(text), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> Path: ...
    @overload
    def __getitem__(self, index: slice) -> "PathList": ...
    def __getitem__(self, index: int | slice) -> "Path | PathList":
        if isinstance(index, slice):
            return PathList(self._bytes(position) for position in range(len(self))[index])
        return Path(os.fsdecode(self._bytes(range(len(self))[index])))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PathList) and self._text == other._text and self._ends == other._ends:
            return True
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(path == other_path for path, other_path in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # not hashable, as it equals lists, which are not

    def __repr__(self) -> str:
        return f"PathList({list(self[:5])}{f' and {len(self) - 5} more' if len(self) > 5 else ''})"

    def _bytes(self, index: int) -> bytes:
        return self._text[self._ends[index] : self._ends[index + 1]]


def chosen(paths: Sequence[ImagePath], positions: Sequence[int]) -> Sequence[ImagePath]:
    """The images at these positions, compactly where all of them are paths."""
    if any(isinstance(paths[position], HeldImage) for position in positions):
        return [paths[position] for position in positions]
    return PathList(str(paths[position]) for position in positions)
