"""How many cores a process may use is what its affinity and its container say, not what the machine has."""

import math
import os
from pathlib import Path

import pytest

from finealign.cli import doctor, machine
from finealign.runtime import cores


@pytest.fixture
def quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the files of the cgroup are looked for; there are none yet. Eight cores are there."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for name in ("_QUOTA", "_QUOTA_V1", "_PERIOD_V1"):
        monkeypatch.setattr(cores, name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("said", "usable"),
    [
        ("max 100000\n", 8),
        ("400000 100000\n", 4),
        ("150000 100000\n", 2),  # a share of a core is better used than left
        ("10000 100000\n", 1),
        ("6400000 100000\n", 8),
        ("nonsense\n", 8),
        ("", 8),
    ],
)
def test_usable_cores__are_bounded_by_the_quota_of_the_cgroup(quota: Path, said: str, usable: int) -> None:
    (quota / "_QUOTA").write_text(said, encoding="ascii")
    assert cores.usable_cores() == usable


@pytest.mark.parametrize(("most", "usable"), [("-1", 8), ("200000", 2)])
def test_usable_cores__by_the_first_version_of_cgroups(quota: Path, most: str, usable: int) -> None:
    (quota / "_QUOTA_V1").write_text(f"{most}\n", encoding="ascii")
    (quota / "_PERIOD_V1").write_text("100000\n", encoding="ascii")
    assert cores.usable_cores() == usable


def test_usable_cores__are_those_of_the_affinity(quota: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cores.usable_cores() == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert cores.usable_cores() == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cores.usable_cores() == 64
    assert cores._quota() == math.inf


def test_doctor__says_what_shared_memory_workers_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "shared_memory", lambda: (64_000_000, 60_000_000))
    facts = machine.shared(8)
    assert (facts["size"], facts["free"], facts["workers"]) == (64_000_000, 60_000_000, 8)
    assert facts["needed"] == 8 * 2 * 32 * 9 * 3 * 224 * 224  # two chunks a worker, of 32 images in nine views
    told = doctor._shared_memory(facts)
    assert "0.06 of 0.06 GB free" in told and "0.69 needed by 8 workers" in told and "--shm-size" in told
    assert "--shm-size" not in doctor._shared_memory(facts | {"free": 10**9})
    assert "not needed" in doctor._shared_memory(machine.shared(0))
    monkeypatch.setattr(cores, "SHARED_MEMORY", tmp_path / "none")
    assert cores.shared_memory() is None
