"""Images sorted into a folder for each label: links or copies, never over a file."""

import tarfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from PIL import Image

from conftest import unprivileged
from finealign.errors import ConfigError, OutputError
from finealign.images.listing import list_images
from finealign.images.sources import find_images
from finealign.model.refusal import NONE_OF_THESE, UNSURE, in_place_of_class
from finealign.model.sorting import LONGEST, Sorter, folder_names, refuse_within
from finealign.types import Prediction

CLASSES = ["wren", "robin"]


def laid(folder: Path, **contents: str) -> list[Path]:
    paths = [folder / name.replace("__", "/").replace("_", ".") for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return paths


def below(folder: Path, *, read: bool = True) -> dict[str, str]:
    found = (path for path in folder.rglob("*") if not path.is_dir())
    return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") if read else "" for path in found}


@pytest.mark.parametrize("copy", [False, True])
def test_sorter__same_names_get_a_number_and_stay_at_the_next_run(tmp_path: Path, copy: bool) -> None:
    first, second, third = laid(tmp_path, a__1_jpg="one", b__1_jpg="two", c__1_jpg="one")
    out = tmp_path / "sorted"
    expected = {"wren/1.jpg": "one", "wren/1-2.jpg": "two", "wren/1-3.jpg": "one", "robin/1.jpg": "one"}
    for _ in range(2):
        sorter = Sorter(out, CLASSES, copy=copy)
        for image in (first, second, third):
            sorter.add(image, "wren")
        sorter.add(first, "robin")
        assert below(out) == expected
        assert (sorter.images, sorter.renamed, sorter.problems) == (4, 2, [])
    assert all(path.is_symlink() is not copy for path in out.rglob("*.jpg"))
    assert "4 images " + ("copied" if copy else "linked") in sorter.told() and "2 under another name" in sorter.told()


@pytest.mark.parametrize("copy", [False, True])
def test_sorter__what_was_there_stays(tmp_path: Path, copy: bool) -> None:
    (image,) = laid(tmp_path, a__1_jpg="mine")
    laid(tmp_path / "sorted", wren__1_jpg="theirs", note_txt="read me")
    Sorter(tmp_path / "sorted", CLASSES, copy=copy).add(image, "wren")
    assert below(tmp_path / "sorted") == {"wren/1.jpg": "theirs", "note.txt": "read me", "wren/1-2.jpg": "mine"}


def test_sorter__a_link_leads_there_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    laid(tmp_path, a__1_jpg="one")
    monkeypatch.chdir(tmp_path)
    Sorter(Path("sorted"), CLASSES).add(Path("a/1.jpg"), "wren")
    monkeypatch.chdir("/")
    assert below(tmp_path / "sorted") == {"wren/1.jpg": "one"}


def test_sorter__images_without_a_file_are_written(tmp_path: Path) -> None:
    image = tmp_path / "7.png"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(image)
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        archive.add(image, "deep/7.png")
    for _ in range(2):
        sorter = Sorter(tmp_path / "sorted", CLASSES)
        for found in (
            *list_images(tmp_path / "shard.tar"),
            *find_images([image.read_bytes(), np.zeros((4, 4, 3), "u1")]),
        ):
            sorter.add(found, "robin")
        assert sorted(below(tmp_path / "sorted", read=False)) == [
            "robin/7.png",
            "robin/image 0.png",
            "robin/image 1.tif",
        ]
    assert (tmp_path / "sorted" / "robin" / "7.png").read_bytes() == image.read_bytes()


def test_sorter__an_image_that_is_gone_is_told(tmp_path: Path) -> None:
    sorter = Sorter(tmp_path / "sorted", CLASSES, copy=True)
    sorter.add(tmp_path / "gone.jpg", "wren")
    assert sorter.problems == [f"{tmp_path / 'gone.jpg'}: no such file"]
    assert "1 could not be" in sorter.told()


def test_sorter__a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (image,) = laid(tmp_path, a__1_jpg="one")
    (tmp_path / "sorted" / "wren").mkdir(parents=True)
    (tmp_path / "sorted" / "wren").chmod(0o500)
    with unprivileged(), pytest.raises(OutputError, match=r"cannot be written: permission denied.*--copy"):
        Sorter(tmp_path / "sorted", CLASSES).add(image, "wren")
    with pytest.raises(OutputError, match="is a file"):
        Sorter(image, CLASSES)


def test_refuse_within__the_folder_of_the_images(tmp_path: Path) -> None:
    for inside in (tmp_path, tmp_path / "sorted" / "deep"):
        with pytest.raises(OutputError, match="would be read as images the next time"):
            refuse_within(inside, str(tmp_path))
    refuse_within(tmp_path / "sorted", str(tmp_path / "photos"))


@pytest.mark.parametrize(
    ("label", "folder"),
    [
        ("wren", "wren"),
        ("AC/DC", "AC_DC"),
        ("..", "_"),
        (".hidden", "_hidden"),
        ("a\\b: c?\n", "a_b_ c__"),
        ("St. ", "St"),
        ("con", "_con"),
        ("Nul.txt", "_Nul.txt"),
        ("console", "console"),
        ("东方鸲", "东方鸲"),
    ],
)
def test_folder_names__are_safe(label: str, folder: str) -> None:
    assert folder_names([label])[label] == folder


def test_folder_names__differ_on_every_system() -> None:
    labels = ["a/b", "a:b", "A?B", "_unsure", "_none of these", "x" * 300, "x" * 301, "é" * 80, "wren", "Wren"]
    names = folder_names(labels)
    assert len({name.casefold() for name in names.values()}) == len(labels) + 2
    assert names[UNSURE] == "_unsure" and names[NONE_OF_THESE] == "_none of these"
    assert all(len(name.encode()) <= LONGEST + 2 for name in names.values())


@pytest.mark.parametrize(
    ("confidence", "none", "label"),
    [(0.9, 0.1, None), (0.5, 0.1, None), (0.4999996, 0.1, None), (0.49, 0.1, UNSURE), (0.4, 0.6, NONE_OF_THESE)],
)
def test_in_place_of_class__goes_by_the_confidence_as_it_is_written(
    confidence: float, none: float, label: str | None
) -> None:
    probabilities = np.array([confidence, 0.2, 0.1], np.float32)
    found = Prediction(Path("a.png"), probabilities, probabilities, none=none)
    assert in_place_of_class(found, 0.5, 0.5) == label
    assert in_place_of_class(found) is None


def test_cases_are_those_of_a_config_error() -> None:
    from finealign.model.refusal import least_confidence

    for wrong in (0, -1, 1.5, float("nan"), True, "0.5"):
        with pytest.raises(ConfigError, match=r"min_confidence: found .* above 0 and at most 1"):
            least_confidence(None, wrong)  # type: ignore[arg-type]


def test_sorter__a_copy_that_fails_midway_is_not_left_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: BinaryIO, target: BinaryIO) -> None:
        target.write(source.read(2))
        raise OSError(28, "No space left on device")

    (image,) = laid(tmp_path, a__1_jpg="whole")
    sorter = Sorter(tmp_path / "sorted", CLASSES, copy=True)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.copyfileobj", fails)
        with pytest.raises(OutputError, match="cannot be written: no space left"):
            sorter.add(image, "wren")
    assert below(tmp_path / "sorted") == {}
    sorter.add(image, "wren")
    assert below(tmp_path / "sorted") == {"wren/1.jpg": "whole"}
    assert sorter.as_json() == {"into": str(tmp_path / "sorted"), "images": 1, "renamed": 0, "problems": []}
