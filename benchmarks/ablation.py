"""One setting at a time, on features encoded once: what it does to top-1 on every set.

    python benchmarks/ablation.py --out runs/ablation --seeds 0,1 [--axes weight,fairness] [--sets eurosat,demo]

The encoder is frozen, so a run takes a second once a set is encoded; what matters here is confirmed with the encoder
learning (docs/ABLATION.md). Results go to OUT/results.jsonl, a line a run; a run that is there is not run again. The
folder of sets comes from FINEALIGN_SHARED, else ../shared; `demo` is the drawn world.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from probe import linear_probe
from real_data import require_shared
from safetensors.torch import load_file, save_file
from torch import Tensor

from finealign.backbone.base import Backbone
from finealign.classifier import FineAlign
from finealign.config import make_config, merged, resolve
from finealign.demo.model import demo_model
from finealign.demo.world import make_world
from finealign.evaluate.truth import read_truth
from finealign.images.decoding import read_pixels
from finealign.images.listing import list_images
from finealign.images.views import PREDICTION_EPOCH, Views
from finealign.method.base import Method, SelfTrainingMethod
from finealign.method.registry import create_method
from finealign.runtime.progress import Progress
from finealign.texts.prompts import make_texts, read_classes, read_descriptions
from finealign.training.loop import run_epochs
from finealign.training.state import begin
from finealign.types import ImageFeatures, TextFeatures, Texts

CHOOSING = ("eurosat", "dtd10", "pets37-small", "cifar100")  # whose test labels the defaults were chosen by
UNTOUCHED = ("flowers12", "food10", "ucmerced")
SETS = (*CHOOSING, *UNTOUCHED, "demo")
CROPS, STRONG = 16, 4  # encoded per image; a run with N crops takes the first N, which are the ones it would draw
CHUNK = 32

# What a step learns from: the strong view, or in its place one of the image's crops, or the whole image.
STRONG_VIEW, ANOTHER_CROP, WHOLE_IMAGE = "strong view", "another crop", "the whole image"

Settings = dict[str, Any]  # of the package; "strong" beside its sections is one of the three above


def varied(section: str, key: str, values: Sequence[Any]) -> dict[str, Settings]:
    return {str(value): {section: {key: value}} for value in values}


# Each axis changes the default in one place; the default itself is the row "as it is".
AXES: dict[str, dict[str, Settings]] = {
    "crops N": varied("views", "crops", [1, 2, 4, 6, 8, 12, 16]),
    "crops kept K": varied("method", "crops_kept", [1, 2, 4, 6]),
    "tau": varied("method", "crop_temperature", [0.018, 0.05, 0.1, 0.3]),
    "weight": varied(
        "method",
        "weight",
        ["none", "margin", "agreement", "confusion", "confusion*agreement", "margin*agreement*confusion"],
    ),
    "fixed share gamma": varied("method", "fixed_share", [0.25, 0.5, 0.75, 1.0]),
    "teacher": varied("method", "teacher_momentum", [0.9, 0.99]),
    "label balance": varied("method", "label_balance", [0.25, 0.5, 0.75, 1.0]),
    "fairness": varied("method", "fairness", ["batch", "off"]),
    "fairness weight": varied("method", "fairness_weight", [0.5, 1.0, 4.0, 8.0]),
    "fairness temperature": varied("method", "fairness_temperature", [0.5, 2.0, 4.0]),
    "fairness window": varied("method", "fairness_window", [256, 1024, 4096]),
    "anchors per class": varied("method", "anchors_per_class", [2, 4]),
    "logit scale": varied("method", "logit_scale", [30.0, 50.0, 200.0]),
    "learning rate of the anchors": varied("training", "anchor_learning_rate", [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]),
    "batch": varied("training", "batch_size", [32, 128, 256]),
    "steps": varied("training", "steps", [40, 80, 160, 320]),
    "the anchors' own steps": varied("training", "anchor_steps", [0, 40, 80, 320]),
    "the anchors' own batch": varied("training", "anchor_batch_size", [64, 128, 512]),
    "weight decay of the anchors": varied("training", "weight_decay", [0.01, 0.1]),
}

# Asked for by name; not among "all", nor among the runs that the verdict was fitted to.
MORE_AXES: dict[str, dict[str, Settings]] = {
    "what stands for the strong view": {
        f"{view}, batch {size}": {"strong": view, "training": {"batch_size": size}}
        for view, size in product((STRONG_VIEW, ANOTHER_CROP, WHOLE_IMAGE), (64, 128, 256))
    },
    "low learning rates of the anchors": varied("training", "anchor_learning_rate", [1e-4, 2e-4, 3e-4, 5e-4, 1e-3]),
}


@dataclass(frozen=True)
class Encoded:
    """A set as the backbone sees it before anything is learned; n images to learn from, m to test on."""

    weak: Tensor  # (n, D)
    crops: Tensor  # (n, CROPS, D)
    strong: Tensor  # (STRONG, n, D)
    test_weak: Tensor  # (m, D)
    test_crops: Tensor  # (m, CROPS, D)
    labels: Tensor  # (m,) int64, for evaluation alone
    hidden: Tensor  # (n,) int64, for the ceiling alone
    texts: TextFeatures
    logit_scale: float


@dataclass(frozen=True)
class EncodedSet:
    """The images to learn from, as ``training.ImageSource``: every view encoded, the first N crops looked at."""

    encoded: Encoded
    crops: int
    strong: str = STRONG_VIEW
    seed: int = 0

    def start_epoch(self, epoch: int) -> bool:
        return epoch == 0

    def renew(self, epoch: int) -> bool:
        return False

    def label_features(self, batch: Tensor, epoch: int) -> ImageFeatures:
        return ImageFeatures(self.encoded.weak[batch], self.encoded.crops[batch, : self.crops])

    def whole_images(self, epoch: int) -> Tensor:
        return self.encoded.weak

    def strong_features(self, epoch: int, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        for batch in batches:
            if self.strong == ANOTHER_CROP:
                yield self.encoded.crops[batch, torch.randint(self.crops, batch.shape, generator=generator)]
            elif self.strong == WHOLE_IMAGE:
                yield self.encoded.weak[batch]
            else:
                yield self.encoded.strong[epoch % len(self.encoded.strong), batch]


class Sets:
    """The sets, encoded when first asked for and kept in ``out``."""

    def __init__(self, shared: Path, out: Path, backbone: str) -> None:
        self.shared, self.out, self.identifier = shared, out, backbone
        self.backbones: dict[str, Backbone] = {}

    def _folders(self, name: str, seed: int, scratch: Path) -> tuple[Texts, Path, Path, Path]:
        """Texts, images to learn from, their truth (for the ceiling alone), and the truth of the test images."""
        if name == "demo":
            world = make_world(scratch / "world", seed=seed)
            return make_texts(world.classes, world.descriptions), world.unlabelled, world.hidden, world.truth
        data = self.shared / "data" / name
        texts = make_texts(read_classes(data / "classes.txt"), read_descriptions(data / "descriptions.json"))
        return texts, data / "train", data / "train", data / "test"

    def encoded(self, name: str, seed: int) -> Encoded:
        file = self.out / f"{name}-{seed}.safetensors"
        if not file.exists():
            with TemporaryDirectory() as scratch:
                tensors = self._encode(name, seed, Path(scratch))
            save_file({key: value.contiguous() for key, value in tensors.items()}, file)
        found = load_file(file)
        texts = TextFeatures(found.pop("names"), found.pop("descriptions"), found.pop("class_of"))
        scale = float(found.pop("logit_scale"))
        return Encoded(**found, texts=texts, logit_scale=scale)

    def _encode(self, name: str, seed: int, scratch: Path) -> dict[str, Tensor]:
        began = time.perf_counter()
        identifier = demo_model() if name == "demo" else self.identifier
        config = make_config({"backbone": identifier, "seed": seed, "views": {"crops": CROPS}})
        texts, train, hidden, test = self._folders(name, seed, scratch)
        if identifier not in self.backbones:
            self.backbones[identifier] = FineAlign(texts.classes).load_backbone(config)
        backbone = self.backbones[identifier]
        views = Views(config.views, size=backbone.input_size, geometry=backbone.geometry, mean=backbone.mean, seed=seed)
        truth, learned = read_truth(test, texts.classes), read_truth(hidden, texts.classes)
        classes = dict(zip(learned.paths, learned.labels, strict=True))
        found: dict[str, list[Tensor]] = {}
        for split, paths in (("", list_images(train)), ("test_", list(truth.paths))):
            for start in range(0, len(paths), CHUNK):
                pixels = [read_pixels(path, shorter_side=2 * views.size) for path in paths[start : start + CHUNK]]
                epochs = [(0, start + i) if not split else (PREDICTION_EPOCH, 0) for i in range(len(pixels))]
                crops = [
                    views.crops(seen, epoch=epoch, image=image)
                    for seen, (epoch, image) in zip(pixels, epochs, strict=True)
                ]
                weak = backbone.embed(torch.stack([views.weak(seen) for seen in pixels]))
                found.setdefault(f"{split}weak", []).append(weak)
                parts = backbone.embed(torch.cat(crops)).reshape(len(pixels), CROPS, -1)
                found.setdefault(f"{split}crops", []).append(parts)
                if not split:
                    strong = [
                        views.strong(seen, epoch=epoch, image=start + i)
                        for epoch, (i, seen) in product(range(STRONG), enumerate(pixels))
                    ]
                    found.setdefault("strong", []).append(
                        backbone.embed(torch.stack(strong)).reshape(STRONG, len(pixels), -1)
                    )
        features = backbone.encode_texts(texts)
        tensors = {key: torch.cat(parts, dim=1 if key == "strong" else 0) for key, parts in found.items()}
        print(f"encoded {name}, seed {seed}, in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        return tensors | {
            "labels": torch.tensor(truth.labels),
            "hidden": torch.tensor([classes[path] for path in list_images(train)]),
            "names": features.names,
            "descriptions": features.descriptions,
            "class_of": features.class_of,
            "logit_scale": torch.tensor(backbone.logit_scale),
        }


class NoBackbone:
    """Stands where nothing of the backbone learns."""


def trained(encoded: Encoded, settings: Settings, seed: int, *, shares: Tensor | None = None) -> tuple[Method, int]:
    """A method that has learned from the encoded set, and how many crops of an image it looks at.

    ``shares`` (C,) is the class prior, in place of the one in the settings.
    """
    values = {**settings, "seed": seed, "training": {"encoder": "frozen", **settings.get("training", {})}}
    strong = values.pop("strong", STRONG_VIEW)
    config = resolve(make_config(values), images=len(encoded.weak), classes=encoded.texts.num_classes, input_size=1)
    crops, epochs = config.views.crops, config.training.epochs
    assert epochs != "auto"
    method = create_method(config.method, encoded.texts, logit_scale=encoded.logit_scale)
    if shares is not None and isinstance(method, SelfTrainingMethod):
        method.expect(shares)
    if method.trains:
        state = begin(NoBackbone(), method, config, images=len(encoded.weak))  # type: ignore[arg-type]
        for _ in run_epochs(state, EncodedSet(encoded, crops, strong, seed), config, range(epochs), Progress()):
            pass
    elif method.surveys:
        method.survey(encoded.weak)
    return method.requires_grad_(False), crops


def run(encoded: Encoded, settings: Settings, seed: int) -> dict[str, Any]:
    """Train on the encoded set; top-1 by every score of the method, and of the start, in percent."""
    method, crops = trained(encoded, settings, seed)
    start = create_method(make_config({"method": {"name": "cupl"}}).method, encoded.texts, logit_scale=1.0)
    seen = ImageFeatures(encoded.test_weak, encoded.test_crops[:, :crops])

    def top1(scores: Tensor) -> float:
        return 100 * float((scores.argmax(1) == encoded.labels).float().mean())

    with torch.no_grad():
        found: dict[str, float] = {score: top1(method.score(seen, score)) for score in method.scores}
        return {"start": top1(start.score(seen, "global")), **found}


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


def tables(results: list[dict[str, Any]], sets: Sequence[str]) -> str:
    """Markdown: a table an axis; mean gains over seeds and orders, of the method's own score by set, then of each."""
    lines = []
    gains: dict[tuple[str, str], dict[str, list[dict[str, float]]]] = {}
    for row in results:
        if row["set"] in sets:
            gains.setdefault((row["axis"], row["value"]), {}).setdefault(row["set"], []).append(row["top1"])
    default = gains.get(("as it is", ""), {})
    for axis in ["as it is", *AXES, *MORE_AXES]:
        rows = {value: by_set for (one, value), by_set in gains.items() if one == axis}
        if not rows:
            continue
        lines += ["", f"| {axis} | {' | '.join(sets)} | mean, LAS | choosing | fused | global |"]
        lines += ["|---" * (len(sets) + 5) + "|"]
        for value, by_set in {**({"(as it is)": default} if axis != "as it is" else {}), **rows}.items():
            lines.append(_row(value, by_set, sets))
    return "\n".join(lines)


def _row(value: str, by_set: dict[str, list[dict[str, float]]], sets: Sequence[str]) -> str:
    def gain(name: str, score: str) -> float:
        return mean(found.get(score, float("nan")) - found["start"] for found in by_set[name])

    there = [name for name in sets if name in by_set]
    photos = [name for name in there if name != "demo"]
    cells = [f"{gain(name, 'las'):+.1f}" if name in by_set else "-" for name in sets]
    groups = [(photos, "las"), ([n for n in there if n in CHOOSING], "las"), (photos, "fused"), (photos, "global")]
    means = [f"{mean(gain(name, score) for name in names):+.2f}" if names else "-" for names, score in groups]
    return f"| {value or 'default'} | {' | '.join(cells)} | {' | '.join(means)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--orders", default="", help="seeds to train with on each set as encoded; else its own seed")
    parser.add_argument("--sets", default=",".join(SETS))
    more = ", ".join(MORE_AXES)
    parser.add_argument(
        "--axes", default="all", help=f"names with commas between; all, save {more}; none: the default alone"
    )
    parser.add_argument("--backbone", default="")
    parser.add_argument("--transductive", action="store_true", help="only transclip, fitted on the test images too")
    parser.add_argument("--ceiling", action="store_true", help="only a linear probe on labels, for each set")
    parser.add_argument("--base", default="{}", help="JSON: settings that every run starts from")
    known = parser.parse_args()
    shared = require_shared()
    known.out.mkdir(parents=True, exist_ok=True)
    sets = Sets(shared, known.out, known.backbone or f"local-dir:{shared / 'models' / 'miniclip'}")
    if known.transductive:
        for name, seed in product(known.sets.split(","), map(int, known.seeds.split(","))):
            encoded = sets.encoded(name, seed)
            there = replace(encoded, weak=encoded.test_weak, crops=encoded.test_crops)
            for fitted, source in (("images to learn from", encoded), ("test images", there)):
                found = run(source, {"method": {"name": "transclip"}}, seed)
                print(f"{name} {seed}, fitted on the {fitted}: {found['global'] - found['start']:+.1f}", flush=True)
        return
    if known.ceiling:
        for name, seed in product(known.sets.split(","), map(int, known.seeds.split(","))):
            found = ceilings(sets.encoded(name, seed))
            print(name, seed, " ".join(f"{key}: {value:.1f}" for key, value in found.items()), flush=True)
        return
    log = known.out / "results.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    results: dict[tuple[str, str, str, int, int], dict[str, Any]] = {}
    for row in map(json.loads, lines):
        if row["base"] == known.base:
            order = row.setdefault("order", row["seed"])
            results[row["axis"], row["value"], row["set"], row["seed"], order] = row
    axes = [] if known.axes == "none" else list(AXES) if known.axes == "all" else known.axes.split(",")
    variants: list[tuple[str, str, Settings]] = [("as it is", "", {})]
    variants += [(axis, value, changed) for axis in axes for value, changed in (AXES | MORE_AXES)[axis].items()]
    base = json.loads(known.base)
    seeds = [int(seed) for seed in known.seeds.split(",")]
    asked = [(seed, int(order)) for seed in seeds for order in (known.orders or str(seed)).split(",")]
    for name, (seed, order) in product(known.sets.split(","), asked):
        missing = [variant for variant in variants if (*variant[:2], name, seed, order) not in results]
        if not missing:
            continue
        encoded = sets.encoded(name, seed)
        for axis, value, settings in missing:
            row = {"axis": axis, "value": value, "set": name, "seed": seed, "order": order, "base": known.base}
            row["top1"] = run(encoded, merged(base, settings), order)
            results[axis, value, name, seed, order] = row
            with log.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(row) + "\n")
    shown = {axis for axis, _, _ in variants}
    rows = [row for row in results.values() if row["axis"] in shown and (row["seed"], row["order"]) in asked]
    print(tables(rows, known.sets.split(",")))


if __name__ == "__main__":
    main()
