"""Images of more than 8 bits a channel, and transparent ones, as RGB of 8 bits a channel.

Pillow keeps the high byte of such colours, reads TIFFs that store them in planes as noise, and opens others not at all.
Exports carry a copy of this file, so that they read an image as finealign does: it imports numpy and Pillow alone,
and pillow-heif where that is installed.
"""

import io
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

White = float | Literal["auto"]  # the value that becomes 255
Alpha = Literal["none", "straight", "premultiplied"]

DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and sensors fill of the 16 that a file has
MOST_SAMPLES = 8  # channels of a TIFF that is read; thousands would fill the memory
LARGEST_TILE = 2**24  # pixels of one tile in a small image; a decoder holds the whole of it
COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32773: "PackBits", 32946: "deflate", 34925: "LZMA", 50000: "ZSTD"}
UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DTYPES = {  # by sample format and bits
    (1, 16): np.uint16,
    (2, 16): np.int16,
    (3, 16): np.float16,
    (1, 32): np.uint32,
    (2, 32): np.int32,
    (3, 32): np.float32,
    (3, 64): np.float64,
}
_HEIF_BRAND = re.compile(rb"hei[cxms]|hev[cxms]|mif1|msf1")
_PILLOWS_OWN = {(1, 16), (2, 16), (1, 32), (2, 32), (3, 32)}  # of one channel
_WIDE_PNG = {"RGB;16B": ("RGB", "RGB;16L"), "RGBA;16B": ("RGBA", "RGBA;16L"), "LA;16B": ("RGBA", "RGBA")}


class UnsupportedImageError(ValueError):
    """The image is whole, but of a kind that is not read. The message says of which kind."""


def eight_bits(values: NDArray[Any], white: White = "auto") -> NDArray[np.uint8]:
    """Scale values of any kind to 8 bits, all channels alike.

    With a number for ``white``, 0 becomes 0 and ``white`` and what is above it 255. With "auto", whole numbers of up to
    16 bits keep their highest 8 bits, of the fewest bits in ``DEPTHS`` that hold the largest value; floats in [0, 1]
    are multiplied by 255; of all others the smallest value becomes 0 and the largest 255.

    Raises UnsupportedImageError for values that are not finite.
    """
    floats = values.dtype.kind == "f"
    if floats and not np.isfinite(values).all():
        raise UnsupportedImageError("pixel values that are not finite")
    if white != "auto":
        return (values.astype(np.float64) * (255 / white)).round().clip(0, 255).astype(np.uint8)
    low, high = float(values.min()), float(values.max())
    if not floats and low >= 0 and high <= 0xFFFF:
        depth = next(bits for bits in DEPTHS if high < 2**bits)
        return (values >> (depth - 8)).astype(np.uint8)
    if floats and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (values.astype(np.float64) - low) * (255 / (high - low or 1))
    return scaled.round().astype(np.uint8)


@cache
def heif_decoder() -> Callable[..., ImageFile.ImageFile] | None:
    """pillow-heif's decoder; None where the package is not installed."""
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        return None
    decoder: Callable[..., ImageFile.ImageFile] = HeifImageFile
    return decoder


def opened(file: BinaryIO) -> ImageFile.ImageFile:
    """The image in an open file, by its bytes, as exports open it: what Pillow reads, and HEIC.

    Raises UnsupportedImageError for a HEIC image where its package is missing, and what Pillow raises.
    """
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        head = file.read(64)
        file.seek(0)
        if head[4:8] != b"ftyp" or not _HEIF_BRAND.search(head, 8):
            raise
    decoder = heif_decoder()
    if decoder is None:
        raise UnsupportedImageError("a HEIC image, for which a package is missing: pip install pillow-heif")
    return decoder(file, "")


def rgb_of(image: ImageFile.ImageFile, file: BinaryIO, white: White = "auto") -> Image.Image:
    """The opened image as RGB of 8 bits: upright by its EXIF, transparency on white. It carries no metadata.

    ``file`` is the open file that the image is read from. Raises UnsupportedImageError, and what Pillow raises.
    """
    channels = _wide_png(image, file)
    if channels is not None:
        key = image.info.get("transparency")
        transparent = (channels == np.array(key)).all(-1) if isinstance(key, tuple) else None
        rgb = _from_channels(channels, white, alpha="straight" if channels.shape[2] in (2, 4) else "none")
        if transparent is not None:
            rgb.paste("white", mask=Image.fromarray(transparent))
    else:
        image.load()
        rgb = _from_pillow(image, white)
    rgb.info = {}
    turn = UPRIGHT.get(orientation(image))  # not before it is loaded: Pillow turns TIFFs by itself
    return rgb if turn is None else rgb.transpose(turn)


def lies_on_its_side(image: Image.Image) -> bool:
    """Whether an opened image is upright by its EXIF after a turn that exchanges width and height."""
    return orientation(image) in (5, 6, 7, 8)


def orientation(image: Image.Image) -> Any:
    """The EXIF orientation of an image, a key of ``UPRIGHT``, or 1."""
    # Not ImageOps.exif_transpose: it also rewrites the EXIF, which fails for some images whose orientation is valid.
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the pixels can be intact where the EXIF is broken
        return 1


def _from_pillow(image: Image.Image, white: White) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_grey(image, white)
    return _on_white(image)


def _on_white(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _to_grey(image: Image.Image, white: White) -> Image.Image:
    """Scale 16-bit, 32-bit and float greyscale to 8 bits by ``eight_bits``."""
    values = np.asarray(image)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if image.mode == "I" and tags and tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)) == (1,):
        values = values.view(np.uint32)  # Pillow reads unsigned values as signed
    grey = eight_bits(values, white)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # 0 is white, which Pillow heeds only for 8 bits
        grey = 255 - grey
    if isinstance(key := image.info.get("transparency"), int):
        grey[values == key] = 255
    return Image.fromarray(grey)


def _from_channels(values: NDArray[Any], white: White, *, alpha: Alpha) -> Image.Image:
    """Grey or RGB channels (H, W, N) of any depth as RGB; the last one of them is the alpha, if there is one."""
    if alpha == "none":
        return Image.fromarray(_three(eight_bits(values, white)))
    colours, opacity = _three(eight_bits(values[..., :-1], white)), eight_bits(values[..., -1:])
    if alpha == "premultiplied":
        return Image.fromarray((colours + (255 - opacity.astype(np.int16))).clip(0, 255).astype(np.uint8))
    return _on_white(Image.fromarray(np.concatenate([colours, opacity], axis=-1)))


def _three(colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return colours if colours.shape[2] == 3 else colours.repeat(3, axis=2)


def _wide_png(image: ImageFile.ImageFile, file: BinaryIO) -> NDArray[Any] | None:
    """All 16 bits of a PNG's colours and alpha, (H, W, N); None where it is another image or 8 bits are all it has.

    Pillow keeps the high bytes. Read in the other byte order, the same data give it the low bytes.
    """
    if not isinstance(image, PngImagePlugin.PngImageFile) or not image.tile:
        return None
    args = image.tile[0].args
    rawmode = args[0] if isinstance(args, tuple) else args
    if rawmode not in _WIDE_PNG:
        return None
    mode, low_mode = _WIDE_PNG[rawmode]
    file.seek(0)
    second = PngImagePlugin.PngImageFile(file, "")
    second.tile = [tile._replace(args=low_mode) for tile in second.tile]
    second._mode = mode
    low = np.asarray(second).astype(np.uint16)
    if rawmode == "LA;16B":  # grey and alpha, two bytes each
        return low[..., 0::2] << 8 | low[..., 1::2]
    file.seek(0)
    high = np.asarray(PngImagePlugin.PngImageFile(file, "")).astype(np.uint16)
    return high << 8 | low


# --- TIFF -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeepTiff:
    """A TIFF whose channels Pillow cannot read or would cut to 8 bits, before they are read."""

    file: BinaryIO
    tags: Any
    size: tuple[int, int]  # width, height
    samples: int
    dtype: Any

    def rgb(self, white: White = "auto") -> Image.Image:
        """The image as ``rgb_of`` gives others. Raises UnsupportedImageError, and what Pillow raises."""
        photometric = self.tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1)
        values = self.channels()
        if photometric == 5:
            inks = eight_bits(values[..., :4], 0xFFFF if white == "auto" else white)
            rgb = Image.fromarray(inks, "CMYK").convert("RGB")
        else:
            colours = 3 if photometric == 2 else 1
            alpha = self._alpha(colours)
            rgb = _from_channels(values[..., : colours + (alpha != "none")], white, alpha=alpha)
            if photometric == 0:
                rgb = Image.fromarray(255 - np.asarray(rgb))
        rgb.info = {}
        turn = UPRIGHT.get(self.tags.get(ExifTags.Base.Orientation, 1))
        return rgb if turn is None else rgb.transpose(turn)

    def _alpha(self, colours: int) -> Alpha:
        if self.samples == colours:
            return "none"
        kinds = _numbers(self.tags.get(TiffImagePlugin.EXTRASAMPLES))
        if not kinds:
            return "straight" if self.samples == colours + 1 else "none"
        return {1: "premultiplied", 2: "straight"}.get(kinds[0], "none")  # type: ignore[return-value]

    def channels(self) -> NDArray[Any]:
        """All values, (H, W, N)."""
        if self.tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2:
            return np.concatenate([self._grey(plane, 1) for plane in range(self.samples)], axis=-1)
        return self._grey(0, self.samples)

    def _grey(self, plane: int, samples: int) -> NDArray[Any]:
        """Values of one plane, (H, W, samples): read by Pillow as one grey image with rows of 16-bit words."""
        (width, height), words = self.size, np.dtype(self.dtype).itemsize // 2
        with TiffImagePlugin.TiffImageFile(io.BytesIO(self._rewritten(plane, samples * words)), "") as image:
            found = np.asarray(image).astype(np.uint16).reshape(height, width, samples, words)
        unsigned: NDArray[Any] = np.zeros(found.shape[:3], f"u{2 * words}")
        for word in range(words):
            place = word if self.tags.prefix == b"II" else words - 1 - word
            unsigned |= found[..., word].astype(unsigned.dtype) << (16 * place)
        if self.tags.get(TiffImagePlugin.PREDICTOR, 1) == 2:
            across = self.tags.get(TiffImagePlugin.TILEWIDTH, width)
            parts = [unsigned[:, start : start + across] for start in range(0, width, across)]
            unsigned = np.concatenate([part.cumsum(axis=1, dtype=part.dtype) for part in parts], axis=1)
        return unsigned.view(self.dtype)

    def _rewritten(self, plane: int, words: int) -> bytes:
        """The file with a directory that calls one plane of it a grey image of 16 bits, ``words`` to each pixel."""
        tags, (width, height) = self.tags, self.size
        tiled = TiffImagePlugin.TILEOFFSETS in tags
        across = _number(tags[TiffImagePlugin.TILEWIDTH]) if tiled else width
        down = _number(tags[TiffImagePlugin.TILELENGTH] if tiled else tags.get(TiffImagePlugin.ROWSPERSTRIP, height))
        if across < 1 or down < 1 or (tiled and across * down > 4 * width * height + LARGEST_TILE):
            raise UnsupportedImageError(f"a TIFF in tiles of {across} x {down} pixels, which is not supported")
        places, lengths = (324, 325) if tiled else (273, 279)
        parts = -(-width // across) * -(-height // down)
        entries = {256: [width * words], 257: [height], 258: [16], 259: [tags.get(TiffImagePlugin.COMPRESSION, 1)]}
        entries |= {262: [1], 277: [1], 317: [1], 339: [1]}
        entries |= {322: [across * words], 323: [down]} if tiled else {278: [min(down, height)]}
        for tag in (places, lengths):
            found = _numbers(tags.get(tag))[plane * parts : (plane + 1) * parts]
            if len(found) == parts:
                entries[tag] = list(found)
            elif tag == places:
                raise OSError("truncated: parts of the TIFF are missing")
        return with_directory(self.file, tags.prefix, entries)


def deep_tiff(file: BinaryIO) -> DeepTiff | None:
    """The TIFF in an open file where it is one of those that ``DeepTiff`` reads; None where it is left to Pillow.

    Raises UnsupportedImageError for a TIFF that neither reads.
    """
    file.seek(0)
    head = file.read(8)
    if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(head + (file.read(8) if 43 in head[2:4] else b""))
        file.seek(tags.next)
        tags.load(file)
        size = _number(tags[256]), _number(tags[257])
        samples = _number(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
        bits = set(_numbers(tags.get(TiffImagePlugin.BITSPERSAMPLE, 1)))
        formats = set(_numbers(tags.get(TiffImagePlugin.SAMPLEFORMAT, 1)))
    except Exception:  # damaged; Pillow will say so
        return None
    kinds = {(kind, deep) for kind in formats for deep in bits}
    if not bits or max(bits) <= 8 or (samples == 1 and kinds <= _PILLOWS_OWN):
        return None
    dtype = _DTYPES.get((formats.pop(), bits.pop())) if len(bits) == len(formats) == 1 else None
    if dtype is None or not _is_read(tags, samples):
        raise UnsupportedImageError(refusal_of(tags))
    return DeepTiff(file, tags, size, samples, dtype)


def _is_read(tags: Any, samples: int) -> bool:
    colours = {0: 1, 1: 1, 2: 3, 5: 4}.get(tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1), 99)
    fits = colours <= samples and (colours > 1 or samples <= 2)  # which of several grey channels is red is not said
    fits = fits and samples <= MOST_SAMPLES
    known = tags.get(TiffImagePlugin.COMPRESSION, 1) in COMPRESSIONS
    return fits and known and tags.get(TiffImagePlugin.PREDICTOR, 1) in (1, 2) and tags.get(266, 1) == 1


def is_read_by_pillow(tags: Any) -> bool:
    """Whether Pillow has a decoder for the kind of TIFF that these tags tell of."""
    samples = _number(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
    bits = _numbers(tags.get(TiffImagePlugin.BITSPERSAMPLE, 1))
    formats = _numbers(tags.get(TiffImagePlugin.SAMPLEFORMAT, 1))
    key = (
        tags.prefix,
        _number(tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0)),
        (1,) if set(formats) == {1} else tuple(formats),
        _number(tags.get(TiffImagePlugin.FILLORDER, 1)),
        tuple(bits) * (samples if len(bits) == 1 else 1),
        tuple(_numbers(tags.get(TiffImagePlugin.EXTRASAMPLES))),
    )
    compression = _number(tags.get(TiffImagePlugin.COMPRESSION, 1))
    return key in TiffImagePlugin.OPEN_INFO and compression in TiffImagePlugin.COMPRESSION_INFO


def refusal_of(tags: Any) -> str:
    """Why a TIFF of this kind is not read."""
    return f"{_kind(tags)}, which is not supported; save it as PNG or 8-bit TIFF"


def _kind(tags: Any) -> str:
    samples = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
    bits = sorted(set(_numbers(tags.get(TiffImagePlugin.BITSPERSAMPLE, 1))))
    kinds = sorted(set(_numbers(tags.get(TiffImagePlugin.SAMPLEFORMAT, 1))))
    numbers = "/".join({1: "", 2: "signed ", 3: "float "}.get(kind, f"format {kind} ") for kind in kinds)
    meaning = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "Lab"}
    photometric = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1)
    compression = tags.get(TiffImagePlugin.COMPRESSION, 1)
    packed = TiffImagePlugin.COMPRESSION_INFO.get(compression, f"number {compression}")
    return (
        f"a TIFF with {samples} {numbers}channel{'s' if samples != 1 else ''} of {'/'.join(map(str, bits))} bits, "
        f"{meaning.get(photometric, f'photometric {photometric}')}, compression {packed}"
    )


def with_directory(file: BinaryIO, prefix: bytes, entries: dict[int, list[int]]) -> bytes:
    """The bytes of a TIFF with a new directory behind them, of whole numbers by tag."""
    order = "<" if prefix == b"II" else ">"
    file.seek(0)
    data = bytearray(file.read())
    data += b"\0" * (len(data) % 2)
    fields = b""
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, place = struct.pack(f"{order}I", len(data)), packed
            data += place
        fields += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed
    data[:8] = prefix + struct.pack(f"{order}HI", 42, len(data))
    return bytes(data + struct.pack(f"{order}H", len(entries)) + fields + bytes(4))


def _numbers(value: Any) -> Sequence[int]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _number(value: Any) -> int:
    (number,) = _numbers(value)
    return int(number)
