"""Weak, strong and crop views of one image; every random draw comes from (seed, epoch, image, view) and nothing else.

So the number of workers, the order of the images and an interruption cannot change a view. Step 2 of METHOD [R].
"""

import math
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from finealign.config import ViewSettings
from finealign.images import Pixels
from finealign.types import Box

STRONG, CROP = 0, 1  # the first of the N crops; crop i draws from view CROP + i
PREDICTION_EPOCH = 2**31  # no training epoch has this number
ASPECT = (3 / 4, 4 / 3)  # of the strong view's crop, as in Inception-style training
# timm draws RandAugment from the process-wide generators: one image at a time may borrow them.
_GLOBAL_RANDOM = threading.Lock()


def draw(seed: int, epoch: int, image: int, view: int) -> np.random.Generator:
    """The generator of one view of one image in one epoch."""
    return np.random.default_rng((seed, epoch, image, view))


def crop_box(generator: np.random.Generator, height: int, width: int, *, low: float, high: float) -> Box:
    """A square (left, top, right, bottom) inside the image, its side U(low, high) of the shorter side, at least 1."""
    shorter = min(height, width)
    side = min(shorter, max(1, round(generator.uniform(low, high) * shorter)))
    left = int(generator.integers(0, width - side + 1))
    top = int(generator.integers(0, height - side + 1))
    return left, top, left + side, top + side


def strong_box(generator: np.random.Generator, height: int, width: int, *, low: float) -> Box:
    """A box (left, top, right, bottom) inside the image of low to 1 of its area, aspect 3/4 to 4/3 where it fits."""
    for _ in range(10):
        area = generator.uniform(low, 1) * height * width
        aspect = math.exp(generator.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 1 <= box_width <= width and 1 <= box_height <= height:
            left = int(generator.integers(0, width - box_width + 1))
            top = int(generator.integers(0, height - box_height + 1))
            return left, top, left + box_width, top + box_height
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


class Views:
    """The views of images for one backbone: uint8 (3, S, S), to be normalised where they are encoded."""

    def __init__(
        self,
        settings: ViewSettings,
        *,
        size: int,
        geometry: Callable[[Image.Image], Image.Image],
        mean: tuple[float, ...],
        seed: int,
    ) -> None:
        """``geometry`` is the backbone's own resize and crop; ``mean`` fills what augmentation uncovers."""
        self.settings = settings
        self.size = size
        self.seed = seed
        self._geometry = geometry
        self._augment = _randaugment(settings.randaugment, size, mean)

    def weak(self, pixels: Pixels) -> Tensor:
        """The view the backbone was made for; nothing is drawn."""
        return _to_tensor(np.asarray(self._geometry(Image.fromarray(pixels))))

    def crops(self, pixels: Pixels, *, epoch: int, image: int) -> Tensor:
        """N square crops: (N, 3, S, S) uint8."""
        height, width = pixels.shape[:2]
        boxes = self.crop_boxes(height, width, epoch=epoch, image=image)
        return torch.stack([_cut(pixels, box, self.size) for box in boxes])

    def crop_boxes(self, height: int, width: int, *, epoch: int, image: int) -> list[Box]:
        """Where the N crops of an image of this size lie: what ``crops`` shows, in its order."""
        return [
            crop_box(
                draw(self.seed, epoch, image, CROP + number),
                height,
                width,
                low=self.settings.crop_low,
                high=self.settings.crop_high,
            )
            for number in range(self.settings.crops)
        ]

    def strong(self, pixels: Pixels, *, epoch: int, image: int) -> Tensor:
        """Random resized crop, mirror image half of the time, RandAugment: (3, S, S) uint8."""
        generator = draw(self.seed, epoch, image, STRONG)
        box = strong_box(generator, *pixels.shape[:2], low=self.settings.strong_low)
        view = _cut(pixels, box, self.size)
        if generator.random() < 0.5:
            view = view.flip(2)
        with _borrowed_global_random(int(generator.integers(2**32))):
            augmented = self._augment(Image.fromarray(view.permute(1, 2, 0).numpy()))
        return _to_tensor(np.asarray(augmented))


def cut_and_resize(image: Tensor, boxes: Sequence[Box], size: int) -> Tensor:
    """All boxes of one image in two batched products, on the image's device: (3, H, W) uint8 -> (N, 3, S, S) uint8.

    The antialiased bicubic filter of ``Views.crops``, whose weights are rounded: they differ by 1 or 2 of 255. For a
    GPU; on a CPU one box after the other is several times faster.
    """
    left, top, right, bottom = torch.tensor(boxes, dtype=torch.float32).to(image.device, non_blocking=True).T
    rows = _resampling(top, bottom, size, image.shape[1])
    columns = _resampling(left, right, size, image.shape[2])
    narrow = (image.float() @ columns[:, None].transpose(-1, -2)).round_().clamp_(0, 255)
    return (rows[:, None] @ narrow).round_().clamp_(0, 255).to(torch.uint8)


def _resampling(start: Tensor, stop: Tensor, size: int, length: int) -> Tensor:
    """How much each of ``length`` pixels counts for each of ``size`` from start to stop (N,): (N, size, length)."""
    scale = (stop - start) / size
    pixels = torch.arange(length, device=start.device)
    centres = start[:, None] + (torch.arange(size, device=start.device) + 0.5) * scale[:, None]
    distance = ((pixels + 0.5 - centres[..., None]) / scale.clamp_min(1)[:, None, None]).abs()
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1  # Keys' cubic with a = -1/2
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    inside = (pixels >= start[:, None]) & (pixels < stop[:, None])
    weight = weight * inside[:, None]
    return weight / weight.sum(-1, keepdim=True)


def _to_tensor(pixels: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def _cut(pixels: Pixels, box: Box, size: int) -> Tensor:
    left, top, right, bottom = box
    part = torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1)[None]
    return interpolate(part, size=(size, size), mode="bicubic", antialias=True)[0].contiguous()


def _randaugment(policy: str, size: int, mean: tuple[float, ...]) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import rand_augment_transform

    hparams = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(round(255 * value) for value in mean),
        # At the full magnitude of 10, "increasing" posterize keeps 0 bits, which Pillow refuses; below it, 1.
        "magnitude_max": 9.99,
    }
    transform: Callable[[Image.Image], Image.Image] = rand_augment_transform(policy, hparams)
    return transform


@contextmanager
def _borrowed_global_random(seed: int) -> Iterator[None]:
    with _GLOBAL_RANDOM:
        python_state, numpy_state = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
