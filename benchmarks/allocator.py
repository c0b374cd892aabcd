"""What it costs that freed memory goes back to the kernel: the same encodings before and after keep_freed_memory().

    python benchmarks/allocator.py --backbone local-dir:PATH

One process, fp32, random images: without gradients (label passes) and with them (training steps).
"""

import argparse
import json
from collections.abc import Callable
from statistics import median

import torch
from on_device import add_device, seconds

from finealign.backbone.load import load_backbone
from finealign.runtime.devices import choose_device, keep_freed_memory


def rate(work: Callable[[], object], images: int, runs: int, device: torch.device) -> float:
    """Median images a second after one run that is not counted."""
    return images / median([seconds(work, device) for _ in range(runs + 1)][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    add_device(parser, default="cpu")  # what is measured is a CPU's
    known = parser.parse_args()
    device = choose_device(known.device)
    backbone = load_backbone(known.backbone, device=device)
    for parameter in backbone.norm_parameters().values():
        parameter.requires_grad_(True)
    size = backbone.input_size
    images = torch.randint(0, 256, (known.batch, 3, size, size), dtype=torch.uint8)

    def measure() -> dict[str, float]:
        def step() -> None:
            torch.autograd.backward(backbone.encode_images(images).sum())

        return {
            "label_pass": round(rate(lambda: backbone.embed(images), known.batch, known.runs, device), 1),
            "training_pass": round(rate(step, known.batch, known.runs, device), 1),
        }

    before = measure()
    print(json.dumps({"images_per_second": {"default": before, "told": keep_freed_memory(), "kept": measure()}}))


if __name__ == "__main__":
    main()
