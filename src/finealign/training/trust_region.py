"""Keep the encoder near its start: how far it may move images while its normalisation parameters learn. Ours.

How far is far depends on the tower: the features of one fill a narrow cone, those of another a wide one. So the measure
is the tower's own: how far it sees an image from a crop of that image before anything is learned. All distances are
cosine distances around the mean of the images at the start, and no label is read.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from finealign.runtime.progress import Progress
from finealign.training.features import FeatureBank
from finealign.training.state import State
from finealign.types import ImageFeatures

HALVINGS = 6  # then the start is as good as reached
FARTHEST = 1e6  # stands for what is no longer finite, so that it can be written as JSON
LEAST_APART = 0.01  # crops no further from their images than this are no measure
LEAST_SPREAD = 1e-6  # images that lie no further from their mean than this are all alike


def drift(now: Tensor, start: ImageFeatures) -> float | None:
    """Compute how far images were moved, as a multiple of how far their crops lie from them at the start.

    now (n, D) are the features of whole images by the encoder as it is, ``start`` those of the same images and their
    crops before it learned; rows need not have length 1. 0 for images that were not moved, ``FARTHEST`` at most, also
    where a feature is not finite. None where crops are hardly told from their images. Images that are all alike have
    no spread to compare with, and are measured around the origin.
    """
    whole = normalize(start.weak.double(), dim=1)
    centre = whole.mean(0)
    if float((whole - centre).norm(dim=1).max()) < LEAST_SPREAD:
        centre = torch.zeros_like(centre)
    crops = _apart(normalize(start.crops[:, 0].double(), dim=1) - centre, whole - centre)
    if not crops > LEAST_APART:
        return None
    moved = _apart(normalize(now.to(whole), dim=1) - centre, whole - centre) / crops
    return min(moved, FARTHEST) if math.isfinite(moved) else FARTHEST


def _apart(first: Tensor, second: Tensor) -> float:
    """The mean cosine distance of rows."""
    return float(1 - torch.cosine_similarity(first, second, dim=1).mean())


@dataclass
class TrustRegion:
    """Holds the encoder back where it has moved images further than ``limit`` times as far as crops lie from them."""

    state: State
    source: FeatureBank
    limit: float
    progress: Progress
    first: Tensor | None  # (n,) positions of the images that the first label pass encodes; None: all
    start: dict[str, Tensor] = field(init=False)  # the normalisation parameters before they learned

    def __post_init__(self) -> None:
        self.start = {name: parameter.detach().clone() for name, parameter in self.state.norms.items()}

    @torch.no_grad()
    def hold(self, epoch: int, *, ended: bool) -> None:
        """Halve what the normalisation parameters have learned until images are moved no further than they may be.

        To be called before each epoch but the first, and looks where a label pass is due, and when training has
        ``ended``. ``state.drift`` becomes how far images were moved, and ``state.kept`` the share of what was learned
        that is kept; of several looks in an epoch the largest and the smallest. Nothing is done where no features of
        the start are kept, or crops are hardly told from images.
        """
        if not (ended or self.source.due(epoch)):
            return
        probe = self.source.probe(self.first)
        found = None if probe is None else self._drift(*probe)
        if probe is None or found is None:
            return
        learned = {name: parameter.detach().clone() for name, parameter in self.state.norms.items()}
        left, kept = found, 1.0
        for _ in range(HALVINGS):
            if left <= self.limit:
                break
            kept /= 2
            for name, parameter in self.state.norms.items():
                parameter.copy_(torch.lerp(self.start[name], learned[name], kept))
            left = self._drift(*probe) or 0.0
        self.state.drift = max(self.state.drift or 0.0, found)
        self.state.kept = min(self.state.kept, kept)
        if kept < 1:
            self.progress.caution(
                f"The encoder had moved images {found:.1f} times as far as it saw their crops from them, so {kept:.0%} "
                f"of what it had learned is kept, by which it is {left:.1f} times (training.drift_limit="
                f"{self.limit:g}). If this comes again, lower training.learning_rate."
            )

    def _drift(self, images: Tensor, start: ImageFeatures) -> float | None:
        """``drift`` of these images, the same on all ranks, which decide by it how often they encode together."""
        told = self.state.ranks.texts(repr(drift(self.source.encode_whole(images), start)))[0]
        return None if told == "None" else float(told)
