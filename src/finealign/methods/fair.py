"""FAIR (Ali et al., arXiv 2507.09615): learnable Class Description Anchors, LAS pseudo-labels, self-training weights.

The paper's equations are not public: what is marked [R] here and in the rooms this file calls is our reconstruction.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from finealign.alignment import class_description_anchors, learned_alignment_score
from finealign.losses import running_mean
from finealign.methods.base import SelfTrainingMethod, SelfTrainingOptions, Share
from finealign.pseudo_labels import WeightKind, balanced, confusability, count_pairs, self_training_weight
from finealign.types import ImageFeatures, PseudoLabels, Score, TextFeatures


class FairOptions(SelfTrainingOptions):
    """FAIR's choices, all [R]."""

    weight: WeightKind = Field("margin*agreement", description="omega, the self-training weight")
    anchors_per_class: Annotated[int, Field(ge=1)] = Field(1, description="J, anchors a class starts with")
    fixed_share: Share = Field(0.0, description="gamma, share of the fixed description score in the label's score")
    teacher_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="of the running mean of the anchors that labels; 0: the anchors as they are"
    )
    label_balance: Share = Field(0.0, description="how far labels are evened out over the classes; 1: all the way")


class Fair(SelfTrainingMethod):
    """Labels come from the crops by LAS on the anchors as they are now."""

    Options = FairOptions
    options: FairOptions
    uses_crops = True
    settles = True
    scores: ClassVar[tuple[Score, ...]] = ("las", "fused", "global")
    pair_counts: Tensor
    fixed: Tensor
    teacher: Tensor
    mean_label: Tensor

    def __init__(self, options: FairOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        anchors = class_description_anchors(
            texts.descriptions, texts.class_of, num_classes=texts.num_classes, per_class=options.anchors_per_class
        )
        super().__init__(options, texts, anchors, logit_scale=logit_scale)
        # C x C: for many classes neither small nor quick, so only where the weight looks at it.
        classes = texts.num_classes if self._by_confusion else 0
        self.register_buffer("pair_counts", anchors.new_zeros(classes, classes))
        self.register_buffer("fixed", anchors.clone())
        self.register_buffer("teacher", anchors.clone())
        self.register_buffer("mean_label", self.mean_prediction.clone())

    @property
    def _by_confusion(self) -> bool:
        return "confusion" in self.options.weight

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """Steps 3 to 6: q = softmax(s LAS), y its best class, omega the named weight."""
        momentum = self.options.teacher_momentum
        self.teacher.mul_(momentum).add_(self.classifier(), alpha=1 - momentum)
        probabilities = self._balanced(self.probabilities(self._label_score(features)))
        labels = probabilities.argmax(1)
        confusable = None
        if self._by_confusion:
            confusable = confusability(normalize(self.classifier().mean(1), dim=-1), self.pair_counts)
        weights = self_training_weight(
            self.options.weight,
            probabilities=probabilities,
            global_probabilities=self.probabilities(self.score(features, "global")),
            labels=labels,
            confusable=confusable,
        )
        if self._by_confusion:
            self.pair_counts += count_pairs(probabilities)
        return PseudoLabels(labels=labels, weights=weights, probabilities=probabilities)

    def _label_score(self, features: ImageFeatures) -> Tensor:
        """LAS on the teacher's anchors, mixed with LAS on the descriptions as they were: (B, C). [R: the mixture]"""
        weights, share = self.crop_weights(features), self.options.fixed_share
        learned = learned_alignment_score(features.crops, weights, normalize(self.teacher, dim=-1))
        if not share:
            return learned
        return (1 - share) * learned + share * learned_alignment_score(features.crops, weights, self.fixed)

    def _balanced(self, probabilities: Tensor) -> Tensor:
        """Against collapse into few classes: the probabilities over their running mean, as far as the option says."""
        mean = running_mean(self.mean_label, probabilities.mean(0), momentum=self._momentum(len(probabilities)))
        self.mean_label.copy_(mean)
        return balanced(probabilities, mean, self.options.label_balance)


METHOD = Fair
