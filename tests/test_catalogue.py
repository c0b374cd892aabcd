"""The catalogue's own texts, and every layout a set may have on disk, made here of tiny pictures; no network."""

import io
import json
import pickle
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finealign.benchmark.catalogue import DATA_SETS, DPA_TABLE, DataSet, LabelledSet, load_set, readable
from finealign.errors import FinealignError, ImageInputError
from finealign.images.decoding import read_image
from finealign.texts.names import fold
from finealign.texts.prompts import DEFAULT_TEMPLATES, make_texts

DESCRIBED = [
    "dtd", "eurosat", "fgvc_aircraft", "food101", "flowers102", "oxford_pets", "cifar10", "cifar100", "ucf101",
    "cub200", "resisc45", "gtsrb",
]  # fmt: skip
Expected = tuple[set[str], dict[str, str]]  # images to learn from; test images with the name of their class

every_set = pytest.mark.parametrize("found", DATA_SETS.values(), ids=DATA_SETS)
every_described = pytest.mark.parametrize("found", [DATA_SETS[name] for name in DESCRIBED], ids=DESCRIBED)


def picture(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 40, 40)).save(file, kind)
    return file.getvalue()


PNG = picture()


def put(root: Path, paths: Iterable[str], content: bytes = PNG) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def seen(found: LabelledSet, root: Path) -> Expected:
    """What a loaded set holds; learning sees bare paths, and every image can be read."""
    assert {field.name for field in fields(found)} == {"name", "unlabelled", "test", "texts", "described"}
    assert all(isinstance(path, Path) for path in found.unlabelled)
    for path in {*found.unlabelled[:50], *found.test.paths[:50]}:
        assert read_image(path).size
    named = [found.texts.classes[label] for label in found.test.labels]
    test = {path.relative_to(root).as_posix(): name for path, name in zip(found.test.paths, named, strict=True)}
    assert len(test) == len(found.test.paths)
    assert len(set(found.unlabelled)) == len(found.unlabelled)
    return {path.relative_to(root).as_posix() for path in found.unlabelled}, test


def named(dataset: str, label: str) -> str:
    return next(str(entry["name"]) for entry in DATA_SETS[dataset].texts if entry["label"] == label)


# --- the entries and their texts --------------------------------------------------------------------------------------


def test_catalogue__the_sets_of_the_published_table_in_its_order() -> None:
    assert DPA_TABLE == (
        "imagenet", "caltech101", "dtd", "eurosat", "fgvc_aircraft", "food101", "flowers102", "oxford_pets", "sun397",
        "stanford_cars", "cifar10", "cifar100", "ucf101",
    )  # fmt: skip
    assert [name for name, one in DATA_SETS.items() if one.texts] == DESCRIBED
    for name, one in DATA_SETS.items():
        listed = json.loads(json.dumps(one.as_json()))
        assert (listed["name"], listed["described"]) == (name, name in DESCRIBED)
        assert listed["classes"] == one.classes > 1


@every_described
def test_texts__one_entry_a_class_and_no_two_alike(found: DataSet) -> None:
    assert len(found.texts) == found.classes
    assert len({entry["label"] for entry in found.texts}) == found.classes
    assert len({fold(entry["name"]) for entry in found.texts}) == found.classes
    texts = make_texts(
        [entry["name"] for entry in found.texts], {entry["name"]: entry["descriptions"] for entry in found.texts}
    )
    assert [list(sentences) for sentences in texts.descriptions] == [entry["descriptions"] for entry in found.texts]


@every_described
def test_texts__descriptions_are_distinct_sentences_that_name_their_class(found: DataSet) -> None:
    sentences = [sentence for entry in found.texts for sentence in entry["descriptions"]]
    assert [text for text, times in Counter(map(fold, sentences)).items() if times > 1] == []
    assert [entry["label"] for entry in found.texts if len(entry["descriptions"]) < 5] == []
    for entry in found.texts:
        assert [text for text in entry["descriptions"] if fold(entry["name"]) not in fold(text)] == []
    assert [text for text in sentences if not 6 <= len(text.split()) <= 30] == []
    assert [text for text in sentences if any(unicodedata.category(one)[0] == "C" for one in text)] == []


def test_texts__fit_into_clips_77_tokens() -> None:
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    texts = [sentence for one in DATA_SETS.values() for entry in one.texts for sentence in entry["descriptions"]]
    assert len(texts) > 4000
    assert [text for text in texts if len(tokenizer.encode(text)) + 2 > 77] == []


def test_texts__are_in_the_package() -> None:
    root = Path(__file__).parents[1]
    with (root / "pyproject.toml").open("rb") as file:
        globs = tomllib.load(file)["tool"]["setuptools"]["package-data"]["finealign"]
    package = root / "src" / "finealign"
    packed = {path for glob in globs for path in package.glob(glob)}
    assert {package / "benchmark" / "texts" / f"{name}.json" for name in DESCRIBED} <= packed


# --- plain class folders ----------------------------------------------------------------------------------------------


@every_described
@pytest.mark.parametrize("spelling", ["label", "name"])
def test_class_folders__each_finds_its_own_texts(found: DataSet, spelling: str, tmp_path: Path) -> None:
    folders = {entry[spelling].replace("/", "_"): entry["name"] for entry in found.texts}
    put(tmp_path / found.name, ["train/any/0.png", *(f"test/{folder}/0.png" for folder in folders)])
    loaded = load_set(found.name, tmp_path)
    unlabelled, test = seen(loaded, tmp_path)
    assert loaded.described
    assert unlabelled == {f"{found.name}/train/any/0.png"}
    assert test == {f"{found.name}/test/{folder}/0.png": name for folder, name in folders.items()}
    by_name = {entry["name"]: tuple(entry["descriptions"]) for entry in found.texts}
    assert loaded.texts.descriptions == tuple(by_name[name] for name in loaded.texts.classes)
    assert loaded.texts.templates == (*DEFAULT_TEMPLATES, found.template)


@pytest.mark.parametrize("name", [name for name in DATA_SETS if name not in [*DESCRIBED, "imagenet"]])
def test_class_folders__of_a_set_without_texts_have_templates(name: str, tmp_path: Path) -> None:
    put(tmp_path / name, [f"{part}/{label}/0.png" for part in ("train", "test") for label in ("Big_one", "small")])
    put(tmp_path / name, ["test/.cache/thumb.png"])
    loaded = load_set(name, tmp_path)
    template = DATA_SETS[name].template
    assert (loaded.name, loaded.texts.classes, loaded.described) == (name, ("Big one", "small"), False)
    assert loaded.texts.templates == (*DEFAULT_TEMPLATES, *([template] if template else []))
    assert loaded.texts.descriptions[1] == tuple(text.replace("{}", "small") for text in loaded.texts.templates)
    assert seen(loaded, tmp_path)[1] == {f"{name}/test/Big_one/0.png": "Big one", f"{name}/test/small/0.png": "small"}


def test_class_folders__one_folder_that_is_no_known_class_takes_templates_for_all(tmp_path: Path) -> None:
    put(tmp_path / "dtd", ["train/banded/0.png", "test/banded/0.png", "test/unheard_of/0.png"])
    loaded = load_set("dtd", tmp_path)
    assert (loaded.texts.classes, loaded.described) == (("banded", "unheard of"), False)


def test_class_folders__are_taken_before_a_split_file(tmp_path: Path) -> None:
    put(tmp_path / "dtd", [f"{part}/{label}/0.png" for part in ("train", "test") for label in ("banded", "dotted")])
    (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").write_text("broken")
    assert seen(load_set("dtd", tmp_path), tmp_path)[0] == {"dtd/train/banded/0.png", "dtd/train/dotted/0.png"}


def test_class_folders__labels_of_the_training_images_change_nothing(tmp_path: Path) -> None:
    test = [f"test/{label}/{i}.png" for label in ("banded", "dotted") for i in range(2)]
    put(tmp_path / "a" / "dtd", ["train/banded/0.png", "train/dotted/1.png", *test])
    put(tmp_path / "b" / "dtd", ["train/0.png", "train/1.png", *test])
    first, second = (load_set("dtd", tmp_path / root) for root in "ab")
    assert len(first.unlabelled) == len(second.unlabelled) == 2
    assert (first.texts, first.test.labels) == (second.texts, second.test.labels) == (first.texts, (0, 0, 1, 1))


# --- the split files of CoOp ------------------------------------------------------------------------------------------

Rows = list[tuple[str, int, str]]
TRAIN: Rows = [("a_1.jpg", 0, "abyssinian"), ("b_1.jpg", 1, "american_bulldog"), ("b_2.jpg", 1, "american_bulldog")]
VAL: Rows = [("c_1.jpg", 2, "beagle")]
TEST: Rows = [("b_3.jpg", 1, "american_bulldog"), ("a_2.jpg", 0, "abyssinian"), ("c_2.jpg", 2, "beagle")]


def write_split(root: Path, split: dict[str, Rows]) -> LabelledSet:
    write(root / "oxford_pets" / "split_zhou_OxfordPets.json", json.dumps(split))
    put(root / "oxford_pets" / "images", [path for rows in split.values() for path, _, _ in rows])
    return load_set("oxford_pets", root)


def test_coop__reads_train_and_test_and_leaves_val_alone(tmp_path: Path) -> None:
    loaded = write_split(tmp_path, {"train": TRAIN, "val": VAL, "test": TEST})
    unlabelled, test = seen(loaded, tmp_path)
    assert unlabelled == {f"oxford_pets/images/{path}" for path in ("a_1.jpg", "b_1.jpg", "b_2.jpg")}
    assert test == {f"oxford_pets/images/{path}": named("oxford_pets", label) for path, _, label in TEST}
    assert loaded.test.labels == (1, 0, 2)
    assert loaded.described


@pytest.mark.parametrize("order", [("train", "val", "test"), ("test", "val", "train")])
def test_coop__labels_of_the_training_images_change_nothing(order: tuple[str, ...], tmp_path: Path) -> None:
    split = {"train": TRAIN, "val": VAL, "test": TEST}
    shuffled: Rows = [(path, *VAL[0][1:]) for path, _, _ in TRAIN]
    original = write_split(tmp_path, split)
    assert write_split(tmp_path, {part: (split | {"train": shuffled})[part] for part in order}) == original


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        "7",
        "{}",
        '{"train": [], "val": []}',
        '{"train": [["a.jpg", 0]], "test": [["b.jpg", 0, "beagle"], ["c.jpg", 1, "pug"]]}',
        '{"train": [], "test": [["b.jpg", "dog", "beagle"], ["c.jpg", 1, "pug"]]}',
        '{"train": [], "test": [[5, 0, "beagle"], ["c.jpg", 1, "pug"]]}',
        '{"train": [], "test": [["b.jpg", 1, "beagle"], ["c.jpg", 2, "pug"]]}',
        '{"train": [], "test": [["b.jpg", 0, "beagle"], ["c.jpg", 2, "pug"]]}',
        "\xff",
    ],
)
def test_coop__a_file_that_is_no_split_says_what_was_wanted(content: str, tmp_path: Path) -> None:
    file = tmp_path / "oxford_pets" / "split_zhou_OxfordPets.json"
    put(tmp_path, ["oxford_pets/split_zhou_OxfordPets.json"], content.encode("latin-1"))
    with pytest.raises(ImageInputError) as raised:
        load_set("oxford_pets", tmp_path)
    assert str(file) in str(raised.value)
    assert '{"train": [[path, label, class name], ...]' in str(raised.value)


def test_coop__aircraft_has_lists_of_which_val_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "fgvc_aircraft"
    numbers = {"train": ["0001", "0002"], "val": ["0003"], "test": ["0004", "0005"]}
    for part, (first, *rest) in numbers.items():
        lines = [f"{first} F-16A/B\n", *(f"{number} DHC-8-100 \n" for number in rest)]
        write(folder / f"images_variant_{part}.txt", "".join(lines))
        put(folder / "images", [f"{number}.jpg" for number in (first, *rest)])
    loaded = load_set("fgvc_aircraft", tmp_path)
    unlabelled, test = seen(loaded, tmp_path)
    assert unlabelled == {"fgvc_aircraft/images/0001.jpg", "fgvc_aircraft/images/0002.jpg"}
    assert test == {
        "fgvc_aircraft/images/0004.jpg": named("fgvc_aircraft", "F-16A/B"),
        "fgvc_aircraft/images/0005.jpg": named("fgvc_aircraft", "DHC-8-100"),
    }
    assert loaded.described
    write(folder / "images_variant_test.txt", "0004 F-16A/B\n0005\n")
    with pytest.raises(ImageInputError, match=r'images_variant_test\.txt is no list of images.*"NUMBER LABEL"'):
        load_set("fgvc_aircraft", tmp_path)


# --- one folder of class folders --------------------------------------------------------------------------------------

SIZES = {
    "001.Black_footed_Albatross": 1,
    "002.Laysan_Albatross": 2,
    "003.Sooty_Albatross": 10,
    "004.Groove_billed_Ani": 31,
}


def test_one_folder__has_our_own_split_which_is_the_same_everywhere(tmp_path: Path) -> None:
    paths = [f"CUB_200_2011/images/{label}/{i}.jpg" for label, size in SIZES.items() for i in range(size)]
    put(tmp_path / "here", paths)
    put(tmp_path / "there", reversed(paths))
    loaded = load_set("cub200", tmp_path / "here")
    unlabelled, test = seen(loaded, tmp_path / "here")
    assert seen(load_set("cub200", tmp_path / "there"), tmp_path / "there") == (unlabelled, test)
    assert not unlabelled & set(test)
    assert unlabelled | set(test) == set(paths)
    assert loaded.described
    assert all(name == named("cub200", path.split("/")[2]) for path, name in test.items())
    assert Counter(path.split("/")[2] for path in test) == dict(zip(SIZES, (1, 1, 3, 10), strict=True))
    # Drawn, not the first of each class: neighbours in a listing are often one animal, one flight, one video.
    chosen = {path for path in test if "004." in path}
    assert chosen != set(sorted(path for path in paths if "004." in path)[:10])


def test_one_folder__leaves_out_what_is_no_class_of_caltech101(tmp_path: Path) -> None:
    labels = ["BACKGROUND_Google", "Faces", "Faces_easy", "airplanes", ".cache"]
    put(tmp_path / "caltech-101" / "101_ObjectCategories", [f"{label}/{i}.jpg" for label in labels for i in range(3)])
    loaded = load_set("caltech101", tmp_path)
    assert loaded.texts.classes == ("Faces", "airplanes")
    assert (len(loaded.unlabelled), loaded.test.labels) == (4, (0, 1))


def test_imagenet__val_is_measured_on_and_wnids_get_names(tmp_path: Path) -> None:
    wnids = [f"n{index:08d}" for index in range(1000)]
    put(tmp_path / "imagenet" / "images", ["train/n00000000/0.jpg", *(f"val/{wnid}/0.jpg" for wnid in wnids)])
    loaded = load_set("imagenet", tmp_path)
    unlabelled, test = seen(loaded, tmp_path)
    assert unlabelled == {"imagenet/images/train/n00000000/0.jpg"}
    assert test["imagenet/images/val/n00000000/0.jpg"] == "tench"
    assert loaded.test.labels == tuple(range(1000))
    assert {"missile", "missile 2"} < set(loaded.texts.classes)  # one name for two classes
    assert (loaded.texts.templates, loaded.described) == (DEFAULT_TEMPLATES, False)


def test_imagenet__with_classes_missing_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "imagenet" / "images", [f"{part}/n{i}/0.jpg" for part in ("train", "val") for i in range(3)])
    with pytest.raises(ImageInputError, match="1000 class folders; found 3"):
        load_set("imagenet", tmp_path)


# --- what torchvision reads -------------------------------------------------------------------------------------------


def dtd(root: Path) -> Expected:
    labels, folder = ["banded", "dotted", "zigzagged"], root / "dtd" / "dtd"
    for part in ("train", "val", "test"):
        write(folder / "labels" / f"{part}1.txt", "".join(f"{label}/{label}_{part}.jpg\n" for label in labels))
        put(folder / "images", [f"{label}/{label}_{part}.jpg" for label in labels])
    path = "dtd/dtd/images/{0}/{0}_{1}.jpg"
    return {path.format(one, "train") for one in labels}, {path.format(one, "test"): one for one in labels}


def food101(root: Path) -> Expected:
    labels, folder = ["apple_pie", "waffles"], root / "food-101"
    for part, number in (("train", 1), ("test", 2)):
        write(folder / "meta" / f"{part}.json", json.dumps({one: [f"{one}/{number}"] for one in reversed(labels)}))
        put(folder / "images", [f"{one}/{number}.jpg" for one in labels])
    return (
        {f"food-101/images/{one}/1.jpg" for one in labels},
        {f"food-101/images/{one}/2.jpg": named("food101", one) for one in labels},
    )


def fgvc_aircraft(root: Path) -> Expected:
    labels, folder = ["F-16A/B", "707-320"], root / "fgvc-aircraft-2013b" / "data"
    write(folder / "variants.txt", "".join(f"{one}\n" for one in labels))
    for part, number in (("trainval", 1), ("test", 2)):
        lines = [f"{number}{index} {one}\n" for index, one in enumerate(labels)]
        write(folder / f"images_variant_{part}.txt", "".join(lines))
        put(folder / "images", [f"{number}{index}.jpg" for index in range(2)])
    images = "fgvc-aircraft-2013b/data/images"
    return (
        {f"{images}/10.jpg", f"{images}/11.jpg"},
        {f"{images}/2{index}.jpg": named("fgvc_aircraft", one) for index, one in enumerate(labels)},
    )


def oxford_pets(root: Path) -> Expected:
    labels, folder = ["Abyssinian", "american_bulldog"], root / "oxford-iiit-pet"
    for part, number in (("trainval", 1), ("test", 2)):
        lines = [f"{one}_{number} {index} 1 1\n" for index, one in enumerate(labels, 1)]
        write(folder / "annotations" / f"{part}.txt", "".join(lines))
        put(folder / "images", [f"{one}_{number}.jpg" for one in labels])
    images = "oxford-iiit-pet/images"
    return (
        {f"{images}/{one}_1.jpg" for one in labels},
        {f"{images}/{one}_2.jpg": named("oxford_pets", one.casefold()) for one in labels},
    )


def gtsrb(root: Path) -> Expected:
    ppm, folder = picture("PPM"), root / "gtsrb"
    put(folder / "GTSRB" / "Training", ["00000/00000_00000.ppm", "00042/00000_00000.ppm"], ppm)
    put(folder / "GTSRB" / "Final_Test" / "Images", ["00000.ppm", "00001.ppm"], ppm)
    write(folder / "GT-final_test.csv", "Filename;ClassId\n00000.ppm;42\n00001.ppm;0\n")
    train, test = "gtsrb/GTSRB/Training", "gtsrb/GTSRB/Final_Test/Images"
    return (
        {f"{train}/00000/00000_00000.png", f"{train}/00042/00000_00000.png"},
        {f"{test}/00000.png": named("gtsrb", "00042"), f"{test}/00001.png": named("gtsrb", "00000")},
    )


@pytest.mark.parametrize("fake", [dtd, food101, fgvc_aircraft, oxford_pets, gtsrb], ids=lambda fake: fake.__name__)
def test_torchvision__layouts_give_images_and_our_texts(fake: Callable[[Path], Expected], tmp_path: Path) -> None:
    expected = fake(tmp_path)
    for _ in range(2):  # the second time with whatever the first has written
        loaded = load_set(fake.__name__, tmp_path)
        assert seen(loaded, tmp_path) == expected
        assert loaded.described


def test_torchvision__sun397_has_no_split_and_gets_ours(tmp_path: Path) -> None:
    write(tmp_path / "SUN397" / "ClassName.txt", "/a/abbey\n/a/apartment_building/outdoor\n")
    paths = [f"SUN397/a/{one}/sun_{i}.jpg" for one in ("abbey", "apartment_building/outdoor") for i in range(6)]
    put(tmp_path, paths)
    loaded = load_set("sun397", tmp_path)
    unlabelled, test = seen(loaded, tmp_path)
    assert Counter(test.values()) == {"abbey": 2, "apartment building outdoor": 2}
    assert all(("abbey" in path) == (name == "abbey") for path, name in test.items())
    assert (unlabelled | set(test), len(unlabelled)) == (set(paths), 8)


def test_torchvision__images_of_an_array_are_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    pixels = {part: np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8) for part in ("train", "test")}
    labels = {"train": [3, 5], "test": [9, 0]}
    (tmp_path / "cifar-10-batches-py").mkdir()

    def dump(name: str, value: dict[str, Any]) -> list[Any]:
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(value))
        return [name, None]

    for part in ("train", "test"):
        entry = {"data": pixels[part], "labels": labels[part]}
        monkeypatch.setattr(CIFAR10, f"{part}_list", [dump(part, entry)])
    dump("meta", {"label_names": [entry["label"] for entry in DATA_SETS["cifar10"].texts]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": None})

    for _ in range(2):
        loaded = load_set("cifar10", tmp_path)
        unlabelled, test = seen(loaded, tmp_path)
        assert len(unlabelled) == 2 and not unlabelled & set(test)
        assert (list(test.values()), loaded.described) == (["truck", "airplane"], True)
        for part, paths in (("train", loaded.unlabelled), ("test", loaded.test.paths)):
            for path, image in zip(paths, pixels[part], strict=True):
                np.testing.assert_array_equal(np.array(read_image(path)), image.reshape(3, 32, 32).transpose(1, 2, 0))


@pytest.mark.parametrize("error", [OSError("HTTP Error 404"), RuntimeError("File not found or corrupted.")])
def test_torchvision__what_cannot_be_fetched_says_where_else(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    asked: list[Any] = []

    def fails(root: str, **arguments: Any) -> None:
        asked.append((root, arguments))
        raise error

    monkeypatch.setattr(datasets, "DTD", fails)
    with pytest.raises(ImageInputError, match=r"cannot fetch DTD.*vgg/data/dtd"):
        load_set("dtd", tmp_path, download=True)
    assert asked == [(str(tmp_path), {"split": "train", "download": True})]


# --- what is not there ------------------------------------------------------------------------------------------------


@every_set
def test_load_set__not_on_disk_names_the_page_and_every_layout(found: DataSet, tmp_path: Path) -> None:
    with pytest.raises(ImageInputError) as raised:
        load_set(found.name, tmp_path)
    message = str(raised.value)
    assert message.startswith(f"{found.title} is not under {tmp_path}.")
    assert found.page.startswith("http") and found.page in message
    assert f"{tmp_path / found.name}/{{train,test}}/<class>/<image>" in message
    if found.coop:
        assert str(tmp_path / found.coop[0] / found.coop[1]) in message
    if found.folders:
        assert f"{tmp_path / found.folders}/<class>/<image>" in message
    if found.lists:
        assert f"{tmp_path.joinpath(*found.lists)}_{{train,test}}.txt" in message
    assert ("--download" in message) == (found.torchvision is not None and found.name != "stanford_cars")
    assert list(tmp_path.iterdir()) == []


def test_load_set__an_unknown_name_lists_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(FinealignError, match=r"Unknown data set 'food-101'\. Did you mean 'food101'") as raised:
        load_set("food-101", tmp_path)
    assert set(str(raised.value).split("Valid: ")[1].rstrip(".").split(", ")) == {*DATA_SETS, "path:DIR"}


# --- a folder of one's own --------------------------------------------------------------------------------------------


def own(folder: Path, paths: Sequence[str], **files: str) -> LabelledSet:
    put(folder, paths)
    for name, text in files.items():
        write(folder / name.replace("__", "."), text)
    return load_set(f"path:{folder}", Path("/nowhere"))


def test_own_folder__with_train_and_test(tmp_path: Path) -> None:
    loaded = own(tmp_path, ["train/SeaLake/0.png", "train/1.png", "test/SeaLake/2.png", "test/bare_land/3.png"])
    unlabelled, test = seen(loaded, tmp_path)
    assert unlabelled == {"train/SeaLake/0.png", "train/1.png"}
    assert test == {"test/SeaLake/2.png": "sea lake", "test/bare_land/3.png": "bare land"}
    assert (loaded.texts.templates, loaded.described) == (DEFAULT_TEMPLATES, False)


def test_own_folder__of_class_folders_alone_is_learned_from_and_measured_on(tmp_path: Path) -> None:
    loaded = own(tmp_path, ["robin/0.png", "wren/1.png", ".thumbs/2.png"])
    assert loaded.unlabelled == loaded.test.paths
    assert seen(loaded, tmp_path)[1] == {"robin/0.png": "robin", "wren/1.png": "wren"}
    assert loaded.texts.classes == ("robin", "wren")


@pytest.mark.parametrize("prefix", ["", "test/"])
def test_own_folder__texts_beside_the_images_are_taken(prefix: str, tmp_path: Path) -> None:
    descriptions = {"robin": ["A robin is red."], "house wren": ["A house wren is brown.", "It is small."]}
    loaded = own(
        tmp_path,
        ["train/0.png", "test/robin/1.png", "test/house_wren/2.png"] if prefix else ["robin/1.png", "house_wren/2.png"],
        classes__txt="robin\nhouse wren\n",
        descriptions__json=json.dumps(descriptions),
        templates__txt="a bird: {}.\n",
    )
    assert loaded.texts.classes == ("robin", "house wren")
    assert loaded.texts.descriptions == (("A robin is red.",), ("A house wren is brown.", "It is small."))
    assert (loaded.texts.templates, loaded.described) == (("a bird: {}.",), True)
    assert seen(loaded, tmp_path)[1] == {f"{prefix}robin/1.png": "robin", f"{prefix}house_wren/2.png": "house wren"}


def test_own_folder__keeps_the_name_it_was_asked_for_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, ["birds/robin/0.png", "birds/wren/0.png"])
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (f"path:{tmp_path}/birds/", "path:~/birds"):  # the table looks cells up by the name the user gave
        assert load_set(name, tmp_path).name == name


def test_own_folder__that_is_missing_says_what_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(ImageInputError, match=r"No folder at .*nothing\. Wanted: train/<class>"):
        load_set(f"path:{tmp_path / 'nothing'}", tmp_path)


# --- readable ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("SeaLake", "sea lake"),
        ("ApplyEyeMakeup", "apply eye makeup"),
        ("apartment_building/outdoor", "apartment building outdoor"),
        ("plain words", "plain words"),
        ("tench", "tench"),
        ("Forest", "Forest"),
        ("DC-10", "DC-10"),
        ("St. Bernard", "St. Bernard"),
        ("BMW X3", "BMW X3"),
        ("McLaren MP4-12C Coupe 2012", "McLaren MP4-12C Coupe 2012"),
        ("MacGillivray_Warbler", "MacGillivray Warbler"),
    ],
)
def test_readable(label: str, words: str) -> None:
    assert readable(label) == words
