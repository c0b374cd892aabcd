"""Open image files, on their own, in a shard or in a collection, after checking that they can be read.

Where one cannot be read, the reason is given.
"""

import hashlib
import os
import re
import stat
from functools import partial
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from finealign.errors import ImageInputError, one_line
from finealign.images.shards import SUFFIX, ShardError, find_shard, member_size, open_member, read_shard
from finealign.types import HeldImage, ImagePath

# In Pillow's messages about files that may be whole.
_UNSUPPORTED = re.compile(r"unsupported|not supported|not available|cannot handle|unable to use", re.IGNORECASE)


class ImageReadError(ImageInputError):
    """One image cannot be read. The message is the reason alone, without the path."""


class TooManyPixelsError(ImageReadError):
    """The image has more pixels than it may have here."""


def open_regular(path: ImagePath) -> BinaryIO:
    """Open the file, the shard member or the held image at ``path`` for reading bytes.

    Raises:
        ImageReadError: it cannot be opened, is not a regular file, is empty, or is a damaged shard. The message is the
            reason alone.
    """
    if isinstance(path, HeldImage):
        return path.collection.open(path.index)
    shard = find_shard(path)
    if shard is not None:
        try:
            return open_member(shard, path)
        except ShardError as exc:
            raise ImageReadError(str(exc)) from exc
        except OSError as exc:
            raise ImageReadError(reason_of(exc)) from exc
    # Checked before opening, because opening a pipe or a device can block for ever.
    status = stat_of(path)
    if not stat.S_ISREG(status.st_mode):
        raise ImageReadError("not a regular file")
    if status.st_size == 0:
        raise ImageReadError("empty file")
    try:
        # A damaged shard is itself listed as an image, so that its damage is reported like that of an image.
        if path.suffix.lower() == SUFFIX and (damage := read_shard(path).damage):
            raise ImageReadError(damage)
        return path.open("rb")
    except OSError as exc:
        raise ImageReadError(reason_of(exc)) from exc


def fingerprint(path: ImagePath) -> int | str:
    """What tells whether an image is still the same: a file's or a shard member's size in bytes, a held image's
    checksum; -1 where it is unknown, and reading will set the image aside.
    """
    if isinstance(path, HeldImage):
        try:
            return checksum(path)
        except ImageReadError:
            return -1
    try:
        shard = find_shard(path)
        return path.stat().st_size if shard is None else member_size(shard, path)
    except (OSError, ValueError):
        return -1


def stamp(path: ImagePath) -> tuple[str, int]:
    """What tells that an image's bytes are still the same, without reading them; and when they or it last changed.

    Of a file it is the file's number, size and times; of a member of an archive, those of the archive. One of the times
    is the system's own, which a change of the bytes moves on whatever else is put back. The second value is the later
    time in nanoseconds. A held image has no times, so its bytes are hashed, and the second value is 0.

    Raises ImageReadError where it is certain that the image cannot be read.
    """
    if isinstance(path, HeldImage):
        return checksum(path), 0
    shard = find_shard(path)
    file = path if shard is None else shard
    status = stat_of(file)
    if not stat.S_ISREG(status.st_mode):
        raise ImageReadError("not a regular file")
    if status.st_size == 0:
        raise ImageReadError("empty file")
    if not os.access(file, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ImageReadError("permission denied")
    member = "" if shard is None else path.relative_to(shard)
    told = f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {member}"
    return told, max(status.st_mtime_ns, status.st_ctime_ns)


def checksum(path: ImagePath) -> str:
    """A hash of the bytes at ``path``. Raises ImageReadError."""
    with open_regular(path) as file:
        try:
            return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=32)).hexdigest()  # type: ignore[arg-type]
        except OSError as error:
            raise ImageReadError(reason_of(error)) from error


def reason_of(exc: Exception) -> str:
    """A short reason why a file cannot be read or written, from the exception that reading or writing it raised."""
    match exc:
        case FileNotFoundError():
            return "no such file"
        case PermissionError():
            return "permission denied"
        case MemoryError():
            return "not enough memory to decode it"
        case Image.DecompressionBombError():
            return "more pixels than Pillow allows"
        case OSError(strerror=str(text)):
            return text.lower()
    if "MAX_TEXT_" in str(exc):  # part of the names of Pillow's limits
        return "a text or colour profile in it is larger than Pillow allows"
    if _UNSUPPORTED.search(str(exc)):
        return f"of a kind that is not supported ({one_line(exc)}); save it as JPEG or PNG"
    return "truncated file" if "truncated" in str(exc).lower() else "damaged or truncated file"


def stat_of(path: Path) -> os.stat_result:
    """The status of the file at ``path``. Raises ImageReadError where there is none or it cannot be read."""
    try:
        return path.stat()
    except ValueError as exc:  # a null byte, or characters the file system cannot encode
        raise ImageReadError("not a usable file name") from exc
    except OSError as exc:
        raise ImageReadError(reason_of(exc)) from exc
