"""Files that every viewer shows although something in them is too large or missing, as Pillow can read them."""

import struct
from collections.abc import Iterator

LONGEST_TEXT = 65_536  # bytes of a text that is kept: a PNG's XMP may say how the image is turned
END = b"\xff\xd9"  # a JPEG's end mark
# What is put in place of a JPEG's missing end: a decoder that still wants data makes another picture of each.
FILLINGS = (b"", bytes(range(1, 255)) * 8, b"\x5a\xa5\x3c" * 700)

_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def without_text(png: bytes) -> bytes:
    """The PNG without its compressed texts, its colour profile and its long texts, whose size Pillow bounds."""
    kept, position = [png[:8]], 8
    room = LONGEST_TEXT
    while position + 8 <= len(png):
        length, kind = struct.unpack(">I4s", png[position : position + 8])
        end = position + 12 + length
        if kind not in _TEXTS:
            kept.append(png[position:end])
        elif length <= room and _is_plain(kind, png[position + 8 : end - 4]):
            room -= length
            kept.append(png[position:end])
        position = end
    return b"".join(kept)


def _is_plain(kind: bytes, data: bytes) -> bool:
    """Whether a text is stored uncompressed."""
    name = data.find(b"\0")
    return kind == b"tEXt" or (kind == b"iTXt" and data[name + 1 : name + 2] == b"\0")


def ended(jpeg: bytes) -> Iterator[bytes]:
    """The JPEG with an end mark, behind one filling after another; nothing where it lacks more than its end.

    All of them decode to the same picture if no pixel is missing. A filling lies where the data end.
    """
    if not _has_all_scans(jpeg):
        return
    whole = jpeg[:-1] if jpeg.endswith(b"\xff") else jpeg
    for filling in FILLINGS:
        yield whole + filling + END


def _has_all_scans(jpeg: bytes) -> bool:
    """Whether the scans that begin in a JPEG hold all coefficients of all its components to the last bit."""
    wanted: set[int] = set()
    last: dict[tuple[int, int], int] = {}  # by component and coefficient: how many low bits are still to come
    for marker, body in _segments(jpeg):
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and len(body) >= 6:
            wanted = set(body[6 : 6 + 3 * body[5] : 3])
        elif marker == 0xDA and body and len(body) >= 4 + 2 * body[0]:
            components = body[1 : 1 + 2 * body[0] : 2]
            start, stop, low = body[-3], body[-2], body[-1] & 15
            last |= {(part, place): low for part in components for place in range(start, min(stop, 63) + 1)}
    return bool(wanted) and all(last.get((part, place)) == 0 for part in wanted for place in range(64))


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """The markers with a length, and what follows each; those of stored thumbnails lie inside others."""
    position = 2
    while (position := jpeg.find(b"\xff", position)) >= 0 and position + 4 <= len(jpeg):
        marker = jpeg[position + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:
            position += 1 if marker == 0xFF else 2
            continue
        if marker == 0xD9:
            return
        length = int.from_bytes(jpeg[position + 2 : position + 4], "big")
        yield marker, jpeg[position + 4 : position + 2 + length]
        position += 2 + max(2, length)
