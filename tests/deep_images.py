"""Images of more than 8 bits a channel, written byte by byte, as Pillow writes none of these."""

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hostile import ihdr, png

SHARED = Path(os.environ.get("FINEALIGN_SHARED", "/nowhere")) / "cases"  # images that people reported


def tiff_of(
    values: NDArray[Any],
    *,
    photometric: int,
    extra: Sequence[int] = (),
    planar: bool = False,
    predictor: int = 1,
    deflated: bool = False,
    tile: int = 0,
    big_endian: bool = False,
    tags: dict[int, list[int]] | None = None,
) -> bytes:
    """A TIFF of (H, W, N) values in strips of 8 rows, or in square tiles."""
    order: Literal["<", ">"] = ">" if big_endian else "<"
    planes = [values[..., n : n + 1] for n in range(values.shape[2])] if planar else [values]
    height, width, samples = values.shape
    down, across = (tile, tile) if tile else (8, width)
    parts = []
    for plane in planes:
        for top in range(0, height, down):
            for left in range(0, width, across):
                part = plane[top : top + down, left : left + across]
                if tile:
                    part = np.pad(part, ((0, tile - part.shape[0]), (0, tile - part.shape[1]), (0, 0)))
                if predictor == 2:
                    raw = part.view(f"u{part.itemsize}")
                    part = np.diff(raw, axis=1, prepend=np.zeros_like(raw[:, :1]))
                data = part.astype(part.dtype.newbyteorder(order)).tobytes()
                parts.append(zlib.compress(data) if deflated else data)
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries: dict[int, list[int]] = {
        256: [width],
        257: [height],
        258: [8 * values.itemsize] * samples,
        259: [8 if deflated else 1],
        262: [photometric],
        277: [samples],
        284: [2 if planar else 1],
        317: [predictor],
        339: [kind] * samples,
        **({338: list(extra)} if extra else {}),
        **({322: [tile], 323: [tile]} if tile else {278: [down]}),
        **(tags or {}),
    }
    body = b"".join(parts)
    places = [8 + sum(map(len, parts[:number])) for number in range(len(parts))]
    entries |= {324 if tile else 273: places, 325 if tile else 279: [len(part) for part in parts]}
    body += b"\0" * (len(body) % 2)
    fields = b""
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, place = struct.pack(f"{order}I", 8 + len(body)), packed
            body += place
        fields += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed
    head = (b"MM" if big_endian else b"II") + struct.pack(f"{order}HI", 42, 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(entries)) + fields + bytes(4)


def wide_png(values: NDArray[Any], *extra: bytes) -> bytes:
    """A PNG of (H, W, N) values of 16 bits, with further chunks before its data."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]
    rows = values.astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    return png(ihdr(values.shape[1], values.shape[0], depth=16, colour=colour), data, *extra)
