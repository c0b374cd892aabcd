"""The pixel cache: the images of a training set are decoded once into one file on disk, which is memory-mapped.

Memory use does not grow with the number of images, and a second run on the same images decodes nothing. The cache
folder has one entry per set of images: a folder named by a hash of what tells that the files are still the same, for
which none of them is read (``files.stamp``). It holds ``pixels.u8``, the pixels of all images back to back, and
``index.json``.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL

from finealign.errors import ImageInputError, OutputError, display_path
from finealign.images.channels import White
from finealign.images.decoding import Pixels, heif_version, read_pixels
from finealign.images.files import ImageReadError, stamp
from finealign.images.paths import chosen
from finealign.images.prefetch import in_order
from finealign.runtime.atomic import save_text
from finealign.types import ImagePath, SetAside

FORMAT = 5  # part of the key; to be raised when images are decoded differently, so that old entries are not used
PIXELS, INDEX = "pixels.u8", "index.json"

_ENTRY = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = re.compile(r"building-[0-9a-f]{16}")
_DEAD_AFTER = 24 * 3600  # seconds without a write after which an unfinished entry is abandoned
_Record = str | Sequence[int]  # of one path: the reason why it is set aside, or (H, W)


class StoredPixels(Sequence[Pixels]):
    """A sequence of decoded images, made by ``store_pixels``. Item i is (H, W, 3) uint8 and writable.

    The first ``cached`` images are views of a memory-mapped file; writing to one changes only this process's copy. The
    others are decoded at each access. The object can be pickled for other processes, which map the same file.

    Access raises ImageInputError where an image that is not in the file can no longer be read.
    """

    paths: Sequence[ImagePath]  # of the images that can be read, in order
    cached: int  # number of images in the file

    def __init__(
        self,
        paths: Sequence[ImagePath],
        shapes: Sequence[Sequence[int]],
        file: Path | None,
        read: Callable[[ImagePath], Pixels],
    ) -> None:
        """``file`` holds the images of the first paths, and ``shapes`` are their (H, W). ``read`` decodes one image."""
        self.paths, self._file, self._read = paths, file, read
        self._shapes = np.array(shapes, dtype=np.int64).reshape(-1, 2)
        self._starts = np.concatenate([[0], np.cumsum(3 * self._shapes.prod(axis=1))])  # (cached + 1,) offsets in bytes
        self._pixels = np.empty(0, np.uint8)
        if file is not None and len(shapes):  # an empty file cannot be mapped
            try:  # mode "c" keeps writes in memory; torch warns about read-only arrays
                mapped = np.memmap(file, np.uint8, mode="c", shape=(int(self._starts[-1]),))
                self._pixels = mapped.view(np.ndarray)
            except (OSError, ValueError) as error:  # another process may remove the entry at any time to free space
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

    def __reduce__(self) -> tuple[Any, ...]:  # the other process maps the file anew, nothing is copied
        return type(self), (self.paths, self._shapes, self._file, self._read)


def store_pixels(
    paths: Sequence[ImagePath],
    *,
    shorter_side: int,
    max_pixels: int,
    white_value: White = "auto",
    folder: Path | None,
    max_bytes: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[StoredPixels, list[SetAside]]:
    """Decode images as ``read_pixels`` does, store them on disk, and return them and the images that are set aside.

    Both results are in the order of ``paths``. ``folder`` is the cache folder, which is created if it is missing. With
    None the pixels are stored in a temporary folder, which is removed when the result is garbage-collected.

    At most ``max_bytes`` bytes of pixels are stored. In a cache folder this limit includes the other entries; the least
    recently used ones are removed until the new one fits. From the first image that does not fit on, images are decoded
    once to check them and then again at each access. Where the folder cannot be written or is full, a warning is issued
    and all images are decoded at each access. With 0 nothing is stored and the cache is not touched.

    ``on_progress`` is called in this thread with the number of paths done so far, and only once where the cache already
    has the images.

    Raises:
        ImageInputError: no image could be read.
    """
    read = partial(read_pixels, shorter_side=shorter_side, max_pixels=max_pixels, white_value=white_value)
    entry: Path | None = None
    unreadable: dict[ImagePath, str] = {}
    if folder is not None and max_bytes > 0:
        key, unreadable = _key(
            paths, f"{FORMAT} {shorter_side} {max_pixels} {white_value} {PIL.__version__} {heif_version()}"
        )
        entry = folder.absolute() / key
        loaded = _load(entry, paths, read, max_bytes)
        if loaded is not None:
            on_progress(len(paths))
            return loaded
    store = _Store(entry, max_bytes)
    try:
        records, permanent = _fill(store, paths, read, unreadable, on_progress)
        # An entry would record transient failures too, and later runs would set those images aside for ever.
        if store.close() and entry is not None and permanent:
            try:
                store.keep(records)
            except (OSError, OutputError) as error:
                loaded = _load(entry, paths, read, max_bytes)
                if loaded is not None:  # another process has stored the same entry meanwhile
                    store.discard()
                    return loaded
                _warn(f"stored in {entry.parent}", error)
        stored, set_aside = _assemble(paths, records, read, store.folder, store.images)
    except BaseException:
        store.discard()
        raise
    if store.folder is not None and store.folder != entry:
        weakref.finalize(stored, _remove_own, store.folder, os.getpid())
    return stored, set_aside


def _fill(
    store: "_Store",
    paths: Sequence[ImagePath],
    read: Callable[[ImagePath], Pixels],
    unreadable: Mapping[ImagePath, str],
    on_progress: Callable[[int], None],
) -> tuple[list[_Record], bool]:
    """Decode every image into the store. Return the record of each, and whether all failures are permanent.

    ``unreadable`` are the images that are known to be unreadable, with the reason. Raises ImageInputError where no
    image can be read.
    """
    transient: list[ImagePath] = []  # unreadable for a reason outside the file, as a lack of memory

    def attempt(path: ImagePath) -> Pixels:
        if path in unreadable:  # the reason is part of the key
            raise ImageReadError(unreadable[path])
        try:
            return read(path)
        except ImageReadError as error:
            if isinstance(error.__cause__, MemoryError) or getattr(error.__cause__, "errno", None) is not None:
                transient.append(path)
            raise

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
    return records, not transient


class _Store:
    """The file of pixels while it is being written, up to ``max_bytes``.

    If a write fails, everything is removed. Keeping the part written so far would leave the disk full, and the run
    still has to write its own results.
    """

    def __init__(self, entry: Path | None, max_bytes: int) -> None:
        """``entry`` is the folder that it becomes when it is finished; None for a temporary one."""
        self.folder: Path | None = None  # where it is written; None when nothing is stored
        self.images = 0  # number of images stored
        self._bytes = 0
        self._max_bytes = max_bytes
        self._room = max_bytes if entry is None else 0  # bytes free beside the other entries, by the last count
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
                if _is_entry(entry):  # _load has refused it: damaged, or more images would fit now
                    _remove_entry(entry)
                self.folder = _unfinished(entry.parent)
                self.folder.mkdir()
            self._file = (self.folder / PIXELS).open("wb")

    def add(self, pixels: Pixels) -> None:
        """Append an image, unless it or an earlier one does not fit."""
        if self._file is None or self._full:
            return
        with self._or_nothing():
            total = self._bytes + pixels.nbytes
            if self._entry is not None and self._room < total <= self._max_bytes:
                self._room = _make_room(self._entry, total, self._max_bytes)
            if total > self._room:
                self._full = True
            else:
                self._file.write(pixels.data)
                self._bytes = total
                self.images += 1

    def close(self) -> bool:
        """Finish the file after the last image. Return whether there is one: not where it could not be written."""
        if self._file is not None:
            with self._or_nothing():
                self._file.flush()
                if self._entry is not None:
                    os.fsync(self._file.fileno())
                self._file.close()
        return self._file is not None

    def keep(self, records: Sequence[_Record]) -> None:
        """Turn the folder into the entry. Raises OSError or OutputError, and then leaves the folder where it is."""
        assert self.folder is not None and self._entry is not None
        index = {"bytes": self._bytes, "stored": self.images, "images": records}
        save_text(json.dumps(index), self.folder / INDEX)
        _make_room(self._entry, self._bytes, self._max_bytes)
        self.folder = self.folder.rename(self._entry)

    def discard(self) -> None:
        """Remove everything that was written, unless it has become the entry."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        if self.folder is not None and self.folder != self._entry:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder, self._file, self.images = None, None, 0

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        """On an OSError, discard everything, warn, and continue without a file."""
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


def _nothing_readable(paths: Sequence[ImagePath], reasons: Sequence[_Record]) -> ImageInputError:
    first = "; ".join(f"{display_path(path)}: {reason}" for path, reason in zip(paths[:3], reasons, strict=False))
    return ImageInputError(
        f"None of the {len(paths)} images tried could be read{f' ({first})' if first else ''}. "
        "Wanted at least one. Check the paths and the files."
    )


def _key(paths: Sequence[ImagePath], settings: str) -> tuple[str, dict[ImagePath, str]]:
    """The name of the entry, a hash of the settings and the files' stamps, and the reasons for unreadable files.

    Where a file has changed so recently that another change could bear the same time, this waits and looks again.
    """
    key, unreadable, newest = _stamped(paths, settings)
    # Some file systems count whole seconds, or two; others as often as the system's clock ticks.
    settled = (0.1 if newest % 10**9 else 2.0) - (time.time() - newest / 1e9)
    if 0 < settled <= 2.0:
        time.sleep(settled)
        key, unreadable, _ = _stamped(paths, settings)
    return key, unreadable


def _stamped(paths: Sequence[ImagePath], settings: str) -> tuple[str, dict[ImagePath, str], int]:
    """The key and the reasons of ``_key``, and the time in nanoseconds at which the last of the files changed."""
    key, newest = hashlib.blake2b(f"{settings}\n".encode(), digest_size=32), 0
    unreadable = {}
    for path in paths:
        try:
            told, changed = stamp(path)
            newest = max(newest, changed)
        except ImageReadError as error:
            unreadable[path] = str(error)
            told = f"cannot be read: {error}"
        key.update(f"{told}\n".encode(errors="surrogateescape"))
    return key.hexdigest(), unreadable, newest


def _load(
    entry: Path, paths: Sequence[ImagePath], read: Callable[[ImagePath], Pixels], max_bytes: int
) -> tuple[StoredPixels, list[SetAside]] | None:
    """Load the entry, mark it as used now, and remove others to keep within ``max_bytes``.

    Return None where the entry is missing or damaged, is larger than ``max_bytes``, or lacks images of which
    ``max_bytes`` now permits more.
    """
    try:
        index = json.loads((entry / INDEX).read_text(encoding="utf-8"))
        records, cached = index["images"], index["stored"]
        sizes = [3 * height * width for height, width in (record for record in records if not isinstance(record, str))]
        total = sum(sizes[:cached])
        intact = len(records) == len(paths) and index["bytes"] == total == (entry / PIXELS).stat().st_size
        more_would_fit = cached < len(sizes) and total + sizes[cached] <= max_bytes
    except (OSError, ValueError, TypeError, LookupError):
        return None
    if not intact or more_would_fit or total > max_bytes:
        return None
    with suppress(OSError):  # the cache may be readable but not writable
        os.utime(entry / INDEX)
        _make_room(entry, total, max_bytes)
    return _assemble(paths, records, read, entry, cached)


def _assemble(
    paths: Sequence[ImagePath],
    records: Sequence[_Record],
    read: Callable[[ImagePath], Pixels],
    folder: Path | None,
    cached: int,
) -> tuple[StoredPixels, list[SetAside]]:
    shapes = [record for record in records if not isinstance(record, str)]
    readable = paths
    set_aside: list[SetAside] = []
    if len(shapes) < len(paths):
        readable = chosen(paths, [index for index, record in enumerate(records) if not isinstance(record, str)])
        set_aside = [
            SetAside(display_path(path), record)
            for path, record in zip(paths, records, strict=True)
            if isinstance(record, str)
        ]
    file = None if folder is None else folder / PIXELS
    return StoredPixels(readable, shapes[:cached], file, read), set_aside


def _make_room(entry: Path, size: int, max_bytes: int) -> int:
    """Remove the least recently used of the other entries until ``size`` bytes fit. Return the number of free bytes.

    Raises OSError where the folder cannot be listed.
    """
    entries = []
    for path in entry.parent.iterdir():
        if path.name != entry.name and _is_entry(path):
            with suppress(OSError):  # another process has removed it meanwhile
                entries.append(((path / INDEX).stat().st_mtime_ns, path, (path / PIXELS).stat().st_size))
    free = max_bytes - sum(entry_size for _, _, entry_size in entries)
    for _, path, entry_size in sorted(entries):
        if size <= free:
            break
        with suppress(OSError):
            _remove_entry(path)
            free += entry_size
    return free


def _is_entry(path: Path) -> bool:
    return _ENTRY.fullmatch(path.name) is not None and not path.is_symlink() and (path / INDEX).is_file()


def _remove_entry(entry: Path) -> None:
    # Renamed first: if the removal is interrupted, _sweep finds the rest. A process that has it mapped can still read.
    doomed = _unfinished(entry.parent)
    entry.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _unfinished(folder: Path) -> Path:
    return folder / f"building-{secrets.token_hex(8)}"


def _sweep(folder: Path) -> None:
    """Remove unfinished entries that have not been written to for ``_DEAD_AFTER``: their processes were killed."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            with suppress(OSError):
                last_write = max(part.stat().st_mtime for part in (path, *path.iterdir()))
                if time.time() - last_write > _DEAD_AFTER:
                    shutil.rmtree(path, ignore_errors=True)


def _remove_own(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # the exit of a forked worker must not remove the folder
        shutil.rmtree(folder, ignore_errors=True)
