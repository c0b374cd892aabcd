"""How closely each export agrees with FineAlign, how large it is, and how fast onnxruntime is beside torch.

    python benchmarks/export.py [--backbones demo ViT-B-32/random] [--formats hf onnx] [--pairs 5]

Each export checks itself; the table has what it measured. Random weights get CLIP's trained factor of 100 on the
cosines, so that logits are as sharp as a real model's. Speed is that of whole images, scored by the file and by
FineAlign's own backbone in float32, in turn in one process with as many threads; the ratio is of medians.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from finealign import FineAlign
from finealign.config import make_config
from finealign.demo.model import demo_model
from finealign.errors import ConfigError
from finealign.export.checks import Exported, Format, open_clip_backbone
from finealign.export.run import WRITERS, export
from finealign.types import ImageFeatures

BACKBONES = ["demo", "ViT-B-32/random", "ViT-B-32-quickgelu/random", "ViT-B-16/random"]
CLASSES = ["robin", "wren", "blackbird", "song thrush", "great tit", "blue tit", "goldfinch", "siskin"]
BATCH = 16


def fitted(backbone: str) -> FineAlign:
    values: dict[str, Any] = {
        "backbone": demo_model() if backbone == "demo" else backbone,
        "device": "cpu",
        "precision": "fp32",
        "views": {"crops": 4},
        "method": {"name": "fair", "logit_scale": 100},
    }
    model = FineAlign(CLASSES, config=make_config(values)).unlearned()
    if backbone.endswith("/random"):
        open_clip_backbone(model).model.logit_scale.data.fill_(math.log(100))
    return model


def speed(model: FineAlign, folder: Path, pairs: int) -> float:
    """onnxruntime's images a second over torch's, whole images."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    side = model.backbone_.input_size
    pixels = np.random.default_rng(0).integers(0, 256, (BATCH, 3, side, side), dtype=np.uint8)

    @torch.inference_mode()
    def by_torch() -> None:
        whole = model.backbone_.embed(torch.from_numpy(pixels))
        model.method_.probabilities(model.method_.score(ImageFeatures(whole, whole[:, None][:, :0]), "global"))

    def by_onnx() -> None:
        session.run(None, {"image": pixels})

    def seconds(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    by_torch()
    by_onnx()
    taken = [(seconds(by_torch), seconds(by_onnx)) for _ in range(pairs)]
    return median(one for one, _ in taken) / median(other for _, other in taken)


def rows(backbone: str, found: Exported, ratio: float | None) -> list[str]:
    name = f"{found.format} ({found.score})"
    size, shown = f"{found.as_json()['bytes'] / 1e6:.1f}", f"{ratio:.2f}" if ratio else ""
    return [
        f"| {name} | {backbone} | {what} | {one.largest:.1e} | {one.promised:.1e} | {size} | {shown} |"
        for what, one in found.parity.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--formats", nargs="+", choices=list(WRITERS), default=list(WRITERS))
    parser.add_argument("--pairs", type=int, default=5)
    asked = parser.parse_args()
    print("| format | tower | what | largest difference | promised | MB | onnxruntime / torch |")
    print("|---|---|---|---:|---:|---:|---:|", flush=True)
    formats: list[Format] = asked.formats
    for backbone in asked.backbones:
        model = fitted(backbone)
        for kind in formats:
            for score in ("global", "las") if kind == "onnx" else ("global",):
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        found = export(model, Path(folder, "out"), format=kind, score=score)
                    except ConfigError as error:
                        print(f"{kind} of {backbone}: {error}", file=sys.stderr)
                        continue
                    timed = kind == "onnx" and score == "global"
                    ratio = speed(model, found.folder, asked.pairs) if timed else None
                    print("\n".join(rows(backbone, found, ratio)), flush=True)


if __name__ == "__main__":
    main()
