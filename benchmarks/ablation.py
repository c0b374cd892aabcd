"""One setting at a time, on features encoded once: what it does to top-1 in every world.

    python benchmarks/ablation.py --out runs/frozen --seeds 0,1 [--axes weight,fairness] [--worlds clip-b16,demo]

A world is a backbone and a set, as `clip-b16/dtd10`; a group (`miniclip`, `clip-b16`, `clip-b32`, `demo`) stands for
its worlds. The encoder is frozen, so a run takes seconds once a world is encoded; what matters here is confirmed with
the encoder learning (docs/ABLATION.md). The worlds of clip-b32 have whole images only, so that the scores of a method
are all the same there, and are tested on the images that are learned from. MiniCLIP's are a sample of each set
(frozen.py).

A cell of the table has two mean gains over the worlds' starts: by the score that the method uses, and by the one of its
scores that is best in each world.

Results go to OUT/ablation.jsonl, a line a run; a run with the same resolved settings is not run again, so delete the
file when the code changes. Sets are looked for in FINEALIGN_SHARED, else ../shared.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from features import ANOTHER_CROP, STRONG_VIEW, WHOLE_IMAGE, Encoded, Settings, configured, trained
from frozen import WORLDS, Frozen
from on_device import add_device
from probe import linear_probe
from real_data import require_shared
from torch import Tensor

from finealign.config import make_config, merged
from finealign.method.registry import choose_score, create_method, method_options, method_settings
from finealign.types import ImageFeatures

# Whose test labels the defaults are chosen by; the other worlds are reported untouched.
CHOOSING = (
    *(f"{backbone}/{name}" for backbone in ("miniclip", "clip-b16") for name in ("cifar100", "eurosat", "dtd10")),
    "clip-b32/dtd",
    "demo",
)


def varied(section: str, key: str, values: Sequence[Any]) -> dict[str, Settings]:
    return {str(value): {section: {key: value}} for value in values}


def own_steps(steps: int, rate: float) -> Settings:
    return {"training": {"anchor_steps": steps, "anchor_learning_rate": rate}}


# microclip needs patch tokens, and wca@published 60 crops an image, which these features do not have; the published
# settings of stata and transclip are their defaults.
METHODS = (
    "fair@reconstruction",
    "dpa",
    "dpa@published",
    "self-training",
    "lafter",
    "lafter@published",
    "wca",
    "upl",
    "upl@published",
    "reclip",
    "reclip@published",
    "pouf",
    "pouf@published",
    "must",
    "must@published",
    "gta-clip",
    "gta-clip@published",
    "transclip",
    "stata",
    "cupl",
    "zero-shot",
)

# Each axis changes the default in one place; the default itself is the row "as it is".
AXES: dict[str, dict[str, Settings]] = {
    "method": {name: method_settings(name) for name in METHODS},
    "score": varied("prediction", "score", ["global", "las", "fused"]),
    "whole share": varied("method", "whole_share", [0.0, 0.5, 1.0]),
    "crops N": varied("views", "crops", [1, 2, 4, 6]),
    "crops kept K": varied("method", "crops_kept", [1, 2, 4, 6]),
    "tau": varied("method", "crop_temperature", [0.018, 0.05, 0.1, 0.3]),
    "weight": varied(
        "method",
        "weight",
        ["none", "margin", "agreement", "confusion", "confusion*agreement", "margin*agreement*confusion"],
    ),
    "fixed share gamma": varied("method", "fixed_share", [0.25, 0.5, 0.75, 1.0]),
    "teacher": varied("method", "teacher_momentum", [0.0, 0.5, 0.9, 0.99]),
    "label balance": varied("method", "label_balance", [0.25, 0.5, 0.75, 1.0]),
    "fairness": varied("method", "fairness", ["batch", "off"]),
    "fairness weight": varied("method", "fairness_weight", [0.5, 1.0, 3.0, 4.0, 8.0]),
    "fairness temperature": varied("method", "fairness_temperature", [0.5, 2.0, 4.0]),
    "fairness window": varied("method", "fairness_window", [256, 1024, 4096]),
    "anchors per class": varied("method", "anchors_per_class", [2, 4]),
    "logit scale": varied("method", "logit_scale", [30.0, 50.0, 200.0]),
    "learning rate of the anchors": varied("training", "anchor_learning_rate", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
    "batch": varied("training", "batch_size", [32, 128, 256]),
    "steps": varied("training", "steps", [40, 160, 320]),
    "the anchors' own steps": varied("training", "anchor_steps", [0, 40, 80, 320]),
    "the anchors' own steps and rate": {
        f"{steps} at {rate:g}": own_steps(steps, rate) for steps, rate in product((0, 40, 160), (1e-4, 3e-4, 1e-3))
    },
    "the anchors' own batch": varied("training", "anchor_batch_size", [64, 128, 512]),
    "weight decay of the anchors": varied("training", "weight_decay", [0.01, 0.1]),
    "what stands for the strong view": {
        f"{view}, batch {size}": {"strong": view, "training": {"batch_size": size}}
        for view, size in product((STRONG_VIEW, ANOTHER_CROP, WHOLE_IMAGE), (64, 128, 256))
    },
}


def run(encoded: Encoded, settings: Settings, seed: int) -> dict[str, Any]:
    """Train in a world; top-1 in percent, by every score of the method and of the start, and which score it uses."""
    method, crops = trained(encoded, settings, seed)
    start = create_method(make_config({"method": {"name": "cupl"}}).method, encoded.texts, logit_scale=1.0)
    seen = ImageFeatures(encoded.test_weak, encoded.test_crops[:, :crops])
    config = configured(encoded, settings, seed)

    def top1(scores: Tensor) -> float:
        return 100 * float((scores.argmax(1) == encoded.labels).float().mean())

    with torch.no_grad():
        found: dict[str, float] = {score: top1(method.score(seen, score)) for score in method.scores}
        start_top1 = top1(start.score(seen, "global"))
    return {"own": choose_score(config.method.name, config.prediction.score), "start": start_top1, "top1": found}


def fingerprint(encoded: Encoded, settings: Settings, seed: int) -> str:
    """All settings of a run, those included that are not given."""
    config = configured(encoded, settings, seed)
    options = method_options(config.method).model_dump()
    return json.dumps([config.model_dump(), options, settings.get("strong", STRONG_VIEW)], sort_keys=True)


class Runs:
    """The runs whose results are in a file, a line a run. What is not there is run and added."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.done: dict[tuple[str, str], dict[str, Any]] = {
            (row["world"], row["settings"]): row for row in map(json.loads, lines)
        }

    def result(self, world: str, encoded: Encoded, settings: Settings, seed: int) -> dict[str, Any]:
        key = (world, fingerprint(encoded, settings, seed))
        if key not in self.done:
            began = time.perf_counter()
            row = {"world": world, "seed": seed, "settings": key[1], **run(encoded, settings, seed)}
            self.done[key] = {**row, "seconds": round(time.perf_counter() - began, 1)}
            with self.file.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(self.done[key]) + "\n")
        return self.done[key]


def ceilings(encoded: Encoded) -> dict[str, float]:
    """Top-1, in percent, of a linear probe on the labels of the images to learn from: whole, and whole with crops."""
    crops = 8
    order = torch.randperm(len(encoded.weak), generator=torch.Generator().manual_seed(0))  # they lie class by class
    weak, hidden = encoded.weak[order], encoded.hidden[order]
    train = torch.cat([weak, encoded.crops[order, :crops].mean(1)], dim=1)
    test = torch.cat([encoded.test_weak, encoded.test_crops[:, :crops].mean(1)], dim=1)
    return {
        "whole image": 100 * linear_probe(weak, hidden, encoded.test_weak, encoded.labels),
        "whole image and mean crop": 100 * linear_probe(train, hidden, test, encoded.labels),
    }


def gains(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean gain over the start of some runs in one world: by the method's own score, and by the best of its scores."""
    own = mean(row["top1"][row["own"]] - row["start"] for row in rows)
    best = max(mean(row["top1"][score] - row["start"] for row in rows) for score in rows[0]["top1"])
    return own, best


def table(axis: str, results: Sequence[dict[str, Any]], worlds: Sequence[str], *, each: bool) -> str:
    """Markdown, a line a value: the worst world, then mean gains by group of worlds, or by world if ``each``."""
    found = {
        value: {world: gains(rows) for world in worlds if (rows := [r for r in of_value if r["world"] == world])}
        for value in dict.fromkeys(row["value"] for row in results)
        if (of_value := [row for row in results if row["value"] == value])
    }
    columns = {world: [world] for world in worlds}
    if not each:
        columns = {group: [world for world in of_group if world in worlds] for group, of_group in WORLDS.items()}
        columns["choosing"] = [world for world in worlds if world in CHOOSING]
        columns["untouched"] = [world for world in worlds if world not in CHOOSING]
        columns = {name: of_column for name, of_column in columns.items() if of_column}
    lines = ["", f"| {axis} | worst world | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for value, by_world in found.items():
        worst = min(by_world, key=lambda world: by_world[world][0])
        cells = [_cell([by_world[world] for world in names if world in by_world]) for names in columns.values()]
        lines.append(f"| {value} | {worst} {by_world[worst][0]:+.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: Sequence[tuple[float, float]]) -> str:
    return " / ".join(f"{mean(gain):+.1f}" for gain in zip(*found, strict=True)) or "-"


def names_of(text: str, known: Iterable[str], kind: str) -> list[str]:
    """The names in a text with commas between. Ends the benchmark for an unknown one."""
    names, valid = text.split(","), list(known)
    if unknown := [name for name in names if name not in valid]:
        sys.exit(f"No {kind} is called {', '.join(unknown)}. Valid: {', '.join(valid)}.")
    return names


def worlds_of(names: str) -> list[str]:
    """The worlds that names and groups, with commas between, stand for. Ends the benchmark for an unknown one."""
    every = {world: (world,) for group in WORLDS.values() for world in group}
    known: dict[str, Iterable[str]] = {**every, **WORLDS, "all": every, "choosing": CHOOSING}
    chosen = {world for name in names_of(names, known, "world") for world in known[name]}
    return [world for world in every if world in chosen]


def print_other(frozen: Frozen, worlds: Sequence[str], seeds: Sequence[int], *, ceiling: bool) -> None:
    """Print linear probes, or `transclip` fitted on the images to learn from and on the test images."""
    for name, seed in product(worlds, seeds):
        encoded = frozen.world(name, seed)
        if ceiling:
            shown = [f"{key}: {value:.1f}" for key, value in ceilings(encoded).items()]
        else:
            there = replace(encoded, weak=encoded.test_weak, crops=encoded.test_crops)
            fitted = {"images to learn from": encoded, "test images": there}
            found = {key: run(source, {"method": {"name": "transclip"}}, seed) for key, source in fitted.items()}
            shown = [f"fitted on the {key}: {one['top1']['global'] - one['start']:+.1f}" for key, one in found.items()]
        print(f"{name}, seed {seed}, {', '.join(shown)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--worlds", default="all", help=f"worlds or groups: {', '.join(WORLDS)}, choosing, all")
    parser.add_argument("--axes", default="all", help="names with commas between; all; none: the default alone")
    parser.add_argument("--each", action="store_true", help="a column a world, not a group of worlds")
    parser.add_argument("--transductive", action="store_true", help="only transclip, fitted on the test images too")
    parser.add_argument("--ceiling", action="store_true", help="only a linear probe on labels, in each world")
    parser.add_argument("--base", default="{}", help="JSON: settings that every run starts from")
    add_device(parser)
    known = parser.parse_args()
    frozen, worlds = Frozen(require_shared(), known.out, known.device), worlds_of(known.worlds)
    seeds = [int(seed) for seed in known.seeds.split(",")]
    if known.transductive or known.ceiling:
        print_other(frozen, worlds, seeds, ceiling=known.ceiling)
        return
    runs, base = Runs(known.out / "ablation.jsonl"), json.loads(known.base)
    names = list(AXES) if known.axes == "all" else names_of(known.axes, [*AXES, "none"], "axis")
    axes = {name: {"(as it is)": Settings(), **AXES.get(name, {})} for name in names}
    results: dict[str, list[dict[str, Any]]] = {axis: [] for axis in axes}
    for name, seed in product(worlds, seeds):
        encoded = frozen.world(name, seed)
        for axis, values in axes.items():
            for value, changed in values.items():
                found = runs.result(name, encoded, merged(base, changed), seed)
                results[axis].append({**found, "value": value})
        print(f"{name}, seed {seed}", file=sys.stderr, flush=True)
    for axis, rows in results.items():
        print(table(axis, rows, worlds, each=known.each))


if __name__ == "__main__":
    main()
