"""Time and memory of a run against the number of images, end to end: from the command to `predictions.csv`.

    python benchmarks/scaling.py --out runs/scaling [--sizes 2000,8000] [--backbone local-dir:MODEL]
    python benchmarks/scaling.py --out runs/scaling --against OTHER-CHECKOUT --sizes 2000

JPEGs of 500 x 375 pixels are drawn, ten classes of coloured grain; they tell about time and memory and nothing about
accuracy. `finealign adapt` runs on each size in a process of its own, with an empty cache. Memory is what no file
stands behind (RssAnon), its highest of samples ten times a second: pages of the mapped files are the system's to take
back. With `--against` the same runs by the package in another checkout, in turn with this one, and the ratio of the
seconds of `adapt` is told, and of those that its processors worked, which other work on the machine disturbs less.
Where a run adapts to a sample, `finealign predict` on the whole folder is measured as well, and told apart.
Linux only.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from on_device import add_device
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
SIZE = (500, 375)
CLASSES = [f"kind {number}" for number in range(10)]


def draw(folder: Path, images: int) -> Path:
    """A folder with this many JPEGs."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(images):
        hue = np.array([number % 10 * 25, 128, 255 - number % 10 * 25])
        grain = rng.integers(-60, 60, (60, 80, 3)) + hue
        coarse = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
        coarse.resize(SIZE, Image.Resampling.BICUBIC).save(folder / f"{number:06d}.jpg", quality=90)
    return folder


def anonymous(process: int) -> float:
    """The memory of a process that no file stands behind, in GB; 0 where it has ended."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1e6
    return 0.0


def run(checkout: Path, arguments: list[str], cache: Path) -> tuple[float, float, float, dict[str, Any]]:
    """The seconds of a command, those its processors worked, the highest memory in GB, and what it said as JSON."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    where = {"PYTHONPATH": str(checkout / "src"), "XDG_CACHE_HOME": str(cache)}
    with tempfile.TemporaryFile("w+") as said:
        began, peak = time.perf_counter(), 0.0
        process = subprocess.Popen([sys.executable, "-m", "finealign", *arguments], stdout=said, env=os.environ | where)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.1)
        seconds = time.perf_counter() - began
        if process.returncode:
            raise SystemExit(f"{checkout}: finealign {' '.join(arguments)} ended with {process.returncode}")
        said.seek(0)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        worked = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return seconds, worked, peak, json.load(said)


def measure(checkout: Path, photos: Path, images: int, known: argparse.Namespace) -> dict[str, Any]:
    """One run of `adapt`, and one of `predict` where that is left to be done."""
    with tempfile.TemporaryDirectory() as scratch:
        out, classes = Path(scratch) / "run", Path(scratch) / "classes.txt"
        classes.write_text("\n".join(CLASSES), encoding="utf-8")
        settings = [part for setting in known.set or () for part in ("--set", setting)]
        words = ["adapt", str(photos), "--classes", str(classes), "--backbone", known.backbone, "--out", str(out)]
        words += ["--set", f"device={known.device}"]  # an older checkout has no --device
        seconds, worked, peak, said = run(checkout, [*words, "--json", *settings], Path(scratch) / "cache")
        labelled, rest = said["images"], 0.0
        if labelled < images:
            everything = ["predict", str(out), str(photos), "--out", str(Path(scratch) / "all.csv"), "--json"]
            everything += ["--device", known.device]
            rest, _, higher, _ = run(checkout, everything, Path(scratch) / "cache")
            peak = max(peak, higher)
    return {
        "checkout": checkout.name,
        "images": images,
        "adapted_to": labelled,
        "adapt_seconds": round(seconds, 1),
        "adapt_cpu_seconds": round(worked, 1),
        "predict_seconds": round(rest, 1),
        "peak_gb": round(peak, 2),
    }


def main() -> None:
    from finealign.demo.model import demo_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", default="2000,8000", help="numbers of images")
    parser.add_argument("--backbone", default=demo_model())
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--set", action="append", help="section.key=value, for adapt")
    add_device(parser)
    known = parser.parse_args()
    known.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for images in map(int, known.sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            photos = draw(Path(folder) / "photos", images)
            checkouts = [HERE, known.against.resolve()] if known.against else [HERE]
            pair = [measure(checkout, photos, images, known) for checkout in checkouts]
        if known.against:
            ours, theirs = pair
            pair[0]["times_as_fast"] = round(theirs["adapt_seconds"] / ours["adapt_seconds"], 2)
            pair[0]["times_as_fast_by_cpu"] = round(theirs["adapt_cpu_seconds"] / ours["adapt_cpu_seconds"], 2)
        for row in pair:
            print(json.dumps(row), flush=True)
        rows += pair
        (known.out / "scaling.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
