"""POUF (Tanwisuth et al., ICML 2023, arXiv 2305.00350): brings texts and images together without labels for either.

Written from the paper's equations. It has no pseudo-labels: its loss is a cost of transport between images and texts,
less what a class tells of an image. The authors train both towers, or prompt tokens; here the class vectors learn in
place of the text tower.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from finealign.method.alignment import class_means, global_score
from finealign.method.base import PUBLISHED_PACE, SelfTrainingMethod, SelfTrainingOptions
from finealign.types import ImageFeatures, Loss, PseudoLabels, TextFeatures


class PoufOptions(SelfTrainingOptions):
    """Options of POUF. Of those of the other losses ``fairness`` and its kin are those of H(p), the others unused."""

    entropy_weight: float = Field(0.3, ge=0, description="of the entropy of each image's prediction")


class Pouf(SelfTrainingMethod):
    """transport + a mean_x H(p(x)) + b KL(pbar || pi), with p(x) = softmax_c(s <g, A_c>), pbar its mean, pi the prior.

    transport = mean_x sum_c p_c(x) (1 - <g, A_c>) + mean_c sum_x q_x(c) (1 - <g, A_c>), where q(c) is the softmax of
    the same logits over the images of the batch. The last two terms are, with even shares pi and a = b, a times the
    mutual information of images and classes, turned round; a is ``entropy_weight``, b ``fairness_weight``.
    """

    Options = PoufOptions
    options: PoufOptions
    training_options = (*SelfTrainingMethod.training_options, "entropy_weight")
    known_labels: ClassVar[Literal["refused", "taken", "needed"]] = "refused"  # there is no term for them
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The authors train with SGD, whose rates say nothing of those here, for 10 epochs of 500 batches of 96.
        "published": {
            "views": {"strong_low": 0.08, "randaugment": "rand-n0"},
            "training": {**PUBLISHED_PACE, "batch_size": 96, "weight_decay": 1e-3, "norm_weight_decay": 1e-3},
            "method": {"entropy_weight": 0.3, "fairness": "batch", "fairness_weight": 0.3, "class_prior": "even"},
        }
    }

    def __init__(self, options: PoufOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)[:, None]
        super().__init__(options, texts, means, logit_scale=logit_scale)

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """Say what the anchors make of whole images. Of it the loss only looks at how much an image counts."""
        return self.fully_believed(self.probabilities(self.score(features, "global")))

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        """Compute the three terms of strong views (B, D), in which an image counts by its weight."""
        cosines = global_score(strong, self.classifier())
        logits, counts = self.logit_scale * cosines, pseudo.weights
        transport = transport_cost(cosines, logits, counts)
        entropy = -(counts * _plogp(torch.log_softmax(logits, dim=1)).sum(1)).mean()
        parts = {"transport": transport.detach(), "entropy": entropy.detach()}
        total = transport + self.options.entropy_weight * entropy
        if self.options.fairness == "off":
            return Loss(total, parts)
        mean = self._mean_of(logits, pseudo).clamp_min(torch.finfo(logits.dtype).tiny)
        unfair = (mean * (mean / self.class_prior.clamp_min(torch.finfo(logits.dtype).tiny)).log()).sum()
        return Loss(total + self._pull_at(mean.detach()) * unfair, {**parts, "fairness": unfair.detach()})


def transport_cost(cosines: Tensor, logits: Tensor, counts: Tensor) -> Tensor:
    """Compute the mean cost of going from images to classes, and that of going from classes to images: a scalar.

    cosines and logits (B, C), counts (B,) in [0, 1], how much each image counts. A cost is 1 less the cosine.
    """
    cost = 1 - cosines
    to_classes = (torch.softmax(logits, dim=1) * cost).sum(1)
    held = counts.clamp_min(torch.finfo(logits.dtype).tiny).log()[:, None]
    to_images = (torch.softmax(logits + held, dim=0) * cost).sum(0)
    return (counts * to_classes).mean() + to_images.mean()


def _plogp(log_probabilities: Tensor) -> Tensor:
    return log_probabilities.exp() * log_probabilities


METHOD = Pouf
