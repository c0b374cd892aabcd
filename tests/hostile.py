"""Files, folders, lists and texts that could break a run, each with what has to come of it: data for `test_bad_input`.

A case's ``make`` is given a path that is not there yet (an image's own, else a folder's), makes what is hostile there,
and returns what a user would hand over.
"""

import io
import json
import os
import pickle
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

MANY = 20_000  # classes


@dataclass(frozen=True)
class Reads:
    """It is an image of this size (width, height); the pixel in its middle has this colour, within 4."""

    size: tuple[int, int]
    middle: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Aside:
    """It is set aside, and this pattern matches the whole reason."""

    reason: str


@dataclass(frozen=True)
class Fails:
    """The command ends with an error of this class, in whose message the pattern is found."""

    kind: str
    message: str


@dataclass(frozen=True)
class Works:
    """The command's result has these values; of ``set_aside``, reasons by the file's name."""

    found: dict[str, Any]


@dataclass(frozen=True)
class Hostile:
    name: str
    make: Callable[[Path], Any]
    outcome: Reads | Aside | Fails | Works


# --- bytes of each format ---------------------------------------------------------------------------------------------


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 32, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def plain(mode: str = "RGB", colour: Any = "red", size: tuple[int, int] = (4, 2)) -> Image.Image:
    return Image.new(mode, size, colour)


PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes, *, crc: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def ihdr(width: int, height: int, *, depth: int = 8, colour: int = 2, interlaced: int = 0) -> bytes:
    return struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)


def png(header: bytes, data: bytes, *extra: bytes, behind: bytes = b"") -> bytes:
    parts = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(data)), behind, chunk(b"IEND", b""))
    return PNG + b"".join(parts)


def interlaced_png(image: Image.Image) -> bytes:
    pixels = np.asarray(image)
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = [row for x, y, dx, dy in passes for row in pixels[y::dy, x::dx]]
    return png(ihdr(*image.size, interlaced=1), b"".join(b"\0" + row.tobytes() for row in rows if row.size))


def changed(data: bytes, place: int, new: bytes) -> bytes:
    place %= len(data)
    return data[:place] + new + data[place + len(new) :]


def flipped(data: bytes, place: int) -> bytes:
    return changed(data, place, bytes([data[place] ^ 0xFF]))


def gif(canvas: int, frame: int) -> bytes:
    """Red where it has pixels at all."""
    palette = bytes([255, 0, 0] * 4)
    screen = b"GIF89a" + struct.pack("<HHBBB", canvas, canvas, 0x81, 0, 0) + palette
    return screen + b"," + struct.pack("<HHHHB", 0, 0, frame, frame, 0) + b"\x02\x02\x4c\x01\0;"


def bmp(width: int, height: int, *, bits: int = 24, compression: int = 0, colours: int = 0, data: bytes = b"") -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, colours, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, 54) + info + data


def tiff(
    width: int,
    height: int,
    data: bytes,
    *extra: tuple[int, int, int, int],
    bits: int = 8,
    white: int = 1,
    floats: bool = False,
    compression: int = 1,
    order: str = "<",
    after: int = 0,
    stored: int | None = None,
) -> bytes:
    """A grey one. ``extra`` are entries (tag, type, count, value); ``after`` is where the next image is said to be."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, bits), (259, 3, 1, compression), (262, 3, 1, white)]
    start = 14 + 12 * (10 + len(extra))
    entries += [(273, 4, 1, start), (277, 3, 1, 1), (278, 4, 1, height), (339, 3, 1, 3 if floats else 1)]
    entries += [(279, 4, 1, len(data) if stored is None else stored), *extra]
    found = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    for tag, kind, count, value in sorted(entries):
        packed = struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
        found += struct.pack(f"{order}HHI", tag, kind, count) + packed
    return found + struct.pack(f"{order}I", after) + data


def webp(width: int, height: int, *, animated: bool) -> bytes:
    """A small picture on a canvas that is said to be of this size."""
    picture = encode(plain(), "WEBP")[12:]
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes([2 if animated else 0, 0, 0, 0]) + sides
    if animated:
        place = b"\0" * 6 + struct.pack("<I", 3)[:3] + struct.pack("<I", 1)[:3] + b"\0" * 4
        body += b"ANIM" + struct.pack("<I", 6) + b"\0" * 6
        picture = b"ANMF" + struct.pack("<I", len(place) + len(picture)) + place + picture
    body += picture
    return b"RIFF" + struct.pack("<I", len(body)) + body


def jpeg_of_size(width: int, height: int) -> bytes:
    data = encode(plain(), "JPEG")
    return changed(data, data.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def exif(*entries: tuple[int, int, int, int], after: int = 0) -> bytes:
    found = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries))
    return found + b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack("<I", after)


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    return encode(image or plain(), "JPEG", **options)


def animation(kind: str, **options: Any) -> bytes:
    frames = [plain(colour=colour) for colour in ("red", "blue", "lime")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", encode(plain(), "PNG"))
    return buffer.getvalue()


class Explodes:
    """Where it is unpickled, a file named ``pickle-was-run`` appears."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pickle-was-run",)


# --- images -----------------------------------------------------------------------------------------------------------

DAMAGED = Aside(
    r"(damaged or )?truncated file|of a kind that is not supported \(Unsupported BMP header type \(0\)\);.*"
)
OTHER = Aside("an? [A-Za-z' ]+, which is not supported; save it as JPEG or PNG")
UNKNOWN_BMP = Aside(r"of a kind that is not supported \(Unsupported BMP .*\); save it as JPEG or PNG")
STRANGE = Aside("not an image")
IRREGULAR = Aside("not a regular file")
UNDECODABLE = Aside("damaged or truncated file")
BEYOND_PILLOW = Aside("more pixels than Pillow allows")
BOMB = Aside("60000 x 60000 pixels, over the limit of 200,000,000")
RED = Reads((4, 2), (255, 0, 0))
RED_ON_END = Reads((2, 4), (255, 0, 0))

WHOLE = {
    "jpeg": encode(noise(), "JPEG"),
    "progressive_jpeg": encode(noise(), "JPEG", progressive=True),
    "png": encode(noise(), "PNG"),
    "interlaced_png": interlaced_png(noise()),
    "webp": encode(noise(), "WEBP"),
    "lossless_webp": encode(noise(), "WEBP", lossless=True),
    "gif": encode(noise(), "GIF"),
    "bmp": encode(noise(), "BMP"),
    "tiff": encode(noise(), "TIFF"),
    "deflated_tiff": encode(noise(), "TIFF", compression="tiff_adobe_deflate"),
    "jpeg_2000": encode(noise(), "JPEG2000"),
    "avif": encode(noise(), "AVIF"),
    "pnm": encode(noise(), "PPM"),
}
UNCHECKED = {"jpeg", "progressive_jpeg", "webp", "lossless_webp", "bmp", "tiff", "avif", "pnm"}  # no checksum tells
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
INK = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
INK_READ = Reads((8, 8), (255, 0, 0))
PALETTE = chunk(b"PLTE", bytes([255, 0, 0, 0, 0, 255]))
HUGE = b"a" * 5_000_000  # as text in a file, once inflated


def holds(data: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return make


def cut_images() -> Iterator[Hostile]:
    for kind, data in WHOLE.items():
        yield Hostile(f"{kind}_cut_after_its_first_byte", holds(data[:1]), STRANGE)
        yield Hostile(f"{kind}_cut_after_its_magic", holds(data[:16]), DAMAGED)
        for percent in (10, 25, 50, 75, 96):
            yield Hostile(f"{kind}_cut_at_{percent}_percent", holds(data[: len(data) * percent // 100]), DAMAGED)
        zeros = data[: len(data) // 2].ljust(len(data), b"\0")  # as a copy looks that was allocated and not finished
        if kind not in UNCHECKED:
            yield Hostile(f"{kind}_with_zeros_for_its_second_half", holds(zeros), DAMAGED)


def strange_images() -> Iterator[Hostile]:
    for name, data in {
        "all_zeros": bytes(4096),
        "all_ones": b"\xff" * 4096,
        "text": b"not an image at all\n",
        "html": b"<!DOCTYPE html><title>404 Not Found</title>",
        "pickle": pickle.dumps(Explodes()),
        "zip": zipped(),
        "gzip": b"\x1f\x8b\x08\0" + bytes(30),
        "png_behind_a_bom": b"\xef\xbb\xbf" + encode(plain(), "PNG"),
        "png_changed_by_a_text_copy": encode(plain(), "PNG").replace(b"\r\n", b"\n"),
        "lfs_pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
    }.items():
        yield Hostile(name, holds(data), STRANGE)
    for name, data in {
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/pwned) (w) file\n",
        "pdf": b"%PDF-1.7\n1 0 obj<<>>endobj\n",
        "ico": encode(plain(size=(16, 16)), "ICO"),
        "fits": b"SIMPLE  =                    T" + bytes(50),
        "jpeg_xl": b"\xff\x0a" + bytes(50),
        "photoshop": b"8BPS" + bytes(50),
        "canon_raw": b"II*\0\x10\0\0\0CR\x02\0" + bytes(50),
        "video": b"\0\0\0\x14ftypqt  \0\0\0\0qt  " + bytes(50),
    }.items():
        yield Hostile(name, holds(data), OTHER)
    for kind, magic in {
        "jpeg": b"\xff\xd8\xff",
        "png": PNG,
        "gif": b"GIF89a",
        "bmp": b"BM",
        "webp": b"RIFF\x04\0\0\0WEBPVP8 ",
        "tiff": b"II*\0",
        "big_tiff": b"II+\0",
        "jpeg_2000": b"\0\0\0\x0cjP  \r\n\x87\n",
        "avif": b"\0\0\0\x18ftypavif\0\0\0\0avif",
        "pnm": b"P6\n",
    }.items():
        yield Hostile(f"{kind}_magic_alone", holds(magic), DAMAGED)
        yield Hostile(f"{kind}_magic_and_zeros", holds(magic + bytes(500)), DAMAGED)
    yield Hostile("zero_bytes", holds(b""), Aside("empty file"))
    yield Hostile("png_by_another_name", holds(encode(plain(), "PNG")), RED)


def bombs() -> Iterator[Hostile]:
    side = 60_000
    for name, data in {
        "png": png(ihdr(side, side), b""),
        "png_one_bit": png(ihdr(side, side, depth=1, colour=0), b""),
        "tiff": tiff(side, side, b""),
        "tiff_lzw_one_bit": tiff(side, side, b"", bits=1, compression=5),
        "bmp": bmp(side, side),
        "bmp_upside_down": bmp(side, -side),
        "pnm": b"P6\n60000 60000\n255\n",
        "bmp_rle": bmp(side, side, bits=8, compression=1, colours=2, data=bytes(8) + b"\0\1"),
        "gif": gif(side, 1),
        "jpeg": jpeg_of_size(side, side),
    }.items():
        yield Hostile(f"{name}_bomb", holds(data), BOMB)
    yield Hostile("gif_bomb_in_its_frame", holds(gif(1, side)), BEYOND_PILLOW)
    yield Hostile("webp_bomb", holds(webp(side, side, animated=False)), BEYOND_PILLOW)
    yield Hostile("animated_webp_bomb", holds(webp(side, side, animated=True)), BEYOND_PILLOW)
    for name, data, said in (
        ("png_as_large_as_can_be_said", png(ihdr(2**31 - 1, 2**31 - 1), b""), "2147483647 x 2147483647"),
        ("tiff_as_large_as_can_be_said", tiff(2**32 - 1, 2**32 - 1, b"x"), "4294967295 x 4294967295"),
        ("bmp_as_large_as_can_be_said", bmp(2**31 - 1, -(2**31)), "2147483647 x 2147483648"),
        ("bmp_of_negative_width", bmp(-2, 2, data=bytes(16)), "4294967294 x 2"),
        ("png_of_one_pixel_too_many", png(ihdr(200_000_001, 1), b""), "200000001 x 1"),
    ):
        yield Hostile(name, holds(data), Aside(f"{said} pixels, over the limit of 200,000,000"))
    for name, data, said in (
        ("png_far_too_high", png(ihdr(1, 1_000_000), b"\0\xff\0\0" * 1_000_000), "1 x 1000000"),
        ("png_far_too_wide", png(ihdr(100_001, 1), b"\0" + b"\xff\0\0" * 100_001), "100001 x 1"),
        ("webp_far_too_wide", webp(2**24, 2, animated=True), "16777216 x 2"),
        ("webp_far_too_high", webp(4, 2**24, animated=True), "4 x 16777216"),
    ):
        yield Hostile(name, holds(data), Aside(f"{said} pixels, over the limit of 100,000 a side"))
    row = b"\0" + bytes([255, 0, 0] * 2)
    yield Hostile(
        "png_with_far_more_data_than_pixels", holds(png(ihdr(2, 2), 2 * row + bytes(20_000_000))), Reads((2, 2))
    )


FOURTEEN_BITS = (0x1234 >> 6,) * 3  # 0x1234 fills 14 of 16 bits, of which the highest 8 are kept


def odd_pixels() -> Iterator[Hostile]:
    grey = np.full((2, 4), 0x1234, np.uint16)
    mixed = struct.pack("<HH", 0x1234, 0xFF00)
    key = chunk(b"tRNS", struct.pack(">H", 0x1234))
    yield from (
        Hostile("one_pixel", holds(encode(plain(size=(1, 1)), "PNG")), Reads((1, 1), (255, 0, 0))),
        Hostile("one_pixel_wide", holds(encode(plain(size=(1, 5000)), "PNG")), Reads((1, 5000), (255, 0, 0))),
        Hostile("one_pixel_high", holds(jpeg(plain(size=(5000, 1)))), Reads((5000, 1), (254, 0, 0))),
        Hostile("png_16_bit", holds(encode(Image.fromarray(grey), "PNG")), Reads((4, 2), FOURTEEN_BITS)),
        Hostile("tiff_16_bit", holds(encode(Image.fromarray(grey), "TIFF")), Reads((4, 2), FOURTEEN_BITS)),
        Hostile(
            "png_16_bit_colour",
            holds(png(ihdr(1, 1, depth=16), b"\0" + struct.pack(">3H", 0xFF01, 0x1234, 0xFF))),
            Reads((1, 1), (255, 0x12, 0)),
        ),
        Hostile(
            "png_16_bit_colour_key",
            holds(png(ihdr(1, 1, depth=16, colour=0), b"\0\x12\x34", key)),
            Reads((1, 1), (255, 255, 255)),
        ),
        Hostile(
            "tiff_16_bit_big_endian", holds(tiff(1, 1, b"\x12\x34", bits=16, order=">")), Reads((1, 1), FOURTEEN_BITS)
        ),
        Hostile("tiff_16_bit_white_is_0", holds(tiff(2, 1, mixed, bits=16, white=0)), Reads((2, 1), (0, 0, 0))),
        Hostile("tiff_8_bit_white_is_0", holds(tiff(1, 1, b"\x12", white=0)), Reads((1, 1), (237, 237, 237))),
        Hostile(
            "tiff_float_white_is_0",
            holds(tiff(1, 1, struct.pack("<f", 0.25), bits=32, floats=True, white=0)),
            Reads((1, 1), (191, 191, 191)),
        ),
        Hostile(
            "tiff_32_bit_beyond_signed",
            holds(tiff(2, 1, struct.pack("<II", 0, 4_000_000_000), bits=32)),
            Reads((2, 1), (255, 255, 255)),
        ),
        Hostile(
            "tiff_float_as_large_as_can_be",
            holds(tiff(2, 1, struct.pack("<ff", -3e38, 3e38), bits=32, floats=True)),
            Reads((2, 1), (255, 255, 255)),
        ),
        *(
            Hostile(
                f"tiff_of_{value}",
                holds(tiff(2, 1, struct.pack("<ff", 0.5, float(value)), bits=32, floats=True)),
                Aside("pixel values that are not finite"),
            )
            for value in ("nan", "inf", "-inf")
        ),
        Hostile("tiff_of_doubles", holds(tiff(1, 1, bytes(8), bits=64, floats=True)), Reads((1, 1), (0, 0, 0))),
        Hostile("cmyk_jpeg", holds(jpeg(INK)), INK_READ),
        Hostile("cmyk_jpeg_with_a_profile", holds(jpeg(INK, icc_profile=SRGB)), INK_READ),
        Hostile("cmyk_jpeg_with_a_broken_profile", holds(jpeg(INK, icc_profile=b"nonsense" * 99)), INK_READ),
        Hostile("cmyk_tiff", holds(encode(INK, "TIFF")), INK_READ),
        Hostile("jpeg_with_a_profile_of_two_parts", holds(jpeg(icc_profile=SRGB + bytes(90_000))), RED),
        Hostile(
            "palette_with_transparency",
            holds(encode(plain("P", 0), "PNG", transparency=b"\0")),
            Reads((4, 2), (255, 255, 255)),
        ),
        Hostile("palette_gif_with_transparency", holds(encode(plain("P", 0), "GIF", transparency=0)), Reads((4, 2))),
        Hostile("palette_missing", holds(png(ihdr(2, 1, colour=3), b"\0\0\1")), UNDECODABLE),
        Hostile("palette_too_short", holds(png(ihdr(2, 1, colour=3), b"\0\0\5", PALETTE)), Reads((2, 1))),
        Hostile("grey_alpha", holds(encode(plain("LA", (0, 0)), "PNG")), Reads((4, 2), (255, 255, 255))),
        Hostile("palette_alpha_tiff", holds(encode(plain("PA", (0, 0)), "TIFF")), Reads((4, 2), (255, 255, 255))),
        Hostile("one_bit", holds(encode(plain("1", 1), "PNG")), Reads((4, 2), (255, 255, 255))),
        Hostile("one_bit_tiff", holds(encode(plain("1", 1), "TIFF", compression="group4")), Reads((4, 2), (255,) * 3)),
        Hostile("integers", holds(encode(plain("I", 0x1234), "TIFF")), Reads((4, 2), FOURTEEN_BITS)),
        Hostile("lab", holds(encode(plain("LAB", (0, 128, 128)), "TIFF")), Reads((4, 2))),
        Hostile("ycbcr", holds(encode(plain("RGB").convert("YCbCr"), "TIFF")), RED),
    )


def animations() -> Iterator[Hostile]:
    first = Reads((4, 2), (255, 0, 0))
    for kind, options in {"GIF": {}, "PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}.items():
        yield Hostile(f"animated_{kind.lower()}", holds(animation(kind, **options)), first)
    yield Hostile("animated_gif_cut_in_its_last_frame", holds(animation("GIF")[:-8]), first)
    yield Hostile("animated_png_cut_in_its_last_frame", holds(animation("PNG")[:-30]), first)
    yield Hostile(
        "jpeg_of_several_pictures", holds(encode(plain(), "MPO", save_all=True, append_images=[plain()])), RED
    )


def lying_images() -> Iterator[Hostile]:
    """Parts that say what is not so: of checksums, lengths, offsets, counts."""
    whole, woven = WHOLE["png"], WHOLE["interlaced_png"]
    data = whole.index(b"IDAT") + 4
    size = struct.unpack(">I", whole[data - 8 : data - 4])[0]
    row = b"\0" + bytes([255, 0, 0] * 4)
    squeezed = zlib.compress(HUGE)
    for name, part in {
        "ztxt": chunk(b"zTXt", b"a\0\0" + squeezed),
        "itxt": chunk(b"iTXt", b"a\0\1\0\0\0" + squeezed),
        "iccp": chunk(b"iCCP", b"a\0\0" + squeezed),
        "text": chunk(b"tEXt", b"a\0" + HUGE) * 14,
    }.items():
        yield Hostile(f"png_with_a_huge_{name}", holds(png(ihdr(4, 2), 2 * row, part)), RED)
    yield Hostile(
        "png_with_a_huge_ztxt_behind",
        holds(png(ihdr(4, 2), 2 * row, behind=chunk(b"zTXt", b"a\0\0" + squeezed))),
        RED,
    )
    yield from (
        Hostile("png_with_a_bad_header_checksum", holds(flipped(whole, 8 + 8 + 13)), UNDECODABLE),
        Hostile("interlaced_png_with_a_bad_header_checksum", holds(flipped(woven, 8 + 8 + 13)), UNDECODABLE),
        Hostile("png_with_a_bad_data_checksum", holds(flipped(whole, data + size)), Reads((32, 24))),
        Hostile("png_with_bad_data", holds(flipped(whole, data + size // 2)), UNDECODABLE),
        Hostile("interlaced_png_with_bad_data", holds(flipped(woven, data + size // 2)), UNDECODABLE),
        Hostile("png_with_a_bad_inner_checksum", holds(flipped(whole, data + size - 1)), UNDECODABLE),
        Hostile("png_without_data", holds(PNG + chunk(b"IHDR", ihdr(2, 2)) + chunk(b"IEND", b"")), UNDECODABLE),
        Hostile("png_without_header", holds(PNG + chunk(b"IDAT", b"")), UNDECODABLE),
        Hostile("png_of_no_size", holds(png(ihdr(0, 0), b"")), UNDECODABLE),
        Hostile("png_of_too_little_data", holds(png(ihdr(20, 20), b"\0" * 14)), DAMAGED),
        Hostile(
            "png_with_an_endless_chunk", holds(PNG + chunk(b"IHDR", ihdr(2, 2)) + b"\xff\xff\xff\xfftEXt"), DAMAGED
        ),
        Hostile("tiff_whose_next_is_itself", holds(tiff(2, 2, b"@" * 4, after=8)), Reads((2, 2), (64, 64, 64))),
        Hostile(
            "tiff_whose_exif_is_itself", holds(tiff(2, 2, b"@" * 4, (0x8769, 4, 1, 8))), Reads((2, 2), (64, 64, 64))
        ),
        Hostile("tiff_whose_part_is_itself", holds(tiff(2, 2, b"@" * 4, (330, 4, 1, 8))), Reads((2, 2), (64, 64, 64))),
        Hostile("tiff_that_begins_far_beyond_its_end", holds(b"II*\0\xff\xff\xff\x7f"), UNDECODABLE),
        Hostile("tiff_that_begins_nowhere", holds(b"II*\0\0\0\0\0"), UNDECODABLE),
        Hostile("tiff_of_65535_entries", holds(b"II*\0\x08\0\0\0\xff\xff" + bytes(50)), UNDECODABLE),
        Hostile("tiff_with_an_endless_tag", holds(tiff(2, 2, b"@" * 4, (270, 2, 2**32 - 1, 8))), Reads((2, 2))),
        Hostile("tiff_that_stores_too_much", holds(tiff(2, 2, b"@" * 4, stored=2**32 - 1)), Reads((2, 2))),
        Hostile("tiff_of_no_size", holds(tiff(0, 0, b"x")), UNDECODABLE),
        Hostile("tiff_of_orientation_99", holds(tiff(2, 2, b"@" * 4, (274, 3, 1, 99))), Reads((2, 2))),
        Hostile("tiff_turned_by_xmp", holds(encode(plain(), "TIFF", tiffinfo={700: XMP})), RED_ON_END),
        Hostile("jpeg_of_no_height", holds(jpeg_of_size(4, 0)), UNDECODABLE),
        Hostile("jpeg_and_garbage", holds(jpeg() + bytes(range(256))), RED),
        Hostile("gif_without_a_frame", holds(b"GIF89a" + struct.pack("<HHBBB", 2, 2, 0, 0, 0) + b";"), UNDECODABLE),
        Hostile("gif_of_no_size", holds(gif(0, 0)), UNDECODABLE),
        Hostile("gif_with_a_frame_of_no_size", holds(gif(2, 0)), UNDECODABLE),
        Hostile("gif_of_too_little_data", holds(gif(8, 8)), DAMAGED),
        Hostile("gif_of_comments", holds(gif(2, 2)[:13] + b"!\xfe\x01a\0" * 100_000), UNDECODABLE),
        Hostile("bmp_of_no_size", holds(bmp(0, 2)), UNDECODABLE),
        Hostile("bmp_of_33_bits", holds(bmp(2, 2, bits=33)), UNKNOWN_BMP),
        Hostile("bmp_of_too_many_colours", holds(bmp(2, 2, bits=8, colours=2**32 - 1, data=bytes(16))), UNKNOWN_BMP),
        Hostile(
            "bmp_rle_that_ends_at_once", holds(bmp(900, 900, bits=8, compression=1, colours=2, data=bytes(8))), DAMAGED
        ),
        Hostile("webp_in_a_larger_riff", holds(changed(WHOLE["webp"], 4, b"\xff\xff\xff\x7f")), UNDECODABLE),
    )


def odd_exif() -> Iterator[Hostile]:
    yield from (
        *(Hostile(f"exif_orientation_{n}", holds(jpeg(exif=exif((274, 3, 1, n)))), RED) for n in (0, 9, 99, 65535)),
        Hostile("exif_orientation_as_text", holds(jpeg(exif=exif((274, 2, 1, 6)))), RED),
        Hostile("exif_orientation_as_a_fraction_beyond_the_end", holds(jpeg(exif=exif((274, 5, 1, 9999)))), RED),
        Hostile("exif_of_many_orientations", holds(jpeg(exif=exif((274, 3, 2**30, 8)))), RED),
        Hostile("exif_cut", holds(jpeg(exif=exif((274, 3, 1, 6))[:20])), RED),
        Hostile("exif_cut_behind_the_orientation", holds(jpeg(exif=exif((274, 3, 1, 6))[:28])), RED_ON_END),
        Hostile("exif_of_junk", holds(jpeg(exif=b"Exif\0\0junkjunkjunk")), RED),
        Hostile("exif_as_large_as_can_be", holds(jpeg(exif=exif((274, 3, 1, 6)) + bytes(65_000))), RED_ON_END),
        Hostile("exif_whose_part_is_itself", holds(jpeg(exif=exif((274, 3, 1, 6), (0x8769, 4, 1, 8)))), RED_ON_END),
        Hostile("exif_whose_next_is_itself", holds(jpeg(exif=exif((274, 3, 1, 6), after=8))), RED_ON_END),
        Hostile("exif_of_junk_in_a_png", holds(encode(plain(), "PNG", exif=b"junk")), RED),
        Hostile("exif_of_junk_in_a_webp", holds(encode(plain(), "WEBP", lossless=True, exif=b"junk")), RED),
        Hostile("xmp_of_junk", holds(jpeg(xmp=b'<x tiff:Orientation="9999"' * 99)), RED),
    )


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def listening(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
    return path


def leads_to(target: str | Path) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.symlink_to(target)
        return path

    return make


def leads_in_a_circle(path: Path) -> Path:
    other = path.with_suffix(".back")
    other.symlink_to(path)
    path.symlink_to(other)
    return path


def closed(path: Path) -> Path:
    path.write_bytes(encode(plain(), "PNG"))
    path.chmod(0)
    return path


def closed_folder(path: Path) -> Path:
    path.mkdir()
    (path / "a.jpg").write_bytes(jpeg())
    path.chmod(0)
    return path


def no_plain_files() -> Iterator[Hostile]:
    yield from (
        Hostile("dangling_link", leads_to("nowhere.jpg"), Aside("no such file")),
        Hostile("link_to_itself", lambda path: leads_to(path)(path), Aside("too many levels of symbolic links")),
        Hostile("links_in_a_circle", leads_in_a_circle, Aside("too many levels of symbolic links")),
        Hostile("endless_device", leads_to("/dev/zero"), IRREGULAR),
        Hostile("empty_device", leads_to("/dev/null"), IRREGULAR),
        Hostile("kernel_file", leads_to("/proc/self/status"), Aside("empty file")),
        Hostile("pipe", fifo, IRREGULAR),
        Hostile("socket", listening, IRREGULAR),
        Hostile("closed", closed, Aside("permission denied")),
    )


IMAGES = [
    *cut_images(),
    *strange_images(),
    *bombs(),
    *odd_pixels(),
    *animations(),
    *lying_images(),
    *odd_exif(),
    *no_plain_files(),
]

# As bytes, so that any of them can be written: names of an image, to be read as any other.
NAMES = [
    b"line\nbreak.png",
    b"carriage\rreturn.png",
    b"tab\tand\x07bell.png",
    b"\x1b[31mred\x1b[0m.png",
    "\u202egnp.exe.png".encode(),
    "ألوان.png".encode(),
    b"caf\xe9.png",
    b"\xff\xfe.png",
    b"\xed\xb3\xa9.png",  # half of a character, as UTF-8 would have it
    b"n" * 251 + b".png",
    b'quote"comma,.png',
    b"-rf.png",
    b"--json.png",
    b"[bold].png",
    b"{0}%s$(id)`id`.png",
    b" spaces  .png",
    b"a.tar.png",
    b"CON.png",
    b"#.PNG",
]


# --- what is given as images ------------------------------------------------------------------------------------------


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def folder(*files: str, data: bytes = WHOLE["png"]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        for name in files:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
        return path

    return make


def named(name: str, make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    """What ``make`` makes, under this name in a folder of its own."""

    def inside(path: Path) -> Path:
        path.mkdir()
        return make(path / name)

    return inside


def loops(path: Path) -> Path:
    folder("a/b/x.png")(path)
    (path / "a" / "b" / "up").symlink_to(path)
    (path / "a" / "self").symlink_to(path / "a" / "self")
    (path / "again").symlink_to("a")
    return path


def deep(path: Path) -> Path:
    """Deeper than a path may be long."""
    path.mkdir()
    here = os.open(path, os.O_RDONLY)
    for _ in range(25):
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    return path


def with_closed_folder(path: Path) -> Path:
    folder("a.png")(path)
    closed_folder(path / "closed")
    return path


def listing(data: bytes | str, name: str = "list.csv") -> Callable[[Path], Path]:
    """A list with images ``a.png`` and ``b.png`` beside it, and a folder ``images.png`` with ``c.png`` in it."""

    def make(path: Path) -> Path:
        folder("a.png", "b.png", "images.png/c.png")(path)
        (path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return path / name

    return make


def absolute(path: Path) -> Path:
    made = listing("")(path)
    made.write_text(f"path,label\n{path}/a.png,robin\n/nowhere/b.png,wren\n../{path.name}/b.png,wren\n")
    return made


SOURCES = [
    Hostile("empty_folder", empty, Fails("ImageInputError", r"No image in folder .*Wanted at least one file.*Check")),
    Hostile("folder_of_hidden_images", folder(".a.png", ".b/c.png"), Fails("ImageInputError", "No image in folder")),
    Hostile(
        "folder_of_text",
        folder("a.txt", "b.md", data=b"text"),
        Fails("ImageInputError", r"No image in folder .*1 \.md"),
    ),
    Hostile(
        "folder_of_folders_named_as_images",
        folder("a.png/b.txt", data=b"text"),
        Fails("ImageInputError", "No image in folder"),
    ),
    Hostile(
        "closed_folder", closed_folder, Fails("ImageInputError", "Cannot list folder .*permission denied.*readable")
    ),
    Hostile(
        "folder_in_which_one_is_closed",
        with_closed_folder,
        Works({"images": 1, "set_aside": {}, "left_out": "Left out: folder closed (permission denied)."}),
    ),
    Hostile("folder_deeper_than_a_path", deep, Fails("ImageInputError", "No image in folder .*file name too long")),
    Hostile(
        "folder_of_a_phone_with_a_run_in_it",
        folder("a.heic", "b", "c.mov", "@eaDir/d.jpg", "e.jfif"),
        Works(
            {
                "images": 4,
                "set_aside": {},
                "left_out": "Left out: folder @eaDir (thumbnails of a NAS).",
            }
        ),
    ),
    Hostile("folder_of_loops", loops, Works({"images": 1, "set_aside": {}})),
    Hostile("folder_named_as_an_image", named("x.jpg", folder("a.png")), Works({"images": 1, "set_aside": {}})),
    Hostile(
        "folder_of_one_bad_image",
        folder("a.png", data=b"x"),
        Fails("ImageInputError", "The only image cannot be read.*a.png.*not an image"),
    ),
    Hostile(
        "link_to_itself",
        lambda path: leads_to(path)(path),
        Fails("ImageInputError", "Cannot open .*too many levels of symbolic links.*Give a folder"),
    ),
    Hostile("dangling_link", leads_to("nowhere"), Fails("ImageInputError", "Cannot open .*no such file")),
    Hostile("pipe_as_image", named("p.jpg", fifo), Fails("ImageInputError", "neither a folder nor a regular file")),
    Hostile("pipe_as_list", named("p.txt", fifo), Fails("ImageInputError", "neither a folder nor a regular file")),
    Hostile("pipe_as_table", named("p.csv", fifo), Fails("ImageInputError", "neither a folder nor a regular file")),
    Hostile(
        "socket_as_image", named("s.jpg", listening), Fails("ImageInputError", "neither a folder nor a regular file")
    ),
    Hostile("device", lambda path: "/dev/zero", Fails("ImageInputError", "neither a folder nor a regular file")),
    Hostile("closed_list", named("l.txt", closed), Fails("ImageInputError", "permission denied.*Give a list")),
    Hostile("null_in_the_name", lambda path: "a\0b", Fails("ImageInputError", "Cannot open .*not a usable file name")),
    Hostile("endless_name", lambda path: "a" * 9000, Fails("ImageInputError", "Cannot open .*file name too long")),
    Hostile("no_name", lambda path: f"{path}/", Fails("ImageInputError", "Cannot open .*no such file")),
    Hostile(
        "half_of_a_character", lambda path: "\ud800", Fails("ImageInputError", "Cannot open .*not a usable file name")
    ),
    Hostile(
        "address", lambda path: "https://example.org/a.jpg", Fails("ImageInputError", "Cannot open .*no such file")
    ),
]

LISTS = [
    Hostile("empty", listing(""), Fails("ImageInputError", "empty file")),
    Hostile("header_alone", listing("path,label\n"), Fails("ImageInputError", "lists no images.*below the header")),
    Hostile("no_path", listing("file,label\na.png,robin\n"), Fails("ImageInputError", "0 columns named 'path'")),
    Hostile("path_twice", listing("path,path\na.png,b.png\n"), Fails("ImageInputError", "2 columns named 'path'")),
    Hostile("semicolons", listing("path;label\na.png;robin\n"), Works({"images": 1, "set_aside": {}})),
    Hostile("tabs", listing("id\tPath\n1\ta.png\n2\tb.png\n"), Works({"images": 2, "set_aside": {}})),
    Hostile("bars", listing("path|label\na.png|robin\n"), Fails("ImageInputError", "'path.label'.*commas, semicolons")),
    Hostile("told_separator", listing("sep=;\r\npath;label\r\na.png;robin\r\n"), Works({"images": 1, "set_aside": {}})),
    Hostile("capitals", listing("PATH\na.png\n", "list.CSV"), Works({"images": 1, "set_aside": {}})),
    Hostile("backslashes", listing("path\nimages.png\\c.png\n"), Works({"images": 1, "set_aside": {}})),
    Hostile("none_exists", listing("path\nx.png\ny.png\n"), Fails("ImageInputError", "None of the 2 images.*x.png")),
    Hostile("none_exists_as_lines", listing("x.png\n", "l.txt"), Fails("ImageInputError", "The only image.*no such")),
    Hostile("no_header", listing("a.png\nb.png\n"), Fails("ImageInputError", "its header is 'a.png'")),
    Hostile("blank_first_line", listing("\npath\na.png\n"), Fails("ImageInputError", "its header is ''.*header line")),
    Hostile("quote_not_closed", listing('path\na.png\n"b.png\n'), Fails("ImageInputError", "line 3: .*quotes")),
    Hostile("quote_in_the_middle", listing('path\n"a".png\n'), Fails("ImageInputError", "line 2: .*quotes")),
    Hostile("too_many_values", listing("path\na.png\na,b.png\n"), Fails("ImageInputError", "line 3: more values than")),
    Hostile(
        "no_value", listing("path,label\na.png,robin\n,wren\n"), Fails("ImageInputError", "line 3: no value for 'path'")
    ),
    Hostile(
        "latin_1", listing("path\na.png\nbé.png\n".encode("latin-1")), Fails("ImageInputError", "line 3: not UTF-8")
    ),
    Hostile("utf_16", listing("path\na.png\n".encode("utf-16")), Works({"images": 1, "set_aside": {}})),
    Hostile(
        "utf_16_cut",
        listing("path\na.png\n".encode("utf-16")[:-1]),
        Fails("ImageInputError", "not UTF-16 text.*Save it as UTF-8"),
    ),
    Hostile("binary", listing(WHOLE["png"]), Fails("ImageInputError", "line 1: not UTF-8")),
    Hostile("nulls", listing(bytes(100)), Fails("ImageInputError", "0 columns named 'path'")),
    Hostile("endless_field", listing("path\n" + "x" * 200_000), Fails("ImageInputError", "line 2: field larger than")),
    Hostile(
        "endless_quote", listing('path\n"' + "a.png\n" * 40_000), Fails("ImageInputError", "line 2: field larger than")
    ),
    Hostile("bom_and_carriage_returns", listing("\ufeffpath\ra.png\rb.png\r"), Works({"images": 2, "set_aside": {}})),
    Hostile(
        "carriage_return_in_a_name",
        listing("path\na\r.png\n"),
        Fails("ImageInputError", "None of the 2 images can be read.*no such file"),
    ),
    Hostile(
        "null_in_a_path",
        listing("path\na.png\nb\0.png\n"),
        Works({"images": 1, "set_aside": {"b\0.png": "not a usable file name"}}),
    ),
    Hostile(
        "long_path",
        listing(f"path\na.png\n{'x' * 100_000}\n"),
        Works({"images": 1, "set_aside": {"x" * 100_000: "file name too long"}}),
    ),
    Hostile(
        "path_to_a_folder",
        listing("path\na.png\nimages.png\n.\n"),
        Works(
            {"images": 1, "set_aside": {"images.png": "not a regular file", "path_to_a_folder": "not a regular file"}}
        ),
    ),
    Hostile("paths_from_elsewhere", absolute, Works({"images": 2, "set_aside": {"b.png": "no such file"}})),
    Hostile("device", listing("path\n/dev/zero\n"), Fails("ImageInputError", "only image.*not a regular file")),
    Hostile("lines_empty", listing("", "l.txt"), Fails("ImageInputError", "empty file")),
    Hostile("lines_of_comments", listing("# a\n\n  \n", "l.txt"), Fails("ImageInputError", "lists no images")),
    Hostile("lines_in_utf_16", listing("a.png\n".encode("utf-16"), "l.txt"), Works({"images": 1, "set_aside": {}})),
    Hostile(
        "lines_that_list_themselves",
        listing("l.txt\na.png\n", "l.txt"),
        Works({"images": 1, "set_aside": {"l.txt": "not an image"}}),
    ),
    Hostile(
        "lines_that_a_shell_would_expand",
        listing("a.png\n~/a.png\n*.png\n$HOME\n", "l.txt"),
        Works({"images": 1, "set_aside": {"a.png": "no such file", "*.png": "no such file", "$HOME": "no such file"}}),
    ),
    Hostile(
        "lines_with_a_null",
        listing("a.png\n\0\n", "l.txt"),
        Works({"images": 1, "set_aside": {"\0": "not a usable file name"}}),
    ),
]

LABELLED = [
    Hostile("empty", listing(""), Fails("ImageInputError", "empty file")),
    Hostile("header_alone", listing("path,label\n"), Fails("ImageInputError", "lists no images")),
    Hostile("no_label", listing("path\na.png\n"), Fails("ImageInputError", "0 columns named 'label'")),
    Hostile("capitals", listing("Path,Label\na.png,robin\n"), Works({"images": 1, "set_aside": 0})),
    Hostile("semicolons", listing("Label;Path\nrobin;a.png\n"), Works({"images": 1, "set_aside": 0})),
    Hostile("tabs", listing("path\tlabel\na.png\trobin\n"), Works({"images": 1, "set_aside": 0})),
    Hostile("backslashes", listing("path,label\nimages.png\\c.png,wren\n"), Works({"images": 1, "set_aside": 0})),
    Hostile(
        "class_too_many",
        listing("path,label\na.png,robin\nb.png,gull\n"),
        Works({"images": 1, "set_aside": 0, "unknown": {"gull": 1}}),
    ),
    Hostile("folder_too_many", folder("robin/a.png", "gull/b.png"), Works({"images": 1, "unknown": {"gull": 1}})),
    Hostile(
        "label_left_out", listing("path,label\na.png,\n"), Fails("ImageInputError", "line 2: no value for 'label'")
    ),
    Hostile("quote_not_closed", listing('path,label\n"a.png,robin\n'), Fails("ImageInputError", "line 2: .*quotes")),
    Hostile("utf_16", listing("path,label\na.png,robin\n".encode("utf-16")), Works({"images": 1, "set_aside": 0})),
    Hostile("binary", listing(WHOLE["gif"]), Fails("ImageInputError", "not UTF-8")),
    Hostile("unknown_class", listing("path,label\na.png,gull\n"), Fails("ImageInputError", "'gull' .1 image.*Valid")),
    Hostile(
        "control_characters_for_a_class",
        listing("path,label\na.png,\x1b[31m\n"),
        Fails("ImageInputError", r"no class .*'\\x1b\[31m' .1 image.*Valid class names: 'robin', 'wren'"),
    ),
    Hostile(
        "endless_class",
        listing(f"path,label\na.png,{'x' * 100_000}\n"),
        Fails("ImageInputError", "^.{,2000}$"),
    ),
    Hostile(
        "an_image_twice", listing("path,label\na.png,robin\na.png,wren\n"), Fails("ImageInputError", "more than once")
    ),
    Hostile(
        "an_image_twice_by_other_ways",
        listing("path,label\na.png,robin\nimages.png/../a.png,wren\n"),
        Fails("ImageInputError", "1 image more than once, such as .*a.png"),
    ),
    Hostile(
        "null_in_the_only_path", listing("path,label\na\0.png,robin\n"), Fails("ImageInputError", "None of the 1 image")
    ),
    Hostile("none_exists", listing("path,label\nx.png,robin\n"), Fails("ImageInputError", "None of the 1 image")),
    Hostile("pipe", named("p.csv", fifo), Fails("ImageInputError", "not a regular file")),
    Hostile("missing", lambda path: path, Fails("ImageInputError", "No ground truth at")),
    Hostile("images_outside_class_folders", folder("a.png", "robin/b.png"), Fails("ImageInputError", "directly in it")),
    Hostile("folder_of_no_class", folder("gull/a.png"), Fails("ImageInputError", "1 folder name matches no class")),
    Hostile("empty_folder", empty, Fails("ImageInputError", "No image in folder")),
    Hostile(
        "nothing_readable",
        folder("robin/a.png", data=b"x"),
        Fails("ImageInputError", "None of the labelled images could be read"),
    ),
    Hostile(
        "folder_for_an_image",
        listing("path,label\na.png,robin\nimages.png,wren\n"),
        Works({"images": 1, "set_aside": 1}),
    ),
    Hostile("null_in_a_path", listing("path,label\na.png,robin\nb\0,wren\n"), Works({"images": 1, "set_aside": 1})),
    Hostile("paths_from_elsewhere", absolute, Works({"images": 2, "set_aside": 1})),
    Hostile(
        "invisible_in_a_label", listing("path,label\na.png,\u200brob\ufeffin\n"), Works({"images": 1, "set_aside": 0})
    ),
    Hostile("carriage_returns", listing("path,label\ra.png,robin\r"), Works({"images": 1, "set_aside": 0})),
]


# --- texts ------------------------------------------------------------------------------------------------------------


def text(data: bytes | str) -> Callable[[Path], Path]:
    return holds(data if isinstance(data, bytes) else data.encode())


def inline(names: str) -> Callable[[Path], str]:
    return lambda path: names


def classes(*names: str) -> Works:
    return Works({"classes": list(names)})


MANY_NAMES = [f"class {number}" for number in range(MANY)]

CLASSES = [
    Hostile("empty", text(""), Fails("PromptError", "holds no name. Wanted: at least two")),
    Hostile("only_spaces", text("  \n\t\n \u3000\n"), Fails("PromptError", "holds no name")),
    Hostile("only_a_bom", text("\ufeff"), Fails("PromptError", "holds no name")),
    Hostile("only_invisible", text("\u200b\nwren\n"), Fails("PromptError", "blank name at position 1")),
    Hostile("one", text("robin\n"), Fails("PromptError", "only 'robin'. Wanted: at least two")),
    Hostile("blank_line", text("robin\n\nwren\n"), Fails("PromptError", "blank name at position 2")),
    Hostile("twice", text("robin\nwren\nrobin\n"), Fails("PromptError", "'robin' stands twice. Keep one")),
    Hostile("twice_after_folding", text("Tabby_Cat\ntabby-cat\n"), Fails("PromptError", "the same name but for case")),
    Hostile("twice_but_for_a_bom", text("wren\n\ufeffrobin\nrobin\n"), Fails("PromptError", "what cannot be seen")),
    Hostile("twice_but_for_nothing_wide", text("wren\nwr\u200ben\n"), Fails("PromptError", "what cannot be seen")),
    Hostile("control_character", text("robin\nwr\x07en\n"), Fails("PromptError", r"'wr\\x07en' holds a control")),
    Hostile("escape", text("robin\n\x1b[31mwren\n"), Fails("PromptError", "holds a control character")),
    Hostile("null", text("robin\nwren\0\n"), Fails("PromptError", "holds a control character")),
    Hostile("utf_16", text("robin\nwren\n".encode("utf-16")), classes("robin", "wren")),
    Hostile("json", text('[\n  "robin",\n  "wren"\n]\n'), classes("robin", "wren")),
    Hostile("table", text("id;Name\n0;robin\n1;wren\n"), classes("robin", "wren")),
    Hostile("signs", text("-1\n1\n"), classes("-1", "1")),
    Hostile("sharp_s", text("Masse\nMaße\n"), classes("Masse", "Maße")),
    Hostile("comment", text("# my birds\nrobin\nwren\n"), Fails("PromptError", "line 1: '# my birds' looks like a")),
    Hostile("quotes_and_commas", text('"robin",\n"wren",\n'), Fails("PromptError", "line 1: .*in quotes.*JSON")),
    Hostile("numbered", text("0 robin\n1 wren\n"), Fails("PromptError", "line 1: '0 robin' and all lines.*a number")),
    Hostile(
        "utf_16_without_a_bom", text("robin\nwren\n".encode("utf-16-le")), Fails("PromptError", "control character")
    ),
    Hostile("latin_1", text("café\nwren\n".encode("latin-1")), Fails("PromptError", "cannot be read.*Wanted")),
    Hostile("binary", text(bytes(range(256))), Fails("PromptError", "cannot be read.*Wanted")),
    Hostile("image", text(WHOLE["jpeg"]), Fails("PromptError", "cannot be read.*Wanted")),
    Hostile("one_endless_line", text("x" * 5_000_000), Fails("PromptError", "^.{,500}$")),
    Hostile(
        "endless_twins", text(f"{'x' * 999_999}\n{'x' * 999_999}\n"), Fails("PromptError", "^.{,500} stands twice")
    ),
    Hostile("folder", empty, Fails("PromptError", "neither a file nor a list")),
    Hostile("pipe", fifo, Fails("PromptError", "neither a file nor a list")),
    Hostile("device", inline("/dev/zero"), Fails("PromptError", "neither a file nor a list")),
    Hostile("missing", lambda path: path, Fails("PromptError", "neither a file nor a list")),
    Hostile("closed", named("classes.txt", closed), Fails("PromptError", "cannot be read: permission denied.*Wanted")),
    Hostile("link_to_itself", lambda path: leads_to(path)(path), Fails("PromptError", "neither a file nor a list")),
    Hostile("nothing", inline(""), Fails("PromptError", "neither a file nor a list")),
    Hostile("commas", inline(",,"), Fails("PromptError", "blank name at position 1, 2, 3")),
    Hostile("quote_not_closed", inline('"robin,wren'), Fails("PromptError", "only 'robin,wren'")),
    Hostile("null_inline", inline("robin\0,wren"), Fails("PromptError", "control character")),
    Hostile("lines_inline", inline("robin,\nwren"), Fails("PromptError", "cannot be read.*one a line")),
    Hostile(
        "half_of_a_character", inline("\ud800robin,wren"), Fails("PromptError", "control character or half of one")
    ),
    Hostile("endless_inline", inline("x" * 1_000_000), Fails("PromptError", "^.{,500}$")),
    Hostile("endless_name_inline", inline(f"robin,{'x' * 1_000_000}"), Fails("PromptError", "field larger than.*file")),
    Hostile("bom", text("\ufeffrobin\nwren\n"), classes("robin", "wren")),
    Hostile("crlf", text("robin\r\nwren\r\n\r\n"), classes("robin", "wren")),
    Hostile("carriage_returns", text("robin\rwren\r"), classes("robin", "wren")),
    Hostile("right_to_left", text("قط منزلي\nכלב\n"), classes("قط منزلي", "כלב")),
    Hostile("line_breaks_inside", text("house\x0bwren\nsea\u2028gull\n"), classes("house wren", "sea gull")),
    Hostile("markup", text("[bold]robin[/]\n{wren}\n%s\n$(id)\n"), classes("[bold]robin[/]", "{wren}", "%s", "$(id)")),
    Hostile("many_and_one_twice", text("\n".join([*MANY_NAMES, "CLASS 7"])), Fails("PromptError", "the same name")),
]


# As many as ``MANY_NAMES``, to be checked in seconds: to encode them takes the demo's model 20 s a template.
MANY_CLASSES = [
    Hostile("in_a_file", text("\n".join(MANY_NAMES)), classes(*MANY_NAMES)),
    Hostile("inline", inline(",".join(MANY_NAMES)), classes(*MANY_NAMES)),
]


def described(value: object) -> Callable[[Path], Path]:
    return text(json.dumps(value))


ROBIN, WREN = '"robin": ["A red breast."]', '"wren": ["A small bird."]'
MANY_KEYS = ", ".join(f'"class {number}": ["a"]' for number in range(MANY))

DESCRIPTIONS = [
    Hostile("empty", text(""), Fails("PromptError", "is not JSON.*Wanted")),
    Hostile("text", text("robin: a bird"), Fails("PromptError", "is not JSON")),
    Hostile("yaml", text("robin:\n- a bird\n"), Fails("PromptError", "is not JSON")),
    Hostile("cut", text(f"{{{ROBIN}, "), Fails("PromptError", "is not JSON")),
    Hostile("two_values", text(f"{{{ROBIN}}}{{{WREN}}}"), Fails("PromptError", "is not JSON: Extra data")),
    Hostile("comma_too_many", text(f"{{{ROBIN}, {WREN},}}"), Fails("PromptError", "is not JSON")),
    Hostile("binary", text(WHOLE["webp"]), Fails("PromptError", "cannot be read.*JSON file")),
    Hostile("nulls", text(bytes(99)), Fails("PromptError", "is not JSON")),
    Hostile("utf_16", text(f"{{{ROBIN}, {WREN}}}".encode("utf-16")), Works({"descriptions": 2})),
    Hostile("null", described(None), Fails("PromptError", "found NoneType. Wanted: a mapping")),
    Hostile("list", described(["robin", "wren"]), Fails("PromptError", "found list. Wanted: a mapping")),
    Hostile("number", described(3), Fails("PromptError", "found int")),
    Hostile("not_a_number", text("NaN"), Fails("PromptError", "found float")),
    Hostile("not_a_number_for_a_class", text(f'{{"robin": NaN, {WREN}}}'), Fails("PromptError", "'robin' holds nan")),
    Hostile(
        "not_a_number_for_a_sentence", text(f'{{"robin": [NaN], {WREN}}}'), Fails("PromptError", "nan, which is no")
    ),
    Hostile(
        "text_for_a_class", described({"robin": "a", "wren": ["b"]}), Fails("PromptError", "'robin' holds 'a'. Wanted")
    ),
    Hostile(
        "mapping_for_a_class", described({"robin": {"a": 1}}), Fails("PromptError", "'robin' holds.*list of sentences")
    ),
    Hostile("number_for_a_sentence", described({"robin": ["a", 7]}), Fails("PromptError", "7, which is no sentence")),
    Hostile("list_for_a_sentence", described({"robin": [["a"]]}), Fails("PromptError", "which is no sentence")),
    Hostile("null_for_a_sentence", described({"robin": [None]}), Fails("PromptError", "None, which is no sentence")),
    Hostile("empty_sentence", described({"robin": ["a", ""]}), Fails("PromptError", "'', which is no sentence")),
    Hostile("blank_sentence", described({"robin": ["a", " \n"]}), Fails("PromptError", "which is no sentence")),
    Hostile("half_of_a_character", text(f'{{"robin": ["a \\ud800"], {WREN}}}'), Fails("PromptError", "is no sentence")),
    Hostile("no_sentence", described({"robin": [], "wren": ["b"]}), Fails("PromptError", "'robin' has no description")),
    Hostile("no_class", described({}), Fails("PromptError", "miss 2 of 2 classes: 'robin', 'wren'")),
    Hostile("class_missing", text(f"{{{ROBIN}}}"), Fails("PromptError", "miss 1 of 2 classes: 'wren'")),
    Hostile("class_too_many", text(f'{{{ROBIN}, {WREN}, "gull": ["c"]}}'), Fails("PromptError", "1 classes .*'gull'")),
    Hostile("class_twice", text(f"{{{ROBIN}, {WREN}, {ROBIN}}}"), Fails("PromptError", "'robin' stands twice")),
    Hostile("class_twice_after_folding", text(f'{{{ROBIN}, {WREN}, "Robin": ["c"]}}'), Fails("PromptError", "'Robin'")),
    Hostile("nested_lists", text('{"a": ' + "[" * 100_000), Fails("PromptError", "nested too deep|is not JSON")),
    Hostile(
        "nested_lists_closed",
        text('{"a": ' + "[" * 900 + "]" * 900 + "}"),
        Fails("PromptError", "no sentence|too deep"),
    ),
    Hostile("nested_mappings", text('{"a": ' * 900 + "1" + "}" * 900), Fails("PromptError", "'a' holds|too deep")),
    Hostile("number_too_long_for_python", text('{"robin": [' + "1" * 5000 + "]}"), Fails("PromptError", "is not JSON")),
    Hostile("endless_key", described({"x" * 1_000_000: ["a"]} | {"wren": ["b"]}), Fails("PromptError", "^.{,600}$")),
    Hostile(
        "many_and_one_twice", text(f'{{{MANY_KEYS}, "class {MANY - 1}": ["b"]}}'), Fails("PromptError", "stands twice")
    ),
    Hostile("folder", empty, Fails("PromptError", "cannot be read: not a regular file")),
    Hostile("pipe", fifo, Fails("PromptError", "cannot be read: not a regular file")),
    Hostile("endless_device", lambda path: "/dev/zero", Fails("PromptError", "cannot be read: not a regular file")),
    Hostile("missing", lambda path: path, Fails("PromptError", "No descriptions at .*no such file")),
    Hostile(
        "missing_by_a_name_that_is_not_utf_8",
        lambda path: os.fsdecode(os.fsencode(path) + b"\xe9"),
        Fails("PromptError", r"No descriptions at .*\\xe9: no such file"),
    ),
    Hostile(
        "link_to_itself", lambda path: leads_to(path)(path), Fails("PromptError", "cannot be read: too many levels")
    ),
    Hostile("bom", text(f"\ufeff{{{ROBIN}, {WREN}}}"), Works({"descriptions": 2})),
]

TEMPLATES = [
    Hostile("empty", text(""), Fails("PromptError", "found no template. Wanted: at least one")),
    Hostile("only_spaces", text(" \n\t\n"), Fails("PromptError", "found no template")),
    Hostile("no_place", text("a photo.\n"), Fails("PromptError", r"'a photo.' needs exactly one \{\}")),
    Hostile("two_places", text("a {} by a {}.\n"), Fails("PromptError", r"needs exactly one \{\}")),
    Hostile("named_place", text("a {name}.\n"), Fails("PromptError", r"needs exactly one \{\}")),
    Hostile("one_bad_among_good", text("a {}.\nb\n"), Fails("PromptError", r"'b' needs exactly one \{\}")),
    Hostile("endless", text("x" * 1_000_000), Fails("PromptError", "^.{,500}$")),
    Hostile("binary", text(WHOLE["jpeg"]), Fails("PromptError", "The templates in .* cannot be read")),
    Hostile("utf_16", text("a {}.\n".encode("utf-16")), Works({"descriptions": 2})),
    Hostile("folder", empty, Fails("PromptError", "The templates in .* cannot be read: not a regular file")),
    Hostile("pipe", fifo, Fails("PromptError", "not a regular file")),
    Hostile("missing", lambda path: path, Fails("PromptError", "No templates at .*no such file")),
    Hostile("line_break_inside", text("a {} on\u2028a wall.\n"), Works({"descriptions": 2})),
]

LONG = "very " * 80  # more words than a text tower takes

# By the arguments of `finealign adapt` that name them, as a backbone reads them.
TOO_LONG: Sequence[tuple[str, dict[str, str]]] = [
    ("class", {"--classes": f"robin,{LONG}wren"}),
    ("template", {"--classes": "robin,wren", "--templates": f"a {LONG}{{}}.\n"}),
    (
        "description",
        {"--classes": "robin,wren", "--descriptions": json.dumps({"robin": [f"{LONG}red."], "wren": ["small."]})},
    ),
]

# As the constructor of ``FineAlign`` takes them.
ARGUMENTS: Sequence[tuple[str, dict[str, Any], str]] = [
    ("classes_as_one_text", {"classes": "robin"}, "Found one text"),
    ("classes_as_bytes", {"classes": [b"robin", b"wren"]}, "is not text"),
    ("classes_with_none", {"classes": ["robin", None]}, "None is not text"),
    ("classes_with_a_list", {"classes": ["robin", ["wren"]]}, "is not text"),
    ("classes_with_half_of_a_character", {"classes": ["robin", "\ud800"]}, "half of one|blank name"),
    ("templates_as_one_text", {"templates": "a {}."}, "found one text"),
    ("templates_with_a_number", {"templates": [3]}, "3 is not text"),
    ("templates_with_none", {"templates": [None]}, "None is not text"),
    ("templates_with_half_of_a_character", {"templates": ["\ud800 {}"]}, "is not text"),
    ("no_templates", {"templates": []}, "found no template"),
    ("descriptions_as_a_list", {"descriptions": ["a"]}, "found list"),
    ("descriptions_of_a_number", {"descriptions": {1: ["a"], "wren": ["b"]}}, "1 holds"),
    ("descriptions_as_bytes", {"descriptions": {"robin": b"a", "wren": ["b"]}}, "'robin' holds"),
]
