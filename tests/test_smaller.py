"""A JPEG far larger than it is needed is decoded smaller, and looks as if it was not."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from finealign.errors import ImageInputError
from finealign.images.channels import UPRIGHT
from finealign.images.decoding import Pixels, decode_image, read_image, read_photo, to_photo

SIZE = (1300, 800)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Edges, gradients and noise, as photos have."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (40, 65, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.int64)
    smooth = smooth + generator.integers(-25, 26, (SIZE[1], SIZE[0], 1))
    smooth[200:500, 300:700:9] = 255
    return Image.fromarray(smooth.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.7))


def far(first: Pixels, second: Pixels) -> float:
    """The mean difference of two images of the same size."""
    return float(np.abs(first.astype(int) - second).mean())


@pytest.mark.parametrize(
    ("side", "mode", "progressive"), [(50, "RGB", False), (100, "RGB", True), (199, "L", False), (199, "CMYK", True)]
)
def test_read_photo__decoded_smaller_is_nearly_the_same(
    picture: Image.Image, tmp_path: Path, side: int, mode: str, progressive: bool
) -> None:
    """It differs by much less than if it were shifted by a pixel."""
    path = tmp_path / "a.jpg"
    picture.convert(mode).save(path, quality=90, progressive=progressive)
    with path.open("rb") as file:
        assert min(decode_image(file, shorter_side=side).size) in range(2 * side, 800)  # smaller, and large enough
    found, whole = read_photo(path, shorter_side=side), to_photo(read_image(path), shorter_side=side)
    assert (found.width, found.height) == (whole.width, whole.height) == SIZE
    assert found.pixels.shape == whole.pixels.shape and min(found.pixels.shape[:2]) == side
    assert far(found.pixels, whole.pixels) < 0.3 * far(np.roll(whole.pixels, 1, axis=1), whole.pixels)


@pytest.mark.parametrize("orientation", [1, *UPRIGHT])
@pytest.mark.parametrize("size", [SIZE, (1300, 1299)])
def test_read_photo__decoded_smaller_is_upright_and_knows_its_size(
    picture: Image.Image, tmp_path: Path, orientation: int, size: tuple[int, int]
) -> None:
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[0x0112] = orientation
    picture.resize(size).save(path, exif=exif)
    found, whole = read_photo(path, shorter_side=60), to_photo(read_image(path), shorter_side=60)
    assert (found.width, found.height) == (whole.width, whole.height)
    assert sorted((found.width, found.height)) == sorted(size)
    assert found.pixels.shape == whole.pixels.shape
    assert far(found.pixels, whole.pixels) < 0.3 * far(np.roll(whole.pixels, 1, axis=1), whole.pixels)


@pytest.mark.parametrize(("side", "ending"), [(None, "jpg"), (401, "jpg"), (50, "png")])
def test_read_photo__is_decoded_whole_where_that_is_needed(
    picture: Image.Image, tmp_path: Path, side: int | None, ending: str
) -> None:
    path = tmp_path / f"a.{ending}"
    picture.save(path)
    with path.open("rb") as file:
        decoded = decode_image(file, shorter_side=side)
    assert decoded.size == SIZE and decoded.info == {}
    np.testing.assert_array_equal(
        read_photo(path, shorter_side=side).pixels, to_photo(read_image(path), shorter_side=side).pixels
    )


def test_decode_image__limits_are_those_of_the_whole_image(picture: Image.Image) -> None:
    content = io.BytesIO()
    told: list[int] = []
    picture.save(content, "JPEG")
    decode_image(content, shorter_side=50, before=told.append)
    assert told == [1300 * 800]
    with pytest.raises(ImageInputError, match="1300 x 800 pixels, over the limit"):
        decode_image(content, shorter_side=50, max_pixels=1300 * 800 - 1)


def test_decode_image__a_file_cut_short_is_still_refused(picture: Image.Image, tmp_path: Path) -> None:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=95)
    path = tmp_path / "cut.jpg"
    path.write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
    with pytest.raises(ImageInputError, match="truncated"):
        read_photo(path, shorter_side=50)
