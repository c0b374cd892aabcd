"""Uneven folders on frozen features: the start, StatA, and self-training with an even, an estimated and the true prior.

    python benchmarks/uneven.py --out runs/frozen [--backbones clip-b16,miniclip] [--draws 3] [--methods fair]
    python benchmarks/uneven.py --out runs/frozen --classes 2,3,5    # lists of so few classes, drawn from each set

Own top-1: on the images that are learned from, without strangers. A run takes a second or two; results go to
OUT/uneven.jsonl, a line a run, and are not computed again. StatA sees whole images, and once more the sum of the whole
image and its mean crop. FAIR's figures are those of the score ``--score``.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from features import Encoded, Settings, trained
from folders import NONE, VARIANTS
from frozen import Frozen
from on_device import add_device
from real_data import require_shared
from torch import Tensor
from torch.nn.functional import normalize

from finealign.config import make_config
from finealign.method.base import Method
from finealign.method.registry import create_method
from finealign.types import ImageFeatures, Score

FEWEST = 20  # images of a folder
SETS = "eurosat,dtd10,flowers12,ucmerced"
LEARNERS = "fair,dpa"


Ways = dict[str, tuple[Encoded, Settings, Tensor | None]]  # the images seen, the settings, the class prior if given


def by_weight(encoded: Encoded, weights: Sequence[str]) -> Ways:
    """FAIR with an estimated prior, by the weight of its fairness term."""
    return {
        f"weight {weight}": (encoded, {"method": {"name": "fair", "fairness_weight": float(weight)}}, None)
        for weight in weights
    }


def ways(encoded: Encoded, learners: Sequence[str]) -> Ways:
    """What is compared: the methods that train nothing, and ``learners`` by each class prior."""
    counts = torch.bincount(encoded.hidden[encoded.hidden != NONE], minlength=encoded.texts.num_classes).float()
    both = normalize(encoded.weak + normalize(encoded.crops.mean(1), dim=1), dim=1)
    found: Ways = {
        "stata": (encoded, {"method": {"name": "stata"}}, None),
        "stata, with crops": (replace(encoded, weak=both), {"method": {"name": "stata"}}, None),
        "transclip": (encoded, {"method": {"name": "transclip"}}, None),
    }
    for name in learners:
        for prior in ("even", "auto"):
            found[f"{name}, {prior}"] = (encoded, {"method": {"name": name, "class_prior": prior}}, None)
        even = {"method": {"name": name, "class_prior": "even"}}
        found[f"{name}, true"] = (encoded, even, counts / counts.sum())
    return found


def top1(method: Method, encoded: Encoded, score: Score) -> float:
    """Own top-1 in percent, on the images of the classes."""
    belongs = encoded.hidden != NONE
    kind = score if score in method.scores else method.scores[0]
    with torch.no_grad():
        right = method.score(ImageFeatures(encoded.weak, encoded.crops), kind).argmax(1) == encoded.hidden
    return 100 * float(right[belongs].float().mean())


def run(encoded: Encoded, seed: int, score: Score, compared: Callable[[Encoded], Ways]) -> dict[str, float]:
    """Own top-1 in percent of everything that is compared."""
    start = create_method(
        make_config({"method": {"name": "cupl"}}).method, encoded.texts, logit_scale=encoded.logit_scale
    )
    found = {"start": top1(start, encoded, "global")}
    for name, (seen, settings, shares) in compared(encoded).items():
        method, _ = trained(seen, settings, seed, shares=shares)
        found[name] = top1(method, seen, score)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbones", default="clip-b16,miniclip")
    parser.add_argument("--sets", default=SETS)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--classes", default="0", help="how many of each set's classes make the list; 0: all of them")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--most", type=int, default=45, help="images a class")
    parser.add_argument("--score", default="fused", choices=("las", "fused", "global"))
    parser.add_argument("--weights", default="", help="compare these weights of FAIR's fairness term, and nothing else")
    parser.add_argument("--methods", default=LEARNERS, help="that learn, each by an even, an estimated, the true prior")
    add_device(parser)
    known = parser.parse_args()
    weights = [weight for weight in known.weights.split(",") if weight]
    learners = known.methods.split(",")
    compared = partial(by_weight, weights=weights) if weights else partial(ways, learners=learners)
    kind = "-weights" if weights else "" if known.methods == LEARNERS else "-" + "-".join(learners)
    frozen = Frozen(require_shared(), known.out, known.device)
    log = known.out / f"uneven{kind}.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    key = ("backbone", "set", "variant", "draw", "most", "score", "classes")
    done = {tuple(row.get(name, 0) for name in key) for row in rows}
    lists = [int(classes) for classes in known.classes.split(",")]
    backbones, sets, variants = (given.split(",") for given in (known.backbones, known.sets, known.variants))
    for draw, classes, variant, backbone, name in product(range(known.draws), lists, variants, backbones, sets):
        this = (backbone, name, variant, draw, known.most, known.score, classes)
        if this in done or classes > frozen.encoded(backbone, name).texts.num_classes:
            continue
        encoded = frozen.folder(backbone, name, variant, draw, most=known.most, classes=classes)
        if len(encoded.weak) < FEWEST:
            continue
        rows.append({**dict(zip(key, this, strict=True)), "top1": run(encoded, draw, known.score, compared)})
        with log.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(rows[-1]) + "\n")
    for backbone, classes in product(backbones, lists):
        wanted = {"backbone": backbone, "score": known.score, "most": known.most, "classes": classes}
        there = [row for row in rows if wanted.items() <= {"classes": 0, **row}.items()]
        print(table(f"{backbone}, {classes} classes" if classes else backbone, there))


def table(title: str, rows: list[Mapping[str, Any]]) -> str:
    """Means over sets and draws, a line a variant, as Markdown."""
    names = list(rows[0]["top1"]) if rows else []
    lines = ["", f"| {title} | folders | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for variant in VARIANTS:
        there = [row["top1"] for row in rows if row["variant"] == variant]
        if there:
            cells = " | ".join(f"{mean(row[name] for row in there):.1f}" for name in names)
            lines.append(f"| {variant} | {len(there)} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
