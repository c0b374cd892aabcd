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


def drift(now: Tensor, start: ImageFeatures) -> float:
    """Compute how far images were moved, as a multiple of how far their crops lie from them at the start.

    now (n, D) are the features of whole images by the encoder as it is, ``start`` those of the same images and their
    crops before it learned; rows need not have length 1. 0 for images that were not moved; infinity where a feature is
    not finite, or for images that were moved though their crops do not differ from them.
    """
    whole = normalize(start.weak.double(), dim=1)
    centre = whole.mean(0)
    moved = _apart(normalize(now.to(whole), dim=1) - centre, whole - centre)
    crops = _apart(normalize(start.crops[:, 0].double(), dim=1) - centre, whole - centre)
    if not math.isfinite(moved):
        return math.inf
    return moved / crops if crops > 0 else (math.inf if moved > 0 else 0.0)


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
        that is kept. Nothing is done where no features of the start are kept.
        """
        if not (ended or self.source.due(epoch)):
            return
        probe = self.source.probe(self.first)
        if probe is None:
            return
        images, seen = probe
        learned = {name: parameter.detach().clone() for name, parameter in self.state.norms.items()}
        self.state.drift = left = drift(self.source.encode_whole(images), seen)
        self.state.kept = 1.0
        for _ in range(HALVINGS):
            if left <= self.limit:
                break
            self.state.kept /= 2
            for name, parameter in self.state.norms.items():
                parameter.copy_(torch.lerp(self.start[name], learned[name], self.state.kept))
            left = drift(self.source.encode_whole(images), seen)
        if self.state.kept < 1:
            self.progress.caution(
                f"The encoder had moved images {self.state.drift:.1f} times as far as it saw their crops from them, so "
                f"{self.state.kept:.0%} of what it had learned is kept (training.drift_limit={self.limit:g}). If this "
                "comes again, lower training.learning_rate."
            )
