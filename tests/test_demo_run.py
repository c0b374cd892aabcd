"""The demo's runner and picture, in a stand-in world of coloured squares with a tiny backbone.

What the real world and the real model are is tested beside them; here it is what is run, measured, written, refused.
"""

import csv
import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import CLASSES, HANG, predictions, tiny_config, write_photos
from finealign import FineAlign
from finealign.config import make_config, read_config
from finealign.demo import picture, run
from finealign.demo.picture import Example, Panels, compose, draw, relative, spread, tinted
from finealign.demo.result import CONTENTS, DemoResult
from finealign.demo.run import choose_examples, default_folder, run_demo
from finealign.demo.world import World
from finealign.errors import ConfigError, ImageInputError, ModelError, OutputError
from finealign.run import adapt as run_folder
from finealign.runtime.progress import Progress
from finealign.types import Explanation
from test_cli import command, discerning, only_json

Tiny = Callable[[str], str]
ORDER = ["zero-shot", "cupl", "wca", "self-training", "fair"]
RUN_FOLDER = {
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "predictions.csv",
    "set_aside.csv",
    "examples",
    "model",
    "checkpoints",
    "report.html",
}
LEFT = {"world", "self-training", "fair", "demo.png", "demo.json", "report.md"}
DESCRIPTIONS: dict[str, tuple[str, ...]] = {name: (f"A {name} square.", f"It is {name} all over.") for name in CLASSES}
PLACE = {"device": "cpu", "precision": "fp32"}
# So that a few steps are seen in the labels.
FEW = {"batch_size": 8, "anchor_steps": 8, "learning_rate": 0.1, "anchor_learning_rate": 0.1}
SMALL: dict[str, Any] = {**PLACE, "views": {"crops": 3}, "training": {"epochs": 2, **FEW}}
SHIPPED = run.SETTINGS  # before the stand-in


def stand_in(
    folder: Path, *, seed: int, unlabelled: int, test: int, progress: Progress | None = None, shift: int = 0
) -> World:
    """Coloured squares, whose truth is another class for every fifth, so that no accuracy is nought or one."""
    photos = write_photos(folder / "made")
    (folder / "unlabelled").mkdir()
    (folder / "test").mkdir()
    rows = []
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        path.rename(folder / ("test" if number % 2 else "unlabelled") / f"{number}.png")
        if number % 2:
            label = CLASSES[(CLASSES.index(path.parent.name) + number % 5 // 4 + shift) % 3]
            rows.append(f"test/{number}.png,{label}\n")
    shutil.rmtree(photos)
    (folder / "test.csv").write_text("path,label\n" + "".join(rows), encoding="utf-8")
    # Nobody has a use for the labels of the unlabelled images, so there are none here.
    hidden = folder / "nowhere.csv"
    return World(folder / "unlabelled", folder / "test.csv", hidden, tuple(CLASSES), DESCRIPTIONS)


@pytest.fixture(scope="module", autouse=True)
def small(tiny_backbone: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The stand-ins for what is large, and the usual memory for the verb; the backbone's identifier."""
    folder = tmp_path_factory.mktemp("small")
    backbone = discerning(tiny_backbone("transformer"), write_photos(folder / "photos"), folder / "backbone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_world", stand_in)
        patch.setattr(run, "demo_model", lambda: backbone)
        patch.setattr(run, "SETTINGS", SMALL)
        patch.setattr("finealign.runtime.devices.keep_freed_memory", lambda: False)
        yield backbone


@pytest.fixture(scope="module")
def finished(small: str, tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    """A demo that ran to its end; nothing may write into it."""
    return run_demo(tmp_path_factory.mktemp("demos") / "a demo", seed=3)


def snapshot(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def learned(folder: Path) -> list[str]:
    names = ("finealign.safetensors", "open_clip_model.safetensors")
    return [sha256((folder / "model" / name).read_bytes()).hexdigest() for name in names]


def truth(folder: Path) -> dict[Path, str]:
    rows = csv.DictReader((folder / "test.csv").read_text(encoding="utf-8").splitlines())
    return {folder / row["path"]: row["label"] for row in rows}


def accuracy(model: FineAlign, world: Path) -> float:
    known = truth(world)
    return float(np.mean(model.predict(list(known)) == np.array(list(known.values()), dtype=object)))


# --- what it finds ----------------------------------------------------------------------------------------------------


def test_run_demo__its_json(finished: DemoResult) -> None:
    found = json.loads((finished.folder / "demo.json").read_text(encoding="utf-8"))
    assert found == json.loads(json.dumps(finished.as_json()))
    assert set(found) == {
        "results", "chance", "out", "picture", "report", "seconds", "seed", "quick", "images",
    }  # fmt: skip
    assert [row["method"] for row in found["results"]] == ORDER
    for row in found["results"]:
        assert set(row) == {"method", "top1", "seconds", "images_per_second"}
        assert 0 <= row["top1"] <= 1
        assert row["seconds"] > 0 and row["images_per_second"] > 0
    assert found["chance"] == pytest.approx(1 / 3)
    assert found["images"] == {"unlabelled": 12, "test": 12}
    assert (found["seed"], found["quick"], found["out"]) == (3, False, str(finished.folder))
    assert Path(found["picture"]) == finished.folder / "demo.png"
    assert Path(found["report"]) == finished.folder / "report.md"
    assert found["seconds"] > sum(row["seconds"] for row in found["results"])


def test_run_demo__leaves_what_it_says_and_whole_run_folders(finished: DemoResult) -> None:
    assert {path.name for path in finished.folder.iterdir()} == LEFT == set(CONTENTS)
    written = {}
    for name in ("self-training", "fair"):
        assert {path.name for path in (finished.folder / name).iterdir()} == RUN_FOLDER
        told = json.loads((finished.folder / name / "run.json").read_text(encoding="utf-8"))
        assert (told["status"], told["method"], told["seed"], told["images"]) == ("complete", name, 3, 12)
        assert (finished.folder / name / "metrics.jsonl").read_text(encoding="utf-8").count("\n") == 2
        written[name] = yaml.safe_load((finished.folder / name / "config.yaml").read_text(encoding="utf-8"))
        assert written[name].pop("method")["name"] == name
    assert written["fair"] == written["self-training"]  # the same pace for both
    assert [one.run for one in finished.methods] == [None] * 3 + [finished.folder / name for name in ORDER[3:]]


def test_run_demo__top1_is_what_a_count_gives(finished: DemoResult, small: str) -> None:
    """Trained methods by their saved run, the others fitted anew; each by its default score."""
    world = finished.folder / "world"
    top1 = {one.method: one.top1.mean for one in finished.methods}
    for name in ("self-training", "fair"):
        loaded = FineAlign.load(finished.folder / name, device="cpu", precision="fp32")
        assert top1[name] == pytest.approx(accuracy(loaded, world))
    for name, crops in (("zero-shot", 1), ("cupl", 1), ("wca", 3)):
        method = {"method": {"name": name}, "views": {"crops": crops}, "seed": 3}
        config = make_config({**PLACE, "backbone": small, **method})
        model = FineAlign(CLASSES, descriptions=DESCRIPTIONS, config=config)
        assert top1[name] == pytest.approx(accuracy(model.fit(world / "unlabelled"), world))
    assert len(set(top1.values())) > 1  # or the comparisons would prove little


def test_run_demo__gains_are_held_against_the_descriptions(finished: DemoResult) -> None:
    top1 = {one.method: one.top1.mean for one in finished.methods}
    for one in finished.methods:
        if one.method == "cupl":
            assert one.gain is None
        else:
            assert one.gain is not None
            assert one.gain.mean == pytest.approx(one.top1.mean - top1["cupl"])
            assert one.gain.low <= one.gain.mean <= one.gain.high


def test_run_demo__curves_go_from_the_start_to_the_end(finished: DemoResult) -> None:
    found = {one.method: one for one in finished.methods}
    for name in ("zero-shot", "cupl", "wca"):
        assert found[name].curve == ()
    for name in ("self-training", "fair"):
        curve = found[name].curve
        assert len(curve) == 3  # the start and two epochs
        config = read_config(finished.folder / name / "config.yaml")
        unlearned = FineAlign(CLASSES, descriptions=DESCRIPTIONS, config=config).unlearned()
        assert curve[0] == accuracy(unlearned, finished.folder / "world")
        assert curve[-1] == found[name].top1.mean
    assert found["self-training"].curve[0] == found["cupl"].top1.mean
    assert len({*found["self-training"].curve, *found["fair"].curve}) > 1  # or this would prove little


def test_run_demo__the_truth_changes_nothing_that_is_learned(
    finished: DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "make_world", lambda folder, **how: stand_in(folder, shift=1, **how))
    other = run_demo(tmp_path / "demo", seed=3)
    assert [one.top1 for one in other.methods] != [one.top1 for one in finished.methods]
    for name in ("self-training", "fair"):
        assert learned(other.folder / name) == learned(finished.folder / name)


def test_run_demo__quick_has_fewer_images_and_the_seed_goes_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def make(folder: Path, **how: Any) -> World:
        asked.append({name: how[name] for name in ("seed", "unlabelled", "test")})
        return stand_in(folder, **how)

    monkeypatch.setattr(run, "make_world", make)
    seen = fitted(monkeypatch)
    found = run_demo(tmp_path / "demo", seed=5, quick=True)
    assert asked == [{"seed": 5, **run.QUICK_IMAGES}]
    assert found.as_json()["quick"] is True
    assert seen == [(name, 3, 5) for name in ORDER]
    assert [len(one.curve) for one in found.methods] == [0, 0, 0, 3, 3]


def fitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Method, crops and seed of each fit from now on."""
    seen: list[tuple[str, int, int]] = []
    fit = FineAlign.fit

    def watched(self: FineAlign, *images: Any, **how: Any) -> FineAlign:
        assert self.config is not None
        seen.append((self.config.method.name, self.config.views.crops, self.config.seed))
        return fit(self, *images, **how)

    monkeypatch.setattr(FineAlign, "fit", watched)
    return seen


def test_settings__as_shipped_are_valid() -> None:
    assert "method" not in SHIPPED
    assert make_config(SHIPPED).training.epochs != 1  # so that there is a curve
    assert all(run.QUICK_IMAGES[name] < number for name, number in run.DEMO_IMAGES.items())


# --- time -------------------------------------------------------------------------------------------------------------


class Clock:
    """Stands still unless a test moves it; the module ``time`` for those who look at it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
        self.now = 1.7e9
        seen = SimpleNamespace(
            time=lambda: self.now, perf_counter=lambda: self.now, strftime=time.strftime, localtime=time.localtime
        )
        for module in modules:
            monkeypatch.setattr(module, "time", seen)

    def costs(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, seconds: float) -> None:
        """Every call takes so long."""
        before = getattr(owner, name)

        def slow(*arguments: Any, **how: Any) -> Any:
            self.now += seconds
            return before(*arguments, **how)

        monkeypatch.setattr(owner, name, slow)


def test_seconds__are_of_adapting_and_scoring_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, run, run_folder)
    clock.costs(monkeypatch, run, "make_world", 100_000)
    clock.costs(monkeypatch, FineAlign, "load_backbone", 10_000)
    clock.costs(monkeypatch, FineAlign, "save", 1000)
    clock.costs(monkeypatch, FineAlign, "_begin", 7)  # once a fit
    features = FineAlign.features

    def slow(self: FineAlign, paths: Any, *, at_start: bool = False, crops: bool = True) -> Any:
        if paths[0].parent.name == "test":
            clock.now += 300 if crops else 100
        return features(self, paths, at_start=at_start, crops=crops)

    monkeypatch.setattr(FineAlign, "features", slow)
    found = run_demo(tmp_path / "demo", quick=True)
    cost = dict(zip(ORDER, (100, 100, 300, 100, 300), strict=True))
    for one in found.methods:
        assert one.seconds == pytest.approx(7 + cost[one.method])
        assert one.images_per_second == pytest.approx(12 / cost[one.method])
    # What the backbone sees before it learns is encoded once for all methods. Beside the world, the load and a warm-up:
    # for each trained method the start, which is a model of its own, a save, the first epoch, and the end.
    every = 100_000 + 10_000 + 100 + 3 * 7 + (100 + 300) + 2 * (2 * 7 + 1000) + 2 * (100 + 300)
    assert found.seconds == pytest.approx(every)


def test_adapt_into__the_time_of_a_listener_is_in_no_timing(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, run_folder)
    clock.costs(monkeypatch, FineAlign, "load_backbone", 3)
    clock.costs(monkeypatch, FineAlign, "_begin", 5)
    model = FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer")))

    def listen(record: Any) -> None:
        clock.now += 1000

    summary = run_folder.adapt_into(tmp_path / "run", model, photos, keep_adapted=True, on_epoch=listen)
    assert [summary.fit_seconds, summary.seconds] == pytest.approx([5, 8])
    told = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert told["seconds"] == {"fit": 8, "total": 8}


# --- the listener -----------------------------------------------------------------------------------------------------


def test_adapt_into__a_listener_sees_the_model_as_it_is_and_changes_nothing(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    config = tiny_config(tiny_backbone("transformer"), training__learning_rate=1e-2)
    seen: list[Any] = []
    lines: list[int] = []
    watched = FineAlign(CLASSES, config=config)

    def look(record: Any) -> None:
        seen.append(np.stack([found.scores for found in predictions(watched, paths, with_start=True)]))
        lines.append((tmp_path / "watched" / "metrics.jsonl").read_text(encoding="utf-8").count("\n"))

    paths = sorted(photos.rglob("*.png"))
    run_folder.adapt_into(tmp_path / "watched", watched, photos, keep_adapted=True, on_epoch=look)
    run_folder.adapt_into(tmp_path / "alone", FineAlign(CLASSES, config=config), photos, keep_adapted=True)
    assert lines == [1, 2, 3]
    assert learned(tmp_path / "watched") == learned(tmp_path / "alone")
    final = np.stack([found.scores for found in predictions(watched, paths)])
    np.testing.assert_array_equal(seen[-1], final)
    assert not np.allclose(seen[0], seen[1]) and not np.allclose(seen[1], seen[2])


# --- the folder -------------------------------------------------------------------------------------------------------


def test_folder__a_demo_is_there_already(finished: DemoResult) -> None:
    before = snapshot(finished.folder)
    with pytest.raises(OutputError, match=r"already holds a demo. Use --overwrite .* --out"):
        run_demo(finished.folder)
    assert snapshot(finished.folder) == before


@pytest.mark.parametrize(
    ("holds", "missing"),
    [
        (["thesis.txt"], "demo.json and world are missing"),
        (["demo.json", "fair"], "world is missing"),
        (["world", "fair", "report.md"], "demo.json is missing"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_folder__what_is_no_demo_is_not_touched(
    tmp_path: Path, holds: list[str], missing: str, overwrite: bool
) -> None:
    for name in holds:
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / name).write_text("years of work", encoding="utf-8")
    before = snapshot(tmp_path / "mine")
    with pytest.raises(OutputError, match=f"holds {len(holds)} things and is not the folder of a demo .{missing}"):
        run_demo(tmp_path / "mine", overwrite=overwrite)
    assert snapshot(tmp_path / "mine") == before


def test_folder__overwrite_replaces_its_own_and_nothing_else(finished: DemoResult, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.folder, tmp_path / "demo"))
    (folder / "labels.csv").write_text("mine", encoding="utf-8")
    (folder / "world" / "test" / "stale.png").write_text("of another seed", encoding="utf-8")
    (folder / "report.md").write_text("old", encoding="utf-8")
    (folder / "demo.png").unlink()
    found = run_demo(folder, quick=True, overwrite=True)
    assert {path.name for path in folder.iterdir()} == LEFT | {"labels.csv"}
    assert (folder / "labels.csv").read_text(encoding="utf-8") == "mine"
    assert not (folder / "world" / "test" / "stale.png").exists()
    assert json.loads((folder / "demo.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found.as_json()))
    assert "Seed 0" in (folder / "report.md").read_text(encoding="utf-8")


def test_folder__one_that_was_stopped_can_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "adapt_into", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path / "demo", quick=True)
    assert json.loads((tmp_path / "demo" / "demo.json").read_text(encoding="utf-8"))["status"] == "running"
    with pytest.raises(OutputError, match="already holds a demo"):
        run_demo(tmp_path / "demo", quick=True)
    (tmp_path / "demo" / "world" / "stale.png").touch()
    with pytest.raises(KeyboardInterrupt):  # as far as before
        run_demo(tmp_path / "demo", quick=True, overwrite=True)
    assert not (tmp_path / "demo" / "world" / "stale.png").exists()


def interrupt(*arguments: Any, **how: Any) -> Any:
    raise KeyboardInterrupt


def test_folder__a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="is a file"):
        run_demo(tmp_path / "demo", overwrite=True)
    assert (tmp_path / "demo").read_text(encoding="utf-8") == "mine"


def broken_model() -> str:
    raise ModelError("The demo's model is not whole.")


@pytest.mark.parametrize("mistake", ["model", "seed"])
def test_run_demo__what_cannot_work_is_told_before_anything_is_removed(
    finished: DemoResult, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    before = snapshot(finished.folder)
    if mistake == "model":
        monkeypatch.setattr(run, "demo_model", broken_model)
    with pytest.raises(ModelError if mistake == "model" else ConfigError):
        run_demo(finished.folder, seed=-1 if mistake == "seed" else 0, overwrite=True)
    assert snapshot(finished.folder) == before


def test_run_demo__a_world_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, **how: Any) -> World:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "make_world", full)
    with pytest.raises(OutputError, match=r"world cannot be drawn in .*No space left"):
        run_demo(tmp_path / "demo")


def test_run_demo__a_test_image_that_was_damaged_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(folder: Path, **how: Any) -> World:
        world = stand_in(folder, **how)
        (folder / "test" / "1.png").write_bytes(b"\x89PNG torn")
        return world

    monkeypatch.setattr(run, "make_world", damaged)
    with pytest.raises(ImageInputError, match=r"1.png of the demo's world cannot be read any more: .*--overwrite"):
        run_demo(tmp_path / "demo")


def test_default_folder__tells_seed_and_quick() -> None:
    assert default_folder(seed=4, quick=False) == Path("runs/demo-seed4")
    assert default_folder(seed=0, quick=True) == Path("runs/demo-seed0-quick")


# --- the report -------------------------------------------------------------------------------------------------------


def test_report__has_the_figures_and_says_what_the_world_is(finished: DemoResult) -> None:
    report = finished.report.read_text(encoding="utf-8")
    assert "synthetic" in report
    rows = re.findall(r"^\| ([\w-]+) \| .* \|$", report, re.MULTILINE)
    assert rows == ["method", *ORDER]
    for one in finished.methods:
        assert re.search(rf"^\| {one.method} \|[^|]*\| {re.escape(f'{one.top1.mean:.1%}')} \|", report, re.MULTILINE)
    assert f"Chance is {1 / 3:.1%}" in report
    for _, target in re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", report):
        assert (finished.folder / target).is_file()
    (shown,) = re.findall(r"^```yaml\n(.*?)^```", report, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(shown) == SMALL
    for name in ("self-training", "fair"):
        assert str(finished.folder / name) in report


def test_report__its_commands_run_and_agree(finished: DemoResult, tmp_path: Path) -> None:
    """The folder's name has a space in it."""
    folder = Path(shutil.copytree(finished.folder, tmp_path / "a demo"))
    report = finished.report.read_text(encoding="utf-8").replace(str(finished.folder), str(folder))
    (commands,) = re.findall(r"^```bash\n(.*?)^```", report, re.DOTALL | re.MULTILINE)
    predict, evaluate = (shlex.split(line) for line in commands.splitlines())
    assert predict[0] == evaluate[0] == "finealign"
    assert command(*predict[1:]).exit_code == 0
    assert (folder / "labels.csv").read_text(encoding="utf-8").count("\n") == 13
    found = only_json(command(*evaluate[1:], "--device", "cpu", "--precision", "fp32", "--json"))
    by_method = {one.method: one for one in finished.methods}
    assert found["adapted"]["top1"] == pytest.approx(by_method["fair"].top1.mean)
    assert found["start"]["top1"] == pytest.approx(by_method["cupl"].top1.mean)
    gain = by_method["fair"].gain
    assert gain is not None
    difference = {name: found["difference"][name] for name in ("top1", "low", "high")}
    assert difference == pytest.approx({"top1": gain.mean, "low": gain.low, "high": gain.high})


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_demo__prints_one_object(finished: DemoResult, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.folder, tmp_path / "demo"))
    error = only_json(command("demo", "--out", folder, "--json"), code=1)
    assert error["kind"] == "OutputError"
    found = only_json(command("demo", "--out", folder, "--seed", "2", "--quick", "--overwrite", "--json"))
    assert [row["method"] for row in found["results"]] == ORDER
    assert (found["seed"], found["quick"]) == (2, True)


def test_demo__for_a_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = command("demo", "--quick")
    assert result.exit_code == 0
    assert all(line.startswith("Caution: ") for line in result.stderr.splitlines())
    folder = Path("runs") / "demo-seed0-quick"
    found = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    shown = result.stdout
    places = [re.search(rf"\W{row['method']} .*\W{row['top1']:.1%}\W", shown) for row in found["results"]]
    assert all(places)
    assert [place.start() for place in places if place] == sorted(place.start() for place in places if place)
    assert "Chance is 33.3%" in shown
    assert "synthetic" in shown
    assert f"Picture: {folder / 'demo.png'}\nReport: {folder / 'report.md'}\n" in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_demo__interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "make_world", interrupt)
    result = command("demo", "--out", tmp_path / "demo")
    assert result.exit_code == 1
    assert "--overwrite starts the demo in" in result.stderr


def test_demo__its_help_is_light() -> None:
    code = """
import sys
from finealign.cli import app
from typer.testing import CliRunner
result = CliRunner().invoke(app, ["demo", "--help"])
assert result.exit_code == 0 and "--quick" in result.output, result.output
print(*{"torch", "open_clip", "timm", "numpy", "PIL", "matplotlib"} & set(sys.modules))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, check=False)
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr


# --- which images are shown -------------------------------------------------------------------------------------------


def chosen(mended: int, broken: int, still: int, most: int = 6) -> tuple[int, int, int]:
    """How many of each are shown of so many."""
    kinds = np.repeat([0, 1, 2, 3, 4], [mended, broken, still, 5, 5])  # the last two kept their label
    truth = np.arange(len(kinds)) % 4
    before = np.where(np.isin(kinds, [1, 3]), truth, (truth + 1) % 4)
    after = np.select([np.isin(kinds, [0, 3]), kinds == 4], [truth, before], (truth + 2) % 4)
    found = choose_examples(before, after, truth, most=most)
    assert len(set(found)) == len(found) <= most
    shown = kinds[np.array(found, dtype=int)].tolist()
    assert shown == sorted(shown)
    assert not {3, 4} & set(shown)
    return shown.count(0), shown.count(1), shown.count(2)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((160, 20, 30), (5, 1, 0)),
        ((90, 90, 30), (3, 3, 0)),
        ((20, 40, 0), (2, 4, 0)),
        ((500, 1, 0), (5, 1, 0)),  # few made wrong, but not none
        ((500, 0, 30), (6, 0, 0)),
        ((2, 1, 30), (2, 1, 3)),
        ((0, 50, 0), (0, 6, 0)),
        ((0, 0, 4), (0, 0, 4)),
        ((1, 1, 0), (1, 1, 0)),
        ((0, 0, 0), (0, 0, 0)),
    ],
)
def test_choose_examples__in_proportion(numbers: tuple[int, int, int], expected: tuple[int, int, int]) -> None:
    assert chosen(*numbers) == expected


def test_choose_examples__from_all_over_the_classes() -> None:
    truth = np.repeat(np.arange(6), 20)
    found = choose_examples((truth + 1) % 6, truth, truth, most=6)
    assert truth[found].tolist() == [0, 1, 2, 3, 4, 5]


# --- the picture ------------------------------------------------------------------------------------------------------


def example(path: Path, before: int, after: int, truth: int, weights: list[float]) -> Example:
    boxes = tuple((number, number, number + 12, number + 12) for number in range(len(weights)))
    none = np.zeros(0, dtype=np.float32)
    seen = Explanation(30, 24, "las", boxes, np.array(weights, dtype=np.float32), none, none)
    return Example(path, seen, before, after, truth)


@pytest.fixture
def panels(tmp_path: Path) -> Panels:
    """What a demo of 24 classes might have found, with names of trying length."""
    path = tmp_path / "bird.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(path)
    confusion = np.random.default_rng(1).integers(0, 4, (24, 24)) + 10 * np.eye(24, dtype=np.int64)
    return Panels(
        title="a title",
        note="a note",
        classes=tuple(f"wren ${number}$ of the Northern isles" for number in range(24)),
        curves={"self-training": [0.5, 0.52, 0.51], "fair": [0.5, 0.6, 0.7]},
        levels={"zero-shot": 0.045, "cupl": 0.5, "wca": 0.505},
        chance=1 / 24,
        before=confusion,
        after=confusion.T,
        before_name="before",
        after_name="after",
        examples=[example(path, 1, 2, 2, [0.2, 0.5, 0.3]), *[example(path, 3, 4, 3, [0.5, 0.5])] * 5],
        strip="3 of 4 changed",
        group=3,
    )


def texts(figure: Any) -> dict[str, Any]:
    """Every text that is drawn, by what it says, with its place in pixels."""
    from matplotlib.text import Text

    figure.canvas.draw()
    found = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    return {f"{number} {text.get_text()}": text for number, text in enumerate(found)}


def test_picture__of_the_demo_is_a_png_of_the_promised_size(finished: DemoResult) -> None:
    with Image.open(finished.picture) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (1600, 1150))
        colours = image.getcolors(1 << 24)
    assert colours is not None and len(colours) > 1000


@pytest.mark.parametrize("case", ["usual", "no change", "all alike", "many classes", "two classes", "perfect"])
def test_picture__no_text_touches_another_or_leaves_the_picture(panels: Panels, case: str) -> None:
    from matplotlib.text import Text

    if case == "no change":
        panels = replace(panels, examples=[])
    elif case == "all alike":
        alike = dict.fromkeys(panels.levels, 0.04)
        panels = replace(panels, levels=alike, curves={"self-training": [0.04] * 9, "fair": [0.04] * 9}, chance=0.04)
    elif case == "perfect":
        panels = replace(panels, levels=dict.fromkeys(panels.levels, 1.0), curves={"fair": [0.99] + [1.0] * 60})
    elif case == "many classes":
        many = tuple(f"class {number}" for number in range(200))
        panels = replace(panels, classes=many, before=np.eye(200, dtype=np.int64), after=np.ones((200, 200), np.int64))
    elif case == "two classes":
        two = replace(panels.examples[0], before=0, after=1, truth=1)
        none = np.zeros((2, 2), dtype=np.int64)
        panels = replace(panels, classes=("a", "b"), before=none, after=none, examples=[two], chance=0.5, group=None)
    # Of the class itself: an annotation would count its hair to the line.
    placed = {name: Text.get_window_extent(text) for name, text in texts(compose(panels)).items()}
    assert len(placed) > 20
    for name, box in placed.items():
        assert min(box.x0, box.y0) >= 0 and box.x1 <= 1600 and box.y1 <= 1150, name
    names = sorted(placed)
    touching = [
        (first, second)
        for index, first in enumerate(names)
        for second in names[index + 1 :]
        if placed[first].x0 < placed[second].x1 - 1
        and placed[second].x0 < placed[first].x1 - 1
        and placed[first].y0 < placed[second].y1 - 1
        and placed[second].y0 < placed[first].y1 - 1
    ]
    assert not touching


def test_picture__says_right_and_wrong_by_sign_and_colour(panels: Panels) -> None:
    panels = replace(panels, classes=tuple(f"c{number}" for number in range(24)))
    found = [(text.get_text(), text.get_color()) for text in texts(compose(panels)).values()]
    strip = [(text, colour) for text, colour in found if text[:1] in "✓✗"]
    assert strip[:2] == [("✗ c1", picture.WRONG), ("✓ c2", picture.RIGHT)]
    assert strip[2:4] == [("✓ c3", picture.RIGHT), ("✗ c4", picture.WRONG)]
    written = [text for text, _ in found]
    assert written.count("(truth: c2)") == 1 and written.count("(truth: c3)") == 5
    assert "3 crops count 20.0% to 50.0% each" in written
    assert {"fair 70.0%", "self-training 51.0%", "wca 50.5%", "cupl 50.0%", "zero-shot 4.5%", "chance 4.2%"} <= {
        *written
    }


def test_picture__curves_levels_and_boxes_are_where_they_belong(panels: Panels) -> None:
    from matplotlib.patches import Rectangle

    figure = compose(panels)
    lines = {tuple(np.asarray(line.get_ydata()).tolist()) for line in figure.axes[0].lines}
    assert lines == {(0.5, 0.6, 0.7), (0.5, 0.52, 0.51), *((level, level) for level in (0.045, 0.5, 0.505, 1 / 24))}
    (strip,) = [axes for axes in figure.axes if len(axes.patches) == 3]
    boxes = [patch for patch in strip.patches if isinstance(patch, Rectangle)]
    assert {(box.get_x(), box.get_y(), box.get_width(), box.get_height()) for box in boxes} == {
        (-0.5, -0.5, 12, 12), (0.5, 0.5, 12, 12), (1.5, 1.5, 12, 12),
    }  # fmt: skip
    by_place = sorted(boxes, key=lambda box: box.get_x())  # weights 0.2, 0.5, 0.3
    widths = [box.get_linewidth() for box in by_place]
    opacities = [float(box.get_alpha() or 0) for box in by_place]
    assert widths[0] < widths[2] < widths[1] and opacities[0] < opacities[2] < opacities[1]
    assert [box.get_x() for box in boxes] == [-0.5, 1.5, 0.5]  # the heaviest on top


def test_picture__pale_lines_part_the_groups(panels: Panels) -> None:
    def parted(group: int | None) -> int:
        return len(compose(replace(panels, group=group)).axes[1].lines)

    assert (parted(3), parted(12), parted(None), parted(5)) == (14, 2, 0, 0)


def test_picture__keeps_no_global_state(panels: Panels) -> None:
    code = "import sys, finealign.demo.picture; print('matplotlib' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, check=True)
    assert ran.stdout == "False\n"
    before = "matplotlib.pyplot" in sys.modules
    assert draw(panels) == draw(panels)
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_tinted__blue_on_the_diagonal_vermilion_beside_it_darker_for_more() -> None:
    found = tinted(np.array([[8, 2, 0], [5, 5, 0], [0, 0, 0]]))
    assert found.shape == (3, 3, 3)
    for cell in ((0, 2), (2, 0), (2, 2)):
        assert found[cell].tolist() == [1, 1, 1]
    assert found[0, 0, 2] > found[0, 0, 0]  # more blue than red
    assert found[0, 1, 0] > found[0, 1, 2]
    assert found[0, 0].sum() < found[1, 1].sum()
    assert found[1, 0].sum() < found[0, 1].sum()
    assert found.min() >= 0


def test_relative__from_the_lightest_to_the_heaviest() -> None:
    assert relative(np.array([0.2, 0.5, 0.35], dtype=np.float32)).tolist() == pytest.approx([0, 1, 0.5])
    assert relative(np.array([0.5, 0.5], dtype=np.float32)).tolist() == [1, 1]
    assert relative(np.array([], dtype=np.float32)).tolist() == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12).map(sorted))
def test_spread__keeps_its_distance_and_its_order(places: list[float]) -> None:
    found = spread(places, apart=0.05)
    assert len(found) == len(places)
    assert all(later - earlier >= 0.05 - 1e-9 for earlier, later in itertools.pairwise(found))
    assert min(found, default=0.0) >= 0
    if all(later - earlier >= 0.05 for earlier, later in itertools.pairwise(places)):
        assert found == pytest.approx(places)


def test_spread__moves_no_more_than_it_must() -> None:
    assert spread([0.5, 0.5], apart=0.1) == pytest.approx([0.45, 0.55])
    assert spread([0.0, 0.01, 0.9], apart=0.1) == pytest.approx([0.0, 0.1, 0.9])


def test_terminal__the_table_needs_no_terminal(finished: DemoResult) -> None:
    from rich.console import Console

    from finealign.cli.tables import demo_table

    written = io.StringIO()
    demo_table(finished, Console(file=written, width=100))
    for row in finished.methods:
        assert f"{row.top1.mean:.1%}" in written.getvalue()
