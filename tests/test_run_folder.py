"""The run folder: what a run leaves, what it refuses to touch, and that a resumed run is the run."""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import CLASSES, tiny_config, write_photos
from finealign import FineAlign, __version__
from finealign.config import Config, read_config
from finealign.errors import BackboneError, FinealignError, ImageInputError, OutputError
from finealign.images.listing import list_images
from finealign.run.adapt import RunSummary, adapt_into, default_folder, plan
from finealign.run.contract import LOCK
from finealign.runtime.progress import Progress, Stage

Tiny = Callable[[str], str]
CONTRACT = {
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
nightly = pytest.mark.nightly
EPOCHS = 4  # of three steps each


class StoppedError(Exception):
    """What a test raises in the middle of a run."""


def adapt(
    folder: Path,
    images: Any,
    config: Config,
    *,
    classes: list[str] | None = None,
    descriptions: dict[str, list[str]] | None = None,
    **how: Any,
) -> RunSummary:
    """The adapted model is kept, whatever the verdict on these photos is: tests/test_verdict.py has that."""
    how = {"keep_adapted": True, **how}
    return adapt_into(folder, FineAlign(classes or CLASSES, descriptions=descriptions, config=config), images, **how)


def four_epochs(backbone: str, **overrides: Any) -> Config:
    # A label pass an epoch, whatever the default is.
    config: Config = tiny_config(backbone, **({"training__epochs": EPOCHS, "views__refresh_epochs": 1} | overrides))
    return config


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below the folder, and what is in it."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def learned(folder: Path) -> list[str]:
    names = ("finealign.safetensors", "open_clip_model.safetensors")
    return [sha256((folder / "model" / name).read_bytes()).hexdigest() for name in names]


def checkpoints(folder: Path) -> list[str]:
    """What the folder of checkpoints holds, without the suffix of whole files and notes of how far they are filled."""
    names = (path.name.removesuffix(".safetensors") for path in (folder / "checkpoints").glob("*"))
    return sorted(name for name in names if not name.startswith("done-"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def run_json(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``photos``, made once; nothing may write into it."""
    return write_photos(tmp_path_factory.mktemp("album") / "photos")


@pytest.fixture(scope="module")
def finished(album: Path, tiny_backbone: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs that nothing interrupted; nothing may write into it."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    adapt(folder, album, four_epochs(tiny_backbone("transformer")))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, to do with as one likes."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- what is left -----------------------------------------------------------------------------------------------------


def test_adapt_into__leaves_the_contract(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == CONTRACT
    assert {path.suffix for path in (finished / "model").iterdir()} == {".json", ".md", ".safetensors"}
    features = ["features-0000", "features-0003", "features-0004"]  # of the start, and the last two
    assert checkpoints(finished) == ["epoch-0003-step-0003", "epoch-0004", *features]
    assert not list(finished.rglob("*.part"))


def test_adapt_into__run_json_says_what_was_done(finished: Path, tiny_backbone: Tiny) -> None:
    found = run_json(finished)
    fixed = {
        "status": "complete",
        "images": 24,
        "listed": 24,
        "left_out": "",
        "blank": "",
        "set_aside": 0,
        "classes": CLASSES,
        "seed": 0,
        "backbone": tiny_backbone("transformer"),
        "method": "fair",
        "device": "cpu",
        "precision": "fp32",
        "epochs": EPOCHS,
        "resumed": False,
        "processes": 1,
        "origin": {},
        "stopped": "all 4 epochs done; the last one is kept",
        "kept": "adapted",
        "why_kept": "that was asked for, whatever the verdict",
    }
    assert {name: found[name] for name in fixed} == fixed
    assert set(found) == {
        *fixed,
        "identity",
        "versions",
        "started",
        "seconds",
        "verdict",
        "learned",
        "cautions",
        "strangers",
        "class_prior",
        "crop_trust",
    }
    assert found["verdict"]["call"] in ("helped", "unclear", "hurt")
    assert set(found["identity"]) == {"settings", "texts", "images", "weights"}
    assert {"python", "finealign", "torch", "open_clip_torch", "timm", "accelerate"} <= set(found["versions"])
    assert found["versions"]["finealign"] == __version__
    trust = found["crop_trust"]
    assert trust["kind"] == "auto" and set(trust["explained"]) == {"0", "0.5", "0.75", "1"}
    best = max(trust["explained"].values())
    assert trust["whole_share"] == 0 or trust["explained"][f"{trust['whole_share']:g}"] == best
    assert trust["score"] == {0: "las", 1: "global"}.get(trust["whole_share"], "fused")
    assert 0 < found["seconds"]["fit"] <= found["seconds"]["total"]
    assert datetime.strptime(found["started"], "%Y-%m-%dT%H:%M:%S%z").tzinfo is not None


def test_adapt_into__metrics_have_a_line_an_epoch(finished: Path) -> None:
    found = metrics(finished)
    assert [line["epoch"] for line in found] == [1, 2, 3, 4]
    assert {"loss", "parts", "mean_weight", "changed", "class_share", "learning_rate", "seconds"} <= set(found[0])
    assert all(len(line["class_share"]) == 3 for line in found)


def test_adapt_into__predictions_are_the_saved_models_own(finished: Path, album: Path) -> None:
    model = FineAlign.load(finished, device="cpu", precision="fp32")
    with (finished / "predictions.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    paths, probabilities = list_images(album), model.predict_proba(album)
    assert [row["path"] for row in rows] == [str(path) for path in paths]
    assert [row["label"] for row in rows] == [CLASSES[index] for index in probabilities.argmax(1)]
    assert [float(row["confidence"]) for row in rows] == pytest.approx(probabilities.max(1).tolist(), abs=2e-6)
    assert (finished / "set_aside.csv").read_text(encoding="utf-8") == "path,reason\n"


def test_adapt_into__an_unreadable_image_is_set_aside(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    torn = photos / "red" / "torn.png"
    torn.write_bytes((photos / "red" / "0.png").read_bytes()[:200])
    summary = adapt(tmp_path / "run", photos, tiny_config(tiny_backbone("transformer"), method__name="cupl"))
    with (tmp_path / "run" / "set_aside.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["path"] for row in rows] == [str(torn)]
    assert rows[0]["reason"]
    assert [(row.path, row.reason) for row in summary.set_aside] == [(str(torn), rows[0]["reason"])]
    assert summary.images == 24
    assert str(torn) not in (tmp_path / "run" / "predictions.csv").read_text(encoding="utf-8")
    found = run_json(tmp_path / "run")
    assert (found["images"], found["set_aside"]) == (25, 1)


def test_adapt_into__the_configuration_is_resolved_and_gives_the_same_run(
    album: Path, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    automatic = {"training__epochs": "auto", "views__refresh_epochs": "auto"}
    asked = four_epochs(tiny_backbone("transformer"), training__steps=7, **automatic)
    assert asked.views.refresh_epochs == asked.data.working_size == "auto"
    adapt(tmp_path / "first", album, asked)
    written = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text(encoding="utf-8"))
    resolved = {
        f"{section}.{key}": written[section][key]
        for section in ("data", "views", "training")
        for key in written[section]
    }
    # Where a run runs may differ, so it is written as it was asked for.
    assert {name for name, value in resolved.items() if value == "auto"} == {
        "data.cache",
        "data.white_value",
        "data.workers",
        "training.strangers",
    }
    assert resolved["training.epochs"] == 2
    assert resolved["data.working_size"] == 64  # 32 pixels, crops of half a side
    adapt(tmp_path / "second", album, read_config(tmp_path / "first" / "config.yaml"))
    assert learned(tmp_path / "second") == learned(tmp_path / "first")
    assert yaml.safe_load((tmp_path / "second" / "config.yaml").read_text(encoding="utf-8")) == written


def test_adapt_into__its_summary_is_plain_json(album: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    summary = adapt(tmp_path / "run", album, tiny_config(tiny_backbone("transformer"), training__epochs=1))
    found = json.loads(json.dumps(summary.as_json()))
    assert {name: found[name] for name in ("out", "method", "classes", "images", "set_aside", "epochs")} == {
        "out": str(tmp_path / "run"),
        "method": "fair",
        "classes": CLASSES,
        "images": 24,
        "set_aside": [],
        "epochs": 1,
    }
    assert set(found) == {
        "out", "method", "backbone", "classes", "images", "listed", "left_out", "blank", "set_aside", "epochs",
        "seconds", "stopped",
        "verdict",
        "kept", "why_kept", "report", "report_problem", "strangers",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["cupl", "wca", "zero-shot"])
def test_adapt_into__a_method_that_does_not_train_leaves_a_complete_run(
    album: Path, tiny_backbone: Tiny, tmp_path: Path, method: str
) -> None:
    config = tiny_config(tiny_backbone("transformer"), method__name=method)
    summary = adapt(tmp_path / "run", album, config)
    assert summary.stopped == f"{method} does not train"
    found = run_json(tmp_path / "run")
    assert (found["status"], found["epochs"], found["stopped"]) == ("complete", 0, summary.stopped)
    assert {path.name for path in (tmp_path / "run").iterdir()} >= CONTRACT - {"metrics.jsonl", "checkpoints"}
    assert len((tmp_path / "run" / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 25
    loaded = FineAlign.load(tmp_path / "run", device="cpu", precision="fp32")
    assert loaded.predict_proba(album).shape == (24, 3)
    assert adapt(tmp_path / "run", album, config, resume=True).epochs == 0


# --- what is there already --------------------------------------------------------------------------------------------


def test_adapt_into__a_run_is_there_already(run: Path, album: Path, tiny_backbone: Tiny) -> None:
    before = snapshot(run)
    with pytest.raises(OutputError, match=r"already holds a run.*--resume.*--overwrite.*--out"):
        adapt(run, album, four_epochs(tiny_backbone("transformer")))
    assert snapshot(run) == before


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_adapt_into__a_folder_that_is_no_run_is_not_touched(
    album: Path, tiny_backbone: Tiny, tmp_path: Path, how: dict[str, Any]
) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "thesis.txt").write_text("years of work", encoding="utf-8")
    (tmp_path / "mine" / "metrics.jsonl").write_text("{}", encoding="utf-8")
    before = snapshot(tmp_path / "mine")
    with pytest.raises(OutputError, match=r"holds 2 things and is not a run folder \(run.json is missing\)"):
        adapt(tmp_path / "mine", album, tiny_config(tiny_backbone("transformer")), **how)
    assert snapshot(tmp_path / "mine") == before


def test_adapt_into__an_empty_folder_will_do(album: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    adapt(tmp_path / "run", album, tiny_config(tiny_backbone("transformer"), method__name="cupl"))
    assert run_json(tmp_path / "run")["status"] == "complete"


@pytest.mark.parametrize("there", [True, False])
def test_adapt_into__nothing_to_resume(album: Path, tiny_backbone: Tiny, tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "run").mkdir()
    with pytest.raises(OutputError, match=r"Nothing to resume: .* holds no run"):
        adapt(tmp_path / "run", album, tiny_config(tiny_backbone("transformer")), resume=True)
    assert (tmp_path / "run").exists() == there


@pytest.mark.parametrize(
    ("there", "how", "told"),
    [
        ("a run", {}, "already holds a run"),
        ("things", {"overwrite": True}, "is not a run folder"),
        ("nothing", {"resume": True}, "Nothing to resume"),
        ("a lock", {"overwrite": True}, "is being written by another process"),
    ],
)
def test_adapt_into__what_is_there_is_told_before_anything_is_loaded(
    there: str, how: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """A backbone may take minutes to fetch: this one is nowhere."""
    if there != "nothing":
        (tmp_path / {"a run": "run.json", "things": "thesis.txt", "a lock": LOCK}[there]).write_text("{}")
    with pytest.raises(OutputError, match=told):
        adapt(tmp_path, "no such photos", tiny_config("local-dir:nowhere"), **how)


@pytest.mark.parametrize("below", ["", "run"])
@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_adapt_into__out_is_a_file(
    album: Path, tiny_backbone: Tiny, tmp_path: Path, below: str, how: dict[str, Any]
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match=r"[Cc]hoose another|Nothing to resume"):
        adapt(tmp_path / "file" / below, album, tiny_config(tiny_backbone("transformer")), **how)
    assert snapshot(tmp_path) == {"file": sha256(b"mine").hexdigest()}


def test_adapt_into__overwrite_removes_what_is_ours_alone(run: Path, album: Path, tiny_backbone: Tiny) -> None:
    (run / "thesis.txt").write_text("years of work", encoding="utf-8")
    (run / "notes").mkdir()
    (run / "notes" / "a.txt").write_text("mine", encoding="utf-8")
    for name in ("epoch-0009", "features-0009"):
        (run / "checkpoints" / f"{name}.safetensors").write_bytes(b"of the run before")
    before = learned(run)
    adapt(run, album, four_epochs(tiny_backbone("transformer"), seed=5, training__epochs=2), overwrite=True)
    assert (run / "thesis.txt").read_text(encoding="utf-8") == "years of work"
    assert (run / "notes" / "a.txt").read_text(encoding="utf-8") == "mine"
    assert {path.name for path in run.iterdir()} == CONTRACT | {"thesis.txt", "notes"}
    assert checkpoints(run) == ["epoch-0001-step-0003", "epoch-0002", "features-0000", "features-0001", "features-0002"]
    assert [line["epoch"] for line in metrics(run)] == [1, 2]
    assert run_json(run)["seed"] == 5
    assert learned(run) != before


def test_adapt_into__overwrite_does_not_follow_a_link(run: Path, album: Path, tiny_backbone: Tiny) -> None:
    elsewhere = run.parent / "elsewhere"
    (run / "model").rename(elsewhere)
    (run / "model").symlink_to(elsewhere, target_is_directory=True)
    before = snapshot(elsewhere)
    adapt(run, album, tiny_config(tiny_backbone("transformer"), method__name="cupl"), overwrite=True)
    assert snapshot(elsewhere) == before
    assert not (run / "model").is_symlink()


@pytest.mark.parametrize("overwrite", [False, True])
def test_adapt_into__an_unknown_backbone_changes_nothing(run: Path, album: Path, overwrite: bool) -> None:
    folder = run if overwrite else run.parent / "new"
    before = snapshot(run.parent)
    with pytest.raises(BackboneError, match="Unknown architecture"):
        adapt(folder, album, tiny_config("ViT-B-99/openai"), overwrite=overwrite)
    assert snapshot(run.parent) == before


def test_adapt_into__a_listed_name_too_long_is_set_aside(album: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    images = [*list_images(album), Path("x" * 300 + ".png")]
    summary = adapt(tmp_path / "run", images, tiny_config(tiny_backbone("transformer"), method__name="cupl"))
    assert len(summary.set_aside) == 1


def test_adapt_into__missing_images_stop_before_anything_is_written(tiny_backbone: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ImageInputError, match="Cannot open"):
        adapt(tmp_path / "run", tmp_path / "nowhere", tiny_config(tiny_backbone("transformer")))
    assert not (tmp_path / "run").exists()


# --- resumption -------------------------------------------------------------------------------------------------------


class Interrupting(Progress):
    """Raises in the named stage: at the ``count``-th call of its ``advance`` or ``note``."""

    def __init__(self, stage: str, call: str, count: int, folder: Path) -> None:
        self.wanted, self.call, self.left, self.folder = stage, call, count, folder
        self.seen: dict[str, Any] = {}

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        yield _Ear(self, name == self.wanted)


class _Ear:
    def __init__(self, owner: Interrupting, listening: bool) -> None:
        self.owner, self.listening = owner, listening

    def advance(self, images: int) -> None:
        self.hear("advance")

    def note(self, text: str) -> None:
        self.hear("note")

    def hear(self, call: str) -> None:
        if not self.listening or call != self.owner.call:
            return
        self.owner.left -= 1
        if not self.owner.left:
            self.owner.seen = run_json(self.owner.folder)
            raise StoppedError


# What lies among the checkpoints after two epochs, and the files of features there are once the third has begun.
TWO = ["epoch-0001", "epoch-0002", "features-0000", "features-0001"]
THIRD = ["features-0000", "features-0001", "features-0002"]


def interrupt(folder: Path, album: Path, config: Config, stage: str, call: str, count: int) -> dict[str, Any]:
    """A run that stops in the middle; what its run.json said at that moment.

    ``stage`` and ``call`` as Interrupting wants them, or "metrics" and "line": when the line of an epoch is written.
    """
    progress = Interrupting(stage, call, count, folder)
    lines = _Ear(progress, stage == "metrics")
    with pytest.raises(StoppedError):
        adapt(folder, album, config, progress=progress, on_epoch=lambda record: lines.hear("line"))
    return progress.seen


@pytest.mark.parametrize(
    ("stage", "call", "count", "lines", "kept"),
    [
        pytest.param(
            "label pass", "advance", 1, 0, ["features-0000.part"], id="in the first label pass", marks=nightly
        ),
        pytest.param("adapting", "advance", 2, 0, ["features-0000"], id="in the first epoch", marks=nightly),
        pytest.param("label pass", "advance", 3, 2, [*TWO, "features-0002.part"], id="in the third label pass"),
        pytest.param("adapting", "advance", 8, 2, [*TWO[:2], *THIRD], id="in the third epoch", marks=nightly),
        pytest.param("adapting", "note", 3, 2, [*TWO[:2], *THIRD], id="before the third line", marks=nightly),
        pytest.param("metrics", "line", 3, 3, [*TWO[:2], *THIRD], id="between the third line and the third checkpoint"),
        pytest.param(
            "predicting",
            "advance",
            5,
            4,
            ["epoch-0003-step-0003", "epoch-0004", "features-0000", "features-0003", "features-0004"],
            id="while predicting",
        ),
    ],
)
def test_adapt_into__resumed_is_the_uninterrupted_run(
    finished: Path,
    album: Path,
    tiny_backbone: Tiny,
    tmp_path: Path,
    stage: str,
    call: str,
    count: int,
    lines: int,
    kept: list[str],
) -> None:
    folder, config = tmp_path / "run", four_epochs(tiny_backbone("transformer"))
    meanwhile = interrupt(folder, album, config, stage, call, count)
    assert (meanwhile["status"], run_json(folder)["status"]) == ("running", "failed")
    assert (folder / "config.yaml").is_file()
    assert len(metrics(folder)) == lines
    assert checkpoints(folder) == kept
    summary = adapt(folder, album, config, resume=True)
    assert learned(folder) == learned(finished)
    assert (folder / "predictions.csv").read_bytes() == (finished / "predictions.csv").read_bytes()
    assert (folder / "config.yaml").read_bytes() == (finished / "config.yaml").read_bytes()
    assert summary.epochs == run_json(folder)["epochs"] == EPOCHS
    assert (run_json(folder)["status"], run_json(folder)["resumed"]) == ("complete", True)
    for what in ("cautions", "crop_trust", "class_prior"):  # found out before the first step, which was not repeated
        assert run_json(folder)[what] == run_json(finished)[what]
    assert run_json(folder)["crop_trust"]["explained"]
    assert run_json(folder)["cautions"]
    assert not list(folder.rglob("*.part"))
    clocks = {"seconds": 0, "images_per_second": 0}
    assert [line | clocks for line in metrics(folder)] == [line | clocks for line in metrics(finished)]


def test_adapt_into__a_torn_last_line_of_metrics_survives(
    finished: Path, album: Path, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    folder, config = tmp_path / "run", four_epochs(tiny_backbone("transformer"))
    interrupt(folder, album, config, "metrics", "line", 3)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-25])
    with pytest.raises(ValueError, match=r"delimiter|Unterminated|Expecting"):
        metrics(folder)
    assert adapt(folder, album, config, resume=True).epochs == EPOCHS
    assert [line["epoch"] for line in metrics(folder)] == [1, 2, 3, 4]
    assert learned(folder) == learned(finished)


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_adapt_into__a_finished_run_resumed_stays_as_it_is(
    run: Path, finished: Path, album: Path, tiny_backbone: Tiny, device: str
) -> None:
    """Where a run goes on may differ: the device is not part of what it is."""
    if device == "auto" and torch.cuda.is_available():
        pytest.skip("a GPU rounds otherwise")
    summary = adapt(run, album, four_epochs(tiny_backbone("transformer"), device=device), resume=True)
    assert summary.epochs == EPOCHS
    assert learned(run) == learned(finished)
    assert [line["epoch"] for line in metrics(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "where",
    [
        pytest.param({"data__cache": "temporary"}, marks=nightly),
        {"data__cache_gb": 0.0},
        pytest.param({"data__workers": 1}, marks=nightly),
    ],
    ids=str,
)
def test_adapt_into__resumed_elsewhere_is_the_same_run(
    finished: Path, album: Path, tiny_backbone: Tiny, tmp_path: Path, where: dict[str, Any]
) -> None:
    folder, backbone = tmp_path / "run", tiny_backbone("transformer")
    interrupt(folder, album, four_epochs(backbone), "adapting", "advance", 8)
    adapt(folder, album, four_epochs(backbone, **where), resume=True)
    assert learned(folder) == learned(finished)


Change = Callable[[dict[str, Any], Path], None]


def another_image(given: dict[str, Any], photos: Path) -> None:
    shutil.copy(photos / "red" / "0.png", photos / "red" / "new.png")


def another_size(given: dict[str, Any], photos: Path) -> None:
    (photos / "red" / "0.png").write_bytes((photos / "red" / "0.png").read_bytes() + b"\0")


def other_classes(given: dict[str, Any], photos: Path) -> None:
    given["classes"] = ["red", "green", "violet"]


def another_order(given: dict[str, Any], photos: Path) -> None:
    given["classes"] = CLASSES[::-1]


def descriptions_too(given: dict[str, Any], photos: Path) -> None:
    given["descriptions"] = {name: [f"something {name}"] for name in CLASSES}


def another_seed(given: dict[str, Any], photos: Path) -> None:
    given["config"] = given["config"].model_copy(update={"seed": 7})


def another_working_size(given: dict[str, Any], photos: Path) -> None:
    config = given["config"]
    given["config"] = config.model_copy(update={"data": config.data.model_copy(update={"working_size": 48})})


def all_at_once(given: dict[str, Any], photos: Path) -> None:
    for change in (another_image, other_classes, another_seed):
        change(given, photos)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (another_image, "images"),
        (another_size, "images"),
        (other_classes, "texts"),
        (another_order, "texts"),
        (descriptions_too, "texts"),
        (another_seed, "settings"),
        (another_working_size, "settings"),
        (all_at_once, "settings and texts and images"),
    ],
)
def test_adapt_into__another_run_is_not_resumed(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, change: Change, named: str
) -> None:
    given: dict[str, Any] = {"config": tiny_config(tiny_backbone("transformer"), method__name="cupl")}
    adapt(tmp_path / "run", photos, **given)
    before = snapshot(tmp_path / "run")
    change(given, photos)
    with pytest.raises(OutputError, match=rf"had other {named}, so it cannot be resumed"):
        adapt(tmp_path / "run", photos, **given, resume=True)
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "running"}'])
def test_adapt_into__a_run_json_that_cannot_be_read_is_not_resumed(
    run: Path, album: Path, tiny_backbone: Tiny, text: str
) -> None:
    (run / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(OutputError, match=r"cannot be read.*--overwrite"):
        adapt(run, album, four_epochs(tiny_backbone("transformer")), resume=True)
    assert learned(run)


# --- names and plans --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ("photos", "runs/photos-fair-seed0"),
        ("somewhere/photos/", "runs/photos-fair-seed0"),
        (Path("/data/photos"), "runs/photos-fair-seed0"),
        ("list.txt", "runs/list.txt-fair-seed0"),
        (["a.png", "b.png"], "runs/images-fair-seed0"),
        (".", "runs/here-fair-seed0"),
    ],
    ids=str,
)
def test_default_folder__is_named_after_the_images(
    images: Any, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert default_folder(images, Config()) == Path(expected)


def test_default_folder__tells_methods_and_seeds_apart() -> None:
    config = read_config(None, (), method__name="wca", seed=3)
    assert default_folder("photos", config) == Path("runs/photos-wca-seed3")


def test_plan__is_what_the_run_would_do(finished: Path, album: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    config = four_epochs(tiny_backbone("transformer"))
    found = plan(tmp_path / "run", FineAlign(CLASSES, config=config).prepare(album))
    assert not list(tmp_path.iterdir())
    assert (found["images"], found["classes"], found["descriptions"]) == (24, CLASSES, 18)
    assert (found["epochs"], found["steps_an_epoch"]) == (EPOCHS, 3)
    assert yaml.safe_load(found["settings"]) == yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"backbone": "ViT-B-99/openai"}, "Unknown architecture"), ({"method__name": "fare"}, "Unknown method")],
)
def test_plan__checks_what_the_run_would(
    album: Path, tiny_backbone: Tiny, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    config = tiny_config(**({"backbone": tiny_backbone("transformer")} | overrides))
    with pytest.raises(FinealignError, match=message):
        plan(tmp_path / "run", FineAlign(CLASSES, config=config).prepare(album))


def test_plan__a_run_is_there_already(finished: Path, album: Path, tiny_backbone: Tiny) -> None:
    config = four_epochs(tiny_backbone("transformer"))
    with pytest.raises(OutputError, match="already holds a run"):
        plan(finished, FineAlign(CLASSES, config=config).prepare(album))
