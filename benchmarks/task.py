"""What the benchmarks adapt to by the command: the demo's birds, which need no download, or a set of real photos."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_data import miniclip, require_shared

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node")


@dataclass(frozen=True)
class Task:
    """Unlabelled images, their classes and a backbone; and labelled images to measure with."""

    images: Path
    labelled: Path
    texts: tuple[str, ...]  # the command's options for classes and descriptions
    backbone: str

    def adapt(self, out: Path, *more: str) -> list[str]:
        """The arguments that adapt to it; what follows ``--set`` is one of ``more``."""
        return ["adapt", str(self.images), *self.texts, "--backbone", self.backbone, "--out", str(out), *more]


def make_task(name: str, folder: Path, *, images: int = 480) -> Task:
    """``demo``, drawn into ``folder``, or a set of real photos by its name."""
    return _demo(folder, images) if name == "demo" else real(name)


def real(name: str) -> Task:
    """A set of real photos with MiniCLIP. Ends the benchmark where they are not to be had."""
    shared = require_shared()
    data = shared / "data" / name
    texts = ("--classes", str(data / "classes.txt"), "--descriptions", str(data / "descriptions.json"))
    return Task(data / "train", data / "test", texts, f"local-dir:{miniclip()}")


def _demo(folder: Path, images: int) -> Task:
    from finealign.demo.model import demo_model
    from finealign.demo.world import make_world

    world = make_world(folder / "world", seed=0, unlabelled=images, test=240)
    classes, descriptions = folder / "classes.txt", folder / "descriptions.json"
    classes.write_text("\n".join(world.classes), encoding="utf-8")
    descriptions.write_text(json.dumps(world.descriptions), encoding="utf-8")
    texts = ("--classes", str(classes), "--descriptions", str(descriptions))
    return Task(world.unlabelled, world.truth, texts, demo_model())


def words(*arguments: str, processes: int = 1) -> list[str]:
    """The command line of one call of finealign, by so many processes."""
    launcher = [*TORCHRUN, str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, "-m", "finealign", *arguments]


def finealign(*arguments: str, processes: int = 1, threads: int = 0) -> dict[str, Any]:
    """One call of the command with --json, on so many threads a process, or the cores divided among them.

    Its errors end the benchmark.
    """
    threads = threads or max(1, len(os.sched_getaffinity(0)) // processes)
    done = subprocess.run(
        words(*arguments, "--json", processes=processes),
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {"error": done.stderr}
    if "error" in found:
        sys.exit(f"finealign {' '.join(arguments)}\n{found['error']}")
    return found
