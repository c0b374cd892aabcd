"""TransCLIP, zero-shot (Zanella et al., NeurIPS 2024, arXiv 2406.01837): labels all images jointly, trains nothing.

It assumes that every class is among the images: where many are absent, it ends below its start. The published figures
are those of its authors' solver in the code of StatA, in which the class means start from the texts.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch.nn.functional import normalize

from finealign.method.mixture import LEAST_VARIANCE, squared_deviations, weighted_means
from finealign.method.transductive import TransductiveMethod, TransductiveOptions
from finealign.types import TextFeatures


class TransclipOptions(TransductiveOptions):
    """Options of TransCLIP; the defaults are those of its authors' solver."""

    confident: Annotated[int, Field(ge=0)] = Field(
        0, description="most confident images a class, the paper's 8, that its mean starts from; 0: from the text"
    )


class Transclip(TransductiveMethod):
    """The assignments of ``TransductiveMethod``, with one diagonal covariance that all classes share."""

    Options = TransclipOptions
    options: TransclipOptions
    training_options = (*TransductiveMethod.training_options, "confident")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {}}  # the defaults are the published values

    def __init__(self, options: TransclipOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        width = texts.descriptions.shape[1]
        super().__init__(options, texts, logit_scale=logit_scale, variance_shape=(width,))

    def begin(self) -> None:
        """Start from the texts, or from each class's most confident images weighted by confidence; v is 1 / D."""
        self.means.copy_(self.prototypes)
        if self.options.confident:
            best = self.assigned.topk(min(self.options.confident, len(self.images)), dim=0)  # (confident, C)
            means = torch.zeros_like(self.means)
            for confidence, image in zip(best.values, best.indices, strict=True):
                means += confidence[:, None] * self.images[image]
            self.means.copy_(normalize(means, dim=1))
        self.variance.fill_(1 / self.images.shape[1])

    def refit(self) -> None:
        """mu_c is the unit mean of the images by their share in class c, v the mean squared deviation from them."""
        some = self.assigned.sum(0)[:, None] > 1e-6  # a class that nothing is assigned to keeps its mean
        means = normalize(weighted_means(self.assigned, self.images), dim=1)
        self.means.copy_(torch.where(some, means, self.means))
        deviations = squared_deviations(self.assigned, self.images, self.means)
        self.variance.copy_((deviations.sum(0) / len(self.images)).clamp_min(LEAST_VARIANCE))


METHOD = Transclip
