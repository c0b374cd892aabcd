"""Decode images. A file that cannot be decoded raises an error with the reason, so that a run can set it aside.

The format is recognised by a file's bytes, not by its name. Every image is converted to the same form: RGB, 8 bits per
channel, upright, first frame only, transparency composited on white. Embedded colour profiles are ignored.
"""

import io
import logging
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from finealign.images.channels import (
    UnsupportedImageError,
    White,
    deep_tiff,
    heif_decoder,
    is_read_by_pillow,
    lies_on_its_side,
    refusal_of,
    rgb_of,
)
from finealign.images.files import ImageReadError, TooManyPixelsError, open_regular, reason_of
from finealign.images.formats import HEAD, format_of, why_refused
from finealign.images.repairs import ended, without_text
from finealign.types import ImagePath

MAX_PIXELS = 200_000_000
MAX_SIDE = 100_000  # Pillow takes minutes to decode rows of millions of pixels, and minutes again to resize them
MAX_SCANS = 100  # of one JPEG: the decoder goes over the whole image again for each
# How many times as large as it is needed a JPEG is decoded at least. Its decoder halves sides at next to no cost, but
# less well than the resizing that follows, whose result then hardly depends on it.
LARGER = 2
FULL_SIZE = "full_size"  # key of an image's ``info``: (width, height) that it would have had, if it was decoded smaller

Pixels = NDArray[np.uint8]  # (H, W, 3)
_DECODERS: dict[str, Callable[..., ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.jpeg_factory,  # MPO too
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "JPEG2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
}
_SCAN = b"\xff\xda"  # a JPEG's marker for the start of a scan
_SEGMENT = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # a JPEG's marker that has a length behind it, or its end


def read_image(
    path: ImagePath, *, max_pixels: int = MAX_PIXELS, white_value: White = "auto", shorter_side: int | None = None
) -> Image.Image:
    """Read the image at ``path``: RGB, 8 bits per channel, upright by its EXIF, first frame, transparency on white.

    More than 8 bits per channel are scaled by ``eight_bits``: ``white_value`` becomes 255. With "auto", 16 bits of
    which an image fills only the lowest 10, 12 or 14 keep the highest 8 of those. The result carries no metadata, so
    that no later step can rotate it again.

    With ``shorter_side`` an image may be decoded smaller than it is, but to at least LARGER times that, which
    ``to_photo`` reduces; its full size is then in its ``info``.

    Raises:
        ImageReadError: the file is not a complete image, is of a kind that is not supported, has more than
            ``max_pixels`` pixels or more than ``MAX_SIDE`` on a side, or is a JPEG of more than ``MAX_SCANS`` scans.
            The message is the reason alone.
    """
    with open_regular(path) as file:
        return decode_image(file, max_pixels=max_pixels, white_value=white_value, shorter_side=shorter_side)


def decode_image(
    file: BinaryIO,
    *,
    max_pixels: int = MAX_PIXELS,
    white_value: White = "auto",
    shorter_side: int | None = None,
    before: Callable[[int], None] = lambda pixels: None,
) -> Image.Image:
    """Decode the image in an open, seekable file as ``read_image`` does. Raises ImageReadError as it does.

    ``before`` is called with the image's number of pixels before they are decoded.
    """

    def decode(data: BinaryIO) -> Image.Image:
        return _decode(data, max_pixels, white_value, shorter_side, before)

    with _quiet_pillow:
        try:
            try:
                return decode(file)
            except (OSError, ValueError) as error:
                repaired = _repaired(file, error, decode)
                if repaired is None:
                    raise
                return repaired
        except ImageReadError:
            raise
        except UnsupportedImageError as exc:
            raise ImageReadError(str(exc)) from None
        except Exception as exc:  # damaged files make Pillow raise nearly anything, and one file must not end a run
            raise ImageReadError(_unsupported_tiff(file) or reason_of(exc)) from exc


def _decode(
    file: BinaryIO, max_pixels: int, white: White, shorter_side: int | None, before: Callable[[int], None]
) -> Image.Image:
    file.seek(0)
    name = format_of(file.read(HEAD))
    decoder = _decoder(name)
    if decoder is None:
        raise ImageReadError(why_refused(name))
    deep = deep_tiff(file) if name == "TIFF" else None
    file.seek(0)
    # Not Image.open: it refuses large images by a global limit of its own, before their size is known.
    image = deep or decoder(file, "")
    width, height = image.size
    if width * height > max_pixels:
        raise TooManyPixelsError(f"{width} x {height} pixels, over the limit of {max_pixels:,}")
    if max(width, height) > MAX_SIDE:
        raise ImageReadError(f"{width} x {height} pixels, over the limit of {MAX_SIDE:,} a side")
    if name == "JPEG":
        _refuse_scans(file)
    if name == "JPEG2000":
        _refuse_unended(file)
    before(width * height)
    if not isinstance(image, ImageFile.ImageFile):
        return image.rgb(white)
    if name == "JPEG" and shorter_side is not None:
        image.draft(None, (LARGER * shorter_side, LARGER * shorter_side))  # None: colours as they are
    rgb = rgb_of(image, file, white)
    if image.size != (width, height):
        rgb.info[FULL_SIZE] = (height, width) if lies_on_its_side(image) else (width, height)
    return rgb


def _decoder(name: str | None) -> Callable[..., ImageFile.ImageFile] | None:
    return heif_decoder() if name == "HEIF" else _DECODERS.get(name or "")


def _unsupported_tiff(file: BinaryIO) -> str:
    """What kind of TIFF it is where Pillow has no decoder for its kind, whole or not; empty for any other file."""
    try:
        file.seek(0)
        head = file.read(8)
        if format_of(head) != "TIFF":
            return ""
        tags: Any = TiffImagePlugin.ImageFileDirectory_v2(head + (file.read(8) if 43 in head[2:4] else b""))
        file.seek(tags.next)
        tags.load(file)
        size_is_told = tags[TiffImagePlugin.IMAGEWIDTH] > 0 and tags[TiffImagePlugin.IMAGELENGTH] > 0
        return "" if not size_is_told or is_read_by_pillow(tags) else refusal_of(tags)
    except Exception:  # it is damaged rather
        return ""


def heif_version() -> str:
    """The version of pillow-heif, or "none": an image that cannot be read without it can be with it."""
    try:
        return version("pillow-heif")
    except PackageNotFoundError:
        return "none"


def _repaired(file: BinaryIO, error: Exception, decode: Callable[[BinaryIO], Image.Image]) -> Image.Image | None:
    """The image where it is whole but for what viewers do not mind: large texts in a PNG, a JPEG without its end."""
    if isinstance(error, ImageReadError | UnsupportedImageError):
        return None
    file.seek(0)
    name = format_of(file.read(HEAD))
    if name == "PNG" and "MAX_TEXT_" in str(error):  # part of the names of Pillow's limits
        file.seek(0)
        return decode(io.BytesIO(without_text(file.read())))
    if name == "JPEG" and "truncated" in str(error):
        file.seek(0)
        images = [decode(io.BytesIO(data)) for data in ended(file.read())]
        if images and all(image.tobytes() == images[0].tobytes() for image in images[1:]):
            return images[0]
    return None


@dataclass(frozen=True, eq=False)
class Photo:
    """The pixels of an image as models are given them, and the size of the original image."""

    pixels: Pixels  # (H, W, 3) uint8, reduced to the working size; writable
    width: int  # of the original image in pixels, after its EXIF rotation
    height: int


def read_photo(
    path: ImagePath, *, shorter_side: int | None, max_pixels: int = MAX_PIXELS, white_value: White = "auto"
) -> Photo:
    """Read the image at ``path`` with ``read_image`` and convert it with ``to_photo``.

    Raises ImageReadError as ``read_image`` does.
    """
    image = read_image(path, max_pixels=max_pixels, white_value=white_value, shorter_side=shorter_side)
    return to_photo(image, shorter_side=shorter_side)


def to_photo(image: Image.Image, *, shorter_side: int | None) -> Photo:
    """Convert an RGB image to the form that models are given, in training and in prediction.

    An image whose shorter side exceeds ``shorter_side`` pixels is reduced to that, keeping its aspect ratio. Images are
    never enlarged. With None the size is not changed.
    """
    width, height = image.info.get(FULL_SIZE, image.size)
    if shorter_side is not None and min(width, height) > shorter_side:
        scale = shorter_side / min(width, height)
        reduced = (round(width * scale), round(height * scale))
        image = image.resize(reduced, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return Photo(np.array(image), width, height)  # a copy, because torch warns about read-only arrays


def read_pixels(
    path: ImagePath, *, shorter_side: int, max_pixels: int = MAX_PIXELS, white_value: White = "auto"
) -> Pixels:
    """Return only the pixels of ``read_photo``: (H, W, 3) uint8. Raises ImageReadError as ``read_image`` does."""
    return read_photo(path, shorter_side=shorter_side, max_pixels=max_pixels, white_value=white_value).pixels


def _refuse_scans(file: BinaryIO) -> None:
    file.seek(0)
    data = file.read()
    # The marker's bytes also occur in thumbnails and further pictures, so a high count is checked by parsing the file.
    if data.count(_SCAN) > MAX_SCANS and _scans(data) > MAX_SCANS:
        raise ImageReadError(f"a JPEG of more than {MAX_SCANS} scans")


def _refuse_unended(file: BinaryIO) -> None:
    """Refuse a JPEG 2000 without the mark that ends its data, which its decoder does not always miss."""
    file.seek(0)
    if b"\xff\xd9" not in file.read():
        raise ImageReadError("truncated file")


def _scans(data: bytes) -> int:
    """Count the scans of a JPEG's first picture, stopping at one more than MAX_SCANS."""
    position, scans = 2, 0
    while scans <= MAX_SCANS and (marker := _SEGMENT.search(data, position)) and marker[1] != b"\xd9":
        scans += marker[0] == _SCAN
        position = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    return scans


class _QuietPillow:
    """A context manager that silences Pillow's warnings and log messages while any thread is inside it.

    Without a handler of its own, Pillow's logger would print to standard error. warnings.catch_warnings does not work
    here: it restores the filters it saw on entry, so threads that leave in another order than they entered would make
    the filter permanent, or undo a filter that another thread has set.
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
                with suppress(ValueError):  # a catch_warnings elsewhere may have replaced the list meanwhile
                    warnings.filters.remove(self._filter)  # type: ignore[attr-defined]
                logging.getLogger("PIL").removeHandler(self._handler)


_quiet_pillow = _QuietPillow()
