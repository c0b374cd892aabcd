"""The self-training base: labels from a fixed text classifier on the whole image, every one fully believed."""

import torch
from torch import Tensor

from finealign.alignment import class_means, global_score
from finealign.methods.base import SelfTrainingMethod, SelfTrainingOptions
from finealign.types import ImageFeatures, PseudoLabels, TextFeatures


class SelfTraining(SelfTrainingMethod):
    """y = argmax_c <g_weak, T_c> with T_c the mean of the class's descriptions, fixed; omega = 1."""

    Options = SelfTrainingOptions
    fixed: Tensor

    def __init__(self, options: SelfTrainingOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)[:, None]
        super().__init__(options, texts, means, logit_scale=logit_scale)
        self.register_buffer("fixed", means)

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        probabilities = self.probabilities(global_score(features.weak, self.fixed))
        labels = probabilities.argmax(1)
        return PseudoLabels(labels=labels, weights=torch.ones_like(probabilities[:, 0]), probabilities=probabilities)


METHOD = SelfTraining
