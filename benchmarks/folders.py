"""Folders as people have them: uneven classes, absent classes, strangers, copies; adapted in full, and measured.

    python benchmarks/folders.py --out runs/folders [--sets eurosat,dtd10] [--variants even,half] [--seeds 0,1]

Each variant is drawn from the images of a set with its seed: links to the photos, class folders left out. Own images
are measured without strangers, each copy counted; the test images are those of the set, all classes evenly. A run is a
line of OUT/results.jsonl and is not done again; the table of all lines is printed at the end. ``--frozen`` leaves the
encoder as it is. The folder of sets comes from FINEALIGN_SHARED, else ../shared.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from on_device import add_device
from real_data import require_shared

from finealign.backbone.base import Backbone
from finealign.classifier import FineAlign
from finealign.config import read_config
from finealign.evaluate.metrics import balanced_mean
from finealign.images.listing import list_images
from finealign.model.inference import readable
from finealign.run.verdict import judge_model, why_unjudged
from finealign.texts.prompts import read_classes, read_descriptions
from finealign.types import Prediction, SetAside

SETS = ("eurosat", "dtd10", "pets37-small", "cifar100", "flowers12", "food10", "ucmerced")
VARIANTS = ("even", "tail", "half", "dominated", "three", "one", "strangers", "copies")
FEWEST = 40  # images of a variant; smaller ones are left out
RATIO = 20  # of the largest class to the smallest in "tail", and to all others in "dominated"
STRANGERS = 0.5  # as many as this share of the images of the classes
COPIES = 5  # of every tenth image
NONE = -1  # the label of a stranger

Ints = NDArray[np.int64]


def chosen_per_class(sizes: Sequence[int], variant: str, rng: np.random.Generator) -> list[int]:
    """How many images of each class a variant has, from how many there are."""
    order = rng.permutation(len(sizes)).tolist()
    most, count = max(sizes), len(sizes)
    if variant == "tail":
        wanted = {c: most * RATIO ** (-rank / (count - 1)) for rank, c in enumerate(order)}
    elif variant == "dominated":
        wanted = {c: most if rank == 0 else most / RATIO for rank, c in enumerate(order)}
    else:
        present = {"half": (count + 1) // 2, "three": 3, "one": 1}.get(variant, count)
        wanted = {c: float(most) for c in order[:present]}
    return [min(size, max(1, round(wanted[c]))) if c in wanted else 0 for c, size in enumerate(sizes)]


def drawn(data: Path, name: str, variant: str, seed: int, folder: Path) -> dict[Path, int]:
    """Link the photos of a variant into ``folder``, without class folders; their classes, ``NONE`` of strangers."""
    rng = np.random.default_rng((seed, VARIANTS.index(variant)))
    classes = read_classes(data / name / "classes.txt")
    photos = [list_images(data / name / "train" / label) for label in classes]
    found: dict[Path, int] = {}

    def link(photo: Path, label: int) -> None:
        place = folder / f"{len(found):05d}{photo.suffix}"
        place.symlink_to(photo.resolve())
        found[place] = label

    for label, count in enumerate(chosen_per_class([len(of_class) for of_class in photos], variant, rng)):
        for place in sorted(rng.permutation(len(photos[label]))[:count]):
            link(photos[label][place], label)
    if variant == "copies":
        for photo, label in list(found.items())[::10]:
            for _ in range(COPIES):
                link(photo, label)
    if variant == "strangers":
        others = [photo for other in SETS if other != name for photo in list_images(data / other / "train")]
        for place in sorted(rng.permutation(len(others))[: round(STRANGERS * len(found))]):
            link(others[place], NONE)
    return found


def measured(told: Iterator[Prediction | SetAside], images: Mapping[Path, int]) -> dict[str, Any]:
    """Top-1 and balanced accuracy of the adapted model and of the start in percent, on the images of the classes."""
    predictions = list(readable(told, []))
    truth = np.array([images[Path(prediction.path)] for prediction in predictions])
    belongs = truth != NONE
    found: dict[str, Any] = {"images": int(belongs.sum())}
    for name in ("adapted", "start"):
        kept = [p.probabilities if name == "adapted" else p.start_probabilities for p in predictions]
        probabilities = np.stack([row for row in kept if row is not None])[belongs]
        right = probabilities.argmax(1) == truth[belongs]
        found[name] = 100 * float(right.mean())
        found[f"{name}_balanced"] = 100 * balanced_mean(right, truth[belongs]).mean
        found[f"{name}_confidence"], found[f"{name}_right"] = probabilities.max(1).tolist(), right.tolist()
    none = np.array([prediction.none if prediction.none is not None else 0.0 for prediction in predictions])
    if not belongs.all():
        found["auroc"] = auroc(none, ~belongs)
    found["none"] = float(none[belongs].mean())
    return found


def auroc(scores: NDArray[np.floating[Any]], positive: NDArray[np.bool_]) -> float:
    """The chance that a positive scores above a negative; ties count half."""
    above = (scores[positive][:, None] > scores[~positive]).mean() + 0.0
    return float(above + (scores[positive][:, None] == scores[~positive]).mean() / 2)


def ece(run: Mapping[str, Any], name: str, bins: int = 15) -> float:
    """The expected calibration error of a run on what was measured."""
    confidence, right = np.array(run[f"{name}_confidence"]), np.array(run[f"{name}_right"])
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(
        sum(abs(confidence[place == b].mean() - right[place == b].mean()) * (place == b).mean() for b in set(place))
    )


def run(
    data: Path, name: str, variant: str, seed: int, known: argparse.Namespace, loaded: dict[str, Backbone]
) -> dict[str, Any] | None:
    """Adapt to a variant and measure; None if it has too few images."""
    began = time.perf_counter()
    with TemporaryDirectory() as scratch, TemporaryDirectory() as kept:
        images = drawn(data, name, variant, seed, Path(scratch))
        if len(images) < FEWEST:
            return None
        classes = read_classes(data / name / "classes.txt")
        settings = list(known.settings or [])
        if known.frozen:
            settings.append("training.encoder=frozen")
        config = read_config(
            None, settings, backbone=known.backbone, device=known.device, seed=seed, method__name=known.method
        )
        if known.truth:
            counts = np.bincount([label for label in images.values() if label != NONE], minlength=len(classes))
            given = {label: float(count) for label, count in zip(classes, counts, strict=True)}
            config = config.model_copy(update={"method": config.method.model_copy(update={"class_prior": given})})
        model = FineAlign(classes, descriptions=read_descriptions(data / name / "descriptions.json"), config=config)
        if known.backbone not in loaded:
            loaded[known.backbone] = model.load_backbone(config)
        model.fit(model.prepare(list(images), backbone=loaded[known.backbone]), checkpoints=Path(kept))
        verdict = None if why_unjudged(model) else judge_model(model, list(images))
        own = measured(model.predictions_of_adapted(), images)
        most = -(-known.test_images // len(classes))
        tested = {
            photo: label for label, c in enumerate(classes) for photo in list_images(data / name / "test" / c)[:most]
        }
        return {
            "images": len(images),
            "own": own,
            "test": measured(model.iter_predictions(list(tested), with_start=True), tested),
            "verdict": {"call": verdict.call, "evidence": verdict.evidence} if verdict else None,
            "calibration": [model.calibration_.accuracy, model.calibration_.start_accuracy]
            if model.calibration_
            else None,
            "seconds": time.perf_counter() - began,
        }


def main() -> None:
    shared = require_shared()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--method", default="fair")
    parser.add_argument("--backbone", default=f"local-dir:{shared / 'models' / 'miniclip'}")
    parser.add_argument("--frozen", action="store_true", help="the encoder does not learn")
    parser.add_argument("--truth", action="store_true", help="give the true shares as the class prior")
    parser.add_argument("--test-images", type=int, default=10_000, help="at most so many, evenly over the classes")
    parser.add_argument("--set", dest="settings", action="append", help="section.key=value")
    add_device(parser)
    known = parser.parse_args()
    known.out.mkdir(parents=True, exist_ok=True)
    log = known.out / "results.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    how = [known.method, Path(known.backbone).name, known.frozen, known.truth, known.settings or []]
    done = {(row["set"], row["variant"], row["seed"]) for row in rows if row["how"] == how}
    loaded: dict[str, Backbone] = {}
    for seed in map(int, known.seeds.split(",")):
        for variant in known.variants.split(","):
            for name in known.sets.split(","):
                if (name, variant, seed) in done:
                    continue
                found = run(shared / "data", name, variant, seed, known, loaded)
                if found is None:
                    print(f"{name} {variant} {seed}: fewer than {FEWEST} images, left out", file=sys.stderr)
                    continue
                rows.append({"set": name, "variant": variant, "seed": seed, "how": how, **found})
                with log.open("a", encoding="utf-8") as opened:
                    opened.write(json.dumps(rows[-1]) + "\n")
                print(line(rows[-1]), file=sys.stderr, flush=True)
    print(table([row for row in rows if row["how"] == how]))


def line(row: Mapping[str, Any]) -> str:
    """One run in a line."""
    own, test = row["own"], row["test"]
    return (
        f"{row['set']} {row['variant']} {row['seed']}: own {own['start']:.1f} -> {own['adapted']:.1f}, test "
        f"{test['start']:.1f} -> {test['adapted']:.1f}, {(row['verdict'] or {}).get('call')}, {row['seconds']:.0f} s"
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a variant, means over sets and seeds, as Markdown."""
    lines = [
        "| variant | runs | own, start | own, gain | worst | own, balanced gain | test, gain | ECE test, start "
        "| adapted | AUROC | helped / unclear / hurt |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        there = [row for row in rows if row["variant"] == variant]
        if not there:
            continue
        gains = [row["own"]["adapted"] - row["own"]["start"] for row in there]
        worst = min(range(len(there)), key=gains.__getitem__)
        balanced = mean(row["own"]["adapted_balanced"] - row["own"]["start_balanced"] for row in there)
        tested = mean(row["test"]["adapted"] - row["test"]["start"] for row in there)
        errors = [mean(ece(row["test"], name) for row in there) for name in ("start", "adapted")]
        told = [row["own"]["auroc"] for row in there if "auroc" in row["own"]]
        calls = [
            sum((row["verdict"] or {}).get("call") == call for row in there) for call in ("helped", "unclear", "hurt")
        ]
        lines.append(
            f"| {variant} | {len(there)} | {mean(row['own']['start'] for row in there):.1f} | {mean(gains):+.1f} "
            f"| {gains[worst]:+.1f} ({there[worst]['set']}) | {balanced:+.1f} | {tested:+.1f} | {errors[0]:.3f} "
            f"| {errors[1]:.3f} | {f'{mean(told):.3f}' if told else '-'} | {' / '.join(map(str, calls))} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
