"""Decode images. A file that cannot be decoded raises an error with the reason, so that a run can set it aside.

The format is recognised by a file's bytes, not by its name. Every image is converted to the same form: RGB, 8 bits per
channel, upright, first frame only, transparency composited on white. Embedded colour profiles are ignored.
"""

import logging
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

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

from finealign.images.files import ImageReadError, open_regular, reason_of

MAX_PIXELS = 200_000_000
MAX_SIDE = 100_000  # Pillow takes minutes to decode rows of millions of pixels, and minutes again to resize them
MAX_SCANS = 100  # of one JPEG: the decoder goes over the whole image again for each

Pixels = NDArray[np.uint8]  # (H, W, 3)
# No other decoder is given a file: others of Pillow's start external programs (EPS), or read formats whose suffixes are
# not listed as images. Importing the plugins registers them in Image.OPEN; JPEG covers MPO too.
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
_UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SCAN = b"\xff\xda"  # a JPEG's marker for the start of a scan
_SEGMENT = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")  # a JPEG's marker that has a length behind it, or its end


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the image at ``path``: RGB, 8 bits per channel, upright by its EXIF, first frame, transparency on white.

    16-bit greyscale keeps its high byte. Floats in [0, 1] are scaled by 255. Other floats, and integers beyond 16 bits,
    are scaled so that the image's own minimum becomes 0 and its maximum 255. The result carries no metadata, so that no
    later step can rotate it again.

    Raises:
        ImageReadError: the file is not a complete image, has more than ``max_pixels`` pixels or more than ``MAX_SIDE``
            on a side, or is a JPEG of more than ``MAX_SCANS`` scans. The message is the reason alone.
    """
    with open_regular(path) as file:
        return decode_image(file, max_pixels=max_pixels)


def decode_image(
    file: BinaryIO, *, max_pixels: int = MAX_PIXELS, before: Callable[[int], None] = lambda pixels: None
) -> Image.Image:
    """Decode the image in an open, seekable file as ``read_image`` does. Raises ImageReadError as it does.

    ``before`` is called with the image's number of pixels before they are decoded.
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


@dataclass(frozen=True, eq=False)
class Photo:
    """The pixels of an image as models are given them, and the size of the original image."""

    pixels: Pixels  # (H, W, 3) uint8, reduced to the working size; writable
    width: int  # of the original image in pixels, after its EXIF rotation
    height: int


def read_photo(path: Path, *, shorter_side: int | None, max_pixels: int = MAX_PIXELS) -> Photo:
    """Read the image at ``path`` with ``read_image`` and convert it with ``to_photo``.

    Raises ImageReadError as ``read_image`` does.
    """
    return to_photo(read_image(path, max_pixels=max_pixels), shorter_side=shorter_side)


def to_photo(image: Image.Image, *, shorter_side: int | None) -> Photo:
    """Convert an RGB image to the form that models are given, in training and in prediction.

    An image whose shorter side exceeds ``shorter_side`` pixels is reduced to that, keeping its aspect ratio. Images are
    never enlarged. With None the size is not changed.
    """
    width, height = image.size
    if shorter_side is not None and min(image.size) > shorter_side:
        scale = shorter_side / min(image.size)
        reduced = (round(width * scale), round(height * scale))
        image = image.resize(reduced, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return Photo(np.array(image), width, height)  # a copy, because torch warns about read-only arrays


def read_pixels(path: Path, *, shorter_side: int, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return only the pixels of ``read_photo``: (H, W, 3) uint8. Raises ImageReadError as ``read_image`` does."""
    return read_photo(path, shorter_side=shorter_side, max_pixels=max_pixels).pixels


def _identify(file: BinaryIO) -> ImageFile.ImageFile:
    # Not Image.open: it refuses large images by a global limit of its own, before their size is known.
    prefix = file.read(16)
    for name in _FORMATS:
        factory, accepts = Image.OPEN[name]
        # A decoder that this build of Pillow lacks returns a message, which is truthy but not True.
        if accepts is not None and accepts(prefix) is True:
            file.seek(0)
            return factory(file, "")
    raise ImageReadError("not an image")


def _refuse_scans(file: BinaryIO) -> None:
    file.seek(0)
    data = file.read()
    # The marker's bytes also occur in thumbnails and further pictures, so a high count is checked by parsing the file.
    if data.count(_SCAN) > MAX_SCANS and _scans(data) > MAX_SCANS:
        raise ImageReadError(f"a JPEG of more than {MAX_SCANS} scans")


def _scans(data: bytes) -> int:
    """Count the scans of a JPEG's first picture, stopping at one more than MAX_SCANS."""
    position, scans = 2, 0
    while scans <= MAX_SCANS and (marker := _SEGMENT.search(data, position)) and marker[1] != b"\xd9":
        scans += marker[0] == _SCAN
        position = marker.end() + max(2, int.from_bytes(data[marker.end() : marker.end() + 2], "big"))
    return scans


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also rewrites the EXIF, which fails for some images whose orientation is valid.
    try:
        method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the pixels can be intact where the EXIF is broken
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
    """Scale 16-bit, 32-bit and float greyscale to 8 bits as ``read_image`` describes."""
    values = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode == "I" and tags and tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)) == (1,):
        values = values.view(np.uint32)  # Pillow reads unsigned values as signed
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
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white, which Pillow heeds only for 8 bits
        grey = 255 - grey
    if isinstance(key := image.info.get("transparency"), int):
        grey[values == key] = 255
    return Image.fromarray(grey)


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
