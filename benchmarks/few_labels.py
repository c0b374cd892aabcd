"""A few labels a class: `fair` with and without them, and the peers that learn from labels, on frozen features.

    python benchmarks/few_labels.py --out runs/frozen [--worlds miniclip,clip-b16] [--labels 1,2,4,8] [--draws 3]

A world is a backbone and a set (frozen.py). For each draw, so many images of each class are drawn at random and their
labels given to every method; at least one image a class stays without. Two figures: top-1 on the test images, and on
the images that are learned from without their label. `fair` without labels is measured on the same images. Every method
scores as it does by default. The interval is over the draws of labels: two standard errors of the mean over the worlds,
each world's own variance taken by itself.

Results go to OUT/few-labels.jsonl, a line a run, and are not computed again: delete it when the code changes. Several
processes may share the work, each with worlds of its own.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean, variance
from typing import Any

import numpy as np
import torch
from ablation import worlds_of
from features import Encoded, trained
from frozen import Frozen
from on_device import add_device
from real_data import require_shared
from torch import Tensor

from finealign.method.base import Method
from finealign.method.few_labels import UNKNOWN
from finealign.method.registry import method_settings
from finealign.types import ImageFeatures

WITHOUT, WITH = "fair, no labels", "fair"
PEERS = ("linear-probe", "tip-adapter", "tip-adapter@fine-tuned", "transclip-few-shot")
FIGURES = ("test", "own")

Row = dict[str, Any]  # world, labels, draw, method, and the two figures in percent


def drawn_labels(hidden: Tensor, each: int, draw: int) -> Tensor:
    """The labels of ``each`` random images of every class, or of all but one: (n,), ``UNKNOWN`` for the others."""
    rng = np.random.default_rng((draw, each))
    known = torch.full_like(hidden, UNKNOWN)
    for label in sorted(set(hidden.tolist())):
        places = rng.permutation(np.flatnonzero(hidden.numpy() == label))
        known[torch.from_numpy(places[: min(each, len(places) - 1)])] = label
    return known


def measure(method: Method, encoded: Encoded, known: Tensor, crops: int) -> dict[str, float]:
    """Top-1 in percent on the test images, and on the images without a known label."""
    kind, there = method.own_score(), known == UNKNOWN
    seen = {
        "test": (ImageFeatures(encoded.test_weak, encoded.test_crops[:, :crops]), encoded.labels),
        "own": (ImageFeatures(encoded.weak[there], encoded.crops[there, :crops]), encoded.hidden[there]),
    }
    with torch.no_grad():
        return {
            name: round(100 * float((method.score(features, kind).argmax(1) == truth).float().mean()), 3)
            for name, (features, truth) in seen.items()
        }


class Runs:
    """The runs whose results are in a file, a line a run. What is not there is run and added."""

    def __init__(self, frozen: Frozen, log: Path) -> None:
        self.frozen, self.log = frozen, log
        self.plain: dict[str, tuple[Method, int]] = {}  # `fair` without labels, by world

    def rows(self) -> list[Row]:
        return (
            [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]
            if self.log.exists()
            else []
        )

    def add(self, world: str, count: int, draw: int) -> None:
        """Run every method on one draw of labels."""
        encoded = self.frozen.world(world, 0)
        known = drawn_labels(encoded.hidden, count, draw)
        done = {(row["world"], row["labels"], row["draw"], row["method"]) for row in self.rows()}
        for name in (WITHOUT, WITH, *PEERS):
            if (world, count, draw, name) in done:
                continue
            method, crops = self.trained(world, encoded, name, known)
            row = {"world": world, "labels": count, "draw": draw, "method": name}
            with self.log.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(row | measure(method, encoded, known, crops)) + "\n")

    def trained(self, world: str, encoded: Encoded, name: str, known: Tensor) -> tuple[Method, int]:
        if name != WITHOUT:
            return trained(encoded, method_settings(name), 0, known=known)
        if world not in self.plain:
            self.plain[world] = trained(encoded, method_settings("fair"), 0)
        return self.plain[world]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worlds", default="miniclip,clip-b16", help="worlds or groups of them, as in ablation.py")
    parser.add_argument("--labels", default="1,2,4,8", help="a class")
    parser.add_argument("--draws", type=int, default=3)
    add_device(parser)
    known = parser.parse_args()
    frozen, worlds = Frozen(require_shared(), known.out, known.device), worlds_of(known.worlds)
    each = [int(count) for count in known.labels.split(",")]
    made = Runs(frozen, known.out / "few-labels.jsonl")
    for draw, world, count in product(range(known.draws), worlds, each):
        made.add(world, count, draw)
    rows = [
        row for row in made.rows() if row["world"] in worlds and row["labels"] in each and row["draw"] < known.draws
    ]
    print(table(rows, each))
    print(by_world(rows, worlds, each))


def mean_and_error(by_world: Mapping[str, Sequence[float]]) -> tuple[float, float | None]:
    """The mean over the worlds of their means over the draws, and two standard errors of it.

    None in place of these where a world has a single draw.
    """
    centre = mean(mean(values) for values in by_world.values())
    if any(len(values) < 2 for values in by_world.values()):
        return centre, None
    errors = [variance(values) / len(values) for values in by_world.values()]
    return centre, 2 * sum(errors) ** 0.5 / len(by_world)


def table(rows: Sequence[Row], each: Sequence[int]) -> str:
    """Means over the worlds, a line a method, as Markdown."""
    lines = []
    for figure, title in zip(FIGURES, ("test images", "own images without a label"), strict=True):
        lines += [
            "",
            f"| {title} | {' | '.join(f'{count} a class' for count in each)} |",
            "|---" * (len(each) + 1) + "|",
        ]
        for name in (WITHOUT, WITH, *PEERS):
            cells = []
            for count in each:
                of_worlds: dict[str, list[float]] = {}
                for row in rows:
                    if (row["method"], row["labels"]) == (name, count):
                        of_worlds.setdefault(row["world"], []).append(row[figure])
                cells.append(_cell(of_worlds))
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(of_worlds: Mapping[str, Sequence[float]]) -> str:
    if not of_worlds:
        return "-"
    centre, error = mean_and_error(of_worlds)
    return f"{centre:.1f}" if error is None else f"{centre:.1f} ± {error:.1f}"


def by_world(rows: Sequence[Row], worlds: Sequence[str], each: Sequence[int]) -> str:
    """What labels gain `fair` in each world, on own and test images together, and its lead over the best peer there."""
    lines = ["", f"| world | {' | '.join(f'{count} a class' for count in each)} |", "|---" * (len(each) + 1) + "|"]
    for world in worlds:
        cells = []
        for count in each:
            there = [row for row in rows if (row["world"], row["labels"]) == (world, count)]
            found = {
                name: mean(mean(row[figure] for figure in FIGURES) for row in there if row["method"] == name)
                for name in dict.fromkeys(row["method"] for row in there)
            }
            if not found:
                cells.append("-")
                continue
            peer = max(PEERS, key=lambda name: found[name])
            cells.append(f"{found[WITH] - found[WITHOUT]:+.1f} / {found[WITH] - found[peer]:+.1f} ({peer})")
        lines.append(f"| {world} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
