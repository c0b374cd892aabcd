"""`adapt` end to end, told by stage: how long each takes, and its images a second.

    python benchmarks/stages.py [--images 2000] [--backbone ViT-B-32/random] [--device cuda] [--json]

JPEGs of 500 x 375 are drawn before the clock starts; they tell about time and nothing about accuracy. Stages are those
that `adapt` shows as bars, each without those within it. The label passes say what workers, transfers and the encoder
make of it together. Memory is the highest that the GPU's allocator gave out, where there is a GPU.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from on_device import add_device, settle
from step import CLASSES, photos

from finealign import FineAlign, adapt_into
from finealign.config import read_config
from finealign.runtime.devices import choose_device, choose_workers, keep_freed_memory
from finealign.runtime.progress import Progress, Stage


@dataclass
class Timed:
    """What was seen of all stages of one name."""

    times: int = 0
    images: int = 0
    seconds: float = 0.0

    def advance(self, images: int) -> None:
        self.images += images

    def note(self, text: str) -> None:
        pass


@dataclass
class Clock(Progress):
    """Times each stage, less those within it."""

    device: torch.device
    stages: dict[str, Timed] = field(default_factory=dict)
    within: list[float] = field(default_factory=list)  # of each open stage: the seconds of those within it

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        timed = self.stages.setdefault(name, Timed())
        self.within.append(0.0)
        began = time.perf_counter()
        try:
            yield timed
        finally:
            settle(self.device)
            whole = time.perf_counter() - began
            timed.times += 1
            timed.seconds += whole - self.within.pop()
            if self.within:
                self.within[-1] += whole

    def caution(self, message: str) -> None:
        pass


def measure(images: int, backbone: str, wanted: str, workers: int | str, settings: list[str]) -> dict[str, Any]:
    """The seconds of one run, by stage."""
    device = choose_device(wanted)
    config = read_config(None, settings, backbone=backbone, device=wanted, data__workers=workers)
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "photos").mkdir()
        photos(Path(folder) / "photos", images)
        config = config.model_copy(update={"data": config.data.model_copy(update={"cache": f"{folder}/cache"})})
        began = time.perf_counter()
        adapt_into(Path(folder) / "run", FineAlign(CLASSES, config=config), f"{folder}/photos", progress=clock)
        settle(device)
        total = time.perf_counter() - began
    told = {
        name: {
            "times": stage.times,
            "seconds": round(stage.seconds, 2),
            "images_per_second": round(stage.images / stage.seconds, 1) if stage.images and stage.seconds else None,
        }
        for name, stage in clock.stages.items()
    }
    return {
        "backbone": backbone,
        "device": str(device),
        "workers": choose_workers(config.data.workers, device),
        "images": images,
        "seconds": round(total, 2),
        "elsewhere": round(total - sum(stage.seconds for stage in clock.stages.values()), 2),
        "gpu_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else None,
        "stages": told,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--backbone", default="ViT-B-32/random")
    parser.add_argument("--workers", default="auto", help="processes that make views; 0: a thread")
    parser.add_argument("--set", action="append", default=[], help="section.key=value")
    parser.add_argument("--json", action="store_true")
    add_device(parser)
    known = parser.parse_args()
    keep_freed_memory()
    workers = known.workers if known.workers == "auto" else int(known.workers)
    found = measure(known.images, known.backbone, known.device, workers, known.set)
    if known.json:
        print(json.dumps(found))
        return
    stages = found.pop("stages")
    print("  ".join(f"{name}: {value}" for name, value in found.items()))
    for name, stage in stages.items():
        print(f"{stage['seconds']:9.2f} s  {stage['times']:3} x {name:30} {stage['images_per_second'] or '':>8}")


if __name__ == "__main__":
    main()
