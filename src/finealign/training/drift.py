"""How far an encoder has moved images since, in a measure that is the same for all towers. Ours.

The features of one tower fill a narrow cone, those of another a wide one. So the measure is the tower's own: how far it
saw an image from a crop of that image. All distances are cosine distances around the mean of the images, and no label
is read.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from finealign.types import ImageFeatures

FARTHEST = 1e6  # stands for what is no longer finite, so that it can be written as JSON
LEAST_APART = 0.01  # crops no further from their images than this are no measure
LEAST_SPREAD = 1e-6  # images that lie no further from their mean than this are all alike


def drift(now: Tensor, before: ImageFeatures) -> float | None:
    """Compute how far images were moved, as a multiple of how far their crops lay from them before.

    now (n, D) are the features of whole images by the encoder as it is, ``before`` those of the same images and their
    crops by the encoder as it was; rows need not have length 1. 0 for images that were not moved, ``FARTHEST`` at most,
    also where a feature is not finite. None where crops are hardly told from their images. Images that are all alike
    have no spread to compare with, and are measured around the origin.
    """
    whole = normalize(before.weak.double(), dim=1)
    centre = whole.mean(0)
    if float((whole - centre).norm(dim=1).max()) < LEAST_SPREAD:
        centre = torch.zeros_like(centre)
    crops = _apart(normalize(before.crops[:, 0].double(), dim=1) - centre, whole - centre)
    if not crops > LEAST_APART:
        return None
    moved = _apart(normalize(now.to(whole), dim=1) - centre, whole - centre) / crops
    return min(moved, FARTHEST) if math.isfinite(moved) else FARTHEST


def _apart(first: Tensor, second: Tensor) -> float:
    """The mean cosine distance of rows."""
    return float(1 - torch.cosine_similarity(first, second, dim=1).mean())
