"""Every case of `hostile` by the command: the stated error, the image set aside with its reason, or the right answer.

Never a traceback, a hang, or a wrong answer unsaid. The tests run without root's right to read everything.
"""

import faulthandler
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import hostile
from conftest import HANG, unprivileged
from finealign import FineAlign
from finealign.cli import app
from finealign.demo.model import demo_model
from finealign.errors import PromptError, display_path
from finealign.images.decoding import read_image
from finealign.images.files import ImageReadError
from finealign.texts.prompts import read_classes
from finealign.types import SetAside
from hostile import Aside, Fails, Hostile, Reads, Works

PRECISE = ("--device", "cpu", "--precision", "fp32")
GOOD = {"first.png": (200, 40, 40), "in the middle.jpg": (40, 200, 40), "zuletzt.webp": (40, 40, 200)}
# Enough for images of the usual sizes, not for 60,000 x 60,000 pixels of one byte each.
LIMITED = """
import resource, sys
import finealign.classifier, finealign.cli.tables
from finealign.cli import main
with open("/proc/self/statm") as sizes:
    now = int(sizes.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**31,) * 2)
main()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's files and users")


def cases(found: Sequence[Hostile]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in found])


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[Path]:
    """The folder of all cases; its name is short, as that of a socket has to be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finealign.runtime.devices.keep_freed_memory", lambda: False)
        folder = Path(tempfile.mkdtemp(prefix="hostile-"))
        try:
            with unprivileged():
                yield folder
        finally:
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def model(home: Path) -> Path:
    made = FineAlign(["robin", "wren"], backbone=demo_model(), device="cpu", precision="fp32").unlearned()
    made.save(home / "model")
    return home / "model"


@pytest.fixture(scope="module")
def photos(home: Path) -> Path:
    return write_good(home / "photos")


@pytest.fixture
def place(home: Path, request: pytest.FixtureRequest) -> Path:
    """Where a case may make itself: nothing is there yet."""
    name, case = str(request.node.originalname), str(request.node.callspec.id)
    (home / name).mkdir(exist_ok=True)
    return home / name / case


def write_good(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, colour in GOOD.items():
        Image.new("RGB", (40, 30), colour).save(folder / name)
    return folder


@contextmanager
def ends_in_time() -> Iterator[None]:
    """A call of the system that waits for ever fails the test."""

    def fail(number: int, frame: object) -> None:
        faulthandler.dump_traceback(2)
        pytest.fail(f"not done within {HANG} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def beside(call: Callable[[], Any]) -> Any:
    """What the call returns or raises, on a thread: a loop in a decoder, which no signal ends, fails the test too."""
    found: list[Any] = []

    def attempt() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(HANG)
    if not found:
        faulthandler.dump_traceback(2)
        pytest.fail(f"not done within {HANG} seconds")
    return found[0]


def answer(*arguments: str | Path) -> dict[str, Any]:
    """What the command prints; a traceback of it is one of the test."""
    with ends_in_time():
        result = CliRunner().invoke(app, [*(str(argument) for argument in arguments), "--json"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.exit_code == (1 if "error" in found else 0)
    assert result.stderr == "" or result.stderr.startswith("Caution: The tokenizer has no words")
    return found


def compare(found: dict[str, Any], outcome: object) -> None:
    if isinstance(outcome, Fails):
        assert found.get("kind") == outcome.kind, found
        assert re.search(outcome.message, found["error"], re.DOTALL), found["error"]
    else:
        assert isinstance(outcome, Works)
        if isinstance(found.get("set_aside"), list):
            found["set_aside"] = {Path(row["path"]).name: row["reason"] for row in found["set_aside"]}
        assert {name: found.get(name) for name in outcome.found} == outcome.found, found.get("error")


# --- images -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One prediction of a folder with every hostile image and some good ones, by a process of little memory."""

    folder: Path
    predictions: dict[str, dict[str, Any]]  # by path
    set_aside: dict[str, str]

    def path(self, case: Hostile) -> Path:
        return self.folder / f"{case.name}.jpg"


@pytest.fixture(scope="module")
def run(home: Path, model: Path) -> Run:
    folder = write_good(home / "images")
    for case in hostile.IMAGES:
        case.make(folder / f"{case.name}.jpg")
    for number, name in enumerate(hostile.NAMES):
        good = hostile.encode(hostile.plain(), "PNG")
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(good if number % 2 else b"not an image")
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, "predict", model, folder, *PRECISE, "--json"],
        capture_output=True,
        timeout=HANG,
        check=False,
    )
    assert (ran.returncode, b"Traceback" in ran.stderr) == (0, False), ran.stderr.decode()
    found = json.loads(ran.stdout.decode("utf-8"))
    assert found["images"] == len(found["predictions"])
    return Run(
        folder,
        {row["path"]: row for row in found["predictions"]},
        {row["path"]: row["reason"] for row in found["set_aside"]},
    )


@cases(hostile.IMAGES)
def test_image(case: Hostile, run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    path = run.path(case)
    found = beside(lambda: read_image(path))
    if isinstance(case.outcome, Aside):
        assert isinstance(found, ImageReadError), found
        assert re.fullmatch(case.outcome.reason, str(found))
        assert run.set_aside[str(path)] == str(found)
        assert str(path) not in run.predictions
    else:
        assert isinstance(case.outcome, Reads)
        assert isinstance(found, Image.Image), found
        assert (found.mode, found.size) == ("RGB", case.outcome.size)
        if case.outcome.middle:
            middle = found.getpixel((found.width // 2, found.height // 2))
            assert middle == pytest.approx(case.outcome.middle, abs=4)
        assert run.predictions[str(path)]["label"] in ("robin", "wren")
        assert str(path) not in run.set_aside
    assert capfd.readouterr().out == ""  # a result may be on its way to there


@pytest.mark.parametrize("number", range(len(hostile.NAMES)))
def test_name(number: int, run: Run) -> None:
    shown = display_path(os.fsdecode(os.fsencode(run.folder) + b"/" + hostile.NAMES[number]))
    if number % 2:
        assert run.predictions[shown]["label"] in ("robin", "wren")
    else:
        assert run.set_aside[shown] == "not an image"


def test_every_image_is_accounted_for(run: Run) -> None:
    assert len(run.predictions) + len(run.set_aside) == len(GOOD) + len(hostile.IMAGES) + len(hostile.NAMES)
    assert not (Path.cwd() / "pickle-was-run").exists()


def test_good_images_are_predicted_as_without_the_bad_ones(run: Run, model: Path, photos: Path) -> None:
    alone = answer("predict", model, photos, *PRECISE)["predictions"]
    assert len(alone) == len(GOOD)
    for row in alone:
        among = run.predictions[str(run.folder / Path(row["path"]).name)]
        assert among["label"] == row["label"]
        assert among["confidence"] == pytest.approx(row["confidence"], abs=1e-5)


def test_images_that_vanish_during_the_run(home: Path, model: Path) -> None:
    (home / "vanishing").mkdir()
    paths = [home / "vanishing" / f"{number}.png" for number in range(150)]
    for path in paths:
        hostile.plain().save(path)
    predictions = FineAlign.load(model, device="cpu").iter_predictions(paths, score="global")
    found = [next(predictions)]
    for path in paths:
        path.unlink()
    found += list(predictions)
    gone = [isinstance(one, SetAside) for one in found]
    assert (gone[0], gone[-1]) == (False, True)
    assert gone == sorted(gone)  # what was read ahead is predicted, what came later is not
    assert {one.reason for one in found if isinstance(one, SetAside)} == {"no such file"}
    assert [one.path for one in found if isinstance(one, SetAside)] == [str(path) for path in paths][gone.index(True) :]


def test_a_file_that_is_written_anew_while_it_is_read(home: Path) -> None:
    path = home / "restless.png"
    large, small = (hostile.encode(hostile.noise(side, side), "PNG") for side in (300, 30))
    path.write_bytes(large)
    done = threading.Event()

    def rewrite() -> None:
        while not done.is_set():
            for data in (small, large, large[:5000], b"", b"text"):
                path.write_bytes(data)
                time.sleep(0.0005)
        path.write_bytes(large)

    writer = threading.Thread(target=rewrite)
    writer.start()
    outcomes = set()
    try:
        for _ in range(300):
            try:
                found = np.asarray(read_image(path))
            except ImageReadError as error:
                outcomes.add(str(error))
            else:
                outcomes.add("whole")
                assert (found == np.asarray(hostile.noise(*found.shape[1::-1]))).all()
    finally:
        done.set()
        writer.join()
    assert outcomes <= {"whole", "empty file", "not an image", "truncated file", "damaged or truncated file"}
    assert (np.asarray(read_image(path)) == np.asarray(hostile.noise(300, 300))).all()  # whole again, once left alone


# --- what is given as images ------------------------------------------------------------------------------------------


@cases(hostile.SOURCES)
def test_source(case: Hostile, place: Path, model: Path) -> None:
    compare(answer("predict", model, case.make(place), *PRECISE), case.outcome)


def test_what_is_left_out_is_told_by_every_verb(home: Path, model: Path) -> None:
    (home / "told").mkdir()
    folder = write_good(home / "told" / "robin").parent
    (folder / "robin" / "notes.json").write_text("{}")
    (folder / "robin" / "bad.png").write_bytes(b"x")
    (folder / "run.json").write_text('{"status": "complete", "identity": {}}')
    shutil.copytree(folder, folder / "wren" / "run")
    told = "Left out: 2 files that are no images (2 .json); folder wren/run (a run of finealign); 1 excluded as asked."
    options = ["--exclude", "bad.*"]
    found = answer("predict", model, folder, *PRECISE, *options)
    assert (found["images"], found["left_out"]) == (len(GOOD), told)
    found = answer("evaluate", model, folder, *PRECISE, *options)
    assert (found["images"], found["left_out"]) == (len(GOOD), told)
    planned: list[str | Path] = ["--dry-run", "--classes", "robin,wren", "--out", home / "none", *options]
    found = answer("adapt", folder, "--backbone", demo_model(), *planned)
    assert (found["images"], found["left_out"]) == (len(GOOD), told)
    assert "exclude:\n  - bad.*" in found["settings"]
    for arguments in (["predict", model, folder, *PRECISE], ["evaluate", model, folder, *PRECISE]):
        result = CliRunner().invoke(app, [*map(str, arguments), *options])
        assert told in result.stderr
    (folder / "robin" / "bad.png").unlink()
    with pytest.warns(UserWarning, match=r"Left out: 2 files"):
        FineAlign.load(model, device="cpu").predict(folder / "robin" / "..", score="global")


def test_images_that_are_all_but_black_or_white_are_told(home: Path, model: Path) -> None:
    folder = write_good(home / "blank")
    for name, value in {"black": 0x000C, "white": 0xFFFF}.items():
        Image.fromarray(np.full((30, 40), value, np.uint16)).save(folder / f"{name}.png")
    told = f"2 images are all but black or white, the first: {folder}/black.png. Of more than 8 bits?"
    assert answer("predict", model, folder, *PRECISE)["blank"].startswith(told)
    assert told in CliRunner().invoke(app, ["predict", str(model), str(folder), *PRECISE]).stderr
    with pytest.warns(UserWarning, match="2 images are all but black or white"):
        FineAlign.load(model, device="cpu").predict(folder, score="global")
    (home / "blank_labelled").mkdir()
    shutil.copytree(folder, home / "blank_labelled" / "robin")
    assert "2 images are all but" in answer("evaluate", model, home / "blank_labelled", *PRECISE)["blank"]


@cases(hostile.LISTS)
def test_list(case: Hostile, place: Path, model: Path) -> None:
    compare(answer("predict", model, case.make(place), *PRECISE), case.outcome)


@cases(hostile.LABELLED)
def test_labelled(case: Hostile, place: Path, model: Path) -> None:
    compare(answer("evaluate", model, case.make(place), *PRECISE), case.outcome)


# --- texts ------------------------------------------------------------------------------------------------------------


def adapt(photos: Path, *options: str | Path) -> dict[str, Any]:
    return answer("adapt", photos, "--backbone", demo_model(), "--out", photos.with_name("run"), *options)


@cases(hostile.CLASSES)
def test_classes(case: Hostile, place: Path, photos: Path) -> None:
    compare(adapt(photos, "--dry-run", "--classes", case.make(place)), case.outcome)


@cases(hostile.MANY_CLASSES)
def test_many_classes(case: Hostile, place: Path) -> None:
    with ends_in_time():
        names = read_classes(str(case.make(place)))
        compare({"classes": list(names)}, case.outcome)
        texts, _ = FineAlign(names, descriptions={name.upper(): [f"A {name}."] for name in names}).check()
        assert texts.descriptions[-1] == (f"A {names[-1]}.",)
        assert len(FineAlign(names).check()[0].descriptions) == len(names)


@cases(hostile.DESCRIPTIONS)
def test_descriptions(case: Hostile, place: Path, photos: Path) -> None:
    options = ["--classes", "robin,wren", "--descriptions", case.make(place)]
    compare(adapt(photos, "--dry-run", *options), case.outcome)


@cases(hostile.TEMPLATES)
def test_templates(case: Hostile, place: Path, photos: Path) -> None:
    options = ["--classes", "robin,wren", "--templates", case.make(place)]
    compare(adapt(photos, "--dry-run", *options), case.outcome)


@pytest.mark.parametrize(("name", "options"), hostile.TOO_LONG, ids=[name for name, _ in hostile.TOO_LONG])
def test_texts_longer_than_the_text_tower_takes(name: str, options: dict[str, str], home: Path, photos: Path) -> None:
    arguments: list[str | Path] = []
    for option, value in options.items():
        arguments.append(option)
        if option == "--classes":
            arguments.append(value)
        else:
            (home / f"too_long_{name}").write_text(value, encoding="utf-8")
            arguments.append(home / f"too_long_{name}")
    found = adapt(photos, *arguments)
    assert found["kind"] == "BackboneError"
    assert re.search(r"longer than the 36 tokens .* would be cut silently.*very very.*Shorten", found["error"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [pytest.param(arguments, message, id=name) for name, arguments, message in hostile.ARGUMENTS],
)
def test_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        FineAlign(**{"classes": ["robin", "wren"], **arguments}).check()


def test_the_corpus_has_names_that_tell_its_cases_apart() -> None:
    for group in ("IMAGES", "SOURCES", "LISTS", "LABELLED", "CLASSES", "MANY_CLASSES", "DESCRIPTIONS", "TEMPLATES"):
        names = [case.name for case in getattr(hostile, group)]
        assert len(set(names)) == len(names), group
    assert len(hostile.IMAGES) >= 60
