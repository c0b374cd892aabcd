"""Images that are no files: in memory, in Hugging Face and PyTorch datasets. They are read as the same files are."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset, IterableDataset

from conftest import CLASSES, tiny_config, write_photos
from finealign import FineAlign, adapt_into
from finealign.errors import ImageInputError, OutputError
from finealign.images.decoding import read_image
from finealign.images.files import ImageReadError
from finealign.images.held import Images
from finealign.images.listing import list_images
from finealign.images.sources import find_images
from finealign.run.adapt import default_folder
from finealign.types import HeldImage
from test_cli import command

datasets = pytest.importorskip("datasets")
Tiny = Callable[[str], str]
ROWS, COLUMNS = 5, 7


class Pairs(Dataset[Any]):
    """A PyTorch dataset of ``(image, label)`` that counts how often it is asked."""

    def __init__(self, images: list[Any]) -> None:
        self.images, self.asked = images, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        self.asked += 1
        return self.images[index], index


class Iterated(Pairs):
    """One that can be gone through as well, which would be to read all of it."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("gone through")


class Lists(Pairs):
    def __getitem__(self, index: int) -> Any:
        return list(super().__getitem__(index))


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        yield from (ramp(), ramp())


def ramp(channels: int = 3, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    values = np.arange(ROWS * COLUMNS * channels).reshape(ROWS, COLUMNS, channels)
    return (values * 2).astype(dtype)


def pixels(images: Images, **how: Any) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(read_image(path, **how)) for path in find_images(images)]


def read(image: Any, **how: Any) -> np.ndarray[Any, Any]:
    (found,) = pixels([image], **how)
    return found


def rows_of(paths: list[Path]) -> Any:
    rows = datasets.Dataset.from_dict({"image": [str(path) for path in paths], "label": list(range(len(paths)))})
    return rows.cast_column("image", datasets.Image())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("held") / "photos", each=2)


@pytest.fixture(scope="module")
def model(photos: Path, tiny_backbone: Tiny) -> FineAlign:
    return FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"), training__epochs=1)).fit(photos)


@pytest.fixture(scope="module")
def saved(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with two splits, each with the bytes of its files, as ``save_to_disk`` writes them."""
    rows = rows_of(list(list_images(photos)))
    folder = tmp_path_factory.mktemp("datasets") / "saved"
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(folder)
    (folder / "hub").mkdir()
    rows.to_parquet(folder / "hub" / "train.parquet")
    return folder


# --- one image --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint16, np.int32])
def test_array__whole_numbers_of_eight_bits_are_kept(dtype: Any) -> None:
    np.testing.assert_array_equal(read(ramp(dtype=dtype)), ramp())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_array__floats_reach_from_black_to_white(dtype: Any) -> None:
    np.testing.assert_array_equal(read((ramp() / 255).astype(dtype)), ramp())


def test_array__grey_is_grey_and_bool_black_and_white() -> None:
    grey = ramp(1)
    for image in (grey, grey[..., 0]):
        np.testing.assert_array_equal(read(image), grey.repeat(3, axis=2))
    assert np.unique(read(grey[..., 0] > 20)).tolist() == [0, 255]


def test_array__transparency_lies_on_white() -> None:
    clear = np.concatenate([ramp(), np.zeros((ROWS, COLUMNS, 1), np.uint8)], axis=2)
    assert (read(clear) == 255).all()
    clear[..., 3] = 255
    np.testing.assert_array_equal(read(clear), ramp())


def test_array__sixteen_bits_are_read_as_a_file_of_them(tmp_path: Path) -> None:
    deep = (np.arange(ROWS * COLUMNS) * 100).astype(np.uint16).reshape(ROWS, COLUMNS)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for white in ("auto", 2000.0):
        from_file = np.asarray(read_image(tmp_path / "deep.png", white_value=white))
        np.testing.assert_array_equal(read(deep, white_value=white), from_file)


def test_tensor__channels_come_first() -> None:
    tensor = torch.from_numpy(ramp()).permute(2, 0, 1)
    for image in (tensor, tensor / 255, (tensor / 255).requires_grad_(), tensor.long()):
        np.testing.assert_array_equal(read(image), ramp())
    assert np.abs(read((tensor / 255).bfloat16()).astype(int) - ramp()).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_pil__is_read_as_its_file(tmp_path: Path, mode: str) -> None:
    """Opened and not loaded, loaded, or made in memory."""
    made = Image.fromarray(ramp()).convert("L" if mode in ("I;16", "I", "F") else "RGB").convert(mode)
    path = tmp_path / "image.tif"
    made.save(path)
    expected = np.asarray(read_image(path))
    with Image.open(path) as opened:
        np.testing.assert_array_equal(read(opened), expected)
        assert opened.tile  # its pixels do not stay in the caller's memory
        opened.load()
        np.testing.assert_array_equal(read(opened), expected)
    np.testing.assert_array_equal(read(made), expected)


def test_pil__what_was_drawn_on_it_is_seen(tmp_path: Path) -> None:
    Image.fromarray(ramp()).save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        ImageDraw.Draw(image).rectangle((0, 0, COLUMNS, ROWS), fill=(9, 8, 7))
        assert (read(image) == (9, 8, 7)).all()


def test_pil__is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(ramp()).save(file, "PNG", exif=exif)
    image = Image.open(file)
    np.testing.assert_array_equal(read(image), np.rot90(ramp(), -1))
    image.load()
    np.testing.assert_array_equal(read(image), np.rot90(ramp(), -1))


def test_bytes__are_those_of_a_file() -> None:
    file = io.BytesIO()
    Image.fromarray(ramp()).save(file, "PNG")
    np.testing.assert_array_equal(read(file.getvalue()), ramp())
    np.testing.assert_array_equal(read({"bytes": file.getvalue(), "path": "x.png"}), ramp())


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "None, which is no image"),
        (3, "an int, which is no image"),
        ([ramp()], "a list, which is no image"),
        (b"", "empty file"),
        (b"text", "not an image"),
        (ramp().transpose(2, 0, 1), r"shape \(3, 5, 7\); wanted \(H, W, 3\).*give image.transpose\(1, 2, 0\)"),
        (torch.from_numpy(ramp()), r"shape \(5, 7, 3\); wanted \(3, H, W\).*give image.permute\(2, 0, 1\)"),
        (ramp(2), r"shape \(5, 7, 2\)"),
        (np.zeros((0, 4, 3)), "no pixel"),
        (ramp() / 2.0, r"floats from 0 to 104; wanted \[0, 1\]"),
        (torch.linspace(-2, 2, 75).reshape(3, 5, 5), "floats from -2 to 2; wanted"),
        (np.full((4, 4), np.nan), "not finite"),
        (ramp().astype(complex), "an array of complex128"),
        (np.full((4, 4), 2**40), "at most 32 bits"),
    ],
)
def test_read__what_is_no_image_says_why(image: Any, reason: str) -> None:
    with pytest.raises(ImageReadError, match=reason):
        read(image)


def test_read__an_image_that_was_closed_says_so() -> None:
    kept = io.BytesIO()
    Image.fromarray(ramp()).save(kept, "PNG")
    with Image.open(kept) as closed:
        pass
    emptied = Image.open(kept)
    kept.close()
    for image in (closed, emptied):
        with pytest.raises(ImageReadError, match="closed before its pixels were read"):
            read(image)


# --- several images ---------------------------------------------------------------------------------------------------


def test_find_images__what_stands_for_several(tmp_path: Path) -> None:
    images = [ramp(), 255 - ramp(), ramp() // 2]
    batch, channels_first = np.stack(images), torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    path = tmp_path / "image.png"
    Image.fromarray(images[1]).save(path)
    column = np.empty(3, dtype=object)
    column[:] = [Image.fromarray(image) for image in images]
    for several in (
        images,
        tuple(images),
        (image for image in images),
        batch,
        channels_first,
        column,
        [images[0], str(path), torch.from_numpy(images[2]).permute(2, 0, 1)],
        [(image, "a label") for image in images],
        Pairs(images),
        Lists(images),
        torch.utils.data.Subset(Pairs([None, *images]), [1, 2, 3]),
        [{"image": image, "label": 1} for image in images],
    ):
        np.testing.assert_array_equal(np.stack(pixels(several)), batch)
    assert len(find_images(Endless())) == 2


def test_find_images__one_image_is_one() -> None:
    for image in (ramp(), ramp()[..., 0], torch.zeros(3, 4, 4), Image.fromarray(ramp()), b"bytes"):
        assert [str(found) for found in find_images(image)] == ["image 0"]


def test_find_images__names_and_order() -> None:
    found = find_images([ramp(), "b.png", ramp(), Path("a.png")])
    assert [str(path) for path in found] == ["image 0", "b.png", "image 2", "a.png"]
    assert found[0] == find_images(found)[0] != found[2]
    assert found[1:3] == [found[1], found[2]]
    assert find_images(["b.png", "a.png"]) == [Path("b.png"), Path("a.png")]


def test_dataset__is_asked_by_index_even_where_it_could_be_gone_through() -> None:
    assert len(pixels(Iterated([ramp(), ramp()]))) == 2


def test_find_images__a_dataset_is_asked_when_an_image_is_read() -> None:
    pairs = Pairs([ramp(), ramp()])
    found = find_images(pairs)
    assert (len(found), pairs.asked) == (2, 0)
    read_image(found[1])
    assert pairs.asked == 1


def test_find_images__memory_is_shared() -> None:
    batch = np.zeros((3, 8, 8, 3), np.uint8)
    found = find_images(batch)
    batch[1] = 200
    assert np.asarray(read_image(found[1])).min() == 200


@pytest.mark.parametrize(
    ("images", "told"),
    [
        ([], "empty"),
        (iter(()), "empty"),
        (None, "Found None, wanted paths, PIL images"),
        (5, "Found an int"),
        ({"a", "b"}, "order is not fixed"),
        ({"train": [ramp()]}, r"images\['train'\]"),
        (ramp().transpose(2, 0, 1), r"transpose\(1, 2, 0\)"),
        (np.zeros((2, 3, 8, 8)), r"transpose\(1, 2, 0\)"),
        (torch.zeros(2, 8, 8, 3), r"permute\(2, 0, 1\)"),
        (np.zeros((9, 28, 28)), r"shape \(9, 28, 28\)"),
        (np.zeros(5), r"shape \(5,\)"),
        (DataLoader(Pairs([ramp()])), "loader.dataset"),
        (io.BytesIO(b"x"), r"file.read\(\)"),
    ],
)
def test_find_images__what_is_unclear_is_refused(images: Any, told: str) -> None:
    with pytest.raises(ImageInputError, match=told):
        find_images(images)


def test_find_images__a_table_is_refused_and_its_column_taken() -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"path": ["a.png", "b.png"]}, index=[7, 3])
    with pytest.raises(ImageInputError, match=r"columns 'path'"):
        find_images(table)
    assert find_images(table["path"]) == [Path("a.png"), Path("b.png")]


# --- the classifier ---------------------------------------------------------------------------------------------------


def test_fit__on_arrays_is_the_fit_on_their_files(photos: Path, model: FineAlign) -> None:
    arrays = [np.asarray(read_image(path)) for path in list_images(photos)]
    again = FineAlign(CLASSES, config=model.config).fit(np.array([*arrays, None], dtype=object)[:-1])
    np.testing.assert_array_equal(again.predict_proba(arrays), model.predict_proba(photos))
    assert [str(path) for path in again.paths_] == [f"image {index}" for index in range(len(arrays))]


def test_predict__takes_what_fit_takes(photos: Path, model: FineAlign) -> None:
    paths = list_images(photos)
    expected = model.predict_proba(photos)
    opened = [Image.open(io.BytesIO(path.read_bytes())) for path in paths]
    for images in (opened, Pairs(opened), rows_of(list(paths)), rows_of(list(paths)).to_iterable_dataset()):
        np.testing.assert_array_equal(model.predict_proba(images), expected)
    assert model.predict(opened[0]).tolist() == model.predict([paths[0]]).tolist()
    np.testing.assert_array_equal(model.explain(opened[0]).probabilities, model.explain(paths[0]).probabilities)
    np.testing.assert_array_equal(model.features(opened)[0].weak, model.features(paths)[0].weak)
    streamed = list(model.iter_predictions(image for image in opened))
    assert [str(outcome.path) for outcome in streamed] == [f"image {index}" for index in range(len(paths))]


def test_predict__what_cannot_be_read_is_told_by_its_index(model: FineAlign) -> None:
    class Broken(Pairs):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            if index == 1:
                raise RuntimeError("disk is on fire")
            return super().__getitem__(index)

    with pytest.warns(UserWarning, match="1 of 3 images"):
        labels = model.predict(Broken([ramp(), ramp(), ramp()]))
    assert [label is None for label in labels] == [False, True, False]
    assert [(row.path, row.reason) for row in model.set_aside_] == [
        ("image 1", "its dataset raises RuntimeError: disk is on fire")
    ]


def test_explain__takes_one_image(model: FineAlign) -> None:
    with pytest.raises(ImageInputError, match="Found 2 images"):
        model.explain([ramp(), ramp()])
    with pytest.raises(ImageInputError, match="Cannot explain 'image 0': floats"):
        model.explain(ramp() / 2.0)


def test_adapt_into__of_images_in_memory(photos: Path, model: FineAlign, tmp_path: Path) -> None:
    images: list[Any] = [np.asarray(read_image(path)) for path in list_images(photos)]
    images.insert(2, None)
    folder = tmp_path / "run"
    untrained = FineAlign(CLASSES, config=model.config)
    summary = adapt_into(folder, untrained, images)
    assert [(row.path, row.reason) for row in summary.set_aside] == [("image 2", "None, which is no image")]
    with (folder / "predictions.csv").open(encoding="utf-8", newline="") as table:
        assert [row["path"] for row in csv.DictReader(table)] == [f"image {n}" for n in range(7) if n != 2]
    listed = json.loads((folder / "examples" / "examples.json").read_text(encoding="utf-8"))
    assert listed["unsure"] and all(
        (folder / "examples" / example["picture"]).is_file() for example in listed["unsure"]
    )
    images[0] = 255 - images[0]
    with pytest.raises(OutputError, match="other images"):
        adapt_into(folder, FineAlign(CLASSES, config=model.config), images, resume=True)


# --- Hugging Face datasets --------------------------------------------------------------------------------------------


def test_dataset__rows_are_the_bytes_of_their_files(photos: Path) -> None:
    paths = list(list_images(photos))
    found = find_images(rows_of(paths))
    assert all(isinstance(path, HeldImage) for path in found)
    with found[3].collection.open(3) as file:  # type: ignore[union-attr]
        assert file.read() == paths[3].read_bytes()


def test_dataset__columns(photos: Path) -> None:
    rows = rows_of(list(list_images(photos)))
    second = rows.add_column("mask", rows.with_format(None)["label"]).remove_columns("mask")
    with pytest.raises(ImageInputError, match="no column of images; its columns are label"):
        find_images(rows.remove_columns("image"))
    renamed = second.rename_column("image", "photo")
    assert len(find_images(renamed)) == len(rows)
    both = datasets.concatenate_datasets(
        [renamed, renamed.rename_column("photo", "mask").remove_columns("label")], axis=1
    )
    assert len(find_images(both.rename_column("photo", "img"))) == len(rows), "of several the one called as usual"
    with pytest.raises(ImageInputError, match="2 columns of images: photo, mask"):
        find_images(both)
    with pytest.raises(ImageInputError, match="splits train"):
        find_images(datasets.DatasetDict(train=rows))
    with pytest.raises(ImageInputError, match="no rows"):
        find_images(rows.select([]))


def test_dataset__by_name(saved: Path, photos: Path) -> None:
    expected = pixels(photos)
    by_hub = f"hf:{saved}/hub"
    for source in (str(saved / "train"), saved / "train", by_hub, f"{by_hub}:train", f"{by_hub}:default:train"):
        for mine, theirs in zip(pixels(source), expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert [str(path) for path in find_images(f"{by_hub}:train")][:2] == ["train/0", "train/1"]
    assert len(find_images(f"{by_hub}:train[:2]")) == 2


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{saved}", r"several splits. Valid: '.*saved/train', '.*saved/test'"),
        ("hf:{saved}/hub:tset", r"no split 'tset'. Valid: 'hf:.*:train'"),
        ("hf:{saved}/nothing", r"cannot be loaded \(.*Wanted: hf:NAME:SPLIT"),
        ("hf:", "wanted hf:NAME:SPLIT"),
        ("hf:a:b:c:d", "wanted hf:NAME:SPLIT"),
    ],
)
def test_dataset__that_is_not_there_is_told(saved: Path, source: str, told: str) -> None:
    with pytest.raises(ImageInputError, match=told):
        find_images(source.format(saved=saved))


def test_dataset__needs_the_extra(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImageInputError, match=r"pip install 'finealign\[datasets\]'"):
        find_images("hf:food101")
    with pytest.raises(ImageInputError, match=r"pip install 'finealign\[datasets\]'"):
        find_images(saved)


def test_dataset__excludes_nothing_by_name(saved: Path) -> None:
    with pytest.raises(ImageInputError, match="--exclude"):
        find_images(saved / "train", exclude=["*.png"])


def test_default_folder__of_a_dataset(model: FineAlign) -> None:
    assert default_folder("hf:ethz/food101:train[:5%]", model.config_).name == "ethz-food101-train-5-fair-seed0"


def test_commands__adapt_and_predict_on_a_dataset(saved: Path, tmp_path: Path, tiny_backbone: Tiny) -> None:
    run = str(tmp_path / "run")
    names, backbone = ",".join(CLASSES), tiny_backbone("transformer")
    small = ["--set", "training.epochs=1", "--set", "views.crops=2", "--set", "prediction.calibrate=false"]
    done = command(
        "adapt", f"hf:{saved}/hub:train", "--classes", names, "--backbone", backbone, *small, "--out", run, "--json"
    )
    assert json.loads(done.stdout)["images"] == 6
    report = (Path(run) / "report.html").read_text(encoding="utf-8")
    assert "train/" in report and "data:image/jpeg" in report
    found = json.loads(command("predict", run, str(saved / "train"), "--json").stdout)
    assert [row["path"] for row in found["predictions"]] == [f"train/{index}" for index in range(6)]
