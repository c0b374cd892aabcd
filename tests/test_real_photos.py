"""The main job on real photos with MiniCLIP, through the command: adapt, predict, evaluate."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import on_every_core

CLASSES_USED = 10
TRAIN_EACH, TEST_EACH = 20, 15


def finealign(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "finealign", *arguments, "--json"]
    done = subprocess.run(command, env=on_every_core(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def listed(folder: Path, each: int, table: Path, *, labels: bool) -> Path:
    """A CSV of the first images of each class folder, with the folder's name only where labels are wanted."""
    with table.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["path", "label"] if labels else ["path"])
        for kind in sorted(path for path in folder.iterdir() if path.is_dir()):
            for path in sorted(kind.iterdir())[:each]:
                writer.writerow([str(path), kind.name] if labels else [str(path)])
    return table


@pytest.mark.parametrize(
    ("encoder", "settings", "least"),
    [
        ("frozen", ["training.steps=80", "training.strong_views=1"], 0.06),
        pytest.param(
            *("full", ["training.epochs=3", "views.refresh_epochs=3", "training.batch_size=32"], 0.0),
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_adapt__gains_on_satellite_photos(
    shared: Path, tmp_path: Path, encoder: str, settings: list[str], least: float
) -> None:
    data = shared / "data" / "eurosat"
    train = listed(data / "train", TRAIN_EACH, tmp_path / "train.csv", labels=False)
    test = listed(data / "test", TEST_EACH, tmp_path / "test.csv", labels=True)
    chosen = [
        word for setting in [*settings, f"training.encoder={encoder}", "views.crops=4"] for word in ("--set", setting)
    ]
    run = finealign(
        "adapt",
        str(train),
        *("--classes", str(data / "classes.txt"), "--descriptions", str(data / "descriptions.json")),
        *("--backbone", f"local-dir:{shared / 'models' / 'miniclip'}", "--out", str(tmp_path / "run"), *chosen),
    )
    assert run["images"] == CLASSES_USED * TRAIN_EACH
    found = finealign("evaluate", str(tmp_path / "run"), str(test))
    assert found["images"] == CLASSES_USED * TEST_EACH
    assert found["start"]["top1"] > 0.4
    assert found["difference"]["top1"] > least
    assert found["difference"]["top1"] == pytest.approx(found["adapted"]["top1"] - found["start"]["top1"])
