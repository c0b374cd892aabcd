"""The demo over several seeds, what labels would give on the same features, and why wca stands where it stands.

    python benchmarks/demo.py --out runs/demo-seeds --seeds 0,1,2

A seed that is done is not run again. The probes read the labels of the unlabelled images; nothing else does.
"""

import argparse
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from on_device import add_device
from probe import linear_probe

from finealign import FineAlign
from finealign.config import make_config
from finealign.demo.model import demo_model
from finealign.demo.result import METHODS
from finealign.demo.run import run_demo
from finealign.demo.species import SPECIES, describe
from finealign.evaluate.truth import read_truth
from finealign.runtime.devices import keep_freed_memory
from finealign.types import ImageFeatures, Truth

CLASSES = [name for name, _ in SPECIES]
DESCRIPTIONS = {name: describe(index) for index, name in enumerate(CLASSES)}


def features(model: FineAlign, truth: Truth) -> ImageFeatures:
    """The whole images (n, D) and their crops (n, N, D), as the fitted model sees them."""
    return model.features(truth.paths)[0]


def scored(model: FineAlign, seen: ImageFeatures, truth: Truth) -> float:
    device = model.backbone_.device
    seen = ImageFeatures(weak=seen.weak.to(device), crops=seen.crops.to(device))
    found = model.method_.score(seen, model.method_.scores[0]).argmax(1).cpu()
    return float((found == torch.tensor(truth.labels)).float().mean())


def unlearned(method: str, unlabelled: Path, seed: int, device: str, **options: Any) -> FineAlign:
    """A model of which nothing is trained: FAIR's scores come from the anchors as they start."""
    settings = {"backbone": demo_model(), "seed": seed, "device": device, "method": {"name": method, **options}}
    return FineAlign(CLASSES, descriptions=DESCRIPTIONS, config=make_config(settings)).fit(unlabelled)


@torch.inference_mode(False)
def ceilings(folder: Path, seed: int, device: str) -> dict[str, float]:
    """Probes on labels, and WCA's score part by part, on the world of one demo."""
    world = folder / "world"
    known, asked = (read_truth(world / name, CLASSES) for name in ("unlabelled.csv", "test.csv"))
    answers, truth = torch.tensor(known.labels), torch.tensor(asked.labels)
    found = {}
    start = unlearned("wca", world / "unlabelled", seed, device)
    adapted = FineAlign.load(folder / "fair", device=device)
    for name, model in (("start", start), ("adapted", adapted)):
        with torch.no_grad():
            train, test = features(model, known), features(model, asked)
        train, test = (
            ImageFeatures(weak=one.weak.cpu().clone(), crops=one.crops.cpu().clone()) for one in (train, test)
        )  # out of inference mode
        found[f"probe, {name}, whole image"] = linear_probe(train.weak, answers, test.weak, truth)
        both = [torch.cat([one.weak, one.crops.mean(1)], 1) for one in (train, test)]
        found[f"probe, {name}, whole image and mean crop"] = linear_probe(both[0], answers, both[1], truth)
        if name == "start":
            even = {"crop_temperature": 100.0}, {"description_temperature": 100.0}
            for label, options in (
                ("wca as published, 8 crops", {}),
                ("wca, crops weighted evenly", even[0]),
                ("wca, descriptions weighted evenly", even[1]),
                ("wca, both evenly", even[0] | even[1]),
            ):
                found[label] = scored(unlearned("wca", world / "unlabelled", seed, device, **options), test, asked)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    add_device(parser)
    known = parser.parse_args()
    keep_freed_memory()
    rows: dict[str, list[float]] = {}
    for seed in map(int, known.seeds.split(",")):
        folder = known.out / f"seed{seed}"
        result = known.out / f"seed{seed}.json"
        if not result.exists():
            demo = run_demo(folder, seed=seed, device=known.device, overwrite=folder.exists())
            found = {one.method: one.top1.mean for one in demo.methods}
            found |= {f"{one.method}, nothing learned": one.curve[0] for one in demo.methods if one.curve}
            found |= ceilings(folder, seed, known.device)
            result.write_text(json.dumps(found | {"seconds": demo.seconds}, indent=1), encoding="utf-8")
        for name, value in json.loads(result.read_text(encoding="utf-8")).items():
            rows.setdefault(name, []).append(value)
        print(f"seed {seed} done", flush=True)
    print(f"| | {' | '.join(f'seed {seed}' for seed in known.seeds.split(','))} | mean |")
    print("|" + "---|" * (2 + len(known.seeds.split(","))))
    for name, values in rows.items():
        factor = 1 if name == "seconds" else 100
        shown = [f"{factor * value:.1f}" for value in [*values, mean(values)]]
        print(f"| {name} | {' | '.join(shown)} |")
    gains = [math.nan] if not rows else [100 * (a - b) for a, b in zip(rows["fair"], rows["cupl"], strict=True)]
    print(
        f"\nfair over cupl: {mean(gains):+.1f} points; chance {100 / len(CLASSES):.1f}; methods: {', '.join(METHODS)}"
    )


if __name__ == "__main__":
    main()
