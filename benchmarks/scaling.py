"""Time and memory of a run against the number of images: both on one plot.

    python benchmarks/scaling.py --out runs/scaling [--sizes 1000,4000,16000]

The demo's model adapts to its birds, the same 1,000 files over and over, for two epochs with one label pass, and then
predicts them all by crops; each size in a process of its own. Memory is what no file stands behind (RssAnon), its
highest of samples ten times a second: pages of the mapped files are the system's to take back. Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from step import resident

from finealign.runtime.devices import keep_freed_memory


class Peak:
    """The highest memory while it is watched, in GB."""

    def __init__(self) -> None:
        self.highest = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self.highest = max(self.highest, resident())

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def one(size: int, images: Path) -> dict[str, float]:
    """Adapt to and predict ``size`` images in this process."""
    from finealign import FineAlign
    from finealign.config import make_config
    from finealign.demo.model import demo_model
    from finealign.demo.species import SPECIES, describe
    from finealign.images.listing import list_images

    found = list_images(images)
    paths = [found[number % len(found)] for number in range(size)]
    settings = {
        "backbone": demo_model(),
        "data": {"cache": "temporary"},
        "training": {"epochs": 2},
        "views": {"refresh_epochs": 2},
    }
    classes = [name for name, _ in SPECIES]
    descriptions = {name: describe(index) for index, name in enumerate(classes)}
    model = FineAlign(classes, descriptions=descriptions, config=make_config(settings))
    backbone = model.load_backbone(make_config(settings))
    start = resident()
    with Peak() as peak:
        began = time.perf_counter()
        model.fit(paths, backbone=backbone)
        fitted = time.perf_counter()
        for _ in model.iter_predictions(iter(paths)):
            pass
        done = time.perf_counter()
    return {
        "images": size,
        "adapt_seconds": round(fitted - began, 2),
        "predict_seconds": round(done - fitted, 2),
        "start_gb": round(start, 3),
        "peak_gb": round(peak.highest, 3),
    }


def picture(rows: list[dict[str, float]], path: Path) -> None:
    """Seconds on the left, memory on the right, against the number of images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    time_axis = figure.subplots()
    sizes = [row["images"] for row in rows]
    time_axis.plot(sizes, [row["adapt_seconds"] for row in rows], "o-", color="#1f6fb4", label="adapt, seconds")
    time_axis.plot(sizes, [row["predict_seconds"] for row in rows], "s-", color="#58a55c", label="predict, seconds")
    time_axis.set(xlabel="images", ylabel="seconds", xlim=(0, None), ylim=(0, None))
    time_axis.spines[["top"]].set_visible(False)
    memory_axis = time_axis.twinx()
    memory_axis.plot(sizes, [row["peak_gb"] for row in rows], "^--", color="#c0562f", label="memory, GB")
    memory_axis.set(ylabel="GB", ylim=(0, 2 * max(row["peak_gb"] for row in rows)))
    memory_axis.spines[["top"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", default="1000,4000,16000")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--world", type=Path, help=argparse.SUPPRESS)
    known = parser.parse_args()
    if known.one:
        keep_freed_memory()
        print(json.dumps(one(known.one, known.world)))
        return
    from finealign.demo.world import make_world

    known.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder) / "world", seed=0, unlabelled=1000, test=24).unlabelled
        rows = []
        for size in known.sizes.split(","):
            again = [sys.executable, __file__, "--out", str(known.out), "--one", size, "--world", str(world)]
            done = subprocess.run(again, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout))
            print(json.dumps(rows[-1]), flush=True)
    (known.out / "scaling.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    picture(rows, known.out / "scaling.png")
    print(known.out / "scaling.png")


if __name__ == "__main__":
    main()
