"""Whether crops or whole images are trusted, world by world, and whether the labels say that this was right.

    python benchmarks/crop_trust.py --out runs/frozen [--worlds all] [--variants even,half]

By the whole image's share in the score: the start's top-1 on the images to learn from, in percent, and how much of the
variance of the joint features its labels explain, by which the share is chosen. ``--variants`` are uneven folders of
``frozen.py``, of at most 45 images a class; without it, all images are taken. Nothing is trained.
"""

import argparse
from itertools import product
from pathlib import Path

import torch
from features import Encoded
from folders import NONE
from frozen import WORLDS, Frozen
from on_device import add_device
from real_data import require_shared

from finealign.config import make_config
from finealign.method.crop_trust import SHARES, chosen_share, explained_by_share
from finealign.method.registry import create_method

MOST = 45  # images a class of a variant


def line(name: str, encoded: Encoded) -> str:
    """A row of the table."""
    start = create_method(make_config({"method": {"name": "cupl"}}).method, encoded.texts, logit_scale=1.0)
    anchors, crops = start.classifier()[:, 0], encoded.crops.mean(1)
    explained = explained_by_share(encoded.weak, crops, anchors)
    belongs = encoded.hidden != NONE
    cells = []
    for share in sorted(SHARES):
        scores = torch.lerp(crops @ anchors.T, encoded.weak @ anchors.T, share)
        top1 = 100 * float((scores.argmax(1) == encoded.hidden)[belongs].float().mean())
        cells.append(f"{top1:.1f} ({explained[share]:.3f})")
    return f"| {name} | {len(encoded.weak)} | {' | '.join(cells)} | {chosen_share(explained, len(encoded.weak)):g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worlds", default="all")
    parser.add_argument("--variants", default="")
    add_device(parser)
    known = parser.parse_args()
    frozen = Frozen(require_shared(), known.out, known.device)
    worlds = [world for group, names in WORLDS.items() for world in names if known.worlds in ("all", group, world)]
    print(f"| world | images | {' | '.join(f'share {share:g}' for share in sorted(SHARES))} | chosen |")
    print("|---" * (len(SHARES) + 3) + "|")
    for variant, world in product(known.variants.split(","), worlds):
        backbone, _, name = world.partition("/")
        if variant and backbone in ("miniclip", "clip-b16"):
            print(line(f"{world}, {variant}", frozen.folder(backbone, name, variant, 0, most=MOST)), flush=True)
        elif not variant and backbone != "clip-b32":  # of which there are whole images alone
            print(line(world, frozen.world(world, 0)), flush=True)


if __name__ == "__main__":
    main()
