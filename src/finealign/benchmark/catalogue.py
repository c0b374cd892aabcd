"""The data sets that papers of this field report on: where each is found on disk, its classes and its texts.

A set is looked for under the data root in three forms, the first that is there: plain class folders
(``NAME/train/<label>/*`` and ``NAME/test/<label>/*``), the layout and split file that CoOp published
(``FOLDER/split_zhou_*.json``), and what torchvision reads or fetches. ``path:DIR`` is a folder of one's own.
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

from finealign.backbone import imagenet_names
from finealign.errors import FinealignError, ImageInputError, unknown_name
from finealign.evaluate import read_truth
from finealign.images import list_images
from finealign.prompts import DEFAULT_TEMPLATES, make_texts, read_classes, read_descriptions, read_templates
from finealign.types import Texts, Truth

TEST_SHARE = 1 / 3  # of each class, where a set comes without a split; drawn by SPLIT_SEED
SPLIT_SEED = 0
NO_CLASS = ("BACKGROUND_Google", "Faces_easy")  # of Caltech-101's folders, in no table


@dataclass(frozen=True)
class DataSet:
    """What is known of a set without looking at it."""

    name: str
    title: str
    classes: int
    template: str  # for its kind of image, beside the neutral ones; or nothing
    page: str  # where to get it
    coop: tuple[str, str, str] | None = None  # folder, split file, and the folder its paths start from
    torchvision: tuple[str, dict[str, Any], dict[str, Any]] | None = None  # class; arguments for train, for test
    folders: str = ""  # one folder of class folders without a split, under the root

    def as_json(self) -> dict[str, Any]:
        kind = self.torchvision[0] if self.torchvision else None
        described = len(self.texts) > 0
        return {
            "name": self.name, "title": self.title, "classes": self.classes, "page": self.page, "torchvision": kind,
            "coop_split": f"{self.coop[0]}/{self.coop[1]}" if self.coop else None, "described": described,
        }  # fmt: skip

    @property
    def fetched(self) -> bool:
        """Whether torchvision still can: the page it had Stanford Cars from is gone."""
        return self.torchvision is not None and self.name != "stanford_cars"

    @property
    def texts(self) -> list[dict[str, Any]]:
        """Label, name and descriptions of each class where we wrote them, else nothing."""
        return _texts(self.name)


@dataclass(frozen=True)
class LabelledSet:
    """A set on disk: images to learn from, without labels; images to measure on, with them; what classes are called."""

    name: str
    unlabelled: tuple[Path, ...]
    test: Truth
    texts: Texts
    described: bool  # whether it has descriptions; else templates stand in for them


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
            "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
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

DATA_SETS = {one.name: one for one in _SETS}
DPA_TABLE = tuple(one.name for one in _SETS[:13])  # the 13 sets of DPA's table, in its order


def load_set(name: str, root: Path, *, download: bool = False) -> LabelledSet:
    """A set by its name in the catalogue, or ``path:DIR`` for a folder of one's own.

    DIR holds ``train/<class>/*`` and ``test/<class>/*``, or class folders alone, which are then both learned from
    (their names unseen) and measured on. ``classes.txt``, ``descriptions.json`` and ``templates.txt`` beside them are
    taken where present. Raises ImageInputError where the set is not found, saying where to get it and how to lay it
    out; ConfigError's sentence for an unknown name.
    """
    if name.startswith("path:"):
        return _own_folder(name)
    if name not in DATA_SETS:
        raise FinealignError(unknown_name("data set", name, [*DATA_SETS, "path:DIR"]))
    found = DATA_SETS[name]
    labelled = _find(found, root, download=download)
    if labelled is None:
        raise ImageInputError(_how_to_get(found, root))
    unlabelled, test, labels = labelled
    texts, described = _texts_of(found, labels)
    return LabelledSet(name, tuple(unlabelled), test, texts, described)


Split = tuple[Sequence[Path], Truth, Sequence[str]]  # images without labels, test images with them, labels in order


def _find(found: DataSet, root: Path, *, download: bool) -> Split | None:
    readers: list[Callable[[], Split | None]] = [
        lambda: _class_folders(root / found.name),
        lambda: _coop(found, root),
        lambda: _one_folder(root / found.folders) if found.folders else None,
        lambda: _torchvision(found, root, download=download),
    ]
    return next((split for reader in readers if (split := reader()) is not None), None)


def _folders(folder: Path) -> list[str]:
    """The sub-folders that may be classes, as ``list_images`` goes by them: not the hidden ones."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _class_folders(folder: Path, classes: Sequence[str] | None = None) -> Split | None:
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        return None
    labels = classes or _folders(folder / "test")
    return list_images(folder / "train"), read_truth(folder / "test", labels), labels


def _one_folder(folder: Path) -> Split | None:
    """Class folders without a split: our own, the same everywhere. ImageNet's train and val are one."""
    if not folder.is_dir():
        return None
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        labels = _folders(folder / "val")
        return list_images(folder / "train"), read_truth(folder / "val", labels), labels
    labels = [label for label in _folders(folder) if label not in NO_CLASS]
    paths = {label: list_images(folder / label) for label in labels}
    return *_split([(path, index) for index, label in enumerate(labels) for path in paths[label]]), labels


def _split(labelled: Sequence[tuple[Path, int]]) -> tuple[list[Path], Truth]:
    """A share of each class to measure on, the rest to learn from; drawn by the sorted paths and SPLIT_SEED alone."""
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


def _coop(found: DataSet, root: Path) -> Split | None:
    if found.coop is None:
        return None
    folder, name, images = found.coop
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


def _torchvision(found: DataSet, root: Path, *, download: bool) -> Split | None:
    if found.torchvision is None:
        return None
    from torchvision import datasets

    name, *arguments = found.torchvision
    kind = getattr(datasets, name)
    download = download and found.fetched
    try:
        train, test = (kind(str(root), **values, **({"download": True} if download else {})) for values in arguments)
    except RuntimeError:  # "not found or corrupted": where to get it is said by the caller
        if download:
            raise ImageInputError(f"torchvision cannot fetch {found.title}. " + _how_to_get(found, root)) from None
        return None
    except ModuleNotFoundError as error:  # it reads two sets' labels with scipy
        raise FinealignError(
            f"{found.title} is read with {error.name}, which is not installed: pip install 'finealign[benchmark]'."
        ) from error
    except Exception as error:  # of the network, or of a page that has moved
        raise ImageInputError(
            f"torchvision cannot fetch {found.title} ({type(error).__name__}: {error}). " + _how_to_get(found, root)
        ) from error
    labels = list(getattr(train, "classes", None) or [entry["label"] for entry in found.texts])
    if arguments[0] == arguments[1]:
        return *_split(_samples(train, found, root)), labels
    return [path for path, _ in _samples(train, found, root)], _truth(_samples(test, found, root)), labels


def _samples(dataset: Any, found: DataSet, root: Path) -> list[tuple[Path, int]]:
    """The files and labels of a torchvision set, by whichever of its attributes holds them."""
    for attribute in ("_samples", "samples"):
        if hasattr(dataset, attribute):
            return [(_decodable(Path(path)), int(label)) for path, label in getattr(dataset, attribute)]
    for paths in ("_image_files", "_images"):
        if hasattr(dataset, paths):
            return [
                (Path(path), int(label)) for path, label in zip(getattr(dataset, paths), dataset._labels, strict=True)
            ]
    return _written(dataset, root / f"{found.name}-images" / ("train" if dataset.train else "test"))


def _written(dataset: Any, folder: Path) -> list[tuple[Path, int]]:
    """A set whose images lie in one array, each written once as a PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for index in range(len(dataset)):
        path = folder / f"{index:06d}.png"
        if not path.exists():
            _save(dataset[index][0], path)
        found.append((path, int(dataset.targets[index])))
    return found


def _decodable(path: Path) -> Path:
    """GTSRB comes as PPM, which ``images`` does not decode: the same as a PNG beside it."""
    if path.suffix != ".ppm":
        return path
    png = path.with_suffix(".png")
    if not png.exists():
        with Image.open(path) as image:
            _save(image, png)
    return png


def _save(image: Image.Image, path: Path) -> None:
    """As PNG, whole or not there, whichever processes write it."""
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
        truth = read_truth(folder, labels)
        split = truth.paths, truth, labels
    unlabelled, test, labels = split
    file = folder / "descriptions.json"
    descriptions = read_descriptions(file) if file.is_file() else None
    if descriptions and not given:  # written by the folders' names or by the words made of them
        descriptions = {readable(key) if key in labels else key: texts for key, texts in descriptions.items()}
    file = folder / "templates.txt"
    templates = read_templates(file) if file.is_file() else None
    names = labels if given else [readable(label) for label in labels]
    texts = make_texts(names, descriptions, templates)
    return LabelledSet(name, tuple(unlabelled), test, texts, descriptions is not None)


def _texts_of(found: DataSet, labels: Sequence[str]) -> tuple[Texts, bool]:
    """Our texts in the order of the labels on disk; names made from the labels where we wrote none."""
    templates = (*DEFAULT_TEMPLATES, *([found.template] if found.template else []))
    entries = {_key(entry["label"]): entry for entry in found.texts}
    entries |= {_key(entry["name"]): entry for entry in found.texts}
    if found.name == "imagenet":
        names: Iterable[str] = _imagenet_names(len(labels))
    else:
        names = [readable(label) for label in labels]
    matched = [entries.get(_key(label)) for label in labels]
    if not found.texts or None in matched:
        return make_texts(_distinct(names), None, templates), False
    known = [entry for entry in matched if entry]
    descriptions = {entry["name"]: entry["descriptions"] for entry in known}
    return make_texts([entry["name"] for entry in known], descriptions, templates), True


def readable(label: str) -> str:
    """A folder's name as words: ``001.House_Wren`` -> ``House Wren``, ``SeaLake`` -> ``sea lake``."""
    head, dot, rest = label.partition(".")
    words = (rest if dot and head.isdigit() else label).replace("_", " ").replace("/", " ").split()
    return " ".join(_humps(words[0]) if len(words) == 1 else words)


def _humps(word: str) -> list[str]:
    """``SeaLake`` -> sea, lake; a word that is not written in humps stays as it is."""
    starts = [i for i, letter in enumerate(word) if letter.isupper() and (i == 0 or word[i - 1].islower())]
    if len(starts) < 2 or starts[0] != 0 or not word.isalpha():
        return [word]
    return [word[start:stop].lower() for start, stop in zip(starts, [*starts[1:], len(word)], strict=True)]


def _distinct(names: Iterable[str]) -> list[str]:
    """ImageNet has two classes by each of two names (missile, sunglasses): the second gets a number."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name.casefold()] = times = seen.get(name.casefold(), 0) + 1
        found.append(name if times == 1 else f"{name} {times}")
    return found


def _imagenet_names(count: int) -> list[str]:
    """Its wnids, sorted, in words."""
    names = imagenet_names()
    if count != len(names):
        raise ImageInputError(f"ImageNet has {len(names)} class folders; found {count}.")
    return names


def _key(text: str) -> str:
    """The form under which labels of one class agree across copies of a set."""
    return "".join(character for character in text.casefold() if character.isalnum())


def _truth(labelled: Sequence[tuple[Path, int]]) -> Truth:
    return Truth(tuple(path for path, _ in labelled), tuple(label for _, label in labelled))


def _how_to_get(found: DataSet, root: Path) -> str:
    ways = [f"{root / found.name}/{{train,test}}/<class>/<image>"]
    if found.coop:
        ways.append(f"{root / found.coop[0] / found.coop[1]} with images in {root / found.coop[0] / found.coop[2]}")
    if found.folders:
        ways.append(f"{root / found.folders}/<class>/<image>")
    fetched = " torchvision can fetch it: --download." if found.fetched else ""
    return f"{found.title} is not under {root}.{fetched} Else get it from {found.page} and lay it out as " + (
        ", or ".join(ways) + "."
    )


@cache
def _texts(name: str) -> list[dict[str, Any]]:
    file = files("finealign.benchmark") / "texts" / f"{name}.json"
    if not file.is_file():
        return []
    entries: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["classes"]
    return entries
