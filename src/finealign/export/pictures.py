"""Images made on the spot, for an export to be compared with FineAlign on."""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def draw_batch(generator: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    """Pictures as uint8 of any shape (..., 3, H, W)."""
    count = math.prod(shape[:-3])
    return torch.stack([_draw(generator, *shape[-2:]) for _ in range(count)]).reshape(shape)


def write_pictures(size: int, folder: Path) -> list[Path]:
    """Files of several sizes, smaller and larger than the ``size`` pixels a side that the model sees."""
    generator = np.random.default_rng(1)
    sizes = [(size, size), (2 * size, 3 * size + 1), (size // 2 + 1, size), (301, 224), (97, 260), (size + 2, size)]
    paths = []
    for number, (height, width) in enumerate(sizes):
        path = folder / f"{number}.png"
        Image.fromarray(_draw(generator, height, width).permute(1, 2, 0).numpy()).save(path)
        paths.append(path)
    return paths


def _draw(generator: np.random.Generator, height: int, width: int) -> Tensor:
    """A gradient of two random colours under noise: (3, H, W) uint8."""
    ends = generator.integers(0, 256, (2, 3, 1, 1))
    slope = (np.arange(height)[:, None] / height + np.arange(width) / width) / 2
    noise = generator.normal(0, generator.uniform(0, 60), (3, height, width))
    return torch.from_numpy((ends[0] + (ends[1] - ends[0]) * slope + noise).clip(0, 255).astype(np.uint8))
