"""The weak view, the strong view and the crops of an image. Step 2 of the method [R].

Every random draw depends on (seed, epoch, image, view) alone, so the number of workers, the order of the images and an
interruption cannot change a view.
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
from finealign.images.decoding import Pixels
from finealign.types import Blank, Box

STRONG, CROP = 0, 1  # numbers of the views in ``draw``; crop i of N is view CROP + i
PREDICTION_EPOCH = 2**31  # no training epoch has this number
PREDICTED_AS = 0  # the image whose draws every image to classify has, so that its place in a list does not matter
DARK, SPECKS = 16, 0.005  # of 255, and the share of values that may be brighter in an image that is all but black
ASPECT = (3 / 4, 4 / 3)  # width over height of the strong view's crop, as in Inception-style training
# timm's RandAugment draws from the process-wide generators, so only one thread at a time may use them.
_GLOBAL_RANDOM = threading.Lock()


def draw(seed: int, epoch: int, image: int, view: int) -> np.random.Generator:
    """The random generator of one view of one image in one epoch. ``view`` is STRONG or CROP + i."""
    return np.random.default_rng((seed, epoch, image, view))


def crop_box(generator: np.random.Generator, height: int, width: int, *, low: float, high: float) -> Box:
    """Draw a square (left, top, right, bottom) inside an image of ``height`` x ``width`` pixels.

    Its side is a share of the shorter side drawn from U(low, high), and at least 1 pixel.
    """
    shorter = min(height, width)
    side = min(shorter, max(1, round(generator.uniform(low, high) * shorter)))
    left = int(generator.integers(0, width - side + 1))
    top = int(generator.integers(0, height - side + 1))
    return left, top, left + side, top + side


def strong_box(generator: np.random.Generator, height: int, width: int, *, low: float) -> Box:
    """Draw a box (left, top, right, bottom) inside an image of ``height`` x ``width`` pixels.

    Its area is a share of the image's area drawn from U(low, 1), and its aspect ratio (width over height) lies between
    3/4 and 4/3. Where ten draws give no box that fits, it is the largest square in the middle of the image.
    """
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


def blank_of(view: Tensor) -> Blank | None:
    """Whether an image (3, S, S) uint8 is all black or all white, but for ``SPECKS`` of it; None for neither."""
    if (view > DARK).float().mean() < SPECKS:
        return "black"
    return "white" if (view < 255 - DARK).float().mean() < SPECKS else None


class Views:
    """Makes the views of images for one backbone: uint8 (3, S, S), S the input side, normalised only when encoded."""

    def __init__(
        self,
        settings: ViewSettings,
        *,
        size: int,
        geometry: Callable[[Image.Image], Image.Image],
        mean: tuple[float, ...],
        seed: int,
    ) -> None:
        """``size`` is S; ``geometry`` is the backbone's own resize and crop.

        ``mean`` is the colour, in [0, 1] per channel, that fills areas which augmentation uncovers.
        """
        self.settings = settings
        self.size = size
        self.seed = seed
        self._geometry = geometry
        self._augment = _randaugment(settings.randaugment, size, mean)

    def weak(self, pixels: Pixels) -> Tensor:
        """The weak view: the resize and crop that the backbone was trained for, (3, S, S) uint8. Nothing is random."""
        return _to_tensor(np.asarray(self._geometry(Image.fromarray(pixels))))

    def crops(self, pixels: Pixels, *, epoch: int, image: int) -> Tensor:
        """N square crops of random size and position: (N, 3, S, S) uint8."""
        height, width = pixels.shape[:2]
        boxes = self.crop_boxes(height, width, epoch=epoch, image=image)
        return torch.stack([_cut(pixels, box, self.size) for box in boxes])

    def crop_boxes(self, height: int, width: int, *, epoch: int, image: int) -> list[Box]:
        """The boxes of the N crops of an image of ``height`` x ``width`` pixels, in the order of ``crops``."""
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
        """The strong view: random resized crop, horizontal flip with probability 1/2, RandAugment. (3, S, S) uint8."""
        generator = draw(self.seed, epoch, image, STRONG)
        box = strong_box(generator, *pixels.shape[:2], low=self.settings.strong_low)
        view = _cut(pixels, box, self.size)
        if generator.random() < 0.5:
            view = view.flip(2)
        with _borrowed_global_random(int(generator.integers(2**32))):
            augmented = self._augment(Image.fromarray(view.permute(1, 2, 0).numpy()))
        return _to_tensor(np.asarray(augmented))


Uncut = tuple[Pixels, list[Box]]  # an image and the boxes of its crops
Padded = tuple[Tensor, Tensor]  # images (B, H, W, 3) uint8 and the boxes (B, N, 4) float32 of their crops
_PADDING = 2.0  # times their own pixels that images padded to one size may take


def padded(uncut: Sequence[Uncut]) -> list[Padded]:
    """Images with N boxes each, padded at the right and the bottom and stacked, for ``cut_and_resize``.

    It is one stack, in the order of the images, but where one of them is so much longer than others that padding would
    take more than the images; then it is several.
    """
    stacks: list[Padded] = []
    waiting: list[Uncut] = []
    for pixels, boxes in uncut:
        sizes = [image.shape[:2] for image, _ in waiting] + [pixels.shape[:2]]
        height, width = (max(side) for side in zip(*sizes, strict=True))
        if waiting and len(sizes) * height * width > _PADDING * sum(h * w for h, w in sizes):
            stacks.append(_stacked(waiting))
            waiting = []
        waiting.append((pixels, boxes))
    return [*stacks, _stacked(waiting)] if waiting else stacks


def _stacked(uncut: Sequence[Uncut]) -> Padded:
    height, width = (max(pixels.shape[axis] for pixels, _ in uncut) for axis in (0, 1))
    images = torch.zeros(len(uncut), height, width, 3, dtype=torch.uint8)
    for row, (pixels, _) in zip(images.numpy(), uncut, strict=True):
        row[: pixels.shape[0], : pixels.shape[1]] = pixels
    return images, torch.tensor([boxes for _, boxes in uncut], dtype=torch.float32).reshape(len(uncut), -1, 4)


def cut_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut N boxes from each of B images and resize them to ``size`` (S): -> (B, N, 3, S, S) uint8.

    images (B, H, W, 3) uint8, boxes (B, N, 4), as ``padded`` makes them. It takes two batched matrix products on the
    device of both. The filter is the antialiased bicubic one of ``Views.crops``, which rounds its weights, so the
    results differ by 1 or 2 of 255. This function is meant for a GPU; on a CPU, cutting one box after the other is
    several times faster.
    """
    (count, height, width, _), crops = images.shape, boxes.shape[1]
    left, top, right, bottom = boxes.reshape(-1, 4).T
    rows = _resampling(top, bottom, size, height).reshape(count, crops, size, height)
    columns = _resampling(left, right, size, width).reshape(count, crops * size, width)
    planes = images.permute(0, 3, 1, 2).reshape(count, 3 * height, width).float()
    narrowed = (planes @ columns.transpose(1, 2)).round_().clamp_(0, 255).reshape(count, 3, height, crops, size)
    narrowed = narrowed.permute(0, 3, 2, 1, 4).reshape(count, crops, height, 3 * size)
    cut = (rows @ narrowed).round_().clamp_(0, 255).to(torch.uint8)
    return cut.reshape(count, crops, size, 3, size).transpose(2, 3)


def cut_on(device: torch.device, stacks: Sequence[Padded], size: int) -> Tensor:
    """All crops of the images that ``padded`` has stacked, cut on the device: (B * N, 3, S, S) uint8."""
    parts = [
        cut_and_resize(images.to(device, non_blocking=True), boxes.to(device, non_blocking=True), size).flatten(0, 1)
        for images, boxes in stacks
    ]
    return torch.cat(parts)


def _resampling(start: Tensor, stop: Tensor, size: int, length: int) -> Tensor:
    """The weight of each of ``length`` input pixels in each of ``size`` output pixels: (N, size, length).

    ``start`` and ``stop`` (N,) are the ends of the intervals that are resampled.
    """
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
        # At the full magnitude of 10, timm's "increasing" posterize keeps 0 bits, which Pillow refuses; below 10, 1.
        "magnitude_max": 9.99,
    }
    transform: Callable[[Image.Image], Image.Image] = rand_augment_transform(policy, hparams)
    return transform


@contextmanager
def _borrowed_global_random(seed: int) -> Iterator[None]:
    """Seed the process-wide generators of Python and NumPy, and restore their states afterwards."""
    with _GLOBAL_RANDOM:
        python_state, numpy_state = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
