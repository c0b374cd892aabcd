"""How often the intervals of a review hold the truth, and how narrow they are: simulated reviews of known images.

    python benchmarks/review_intervals.py --out runs/frozen [--reviews 1000] [--budgets 20,60,150] [--variants even]

The worlds and folders are those of ``frozen.py``, adapted to with a frozen encoder and calibrated as a run is; their
predictions are kept in OUT/coverage. Each setting is a folder, a budget and an aim, and is reviewed so many times by a
person who is always right; strangers are "none of these". Strata are drawn from at random, without the spreading over
predicted classes. Coverage is counted at the planned number
of labels, and of all looks up to it together. Widths are those at the planned number, as shares of the width that the
aim "random", a plain random sample of the same budget, has.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from features import Encoded, trained
from folders import VARIANTS
from frozen import SETS, Frozen
from numpy.typing import NDArray
from on_device import add_device
from real_data import require_shared

from finealign.config import make_config, resolve
from finealign.method.base import Method
from finealign.method.registry import create_method
from finealign.model.calibration import SAMPLE, adapted_witnesses, confirmed, fit_temperature
from finealign.review.intervals import estimate, looks, width_factor
from finealign.review.sampling import AIMS, Aim, draw
from finealign.types import ImageFeatures, Score

FEWEST = 40  # images of a folder
EPSILON = 1e-9

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Known = dict[str, NDArray[Any]]  # by image: adapted, start, confidence, truth


def predictions(encoded: Encoded, seed: int) -> Known:
    """What a run on the images would predict: both models' labels, and the adapted one's calibrated confidence."""
    method, crops = trained(encoded, {}, seed)
    options = make_config({"method": {"name": "cupl"}}).method
    start = create_method(options, encoded.texts, logit_scale=method.logit_scale)
    chosen = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(encoded.weak))[:SAMPLE]))
    seen = ImageFeatures(encoded.weak[chosen], encoded.crops[chosen, :crops])
    everything = ImageFeatures(encoded.weak, encoded.crops[:, :crops])
    config = resolve(
        make_config({"seed": seed}), images=len(encoded.weak), classes=encoded.texts.num_classes, input_size=1
    )
    backbone: Any = None  # nothing of it learns
    witnesses = adapted_witnesses(seen, encoded.texts, config, backbone, like=method, images=len(encoded.weak))
    own = method.own_score()

    def labels(one: Method, score: Score, of: ImageFeatures) -> Ints:
        found: Ints = one.score(of, score).argmax(1).numpy()
        return found

    with torch.no_grad():
        right = confirmed(labels(method, own, seen), [labels(witness, own, seen) for witness in witnesses])
        logits = (method.logit_scale * method.score(everything, own)).double()
        temperature = fit_temperature(logits[chosen].numpy(), right)
        return {
            "adapted": logits.argmax(1).numpy(),
            "start": labels(start, "global", everything),
            "confidence": torch.softmax(logits / temperature, dim=1).amax(1).numpy(),
            "truth": encoded.hidden.numpy(),
        }


def known_folders(frozen: Frozen, variants: Sequence[str]) -> dict[str, Known]:
    """Every folder by its name, with its predictions, which are made when first asked for."""
    kept = frozen.out / "coverage"
    kept.mkdir(exist_ok=True)
    jobs = [("demo", "", "even")] if "even" in variants else []
    jobs += [(backbone, name, variant) for variant in variants for backbone in SETS for name in SETS[backbone]]
    found = {}
    for backbone, name, variant in jobs:
        file = kept / f"{backbone}-{name}-{variant}.npz"
        if not file.exists():
            drawn = frozen.world("demo", 0) if not name else frozen.folder(backbone, name, variant, 0, most=45)
            if len(drawn.weak) < FEWEST:
                continue
            _save(predictions(drawn, 0), file)
        with np.load(file) as opened:
            found[file.stem] = {key: opened[key] for key in ("adapted", "start", "confidence", "truth")}
    return found


def _save(known: Known, file: Path) -> None:
    arrays: dict[str, Any] = dict(known)
    np.savez(file, **arrays)


def review(known: Known, aim: Aim, budget: int, reviews: int) -> dict[str, tuple[float, float, float]]:
    """Coverage at the plan, coverage of all looks up to it, and mean width at the plan, of each figure by its name."""
    images, rng = len(known["truth"]), np.random.default_rng(0)
    right, first = known["adapted"] == known["truth"], known["start"] == known["truth"]
    changed = known["adapted"] != known["start"]
    at = [look for look in looks(budget, images) if look <= budget]
    design = draw(known["confidence"], changed, known["adapted"], aim=aim, budget=budget, seed=0)
    sure, strata = design.expected, len(design.sizes)
    # Labels of each stratum at each look, which no seed changes: (looks, H).
    numbers = np.stack([np.bincount(design.stratum[design.order[:look]], minlength=strata) for look in at])
    found = {}
    for name in ("accuracy", "difference"):
        if (aim, name) in (("difference", "accuracy"), ("accuracy", "difference")):
            continue
        values = (1.0, 0.0) if name == "accuracy" else (1.0, 0.0, -1.0)
        place = np.where(right, 0, 1) if name == "accuracy" else 1 - (right.astype(int) - first)
        truth = float(np.array(values)[place].mean())
        rates = np.stack([sure, 1 - sure], 1) if name == "accuracy" else np.stack([sure, *[(1 - sure) / 2] * 2], 1)
        zero = design.unchanged if name == "difference" and aim != "random" else np.zeros(strata, dtype=bool)
        counts = np.zeros((reviews, len(at), strata, len(values)), dtype=np.int64)
        for stratum in range(strata):
            order = rng.permuted(np.tile(place[design.stratum == stratum], (reviews, 1)), axis=1)
            for value in range(len(values)):
                so_far = np.pad((order == value).cumsum(axis=1), ((0, 0), (1, 0)))
                counts[:, :, stratum, value] = so_far[:, numbers[:, stratum]]
        held, width = np.ones((reviews, len(at)), dtype=bool), 0.0
        for number, look in enumerate(at):
            if (numbers[number][~zero] == 0).any():
                continue  # too early: no figure is shown
            factor = width_factor(look, budget, images)
            _, low, high = estimate(counts[:, number], design.sizes, rates, values=values, factor=factor, zero=zero)
            held[:, number] = (low <= truth + EPSILON) & (truth - EPSILON <= high)
            width = float((high - low).mean())
        found[name] = float(held[:, -1].mean()), float(held.all(axis=1).mean()), width
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reviews", type=int, default=1000)
    parser.add_argument("--budgets", default="20,60,150")
    parser.add_argument("--variants", default="even,tail,half,dominated,strangers", help=f"of {', '.join(VARIANTS)}")
    add_device(parser)
    known = parser.parse_args()
    folders = known_folders(Frozen(require_shared(), known.out, known.device), known.variants.split(","))
    print(
        "| labels | figure | asked for | settings | at the plan: mean | least | below 93 % | all looks: mean | least ",
        end="",
    )
    print("| width to random: mean | largest | width |\n" + "|---" * 12 + "|")
    for budget in map(int, known.budgets.split(",")):
        there = {name: of for name, of in folders.items() if len(of["truth"]) > budget}
        done = {aim: {name: review(of, aim, budget, known.reviews) for name, of in there.items()} for aim in AIMS}
        for figure, aims in (
            ("accuracy", ("random", "accuracy", "both")),
            ("difference", ("random", "difference", "both")),
        ):
            for aim in aims:
                rows = np.array([done[aim][name][figure] for name in there])  # type: ignore[index]
                random = np.array([done["random"][name][figure][2] for name in there])
                ratio = rows[:, 2] / random
                cells = [
                    f"{100 * rows[:, 0].mean():.1f}",
                    f"{100 * rows[:, 0].min():.1f}",
                    str((rows[:, 0] < 0.93).sum()),
                ]
                cells += [f"{100 * rows[:, 1].mean():.1f}", f"{100 * rows[:, 1].min():.1f}"]
                cells += [f"{ratio.mean():.2f}", f"{ratio.max():.2f}", f"{100 * rows[:, 2].mean():.1f}"]
                print(f"| {budget} | {figure} | {aim} | {len(there)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
