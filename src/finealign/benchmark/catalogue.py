"""The data sets that papers of this field report on: where each is found on disk, its classes and its texts.

A set is looked for under the data root in these forms, and the first one present is used: class folders with a split
(``NAME/train/<label>/*`` and ``NAME/test/<label>/*``), the layout and split file that CoOp published
(``FOLDER/split_zhou_*.json``, or lists of images), class folders without a split, and what torchvision reads or
downloads. ``path:DIR`` is a folder of the user's own.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from finealign.backbone.load import imagenet_names
from finealign.errors import FinealignError, ImageInputError, unknown_name
from finealign.evaluate.truth import read_truth
from finealign.images.listing import list_images
from finealign.texts.prompts import DEFAULT_TEMPLATES, make_texts, read_classes, read_descriptions, read_templates
from finealign.types import Texts, Truth

TEST_SHARE = 1 / 3  # of each class's images, where a set comes without a split; drawn with SPLIT_SEED
SPLIT_SEED = 0
NO_CLASS = ("BACKGROUND_Google", "Faces_easy")  # folders of Caltech-101 that papers do not count as classes


@dataclass(frozen=True)
class DataSet:
    """An entry of the catalogue: what is known of a data set without reading it."""

    name: str
    title: str
    classes: int
    template: str  # prompt for its kind of image, used beside the default templates; may be empty
    page: str  # where to get it
    coop: tuple[str, str, str] | None = None  # folder, split file, and the folder that the split's paths start from
    torchvision: tuple[str, dict[str, Any], dict[str, Any]] | None = None  # class; its arguments for train and for test
    folders: str = ""  # folder of class folders without a split, under the data root
    lists: tuple[str, str] | None = None  # folder of images/ and of lists, and how these begin, as variant_

    def as_json(self) -> dict[str, Any]:
        """The entry as JSON values; ``described`` says whether the package has descriptions for it."""
        kind = self.torchvision[0] if self.torchvision else None
        described = len(self.texts) > 0
        return {
            "name": self.name, "title": self.title, "classes": self.classes, "page": self.page, "torchvision": kind,
            "coop_split": f"{self.coop[0]}/{self.coop[1]}" if self.coop else None, "described": described,
        }  # fmt: skip

    @property
    def fetched(self) -> bool:
        """Whether torchvision can download the set. Its source of Stanford Cars no longer exists."""
        return self.torchvision is not None and self.name != "stanford_cars"

    @property
    def texts(self) -> list[dict[str, Any]]:
        """Label, name and descriptions of each class, as they ship with the package; empty for sets without them."""
        return _texts(self.name)


@dataclass(frozen=True)
class LabelledSet:
    """A data set on disk: unlabelled images to adapt to, labelled images to measure on, and the classes' texts."""

    name: str
    unlabelled: tuple[Path, ...]
    test: Truth
    texts: Texts
    described: bool  # whether it has descriptions; without them, filled-in templates are used


_SETS = (
    DataSet("imagenet", "ImageNet", 1000, "",
            "https://www.image-net.org (ILSVRC 2012; train and val as folders of wnids)",
            folders="imagenet/images"),
    DataSet("caltech101", "Caltech-101", 100, "",
            "https://data.caltech.edu/records/mzrjq-6wc02",
            coop=("caltech-101", "split_zhou_Caltech101.json", "101_ObjectCategories"),
            folders="caltech-101/101_ObjectCategories"),
    DataSet("dtd", "DTD", 47, "a photo of a {} texture.", "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
            coop=("dtd", "split_zhou_DescribableTextures.json", "images"),
            torchvision=("DTD", {"split": "train"}, {"split": "test"})),
    DataSet("eurosat", "EuroSAT", 10, "a centered satellite photo of {}.", "https://github.com/phelber/EuroSAT",
            coop=("eurosat", "split_zhou_EuroSAT.json", "2750"), folders="eurosat/2750",
            torchvision=("EuroSAT", {}, {})),
    DataSet("fgvc_aircraft", "FGVC-Aircraft", 100, "a photo of a {}, a type of aircraft.",
            "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/", lists=("fgvc_aircraft", "images_variant"),
            torchvision=("FGVCAircraft", {"split": "trainval"}, {"split": "test"})),
    DataSet("food101", "Food-101", 101, "a photo of {}, a type of food.",
            "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
            coop=("food-101", "split_zhou_Food101.json", "images"),
            torchvision=("Food101", {"split": "train"}, {"split": "test"})),
    DataSet("flowers102", "Flowers-102", 102, "a photo of a {}, a type of flower.",
            "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
            coop=("oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg"),
            torchvision=("Flowers102", {"split": "train"}, {"split": "test"})),
    DataSet("oxford_pets", "Oxford Pets", 37, "a photo of a {}, a type of pet.",
            "https://www.robots.ox.ac.uk/~vgg/data/pets/",
            coop=("oxford_pets", "split_zhou_OxfordPets.json", "images"),
            torchvision=("OxfordIIITPet", {"split": "trainval"}, {"split": "test"})),
    DataSet("sun397", "SUN397", 397, "a photo of a {} scene.", "https://vision.princeton.edu/projects/2010/SUN/",
            coop=("sun397", "split_zhou_SUN397.json", "SUN397"), torchvision=("SUN397", {}, {})),
    DataSet("stanford_cars", "Stanford Cars", 196, "a photo of a {}, a type of car.",
            "https://github.com/pytorch/vision/issues/7545 (the original page is gone)",
            coop=("stanford_cars", "split_zhou_StanfordCars.json", ""),
            torchvision=("StanfordCars", {"split": "train"}, {"split": "test"})),
    DataSet("cifar10", "CIFAR-10", 10, "a low resolution photo of a {}.",
            "https://www.cs.toronto.edu/~kriz/cifar.html", torchvision=("CIFAR10", {"train": True}, {"train": False})),
    DataSet("cifar100", "CIFAR-100", 100, "a low resolution photo of a {}.",
            "https://www.cs.toronto.edu/~kriz/cifar.html", torchvision=("CIFAR100", {"train": True}, {"train": False})),
    DataSet("ucf101", "UCF101", 101, "a photo of a person during {}.",
            "https://www.crcv.ucf.edu/data/UCF101.php (the middle frame of each video, as CoOp offers them)",
            coop=("ucf101", "split_zhou_UCF101.json", "UCF-101-midframes")),
    DataSet("cub200", "CUB-200", 200, "a photo of a {}, a type of bird.",
            "https://data.caltech.edu/records/65de6-vp158", folders="CUB_200_2011/images"),
    DataSet("birdsnap", "Birdsnap", 500, "a photo of a {}, a type of bird.",
            "http://thomasberg.org", folders="birdsnap/images"),
    DataSet("resisc45", "RESISC45", 45, "a satellite photo of {}.",
            "https://gcheng-nwpu.github.io/#Datasets", folders="NWPU-RESISC45"),
    DataSet("aid", "AID", 30, "an aerial photo of {}.", "https://captain-whu.github.io/AID/", folders="AID"),
    DataSet("gtsrb", "GTSRB", 43, "a close-up photo of a {} traffic sign.",
            "https://benchmark.ini.rub.de/gtsrb_dataset.html",
            torchvision=("GTSRB", {"split": "train"}, {"split": "test"})),
)  # fmt: skip

DATA_SETS = {data_set.name: data_set for data_set in _SETS}
DPA_TABLE = tuple(data_set.name for data_set in _SETS[:13])  # the 13 sets of DPA's table, in its order


def load_set(name: str, root: Path, *, download: bool = False) -> LabelledSet:
    """Load a data set by its name in the catalogue, or from a folder given as ``path:DIR``.

    DIR holds ``train/<class>/*`` and ``test/<class>/*``, or class folders alone; the images of the latter are used both
    for adapting, without their labels, and for measuring. ``classes.txt``, ``descriptions.json`` and ``templates.txt``
    in DIR are used where present. ``download`` lets torchvision download a set that is not under ``root``.

    Raises ImageInputError where the set is not found, with a message that says where to get it and how to lay it out,
    and FinealignError for an unknown name or where a package that reads the set is missing.
    """
    if name.startswith("path:"):
        return _own_folder(name)
    if name not in DATA_SETS:
        raise FinealignError(unknown_name("data set", name, [*DATA_SETS, "path:DIR"]))
    data_set = DATA_SETS[name]
    split = _find(data_set, root, download=download)
    if split is None:
        raise ImageInputError(_how_to_get(data_set, root))
    unlabelled, test, labels = split
    texts, described = _texts_of(data_set, labels)
    return LabelledSet(name, tuple(unlabelled), test, texts, described)


Split = tuple[Sequence[Path], Truth, Sequence[str]]  # images without labels, test images with them, labels in order


def _find(data_set: DataSet, root: Path, *, download: bool) -> Split | None:
    readers: list[Callable[[], Split | None]] = [
        lambda: _class_folders(root / data_set.name),
        lambda: _coop(data_set, root),
        lambda: _listed(*data_set.lists, root) if data_set.lists else None,
        lambda: _one_folder(root / data_set.folders) if data_set.folders else None,
        lambda: _torchvision(data_set, root, download=download),
    ]
    return next((split for reader in readers if (split := reader()) is not None), None)


def _folders(folder: Path) -> list[str]:
    """The names of the sub-folders that may be classes: as in ``list_images``, hidden ones are skipped."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_folders(folder: Path, classes: Sequence[str] | None = None) -> Split | None:
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        return None
    labels = classes or _folders(folder / "test")
    return list_images(folder / "train"), read_truth(folder / "test", labels, strict=True), labels


def _one_folder(folder: Path) -> Split | None:
    """Class folders without a split, split here the same way everywhere; ImageNet's train and val are its split."""
    if not folder.is_dir():
        return None
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        labels = _folders(folder / "val")
        return list_images(folder / "train"), read_truth(folder / "val", labels, strict=True), labels
    labels = [label for label in _folders(folder) if label not in NO_CLASS]
    paths = {label: list_images(folder / label) for label in labels}
    return *_split([(path, index) for index, label in enumerate(labels) for path in paths[label]]), labels


def _split(labelled: Sequence[tuple[Path, int]]) -> tuple[list[Path], Truth]:
    """Take TEST_SHARE of each class for measuring and the rest for adapting.

    The draw depends on the sorted paths and SPLIT_SEED alone.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    unlabelled: list[Path] = []
    test: list[tuple[Path, int]] = []
    for index in sorted({label for _, label in labelled}):
        paths = sorted(path for path, label in labelled if label == index)
        order = rng.permutation(len(paths))
        cut = max(1, round(TEST_SHARE * len(paths)))
        test += [(paths[i], index) for i in sorted(order[:cut])]
        unlabelled += [paths[i] for i in sorted(order[cut:])]
    return unlabelled, _truth(test)


def _coop(data_set: DataSet, root: Path) -> Split | None:
    if data_set.coop is None:
        return None
    folder, name, images = data_set.coop
    file = root / folder / name
    if not file.is_file():
        return None
    base = root / folder / images
    try:
        split = json.loads(file.read_text(encoding="utf-8"))
        rows = {part: [(base / path, int(label), str(text)) for path, label, text in split[part]] for part in split}
        test = [(path, label) for path, label, _ in rows["test"]]
        unlabelled = [path for path, _, _ in rows["train"]]
        names = {label: text for part in rows.values() for _, label, text in part}
        if sorted(names) != list(range(len(names))):
            raise ValueError("labels do not count up from 0")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImageInputError(
            f"{file} is not a split as CoOp writes it ({error!r}). Wanted: "
            '{"train": [[path, label, class name], ...], "val": ..., "test": ...}.'
        ) from error
    return unlabelled, _truth(test), [names[label] for label in sorted(names)]


def _listed(folder: str, lists: str, root: Path) -> Split | None:
    """Images beside lists of lines "NAME LABEL", as FGVC-Aircraft comes and CoOp lays it out. Its val is left alone."""
    base = root / folder
    files = {part: base / f"{lists}_{part}.txt" for part in ("train", "test")}
    if not all(file.is_file() for file in files.values()):
        return None
    rows: dict[str, list[tuple[Path, str]]] = {}
    for part, file in files.items():
        try:
            lines = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            rows[part] = [(base / "images" / f"{name}.jpg", label.strip()) for name, label in lines]
        except (OSError, ValueError) as error:
            raise ImageInputError(f'{file} is no list of images ({error}). Wanted: lines "NUMBER LABEL".') from error
    labels = sorted({label for _, label in rows["test"]})
    test = [(path, labels.index(label)) for path, label in rows["test"]]
    return [path for path, _ in rows["train"]], _truth(test), labels


def _torchvision(data_set: DataSet, root: Path, *, download: bool) -> Split | None:
    if data_set.torchvision is None:
        return None
    from torchvision import datasets

    name, *arguments = data_set.torchvision
    kind = getattr(datasets, name)
    download = download and data_set.fetched
    try:
        train, test = (kind(str(root), **values, **({"download": True} if download else {})) for values in arguments)
    except RuntimeError:  # "not found or corrupted": the caller then says where to get the set
        if download:
            raise ImageInputError(
                f"torchvision cannot fetch {data_set.title}. " + _how_to_get(data_set, root)
            ) from None
        return None
    except ModuleNotFoundError as error:  # torchvision reads the labels of two sets with scipy
        raise FinealignError(
            f"{data_set.title} is read with {error.name}, which is not installed: pip install 'finealign[benchmark]'."
        ) from error
    except Exception as error:  # any error of the network, or a download address that has changed
        raise ImageInputError(
            f"torchvision cannot fetch {data_set.title} ({type(error).__name__}: {error}). "
            + _how_to_get(data_set, root)
        ) from error
    labels = list(getattr(train, "classes", None) or [entry["label"] for entry in data_set.texts])
    if arguments[0] == arguments[1]:
        return *_split(_samples(train, data_set, root)), labels
    return [path for path, _ in _samples(train, data_set, root)], _truth(_samples(test, data_set, root)), labels


def _samples(source: Any, data_set: DataSet, root: Path) -> list[tuple[Path, int]]:
    """The paths and labels of a torchvision set.

    torchvision has no common interface for them, so they are read from the attribute, mostly a private one, in which
    the set's class keeps them. Sets without files (the CIFARs) are written as PNGs.
    """
    for attribute in ("_samples", "samples"):
        if hasattr(source, attribute):
            return [(_decodable(Path(path)), int(label)) for path, label in getattr(source, attribute)]
    for private in ("_image_files", "_images"):
        if hasattr(source, private):
            return [
                (Path(path), int(label)) for path, label in zip(getattr(source, private), source._labels, strict=True)
            ]
    return _written(source, root / f"{data_set.name}-images" / ("train" if source.train else "test"))


def _written(source: Any, folder: Path) -> list[tuple[Path, int]]:
    """Paths and labels of a torchvision set that keeps its images in one array; missing PNGs are written."""
    folder.mkdir(parents=True, exist_ok=True)
    labelled = []
    for index in range(len(source)):
        path = folder / f"{index:06d}.png"
        if not path.exists():
            _save(source[index][0], path)
        labelled.append((path, int(source.targets[index])))
    return labelled


def _decodable(path: Path) -> Path:
    """The path, or for PPM (GTSRB), which ``images`` does not decode, that of a PNG copy written beside it."""
    if path.suffix != ".ppm":
        return path
    png = path.with_suffix(".png")
    if not png.exists():
        with Image.open(path) as image:
            _save(image, png)
    return png


def _save(image: Image.Image, path: Path) -> None:
    """Save as PNG by an atomic write; several processes may write the same file at once."""
    aside = path.with_suffix(f".part{os.getpid()}")
    image.save(aside, "PNG")
    aside.replace(path)


def _own_folder(name: str) -> LabelledSet:
    folder = Path(name.removeprefix("path:")).expanduser()
    if not folder.is_dir():
        raise ImageInputError(f"No folder at {folder}. Wanted: train/<class>/* and test/<class>/*, or class folders.")
    given = read_classes(folder / "classes.txt") if (folder / "classes.txt").is_file() else None
    split = _class_folders(folder, given)
    if split is None:
        labels: Sequence[str] = given or _folders(folder)
        if {"train", "val"} >= set(labels):
            raise ImageInputError(f"{folder} holds {' and '.join(labels)} and no test. Wanted: train/ and test/.")
        truth = read_truth(folder, labels, strict=True)
        split = truth.paths, truth, labels
    unlabelled, test, labels = split
    file = folder / "descriptions.json"
    descriptions = read_descriptions(file) if file.is_file() else None
    if descriptions and not given:  # their keys may be folder names, or the class names made of those
        descriptions = {readable(key) if key in labels else key: texts for key, texts in descriptions.items()}
    file = folder / "templates.txt"
    templates = read_templates(file) if file.is_file() else None
    names = labels if given else [readable(label) for label in labels]
    texts = make_texts(names, descriptions, templates)
    return LabelledSet(name, tuple(unlabelled), test, texts, descriptions is not None)


def _texts_of(data_set: DataSet, labels: Sequence[str]) -> tuple[Texts, bool]:
    """The package's texts in the order of the labels on disk, and True; or names made from the labels, and False."""
    templates = (*DEFAULT_TEMPLATES, *([data_set.template] if data_set.template else []))
    entries = {_key(entry["label"]): entry for entry in data_set.texts}
    entries |= {_key(entry["name"]): entry for entry in data_set.texts}
    if data_set.name == "imagenet":
        names: Iterable[str] = _imagenet_names(len(labels))
    else:
        names = [readable(label) for label in labels]
    matched = [entries.get(_key(label)) for label in labels]
    if not data_set.texts or None in matched:
        return make_texts(_distinct(names), None, templates), False
    known = [entry for entry in matched if entry]
    descriptions = {entry["name"]: entry["descriptions"] for entry in known}
    return make_texts([entry["name"] for entry in known], descriptions, templates), True


def readable(label: str) -> str:
    """A folder name as a class name: ``001.House_Wren`` -> ``House Wren``, ``SeaLake`` -> ``sea lake``."""
    head, dot, rest = label.partition(".")
    words = (rest if dot and head.isdigit() else label).replace("_", " ").replace("/", " ").split()
    return " ".join(_humps(words[0]) if len(words) == 1 else words)


def _humps(word: str) -> list[str]:
    """Split a camel-case word: ``SeaLake`` -> sea, lake; any other word stays as it is."""
    starts = [i for i, letter in enumerate(word) if letter.isupper() and (i == 0 or word[i - 1].islower())]
    if len(starts) < 2 or starts[0] != 0 or not word.isalpha():
        return [word]
    return [word[start:stop].lower() for start, stop in zip(starts, [*starts[1:], len(word)], strict=True)]


def _distinct(names: Iterable[str]) -> list[str]:
    """The names with a number added to repeated ones: ImageNet has two classes named missile and two sunglasses."""
    counts: dict[str, int] = {}
    distinct = []
    for name in names:
        counts[name.casefold()] = times = counts.get(name.casefold(), 0) + 1
        distinct.append(name if times == 1 else f"{name} {times}")
    return distinct


def _imagenet_names(count: int) -> list[str]:
    """The names of ImageNet's classes, in the order of their sorted wnids."""
    names = imagenet_names()
    if count != len(names):
        raise ImageInputError(f"ImageNet has {len(names)} class folders; found {count}.")
    return names


def _key(text: str) -> str:
    """The label without case, spaces and punctuation, in which copies of a data set differ."""
    return "".join(character for character in text.casefold() if character.isalnum())


def _truth(labelled: Sequence[tuple[Path, int]]) -> Truth:
    return Truth(tuple(path for path, _ in labelled), tuple(label for _, label in labelled))


def _how_to_get(data_set: DataSet, root: Path) -> str:
    layouts = [f"{root / data_set.name}/{{train,test}}/<class>/<image>"]
    if data_set.coop:
        layouts.append(
            f"{root / data_set.coop[0] / data_set.coop[1]} with images in {root / data_set.coop[0] / data_set.coop[2]}"
        )
    if data_set.lists:
        folder, lists = data_set.lists
        layouts.append(f"{root / folder / lists}_{{train,test}}.txt with images in {root / folder}/images")
    if data_set.folders:
        layouts.append(f"{root / data_set.folders}/<class>/<image>")
    hint = " torchvision can fetch it: --download." if data_set.fetched else ""
    return f"{data_set.title} is not under {root}.{hint} Else get it from {data_set.page} and lay it out as " + (
        ", or ".join(layouts) + "."
    )


@cache
def _texts(name: str) -> list[dict[str, Any]]:
    file = files("finealign.benchmark") / "texts" / f"{name}.json"
    if not file.is_file():
        return []
    entries: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["classes"]
    return entries
