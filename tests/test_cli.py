"""The command: what each verb prints, writes and refuses; adapt, predict and evaluate held against each other."""

import csv
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from conftest import HANG, write_photos
from finealign import __version__
from finealign.backbone.load import load_backbone
from finealign.cli import app
from finealign.cli import bars as terminal
from finealign.cli.bars import Bars
from finealign.config import DEFAULT_BACKBONE
from finealign.images.decoding import read_image
from finealign.images.listing import list_images
from finealign.method.registry import method_names

pytestmark = pytest.mark.usefixtures("usual_memory")

Tiny = Callable[[str], str]
CLASSES = ["red", "green", "blue", "cyan", "magenta", "yellow", "black"]  # of the last four there is no photo
PRECISE = ["--device", "cpu", "--precision", "fp32"]
QUICK = [*PRECISE, "--set", "views.crops=2", "--set", "training.batch_size=8", "--set", "training.epochs=2"]
QUICK += ["--set", "training.anchor_steps=2"]
HEADLINE = {"top1", "top5", "ece", "brier", "top1_low", "top1_high", "balanced", "balanced_low", "balanced_high"}
VERBS = [
    "adapt",
    "describe",
    "predict",
    "evaluate",
    "report",
    "serve",
    "export",
    "demo",
    "benchmark",
    "reproduce",
    "methods",
    "models",
    "doctor",
]


@dataclass(frozen=True)
class Made:
    """Photos, a backbone and a run on them; nothing may write into any.

    ``labelled`` holds the photos again under class names that suit their colours now and then, so that accuracies are
    neither nought nor one.
    """

    photos: Path
    labelled: Path
    backbone: str
    run: Path
    said: dict[str, Any]

    def adapt(self, *options: str | Path) -> list[str | Path]:
        return [
            "adapt",
            self.photos,
            "--classes",
            ",".join(CLASSES),
            "--backbone",
            self.backbone,
            *QUICK,
            "--keep-adapted",
            *options,
        ]


@pytest.fixture(scope="module")
def made(tiny_backbone: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    photos = write_photos(folder / "photos")
    backbone = discerning(tiny_backbone("transformer"), photos, folder / "backbone")
    for position, path in enumerate(list_images(photos)):
        target = folder / "labelled" / ("blue", "cyan", "black", "green", "green")[position % 5]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / f"{position}.png")
    settings = ("epochs=8", "learning_rate=0.01", "anchor_learning_rate=0.01")
    hard = [part for setting in settings for part in ("--set", f"training.{setting}")]
    hard += ["--set", "method.class_prior=even"]  # else the few photos are taken for one class, as at the start
    made = Made(photos, folder / "labelled", backbone, folder / "run", {})
    return replace(made, said=only_json(command(*made.adapt("--out", made.run, "--json", *hard))))


def discerning(identifier: str, photos: Path, folder: Path) -> str:
    """A random tower calls every photo the same; moved so that their mean is nought, it tells them apart."""
    backbone = load_backbone(identifier)
    images = [np.array(backbone.geometry(read_image(path))) for path in list_images(photos)]
    seen: list[torch.Tensor] = []
    norm = backbone.model.visual.ln_post
    hook = norm.register_forward_hook(lambda module, given, found: seen.append(found))
    backbone.embed(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
    hook.remove()
    with torch.no_grad():
        norm.bias -= seen[0][:, 0].mean(0) if seen[0].ndim == 3 else seen[0].mean(0)
    backbone.save(folder)
    return f"local-dir:{folder}"


def command(*arguments: str | Path) -> Result:
    """The command in this process; a mistake of ours in it comes out as what it is."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def only_json(result: Result, *, code: int = 0) -> dict[str, Any]:
    """The one JSON object that is the whole of standard output."""
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def count(rows: list[dict[str, str]], top: int) -> float:
    """The share of rows whose class folder is among the first ``top`` labels."""
    names = ["label", *(f"label_{rank}" for rank in range(2, top + 1))]
    right = [Path(row["path"]).parent.name in {row[name] for name in names} for row in rows]
    return sum(right) / len(right)


def learned(run: Path) -> str:
    return sha256((run / "model" / "finealign.safetensors").read_bytes()).hexdigest()


# --- light, and the same by every door --------------------------------------------------------------------------------


def test_help__and_the_package_import_nothing_heavy() -> None:
    code = f"""
import contextlib, io, sys
heavy = {{"torch", "torchvision", "open_clip", "timm", "numpy", "pydantic", "accelerate", "PIL"}}
import finealign
print("package", *heavy & set(sys.modules))
from finealign.cli import main
for verb in [[], *([name] for name in {VERBS!r})]:
    sys.argv = ["finealign", *verb, "--help"]
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            main()
    except SystemExit as stopped:
        assert not stopped.code, stopped
    assert "Usage" in shown.getvalue()
    print(*(verb or ["help"]), *heavy & set(sys.modules))
    heavy.discard("pydantic")  # typer itself imports it for the help of a verb
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["package", "help", *VERBS]


def test_version__by_the_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "finealign", "--version"], capture_output=True, text=True, timeout=HANG, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{__version__}\n", "")


def test_help__lists_every_verb() -> None:
    shown = command("--help").stdout
    assert [verb for verb in VERBS if re.search(rf"^  {verb} ", shown, re.MULTILINE)] == VERBS


def test_adapt__a_process_of_its_own_prints_one_object_and_no_bar(made: Made, tmp_path: Path) -> None:
    arguments = [str(part) for part in made.adapt("--method", "cupl", "--out", tmp_path / "run", "--json")]
    run = subprocess.run(
        [sys.executable, "-m", "finealign", *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("\n") == 1
    assert json.loads(run.stdout)["stopped"] == "cupl does not train"
    assert run.stderr == ""


# --- adapt, predict, evaluate -----------------------------------------------------------------------------------------


def test_adapt__says_what_it_did(made: Made) -> None:
    assert set(made.said) == {
        "out", "method", "backbone", "classes", "images", "listed", "left_out", "blank", "set_aside", "epochs",
        "seconds", "stopped",
        "verdict", "kept", "why_kept", "report", "report_problem", "strangers",
    }  # fmt: skip
    assert (made.said["out"], made.said["classes"], made.said["images"]) == (str(made.run), CLASSES, 24)


def test_adapt__for_a_person_names_the_folder_and_the_next_step(made: Made, tmp_path: Path) -> None:
    result = command(*made.adapt("--method", "cupl", "--out", tmp_path / "run"))
    assert result.exit_code == 0
    assert f"Run folder: {tmp_path / 'run'}" in result.stdout
    assert f"finealign predict {tmp_path / 'run'} IMAGES" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("score", ["global", "las", "fused", None])
def test_evaluate__agrees_with_a_count_of_the_predictions(made: Made, tmp_path: Path, score: str | None) -> None:
    asked = ["--score", score] if score else []
    found = only_json(command("evaluate", made.run, made.labelled, *PRECISE, *asked, "--json"))
    command("predict", made.run, made.labelled, *PRECISE, *asked, "--top-k", "5", "--out", tmp_path / "labels.csv")
    rows = table((tmp_path / "labels.csv").read_text(encoding="utf-8"))
    assert len(rows) == 24
    assert 0 < count(rows, 1) < count(rows, 5) < 1  # or the comparisons below would prove little
    assert found["adapted"]["top1"] == pytest.approx(count(rows, 1))
    assert found["adapted"]["top5"] == pytest.approx(count(rows, 5))
    for name in ("green", "blue", "cyan", "black"):
        own = [row for row in rows if Path(row["path"]).parent.name == name]
        assert found["per_class"][name]["adapted"] == pytest.approx(count(own, 1))
    labels = [(Path(row["path"]).parent.name, row["label"]) for row in rows]
    wrong = Counter((truth, label) for truth, label in labels if truth != label)
    pairs = {(pair["truth"], pair["predicted"]): pair["count"] for pair in found["confused_pairs"]}
    assert len(pairs) == min(10, len(wrong))
    assert pairs.items() <= wrong.items()


def test_evaluate__has_the_documented_keys(made: Made) -> None:
    found = only_json(command("evaluate", made.run, made.labelled, *PRECISE, "--json"))
    assert set(found) == {
        "adapted", "start", "zero_shot", "difference", "use", "images", "set_aside", "per_class", "confused_pairs",
        "adapted_to", "class_prior", "left_out", "unknown", "blank",
    }  # fmt: skip
    assert set(found["adapted"]) == set(found["start"]) == HEADLINE
    assert set(found["difference"]) == {"top1", "low", "high", "balanced", "balanced_low", "balanced_high"}
    assert (found["images"], found["set_aside"], found["adapted_to"]) == (24, 0, 0)
    assert list(found["per_class"]) == CLASSES
    assert [row["images"] for row in found["per_class"].values()] == [0, 9, 5, 5, 0, 0, 5]
    assert found["per_class"]["red"] == {"adapted": None, "start": None, "zero_shot": None, "images": 0}
    for side in ("adapted", "start"):
        assert 0 <= found[side]["top1_low"] <= found[side]["top1"] <= found[side]["top1_high"] <= 1
        assert found[side]["top1"] <= found[side]["top5"] <= 1
        assert 0 <= found[side]["ece"] <= 1
        assert 0 <= found[side]["brier"] <= 2
        recalls = [row[side] for row in found["per_class"].values() if row["images"]]
        assert found[side]["balanced"] == pytest.approx(sum(recalls) / len(recalls))
        assert found[side]["balanced_low"] <= found[side]["balanced"] <= found[side]["balanced_high"]
    gain = found["difference"]
    assert gain["top1"] == pytest.approx(found["adapted"]["top1"] - found["start"]["top1"])
    assert gain["low"] <= gain["top1"] <= gain["high"]
    assert gain["balanced"] == pytest.approx(found["adapted"]["balanced"] - found["start"]["balanced"])
    assert gain["balanced_low"] <= gain["balanced"] <= gain["balanced_high"]


def test_evaluate__the_start_is_the_model_before_adaptation(made: Made, tmp_path: Path) -> None:
    """The same texts and backbone without training, by way of another run."""
    only_json(command(*made.adapt("--method", "cupl", "--out", tmp_path / "start", "--json")))
    rows = table(command("predict", tmp_path / "start", made.labelled, *PRECISE, "--top-k", "5").stdout)
    found = only_json(command("evaluate", made.run, made.labelled, *PRECISE, "--json"))
    assert found["start"]["top1"] == pytest.approx(count(rows, 1))
    assert found["start"]["top5"] == pytest.approx(count(rows, 5))
    adapted = table(command("predict", made.run, made.labelled, *PRECISE).stdout)
    assert [row["label"] for row in adapted] != [row["label"] for row in rows]  # so it was not the adapted one


def test_use__takes_the_other_model(made: Made) -> None:
    adapted, start = (
        only_json(command("predict", made.run, made.labelled, *PRECISE, "--use", use, "--top-k", "5", "--json"))
        for use in ("adapted", "start")
    )
    assert (adapted["use"], start["use"]) == ("adapted", "start")
    assert adapted == only_json(command("predict", made.run, made.labelled, *PRECISE, "--top-k", "5", "--json"))
    printed = command("predict", made.run, made.labelled, *PRECISE, "--use", "start", "--top-k", "5")
    assert "predictions by the model before adaptation; --use adapted" in " ".join(printed.stderr.split())
    by_adapted = only_json(command("evaluate", made.run, made.labelled, *PRECISE, "--json"))
    by_start = only_json(command("evaluate", made.run, made.labelled, *PRECISE, "--use", "start", "--json"))
    assert by_start["start"]["top1"] == pytest.approx(count(table(printed.stdout), 1))
    assert (by_adapted.pop("use"), by_start.pop("use")) == ("adapted", "start")
    assert by_adapted.pop("confused_pairs") != by_start.pop("confused_pairs")
    assert by_adapted == by_start  # both models, whichever is used
    shown = command("evaluate", made.run, made.labelled, *PRECISE, "--use", "start").stdout
    assert "start, in use" in shown and "Most confused before adaptation" in shown


@pytest.mark.parametrize("verb", ["predict", "evaluate", "serve", "export"])
def test_use__of_a_model_that_is_not_there_stops_at_once(tmp_path: Path, verb: str) -> None:
    result = command(verb, tmp_path / "none", *([] if verb in ("serve", "export") else [tmp_path]), "--use", "before")
    assert result.exit_code == 2
    assert "start" in result.stderr and "adapted" in result.stderr


def test_evaluate__a_csv_equals_the_folder(made: Made, tmp_path: Path) -> None:
    with (tmp_path / "truth.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["label", "path"])
        writer.writerows([path.parent.name.upper(), path] for path in list_images(made.labelled))
    by_folder = only_json(command("evaluate", made.run, made.labelled, *PRECISE, "--json"))
    assert only_json(command("evaluate", made.run, tmp_path / "truth.csv", *PRECISE, "--json")) == by_folder


def test_evaluate__tables_for_a_person(made: Made) -> None:
    found = only_json(command("evaluate", made.run, made.labelled, *PRECISE, "--json"))
    shown = command("evaluate", made.run, made.labelled, *PRECISE).stdout
    assert "24 labelled images" in shown
    assert f"{100 * found['difference']['top1']:+.1f} points" in shown
    for side in ("start", "adapted"):
        assert f"{found[side]['top1']:.1%} ({found[side]['top1_low']:.1%} to" in shown
        assert f"{found[side]['balanced']:.1%} ({found[side]['balanced_low']:.1%} to" in shown
        assert f"{found[side]['brier']:.3f}" in shown
    assert f"{100 * found['difference']['balanced']:+.1f} points balanced accuracy" in shown
    assert "adapted to" not in shown  # these are copies
    assert all(name in shown for name in CLASSES)


def own_labels(made: Made, table: Path, *others: Path) -> Path:
    """A CSV with labels of the very photos adapted to, uneven over the classes, and of other images, called red."""
    own = [(path, "red" if path.parent.name == "red" else "blue") for path in list_images(made.photos)]
    lines = [
        f"{os.path.relpath(path, table.parent)},{label}\n" for path, label in [*own, *((one, "red") for one in others)]
    ]
    table.write_text("path,label\n" + "".join(lines), encoding="utf-8")
    return table


def test_evaluate__labels_of_the_images_adapted_to_give_the_accuracy_on_them(made: Made, tmp_path: Path) -> None:
    labels = own_labels(made, tmp_path / "labels.csv")
    for model in (made.run, made.run / "model"):
        found = only_json(command("evaluate", model, labels, *PRECISE, "--json"))
        assert (found["adapted_to"], found["images"]) == (24, 24)
    given = {row["path"]: row["label"] for row in table((made.run / "predictions.csv").read_text(encoding="utf-8"))}
    right: dict[str, list[bool]] = {"red": [], "blue": []}
    for path, label in given.items():
        truth = "red" if Path(path).parent.name == "red" else "blue"
        right[truth].append(label == truth)
    assert [len(one) for one in right.values()] == [8, 16]
    own, balanced = sum(map(sum, right.values())) / 24, sum(sum(one) / len(one) for one in right.values()) / 2
    assert found["adapted"]["top1"] == pytest.approx(own)
    assert found["adapted"]["balanced"] == pytest.approx(balanced)
    shown = command("evaluate", made.run, labels, *PRECISE).stdout
    assert "All images measured here are among those the model was adapted to" in shown


def test_evaluate__some_images_adapted_to_are_counted(made: Made, tmp_path: Path) -> None:
    labels = own_labels(made, tmp_path / "labels.csv", *list_images(made.labelled)[:3])
    assert "24 of the 27 images measured here are among" in command("evaluate", made.run, labels, *PRECISE).stdout


@pytest.mark.parametrize("lost", ["run.json", "predictions.csv"])
def test_evaluate__a_run_without_its_list_says_nothing_of_what_it_was_adapted_to(
    made: Made, tmp_path: Path, lost: str
) -> None:
    run = Path(shutil.copytree(made.run, tmp_path / "run"))
    (run / lost).unlink()
    labels = own_labels(made, tmp_path / "labels.csv")
    assert only_json(command("evaluate", run, labels, *PRECISE, "--json"))["adapted_to"] is None
    assert "adapted to" not in command("evaluate", run, labels, *PRECISE).stdout


@pytest.mark.parametrize("brackets", ["[warm]", "[/warm]"])
def test_evaluate__class_names_with_brackets_are_shown_as_they_are(made: Made, tmp_path: Path, brackets: str) -> None:
    options: list[str | Path] = [*QUICK, "--backbone", made.backbone, "--method", "cupl", "--out", tmp_path / "run"]
    (tmp_path / "classes.txt").write_text(f"red {brackets}\nblue\n", encoding="utf-8")
    assert command("adapt", made.photos, "--classes", tmp_path / "classes.txt", *options).exit_code == 0
    truth = f"path,label\n{made.photos / 'red' / '0.png'},red {brackets}\n{made.photos / 'blue' / '0.png'},blue\n"
    (tmp_path / "truth.csv").write_text(truth, encoding="utf-8")
    assert f"red {brackets}" in command("evaluate", tmp_path / "run", tmp_path / "truth.csv", *PRECISE).stdout


def test_evaluate__a_class_folder_too_many_is_left_out_and_said(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.labelled, tmp_path / "more")
    shutil.copytree(next(made.labelled.iterdir()), tmp_path / "more" / "unicorn")
    whole = only_json(command("evaluate", made.run, made.labelled, *PRECISE, "--json"))
    found = only_json(command("evaluate", made.run, tmp_path / "more", *PRECISE, "--json"))
    unicorns = len(list((tmp_path / "more" / "unicorn").iterdir()))
    assert found["unknown"] == {"unicorn": unicorns}
    assert found["adapted"] == whole["adapted"]
    told = command("evaluate", made.run, tmp_path / "more", *PRECISE)
    assert f"Left out, as no class of the model is called so: 'unicorn' ({unicorns} images)." in told.stderr


def test_predict__where_no_image_can_be_read_there_is_no_table(made: Made, tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path\nx.png\ny.png\n")
    for more in ([], ["--json"], ["--out", tmp_path / "labels.csv"]):
        done = command("predict", made.run, tmp_path / "list.csv", *PRECISE, *more)
        assert done.exit_code == 1
        assert "None of the 2 images can be read" in done.stderr + done.stdout
        assert "confidence" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["list.csv"]


def test_evaluate__an_unreadable_image_is_counted_apart(made: Made, tmp_path: Path) -> None:
    labelled = Path(shutil.copytree(made.labelled, tmp_path / "labelled"))
    (labelled / "blue" / "torn.png").write_bytes(b"\x89PNG torn")
    found = only_json(command("evaluate", made.run, labelled, *PRECISE, "--json"))
    assert (found["images"], found["set_aside"]) == (24, 1)
    whole = only_json(command("evaluate", made.run, made.labelled, *PRECISE, "--json"))
    assert found["adapted"] == whole["adapted"]


# --- predict ----------------------------------------------------------------------------------------------------------


def test_predict__prints_csv(made: Made) -> None:
    result = command("predict", made.run, made.photos, *PRECISE)
    rows = table(result.stdout)
    assert result.stdout.startswith("path,label,confidence,none\n")
    assert [row["path"] for row in rows] == [str(path) for path in list_images(made.photos)]
    assert {row["label"] for row in rows} <= set(CLASSES)
    assert all(1 / 7 <= float(row["confidence"]) <= 1 for row in rows)
    assert result.stderr == ""


@pytest.mark.parametrize("images", ["red", "red/3.png"])
def test_predict__model_folder_and_run_folder_are_one_model(made: Made, images: str) -> None:
    whole = command("predict", made.run, made.photos / images, *PRECISE)
    inner = command("predict", made.run / "model", made.photos / images, *PRECISE)
    assert whole.exit_code == 0
    assert len(table(whole.stdout)) == (8 if images == "red" else 1)
    assert inner.stdout == whole.stdout


def test_predict__more_than_there_are_classes(made: Made) -> None:
    (row,) = table(command("predict", made.run, made.photos / "red" / "0.png", *PRECISE, "--top-k", "99").stdout)
    labels = [row["label"], *(row[f"label_{rank}"] for rank in range(2, 8))]
    confidences = [float(row["confidence"]), *(float(row[f"confidence_{rank}"]) for rank in range(2, 8))]
    assert sorted(labels) == sorted(CLASSES)
    assert confidences == sorted(confidences, reverse=True)
    assert sum(confidences) == pytest.approx(1, abs=1e-5)
    assert "label_8" not in row


def test_predict__json_is_the_csv(made: Made) -> None:
    found = only_json(command("predict", made.run, made.photos, *PRECISE, "--top-k", "2", "--json"))
    rows = table(command("predict", made.run, made.photos, *PRECISE, "--top-k", "2").stdout)
    assert set(found) == {"use", "class_prior", "images", "left_out", "blank", "set_aside", "predictions"}
    assert (found["images"], found["set_aside"]) == (24, [])
    for row, entry in zip(rows, found["predictions"], strict=True):
        assert (entry["path"], entry["label"], str(entry["confidence"])) == tuple(list(row.values())[:3])
        assert [top["label"] for top in entry["top"]] == [row["label"], row["label_2"]]
        assert row["none"] == ("" if entry["none"] is None else str(entry["none"]))


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_predict__out_in_each_format(made: Made, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"labels{ending}"
    result = command("predict", made.run, made.photos, *PRECISE, "--out", out)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "24 predictions in" in result.stderr
    if ending == ".csv":
        rows: list[Any] = table(out.read_text(encoding="utf-8"))
    elif ending == ".jsonl":
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    else:
        rows = pytest.importorskip("pyarrow.parquet").read_table(out).to_pylist()
    printed = table(command("predict", made.run, made.photos, *PRECISE).stdout)
    assert [(row["path"], row["label"]) for row in rows] == [(row["path"], row["label"]) for row in printed]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert only_json(command("predict", made.run, made.photos, *PRECISE, "--out", out, "--overwrite", "--json")) == {
        "use": "adapted",
        "class_prior": "folder",
        "images": 24,
        "set_aside": [],
        "left_out": "",
        "blank": "",
        "out": str(out),
    }


def test_predict__sorts_into_folders_by_the_labels_it_writes(made: Made, tmp_path: Path) -> None:
    plain = table(command("predict", made.run, made.photos, *PRECISE).stdout)
    least = str(sorted(float(row["confidence"]) for row in plain)[12])
    arguments: list[str | Path] = [
        "predict",
        made.run,
        made.photos,
        *PRECISE,
        "--min-confidence",
        least,
        "--sort-into",
        tmp_path / "in",
    ]
    result = command(*arguments)
    rows = table(result.stdout)
    assert [row["label"] for row in rows].count("unsure") == sum(
        float(row["confidence"]) < float(least) for row in plain
    )
    assert [row["confidence"] for row in rows] == [row["confidence"] for row in plain]
    placed = {path.readlink(): path.parent.name for path in (tmp_path / "in").rglob("*.png")}
    assert placed == {Path(row["path"]): {"unsure": "_unsure"}.get(row["label"], row["label"]) for row in rows}
    assert (
        f"24 images linked in {tmp_path / 'in'}" in result.stderr and "are 'unsure' (--min-confidence" in result.stderr
    )
    found = only_json(command(*arguments, "--json"))
    assert found["sorted"] | {"renamed": 0} == {
        "into": str(tmp_path / "in"),
        "images": 24,
        "renamed": 0,
        "problems": [],
    }
    assert found["unsure"] == [row["label"] for row in rows].count("unsure")


def test_predict__what_is_there_stays(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "labels.csv"
    out.write_text("mine", encoding="utf-8")
    result = command("predict", made.run, made.photos, "--out", out)
    assert result.exit_code == 1
    assert "is there already. Use --overwrite" in result.stderr
    assert out.read_text(encoding="utf-8") == "mine"
    assert command("predict", made.run, made.photos, *PRECISE, "--out", out, "--overwrite").exit_code == 0
    assert len(table(out.read_text(encoding="utf-8"))) == 24


def test_predict__an_unreadable_image_is_set_aside_and_told(made: Made, tmp_path: Path) -> None:
    photos = Path(shutil.copytree(made.photos / "red", tmp_path / "photos"))
    torn = photos / "torn [old].png"  # brackets must come through what formats the message
    torn.write_bytes(b"\x89PNG torn")
    out = tmp_path / "labels.csv"
    result = command("predict", made.run, photos, *PRECISE, "--out", out)
    assert result.exit_code == 0
    assert f"1 images could not be read; the first: {torn} (" in result.stderr
    assert len(table(out.read_text(encoding="utf-8"))) == 8
    (aside,) = table((tmp_path / "labels.set_aside.csv").read_text(encoding="utf-8"))
    assert aside["path"] == str(torn)
    assert aside["reason"]
    found = only_json(command("predict", made.run, photos, *PRECISE, "--json"))
    assert found["set_aside"] == [aside]
    assert found["images"] == len(found["predictions"]) == 8
    printed = command("predict", made.run, photos, *PRECISE)
    assert len(table(printed.stdout)) == 8
    assert "could not be read" in printed.stderr


def test_predict__a_score_the_method_does_not_have_leaves_no_file(made: Made, tmp_path: Path) -> None:
    command(*made.adapt("--method", "wca", "--out", tmp_path / "run"))
    out = tmp_path / "out" / "labels.csv"
    result = command("predict", tmp_path / "run", made.photos, *PRECISE, "--score", "global", "--out", out)
    assert result.exit_code == 1
    assert "has no score 'global'. Valid: las." in result.stderr
    assert not list(tmp_path.glob("out/*"))


# --- settings and run folders -----------------------------------------------------------------------------------------


def test_adapt__dry_run_writes_nothing(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = command(*made.adapt("--dry-run"))
    assert shown.exit_code == 0
    assert "24 images, 7 classes, 42 descriptions, 2 epochs of 3 steps." in shown.stdout
    assert f"Would write {Path('runs', 'photos-fair-seed0')}" in shown.stdout
    found = only_json(command(*made.adapt("--dry-run", "--json", "--out", "elsewhere")))
    assert set(found) == {
        "out",
        "images",
        "listed",
        "left_out",
        "classes",
        "descriptions",
        "epochs",
        "steps_an_epoch",
        "settings",
    }
    assert found["out"] == "elsewhere"
    assert not list(tmp_path.iterdir())


def test_adapt__without_out_the_folder_is_named_for_it(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = only_json(command(*made.adapt("--method", "cupl", "--seed", "4", "--json")))
    assert found["out"] == str(Path("runs", "photos-cupl-seed4"))
    assert (tmp_path / found["out"] / "model" / "finealign.json").is_file()


def test_adapt__flags_beat_set_and_set_beats_the_file(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(
        "seed: 1\nmethod: {name: wca}\ntraining: {epochs: 9, batch_size: 6}\nviews: {crops: 5}\n", encoding="utf-8"
    )

    def settings(*options: str) -> dict[str, Any]:
        arguments: list[str | Path] = [
            "adapt",
            made.photos,
            "--classes",
            "red,blue",
            "--backbone",
            made.backbone,
            "--config",
            file,
        ]
        found = only_json(command(*arguments, *options, "--dry-run", "--json"))
        loaded: dict[str, Any] = yaml.safe_load(found["settings"])
        return loaded

    plain = settings()
    assert (plain["seed"], plain["method"]["name"], plain["training"]["epochs"]) == (1, "wca", 9)
    changed = settings("--set", "seed=2", "--set", "training.epochs=7", "--set", "method.name=cupl")
    assert (changed["seed"], changed["method"]["name"], changed["training"]["epochs"]) == (2, "cupl", 7)
    flagged = settings("--set", "seed=2", "--seed", "3", "--method", "fair", "--set", "method.name=cupl")
    assert (flagged["seed"], flagged["method"]["name"], flagged["training"]["epochs"]) == (3, "fair", 9)
    for found in (plain, changed, flagged):
        assert (found["training"]["batch_size"], found["views"]["crops"]) == (6, 5)


def test_adapt__classes_descriptions_and_templates_from_files(made: Made, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("rouge-gorge\nmésange bleue\n", encoding="utf-8")
    descriptions = {"rouge-gorge": ["une gorge rouge"], "mésange bleue": ["une calotte bleue", "petite"]}
    (tmp_path / "texts.json").write_text(json.dumps(descriptions), encoding="utf-8")
    (tmp_path / "templates.txt").write_text("une photo de {}\n{} de près\n", encoding="utf-8")
    files: list[str | Path] = ["--descriptions", tmp_path / "texts.json", "--templates", tmp_path / "templates.txt"]
    options: list[str | Path] = [*QUICK, "--backbone", made.backbone, "--method", "cupl", "--json"]
    found = only_json(
        command(
            "adapt", made.photos, "--classes", tmp_path / "classes.txt", *files, *options, "--out", tmp_path / "run"
        )
    )
    assert found["classes"] == list(descriptions)
    saved = json.loads((tmp_path / "run" / "model" / "finealign.json").read_text(encoding="utf-8"))
    assert saved["descriptions"] == descriptions
    assert saved["templates"] == ["une photo de {}", "{} de près"]


def test_adapt__resume_and_overwrite(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = made.adapt("--out", out)
    first = only_json(command(*words, "--json"))
    before = learned(out)
    refused = command(*words)
    assert refused.exit_code == 1
    assert "already holds a run. Use --resume" in refused.stderr
    other = command(*words, "--resume", "--seed", "1")
    assert other.exit_code == 1
    assert "had other settings" in other.stderr
    resumed = only_json(command(*words, "--resume", "--json"))
    assert resumed["epochs"] == first["epochs"] == 2
    assert learned(out) == before
    assert command(*words, "--overwrite", "--seed", "1").exit_code == 0
    assert learned(out) != before


def test_adapt__resume_and_overwrite_at_once(made: Made, tmp_path: Path) -> None:
    result = command(*made.adapt("--out", tmp_path / "run", "--resume", "--overwrite"))
    assert result.exit_code == 1
    assert "Give one of them" in result.stderr
    assert not (tmp_path / "run").exists()


def test_adapt__interrupted_tells_how_to_go_on(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("finealign.run.adapt.adapt_into", stop)
    monkeypatch.setattr("sys.argv", ["/bin/finealign", "adapt", "my photos", "--overwrite"])
    result = command(*made.adapt("--out", tmp_path / "run"))
    assert result.exit_code == 130
    assert result.stderr.strip() == "Interrupted. Nothing was begun yet."
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").touch()
    result = command(*made.adapt("--out", tmp_path / "run"))
    assert f"Interrupted. What was done is in {tmp_path / 'run'}. Go on with:" in result.stderr
    assert "\nfinealign adapt 'my photos' --resume\n" in result.stderr


# --- mistakes ---------------------------------------------------------------------------------------------------------


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


Arguments = Callable[[Made, Path], list[str | Path]]
MISTAKES: dict[str, tuple[Arguments, str, str]] = {
    "no images folder": (
        lambda made, here: ["adapt", here / "nowhere", "--classes", "a,b"],
        "Give a folder of images",
        "ImageInputError",
    ),
    "an empty images folder": (
        lambda made, here: ["adapt", here, "--classes", "a,b"],
        "No image in folder",
        "ImageInputError",
    ),
    "one class": (
        lambda made, here: ["adapt", made.photos, "--classes", written(here, "classes.txt", "robin\n")],
        "at least two classes",
        "PromptError",
    ),
    "neither a file nor a list": (
        lambda made, here: ["adapt", made.photos, "--classes", "robin"],
        "Wanted: a text file with one class name a line",
        "PromptError",
    ),
    "a blank class": (
        lambda made, here: ["adapt", made.photos, "--classes", "robin,,wren"],
        "blank name at position 2",
        "PromptError",
    ),
    "a class twice": (
        lambda made, here: ["adapt", made.photos, "--classes", "robin,wren,Robin"],
        "Keep one of them",
        "PromptError",
    ),
    "descriptions miss a class": (
        lambda made, here: [*made.adapt("--descriptions", written(here, "texts.json", '{"red": ["warm"]}'))],
        "miss 6 of 7 classes: 'green'",
        "PromptError",
    ),
    "descriptions are no JSON": (
        lambda made, here: [*made.adapt("--descriptions", written(here, "texts.json", "red: warm"))],
        "is not JSON",
        "PromptError",
    ),
    "no descriptions file": (
        lambda made, here: [*made.adapt("--descriptions", here / "texts.json")],
        "no such file",
        "PromptError",
    ),
    "a template without a place": (
        lambda made, here: [*made.adapt("--templates", written(here, "templates.txt", "a photo\n"))],
        "needs exactly one {}",
        "PromptError",
    ),
    "unknown method": (
        lambda made, here: [*made.adapt("--method", "fare")],
        "Did you mean 'fair'? Valid: cupl",
        "ConfigError",
    ),
    "unknown setting": (
        lambda made, here: [*made.adapt("--set", "training.epoch=5")],
        "Did you mean 'epochs'?",
        "ConfigError",
    ),
    "a setting without a value": (
        lambda made, here: [*made.adapt("--set", "training.epochs")],
        "Wanted: section.key=value",
        "ConfigError",
    ),
    "a setting out of range": (
        lambda made, here: [*made.adapt("--set", "training.epochs=0")],
        "training.epochs: found 0",
        "ConfigError",
    ),
    "no settings file": (
        lambda made, here: [*made.adapt("--config", here / "settings.yaml")],
        "No configuration file at",
        "ConfigError",
    ),
    "unknown precision": (lambda made, here: [*made.adapt("--precision", "fp8")], "fp32, bf16, fp16", "ConfigError"),
    "unknown device": (lambda made, here: [*made.adapt("--device", "tpu")], "Use auto, cpu", "ConfigError"),
    "unknown architecture": (
        lambda made, here: [*made.adapt("--backbone", "ViT-B-33/openai")],
        "Did you mean 'ViT-B-32-quickgelu/openai'?",
        "BackboneError",
    ),
    "weights in the wrong tower": (
        lambda made, here: [*made.adapt("--backbone", "ViT-B-32/openai")],
        "Use ViT-B-32-quickgelu/openai.",
        "BackboneError",
    ),
    "a backbone without weights": (
        lambda made, here: [*made.adapt("--backbone", "ViT-B-32")],
        "`finealign models` lists the pairs",
        "BackboneError",
    ),
    "no backbone folder": (
        lambda made, here: [*made.adapt("--backbone", f"local-dir:{here}")],
        "Wanted: a folder with open_clip_config.json",
        "BackboneError",
    ),
    "a run folder that is none": (
        lambda made, here: [*made.adapt("--out", written(here, "thesis.txt", "mine").parent)],
        "is not a run folder",
        "OutputError",
    ),
    "no model to predict with": (
        lambda made, here: ["predict", here / "nowhere", made.photos],
        "Wanted: a run folder of `finealign adapt`",
        "ModelError",
    ),
    "no images to predict": (
        lambda made, here: ["predict", made.run, here / "nowhere"],
        "Give a folder of images",
        "ImageInputError",
    ),
    "an ending of another kind": (
        lambda made, here: ["predict", made.run, made.photos, "--out", here / "labels.xlsx"],
        "Valid: .csv, .jsonl, .parquet",
        "OutputError",
    ),
    "a share to reject that is none": (
        lambda made, here: ["predict", made.run, made.photos, "--reject", "5%"],
        "reject: found '5%'. Valid: auto",
        "ConfigError",
    ),
    "a share to reject out of range": (
        lambda made, here: ["serve", made.run, "--reject", "1"],
        "reject: found 1.0. Valid: auto",
        "ConfigError",
    ),
    "no model to evaluate": (
        lambda made, here: ["evaluate", here / "nowhere", made.photos],
        "No model at",
        "ModelError",
    ),
    "no labelled images": (
        lambda made, here: ["evaluate", made.run, here / "nowhere"],
        "Give a folder with one sub-folder a class",
        "ImageInputError",
    ),
    "labels of no class": (
        lambda made, here: [
            "evaluate",
            made.run,
            written(here, "truth.csv", f"path,label\n{made.photos / 'red' / '0.png'},violet\n"),
        ],
        "Valid class names: 'red', 'green'",
        "ImageInputError",
    ),
    "labelled folders of no class": (
        lambda made, here: ["evaluate", made.run, shutil.copytree(made.photos / "red", here / "violet" / "x").parent],
        "1 folder name matches no class",
        "ImageInputError",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake__ends_with_a_sentence(
    mistake: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message, kind = MISTAKES[mistake]
    (tmp_path / "here").mkdir()
    given = [str(part) for part in arguments(made, tmp_path / "here")]
    monkeypatch.chdir(tmp_path)
    result = command(*given)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    shutil.rmtree("runs", ignore_errors=True)
    found = only_json(result := command(*given, "--json"), code=1)
    assert set(found) == {"error", "kind"}
    assert message in found["error"]
    assert found["kind"] == kind
    assert result.stderr == ""


# --- models and doctor ------------------------------------------------------------------------------------------------


def test_methods__lists_every_one() -> None:
    found = only_json(command("methods", "--json"))["methods"]
    assert [row["name"] for row in found] == list(method_names())
    assert {row["name"]: row["presets"] for row in found}["dpa"] == ["published"]
    assert {row["name"] for row in found if row["trains"]} >= {"fair", "dpa", "lafter", "microclip", "self-training"}
    shown = command("methods").stdout
    assert all(row["name"] in shown for row in found)


def test_benchmark__lists_the_catalogue() -> None:
    found = only_json(command("benchmark", "--list", "--json"))["datasets"]
    assert len(found) == 18
    assert sum(row["described"] for row in found) == 12
    shown = command("benchmark", "--list").stdout
    assert all(row["name"] in shown for row in found)


def test_benchmark__saves_what_it_prints(made: Made, tmp_path: Path) -> None:
    asked = ["benchmark", "--datasets", f"path:{made.photos}", "--methods", "cupl,zero-shot", "--seeds", "0"]
    asked += ["--backbone", made.backbone, "--out", str(tmp_path / "grid"), *QUICK[len(PRECISE) :]]
    first = command(*asked)
    assert first.exit_code == 0
    assert first.stdout.strip() == (tmp_path / "grid" / "table.md").read_text(encoding="utf-8").strip()
    assert "| cupl |" in first.stdout
    assert only_json(command(*asked, "--json")) == json.loads((tmp_path / "grid" / "table.json").read_text())
    published = command(*asked, "--compare", "published").stdout
    assert "| DPA | 64.64 |" in published
    assert "ViT-B/32" in published


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--datasets", ""], "--datasets names nothing"),
        (["--seeds", "one"], "Wanted: as 0,1,2"),
        (["--seeds", "-1"], "seed"),
        (["--methods", "dpa@publishd"], "Valid: dpa@published"),
        (["--datasets", "flowers"], "Did you mean 'flowers102'"),
        (["--datasets", "dtd"], "www.robots.ox.ac.uk"),
        (["--set", "training.epoch=3"], "Did you mean 'epochs'"),
    ],
)
def test_benchmark__a_mistake_is_told_before_a_cell_is_run(
    made: Made, tmp_path: Path, wrong: list[str], said: str
) -> None:
    asked = {"--datasets": f"path:{made.photos}", "--methods": "cupl", "--seeds": "0", wrong[0]: wrong[1]}
    options = [part for pair in asked.items() for part in pair]
    place = ["--backbone", made.backbone, "--out", str(tmp_path / "grid"), "--data-root", str(tmp_path)]
    assert said in only_json(command("benchmark", *options, *place, "--json"), code=1)["error"]
    assert not list(tmp_path.rglob("*-seed*"))


def test_models__filters_by_name() -> None:
    everything = only_json(command("models", "--json"))
    assert set(everything) == {"default", "models", "known"}
    assert everything["default"] == DEFAULT_BACKBONE
    assert DEFAULT_BACKBONE in everything["models"]
    found = only_json(command("models", "SIGLIP2", "--json"))["models"]
    assert found == [name for name in everything["models"] if "siglip2" in name.lower()]
    assert 0 < len(found) < len(everything["models"])
    assert [line.split()[0] for line in command("models", "SIGLIP2").stdout.splitlines()] == found
    assert command("models", "no such name").stdout == ""


def test_models__marks_the_default() -> None:
    marked = [line for line in command("models").stdout.splitlines() if line.endswith("(default)")]
    assert [line.split()[0] for line in marked] == [DEFAULT_BACKBONE]


def test_doctor__offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "none"))
    found = only_json(command("doctor", "--json"))
    assert set(found) == {
        "versions", "device", "device_name", "threads", "cores", "shared_memory", "precision", "cpu", "cpu_bf16", "hub",
        "cache",
    }  # fmt: skip
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["precision"] in ("fp32", "bf16", "fp16")
    assert (found["hub"]["reachable"], found["hub"]["reason"]) == (False, "HF_HUB_OFFLINE is set")
    assert found["cache"] == {"folder": str(tmp_path / "none"), "models": []}
    shown = command("doctor").stdout
    assert "not within reach" in shown
    assert found["versions"]["open_clip_torch"] in shown


@pytest.mark.parametrize(("opens", "expected"), [(True, True), (False, False)])
def test_doctor__asks_the_hub_once(opens: bool, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    class Connection:
        def close(self) -> None:
            pass

    def connect(address: tuple[str, int], timeout: float) -> Connection:
        asked.append(address)
        if not opens:
            raise OSError("no route [to] host")
        return Connection()

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert only_json(command("doctor", "--json"))["hub"]["reachable"] is expected
    assert asked == [("hub.example", 443)]


# --- bars -------------------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Screen:
    """A terminal of 120 columns and a clock that only the test moves."""

    clock: Clock
    written: io.StringIO
    bars: Bars

    def shows(self) -> str:
        """What is drawn now, without colours."""
        self.written.truncate(0)
        self.written.seek(0)
        self.bars._bars.refresh()
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.written.getvalue())


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    monkeypatch.setenv("TERM", "xterm-256color")
    clock, written_to = Clock(), io.StringIO()

    def console(**settings: Any) -> Console:
        assert settings == {"stderr": True}
        return Console(force_terminal=True, file=written_to, width=120, get_time=clock)

    monkeypatch.setattr(terminal, "Console", console)
    return Screen(clock, written_to, Bars())


def test_bars__a_long_stage_shows_speed_and_time_left(screen: Screen) -> None:
    with screen.bars.stage("reading images", 100) as stage:
        screen.clock.now = 1.0
        stage.advance(10)
        assert "reading" not in screen.shows()
        screen.clock.now = 3.0
        stage.advance(10)
        stage.note("loss 1.234")
        shown = screen.shows()
    assert "reading images" in shown
    assert "20/100" in shown
    assert "5 images/s" in shown
    assert "00:16" in shown  # 80 images at 5 a second
    assert "loss 1.234" in shown
    assert not screen.bars._bars.tasks


def test_bars__a_stage_of_unknown_length(screen: Screen) -> None:
    with screen.bars.stage("loading the backbone", None):
        screen.clock.now = 2.5
        assert "loading the backbone" in screen.shows()


def test_bars__a_stage_within_a_stage(screen: Screen) -> None:
    with screen.bars.stage("adapting", 100):
        screen.clock.now = 3.0
        with screen.bars.stage("label pass", 50):
            assert "label pass" not in screen.shows()
            screen.clock.now = 6.0
            both = screen.shows()
        assert "adapting" in both and "label pass" in both
        after = screen.shows()
        assert "adapting" in after and "label pass" not in after


def test_bars__gone_after_an_error(screen: Screen) -> None:
    with pytest.raises(ZeroDivisionError), screen.bars.stage("adapting", 10):
        raise ZeroDivisionError
    assert not screen.bars._bars.tasks
    assert not screen.bars._bars.live.is_started


def test_bars__quiet_when_there_is_no_terminal(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "SHOWN_AFTER", 0.0)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    result = command(*made.adapt("--out", tmp_path / "run"))
    assert result.exit_code == 0
    assert all(line.startswith("Caution: ") for line in result.stderr.splitlines())
    assert "\x1b" not in result.stdout + result.stderr


def test_names__that_would_move_the_cursor_are_written_out() -> None:
    from finealign.errors import printable

    assert printable("a\x1b[2J\u202eb\n.png") == "a\\x1b[2J\\u202eb\\n.png"
    assert printable("wren é 鳥.png") == "wren é 鳥.png"
