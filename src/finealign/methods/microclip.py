"""microCLIP (Silva et al., arXiv 2510.02270): salient patches beside the whole image, a fixed and a learned classifier.

Written from METHOD's summary of its equations. A whole image's embedding is the mean of the tower's own and that of
its salient patches (``backbone.Gaze``), so it needs a transformer tower.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from finealign.alignment import class_means, global_score, learned_alignment_score
from finealign.methods.base import (
    PUBLISHED_DECAY,
    PUBLISHED_PACE,
    SelfTrainingMethod,
    SelfTrainingOptions,
    Share,
)
from finealign.types import ImageFeatures, PseudoLabels, TextFeatures


class MicroclipOptions(SelfTrainingOptions):
    """microCLIP's choices."""

    fixed_share: Share = Field(0.5, description="share of the fixed classifier's score of the crops in the label")


class Microclip(SelfTrainingMethod):
    """y = argmax of half <crops, T> by relevance and half <fused token, A>; omega = 1."""

    Options = MicroclipOptions
    options: MicroclipOptions
    uses_crops = True
    salient = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {
            "training": {**PUBLISHED_PACE, **PUBLISHED_DECAY},
            "method": {"fairness": "batch", "fairness_weight": 1.0},
        }
    }
    fixed: Tensor

    def __init__(self, options: MicroclipOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)[:, None]
        super().__init__(options, texts, means, logit_scale=logit_scale)
        self.register_buffer("fixed", means)

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        by_crops = learned_alignment_score(features.crops, self.crop_weights(features), self.fixed)
        by_token = global_score(features.weak, self.classifier())
        share = self.options.fixed_share
        probabilities = self.probabilities(share * by_crops + (1 - share) * by_token)
        labels = probabilities.argmax(1)
        return PseudoLabels(labels=labels, weights=torch.ones_like(probabilities[:, 0]), probabilities=probabilities)


METHOD = Microclip
