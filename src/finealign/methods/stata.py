"""StatA (Zanella et al., CVPR 2025, arXiv 2501.03729): TransCLIP for folders in which classes may be few or absent.

Trains nothing. A class that few images are assigned to stays near its text, so that it attracts no others.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from finealign.method.mixture import LEAST_VARIANCE, squared_deviations, weighted_means
from finealign.method.transductive import TransductiveMethod, TransductiveOptions
from finealign.types import TextFeatures


class StataOptions(TransductiveOptions):
    """Options of StatA; the defaults are the published values."""

    text_images: Annotated[float, Field(gt=0)] = Field(1.0, description="alpha, as how many images a text counts")


class Stata(TransductiveMethod):
    """The assignments of ``TransductiveMethod``, with a diagonal covariance a class, and texts that hold the means.

    With n_c the images whose most probable class is c, beta_c = n_c / (alpha + n_c) is how far class c follows its
    images, and 1 - beta_c how far it stays at its text.
    """

    Options = StataOptions
    options: StataOptions
    training_options = (*TransductiveMethod.training_options, "text_images")
    training_state = (*TransductiveMethod.training_state, "text_variance")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {}}  # the defaults are the published values
    text_variance: Tensor  # (D,), S_0, the mean squared deviation of the images from the texts

    def __init__(self, options: StataOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        shape = (texts.num_classes, texts.descriptions.shape[1])
        super().__init__(options, texts, logit_scale=logit_scale, variance_shape=shape)
        self.register_buffer("text_variance", torch.full_like(self.prototypes[0], 1 / shape[1]))

    def begin(self) -> None:
        """Start from the texts: mu_c = T_c, and v_c = S_0 for all classes."""
        deviations = squared_deviations(self.assigned, self.images, self.prototypes)
        self.text_variance.copy_((deviations.sum(0) / len(self.images)).clamp_min(LEAST_VARIANCE))
        self.means.copy_(self.prototypes)
        self.variance.copy_(self.text_variance.expand_as(self.variance))

    def refit(self) -> None:
        """Mix images and text. m_c is the mean of the images by their share in c, S_c their deviation from mu_c.

        mu_c = unit(beta_c unit(m_c) + (1 - beta_c) T_c), v_c = beta_c S_c + (1 - beta_c)(S_0 + (T_c - mu_c)^2).
        """
        count = torch.bincount(self.assigned.argmax(1), minlength=self.num_classes).to(self.prototypes)
        beta = (count / (self.options.text_images + count))[:, None]
        means = normalize(weighted_means(self.assigned, self.images), dim=1)
        self.means.copy_(normalize(beta * means + (1 - beta) * self.prototypes, dim=1))
        deviations = squared_deviations(self.assigned, self.images, self.means)
        own = deviations / self.assigned.sum(0).clamp_min(1e-12)[:, None]
        by_text = self.text_variance + (self.prototypes - self.means).square()
        self.variance.copy_((beta * own + (1 - beta) * by_text).clamp_min(LEAST_VARIANCE))


METHOD = Stata
