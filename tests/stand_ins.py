"""Small drawn stand-ins of the 13 sets of the field's table, each laid out on disk as its source or CoOp does."""

import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from PIL import Image

from finealign.benchmark.catalogue import DATA_SETS

TRAIN, TEST = 3, 2  # images of a class
WNIDS = ("n01440764", "n01443537", "n01484850")
CLASS_NAMES = ["tench", "goldfish", "great white shark"]  # of those, as ImageNet's are given by the package


def draw(path: Path, kind: str = "PNG") -> None:
    """A picture of 40 by 48 pixels that depends on the last two parts of its path alone."""
    generator = np.random.default_rng(crc32("/".join(path.parts[-2:]).encode()))
    pixels = generator.integers(0, 256, 3) * 0.6 + generator.integers(0, 100, (40, 48, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, kind)


def put(root: Path, paths: Iterable[str]) -> None:
    for path in paths:
        draw(root / path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def labels_of(name: str, count: int = 3) -> list[str]:
    return [str(entry["label"]) for entry in DATA_SETS[name].texts[:count]]


def split_file(root: Path, name: str, labels: list[str]) -> None:
    """Images and the split file of CoOp's layout."""
    coop = DATA_SETS[name].coop
    assert coop is not None
    folder, file, images = coop
    split: dict[str, list[Any]] = {"train": [], "val": [], "test": []}
    for label, text in enumerate(labels):
        for part, count in (("train", TRAIN), ("val", 1), ("test", TEST)):
            split[part] += [[f"{text}/{part}_{number}.jpg", label, text] for number in range(count)]
    write(root / folder / file, json.dumps(split))
    put(root / folder / images, [path for rows in split.values() for path, _, _ in rows])


def class_folders(root: Path, folder: str, labels: list[str]) -> None:
    """Class folders without a split."""
    put(root / folder, [f"{label}/{number}.jpg" for label in labels for number in range(TRAIN + TEST)])


def imagenet(root: Path) -> None:
    parts = (("train", TRAIN), ("val", TEST))
    put(
        root / "imagenet" / "images",
        [f"{part}/{wnid}/{n}.JPEG" for part, count in parts for wnid in WNIDS for n in range(count)],
    )


def caltech101(root: Path) -> None:
    split_file(root, "caltech101", ["airplane", "crab", "lotus"])


def dtd(root: Path) -> None:
    labels, folder = labels_of("dtd"), root / "dtd" / "dtd"
    for part, count in (("train", TRAIN), ("val", 1), ("test", TEST)):
        images = [f"{label}/{label}_{part}_{number}.jpg" for label in labels for number in range(count)]
        write(folder / "labels" / f"{part}1.txt", "".join(f"{path}\n" for path in images))
        put(folder / "images", images)


def eurosat(root: Path) -> None:
    class_folders(root, "eurosat/2750", labels_of("eurosat"))


def fgvc_aircraft(root: Path) -> None:
    labels = labels_of("fgvc_aircraft")
    for part, first, count in (("train", 1000, TRAIN), ("val", 2000, 1), ("test", 3000, TEST)):
        rows = [(f"{first + 10 * kind + n:07d}", label) for kind, label in enumerate(labels) for n in range(count)]
        write(root / "fgvc_aircraft" / f"images_variant_{part}.txt", "".join(f"{one} {label}\n" for one, label in rows))
        put(root / "fgvc_aircraft" / "images", [f"{number}.jpg" for number, _ in rows])


def food101(root: Path) -> None:
    labels, folder = labels_of("food101"), root / "food-101"
    for part, first, count in (("train", 0, TRAIN), ("test", 100, TEST)):
        listed = {label: [f"{label}/{first + number}" for number in range(count)] for label in labels}
        write(folder / "meta" / f"{part}.json", json.dumps(listed))
        put(folder / "images", [f"{image}.jpg" for images in listed.values() for image in images])


def flowers102(root: Path) -> None:
    split_file(root, "flowers102", labels_of("flowers102"))


def oxford_pets(root: Path) -> None:
    labels, folder = labels_of("oxford_pets"), root / "oxford-iiit-pet"
    for part, first, count in (("trainval", 0, TRAIN), ("test", 100, TEST)):
        rows = [(f"{label}_{first + n}", kind) for kind, label in enumerate(labels, 1) for n in range(count)]
        write(folder / "annotations" / f"{part}.txt", "".join(f"{name} {kind} 1 1\n" for name, kind in rows))
        put(folder / "images", [f"{name}.jpg" for name, _ in rows])


def sun397(root: Path) -> None:
    labels = ["/a/abbey", "/a/apartment_building/outdoor", "/b/beach"]
    write(root / "SUN397" / "ClassName.txt", "".join(f"{label}\n" for label in labels))
    class_folders(root, "SUN397", [label[1:] for label in labels])
    for path in (root / "SUN397").rglob("*.jpg"):  # torchvision reads those alone that are named so
        path.rename(path.with_name(f"sun_{path.name}"))


def stanford_cars(root: Path) -> None:
    split_file(root, "stanford_cars", ["Acura TL Sedan 2012", "Audi TTS Coupe 2012", "Fisker Karma Sedan 2012"])


def _cifar(root: Path, name: str, folder: str, key: str, names: str) -> None:
    labels = labels_of(name)
    meta = {names: labels}
    (root / folder).mkdir(parents=True)
    (root / folder / "meta").write_bytes(pickle.dumps(meta))
    for part, count in (("train", TRAIN), ("test", TEST)):
        truth = [label for label in range(len(labels)) for _ in range(count)]
        pixels = np.random.default_rng(len(truth)).integers(0, 256, (len(truth), 3072), dtype=np.uint8)
        (root / folder / part).write_bytes(pickle.dumps({"data": pixels, key: truth}))


def cifar10(root: Path) -> None:
    _cifar(root, "cifar10", "cifar-10-batches-py", "labels", "label_names")


def cifar100(root: Path) -> None:
    _cifar(root, "cifar100", "cifar-100-python", "fine_labels", "fine_label_names")


def ucf101(root: Path) -> None:
    split_file(root, "ucf101", labels_of("ucf101"))


LAYOUTS: dict[str, Callable[[Path], None]] = {
    layout.__name__: layout
    for layout in (
        imagenet, caltech101, dtd, eurosat, fgvc_aircraft, food101, flowers102, oxford_pets, sun397, stanford_cars,
        cifar10, cifar100, ucf101,
    )
}  # fmt: skip


def accept_small_sets(patch: pytest.MonkeyPatch) -> None:
    """Let ImageNet have three classes, and CIFARs files without the checksums that torchvision holds them to."""
    from torchvision.datasets import CIFAR10, CIFAR100

    patch.setattr("finealign.benchmark.catalogue.imagenet_names", lambda: CLASS_NAMES)
    for kind, names in ((CIFAR10, "label_names"), (CIFAR100, "fine_label_names")):
        patch.setattr(kind, "train_list", [["train", None]])
        patch.setattr(kind, "test_list", [["test", None]])
        patch.setattr(kind, "meta", {"filename": "meta", "key": names, "md5": None})
