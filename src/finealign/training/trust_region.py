"""Keep the encoder near its start: how far it may move images while its normalisation parameters learn. Ours."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from finealign.runtime.progress import Progress
from finealign.training.features import FeatureBank
from finealign.training.state import State

HALVINGS = 6  # then the start is as good as reached


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
        found = None if probe is None else self.source.moved(*probe)
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
            left = self.source.moved(*probe) or 0.0
        self.state.drift = max(self.state.drift or 0.0, found)
        self.state.kept = min(self.state.kept, kept)
        if kept < 1:
            self.progress.caution(
                f"The encoder had moved images {found:.1f} times as far as it saw their crops from them, so {kept:.0%} "
                f"of what it had learned is kept, by which it is {left:.1f} times (training.drift_limit="
                f"{self.limit:g}). If this comes again, lower training.learning_rate."
            )
