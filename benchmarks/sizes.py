"""Accuracy against the number of images adapted to, in the demo's drawn world, by the defaults.

    python benchmarks/sizes.py --out runs/sizes [--sizes 1200,12000] [--seeds 0] [--crops 4]

Each world has test images of its own, 600. A run is a line of OUT/sizes.jsonl and is not done again. Past
`training.steps` x `training.batch_size` images a run reads a sample, and its labels come by blocks.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from folders import measured
from on_device import add_device

from finealign.classifier import FineAlign
from finealign.config import make_config
from finealign.demo.model import demo_model
from finealign.demo.world import World, make_world
from finealign.evaluate.truth import read_truth

TESTED = 600


def run(world: World, config: dict[str, Any]) -> dict[str, Any]:
    """Top-1 of the start and of the adapted model on the test images, in percent, and how many images were read."""
    truth = read_truth(world.truth, world.classes)
    model = FineAlign(world.classes, descriptions=world.descriptions, config=make_config(config)).fit(world.unlabelled)
    found = measured(
        model.iter_predictions(truth.paths, with_start=True), dict(zip(truth.paths, truth.labels, strict=True))
    )
    return {"read": len(model.paths_), "start": found["start"], "adapted": found["adapted"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", default="1200,12000")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--crops", type=int, default=8)
    add_device(parser)
    known = parser.parse_args()
    known.out.mkdir(parents=True, exist_ok=True)
    log = known.out / "sizes.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    done = {(row["images"], row["seed"], row["crops"]) for row in rows}
    for seed in map(int, known.seeds.split(",")):
        for images in map(int, known.sizes.split(",")):
            if (images, seed, known.crops) in done:
                continue
            config = {
                "backbone": demo_model(),
                "seed": seed,
                "device": known.device,
                "views": {"crops": known.crops},
            }
            with TemporaryDirectory() as scratch:
                world = make_world(Path(scratch) / "world", seed=seed, unlabelled=images, test=TESTED)
                rows.append({"images": images, "seed": seed, "crops": known.crops, **run(world, config)})
            with log.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(rows[-1]) + "\n")
    print("| images | seed | crops | read | start | adapted |\n|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["seed"], row["images"])):
        print("| {images:,} | {seed} | {crops} | {read:,} | {start:.1f} | {adapted:.1f} |".format(**row))


if __name__ == "__main__":
    main()
