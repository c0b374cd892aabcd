"""Images in WebDataset shards, which are tar archives. They are read in place, and nothing is extracted.

A member's path is the archive's path followed by the member's name, as ``shards/0001.tar/wren/7.jpg``. Members can be
read in any order, which training and several ranks need; the library ``webdataset`` can only read a whole shard from
front to back. The first access to an archive lists its members and the positions of their bytes.
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

from finealign.images.paths import PathList

SUFFIX = ".tar"
# A member that cannot be read has one of these negative numbers as its offset.
_REASONS = {
    -1: "its name leads out of its archive",
    -2: "not a regular file in its archive",
    -3: "its archive is cut short",
}


@dataclass(frozen=True)
class Shard:
    """The members of an archive by name. It takes tens of bytes per member, depending on the length of the names."""

    path: Path
    names: PathList  # sorted as bytes
    places: "array[int]"  # offset and size in bytes of each name; a negative offset is a key of _REASONS
    order: "array[int]"  # the names' positions in the order of the archive
    damage: str  # why members may be missing from the list; empty for an intact archive

    def files(self) -> list[Path]:
        """The paths of all members, in the order of the archive."""
        return [Path(f"{self.path}/{self.names[index]}") for index in self.order]

    def head(self, index: int, length: int) -> bytes:
        """The first bytes of the member of this index in ``names``; none where it cannot be read."""
        offset, size = self.places[2 * index : 2 * index + 2]
        if offset < 0:
            return b""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(min(length, size))

    def place(self, name: str) -> tuple[int, int] | None:
        """The offset and the size in bytes of a member, or None where the archive has none of this name."""
        encoded = os.fsencode(name)
        position = bisect.bisect_left(range(len(self.names)), encoded, key=lambda index: os.fsencode(self.names[index]))
        if position == len(self.names) or os.fsencode(self.names[position]) != encoded:
            return None
        return self.places[2 * position], self.places[2 * position + 1]


class ShardError(Exception):
    """A member cannot be read. The message is the reason alone."""


def find_shard(path: Path) -> Path | None:
    """The archive that ``path`` names a member of, or None for a path that leads into no archive."""
    if SUFFIX not in str(path).lower():
        return None
    try:
        return next((parent for parent in path.parents if parent.suffix.lower() == SUFFIX and parent.is_file()), None)
    except (OSError, ValueError):
        return None


def open_member(shard: Path, path: Path) -> io.BufferedReader:
    """Open the member ``path`` of ``shard`` for reading bytes.

    Raises ShardError where the member cannot be read, and OSError where the archive cannot.
    """
    place = read_shard(shard).place(str(path.relative_to(shard)))
    if place is None:
        raise ShardError("no such file in its archive")
    start, size = place
    if start < 0:
        raise ShardError(_REASONS[start])
    if size == 0:
        raise ShardError("empty file")
    return io.BufferedReader(_Part(shard, start, size))


def member_size(shard: Path, path: Path) -> int:
    """The size in bytes of the member ``path`` of ``shard``; -1 where it cannot be read. Raises OSError."""
    place = read_shard(shard).place(str(path.relative_to(shard)))
    return -1 if place is None or place[0] < 0 else place[1]


def read_shard(path: Path) -> Shard:
    """The members of an archive. They are listed anew only when the archive has changed. Raises OSError."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe can block for ever
        raise OSError(None, "not a regular file")
    return _read_shard(str(path), status.st_mtime_ns, status.st_size)


@cache
def _read_shard(path: str, modified: int, size: int) -> Shard:  # ``modified`` is there for the cache's key
    places: dict[bytes, tuple[int, int]] = {}  # of members with the same name the last one counts, as for tar
    damage = ""
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # tarfile would keep every member in memory
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
    """Offset and size in bytes of a member, or a key of ``_REASONS`` and 0. ``size`` is the archive's."""
    name = Path(member.name)
    if name.is_absolute() or ".." in name.parts or "\0" in member.name:
        return -1, 0
    if not member.isreg() or member.sparse is not None:
        return -2, 0
    if member.offset_data + member.size > size:
        return -3, 0
    return member.offset_data, member.size


def _ends_at(path: str, offset: int) -> bool:
    """Whether the end-of-archive mark is at ``offset``. tarfile takes any invalid block for the end."""
    with Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)


class _Part(io.RawIOBase):
    """A file object for ``size`` bytes of a file, from ``start`` on."""

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
        target = memoryview(buffer)[: max(0, min(len(buffer), self._size - self._at))]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(target) or 0
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
