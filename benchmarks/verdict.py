"""Fit the points of ``finealign.run.verdict`` to many runs, good and bad, and measure how often it is right.

    python benchmarks/verdict.py --out runs/frozen [--draws 0,1] [--settings default,rate] [--kinds even tail]
        [--folders runs/folders]

Runs with a frozen encoder on the folders of ``frozen.py``: every variant, set and backbone, with good and bad settings,
a few seconds each; results go to OUT/verdict.jsonl, a line a run, and are not computed again. A run's gain is that of
top-1 on the images of the classes that it learned from. The points are those of boosted stumps, fitted to all runs;
what is reported of a set is by points and thresholds fitted to the other sets of all backbones, and of a backbone, in
the lines called so, by those of the other backbones. No points are fitted to lists of two and four classes drawn from
each set, nor to ``--folders``, results of ``folders.py`` with the encoder learning: these are judged by the package.
"Helped" is bounded by the lists as well.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from features import Encoded, Settings, trained
from folders import NONE, VARIANTS
from frozen import SETS, Frozen
from numpy.typing import NDArray
from on_device import add_device
from real_data import require_shared
from sklearn.ensemble import GradientBoostingRegressor

from finealign.config import make_config
from finealign.method.registry import create_method
from finealign.model.calibration import SAMPLE
from finealign.run.verdict import CONSTANT, HELPED, HURT, MOST_RELABELLED, POINTS, Steps, gather
from finealign.types import ImageFeatures

FEWEST = 20  # images of a folder
MOST = {0: 45, 1: 20}  # images a class, by draw
FEW = {"dtd": 6}  # of 47 classes
# Kinds of folders by name: a variant, and how many of the set's classes make the list; 0 for all.
KINDS = {variant: (variant, 0) for variant in VARIANTS}
KINDS |= {
    f"{variant}, {classes} classes": (variant, classes) for classes in (2, 4) for variant in ("even", "tail", "half")
}
BACKBONES = {**SETS, "clip-b32": ("dtd",), "demo": ("demo",)}
CLIP = 10.0  # points; the fit is to changes no larger, so that a ruin counts as much as a clear loss
EVIDENCE = (
    *("structure", "margin", "images_a_class", "confidence", "anchors_kept", "unevenness"),
    *("shift", "off_prior", "mixture", "mixtures_agree", "text", "relabelled"),
)
RANGES = 6  # of a piece of evidence
FEWEST_POINTS = 0.3  # between its best and its worst range; pieces that tell less are left out
STUMPS, RATE, LEAST, SHARE = 100, 0.05, 20, 0.6  # and the fewest runs of a side, and the share of runs that each sees
FOUND = 0.8  # share of the runs that lost more than RUIN points that "hurt" has to find
RUIN, BEARABLE = 5.0, 2.0  # points; no run called "helped" may have lost more than the second

SETTINGS: dict[str, Settings] = {
    "default": {},
    "even": {"method": {"class_prior": "even"}},
    "rate": {"training": {"anchor_learning_rate": 1e-2}},
    "off": {"method": {"fairness": "off"}, "training": {"anchor_learning_rate": 3e-3}},
    "dpa": {"method": {"name": "dpa"}},
    "self-training": {"method": {"name": "self-training"}},
}

Floats = NDArray[np.floating[Any]]
Row = dict[str, Any]


def measure(encoded: Encoded, settings: Settings, seed: int) -> Row:
    """The evidence from a sample of the images learned from, and the true gain in points on those of the classes."""
    method, _ = trained(encoded, settings, seed)
    start = create_method(
        make_config({"method": {"name": "cupl"}}).method, encoded.texts, logit_scale=method.logit_scale
    )
    chosen = torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(len(encoded.weak))[:SAMPLE]))
    seen = ImageFeatures(encoded.weak[chosen], encoded.crops[chosen])
    score = method.scores[0]
    evidence = gather(seen, seen, first=start, method=method, score=score, images=len(encoded.weak))
    everyone, belongs = ImageFeatures(encoded.weak, encoded.crops), encoded.hidden != NONE
    with torch.no_grad():
        right = (method.score(everyone, score).argmax(1) == encoded.hidden)[belongs]
        before = (start.score(everyone, "global").argmax(1) == encoded.hidden)[belongs]
    return {"evidence": evidence, "gain": 100 * float(right.float().mean() - before.float().mean())}


def fit(rows: Sequence[Row]) -> tuple[dict[str, Steps], float]:
    """Boosted stumps on the clipped gain: points by ranges of each piece of evidence, and a constant.

    A piece has at most RANGES ranges with as many runs in each. Stumps add up, so the points of each piece can be read
    off; and a piece that tells nothing gets none.
    """
    gain = np.clip([row["gain"] for row in rows], -CLIP, CLIP)
    found = np.array([[row["evidence"][name] for name in EVIDENCE] for row in rows])
    edges = [np.unique(np.quantile(column, np.linspace(0, 1, RANGES + 1)[1:-1]).round(4)) for column in found.T]
    ranges = np.stack([np.searchsorted(edge, column) for edge, column in zip(edges, found.T, strict=True)], axis=1)
    model = GradientBoostingRegressor(
        n_estimators=STUMPS, learning_rate=RATE, max_depth=1, min_samples_leaf=LEAST, subsample=SHARE, random_state=0
    ).fit(ranges, gain)
    points = [np.zeros(len(edge) + 1) for edge in edges]
    constant = float(np.mean(gain))
    for stump in (one.tree_ for one in model.estimators_[:, 0]):
        if stump.node_count == 1:
            constant += RATE * float(stump.value[0, 0, 0])
            continue
        of = points[stump.feature[0]]
        low = np.arange(len(of)) <= stump.threshold[0]
        of += RATE * np.where(low, *stump.value[[stump.children_left[0], stump.children_right[0]], 0, 0])
    for column, of in zip(ranges.T, points, strict=True):  # each piece is 0 in the mean of the runs
        constant += float(of[column].mean())
        of -= of[column].mean()
    made = {
        name: merged(edge.tolist(), of.round(2).tolist())
        for name, edge, of in zip(EVIDENCE, edges, points, strict=True)
        if np.ptp(of) >= FEWEST_POINTS
    }
    return made, round(constant, 2)  # as it is printed: the thresholds are scores of runs


def merged(edges: Sequence[float], points: Sequence[float]) -> Steps:
    """Steps without the edges at which nothing changes."""
    kept = [place for place in range(len(edges)) if points[place] != points[place + 1]]
    return Steps(tuple(edges[place] for place in kept), (*(points[place] for place in kept), points[-1]))


def estimates(rows: Sequence[Row], points: Mapping[str, Steps], constant: float) -> Floats:
    found: Floats = np.array(
        [constant + sum(steps(row["evidence"][name]) for name, steps in points.items()) for row in rows]
    )
    return found


def thresholds(gain: Floats, estimate: Floats, relabelled: Floats) -> tuple[float, float]:
    """Above the first no run lost more than BEARABLE points; below the second are FOUND of those that lost RUIN.

    The second is at most 0. Runs with more than MOST_RELABELLED of their labels new are never called "helped".
    """
    lost, ruined = estimate[(gain < -BEARABLE) & (relabelled <= MOST_RELABELLED)], np.sort(estimate[gain < -RUIN])
    helped = float(lost.max()) if len(lost) else 0.0
    hurt = float(ruined[int(np.ceil(FOUND * len(ruined))) - 1]) if len(ruined) else 0.0
    return max(helped, 0.0), min(hurt, 0.0)


def left_out(rows: Sequence[Row], by: str) -> tuple[Floats, list[str]]:
    """The estimate and the call of every run, by points and thresholds of the runs with other values of ``by``."""
    names = np.array([row[by] for row in rows])
    gains, changed = np.array([row["gain"] for row in rows]), relabelled(rows)
    estimate, calls = np.zeros(len(rows)), [""] * len(rows)
    for name in sorted(set(names)):
        others = [row for row in rows if row[by] != name]
        points, constant = fit(others)
        helped, hurt = thresholds(gains[names != name], estimates(others, points, constant), changed[names != name])
        for place in np.flatnonzero(names == name).tolist():
            estimate[place] = estimates([rows[place]], points, constant)[0]
            calls[place] = called(float(estimate[place]), helped, hurt, float(changed[place]))
    return estimate, calls


def part(
    rows: Sequence[Row], gain: Floats, estimate: Floats, calls: Sequence[str], group: str, value: str
) -> tuple[Floats, Floats, list[str]]:
    """Gains, estimates and calls of the runs that have this value."""
    there = np.array([row[group] == value for row in rows])
    return gain[there], estimate[there], [call for call, at in zip(calls, there, strict=True) if at]


def relabelled(rows: Sequence[Row]) -> Floats:
    found: Floats = np.array([row["evidence"]["relabelled"] for row in rows])
    return found


def called(estimate: float, helped: float, hurt: float, changed: float) -> str:
    """The call of ``run.verdict.judge`` by other thresholds; ``changed`` is the share of labels that are new."""
    if estimate > helped and changed <= MOST_RELABELLED:
        return "helped"
    return "hurt" if estimate < hurt else "unclear"


def report(title: str, gain: Floats, estimate: Floats, calls: Sequence[str]) -> str:
    """A line of the table: how often each call was made and what it missed."""
    call = np.array(calls)
    helped, hurt, ruined = call == "helped", call == "hurt", gain < -RUIN
    sure = np.abs(gain) >= 0.5
    sign = 100 * float(np.mean((estimate[sure] > 0) == (gain[sure] > 0))) if sure.any() else float("nan")
    worst = f"{gain[helped].min():+.1f}" if helped.any() else "-"
    found = f"{100 * hurt[ruined].mean():.0f} % of {ruined.sum()}" if ruined.any() else "-"
    better = f"{gain[hurt].max():+.1f}" if hurt.any() else "-"
    return (
        f"| {title} | {len(gain)} | {sign:.0f} % | {helped.sum()} | {worst} | {(gain[helped] < -1).sum()} "
        f"| {hurt.sum()} | {found} | {better} | {(call == 'unclear').sum()} |"
    )


def package(title: str, rows: Sequence[Row]) -> str:
    """A line of the table on runs that no points were fitted to, by those of the package."""
    gain, estimate = np.array([row["gain"] for row in rows]), estimates(rows, POINTS, CONSTANT)
    calls = [called(float(one), HELPED, HURT, float(new)) for one, new in zip(estimate, relabelled(rows), strict=True)]
    return report(f"{title}, as the package judges", gain, estimate, calls)


HEADER = (
    "| runs | number | favours the better | helped | worst of them | lost more than 1 | hurt | of those that lost "
    "more than 5 | best of them | unclear |\n|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--draws", default="0,1")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), help="of folders to run")
    parser.add_argument("--folders", nargs="*", type=Path, default=[], help="results of folders.py")
    add_device(parser)
    known = parser.parse_args()
    frozen = Frozen(require_shared(), known.out, known.device)
    log = known.out / "verdict.jsonl"
    rows: list[Row] = (
        [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    )
    key = ("backbone", "set", "variant", "draw", "settings")
    done = {tuple(row[name] for name in key) for row in rows}
    worlds = [(backbone, name) for backbone, names in BACKBONES.items() for name in names]
    draws, settings = map(int, known.draws.split(",")), known.settings.split(",")
    for draw, setting, kind, (backbone, name) in product(draws, settings, known.kinds, worlds):
        this = (backbone, name, kind, draw, setting)
        if this in done or (backbone, kind) == ("demo", "strangers"):  # a world has no images but its own
            continue
        variant, classes = KINDS[kind]
        most = MOST[draw] if classes else FEW.get(name, MOST[draw])
        encoded = frozen.folder(backbone, name, variant, draw, most=most, classes=classes)
        if len(encoded.weak) < FEWEST:
            continue
        rows.append({**dict(zip(key, this, strict=True)), **measure(encoded, SETTINGS[setting], draw)})
        with log.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(rows[-1]) + "\n")
    short = [row for row in rows if KINDS[row["variant"]][1]]
    rows = [row for row in rows if not KINDS[row["variant"]][1]]
    gain = np.array([row["gain"] for row in rows])
    print(HEADER)
    alone, of_backbone = left_out(rows, "backbone")
    print(report("all, each backbone by the others", gain, alone, of_backbone))
    for value in sorted({row["backbone"] for row in rows}):
        print(report(f"{value}, by the others", *part(rows, gain, alone, of_backbone, "backbone", value)))
    estimate, calls = left_out(rows, "set")
    print(report("all, each set by the others", gain, estimate, calls))
    for group in ("backbone", "variant", "settings", "set"):
        for value in sorted({row[group] for row in rows}):
            print(report(value, *part(rows, gain, estimate, calls, group, value)))
    points, constant = fit(rows)
    own = estimates(rows, points, constant)
    # Where no set was seen by its own points, so that the thresholds hold for sets that are not here; and for all here.
    changed = relabelled(rows)
    helped, hurt = thresholds(gain, estimate, changed)
    helped = max(helped, thresholds(gain, own, changed)[0])
    if short:
        lost = np.array([row["gain"] for row in short])
        helped = max(helped, thresholds(lost, estimates(short, points, constant), relabelled(short))[0])
    helped = round(helped, 2) + 0.005  # between two scores, which have two decimals
    own_calls = [called(float(one), helped, hurt, float(new)) for one, new in zip(own, changed, strict=True)]
    print(report("all, by the points below", gain, own, own_calls))
    print("\nPOINTS = {")
    for name, steps in points.items():
        print(f'    "{name}": {steps},')
    print(f"}}\nCONSTANT = {constant:.2f}\nHELPED, HURT = {helped:.3f}, {hurt:.2f}\n")
    if short:
        print(package("lists of few classes", short))
    for path in known.folders:
        lines = (path / "results.jsonl").read_text(encoding="utf-8").splitlines()
        judged = [
            {"evidence": row["verdict"]["evidence"], "gain": row["own"]["adapted"] - row["own"]["start"]}
            for row in map(json.loads, lines)
            if row["verdict"]
        ]
        print(package(path.name, judged))


if __name__ == "__main__":
    main()
