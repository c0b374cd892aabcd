"""TransCLIP, few-shot (Zanella et al., NeurIPS 2024, arXiv 2406.01837): labels all images jointly, given some labels.

Needs labels, and trains nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from finealign.config import Auto
from finealign.method.few_labels import class_sums
from finealign.method.mixture import LEAST_VARIANCE, squared_deviations
from finealign.method.transductive import TransductiveMethod, TransductiveOptions
from finealign.types import TextFeatures

# gamma, as its authors' solver has it: the values tried, each times the damping of 50.
TRIED = (0.1, 0.5, 1.0, 10.0)


class TransclipFewShotOptions(TransductiveOptions):
    """Options of TransCLIP with labels; the defaults are those of its authors' solver."""

    text_power: Annotated[float, Field(ge=0)] = Field(0.5, description="lambda, how much the texts' opinion counts")
    labelled_share: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto",
        description="gamma, what all labelled images count for in means and variance where all others count 1; auto: "
        "the one of 0.1, 0.5, 1 and 10 by which the unlabelled images nearest to labelled ones get their classes",
    )


class TransclipFewShot(TransductiveMethod):
    """The assignments of ``TransductiveMethod`` with z_i = y_i for the labelled images S; Q are the others.

    mu_c = unit(gamma mean_S(z_ic f_i) + mean_Q(z_ic f_i)), and v, one for all classes, is the mean of (f_i - mu_c)^2
    by z_ic, with the same weights. The authors choose gamma on further labelled images; here are none, so ``auto``
    asks the labelled images themselves.
    """

    Options = TransclipFewShotOptions
    options: TransclipFewShotOptions
    training_options = (*TransductiveMethod.training_options, "labelled_share")
    known_labels: ClassVar[Literal["refused", "taken", "needed"]] = "needed"
    _weights: Tensor  # (n,)
    _known: Tensor  # (n,) int64
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {}}  # the defaults are the published values

    def __init__(self, options: TransclipFewShotOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        width = texts.descriptions.shape[1]
        super().__init__(options, texts, logit_scale=logit_scale, variance_shape=(width,))
        # Of the images, while they are fitted: what each counts for, and its known class.
        self.register_buffer("_weights", self.prototypes.new_zeros(0), persistent=False)
        self.register_buffer("_known", torch.zeros(0, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def survey(self, weak: Tensor, known: Tensor | None = None) -> None:
        """Fit to the weak features of all images, (n, D), of which at least one has a ``known`` class, (n,)."""
        if known is None or not bool((known >= 0).any()):
            raise ValueError("TransCLIP few-shot needs known labels")
        self._known = known = known.to(weak.device)
        labelled = known >= 0
        others = int((~labelled).sum())
        asked, best = self.options.labelled_share, (-1.0, 0.0)
        nearest = self._nearest_others(weak, labelled) if others else None
        for gamma in TRIED if asked == "auto" else (asked,):
            each = gamma / int(labelled.sum()) if others else 1.0
            self._weights = torch.where(labelled, each, 1 / max(1, others)).to(self.prototypes)
            super().survey(weak, known)
            right = 0.0 if nearest is None else float((self.assigned[nearest].argmax(1) == known[labelled]).sum())
            if right > best[0]:
                best, kept = (right, gamma), (self.means.clone(), self.variance.clone(), self.assigned)
        means, variance, self.assigned = kept
        self.means.copy_(means)
        self.variance.copy_(variance)

    def begin(self) -> None:
        """Start from the means of the labelled images, or of a class without any from the text; v is 1 / D."""
        sums, counts = class_sums(self.images, self._known, self.num_classes)
        self.means.copy_(torch.where(counts[:, None] > 0, normalize(sums, dim=1), self.prototypes))
        self.variance.fill_(1 / self.images.shape[1])

    def refit(self) -> None:
        """Set mu and v as the class's description has them."""
        weighed = self._weights[:, None] * self.assigned
        some = weighed.sum(0)[:, None] > 1e-6  # a class that nothing is assigned to keeps its mean
        self.means.copy_(torch.where(some, normalize(weighed.T @ self.images, dim=1), self.means))
        deviations = squared_deviations(weighed, self.images, self.means)
        self.variance.copy_((deviations.sum(0) / self._weights.sum()).clamp_min(LEAST_VARIANCE))

    @staticmethod
    def _nearest_others(weak: Tensor, labelled: Tensor) -> Tensor:
        """The unlabelled image nearest to each labelled one, by its number: (n, D), (n,) -> (L,)."""
        return (weak[labelled] @ weak.T).masked_fill(labelled, -torch.inf).argmax(1)


METHOD = TransclipFewShot
