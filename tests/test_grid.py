"""The grid of methods and sets: each cell run once, a killed grid goes on, what is wrong stops it before it starts."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from conftest import HANG, predictions, write_photos
from finealign import FineAlign
from finealign.benchmark import grid as grid_module
from finealign.benchmark.grid import Cell, Grid, file_name, read_cells, run_grid
from finealign.cli import app
from finealign.config import make_config
from finealign.errors import ConfigError, FinealignError, OutputError
from finealign.evaluate.truth import read_truth
from finealign.model.inference import Predictor

Tiny = Callable[[str], str]
QUICK: dict[str, Any] = {
    "device": "cpu",
    "precision": "fp32",
    "data": {"cache": "temporary"},
    "views": {"crops": 2},
    "training": {"epochs": 2, "batch_size": 8, "anchor_steps": 3},
}
METHODS = ("fair", "transclip", "cupl")


@pytest.fixture(scope="module")
def photo_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_photos(folder / "train")
    write_photos(folder / "test", each=4)
    return folder


@pytest.fixture
def grid(photo_set: Path, tiny_backbone: Tiny, tmp_path: Path) -> Grid:
    return Grid(
        datasets=(f"path:{photo_set}",),
        methods=METHODS,
        seeds=(0, 1),
        backbone=tiny_backbone("transformer"),
        data_root=tmp_path,
        out=tmp_path / "grid",
        settings=QUICK,
    )


@pytest.fixture(scope="module")
def finished(photo_set: Path, tiny_backbone: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Grid, list[Cell]]:
    out = tmp_path_factory.mktemp("finished")
    whole = Grid((f"path:{photo_set}",), METHODS, (0, 1), tiny_backbone("transformer"), out, out / "grid", QUICK)
    return whole, run_grid(whole)


def test_run_grid__every_cell_once_in_order(finished: tuple[Grid, list[Cell]]) -> None:
    grid, cells = finished
    assert [(cell.method, cell.seed) for cell in cells] == [(method, seed) for method in METHODS for seed in (0, 1)]
    assert sorted(path.name for path in (grid.out / "cells" / file_name(grid.datasets[0])).iterdir()) == sorted(
        f"{method}-seed{seed}.json" for method in METHODS for seed in (0, 1)
    )


def test_run_grid__a_cell_is_what_the_classifier_does_by_itself(finished: tuple[Grid, list[Cell]]) -> None:
    """The backbone is put back between cells: a model loaded and fitted alone is right on the same images."""
    grid, cells = finished
    folder = Path(grid.datasets[0].removeprefix("path:"))
    for cell in (cells[1], cells[3]):  # not the first of the grid
        config = make_config({**QUICK, "backbone": grid.backbone, "seed": cell.seed, "method": {"name": cell.method}})
        model = FineAlign(["blue", "green", "red"], config=config).fit(folder / "train")
        truth = read_truth(folder / "test", model.texts_.classes)
        for score in type(model.method_).scores:
            found = [one.scores.argmax() for one in predictions(model, truth.paths, score=score)]
            right = "".join("1" if one == label else "0" for one, label in zip(found, truth.labels, strict=True))
            assert cell.correct[score] == right
        start = [
            one.start_scores.argmax()
            for one in predictions(model, truth.paths, with_start=True)
            if one.start_scores is not None
        ]
        assert cell.correct["start"] == "".join(
            "1" if one == label else "0" for one, label in zip(start, truth.labels, strict=True)
        )


def test_run_grid__figures_agree_with_the_images(finished: tuple[Grid, list[Cell]]) -> None:
    for cell in finished[1]:
        for score, letters in cell.correct.items():
            assert len(letters) == 12
            assert cell.top1[score] == pytest.approx(letters.count("1") / 12)
        assert np.array_equal(cell.right, [letter == "1" for letter in cell.correct[cell.score]])
        assert (cell.verdict is not None) == (cell.method == "fair")


@pytest.mark.parametrize(
    ("method", "encoder", "times"),
    [("zero-shot", "full", 1), ("transclip", "full", 1), ("fair", "frozen", 1), ("fair", "full", 2)],
)
def test_run_grid__the_start_is_scored_on_the_same_encoding_where_the_tower_is_the_same(
    grid: Grid, monkeypatch: pytest.MonkeyPatch, method: str, encoder: str, times: int
) -> None:
    asked: list[list[Path]] = []
    features = Predictor.features

    def watched(self: Predictor, paths: Any, **how: Any) -> Any:
        asked.append(list(paths))
        return features(self, asked[-1], **how)

    monkeypatch.setattr(Predictor, "features", watched)
    settings = {**QUICK, "training": {**QUICK["training"], "epochs": 1, "encoder": encoder}}
    (cell,) = run_grid(replace(grid, methods=(method,), seeds=(0,), settings=settings))
    test = sorted((Path(grid.datasets[0].removeprefix("path:")) / "test").rglob("*.png"))
    train = sorted((Path(grid.datasets[0].removeprefix("path:")) / "train").rglob("*.png"))
    encoded = [sorted(paths) for paths in asked]
    assert encoded.count(test) == times
    # A tower that learned has encoded the images adapted to in its label passes, which the verdict is made from.
    assert encoded.count(train) == len(encoded) - times == (encoder == "frozen")
    assert (cell.verdict is not None) == (method == "fair")


def test_run_grid__reruns_nothing_that_is_done(
    finished: tuple[Grid, list[Cell]], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, cells = finished

    def refuse(*_: object) -> None:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(grid_module._Runner, "run", refuse)
    assert run_grid(grid) == cells


def test_run_grid__a_removed_cell_comes_back_the_same(finished: tuple[Grid, list[Cell]]) -> None:
    grid, cells = finished
    grid.path(grid.datasets[0], "fair", 1).unlink()
    ran: list[Cell] = []
    again = run_grid(grid, on_cell=ran.append)
    assert [(cell.method, cell.seed) for cell in ran] == [("fair", 1)]
    assert again[1].correct == cells[1].correct
    assert again[1].verdict == cells[1].verdict


def test_run_grid__a_claim_of_a_living_process_is_left_alone(grid: Grid) -> None:
    grid = replace(grid, methods=("cupl",), seeds=(0,))
    claim = grid.path(grid.datasets[0], "cupl", 0).with_suffix(".claim")
    claim.parent.mkdir(parents=True)
    (grid.out / "grid.json").write_text(json.dumps({"backbone": grid.backbone, "settings": QUICK}))
    started = psutil.Process().create_time()
    claim.write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "started": started}))
    assert run_grid(grid) == []
    claim.write_text(json.dumps({"host": "another-machine", "pid": 1, "started": 0.0}))
    assert run_grid(grid) == []
    assert claim.exists()


@pytest.mark.parametrize("how", ["gone", "a zombie", "its number is another's", "torn long ago"])
def test_run_grid__a_claim_of_a_dead_process_is_taken_over(grid: Grid, how: str) -> None:
    grid = replace(grid, methods=("cupl",), seeds=(0,))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(dead.pid).create_time()
    while psutil.Process(dead.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    if how != "a zombie":
        dead.wait()
    claim = grid.path(grid.datasets[0], "cupl", 0).with_suffix(".claim")
    claim.parent.mkdir(parents=True)
    (grid.out / "grid.json").write_text(json.dumps({"backbone": grid.backbone, "settings": QUICK}))
    pid = os.getpid() if how == "its number is another's" else dead.pid
    started = started - 1000 if how == "its number is another's" else started
    for _ in range(2):  # the second is of a process that was killed after it had written the cell
        claim.write_text(
            "{" if "torn" in how else json.dumps({"host": platform.node(), "pid": pid, "started": started})
        )
        os.utime(claim, (0, 0))
        assert len(run_grid(grid)) == 1
        assert not claim.exists()
    dead.wait()


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"methods": ("fair", "fiar")}, ConfigError, "Did you mean 'fair'"),
        ({"methods": ("dpa@publishd",)}, ConfigError, "dpa@published"),
        ({"settings": {"training": {"epoch": 3}}}, ConfigError, "epochs"),
        ({"datasets": ("flowers",)}, FinealignError, "flowers102"),
        ({"datasets": ("path:/nowhere/at/all",)}, FinealignError, "No folder at /nowhere/at/all"),
        ({"backbone": "local-dir:/nowhere"}, FinealignError, "No open_clip model"),
    ],
)
def test_run_grid__what_is_wrong_stops_it(grid: Grid, change: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        run_grid(replace(grid, **change))
    assert not list(grid.out.rglob("*-seed*.json"))


def test_run_grid__other_settings_need_another_folder(finished: tuple[Grid, list[Cell]]) -> None:
    grid, _ = finished
    with pytest.raises(OutputError, match="choose another --out"):
        run_grid(replace(grid, settings={**QUICK, "training": {"epochs": 1}}))
    with pytest.raises(OutputError, match="holds no grid"):
        run_grid(replace(grid, out=Path(grid.datasets[0].removeprefix("path:"))))


def test_run_grid__a_test_image_that_cannot_be_read_stops_the_table(grid: Grid, tmp_path: Path) -> None:
    write_photos(tmp_path / "torn" / "train")
    write_photos(tmp_path / "torn" / "test", each=2)
    (tmp_path / "torn" / "test" / "red" / "0.png").write_bytes(b"no image")
    with pytest.raises(FinealignError, match=r"1 test images cannot be read, the first .*0\.png"):
        run_grid(replace(grid, datasets=(f"path:{tmp_path / 'torn'}",), methods=("cupl",)))


def test_read_cells__by_whichever_name_the_folder_is_given(
    finished: tuple[Grid, list[Cell]], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, cells = finished
    folder = Path(grid.datasets[0].removeprefix("path:"))
    monkeypatch.chdir(folder.parent)
    other = f"path:{folder.name}"
    found = read_cells(replace(grid, datasets=(other,)))
    assert [cell.correct for cell in found] == [cell.correct for cell in cells]
    assert {cell.dataset for cell in found} == {other}


def test_read_cells__one_of_an_earlier_version_says_nothing_of_hardware(
    finished: tuple[Grid, list[Cell]], tmp_path: Path
) -> None:
    grid, cells = finished
    assert cells[0].hardware["precision"] == "fp32" and len(cells[0].weights["checksum"]) == 64
    values = {name: value for name, value in asdict(cells[0]).items() if name not in ("hardware", "weights")}
    path = replace(grid, out=tmp_path).path(cells[0].dataset, cells[0].method, cells[0].seed)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(values), encoding="utf-8")
    (read,) = read_cells(replace(grid, out=tmp_path))
    assert (read.correct, read.hardware, read.weights) == (cells[0].correct, {}, {})


def test_read_cells__a_torn_cell_is_named(finished: tuple[Grid, list[Cell]], tmp_path: Path) -> None:
    grid = replace(finished[0], out=tmp_path)
    path = grid.path(grid.datasets[0], "cupl", 0)
    path.parent.mkdir(parents=True)
    path.write_text('{"dataset": "x"')
    with pytest.raises(OutputError, match=r"cupl-seed0\.json is not a cell"):
        read_cells(grid)


def test_grid__goes_on_after_a_kill(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed without warning in the middle, the same command finishes what is left and only that."""
    options = ["--datasets", grid.datasets[0], "--methods", "cupl,fair", "--seeds", "0,1,2", "--out", str(grid.out)]
    quick = ["device=cpu", "precision=fp32", "views.crops=2", "training.epochs=2", "training.batch_size=8"]
    settings = [part for one in quick for part in ("--set", one)]
    command = [sys.executable, "-m", "finealign", "benchmark", *options, "--backbone", grid.backbone, *settings]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + HANG
    while not list(grid.out.rglob("fair-seed0.json")) and time.monotonic() < deadline:
        assert running.poll() is None
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = {path: path.stat().st_mtime_ns for path in grid.out.rglob("*-seed*.json")}
    assert 4 <= len(before) < 6  # cupl comes first
    monkeypatch.setattr("finealign.runtime.devices.keep_freed_memory", lambda: False)
    done = CliRunner().invoke(app, [*command[3:], "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert not found["missing"]
    assert [row["method"] for row in found["methods"]] == ["cupl", "fair"]
    assert len(list(grid.out.rglob("*-seed*.json"))) == 6
    assert not list(grid.out.rglob("*.claim"))
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert {path.name for path in grid.out.glob("table.*")} == {"table.md", "table.csv", "table.json"}
