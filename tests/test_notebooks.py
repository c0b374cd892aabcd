"""The notebooks run from top to bottom at small size, on drawn images, and are kept without outputs.

Their cells are executed in one namespace, as a kernel does. Only cells that install are left out; what a reader changes
in the cell of parameters is changed behind it.
"""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import CLASSES, COLOURS

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
Tiny = Callable[[str], str]
FEW = ["views.crops=2", "training.epochs=1", "training.batch_size=8", "training.anchor_steps=4", "device=cpu"]
FEW += ["prediction.calibrate=false", "precision=fp32"]


def cells(notebook: Path, kind: str = "code") -> list[dict[str, Any]]:
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def tags(cell: dict[str, Any]) -> list[str]:
    known: list[str] = cell["metadata"].get("tags", [])
    return known


def execute(notebook: Path, **changed: Any) -> dict[str, Any]:
    """Run the cells; returns their names. ``changed`` are parameters, and must be among those of the notebook."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in cells(notebook):
        if "install" in tags(cell):
            continue
        exec(compile("".join(cell["source"]), f"{notebook.name}:{cell['id']}", "exec"), names)
        if "parameters" in tags(cell):
            assert set(changed) <= set(names)
            names |= changed
    return names


class Pets:
    """In place of torchvision's set, which would be downloaded: images of three colours, with labels."""

    def __init__(self, root: str, split: str, download: bool) -> None:
        assert download
        self.classes = [name.capitalize() for name in CLASSES]
        self.each = {"trainval": 4, "test": 3}[split]

    def __len__(self) -> int:
        return self.each * len(CLASSES)

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        if place >= len(self):
            raise IndexError(place)
        label = place % len(CLASSES)
        noise = np.random.default_rng(place).integers(-40, 40, (40, 48, 3))
        pixels = np.clip(np.array(COLOURS[CLASSES[label]]) + noise, 0, 255).astype(np.uint8)
        return Image.fromarray(pixels), label


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook__holds_no_output_and_says_what_it_does(notebook: Path) -> None:
    for cell in cells(notebook):
        assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
    every = cells(notebook) + cells(notebook, "markdown")
    assert len({cell["id"] for cell in every}) == len(every)
    assert "".join(cells(notebook, "markdown")[0]["source"]).startswith("# ")
    assert [tags(cell) for cell in cells(notebook)[:2]] == [["install"], ["parameters"]]
    assert f"({notebook.name})" in (FOLDER / "index.md").read_text(encoding="utf-8")


def test_own_photos__paints_birds_where_none_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = execute(FOLDER / "1-own-photos.ipynb", PAINTED=48, OVERRIDES=FEW)
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    with (tmp_path / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 48 and {row["label"] for row in rows} <= set(names["NAMES"])
    assert re.search(r"^Adaptation (helped|unclear|hurt)$", capsys.readouterr().out, flags=re.MULTILINE)


def test_own_photos__takes_a_folder_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Tiny
) -> None:
    monkeypatch.chdir(tmp_path)
    pets = Pets(".", "trainval", True)
    (tmp_path / "photos").mkdir()
    for place in range(len(pets)):
        pets[place][0].save(tmp_path / "photos" / f"{place}.png")
    own = {"PHOTOS": "photos", "NAMES": CLASSES, "BACKBONE": tiny_backbone("transformer"), "OVERRIDES": FEW}
    execute(FOLDER / "1-own-photos.ipynb", **own)
    assert (tmp_path / "labels.csv").read_text(encoding="utf-8").count("\n") == 1 + len(pets)
    assert not (tmp_path / "birds").exists()


def test_oxford_pets__learns_from_a_set_of_torchvision_and_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    from torchvision import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "OxfordIIITPet", Pets)
    names = execute(FOLDER / "2-oxford-pets.ipynb", BACKBONE=tiny_backbone("transformer"), OVERRIDES=FEW)
    assert names["names"] == CLASSES
    assert re.search(r"gain [+-]\d+\.\d points \([+-]", capsys.readouterr().out)
    assert (tmp_path / "pets-model" / "finealign.json").is_file()


def test_a_method__is_checked_trained_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    execute(FOLDER / "3-a-method.ipynb", BACKBONE=tiny_backbone("transformer"), OVERRIDES=FEW, PAINTED=48)
    told = re.findall(r"^(\S+) +[\d.]+ % +[+-]", capsys.readouterr().out, flags=re.MULTILINE)
    assert told == ["start", "self-training", "fair", "agree"]
