"""Two processes do not write one run folder at once; a lock of one that has ended holds nobody up."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from conftest import CLASSES, HANG, tiny_config
from finealign import FineAlign, adapt_into
from finealign.cli import app
from finealign.errors import OutputError
from finealign.run import lock as room
from finealign.run.adapt import plan
from finealign.run.contract import LOCK, TAKING_OVER
from finealign.run.lock import held, refuse_held

Tiny = Callable[[str], str]


def lock_of(folder: Path, **fields: Any) -> None:
    folder.mkdir(exist_ok=True)
    parent = psutil.Process(os.getppid())
    written = {"pid": parent.pid, "host": socket.gethostname(), "began": parent.create_time()} | fields
    (folder / LOCK).write_text(json.dumps(written))


def gone() -> int:
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait(HANG)
    return done.pid


def test_held__makes_the_folder_names_the_process_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with held(folder):
        found = json.loads((folder / LOCK).read_text())
        assert (found["pid"], found["host"]) == (os.getpid(), socket.gethostname())
        (folder / "run.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["run.json"]


@pytest.mark.parametrize("error", [OutputError, KeyboardInterrupt, SystemExit])
def test_held__leaves_nothing_after_an_error(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), held(tmp_path / "run"):
        raise error
    assert not (tmp_path / "run").exists()


def test_held__by_a_process_that_runs_is_refused_with_its_number(tmp_path: Path) -> None:
    lock_of(tmp_path / "run")
    before = (tmp_path / "run" / LOCK).read_text()
    told = rf"run is being written by process {os.getppid()}\. Wait until it has ended, or choose .*--out"
    with pytest.raises(OutputError, match=told):
        refuse_held(tmp_path / "run")
    with pytest.raises(OutputError, match=told), held(tmp_path / "run"):
        raise AssertionError
    assert (tmp_path / "run" / LOCK).read_text() == before


def test_held__on_another_machine_is_refused_with_what_to_do(tmp_path: Path) -> None:
    lock_of(tmp_path / "run", host="elsewhere", pid=gone())
    with pytest.raises(OutputError, match=r"by process \d+ on elsewhere.*If that process is gone, delete .*run.lock"):
        refuse_held(tmp_path / "run")


@pytest.mark.parametrize("left", ["gone", "number taken", "torn", "empty", "own"])
def test_held__what_is_left_by_a_process_that_ended_is_taken_over(left: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    lock_of(folder)
    if left == "gone":
        lock_of(folder, pid=gone())
    elif left == "number taken":
        lock_of(folder, began=1.0)
    elif left == "own":
        lock_of(folder, pid=os.getpid(), began=psutil.Process().create_time())
    else:
        (folder / LOCK).write_text('{"pid": 1' if left == "torn" else "")
        os.utime(folder / LOCK, (1.0, 1.0))
    refuse_held(folder)
    with held(folder):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert not list(folder.iterdir())


def test_held__a_lock_that_is_not_written_yet_is_respected(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("")
    with pytest.raises(OutputError, match="another process that has just begun"):
        refuse_held(tmp_path)


def test_held__a_takeover_that_was_broken_off_holds_nobody_up(tmp_path: Path) -> None:
    lock_of(tmp_path, pid=gone())
    (tmp_path / TAKING_OVER).write_text("")
    os.utime(tmp_path / TAKING_OVER, (1.0, 1.0))
    with held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_held__of_many_at_once_one_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand for processes; to each, the lock of another is that of a process that runs."""
    lock_of(tmp_path, pid=gone())
    inside, most, refused = [0], [0], [0]
    gate = threading.Lock()

    def go() -> None:
        try:
            with held(tmp_path):
                with gate:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.2)
                with gate:
                    inside[0] -= 1
        except OutputError:
            with gate:
                refused[0] += 1

    class Everything(set[Path]):
        def __contains__(self, path: object) -> bool:
            return True

    monkeypatch.setattr(room, "_held_here", Everything())
    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert most[0] == 1
    assert refused[0] >= 1


def test_held__a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"cannot be written.*--out"), held(tmp_path / "file" / "run"):
        raise AssertionError


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_adapt_into__is_refused_while_another_process_writes(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, how: dict[str, Any]
) -> None:
    model = FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"), method__name="cupl"))
    prepared = model.prepare(photos)
    lock_of(tmp_path / "run")
    with pytest.raises(OutputError, match=f"is being written by process {os.getppid()}"):
        adapt_into(tmp_path / "run", model, prepared, **how)
    with pytest.raises(OutputError, match=f"is being written by process {os.getppid()}"):
        plan(tmp_path / "run", prepared, **how)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]

    lock_of(tmp_path / "run", pid=gone())
    if not how.get("resume"):
        adapt_into(tmp_path / "run", model, prepared, **how)
        assert not (tmp_path / "run" / LOCK).exists()


def test_adapt__two_processes_and_what_a_killed_one_leaves(
    photos: Path, tiny_backbone: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finealign.runtime.devices.keep_freed_memory", lambda: False)
    out = tmp_path / "run"
    words = [sys.executable, "-m", "finealign", "adapt", photos, "--classes", ",".join(CLASSES), "--out", out]
    settings = {"views.crops": 2, "training.epochs": 400, "training.batch_size": 8, "data.workers": 2}
    words += [
        "--backbone",
        tiny_backbone("transformer"),
        *(f"--set={name}={value}" for name, value in settings.items()),
    ]
    command = [str(word) for word in words]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as going:
        until(lambda: (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").stat().st_size > 0)
        for more in ([], ["--resume"], ["--overwrite"]):
            second = CliRunner().invoke(app, [*command[3:], *more])
            assert second.exit_code == 1
            assert f"is being written by process {going.pid}." in second.stderr
        going.kill()
    assert (out / LOCK).exists()
    with subprocess.Popen([*command, "--resume"], stderr=subprocess.PIPE, text=True) as again:
        until(lambda: (out / LOCK).is_file() and str(again.pid) in (out / LOCK).read_text())
        until(lambda: json.loads((out / "run.json").read_text())["resumed"])
        again.send_signal(signal.SIGINT)
        _, told = again.communicate(timeout=HANG)
    assert again.returncode == 130, told
    assert not (out / LOCK).exists()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
