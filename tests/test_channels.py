"""Images of more than 8 bits a channel: read in full, scaled by one rule, or refused by their name."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from deep_images import SHARED, tiff_of, wide_png
from finealign.images.channels import eight_bits
from finealign.images.decoding import read_image
from finealign.images.files import ImageReadError
from hostile import chunk

HEIGHT, WIDTH = 21, 37


def ramp(samples: int, top: int = 0xFFFF, dtype: Any = np.uint16) -> NDArray[Any]:
    values = np.random.default_rng(0).integers(0, top + 1, (HEIGHT, WIDTH, samples))
    values[0, 0] = top
    return values.astype(dtype)


def read(path: Path, data: bytes, **options: Any) -> NDArray[np.uint8]:
    path.write_bytes(data)
    return np.asarray(read_image(path, **options))


def reason(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    with pytest.raises(ImageReadError) as caught:
        read_image(path)
    return str(caught.value)


# --- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "shift"), [(255, 0), (256, 2), (1023, 2), (1024, 4), (4095, 4), (10_000, 6), (16_384, 8), (65_535, 8)]
)
def test_eight_bits__keeps_the_highest_of_the_bits_in_use(top: int, shift: int) -> None:
    values = np.array([0, top // 3, top], dtype=np.uint16)
    assert eight_bits(values).tolist() == (values >> shift).tolist()


def test_eight_bits__of_a_white_value() -> None:
    values = np.array([0, 1500, 3000, 9000], dtype=np.uint16)
    assert eight_bits(values, 3000).tolist() == [0, 128, 255, 255]
    assert eight_bits(np.array([-0.5, 0.1, 0.4]), 0.2).tolist() == [0, 128, 255]


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
def test_wide_png__twelve_bits_in_sixteen_are_not_black(tmp_path: Path, samples: int) -> None:
    values = ramp(samples, 0x0FFF)
    if samples in (2, 4):
        values[..., -1] = 0x0FFF
    found = read(tmp_path / "a.png", wide_png(values))
    colours = values[..., : samples - (samples in (2, 4))]
    assert (found == (colours >> 4)).all()
    assert (read(tmp_path / "a.png", wide_png(values), white_value=0x0FFF)[0, 0] == 255).all()


def test_wide_png__transparency_lies_on_white(tmp_path: Path) -> None:
    values = np.zeros((1, 3, 4), np.uint16)
    values[0, :, 3] = [0, 0xFFFF, 0x8000]
    assert read(tmp_path / "a.png", wide_png(values))[0, :, 0].tolist() == [255, 0, 127]


def test_wide_png__colour_key_of_sixteen_bits(tmp_path: Path) -> None:
    values = np.array([[[0x1234, 2, 3], [0x1235, 2, 3], [0xFFFF, 0, 0]]], np.uint16)
    found = read(tmp_path / "a.png", wide_png(values, chunk(b"tRNS", struct.pack(">3H", 0x1234, 2, 3))))
    assert found.tolist() == [[[255] * 3, [0x12, 0, 0], [255, 0, 0]]]


# --- TIFF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("layout", ["strips", "tiles"])
@pytest.mark.parametrize("packed", ["plain", "deflated", "predicted"])
@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "f2", "f4", "f8"])
def test_tiff__three_channels(
    tmp_path: Path, dtype: str, planar: bool, packed: str, layout: str, big_endian: bool
) -> None:
    values = ramp(3, 1000, np.dtype(dtype))
    if values.dtype.kind == "f":
        values /= 1000
    data = tiff_of(
        values,
        photometric=2,
        planar=planar,
        predictor=2 if packed == "predicted" else 1,
        deflated=packed != "plain",
        tile=16 if layout == "tiles" else 0,
        big_endian=big_endian,
    )
    assert (read(tmp_path / "a.tif", data) == eight_bits(values)).all()


def test_tiff__planes_of_eight_bits(tmp_path: Path) -> None:
    values = ramp(3, 255, np.uint8)
    assert (read(tmp_path / "a.tif", tiff_of(values, photometric=2, planar=True)) == values).all()


@pytest.mark.parametrize("planar", [False, True])
def test_tiff__grey_and_alpha(tmp_path: Path, planar: bool) -> None:
    values = ramp(2)
    values[..., 1] = 0xFFFF
    values[3, 4, 1] = 0
    found = read(tmp_path / "a.tif", tiff_of(values, photometric=1, extra=[2], planar=planar))
    expected = (values[..., :1] >> 8).repeat(3, axis=2)
    expected[3, 4] = 255
    assert (found == expected).all()


def test_tiff__premultiplied_alpha_and_channels_that_are_none(tmp_path: Path) -> None:
    values = np.array([[[0, 0, 0, 0], [0x8000, 0, 0, 0x8000]]], np.uint16)
    assert read(tmp_path / "a.tif", tiff_of(values, photometric=2, extra=[1])).tolist() == [
        [[255] * 3, [255, 127, 127]]
    ]
    five = ramp(5)
    assert (read(tmp_path / "a.tif", tiff_of(five, photometric=2, extra=[0, 0])) == five[..., :3] >> 8).all()


def test_tiff__white_is_0_and_turned(tmp_path: Path) -> None:
    values = ramp(2)
    values[..., 1] = 0xFFFF
    found = read(tmp_path / "a.tif", tiff_of(values, photometric=0, extra=[0], tags={274: [6]}))
    assert (found[..., 0] == np.rot90(255 - (values[..., 0] >> 8), -1)).all()


def test_tiff__ink(tmp_path: Path) -> None:
    values = np.zeros((2, 2, 4), np.uint16)
    values[..., 1:3] = 0xFFFF
    assert (read(tmp_path / "a.tif", tiff_of(values, photometric=5)) == (255, 0, 0)).all()
    # How much ink is full is not told by the most there is, as white is of other images, but can be said.
    values[..., 1:3] = 0x0FFF
    assert (read(tmp_path / "a.tif", tiff_of(values, photometric=5)) == (255, 239, 239)).all()
    assert (read(tmp_path / "a.tif", tiff_of(values, photometric=5), white_value=0x0FFF) == (255, 0, 0)).all()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (tiff_of(ramp(4), photometric=1, extra=[0, 0, 0]), "a TIFF with 4 channels of 16 bits, grey"),
        (tiff_of(ramp(3), photometric=2, tags={277: [60_000]}), "a TIFF with 60000 channels of 16 bits, RGB"),
        (tiff_of(ramp(3), photometric=2, tile=16, tags={322: [2**24]}), "in tiles of 16777216 x 16 pixels"),
        (tiff_of(ramp(3), photometric=8), "a TIFF with 3 channels of 16 bits, Lab"),
        (tiff_of(ramp(3), photometric=2, tags={259: [7]}), "compression jpeg"),
        (tiff_of(ramp(3), photometric=2, tags={259: [65_000]}), "compression number 65000"),
        (tiff_of(ramp(3, dtype=np.uint64), photometric=2), "a TIFF with 3 channels of 64 bits, RGB"),
        (tiff_of(ramp(4, 255, np.uint8), photometric=1), "a TIFF with 4 channels of 8 bits, grey"),
    ],
)
def test_tiff__what_is_not_read_is_called_what_it_is(tmp_path: Path, data: bytes, said: str) -> None:
    found = reason(tmp_path / "a.tif", data)
    assert said in found
    assert "which is not supported" in found
    assert "damaged" not in found


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("deflated", [False, True])
def test_tiff__a_cut_one_is_refused(tmp_path: Path, planar: bool, deflated: bool) -> None:
    data = tiff_of(ramp(3), photometric=2, planar=planar, deflated=deflated)
    directory = struct.unpack("<I", data[4:8])[0]
    for keep in (0.1, 0.5, 0.95):
        kept = round(directory * keep)
        moved = data[:4] + struct.pack("<I", kept) + data[8:kept] + data[directory:]
        assert reason(tmp_path / "a.tif", moved)
    missing = tiff_of(ramp(3), photometric=2, planar=planar, tags={278: [1]})
    assert reason(tmp_path / "a.tif", missing) == "truncated file"


# --- the shared cases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [("rgb16_planar.tif", "rgb16_chunky.tif"), ("grey_12_of_16_bits.png", "grey_16_bits.png")],
)
def test_shared_cases__are_read_alike(one: str, other: str) -> None:
    if not (SHARED / one).is_file():
        pytest.skip(f"no {one} in FINEALIGN_SHARED")
    assert (np.asarray(read_image(SHARED / one)) == np.asarray(read_image(SHARED / other))).all()


def test_shared_cases__grey_and_alpha() -> None:
    if not (SHARED / "grey_alpha_16.tif").is_file():
        pytest.skip("no grey_alpha_16.tif in FINEALIGN_SHARED")
    found = np.asarray(read_image(SHARED / "grey_alpha_16.tif"))
    assert found.shape == (96, 96, 3) and found.std() > 10


def test_pillow__still_needs_this(tmp_path: Path) -> None:
    """Where Pillow reads 16 bits in planes by itself, ``channels`` can shrink."""
    data = tiff_of(ramp(3), photometric=2, planar=True)
    with Image.open(io.BytesIO(data)) as image:
        assert (np.asarray(image) != ramp(3) >> 8).any()
