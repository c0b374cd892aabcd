"""The self-training baseline: labels from a fixed text classifier on the whole image, all with weight 1."""

import torch
from torch import Tensor

from finealign.method.alignment import class_means, global_score
from finealign.method.base import SelfTrainingMethod, SelfTrainingOptions
from finealign.types import ImageFeatures, PseudoLabels, TextFeatures


class SelfTraining(SelfTrainingMethod):
    """y = argmax_c <g_weak, T_c>, where T_c is the fixed, normalised mean of the class's descriptions; omega = 1."""

    Options = SelfTrainingOptions
    training_state = (*SelfTrainingMethod.training_state, "fixed")
    begin_with_anchors = ("fixed",)
    fixed: Tensor  # (C, 1, D), the means of the descriptions

    def __init__(self, options: SelfTrainingOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)[:, None]
        super().__init__(options, texts, means, logit_scale=logit_scale)
        self.register_buffer("fixed", means)

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """Label each whole image by the fixed classifier, with weight 1."""
        return self.fully_believed(self.probabilities(global_score(features.weak, self.fixed)))


METHOD = SelfTraining
