"""`predict` against the loop a user would write with open_clip, on the same images, in turn, in one process.

    python benchmarks/encode.py [--backbones ViT-B-32/random] [--images 256] [--pairs 5] [--device cuda] [--json]

The plain loop opens each file, applies open_clip's own preprocessing, encodes batches of 64 in float32 and compares
with the class texts. Ours is `FineAlign.predict_proba` by the same score, the whole image, once in the precision the
processor is good at and once in float32. Both give the same labels, up to rounding, and that is counted.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from on_device import add_device, seconds
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from real_data import miniclip
from step import CLASSES, photos, show
from torch.nn.functional import normalize

from finealign import FineAlign
from finealign.backbone.load import load_backbone
from finealign.config import make_config
from finealign.runtime.devices import choose_device, choose_precision, keep_freed_memory


class PlainLoop:
    """What the open_clip README shows, over a list of files."""

    def __init__(self, name: str, paths: list[Path], device: torch.device) -> None:
        self.backbone = load_backbone(name, device=device)
        self.backbone.model.to(memory_format=torch.contiguous_format)  # as open_clip hands it over
        self.preprocess = image_transform_v2(PreprocessCfg(**self.backbone.preprocess), is_train=False)
        self.paths = paths

    def __call__(self, texts: torch.Tensor) -> NDArray[np.float32]:
        found = []
        with torch.no_grad():
            for start in range(0, len(self.paths), 64):
                batch = [self.preprocess(Image.open(path)) for path in self.paths[start : start + 64]]
                pixels = torch.stack(batch).to(self.backbone.device)
                features = normalize(self.backbone.model.encode_image(pixels), dim=-1)
                found.append((100 * features @ texts.T).softmax(dim=-1))
        return torch.cat(found).cpu().numpy()


def measure(name: str, *, images: int, pairs: int, device: torch.device) -> dict[str, Any]:
    best = choose_precision("auto", device)
    with tempfile.TemporaryDirectory() as folder:
        paths = photos(Path(folder), images)
        loop = PlainLoop(name, paths, device)
        kinds = dict.fromkeys([best, "fp32"])
        models = {}
        for precision in kinds:
            method = {"name": "zero-shot", "logit_scale": 100}
            values = {"backbone": name, "precision": precision, "device": str(device), "method": method}
            models[precision] = FineAlign(CLASSES, config=make_config(values)).unlearned()
        texts = models["fp32"].text_features_.names
        plain = loop(texts)
        agreement = {}
        for precision, model in models.items():
            ours = model.predict_proba(paths, score="global")
            agreement[precision] = float((ours.argmax(1) == plain.argmax(1)).mean())
        rows = []
        for number in range(pairs):
            row = {"plain": seconds(lambda: loop(texts), device)}
            for precision, model in models.items():
                row[precision] = seconds(partial(model.predict_proba, paths, score="global"), device)
            rows.append(row)
            print(f"{name} pair {number + 1}: {row}", file=sys.stderr, flush=True)
    return {
        "backbone": name,
        "device": str(device),
        "images": images,
        "pairs": pairs,
        "plain_images_per_second": round(median(images / row["plain"] for row in rows), 1),
        "images_per_second": {kind: round(median(images / row[kind] for row in rows), 1) for kind in kinds},
        "ratio": {kind: round(median(row["plain"] / row[kind] for row in rows), 2) for kind in kinds},
        "same_label": {kind: round(share, 4) for kind, share in agreement.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = miniclip()
    parser.add_argument(
        "--backbones", default=",".join(["ViT-B-32/random", *([f"local-dir:{shared}"] if shared.is_dir() else [])])
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    add_device(parser)
    known = parser.parse_args()
    keep_freed_memory()
    device = choose_device(known.device)
    for name in known.backbones.split(","):
        show(measure(name, images=known.images, pairs=known.pairs, device=device), as_json=known.json)


if __name__ == "__main__":
    main()
