"""How far confidences lie from the accuracy, before and after calibration: expected calibration error by world.

    python benchmarks/confidence.py --out runs/frozen [--worlds miniclip/eurosat,demo] [--folders even,half] [--draws 1]

The encoder is frozen; worlds and folders are those of frozen.py. The error of an even folder is that of the test
images, that of an uneven one is of the images that were learned from, for the shares of the classes are only theirs;
strangers are never right. With few images it is above zero by chance alone, so a column tells what the temperature that
true labels ask for would leave.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from features import Encoded, trained
from folders import FEWEST, NONE, VARIANTS
from frozen import USUAL, WORLDS, Frozen
from numpy.typing import NDArray
from on_device import add_device
from real_data import require_shared
from torch import Tensor

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
    sampled,
    temperature_for,
)
from finealign.types import ImageFeatures, Score

Row = list[float]
COLUMNS = ("accuracy", "estimate", "raw", "calibrated", "at best")


def measure(encoded: Encoded, seed: int, *, on_test: bool, most: int) -> Row:
    """Accuracy, its estimate, and the errors raw, calibrated and at best: of the model, then of the start."""
    method, crops = trained(encoded, {}, seed)
    start = create_method(
        make_config({"method": {"name": "cupl"}}).method, encoded.texts, logit_scale=method.logit_scale
    )
    chosen = torch.tensor(sampled(len(encoded.weak), seed=seed, most=most))
    seen = ImageFeatures(encoded.weak[chosen], encoded.crops[chosen, :crops])
    own = ImageFeatures(encoded.weak, encoded.crops[:, :crops])
    judged = ImageFeatures(encoded.test_weak, encoded.test_crops[:, :crops]) if on_test else own
    truth = (encoded.labels if on_test else encoded.hidden).numpy()
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
    score = method.own_score()

    def labels(one: Method, kind: Score) -> NDArray[np.int64]:
        found: NDArray[np.int64] = one.score(seen, kind).argmax(1).numpy()
        return found

    with torch.no_grad():
        right = confirmed(labels(method, score), [labels(witness, score) for witness in witnesses])
        right_at_start = confirmed(labels(start, "global"), [labels(method, score)])
        scale = method.logit_scale
        return [
            *errors(scale * method.score(seen, score), scale * method.score(judged, score), right, truth),
            *errors(scale * start.score(seen, "global"), scale * start.score(judged, "global"), right_at_start, truth),
        ]


def errors(seen: Tensor, judged: Tensor, right: NDArray[np.floating], truth: NDArray[np.int64]) -> Row:
    """Accuracy, its estimate, and three errors: raw, calibrated by the confirmed labels, calibrated by the truth.

    seen (n, C) logits of the images that ``right`` (n,) is of, judged (m, C) those of the images of ``truth`` (m,).
    """
    accuracy = float(np.mean(judged.argmax(1).numpy() == truth))

    def error(temperature: float) -> float:
        probabilities = torch.softmax(judged.double() / temperature, dim=1).numpy()
        named = np.where(truth == NONE, (probabilities.argmax(1) + 1) % probabilities.shape[1], truth)  # never right
        return expected_calibration_error(probabilities, named)

    best = temperature_for(judged.double().numpy(), accuracy)
    mine = fit_temperature(seen.double().numpy(), right)
    return [accuracy, estimate_accuracy(right), error(1.0), error(mine), error(best)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worlds", default=",".join(WORLDS["miniclip"] + WORLDS["clip-b16"] + WORLDS["demo"]))
    parser.add_argument("--folders", default=",".join(VARIANTS))
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--images", type=int, default=SAMPLE, help="calibrate by at most so many images")
    add_device(parser)
    known = parser.parse_args()
    frozen = Frozen(require_shared(), known.out, known.device)
    print(f"| folder | world | images | {' | '.join(COLUMNS)} | start: {' | '.join(COLUMNS)} |")
    print("|---" * 13 + "|")
    for folder in known.folders.split(","):
        rows: dict[str, list[Row]] = {}
        for world, draw in product(known.worlds.split(","), range(known.draws)):
            backbone, _, name = world.partition("/")
            encoded = frozen.folder(backbone, name or world, folder, draw, most=USUAL)
            if len(encoded.weak) < FEWEST:
                continue
            row = measure(encoded, draw, on_test=folder == "even", most=known.images)
            rows.setdefault(backbone, []).append(row)
            print(f"| {folder} | {world} | {len(encoded.weak)} | {_cells(row)} |", flush=True)
        for backbone, found in rows.items():
            print(f"| **{folder}** | {backbone}, mean | | {_cells([mean(of) for of in zip(*found, strict=True)])} |")


def _cells(row: Sequence[float]) -> str:
    return " | ".join(f"{value:.3f}" for value in row)


if __name__ == "__main__":
    main()
