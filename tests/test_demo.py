"""`finealign demo --quick` as a newcomer runs it: the drawn world, the model that ships, every method."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import on_every_core


def test_demo__quick_shows_the_methods_in_their_order(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "finealign", "demo", "--quick", "--out", str(tmp_path / "demo"), "--json"]
    run = subprocess.run(command, env=on_every_core(), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout)
    top1 = {row["method"]: row["top1"] for row in found["results"]}
    assert list(top1) == ["zero-shot", "cupl", "wca", "self-training", "fair"]
    assert all(row["seconds"] > 0 and row["images_per_second"] > 0 for row in found["results"])
    # The names say nothing, the descriptions much, and FAIR leaves the other ways of using them behind. With so few
    # images self-training ends near where it started, on either side.
    assert abs(top1["zero-shot"] - found["chance"]) < 0.06
    assert top1["zero-shot"] + 0.2 < min(top1["wca"], top1["cupl"])
    assert top1["cupl"] - 0.06 < top1["self-training"] < top1["fair"] - 0.05
    assert top1["wca"] < top1["fair"] and top1["cupl"] + 0.1 < top1["fair"]
    for made in ("demo.png", "report.md", "demo.json", "fair/model/finealign.json", "self-training/run.json"):
        assert (tmp_path / "demo" / made).is_file()
