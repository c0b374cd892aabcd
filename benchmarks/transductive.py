"""Top-1 on CLIP's ViT-B/32 features of DTD, Cars and SUN397, with classes absent or not: `stata`, `transclip`, `fair`.

    python benchmarks/transductive.py [--sets dtd] [--steps 1,2,10]

A step of 2 keeps the images of the classes 0, 2, 4, ...; the names of all classes stay in the list. `start` is the
cosine with the texts. The features are those in features/clip-b32 of the folder that FINEALIGN_SHARED names, else of
../shared. Each method is fitted on the images that it is measured on, as the first two's authors do. `fair` learns with
its defaults, the encoder frozen, which takes up to a minute.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from features import Encoded, trained
from real_data import shared_folder
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize

from finealign.config import MethodSettings
from finealign.method.registry import create_method
from finealign.types import ImageFeatures, TextFeatures

SPLITS = {"dtd": "test", "stanford_cars": "val", "sun397": "val"}
METHODS = ("stata", "transclip")
LEARNER = "fair"


def clip_features() -> Path:
    """The folder of features, whether it is there or not."""
    return shared_folder() / "features" / "clip-b32"


def read(name: str, step: int) -> tuple[Tensor, Tensor, TextFeatures]:
    """Images (n, 512), their classes (n,), and the texts, a vector a class; all of length 1."""
    found = load_file(clip_features() / f"{name}.safetensors")
    rows = json.loads((clip_features() / "texts.json").read_text(encoding="utf-8"))["rows"][name]
    # In double precision, so that figures do not depend on a processor's rounding.
    texts = normalize(load_file(clip_features() / "texts.safetensors")["texts"][rows].double(), dim=1)
    images, classes = normalize(found[SPLITS[name]].double(), dim=1), found[f"{SPLITS[name]}_labels"].long()
    kept = classes % step == 0
    return images[kept], classes[kept], TextFeatures(texts, texts, torch.arange(len(texts)))


def whole_images(name: str, step: int = 1) -> Encoded:
    """The same, learned from and tested on the same images, in single precision.

    There are no crops and no strong views of them: the whole image stands in for a single one of each.
    """
    images, classes, texts = read(name, step)
    weak, vectors = images.float(), texts.names.float()
    return Encoded(
        weak=weak,
        crops=weak[:, None],
        strong=weak[None],
        test_weak=weak,
        test_crops=weak[:, None],
        labels=classes,
        hidden=classes,
        texts=TextFeatures(vectors, vectors, texts.class_of),
        logit_scale=100.0,
    )


def learned(name: str, step: int) -> float:
    """Top-1 in percent of what learns, by its defaults, on the images that it learns from."""
    encoded = whole_images(name, step)
    method, _ = trained(encoded, {"method": {"name": LEARNER}}, 0)
    predicted = method.score(ImageFeatures(encoded.weak, encoded.crops), "global").argmax(1)
    return 100 * (predicted == encoded.hidden).double().mean().item()


def measure(name: str, step: int, methods: Sequence[str] = METHODS) -> dict[str, float]:
    """Top-1 in percent of the start and of each method, by name."""
    images, classes, texts = read(name, step)
    features = ImageFeatures(images, images[:, None][:, :0])
    found = {}
    for method_name in ("start", *methods):
        name_there = "cupl" if method_name == "start" else method_name
        method = create_method(MethodSettings(name=name_there), texts, logit_scale=100.0)
        method.survey(images)
        with torch.no_grad():
            predicted = method.score(features, "global").argmax(1)
        found[method_name] = 100 * (predicted == classes).double().mean().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SPLITS))
    parser.add_argument("--steps", default="1,2,10")
    known = parser.parse_args()
    if not clip_features().is_dir():
        sys.exit(f"No features at {clip_features()}. Set FINEALIGN_SHARED to the folder that holds features/clip-b32/.")
    names = (*METHODS, LEARNER)
    print(f"| set | classes | start | {' | '.join(names)} |\n|---|---|---|{'---|' * len(names)}")
    for name in known.sets.split(","):
        for step in map(int, known.steps.split(",")):
            row = {**measure(name, step), LEARNER: learned(name, step)}
            kept = "all" if step == 1 else f"0, {step}, {2 * step}, ..."
            print(f"| {name} | {kept} | {' | '.join(f'{value:.2f}' for value in row.values())} |", flush=True)


if __name__ == "__main__":
    main()
