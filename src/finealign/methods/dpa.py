"""DPA (Ali et al., WACV 2025, arXiv 2408.08855): two prototypes a class, of texts and of images, that label together.

Written from its equations as METHOD gives them. Only the textual prototypes learn and predict.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from finealign.alignment import class_means, global_score
from finealign.losses import running_mean
from finealign.methods.base import (
    PUBLISHED_DECAY,
    PUBLISHED_PACE,
    SelfTrainingMethod,
    SelfTrainingOptions,
    Share,
)
from finealign.pseudo_labels import agreement_weight, balanced
from finealign.types import ImageFeatures, Loss, PseudoLabels, TextFeatures


class DpaOptions(SelfTrainingOptions):
    """DPA's choices."""

    image_share: Share = Field(0.7, description="a, share of the image prototypes' opinion in the label")
    align_weight: float = Field(1.0, ge=0, description="of the term that aligns the two prototypes")


class Dpa(SelfTrainingMethod):
    """y = argmax(a p_v + (1 - a) p_t); omega = (p_v[y] / max p_v)(p_t[y] / max p_t)."""

    Options = DpaOptions
    options: DpaOptions
    surveys = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The authors choose the learning rate for each data set, for which one stands here; their a we do not know.
        "published": {
            "training": {**PUBLISHED_PACE, **PUBLISHED_DECAY},
            "method": {"fairness": "batch", "fairness_weight": 1.0, "image_share": 0.5},
        }
    }
    image_prototypes: Tensor
    mean_text: Tensor

    def __init__(self, options: DpaOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)
        super().__init__(options, texts, means[:, None], logit_scale=logit_scale)
        self.register_buffer("image_prototypes", means.clone())
        self.register_buffer("mean_text", self.mean_prediction.clone())

    @torch.no_grad()
    def survey(self, weak: Tensor) -> None:
        """P_c = normalised mean of the images labelled c, before each epoch; a class without any keeps its P_c.

        Before the first survey P is T, so that the first labels are the texts' alone.
        """
        by_images, by_texts = self._opinions(weak, by_text_mean=None)
        labels = (self.options.image_share * by_images + (1 - self.options.image_share) * by_texts).argmax(1)
        means = class_means(weak, labels, self.num_classes)
        empty = means.norm(dim=1, keepdim=True) == 0
        self.image_prototypes.copy_(torch.where(empty, self.image_prototypes, means))

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        by_images, by_texts = self._opinions(features.weak, by_text_mean=self.mean_text)
        probabilities = self.options.image_share * by_images + (1 - self.options.image_share) * by_texts
        labels = probabilities.argmax(1)
        weights = agreement_weight(by_images, labels) * agreement_weight(by_texts, labels)
        return PseudoLabels(labels=labels, weights=weights, probabilities=probabilities)

    def _opinions(self, weak: Tensor, *, by_text_mean: Tensor | None) -> tuple[Tensor, Tensor]:
        """p_v and p_t of whole images, each (B, C); p_t is divided by its mean, the running one where given."""
        by_images = self.probabilities(weak @ self.image_prototypes.T)
        by_texts = self.probabilities(global_score(weak, self.classifier()))
        mean = by_texts.mean(0)
        if by_text_mean is not None:
            mean = running_mean(by_text_mean, mean, momentum=self._momentum(len(weak)))
            by_text_mean.copy_(mean)
        return by_images, balanced(by_texts, mean, 1.0)

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        """The self-training loss, and CE(s P T', identity): each image prototype nearest its class's text."""
        found = super().loss(strong, pseudo)
        logits = self.logit_scale * global_score(self.image_prototypes, self.classifier())
        align = cross_entropy(logits, torch.arange(self.num_classes, device=logits.device))
        return Loss(found.total + self.options.align_weight * align, {**found.parts, "align": align.detach()})


METHOD = Dpa
