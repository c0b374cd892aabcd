"""The images of a training set, decoded once into one file on disk and mapped into memory from there.

Memory does not grow with their number, and a second run on the same images decodes nothing. A cache folder holds one
entry a set of images, named by what the images hold: ``pixels.u8``, all images back to back, and ``index.json``.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL

from finealign.errors import ImageInputError, OutputError
from finealign.images import ImageReadError, Pixels, display_path, in_order, open_regular, read_pixels, reason_of
from finealign.paths import PathList
from finealign.storage import save_text
from finealign.types import SetAside

FORMAT = 2  # to be raised when images come out of `images` otherwise than before: what is stored is then passed over
PIXELS, INDEX = "pixels.u8", "index.json"

_ENTRY = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = re.compile(r"building-[0-9a-f]{16}")
_DEAD_AFTER = 24 * 3600  # seconds in which a build has written nothing
_Record = str | Sequence[int]  # of one path: why it is set aside, or (H, W)


class StoredPixels(Sequence[Pixels]):
    """Decoded images by position: item i is (H, W, 3) uint8, writable, in memory only while it is looked at.

    The first ``cached`` are views of a file, where writing changes this process's copy alone; the others are decoded
    anew at each access. Can be handed to other processes, which map the same file. Made by ``store_pixels``.

    Raises, at access, ImageInputError: an image that is not in the file can no longer be read.
    """

    paths: Sequence[Path]  # of the images that can be read, in order
    cached: int

    def __init__(
        self, paths: Sequence[Path], shapes: Sequence[Sequence[int]], file: Path | None, read: Callable[[Path], Pixels]
    ) -> None:
        """``shapes`` are (H, W) of the images in ``file``, which are those of the first paths; ``read`` decodes one."""
        self.paths, self._file, self._read = paths, file, read
        self._shapes = np.array(shapes, dtype=np.int64).reshape(-1, 2)
        self._starts = np.concatenate([[0], np.cumsum(3 * self._shapes.prod(axis=1))])  # (cached + 1,) bytes
        self._pixels = np.empty(0, np.uint8)
        if file is not None and len(shapes):  # nothing cannot be mapped
            try:  # "c", writes stay in memory: torch warns of arrays it may not write to
                mapped = np.memmap(file, np.uint8, mode="c", shape=(int(self._starts[-1]),))
                self._pixels = mapped.view(np.ndarray)
            except (OSError, ValueError) as error:  # removed by another process to make room, which may happen any time
                self._shapes = self._shapes[:0]
                _warn(f"read from {file}", error, "run again to store them anew")
        self.cached = len(self._shapes)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Pixels:  # type: ignore[override]  # no slices: they would hold many at once
        position = range(len(self.paths))[index]
        if position < self.cached:
            height, width = self._shapes[position]
            return self._pixels[self._starts[position] : self._starts[position + 1]].reshape(height, width, 3)
        path = self.paths[position]
        try:
            return self._read(path)
        except ImageReadError as error:
            raise ImageInputError(
                f"'{display_path(path)}' could be read at the start of the run and no longer can: {error}. "
                "Put it back, or run again without it."
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:  # the file is mapped anew, not copied
        return type(self), (self.paths, self._shapes, self._file, self._read)


def store_pixels(
    paths: Sequence[Path],
    *,
    shorter_side: int,
    max_pixels: int,
    folder: Path | None,
    max_bytes: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[StoredPixels, list[SetAside]]:
    """The images as ``read_pixels`` gives them, but on disk, and those set aside, each in the order given.

    ``folder`` is the cache, made if missing; with None the pixels lie in a temporary folder that goes when the result
    does. No more than ``max_bytes`` of pixels are stored in either, other entries of the cache included, of which those
    used least recently make room. From the first image that does not fit on, images are tried once and then decoded at
    each access; so they all are, with a warning, where the folder cannot be written or is full. 0 stores none, and
    leaves the cache alone.

    ``on_progress`` is called in this thread with the number of paths done so far; once where the cache has them all.

    Raises:
        ImageInputError: no image could be read.
    """
    read = partial(read_pixels, shorter_side=shorter_side, max_pixels=max_pixels)
    entry: Path | None = None
    unreadable: dict[Path, str] = {}
    if folder is not None and max_bytes > 0:
        key, unreadable = _key(paths, f"{FORMAT} {shorter_side} {max_pixels} {PIL.__version__}")
        entry = folder.absolute() / key
        found = _load(entry, paths, read, max_bytes)
        if found is not None:
            on_progress(len(paths))
            return found

    passing: list[Path] = []  # cannot be read for a reason that lies not in the file

    def attempt(path: Path) -> Pixels:
        if path in unreadable:  # the reason is part of the key
            raise ImageReadError(unreadable[path])
        try:
            return read(path)
        except ImageReadError as error:
            if isinstance(error.__cause__, MemoryError) or getattr(error.__cause__, "errno", None) is not None:
                passing.append(path)
            raise

    store = _Store(entry, max_bytes)
    try:
        records: list[_Record] = []
        with closing(in_order(attempt, paths)) as results:
            for done, (_, result) in enumerate(results, start=1):
                if isinstance(result, SetAside):
                    records.append(result.reason)
                else:
                    store.add(result)
                    records.append(result.shape[:2])
                on_progress(done)
        if all(isinstance(record, str) for record in records):
            raise _nothing_readable(paths, records)
        # Were it kept, an image that could not be read today would be passed over for ever.
        if store.close() and entry is not None and not passing:
            try:
                store.keep(records)
            except (OSError, OutputError) as error:
                found = _load(entry, paths, read, max_bytes)
                if found is not None:  # another process was first
                    store.discard()
                    return found
                _warn(f"stored in {entry.parent}", error)
        stored, set_aside = _assemble(paths, records, read, store.folder, store.images)
    except BaseException:
        store.discard()
        raise
    if store.folder is not None and store.folder != entry:
        weakref.finalize(stored, _remove_own, store.folder, os.getpid())
    return stored, set_aside


class _Store:
    """The file of pixels while it grows, up to the bound. If it cannot be written, nothing is stored.

    Not what could be written so far: that would leave the disk full, and the run has yet to write its own results.
    """

    def __init__(self, entry: Path | None, max_bytes: int) -> None:
        """``entry`` is what it is to become; None for a temporary one."""
        self.folder: Path | None = None  # where it lies, None when nothing is stored
        self.images = 0  # stored
        self._bytes = 0
        self._max_bytes = max_bytes
        self._room = max_bytes if entry is None else 0  # beside the other entries, so far
        self._entry = entry
        self._full = False
        self._file: BinaryIO | None = None  # None when nothing is stored
        if max_bytes <= 0:
            return
        with self._or_nothing():
            if entry is None:
                self.folder = Path(tempfile.mkdtemp(prefix="finealign-"))
            else:
                entry.parent.mkdir(parents=True, exist_ok=True)
                _sweep(entry.parent)
                if _is_entry(entry):  # torn, or more would fit now
                    _remove_entry(entry)
                self.folder = _unfinished(entry.parent)
                self.folder.mkdir()
            self._file = (self.folder / PIXELS).open("wb")

    def add(self, pixels: Pixels) -> None:
        """Store one more image unless it, or one before it, does not fit."""
        if self._file is None or self._full:
            return
        with self._or_nothing():
            size = self._bytes + pixels.nbytes
            if self._entry is not None and self._room < size <= self._max_bytes:
                self._room = _make_room(self._entry, size, self._max_bytes)
            if size > self._room:
                self._full = True
            else:
                self._file.write(pixels.data)
                self._bytes = size
                self.images += 1

    def close(self) -> bool:
        """No more images come. Whether there is a file: not when it could not be written."""
        if self._file is not None:
            with self._or_nothing():
                self._file.flush()
                if self._entry is not None:
                    os.fsync(self._file.fileno())
                self._file.close()
        return self._file is not None

    def keep(self, records: Sequence[_Record]) -> None:
        """Become the entry. Raises OSError or OutputError; then it stays where it is."""
        assert self.folder is not None and self._entry is not None
        index = {"bytes": self._bytes, "stored": self.images, "images": records}
        save_text(json.dumps(index), self.folder / INDEX)
        _make_room(self._entry, self._bytes, self._max_bytes)
        self.folder = self.folder.rename(self._entry)

    def discard(self) -> None:
        """Remove what is stored, unless it has become the entry."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        if self.folder is not None and self.folder != self._entry:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder, self._file, self.images = None, None, 0

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard()
            _warn(f"stored in {'a temporary folder' if self._entry is None else self._entry.parent}", error)


def _warn(
    what: str, error: Exception, advice: str = "free some space there or choose a cache folder that can be written"
) -> None:
    warnings.warn(
        f"The decoded images cannot be {what} ({error}), so they will be decoded again, which is slower; {advice}.",
        stacklevel=2,
    )


def _nothing_readable(paths: Sequence[Path], reasons: Sequence[_Record]) -> ImageInputError:
    first = "; ".join(f"{display_path(path)}: {reason}" for path, reason in zip(paths[:3], reasons, strict=False))
    return ImageInputError(
        f"None of the {len(paths)} images tried could be read{f' ({first})' if first else ''}. "
        "Wanted at least one. Check the paths and the files."
    )


def _key(paths: Sequence[Path], settings: str) -> tuple[str, dict[Path, str]]:
    """The name of the entry of these files, by what they hold, and why some cannot be read."""
    key = hashlib.blake2b(f"{settings}\n".encode(), digest_size=32)
    unreadable = {}
    with closing(in_order(_checksum, paths)) as results:
        for path, result in results:
            if isinstance(result, SetAside):
                unreadable[path] = result.reason
                result = f"cannot be read: {result.reason}"
            key.update(f"{result}\n".encode())
    return key.hexdigest(), unreadable


def _checksum(path: Path) -> str:
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=32)).hexdigest()
        except OSError as error:
            raise ImageReadError(reason_of(error)) from error


def _load(
    entry: Path, paths: Sequence[Path], read: Callable[[Path], Pixels], max_bytes: int
) -> tuple[StoredPixels, list[SetAside]] | None:
    """The entry, marked as used now and others removed to keep the bound; None where it is missing, torn or unfit.

    Unfit is an entry over the bound, and one that lacks images of which the bound now permits more.
    """
    try:
        index = json.loads((entry / INDEX).read_text(encoding="utf-8"))
        records, cached = index["images"], index["stored"]
        sizes = [3 * height * width for height, width in (r for r in records if not isinstance(r, str))]
        total = sum(sizes[:cached])
        whole = len(records) == len(paths) and index["bytes"] == total == (entry / PIXELS).stat().st_size
        more_would_fit = cached < len(sizes) and total + sizes[cached] <= max_bytes
    except (OSError, ValueError, TypeError, LookupError):
        return None
    if not whole or more_would_fit or total > max_bytes:
        return None
    with suppress(OSError):  # it may be read where nothing can be written
        os.utime(entry / INDEX)
        _make_room(entry, total, max_bytes)
    return _assemble(paths, records, read, entry, cached)


def _assemble(
    paths: Sequence[Path],
    records: Sequence[_Record],
    read: Callable[[Path], Pixels],
    folder: Path | None,
    cached: int,
) -> tuple[StoredPixels, list[SetAside]]:
    shapes = [record for record in records if not isinstance(record, str)]
    readable = paths
    set_aside: list[SetAside] = []
    if len(shapes) < len(paths):
        both = list(zip(paths, records, strict=True))
        readable = PathList(path for path, record in both if not isinstance(record, str))
        set_aside = [SetAside(display_path(path), record) for path, record in both if isinstance(record, str)]
    file = None if folder is None else folder / PIXELS
    return StoredPixels(readable, shapes[:cached], file, read), set_aside


def _make_room(entry: Path, size: int, max_bytes: int) -> int:
    """Remove the other entries, those used least recently first, until ``size`` bytes fit; the bytes that do fit.

    Raises OSError: the folder cannot be listed.
    """
    others = []
    for other in entry.parent.iterdir():
        if other.name != entry.name and _is_entry(other):
            with suppress(OSError):  # another process removed it meanwhile
                others.append(((other / INDEX).stat().st_mtime_ns, other, (other / PIXELS).stat().st_size))
    room = max_bytes - sum(stored for _, _, stored in others)
    for _, other, stored in sorted(others):
        if size <= room:
            break
        with suppress(OSError):
            _remove_entry(other)
            room += stored
    return room


def _is_entry(path: Path) -> bool:
    return _ENTRY.fullmatch(path.name) is not None and not path.is_symlink() and (path / INDEX).is_file()


def _remove_entry(entry: Path) -> None:
    # Renamed first: if this is cut short, what remains is known for rubbish. Who has it mapped keeps it.
    rubbish = _unfinished(entry.parent)
    entry.rename(rubbish)
    shutil.rmtree(rubbish, ignore_errors=True)


def _unfinished(folder: Path) -> Path:
    return folder / f"building-{secrets.token_hex(8)}"


def _sweep(folder: Path) -> None:
    """Remove what builds that were killed have left behind."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            with suppress(OSError):
                last = max(part.stat().st_mtime for part in (path, *path.iterdir()))
                if time.time() - last > _DEAD_AFTER:
                    shutil.rmtree(path, ignore_errors=True)


def _remove_own(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker lets go of its copy alone
        shutil.rmtree(folder, ignore_errors=True)
