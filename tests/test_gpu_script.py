"""benchmarks/gpu.sh: it can be read by a shell, says what it would run, and every command of it starts and ends."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import HANG

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STEPS = ["machine", "tests", "steps", "stages", "stages-thread", "predict", "twice", "demo-cpu", "demo", "alike"]


def script(*arguments: str, timeout: float = HANG) -> "subprocess.CompletedProcess[str]":
    words = ["bash", str(SCRIPT), "--python", sys.executable, *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dry_run__says_each_command_and_runs_none(tmp_path: Path, device: str) -> None:
    done = script("--dry-run", "--device", device, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    commands = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert list(commands) == STEPS
    assert not (tmp_path / "out").exists()
    for words in map(str.split, commands.values()):
        assert words[0] == sys.executable
        if words[1] != "-m":
            assert (ROOT / words[1]).is_file()
    own = [name for name in STEPS if name not in ("machine", "demo-cpu", "alike")]
    assert all(f"--device {device}" in commands[name] for name in own)


@pytest.mark.parametrize("arguments", [["--device", "tpu"], ["--fast"]])
def test_script__refuses_what_it_does_not_know(arguments: list[str]) -> None:
    done = script(*arguments)
    assert done.returncode == 2
    assert "Valid: " in done.stderr and arguments[-1] in done.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_script__is_what_shellcheck_lets_pass() -> None:
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.nightly
def test_script__on_a_cpu_at_tiny_sizes_every_step_is_done(tmp_path: Path) -> None:
    done = script("--device", "cpu", "--out", str(tmp_path), timeout=8 * HANG)
    summary = (tmp_path / "summary.txt").read_text(encoding="utf-8")
    assert done.returncode == 0, summary
    assert [line.split()[2] for line in summary.splitlines() if not line.startswith(" " * 8)] == STEPS
