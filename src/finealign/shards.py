"""Images in WebDataset shards: tar archives, read in place, nothing ever extracted.

A member is named by the archive's path with its own name below it, as ``shards/0001.tar/wren/7.jpg``, and can be read
in any order, which training and several ranks need; the library ``webdataset`` reads a shard from front to back only,
and all of it. The first look at an archive lists its members and where their bytes lie.
"""

import bisect
import io
import os
import stat
import tarfile
from array import array
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from finealign.paths import PathList

SUFFIX = ".tar"
# In the place of an offset, why a member cannot be read.
_REASONS = {
    -1: "its name leads out of its archive",
    -2: "not a regular file in its archive",
    -3: "its archive is cut short",
}


@dataclass(frozen=True)
class Shard:
    """The members of an archive by name. Tens of bytes a member, as its names are long."""

    path: Path
    names: PathList  # sorted as bytes
    places: "array[int]"  # two numbers a name: where its bytes begin, how many; a negative beginning is a reason
    order: "array[int]"  # the names' positions in the order of the archive
    damage: str  # why there may be more members than could be listed; empty for a whole archive

    def files(self) -> list[Path]:
        """Every member's path, in the order of the archive."""
        return [Path(f"{self.path}/{self.names[index]}") for index in self.order]

    def place(self, name: str) -> tuple[int, int] | None:
        """Where a member's bytes lie in the archive and how many, or None where there is none of this name."""
        wanted = os.fsencode(name)
        found = bisect.bisect_left(range(len(self.names)), wanted, key=lambda index: os.fsencode(self.names[index]))
        if found == len(self.names) or os.fsencode(self.names[found]) != wanted:
            return None
        return self.places[2 * found], self.places[2 * found + 1]


class ShardError(Exception):
    """A member cannot be read; the message is the bare reason."""


def find_shard(path: Path) -> Path | None:
    """The archive that ``path`` is a member of, or None for a path in no archive."""
    if SUFFIX not in str(path).lower():
        return None
    try:
        return next((up for up in path.parents if up.suffix.lower() == SUFFIX and up.is_file()), None)
    except (OSError, ValueError):
        return None


def open_member(shard: Path, path: Path) -> io.BufferedReader:
    """A member, open for reading bytes. Raises ShardError, and OSError where the archive cannot be read."""
    found = read_shard(shard).place(str(path.relative_to(shard)))
    if found is None:
        raise ShardError("no such file in its archive")
    start, size = found
    if start < 0:
        raise ShardError(_REASONS[start])
    if size == 0:
        raise ShardError("empty file")
    return io.BufferedReader(_Part(shard, start, size))


def member_size(shard: Path, path: Path) -> int:
    """Bytes of a member, -1 where it cannot be read."""
    found = read_shard(shard).place(str(path.relative_to(shard)))
    return -1 if found is None or found[0] < 0 else found[1]


def read_shard(path: Path) -> Shard:
    """The members of an archive, listed once as long as it does not change. Raises OSError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # to open a pipe can wait for ever
        raise OSError(None, "not a regular file")
    return _read_shard(str(path), status.st_mtime_ns, status.st_size)


@cache
def _read_shard(path: str, changed: int, size: int) -> Shard:
    places: dict[bytes, tuple[int, int]] = {}  # a name that stands twice is the later one, as for tar
    damage = ""
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else they pile up
                if not member.isdir():
                    places[os.fsencode(Path(member.name.lstrip("/")))] = _place(member, size)
            if not _ends_at(path, archive.offset):
                damage = "the archive is cut short or damaged"
    except OSError:
        raise
    except Exception as error:  # damaged archives make tarfile raise nearly anything
        damage = f"the archive is cut short or damaged ({str(error) or type(error).__name__})"
    names = sorted(places)
    position = {name: index for index, name in enumerate(names)}
    return Shard(
        path=Path(path),
        names=PathList(names),
        places=array("q", [number for name in names for number in places[name]]),
        order=array("Q", [position[name] for name in places]),
        damage=f"{damage} after {len(names)} members" if damage else "",
    )


def _place(member: tarfile.TarInfo, size: int) -> tuple[int, int]:
    name = Path(member.name)
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        return -1, 0
    if not member.isreg() or member.sparse is not None:
        return -2, 0
    if member.offset_data + member.size > size:
        return -3, 0
    return member.offset_data, member.size


def _ends_at(path: str, offset: int) -> bool:
    """Whether the mark of an archive's end stands there: tarfile takes any other block for one, too."""
    with Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


class _Part(io.RawIOBase):
    """Some bytes of a file as a file of their own."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._start, self._size, self._at = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = memoryview(buffer)[: max(0, min(len(buffer), self._size - self._at))]
        self._file.seek(self._start + self._at)
        got = self._file.readinto(wanted) or 0
        self._at += got
        return got

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
