"""Shards against files: the same weights and predictions? And what listing very many files takes.

    python benchmarks/shards.py --set demo --shard 100
    python benchmarks/shards.py --list 1000000

The shards are written by WebDataset's own writer, in the order in which the folder lists. Listing is measured in a
process of its own, as what its memory grows by, of empty files made for it.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import webdataset
from on_device import add_device
from task import Task, finealign, make_task

from finealign.images.listing import list_images

LISTING = """
import resource, sys
from finealign.images.listing import list_images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
paths = list_images(sys.argv[1])
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(len(paths), grown * 1024 / len(paths))
"""


def compare(task: Task, folder: Path, shard: int, device: str) -> str:
    """Adapt to files and to shards, predict both by the first model; what was the same."""
    shards, outs = folder / "shards", (folder / "files", folder / "packed")
    shards.mkdir()
    paths = list_images(task.images)
    with webdataset.ShardWriter(f"file:{shards}/%06d.tar", maxcount=shard, verbose=0) as writer:
        for path in paths:
            key = path.relative_to(task.images).with_suffix("").as_posix()
            writer.write({"__key__": key, path.suffix[1:].lower(): path.read_bytes(), "cls": 0})
    more = ("--keep-adapted", "--device", device, "--set", "training.epochs=2", "--set", "data.cache=temporary")
    seconds = []
    for source, out in zip((task.images, shards), outs, strict=True):
        seconds.append(finealign(*replace(task, images=source).adapt(out, *more))["seconds"])
    files = ("open_clip_model.safetensors", "finealign.safetensors")
    same = all((outs[0] / "model" / name).read_bytes() == (outs[1] / "model" / name).read_bytes() for name in files)
    predicted, out = [], folder / "predicted.csv"
    for source in (task.images, shards):
        finealign("predict", str(outs[0]), str(source), "--device", device, "--overwrite", "--out", str(out))
        with out.open(encoding="utf-8", newline="") as file:
            predicted.append([(row["label"], row["confidence"]) for row in csv.DictReader(file)])
    differ = sum(one != other for one, other in zip(*predicted, strict=True))
    return (
        f"{len(paths)} images in {len(list(shards.iterdir()))} shards: weights {'identical' if same else 'DIFFERENT'}, "
        f"{differ} of {len(paths)} predictions differ; {seconds[0]:.0f} s from files, {seconds[1]:.0f} s from shards"
    )


def listing(folder: Path, count: int) -> str:
    """List so many empty files, a thousand a folder."""
    for number in range(count):
        below = folder / f"{number // 1000:05d}"
        if number % 1000 == 0:
            below.mkdir()
        os.close(os.open(below / f"observation-{number:011d}.jpg", os.O_CREAT))
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LISTING, str(folder)], capture_output=True, text=True, check=True)
    found, each = done.stdout.split()
    name = len(str(folder)) + len("/00000/observation-00000000000.jpg")
    return (
        f"{int(found):,} files of {name} characters in {time.monotonic() - began:.0f} s, {float(each):.0f} bytes a file"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="demo", help="demo, or a set of real photos")
    parser.add_argument("--shard", type=int, default=100, help="images a shard")
    parser.add_argument("--list", type=int, default=0, help="list so many files instead")
    add_device(parser, default="cpu")  # the CPU's runs are the same bit for bit
    known = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if known.list:
            print(listing(Path(folder), known.list))
        else:
            print(compare(make_task(known.set, Path(folder)), Path(folder), known.shard, known.device))


if __name__ == "__main__":
    main()
