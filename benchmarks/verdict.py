"""Fit the weights of ``finealign.verdict`` to many runs, good and bad, and measure how often it is right.

    python benchmarks/verdict.py --out runs/ablation --grids runs/grid

Runs with a frozen encoder on the sets that ``ablation.py`` encoded: methods, settings of the ablation and settings made
to fail, a second each. The weights are fitted on the sets whose labels the defaults were chosen by; every set is judged
by weights fitted without it. The cells of the grids, with the encoder learning, are only judged.
"""

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ablation import AXES, CHOOSING, SETS, Encoded, Sets, Settings, trained
from numpy.typing import NDArray
from real_data import require_shared

from finealign.benchmark.grid import Cell, read_cell
from finealign.config import make_config
from finealign.method.registry import create_method
from finealign.model.calibration import SAMPLE
from finealign.run.verdict import HELPED, HURT, WEIGHTS, gather, judge
from finealign.types import ImageFeatures

CROPS = 8
TIE = 0.5  # points; a smaller change of accuracy has no sign to be right about
CLIP = 8.0  # points; the fit is to changes no larger, so that a ruin counts as much as a clear loss
RIDGE = 1.0


def settings() -> dict[str, Settings]:
    """What is run: the ablation's settings, the peers, and settings made to fail."""
    found: dict[str, Settings] = {"default": {}}
    for axis, values in AXES.items():
        for value, change in list(values.items())[::3]:
            found[f"{axis} {value}"] = change
    for rate, fairness, settle in product((3e-3, 1e-2, 3e-2), ("running", "batch", "off"), (0, 160)):
        training = {"anchor_learning_rate": rate, "anchor_steps": settle}
        found[f"bad: rate {rate}, fairness {fairness}, settling {settle}"] = {
            "training": training,
            "method": {"fairness": fairness},
        }
    for name in ("self-training", "dpa", "lafter"):
        found[name] = {"method": {"name": name}}
        for rate in (3e-3, 3e-2):
            bad = {"method": {"name": name}, "training": {"anchor_learning_rate": rate}}
            found[f"bad: {name}, rate {rate}"] = bad
        off = {"method": {"name": name, "fairness": "off"}, "training": {"anchor_learning_rate": 3e-3}}
        found[f"bad: {name}, fairness off"] = off
    found["bad: lafter, texts over-learned"] = {"method": {"name": "lafter", "text_learning_rate": 1e-2}}
    found["bad: fairness weight 0.1"] = {"method": {"fairness_weight": 0.1}}
    found["bad: logit scale 10"] = {"method": {"logit_scale": 10.0}}
    found["bad: logit scale 400"] = {"method": {"logit_scale": 400.0}}
    return found


def measure(encoded: Encoded, change: Settings, seed: int) -> dict[str, Any]:
    """The evidence from a sample of the images learned from, and the true gain in points on the test images."""
    method, crops = trained(encoded, change, seed)
    start = create_method(
        make_config({"method": {"name": "cupl"}}).method, encoded.texts, logit_scale=method.logit_scale
    )
    chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(encoded.weak))[:SAMPLE])
    seen = ImageFeatures(encoded.weak[chosen], encoded.crops[chosen, :crops])
    test = ImageFeatures(encoded.test_weak, encoded.test_crops[:, :crops])
    with torch.no_grad():
        end = method.score(seen, method.scores[0])
        evidence = gather(
            crops=seen.crops.mean(1).numpy(),
            start=start.score(seen, "global").numpy(),
            end=end.numpy(),
            end_probabilities=method.probabilities(end).numpy(),
            start_anchors=start.classifier().mean(1).numpy(),
            end_anchors=method.classifier().mean(1).numpy(),
            images=len(encoded.weak),
        )
        right = method.score(test, method.scores[0]).argmax(1) == encoded.labels
        before = start.score(test, "global").argmax(1) == encoded.labels
    return {"evidence": evidence, "gain": 100 * float(right.float().mean() - before.float().mean())}


Floats = NDArray[np.float64]


def fit(rows: list[dict[str, Any]]) -> tuple[Floats, float]:
    """Ridge regression of the clipped gain on the standardised evidence, as weights of the plain one, and a constant.

    Every set counts alike, however many runs it has.
    """
    x = np.array([[row["evidence"][name] for name in WEIGHTS] for row in rows])
    y = np.clip([row["gain"] for row in rows], -CLIP, CLIP)
    middle, spread = x.mean(0), x.std(0) + 1e-9
    z = np.c_[(x - middle) / spread, np.ones(len(x))]
    solved = np.linalg.solve(z.T @ z + RIDGE * np.eye(z.shape[1]), z.T @ y)
    weights = solved[:-1] / spread
    return weights, float(solved[-1] - weights @ middle)


def estimates(rows: list[dict[str, Any]], weights: Floats, constant: float) -> Floats:
    found: Floats = np.array([[row["evidence"][name] for name in WEIGHTS] for row in rows]) @ weights + constant
    return found


def report(title: str, gain: Floats, estimate: Floats, helped: float, hurt: float) -> None:
    """How often the sign is right, and what slips through."""
    clear = np.abs(gain) >= TIE
    sign = np.mean(np.sign(estimate[clear] - hurt) == np.sign(gain[clear]))
    called = clear & ((estimate > helped) | (estimate < hurt))
    right = np.mean((estimate[called] > helped) == (gain[called] > 0))
    accepted = estimate > helped
    worst = gain[accepted].min() if accepted.any() else float("nan")
    kept = estimate >= hurt
    print(
        f"{title}: {len(gain)} runs, {np.sum(gain < -1)} lost more than a point. Sign right in {100 * sign:.1f} % of "
        f"the {clear.sum()} that changed; of those called helped or hurt ({called.sum()}), {100 * right:.1f} %. Called "
        f"helped {accepted.sum()}, worst {worst:+.1f}, {np.sum(gain[accepted] < -1)} below -1; unclear "
        f"{np.sum(kept & ~accepted)}, worst {gain[kept].min() if kept.any() else float('nan'):+.1f}."
    )


def cells_of(grid: Path) -> list[Cell]:
    found = [read_cell(path) for path in sorted(grid.glob("cells/*/*.json"))]
    return [cell for cell in found if cell.verdict and set(WEIGHTS) <= set(cell.verdict["evidence"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--grids", nargs="*", type=Path, default=[], help="folders of `finealign benchmark`")
    known = parser.parse_args()
    shared = require_shared()
    sets = Sets(shared, known.out, f"local-dir:{shared / 'models' / 'miniclip'}")
    log = known.out / "verdict.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    done = {(row["set"], row["seed"], row["settings"]) for row in rows}
    for name, seed in product(known.sets.split(","), map(int, known.seeds.split(","))):
        missing = {key: change for key, change in settings().items() if (name, seed, key) not in done}
        encoded = sets.encoded(name, seed) if missing else None
        for key, change in missing.items():
            assert encoded is not None
            rows.append({"set": name, "seed": seed, "settings": key, **measure(encoded, change, seed)})
            with log.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(rows[-1]) + "\n")
    gain = np.array([row["gain"] for row in rows])
    names = np.array([row["set"] for row in rows])
    left_out = np.zeros(len(rows))
    for name in sorted(set(names)):
        others = [row for row in rows if row["set"] != name]
        left_out[names == name] = estimates([row for row in rows if row["set"] == name], *fit(others))
    lost = left_out[gain < -1]
    helped, hurt = float(lost.max()) if len(lost) else 0.0, 0.0  # above the first, no set judged by the others lost
    report("Every set by weights fitted on the others", gain, left_out, helped, hurt)
    for name in sorted(set(names)):
        there = names == name
        report(f"  {name}", gain[there], left_out[there], helped, hurt)
    chosen = [row for row in rows if row["set"] in (*CHOOSING, "demo")]
    weights, constant = fit(chosen)
    off = np.abs(np.clip([row["gain"] for row in chosen], -CLIP, CLIP) - estimates(chosen, weights, constant))
    print("\nFitted on", ", ".join((*CHOOSING, "demo")))
    print("WEIGHTS =", {name: round(float(weight), 3) for name, weight in zip(WEIGHTS, weights, strict=True)})
    print(
        f"CONSTANT = {constant:.3f}; nine in ten within {np.quantile(off, 0.9):.1f} points; helped above {helped:.2f}\n"
    )
    untouched = [row for row in rows if row["set"] not in (*CHOOSING, "demo")]
    if untouched:
        there = np.array([row["gain"] for row in untouched])
        report("The untouched sets by these weights", there, estimates(untouched, weights, constant), helped, hurt)
    for grid in known.grids:
        cells = cells_of(grid)
        verdicts = [judge({"relabelled": 0.0, **cell.verdict["evidence"]}, images=0) for cell in cells if cell.verdict]
        estimate = np.array([verdict.score for verdict in verdicts])
        there = np.array([100 * (cell.top1[cell.score] - cell.top1["start"]) for cell in cells])
        report(f"The cells of {grid} as the package judges them", there, estimate, HELPED, HURT)


if __name__ == "__main__":
    main()
