"""What may befall a run: signals, kills, a full disk, folders that go away or close. What was good goes on."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from conftest import CLASSES, HANG, tiny_config, unprivileged
from finealign.classifier import FineAlign
from finealign.cli import app
from finealign.errors import FinealignError, NotFiniteError, OutputError
from finealign.run.adapt import adapt_into
from finealign.training.checkpoints import read_last_checkpoint
from finealign.training.state import EpochRecord, State

Tiny = Callable[[str], str]
EPOCHS = 20
SETTINGS = {
    "precision": "fp32",
    "device": "cpu",
    "views.crops": 2,
    "training.epochs": EPOCHS,
    "training.batch_size": 8,
    "training.anchor_steps": 5,
    "training.checkpoint_minutes": 0.001,
    "prediction.calibrate": "false",
}


def words(photos: Path, backbone: str, out: Path, *more: str) -> list[str]:
    settings = [f"--set={name}={value}" for name, value in SETTINGS.items()]
    options = ["--classes", ",".join(CLASSES), "--backbone", backbone, "--out", str(out), "--keep-adapted"]
    return [sys.executable, "-m", "finealign", "adapt", str(photos), *options, *settings, *more]


def finish(command: list[str]) -> None:
    """Run a command to its end, in this process."""
    assert command[:3] == [sys.executable, "-m", "finealign"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finealign.runtime.devices.keep_freed_memory", lambda: False)  # of the whole process
        done = CliRunner().invoke(app, command[3:])
    assert done.exit_code == 0, done.output


def weights(out: Path) -> list[bytes]:
    return [(out / "model" / name).read_bytes() for name in ("open_clip_model.safetensors", "finealign.safetensors")]


def start(command: list[str], out: Path, *, epochs: int) -> "subprocess.Popen[str]":
    """A run that has gone so far and goes on."""
    going = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics, until = out / "metrics.jsonl", time.monotonic() + HANG
    while going.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= epochs):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
    assert going.poll() is None, going.stderr.read() if going.stderr else ""
    return going


@pytest.fixture(scope="module")
def uninterrupted(tiny_backbone: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """The photos, and the weights of a run that nothing befell."""
    from conftest import write_photos

    folder = tmp_path_factory.mktemp("uninterrupted")
    photos = write_photos(folder / "photos")
    finish(words(photos, tiny_backbone("transformer"), folder / "whole"))
    return photos, weights(folder / "whole")


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 2), pytest.param(signal.SIGINT, 0, marks=pytest.mark.nightly)]
)
def test_signal__saves_and_tells_the_command_that_goes_on(
    uninterrupted: tuple[Path, list[bytes]], tiny_backbone: Tiny, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    """To the whole group, as a scheduler or a terminal sends it: to the processes that make views as well."""
    photos, wanted = uninterrupted
    out = tmp_path / "my run"
    command = words(photos, tiny_backbone("transformer"), out, f"--set=data.workers={workers}")
    with start(command, out, epochs=3) as going:
        os.killpg(going.pid, number)
        _, told = going.communicate(timeout=HANG)
    assert going.returncode == 128 + number
    assert "Traceback" not in told
    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "stopped"
    assert run["stopped"] in told
    *_, line = told.strip().splitlines()
    assert line.startswith("python -m finealign adapt ")
    finish([sys.executable, *shlex.split(line)[1:]])
    assert weights(out) == wanted


@pytest.mark.parametrize("epochs", [pytest.param(0, marks=pytest.mark.nightly), 9])
def test_kill__resumed_is_bit_for_bit_the_uninterrupted(
    uninterrupted: tuple[Path, list[bytes]], tiny_backbone: Tiny, tmp_path: Path, epochs: int
) -> None:
    photos, wanted = uninterrupted
    out = tmp_path / "run"
    command = words(photos, tiny_backbone("transformer"), out)
    with start(command, out, epochs=epochs) as going:
        going.kill()
        going.communicate()
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    finish([*command, "--resume"])
    assert weights(out) == wanted


def test_kill__while_the_first_file_is_written_leaves_a_folder_to_begin_in(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path
) -> None:
    """benchmarks/kills.py found such a folder refused as not a run's."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.part").write_text("{")
    run(photos, tiny_backbone("transformer"), out, lambda record: None)
    assert json.loads((out / "run.json").read_text())["status"] == "complete"
    assert not list(out.rglob("*.part"))


@pytest.mark.parametrize("kilobytes", [1, *(pytest.param(size, marks=pytest.mark.nightly) for size in (200, 3000))])
def test_full_disk__is_told_and_what_was_good_goes_on(
    uninterrupted: tuple[Path, list[bytes]], tiny_backbone: Tiny, tmp_path: Path, kilobytes: int
) -> None:
    """No file may grow beyond so many kB: from settings to checkpoint, features and model, each fails in turn."""
    photos, wanted = uninterrupted
    out = tmp_path / "run"
    command = words(photos, tiny_backbone("transformer"), out)
    limited = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=HANG,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes,) * 2),
    )
    assert limited.returncode == 1
    assert "cannot be written" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert not list(out.rglob("*.part"))
    if (out / "run.json").exists():
        finish([*command, "--resume"])
        assert weights(out) == wanted


def run(photos: Path, backbone: str, out: Path, on_epoch: Callable[[EpochRecord], None], **more: Any) -> None:
    model = FineAlign(CLASSES, config=tiny_config(backbone, training__epochs=4, training__anchor_steps=0))
    adapt_into(out, model, photos, on_epoch=on_epoch, keep_adapted=True, **more)


def test_overwrite__cut_short_leaves_a_run_that_can_be_overwritten(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, out = tiny_backbone("transformer"), tmp_path / "run"
    run(photos, backbone, out, lambda record: None)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        run(photos, backbone, out, lambda record: None, overwrite=True)
    run(photos, backbone, out, lambda record: None, overwrite=True)
    assert json.loads((out / "run.json").read_text())["status"] == "complete"


@pytest.mark.parametrize("which", ["run", "checkpoints"])
def test_folder__that_goes_away(photos: Path, tiny_backbone: Tiny, tmp_path: Path, which: str) -> None:
    out = tmp_path / "run"

    def remove(record: EpochRecord) -> None:
        if record.epoch == 2:
            shutil.rmtree(out if which == "run" else out / "checkpoints")

    with pytest.raises(OutputError, match=r"was removed during the run|cannot be written"):
        run(photos, tiny_backbone("transformer"), out, remove)
    assert out.exists() == (which == "checkpoints")


def test_folder__that_closes(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def close(record: EpochRecord) -> None:
        if record.epoch == 2:
            (out / "checkpoints").chmod(0o500)

    backbone = tiny_backbone("transformer")
    run(photos, backbone, tmp_path / "whole", lambda record: None)
    with unprivileged(), pytest.raises(OutputError, match=r"epoch-0002.safetensors cannot be written.*ermission"):
        run(photos, backbone, out, close)
    found = read_last_checkpoint(out / "checkpoints")
    assert found is not None
    assert found.epoch == 1
    assert json.loads((out / "run.json").read_text())["status"] == "failed"
    (out / "checkpoints").chmod(0o700)
    run(photos, backbone, out, lambda record: None, resume=True)
    assert weights(out) == weights(tmp_path / "whole")


def test_torn_checkpoint__the_one_before_it_is_used(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    backbone, out = tiny_backbone("transformer"), tmp_path / "run"

    class KilledError(Exception):
        pass

    def kill(record: EpochRecord) -> None:
        if record.epoch == 4:
            raise KilledError

    run(photos, backbone, tmp_path / "whole", lambda record: None)
    with pytest.raises(KilledError):
        run(photos, backbone, out, kill)
    last = max((out / "checkpoints").glob("epoch-*"))
    os.truncate(last, last.stat().st_size - 100)
    run(photos, backbone, out, lambda record: None, resume=True)
    assert weights(out) == weights(tmp_path / "whole")
    assert [json.loads(line)["epoch"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]


def test_not_finite__run_json_names_every_image_of_the_batch(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "run", 0
    encoders = State.encoders

    def poisoned(self: State) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            next(iter(self.norms.values())).data.fill_(float("nan"))
        return encoders(self)

    monkeypatch.setattr(State, "encoders", poisoned)
    with pytest.raises(NotFiniteError) as caught:
        run(photos, tiny_backbone("transformer"), out, lambda record: None)
    found = json.loads((out / "run.json").read_text())
    assert found["status"] == "failed"
    assert found["batch"] == caught.value.images
    assert len(found["batch"]) == 8
    assert all(Path(name).is_file() for name in found["batch"])
    last = read_last_checkpoint(out / "checkpoints")
    assert last is not None
    assert last.epoch == 1
    assert isinstance(caught.value, FinealignError)


@pytest.mark.nightly
def test_long_run__memory_and_open_files_stay(photos: Path, tiny_backbone: Tiny, tmp_path: Path) -> None:
    """benchmarks/soak.py in short: a label pass and a checkpoint an epoch, predictions now and then."""
    process, seen = psutil.Process(), []
    backbone = tiny_backbone("transformer")
    config = tiny_config(backbone, training__epochs=120, training__anchor_steps=2, views__refresh_epochs=1)
    model = FineAlign(CLASSES, config=config)

    def measure(record: EpochRecord) -> None:
        if record.epoch % 10 == 0:
            model.predict_proba(photos)
        seen.append((process.memory_info().rss, process.num_fds()))

    adapt_into(tmp_path / "run", model, photos, on_epoch=measure, keep_adapted=True)
    early, late = ([rss for rss, _ in part] for part in (seen[50:70], seen[100:]))
    assert np.median(late) < 1.02 * np.median(early)
    # After the last epoch the pass that predictions are read from is open as well.
    assert len({files for _, files in seen[50:-1]}) == 1
    assert seen[-1][1] <= seen[-2][1] + 1
