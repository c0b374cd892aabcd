"""MUST (Li et al., ICLR 2023, arXiv 2206.02967): a slowly following teacher's sure labels, and fairness to classes.

Written from the paper's equations: its self-training alone. Its other half trains all weights of the tower to paint in
patches that are masked, and local features to resemble the whole image's. Scale and shift of normalisation layers
cannot learn that. The teacher follows the class vectors; of the image tower there is no second copy.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from finealign.method.alignment import class_means, global_score
from finealign.method.base import PUBLISHED_PACE, SelfTrainingMethod, SelfTrainingOptions, Share
from finealign.method.pseudo_labels import over_counted
from finealign.types import ImageFeatures, Loss, PseudoLabels, TextFeatures


class MustOptions(SelfTrainingOptions):
    """Options of MUST, besides those of the loss."""

    confidence: Share = Field(0.3, description="tau, the probability above which a label is learned from")
    teacher_start: Annotated[float, Field(ge=0, le=1)] = Field(0.99, description="mu, the teacher's momentum at first")
    teacher_end: Annotated[float, Field(ge=0, le=1)] = Field(0.9998, description="and after ``teacher_steps``")
    teacher_steps: Annotated[int, Field(ge=1)] = Field(500, description="in which it goes from the one to the other")


class Must(SelfTrainingMethod):
    """y = argmax_c p_c(weak), p by the teacher's anchors; omega = 1 where p_y > tau, else 0.

    The teacher's anchors are mu times what they were, and 1 - mu times the learned ones. The cross-entropy is a mean
    over the images that are learned from, the fairness term one over all.
    """

    Options = MustOptions
    options: MustOptions
    training_options = (
        *SelfTrainingMethod.training_options,
        "confidence",
        "teacher_start",
        "teacher_end",
        "teacher_steps",
    )
    training_state = (*SelfTrainingMethod.training_state, "teacher", "steps")
    begin_with_anchors = ("teacher",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # tau, the weight, the rate and the length are chosen by the authors for each set: tau from 0.3 to 0.7, most
        # often 0.7, the rate 1e-5 to 1e-4, with less of it for deeper layers. This preset has one of each.
        "published": {
            "training": {**PUBLISHED_PACE, "weight_decay": 0.05, "norm_weight_decay": 0.0},
            "method": {
                "confidence": 0.7,
                "fairness": "batch",
                "fairness_weight": 1.0,
                "class_prior": "even",
            },
        }
    }
    teacher: Tensor  # (C, 1, D)
    steps: Tensor  # () int64, that the teacher has followed

    def __init__(self, options: MustOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)[:, None]
        super().__init__(options, texts, means, logit_scale=logit_scale)
        self.register_buffer("teacher", means.clone())
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=means.device))

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """Have the teacher follow the anchors, then label whole images by it, with weight 1 where it is sure."""
        options = self.options
        along = (self.steps / options.teacher_steps).clamp_max(1)
        momentum = options.teacher_start + (options.teacher_end - options.teacher_start) * along
        self.teacher.copy_(torch.lerp(self.classifier(), self.teacher, momentum.to(self.teacher)))
        self.steps += 1
        probabilities = self.probabilities(global_score(features.weak, normalize(self.teacher, dim=-1)))
        sure, labels = probabilities.max(1)
        return PseudoLabels(labels, (sure > options.confidence).to(probabilities), probabilities)

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        """Compute the self-training loss, its cross-entropy as a mean over the images that are learned from."""
        return super().loss(strong, over_counted(pseudo))


METHOD = Must
