"""How well p_none tells images of none of the classes from the others, on features encoded once.

    python benchmarks/strangers.py --frozen FOLDER [--sets eurosat,dtd10] [--seeds 2] [--shapes even,tail] [--adapted]

FOLDER holds what benchmarks/features.py encodes, <set>-0.safetensors; sets without a file are left out, none is
encoded here. Each row is a kind of folder: its shape (how many images each class has), where its strangers come from,
and how many there are for each image of a class. Strangers are images of the other sets (`sets`: of all of them, `set`:
of one drawn set) or of a third of the set's own classes that are left out of the list (`held out`). `--adapted` fits on
the anchors that FAIR has learned from the folder, strangers included, in place of the texts. Labels serve the
measures alone.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from features import Encoded, Sets, trained
from on_device import add_device
from torch import Tensor

from finealign.method.alignment import class_means, global_score
from finealign.method.strangers import fit, p_none
from finealign.types import TextFeatures

SETS = ("eurosat", "flowers12", "dtd10", "ucmerced", "food10", "pets37-small", "cifar100")
SHAPES = ("even", "tail", "half", "dominated", "few", "three", "one")
CROPS = 8
MOST = 45  # images a class
# Sets that have a class in common are no strangers to each other.
ALIKE = (("eurosat", "ucmerced"), ("flowers12", "cifar100"))


@dataclass(frozen=True)
class Folder:
    """A made folder: what can be seen of it, and for each image its class in the list, or -1 for a stranger."""

    encoded: Encoded
    own: Tensor  # (n,) int64
    test: Tensor  # (m,) int64


def counts(shape: str, classes: int, generator: torch.Generator) -> Tensor:
    """Images wanted of each class: (C,) int64."""
    order = torch.randperm(classes, generator=generator)
    wanted = torch.full((classes,), {"few": 5}.get(shape, MOST))
    if shape == "tail":
        steps = torch.arange(classes) / max(1, classes - 1)
        wanted[order] = (MOST * 20.0**-steps).round().long().clamp_min(1)
    elif shape == "half":
        wanted[order[: classes // 2]] = 0
    elif shape == "dominated":
        wanted[order[1:]] = MOST // 20
    elif shape in ("three", "one"):
        wanted[order[3 if shape == "three" else 1 :]] = 0
    return wanted


def make_folder(sets: Mapping[str, Encoded], name: str, shape: str, kind: str, ratio: float, seed: int) -> Folder:
    """Draw a folder of the set ``name`` with ``ratio`` strangers of a kind for each image of a class."""
    generator = torch.Generator().manual_seed(1000 * seed + SETS.index(name))

    def draw(positions: Tensor, most: int) -> Tensor:
        return positions[torch.randperm(len(positions), generator=generator)][:most]

    base = sets[name]
    all_classes = base.texts.num_classes
    listed = torch.arange(all_classes)
    if kind == "held out":
        listed = draw(listed, (2 * all_classes + 2) // 3).sort().values
    position = torch.full((all_classes,), -1)
    position[listed] = torch.arange(len(listed))
    wanted = counts(shape, len(listed), generator)
    rows = torch.cat([draw((base.hidden == c).nonzero()[:, 0], int(wanted[i])) for i, c in enumerate(listed)])
    found: dict[str, list[Tensor]] = {"weak": [base.weak[rows]], "crops": [base.crops[rows, :CROPS]]}
    found |= {"strong": [base.strong[:, rows]], "own": [position[base.hidden[rows]]]}
    known = position[base.labels] >= 0
    found |= {"test_weak": [base.test_weak[known]], "test_crops": [base.test_crops[known, :CROPS]]}
    found |= {"test": [position[base.labels[known]]]}

    def add(source: Encoded, rows: Tensor, tested: Tensor) -> None:
        found["weak"].append(source.weak[rows])
        found["crops"].append(source.crops[rows, :CROPS])
        found["strong"].append(source.strong[: len(base.strong), rows])
        found["own"].append(torch.full((len(rows),), -1))
        found["test_weak"].append(source.test_weak[tested])
        found["test_crops"].append(source.test_crops[tested, :CROPS])
        found["test"].append(torch.full((len(tested),), -1))

    strangers, tested = round(ratio * len(rows)), round(ratio * int(known.sum()))
    if kind == "held out":
        rest = (position[base.hidden] < 0).nonzero()[:, 0]
        add(base, draw(rest, strangers), draw((~known).nonzero()[:, 0], tested))
    elif strangers:
        others = [o for o in sets if o != name and (o, name) not in ALIKE and (name, o) not in ALIKE]
        if kind == "set":
            others = [others[int(torch.randint(len(others), (1,), generator=generator))]]
        for i, other in enumerate(others):
            parts = [total * (i + 1) // len(others) - total * i // len(others) for total in (strangers, tested)]
            source = sets[other]
            add(
                source,
                draw(torch.arange(len(source.weak)), parts[0]),
                draw(torch.arange(len(source.test_weak)), parts[1]),
            )
    joined = {key: torch.cat(values, dim=1 if key == "strong" else 0) for key, values in found.items()}
    order = torch.randperm(len(joined["own"]), generator=generator)
    kept = position[base.texts.class_of] >= 0
    texts = TextFeatures(base.texts.names[listed], base.texts.descriptions[kept], position[base.texts.class_of[kept]])
    encoded = replace(
        base,
        weak=joined["weak"][order],
        crops=joined["crops"][order],
        strong=joined["strong"][:, order],
        test_weak=joined["test_weak"],
        test_crops=joined["test_crops"],
        labels=joined["test"],
        hidden=joined["own"][order],
        texts=texts,
    )
    return Folder(encoded, encoded.hidden, encoded.labels)


def auroc(values: Tensor, positive: Tensor) -> float:
    """Probability that a positive has a larger value than a negative, ties counted half; nan without both."""
    highs, lows = values[positive].double(), values[~positive].double()
    if not len(highs) or not len(lows):
        return float("nan")
    ranked = lows.sort().values
    below = torch.searchsorted(ranked, highs, side="left")
    upto = torch.searchsorted(ranked, highs, side="right")
    return float((below + upto).double().mean() / 2 / len(lows))


def measured(folder: Folder, *, adapted: bool, seed: int) -> dict[str, float]:
    """Fit p_none on the folder and measure it there and on the test images."""
    encoded = folder.encoded
    texts = encoded.texts
    anchors = class_means(texts.descriptions, texts.class_of, texts.num_classes)
    if adapted:
        method, _ = trained(encoded, {}, seed)
        anchors = method.classifier().detach()
    model = fit(encoded.weak, encoded.crops.mean(1), anchors)
    own = p_none(model, encoded.weak, encoded.crops.mean(1))
    test = p_none(model, encoded.test_weak, encoded.test_crops.mean(1))
    stranger = folder.own < 0
    weights = [float(1 - own[folder.own == c].mean()) for c in set(folder.own.tolist()) if c >= 0]
    cosine = global_score(encoded.weak, anchors if anchors.dim() == 3 else anchors[:, None])
    return {
        "AUROC": auroc(own, stranger),
        "test": auroc(test, folder.test < 0),
        "max cos": auroc(-cosine.amax(1), stranger),
        "open": float(model.openness),
        "p, classes": float(own[~stranger].mean()),
        "p, strangers": float(own[stranger].mean()) if stranger.any() else float("nan"),
        "worst class's weight": min(weights),
    }


def average(rows: Sequence[Mapping[str, float]], key: str) -> float:
    there = [row[key] for row in rows if row[key] == row[key]]
    return mean(there) if there else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frozen", type=Path, required=True)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--adapted", action="store_true")
    add_device(parser)
    known = parser.parse_args()
    torch.set_num_threads(1)
    sets = {
        name: Sets(known.frozen, known.frozen, "", known.device).encoded(name, 0)
        for name in SETS
        if (known.frozen / f"{name}-0.safetensors").exists()
    }
    names = [name for name in known.sets.split(",") if name in sets]
    cases = [
        (shape, kind, ratio)
        for shape in known.shapes.split(",")
        for kind, ratio in (("-", 0.0), ("sets", 0.5), ("set", 0.5), ("held out", 0.5))
    ]
    cases += [("even", "sets", ratio) for ratio in (0.1, 0.25, 1.0)]
    columns = ["folder", "strangers", "for each", "AUROC", "test", "max cos", "open", "p, classes", "p, strangers"]
    columns += ["lowest weight of a class", f"AUROC (open where there are none) by set: {', '.join(names)}"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * 11 + "|")
    for shape, kind, ratio in cases:
        by_set: dict[str, list[dict[str, float]]] = {}
        for name, seed in product(names, range(known.seeds)):
            folder = make_folder(sets, name, shape, kind, ratio, seed)
            if len(folder.own) >= 10:
                by_set.setdefault(name, []).append(measured(folder, adapted=known.adapted, seed=seed))
        per = [{key: average(rows, key) for key in rows[0]} for rows in by_set.values()]
        lowest = min(row["worst class's weight"] for rows in by_set.values() for row in rows)
        cells = [f"{average(per, key):.2f}" for key in ("AUROC", "test", "max cos", "open")]
        cells += [f"{average(per, 'p, classes'):.3f}", f"{average(per, 'p, strangers'):.2f}", f"{lowest:.2f}"]
        each = [f"{row['AUROC' if ratio else 'open']:.2f}" for row in per]
        print(f"| {shape} | {kind} | {ratio} | {' | '.join(cells)} | {' '.join(each)} |", flush=True)


if __name__ == "__main__":
    main()
