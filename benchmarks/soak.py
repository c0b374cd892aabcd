"""Does a long run stay as it is? Hundreds of epochs on a small set, with memory and file handles after each.

    python benchmarks/soak.py --minutes 30 --out runs/soak

Everything a run does goes on: steps, label passes every fifth epoch, a checkpoint an epoch, predictions every tenth.
Prints how memory and handles differ from the first tenth of the time, the warm-up, to the last; curves in soak.svg.
"""

import argparse
import csv
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import psutil
from on_device import add_device
from step import resident
from task import make_task

from finealign.errors import StoppedError
from finealign.runtime.devices import keep_freed_memory
from finealign.runtime.progress import Progress

COLUMNS = ("seconds", "epoch", "memory_mb", "handles", "threads")
Row = tuple[float, int, float, int, int]


class Clock(Progress):
    """Asks to stop when the time is over."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def asked_to_stop(self) -> bool:
        return time.monotonic() > self.end


def soak(out: Path, minutes: float, device: str) -> list[Row]:
    """Adapt until the time is over; what was measured after each epoch."""
    from finealign import FineAlign
    from finealign.config import make_config
    from finealign.images.listing import list_images
    from finealign.run.adapt import adapt_into
    from finealign.training.state import EpochRecord

    task = make_task("demo", out, images=192)
    paths = list_images(task.images)
    options = dict(zip(task.texts[::2], task.texts[1::2], strict=True))
    settings = {
        "backbone": task.backbone,
        "device": device,
        "data": {"cache": str(out / "cache")},
        "training": {"epochs": 100_000, "batch_size": 32, "anchor_steps": 20},
        "views": {"refresh_epochs": 5},
    }
    texts = json.loads(Path(options["--descriptions"]).read_text(encoding="utf-8"))
    model = FineAlign(list(texts), descriptions=texts, config=make_config(settings))
    process, began, rows = psutil.Process(), time.monotonic(), []

    def measure(record: EpochRecord) -> None:
        if record.epoch % 10 == 0:
            model.predict_proba(paths[:32])
        seconds = time.monotonic() - began
        rows.append((seconds, record.epoch, 1000 * resident(), process.num_fds(), process.num_threads()))

    with suppress(StoppedError):
        adapt_into(out / "run", model, task.images, on_epoch=measure, progress=Clock(60 * minutes))
    return rows


def spread(rows: list[Row], column: int) -> tuple[float, float, float]:
    """The mean of a column in the tenth after the warm-up and in the last tenth, and the highest after the warm-up."""
    tenth = max(1, len(rows) // 10)
    settled = [row[column] for row in rows[tenth:]]
    return sum(settled[:tenth]) / tenth, sum(settled[-tenth:]) / tenth, max(settled)


def draw(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, sharex=True, figsize=(7, 4), layout="constrained")
    for axis, column, label in ((axes[0], 2, "memory, MB"), (axes[1], 3, "open files")):
        axis.plot([row[0] / 60 for row in rows], [row[column] for row in rows], linewidth=1)
        axis.set(ylabel=label, ylim=(0, 1.2 * max(row[column] for row in rows)))
    axes[1].set_xlabel("minutes")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--out", type=Path, required=True)
    add_device(parser)
    known = parser.parse_args()
    known.out.mkdir(parents=True)  # a new folder, so that nothing of another soak is mixed in
    keep_freed_memory()
    rows = soak(known.out, known.minutes, known.device)
    with (known.out / "soak.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    draw(rows, known.out / "soak.svg")
    print(f"{len(rows)} epochs in {rows[-1][0] / 60:.1f} minutes on {os.environ.get('OMP_NUM_THREADS', 'all')} threads")
    for column in (2, 3, 4):
        first, last, highest = spread(rows, column)
        print(
            f"{COLUMNS[column]}: {first:.1f} after the warm-up, {last:.1f} at the end ({last / first - 1:+.2%}), "
            f"highest {highest:.1f} ({highest / first - 1:+.2%})"
        )


if __name__ == "__main__":
    main()
