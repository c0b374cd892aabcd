"""How far confidences lie from the accuracy, before and after calibration: expected calibration error by set.

    python benchmarks/confidence.py --out runs/ablation [--sets eurosat,dtd10] [--folders even,half]
    python benchmarks/confidence.py --out runs/b16 --features FEATURES --backbone local-dir:FOLDER

The encoder is frozen and a set's images are encoded once, as in features.py; with ``--features`` they are read from
FEATURES/SET.safetensors, where they were encoded by that backbone before. Each folder is the set or an uneven part of
it, and the error is that of its images, those learned from and those of the test split; with few images it is above
zero by chance alone, so the last columns tell what the temperature that true labels ask for would leave.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from features import Encoded, Sets, trained
from frozen import SETS
from numpy.typing import NDArray
from real_data import require_shared
from safetensors.torch import load_file
from torch import Tensor

from finealign.classifier import FineAlign
from finealign.config import make_config, resolve
from finealign.evaluate.metrics import expected_calibration_error
from finealign.method.base import Method
from finealign.method.registry import create_method
from finealign.model.calibration import (
    SAMPLE,
    adapted_witnesses,
    confirmed,
    estimate_accuracy,
    fit_temperature,
    temperature_for,
)
from finealign.texts.prompts import make_texts, read_classes, read_descriptions
from finealign.types import ImageFeatures, Score, TextFeatures

Shares = NDArray[np.float64]
Row = list[float]


def shares(folder: str, classes: int, rng: np.random.Generator) -> Shares:
    """The share of each class's images that a folder keeps: (C,) in [0, 1]."""
    order = rng.permutation(classes)
    kept = np.ones(classes)
    if folder == "long tail":
        kept[order] = 20.0 ** (-np.arange(classes) / (classes - 1))
    elif folder == "dominated":
        kept[order[1:]] = 1 / 20
    elif folder in ("half", "three", "one"):
        kept[order[{"half": max(2, classes // 2), "three": 3, "one": 1}[folder] :]] = 0
    return kept


FOLDERS = ("even", "long tail", "half", "three", "one", "dominated", "strangers")


def part(encoded: Encoded, folder: str, seed: int) -> Encoded:
    """The images of a folder. In ``strangers`` a third of the classes is not named: their label is -1."""
    rng = np.random.default_rng(seed)
    classes = encoded.texts.num_classes
    kept = shares(folder, classes, rng)

    def chosen(labels: Tensor) -> Tensor:
        found = []
        for label in range(classes):
            there = rng.permutation(np.flatnonzero(labels.numpy() == label))
            found.append(there[: max(round(kept[label] * len(there)), int(kept[label] > 0))])
        return torch.from_numpy(np.sort(np.concatenate(found)))

    learned, test = chosen(encoded.hidden), chosen(encoded.labels)
    found = replace(
        encoded,
        weak=encoded.weak[learned],
        crops=encoded.crops[learned],
        strong=encoded.strong[:, learned],
        hidden=encoded.hidden[learned],
        test_weak=encoded.test_weak[test],
        test_crops=encoded.test_crops[test],
        labels=encoded.labels[test],
    )
    if folder != "strangers":
        return found
    named = np.sort(rng.permutation(classes)[: max(2, round(2 * classes / 3))])
    new = torch.full((classes,), -1)
    new[torch.from_numpy(named)] = torch.arange(len(named))
    of = new[encoded.texts.class_of]
    texts = TextFeatures(encoded.texts.names[torch.from_numpy(named)], encoded.texts.descriptions[of >= 0], of[of >= 0])
    return replace(found, texts=texts, hidden=new[found.hidden], labels=new[found.labels])


def from_features(folder: Path, data: Path, backbone: str) -> Callable[[str], Encoded]:
    """A reader of sets that this backbone has encoded."""
    loaded = FineAlign(["a", "b"]).load_backbone(make_config({"backbone": backbone}))

    def encoded(name: str) -> Encoded:
        found = {
            key: value.float() if value.is_floating_point() else value.long()
            for key, value in load_file(folder / f"{name}.safetensors").items()
        }
        texts = make_texts(
            read_classes(data / name / "classes.txt"), read_descriptions(data / name / "descriptions.json")
        )
        strong = found.pop("strong")
        return Encoded(
            **found,
            strong=torch.cat([strong, strong])[:4],
            texts=loaded.encode_texts(texts),
            logit_scale=loaded.logit_scale,
        )

    return encoded


def measure(encoded: Encoded, seed: int) -> Row:
    """Accuracy, its estimate, and the errors raw, calibrated and at best: of the model, then of the start."""
    method, crops = trained(encoded, {}, seed)
    start = create_method(
        make_config({"method": {"name": "cupl"}}).method, encoded.texts, logit_scale=method.logit_scale
    )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(encoded.weak))[:SAMPLE])
    seen = ImageFeatures(encoded.weak[chosen], encoded.crops[chosen, :crops])
    everything = ImageFeatures(
        torch.cat([encoded.weak, encoded.test_weak]), torch.cat([encoded.crops, encoded.test_crops])[:, :crops]
    )
    truth = torch.cat([encoded.hidden, encoded.labels]).numpy()
    config = resolve(
        make_config({"seed": seed}), images=len(encoded.weak), classes=encoded.texts.num_classes, input_size=1
    )
    backbone: object = None  # nothing of it learns
    witnesses = adapted_witnesses(
        seen,
        encoded.texts,
        config,
        backbone,  # type: ignore[arg-type]
        like=method,
        images=len(encoded.weak),
    )

    own = method.own_score()

    def labels(one: Method, score: Score) -> NDArray[np.int64]:
        found: NDArray[np.int64] = one.score(seen, score).argmax(1).numpy()
        return found

    with torch.no_grad():
        right = confirmed(labels(method, own), [labels(witness, own) for witness in witnesses])
        right_at_start = confirmed(labels(start, "global"), [labels(method, own)])
        scale = method.logit_scale
        return [
            *errors(scale * method.score(seen, own), scale * method.score(everything, own), right, truth),
            *errors(
                scale * start.score(seen, "global"), scale * start.score(everything, "global"), right_at_start, truth
            ),
        ]


def errors(seen: Tensor, everything: Tensor, right: NDArray[np.floating[Any]], truth: NDArray[np.int64]) -> Row:
    """Accuracy, its estimate, and three errors: raw, calibrated by the confirmed labels, calibrated by the truth.

    seen (n, C) logits of the images that ``right`` (n,) is of, everything (m, C) those of all images, truth (m,).
    """
    accuracy = float(np.mean(everything.argmax(1).numpy() == truth))

    def error(temperature: float) -> float:
        probabilities = torch.softmax(everything.double() / temperature, dim=1).numpy()
        named = np.where(truth < 0, (probabilities.argmax(1) + 1) % probabilities.shape[1], truth)  # never right
        return expected_calibration_error(probabilities, named)

    best = temperature_for(everything.double().numpy(), accuracy)
    mine = fit_temperature(seen.double().numpy(), right)
    return [accuracy, estimate_accuracy(right), error(1.0), error(mine), error(best)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", default=",".join((*SETS["miniclip"], "demo")))
    parser.add_argument("--folders", default=",".join(FOLDERS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--features", type=Path)
    parser.add_argument("--backbone", default="")
    known = parser.parse_args()
    shared = require_shared()
    backbone = known.backbone or f"local-dir:{shared / 'models' / 'miniclip'}"
    sets = Sets(shared, known.out, backbone)
    read = from_features(known.features, shared / "data", backbone) if known.features else None
    columns = ["accuracy", "estimate", "raw", "calibrated", "at best"]
    print(f"| folder | set | images | {' | '.join(columns)} | start: {' | '.join(columns)} |")
    print("|---" * 13 + "|")
    for folder in known.folders.split(","):
        rows: list[Row] = []
        for name, seed in product(known.sets.split(","), map(int, known.seeds.split(","))):
            there = part(read(name) if read else sets.encoded(name, seed), folder, seed)
            rows.append(measure(there, seed))
            print(f"| {folder} | {name} | {len(there.weak)} | {_cells(rows[-1])} |", flush=True)
        print(f"| **{folder}** | mean | | {_cells([mean(column) for column in zip(*rows, strict=True)])} |", flush=True)


def _cells(row: Row) -> str:
    return " | ".join(f"{value:.3f}" for value in row)


if __name__ == "__main__":
    main()
