"""Several processes share one run and give what one gives.

The launchers are real, torchrun and accelerate, by gloo; where they do not matter, processes are forked.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from conftest import CLASSES, HANG, write_photos
from finealign.cli import app
from finealign.run.contract import LOCK
from finealign.run.lock import held
from finealign.runtime.distributed import Ranks
from finealign.training.checkpoints import read_last_checkpoint
from forked import CLIENT, forking

Tiny = Callable[[str], str]
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "finealign"],
    # Processes on CPUs it starts by itself only through MPI; --multi_gpu starts as many processes, GPUs or none.
    "accelerate": [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "finealign"),
    ],
    "alone": [sys.executable, "-m", "finealign"],
    "forked": [],  # the process that it is forked from knows
}
SETTINGS = {
    "views.crops": 2,
    "training.epochs": 3,
    "training.batch_size": 10,
    "training.anchor_steps": 3,
    "training.learning_rate": 1e-3,
    "training.anchor_learning_rate": 1e-3,
    "views.refresh_epochs": 1,
    "views.refresh_moved": 0.02,  # so that the ranks look how far the encoder has moved, and encode anew
}


def command(launcher: str, *arguments: str | Path, **settings: object) -> list[str]:
    chosen = [f"--set={name}={value}" for name, value in settings.items()]
    return [*LAUNCHERS[launcher], *map(str, arguments), *chosen]


def run(words: list[str], *, wanted: int = 0) -> subprocess.CompletedProcess[str]:
    """Run to the end, on one thread a process. Not longer than three minutes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == wanted, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def forks() -> Iterator[str]:
    with forking() as address:
        yield address


def together(forks: str, *ranks: list[str], wanted: int = 0) -> list[subprocess.CompletedProcess[str]]:
    """Run the words of every rank to the end, as a launcher would, but without importing torch for each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared = {**os.environ, **rendezvous, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(len(ranks))}
    script = "import sys\n" + CLIENT.format(address=forks)

    def rank(number: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", "-c", script, *ranks[number]],
            env={**shared, "RANK": str(number), "LOCAL_RANK": str(number)},
            capture_output=True,
            text=True,
            timeout=HANG,
            check=False,
        )

    with ThreadPoolExecutor(len(ranks)) as pool:
        done = list(pool.map(rank, range(len(ranks))))
    assert {process.returncode for process in done} == {wanted}, [process.stderr[-3000:] for process in done]
    return done


def alone(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process without a launcher does, in this one."""
    monkeypatch.setattr("finealign.runtime.devices.keep_freed_memory", lambda: False)
    done = CliRunner().invoke(app, words[len(LAUNCHERS["alone"]) :])
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 images, so that no share of them is like another, one of which cannot be read."""
    folder = write_photos(tmp_path_factory.mktemp("pictures"))
    (folder / "red" / "3b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def adapt(launcher: str, pictures: Path, backbone: str, out: Path, *more: str, **settings: object) -> list[str]:
    words: list[str | Path] = ["adapt", pictures, "--classes", ",".join(CLASSES), "--backbone", backbone, "--out", out]
    settings = SETTINGS | {"precision": "fp32", "device": "cpu", "data.cache": out.with_suffix(".cache")} | settings
    return command(launcher, *words, "--keep-adapted", *more, **settings)


def learned(folder: Path) -> dict[str, Tensor]:
    found = read_last_checkpoint(folder / "checkpoints")
    assert found is not None
    return {name: value for name, value in found.tensors.items() if name.startswith(("norms", "method"))}


def labels(folder: Path) -> list[list[str]]:
    return [line.split(",")[:2] for line in (folder / "predictions.csv").read_text().splitlines()]


def assert_same(one: Path, two: Path) -> None:
    """What was learned and told by the two runs."""
    for line, other in zip(
        *((folder / "metrics.jsonl").read_text().splitlines() for folder in (one, two)), strict=True
    ):
        first, second = json.loads(line), json.loads(other)
        assert first["class_share"] == second["class_share"]
        assert first["changed"] == second["changed"]
        assert first["loss"] == second["loss"]
    ours, theirs = learned(one), learned(two)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []
    assert labels(one) == labels(two)
    assert (one / "set_aside.csv").read_text() == (two / "set_aside.csv").read_text()


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_adapt__by_two_processes_as_by_one(
    tiny_backbone: Tiny, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    backbone = tiny_backbone("transformer")
    method = {"method.name": "lafter"} if launcher == "accelerate" else {}
    alone(adapt("alone", pictures, backbone, one, **method), monkeypatch)
    done = run(adapt(launcher, pictures, backbone, two, **method))
    assert done.stdout.count("Adapted") == 1
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    assert_same(one, two)


def test_adapt__two_processes_are_stopped_and_go_on(
    tiny_backbone: Tiny, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forks: str
) -> None:
    """What they end with is held against one process, which nothing stopped."""
    backbone = tiny_backbone("transformer")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    alone(adapt("alone", pictures, backbone, whole, **{"training.epochs": 25}), monkeypatch)
    words = adapt("torchrun", pictures, backbone, stopped, **{"training.epochs": 25})
    with subprocess.Popen(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    ) as going:
        until(lambda: (stopped / "metrics.jsonl").exists() and (stopped / "metrics.jsonl").read_text().count("\n") > 1)
        going.send_signal(signal.SIGTERM)
        _, told = going.communicate(timeout=HANG)
    assert "Go on by the same launcher with:" in told
    assert json.loads((stopped / "run.json").read_text())["status"] == "stopped"
    words = adapt("forked", pictures, backbone, stopped, "--resume", **{"training.epochs": 25})
    assert "".join(done.stdout for done in together(forks, words, words)).count("Adapted") == 1
    assert json.loads((stopped / "run.json").read_text())["processes"] == 2
    assert_same(whole, stopped)


@pytest.mark.nightly
def test_predict__two_processes_write_one_file_in_the_order_of_the_input(
    tiny_backbone: Tiny, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    alone(adapt("alone", pictures, tiny_backbone("transformer"), whole), monkeypatch)
    asked: list[str | Path] = ["predict", whole, pictures, "--precision", "fp32", "--out"]
    alone(command("alone", *asked, tmp_path / "one.csv"), monkeypatch)
    run(command("torchrun", *asked, tmp_path / "two.csv"))
    assert (tmp_path / "one.csv").read_text() == (tmp_path / "two.csv").read_text()
    assert (tmp_path / "one.set_aside.csv").read_text() == (tmp_path / "two.set_aside.csv").read_text()


def test_adapt__processes_with_other_settings_are_refused(
    tiny_backbone: Tiny, pictures: Path, tmp_path: Path, forks: str
) -> None:
    """As when a machine has an older file of settings: told on every rank, nothing written."""
    backbone = tiny_backbone("transformer")
    ranks = [
        adapt("forked", pictures, backbone, tmp_path / "run", **{"training.learning_rate": rate})
        for rate in (0.001, 0.002)
    ]
    for done in together(forks, *ranks, wanted=1):
        assert "The processes of this run differ in images, texts, settings or versions" in done.stderr
    assert not (tmp_path / "run").exists()


def test_adapt__a_folder_that_another_process_writes_is_refused_on_every_rank(
    tiny_backbone: Tiny, pictures: Path, tmp_path: Path, forks: str
) -> None:
    out = tmp_path / "run"
    with held(out):
        words = adapt("forked", pictures, tiny_backbone("transformer"), out)
        for done in together(forks, words, words, wanted=1):
            assert f"run is being written by process {os.getpid()}." in done.stderr
        assert [path.name for path in out.iterdir()] == [LOCK]
    assert not out.exists()


def until(true: Callable[[], bool], *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# --- alone ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [0, 1, 5, 64])
def test_sizes__share_everything_evenly(count: int, length: int) -> None:
    sizes = Ranks(0, count).sizes(length)
    assert sum(sizes) == length
    assert len(sizes) == count
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [1, 5, 64])
def test_share__puts_every_item_in_one_place_and_leaves_no_rank_without(count: int, length: int) -> None:
    items = torch.arange(length)
    shares = [Ranks(index, count).share(items) for index in range(count)]
    sizes = Ranks(0, count).sizes(length)
    assert torch.equal(torch.cat([share[:size] for share, size in zip(shares, sizes, strict=True)]), items)
    assert all(len(share) for share in shares)


def test_alone__nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks.launched()
    part = torch.ones(3, 2, requires_grad=True)
    part.grad = torch.ones(3, 2)
    assert ranks == Ranks(0, 1)
    assert ranks.gather(part, [3]) is part
    assert ranks.texts("ä") == ["ä"]
    assert ranks.any(True)
    assert not ranks.any(False)
    assert Ranks(0, 3).gather(torch.empty(2, 0, 5), [2, 2, 1]).shape == (5, 0, 5)  # nothing to send
    ranks.add_gradients([part])
    ranks.follow([part])
    ranks.refuse_different("anything", object())
    ranks.wait()
    ranks.leave()
    with ranks.first_of_each_machine():
        assert torch.equal(part.grad, torch.ones(3, 2))
