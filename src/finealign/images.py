"""Find, list and decode images; those that cannot be read are set aside with a reason, and the run goes on.

What a file is follows from its bytes, not its name. Every image comes out the same way: RGB, 8 bits, upright, first
frame, transparency on white. Embedded colour profiles are ignored.
"""

import csv
import io
import logging
import os
import re
import stat
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from finealign.errors import ImageInputError, OutputError
from finealign.paths import PathList
from finealign.shards import SUFFIX, ShardError, find_shard, member_size, open_member, read_shard
from finealign.storage import row_writer
from finealign.types import SetAside

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
MAX_PIXELS = 200_000_000
MAX_SIDE = 100_000  # a row of millions of pixels takes Pillow minutes, and as much again to bring to a square
MAX_SCANS = 100  # of one JPEG: each goes over the whole picture again
MAX_SHARDS = 100_000  # of one pattern

Pixels = NDArray[np.uint8]  # (H, W, 3)

_LISTED = frozenset(suffix.encode() for suffix in (*IMAGE_SUFFIXES, SUFFIX))  # in a folder
_SUFFIXES_SHOWN = ", ".join(sorted(IMAGE_SUFFIXES))
# Only these decoders ever see a file: Pillow's others start programs (EPS) or read formats no suffix above promises.
# Importing the plugins is what registers them in Image.OPEN; JPEG covers MPO too.
_FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        GifImagePlugin.GifImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
    )
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SCAN = b"\xff\xda"
_SEGMENT = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # a JPEG's marker that stands not alone, or its end
_T = TypeVar("_T")


class ImageReadError(ImageInputError):
    """One image cannot be read; the message is the bare reason, without the path."""


def display_path(path: str | Path) -> str:
    r"""The path as text that can be written as UTF-8: bytes of a file name that are not UTF-8 appear as ``\xNN``."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte, so it names no file
        return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def printable(text: str) -> str:
    """Characters that would move the cursor or turn the line around, as a file's name may hold, written out."""
    return "".join(one if one.isprintable() or one == " " else one.encode("unicode_escape").decode() for one in text)


def list_images(source: str | Path | Sequence[str | Path]) -> Sequence[Path]:
    """The images that ``source`` names; none is opened, so a path that is listed may still turn out unreadable.

    ``source`` is one of:

    - a folder: every image file below it, sorted by path relative to it. Names starting with a dot are skipped.
      Linked folders are followed, but no folder is listed twice, so loops end. A million files take about as much
      memory as their names;
    - an image file: itself;
    - a WebDataset shard, a ``.tar`` file: the images in it, in its order, each as the shard's path with its own name
      below. So are the shards in a folder listed, and those of a pattern with braces, as ``"{000..099}.tar"``;
    - a ``.txt`` file in UTF-8: one path a line; blank lines and lines starting with ``#`` are skipped;
    - a ``.csv`` file in UTF-8: the column ``path``; other columns are ignored;
    - a sequence of paths: as given.

    Relative paths in a list are relative to the folder of the list.

    Raises:
        ImageInputError: ``source`` does not exist, names no image, or is not one of the above.
    """
    paths: Sequence[Path]
    if not isinstance(source, str | Path):
        paths = [Path(path) for path in source]
        if not paths:
            raise ImageInputError("The list of images is empty. Give at least one path.")
        return paths

    path, shown = Path(source), f"'{display_path(source)}'"
    if "{" in path.name and path.suffix.lower() == SUFFIX and not path.exists():
        return _of_shards(_expand(path))
    try:
        mode = _stat(path).st_mode
    except ImageReadError as exc:
        raise ImageInputError(
            f"Cannot open {shown}: {exc}. Give a folder of images, an image, or a .txt or .csv list of images."
        ) from exc

    suffix = path.suffix.lower()
    if stat.S_ISDIR(mode):
        paths = _walk(path)
        if not paths:
            raise ImageInputError(
                f"No image in folder {shown}. Wanted at least one file ending in {_SUFFIXES_SHOWN}. Check the folder."
            )
    elif not stat.S_ISREG(mode):
        raise ImageInputError(f"{shown} is neither a folder nor a regular file. Give a folder, an image or a list.")
    elif suffix in IMAGE_SUFFIXES:
        paths = [path]
    elif suffix == SUFFIX:
        paths = _of_shards([path])
    elif suffix == ".txt":
        lines = (line.strip() for line in io.StringIO(_read_text(path), newline=None))
        paths = [path.parent / line for line in lines if line and not line.startswith("#")]
        if not paths:
            raise ImageInputError(f"{shown} lists no images. Write one path a line.")
    elif suffix == ".csv":
        paths = [path.parent / row["path"] for row in read_table(path, ["path"])]
        if not paths:
            raise ImageInputError(f"{shown} lists no images. Write one row an image below the header.")
    else:
        raise ImageInputError(
            f"Cannot tell what {shown} is from its suffix {suffix!r}. Wanted a folder, an image ({_SUFFIXES_SHOWN}), "
            "a .tar of images that is not compressed, or a .txt or .csv list of images. Rename the file, or list it "
            "in a .txt."
        )
    return paths


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a UTF-8, comma-separated file with a header: the wanted ``columns`` of each, stripped, no others.

    Raises:
        ImageInputError: the file cannot be read as such a table, a wanted column is missing or named twice, or a row
            has no value in one; the message gives the line.
    """
    shown = f"'{display_path(path)}'"
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows: list[dict[str, str]] = []
    last_line = 0
    try:
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        for column in columns:
            if header.count(column) != 1:
                raise ImageInputError(
                    f"{shown} has {header.count(column)} columns named {column!r}, wanted one; its header is "
                    f"{','.join(header)!r:.200}. Start the file with a header line, its columns separated by commas."
                )
        last_line = 1
        for row in reader:
            last_line = reader.reader.line_num  # DictReader's own count is late after blank lines
            where = f"{shown}, line {last_line}"
            if None in row:
                raise ImageInputError(
                    f"{where}: more values than the {len(header)} columns of the header. Quote values with commas."
                )
            # A short row holds None where values are missing.
            wanted = {column: (row[column] or "").strip() for column in columns}
            for column, value in wanted.items():
                if not value:
                    raise ImageInputError(f"{where}: no value for {column!r}. Fill it in or delete the line.")
            rows.append(wanted)
    except csv.Error as exc:
        raise ImageInputError(f"{shown}, line {last_line + 1}: {exc}. Check the quotes there.") from exc
    return rows


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image at ``path``: RGB, 8 bits a channel, upright by its EXIF, first frame, transparency on white.

    16-bit greyscale keeps its high byte; floats in [0, 1] are scaled by 255; other floats and integers beyond 16 bits
    are stretched from their own least value to their greatest. The result carries no metadata, so nothing downstream
    can rotate it again.

    Raises:
        ImageReadError: the file is not a whole image of at most ``max_pixels``, and ``MAX_SIDE`` a side, or is a JPEG
            of more than ``MAX_SCANS`` scans; the message is the reason alone.
    """
    with open_regular(path) as file:
        return decode_image(file, max_pixels=max_pixels)


def decode_image(
    file: BinaryIO, *, max_pixels: int = MAX_PIXELS, before: Callable[[int], None] = lambda pixels: None
) -> Image.Image:
    """The image in an open file that can be sought in, as ``read_image`` gives it. Raises ImageReadError as it does.

    ``before`` is called with the number of pixels before they are decoded.
    """
    with _quiet_pillow:
        try:
            image = _identify(file)
            width, height = image.size
            if width * height > max_pixels:
                raise ImageReadError(f"{width} x {height} pixels, over the limit of {max_pixels:,}")
            if max(width, height) > MAX_SIDE:
                raise ImageReadError(f"{width} x {height} pixels, over the limit of {MAX_SIDE:,} a side")
            if image.format in ("JPEG", "MPO"):
                _refuse_scans(file)
            before(width * height)
            image.load()
            return _to_rgb(_upright(image))
        except ImageReadError:
            raise
        except Exception as exc:  # damaged files make Pillow raise nearly anything, and one file must not end a run
            raise ImageReadError(reason_of(exc)) from exc


def read_pixels(path: Path, *, shorter_side: int, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The image as ``read_image`` gives it, as an array of its own that may be written to: (H, W, 3) uint8.

    If its shorter side exceeds ``shorter_side`` it is reduced to that, keeping the aspect ratio; it is never enlarged.

    Raises:
        ImageReadError: as ``read_image``.
    """
    image = read_image(path, max_pixels=max_pixels)
    if min(image.size) > shorter_side:
        scale = shorter_side / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.array(image)  # a copy, since torch warns of arrays it may not write to


def in_order(
    read: Callable[[Path], _T], paths: Iterable[Path], *, threads: int | None = None, held: int | None = None
) -> Generator[tuple[Path, _T | SetAside], None, None]:
    """Each path with what ``read`` makes of it, or with why it is set aside, in the order given.

    Reads ahead on ``threads`` threads (default: one a core, at most 8) and holds at most ``held`` results (default:
    two a thread). To be closed by who stops early, else the threads go on.

    Raises:
        Exception: what ``read`` raises other than ImageReadError, which sets aside.
    """

    def attempt(path: Path) -> _T | SetAside:
        try:
            return read(path)
        except ImageReadError as exc:
            return SetAside(display_path(path), str(exc))

    threads = min(8, os.cpu_count() or 1) if threads is None else threads
    held = 2 * threads if held is None else held
    pending: deque[tuple[Path, Future[_T | SetAside]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for path in paths:
                pending.append((path, pool.submit(attempt, path)))
                if len(pending) >= held:
                    first, future = pending.popleft()
                    yield first, future.result()
            while pending:
                first, future = pending.popleft()
                yield first, future.result()
        finally:  # the reader may stop early
            for _, future in pending:
                future.cancel()


def open_regular(path: Path) -> io.BufferedReader:
    """The file at ``path``, open for reading bytes.

    Raises:
        ImageReadError: it cannot be opened, is not a regular file, or is empty; the message is the reason alone.
    """
    shard = find_shard(path)
    if shard is not None:
        try:
            return open_member(shard, path)
        except ShardError as exc:
            raise ImageReadError(str(exc)) from exc
        except OSError as exc:
            raise ImageReadError(reason_of(exc)) from exc
    # Asked before opening: to open a pipe or a device can wait for ever.
    status = _stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ImageReadError("not a regular file")
    if status.st_size == 0:
        raise ImageReadError("empty file")
    try:
        if path.suffix.lower() == SUFFIX and (damage := read_shard(path).damage):
            raise ImageReadError(damage)
        return path.open("rb")
    except OSError as exc:
        raise ImageReadError(reason_of(exc)) from exc


def file_size(path: Path) -> int:
    """Bytes of the file or the member of a shard; -1 where it cannot be told, as it will be set aside when read."""
    try:
        shard = find_shard(path)
        return path.stat().st_size if shard is None else member_size(shard, path)
    except (OSError, ValueError):
        return -1


def reason_of(exc: Exception) -> str:
    """Why a file cannot be read or written, in a few plain words, by what reading or writing it raised."""
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
    if "MAX_TEXT_" in str(exc):
        return "a text or colour profile in it is larger than Pillow allows"
    return "truncated file" if "truncated" in str(exc).lower() else "damaged or truncated file"


def set_aside_csv(rows: Sequence[SetAside], path: Path) -> None:
    """Write ``rows`` to ``path`` as CSV in UTF-8, with columns path and reason; an existing file is replaced.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    try:
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            write = row_writer(file)
            write(["path", "reason"])
            for row in rows:
                write([row.path, row.reason])
    except OSError as exc:
        raise OutputError(
            f"Cannot write '{display_path(path)}': {reason_of(exc)}. Choose an output folder that can be written."
        ) from exc


def _of_shards(shards: Sequence[Path]) -> PathList:
    paths = PathList(_with_members(os.fsencode(shard) for shard in shards))
    if not paths:
        shown = ", ".join(f"'{display_path(shard)}'" for shard in shards[:3])
        raise ImageInputError(f"No image in {shown}. Wanted at least one file ending in {_SUFFIXES_SHOWN} in a shard.")
    return paths


def _expand(pattern: Path) -> list[Path]:
    """The shards that a pattern with braces stands for, by the rules of a shell. Raises ImageInputError."""
    from braceexpand import braceexpand

    ranges = re.findall(
        r"\{(-?\d{1,18})\.\.(-?\d{1,18})", str(pattern)
    )  # each is written out before the first is given
    try:
        few = all(abs(int(last) - int(first)) < MAX_SHARDS for first, last in ranges)
        shards = [Path(name) for name in islice(braceexpand(str(pattern)), MAX_SHARDS + 1)] if few else []
    except ValueError as exc:  # its UnbalancedBracesError
        raise ImageInputError(f"'{display_path(pattern)}': {exc}. Wanted: a pattern as '{{000..099}}.tar'.") from None
    if not few or len(shards) > MAX_SHARDS:
        raise ImageInputError(
            f"'{display_path(pattern)}' stands for more than {MAX_SHARDS:,} shards. Write a closer one."
        )
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise ImageInputError(
            f"'{display_path(pattern)}' stands for {len(shards)} shards, of which {len(missing)} are not there, the "
            f"first '{display_path(missing[0])}'. Write a closer pattern, or add what is missing."
        )
    return shards


def _walk(root: Path) -> PathList:
    def refuse(error: OSError) -> NoReturn:
        raise ImageInputError(
            f"Cannot list folder '{display_path(os.fsdecode(error.filename))}': {reason_of(error)}. "
            "Make it readable, or move it out of the images."
        ) from error

    start = os.fsencode(root / "_")[:-1]
    found: list[bytes] = []  # below ``root``
    visited: set[tuple[int, int]] = set()
    waiting = [b""]
    while waiting:
        folder = waiting.pop()
        below: list[tuple[bool, bytes]] = []
        try:
            status = os.stat(start + folder or b".")
            identity = (status.st_dev, status.st_ino)
            if identity in visited:
                continue
            visited.add(identity)
            with os.scandir(start + folder or b".") as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    if _leads_to_folder(entry):
                        below.append((entry.is_symlink(), folder + entry.name + b"/"))
                    elif os.path.splitext(entry.name)[1].lower() in _LISTED:
                        found.append(folder + entry.name)
        except OSError as error:
            refuse(error)
        # Real folders before linked ones, so that a folder met both ways is listed under its own name.
        waiting += [name for _, name in sorted(below, reverse=True)]
    found.sort()
    return PathList(_with_members(start + name for name in found))


def _leads_to_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _with_members(paths: Iterable[bytes]) -> Iterator[bytes | Path]:
    """The paths, each archive's image members in its place; an archive that is damaged stands behind them itself."""
    for path in paths:
        if not path.lower().endswith(SUFFIX.encode()):
            yield path
            continue
        try:
            shard = read_shard(Path(os.fsdecode(path)))
        except OSError:
            yield path
            continue
        yield from (member for member in shard.files() if member.suffix.lower() in IMAGE_SUFFIXES)
        if shard.damage:
            yield path


def _read_text(path: Path) -> str:
    shown = f"'{display_path(path)}'"
    try:
        with open_regular(path) as file:
            data = file.read()
    except (ImageReadError, OSError) as exc:
        reason = str(exc) if isinstance(exc, ImageReadError) else reason_of(exc)
        raise ImageInputError(f"Cannot read {shown}: {reason}. Give a list that can be read.") from exc
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise ImageInputError(f"{shown}, line {line}: not UTF-8 text. Save the file as UTF-8.") from exc


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except ValueError as exc:  # a null byte, or characters the file system cannot encode
        raise ImageReadError("not a usable file name") from exc
    except OSError as exc:
        raise ImageReadError(reason_of(exc)) from exc


def _identify(file: BinaryIO) -> ImageFile.ImageFile:
    # Image.open would refuse large images by a global limit of its own, before their size can be told.
    prefix = file.read(16)
    for name in _FORMATS:
        factory, accepts = Image.OPEN[name]
        # A decoder missing from this build of Pillow answers with a sentence, which is not True.
        if accepts is not None and accepts(prefix) is True:
            file.seek(0)
            return factory(file, "")
    raise ImageReadError("not an image")


def _refuse_scans(file: BinaryIO) -> None:
    file.seek(0)
    data = file.read()
    # The bytes of a scan's marker may also stand in a thumbnail or a further picture, so a high count is looked into.
    if data.count(_SCAN) > MAX_SCANS and _scans(data) > MAX_SCANS:
        raise ImageReadError(f"a JPEG of more than {MAX_SCANS} scans")


def _scans(data: bytes) -> int:
    """Scans of a JPEG's first picture, counted up to one more than there may be."""
    at, scans = 2, 0
    while scans <= MAX_SCANS and (found := _SEGMENT.search(data, at)) and found[1] != b"\xd9":
        scans += found[0] == _SCAN
        at = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
    return scans


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also rewrites the EXIF, and fails on images whose orientation is sound.
    try:
        method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken EXIF says nothing of the pixels
        return image
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_grey(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def _to_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode == "I" and tags and tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)) == (1,):
        values = values.view(np.uint32)  # Pillow takes them for signed
    if not np.isfinite(values).all():
        raise ImageReadError("pixel values that are not finite")
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high <= 0xFFFF:
        grey = (values >> 8).astype(np.uint8)
    else:
        if image.mode == "F" and low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        scaled = (values.astype(np.float64) - low) * (255 / (high - low or 1))
        grey = scaled.round().astype(np.uint8)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is 0, which Pillow minds in 8 bits alone
        grey = 255 - grey
    if isinstance(key := image.info.get("transparency"), int):
        grey[values == key] = 255
    return Image.fromarray(grey)


class _QuietPillow:
    """While any thread is inside, Pillow's warnings are ignored and its log is not printed for want of a handler.

    Not warnings.catch_warnings: it puts back the filters it found, and threads leaving in another order than they
    came would leave it in force for good, or undo what another thread has set.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._handler = logging.NullHandler()
        self._filter = ("ignore", None, Warning, re.compile(r"PIL\.\w+$"), 0)

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                warnings.filters.insert(0, self._filter)  # type: ignore[attr-defined]
                logging.getLogger("PIL").addHandler(self._handler)

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                with suppress(ValueError):  # a catch_warnings elsewhere may have swapped the list meanwhile
                    warnings.filters.remove(self._filter)  # type: ignore[attr-defined]
                logging.getLogger("PIL").removeHandler(self._handler)


_quiet_pillow = _QuietPillow()
