"""FAIR (Ali et al., arXiv 2507.09615): learnable Class Description Anchors, LAS pseudo-labels, self-training weights.

The paper's equations are not public: what is marked [R] here and in ``finealign.method`` is our reconstruction. Step
numbers are those of docs/method.md. ``fair`` is the reconstruction and our extensions; the preset
``fair@reconstruction`` is the reconstruction alone.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from finealign.method.alignment import class_description_anchors
from finealign.method.base import PUBLISHED_PACE, SelfTrainingMethod, SelfTrainingOptions, Share
from finealign.method.losses import running_mean
from finealign.method.pseudo_labels import WeightKind, balanced, confusability, count_pairs, self_training_weight
from finealign.types import ImageFeatures, PseudoLabels, Score, TextFeatures

# Steps 1 to 9 with the values of the reconstruction [R] and none of our extensions. Every value is written out, so that
# a change of the defaults leaves it as it is. The running mean of the fairness term is the batch's mean where classes
# are few against the batch.
RECONSTRUCTION: Mapping[str, Mapping[str, Any]] = {
    "views": {
        "crops": 8,
        "crop_low": 0.5,
        "crop_high": 0.9,
        "strong_low": 0.3,
        "randaugment": "rand-m9-mstd0.5-inc1",
        "refresh_epochs": 0,
    },
    "method": {
        "logit_scale": "auto",
        "crops_kept": "all",
        "crop_temperature": 1.0,
        "weight": "margin*agreement",
        "anchors_per_class": 1,
        "fixed_share": 0.0,
        "teacher_momentum": 0.0,
        "label_balance": 0.0,
        "fairness": "running",
        "fairness_weight": 1.0,
        "fairness_temperature": 1.0,
        "fairness_window": "auto",
        "class_prior": "even",
        "whole_share": 0.0,
        "label_weight": 1.0,
        "text_images": 8.0,
    },
    "training": {
        **PUBLISHED_PACE,
        "learn": "norms+anchors",
        "final_learning_rate": 2e-6,
        "weight_decay": 0.1,
        "norm_weight_decay": 0.0,
        "anchor_steps": 0,
        "last_label_pass": False,
    },
    "prediction": {"score": "las", "calibrate": False, "class_prior": "even"},
}


class FairOptions(SelfTrainingOptions):
    """Options of FAIR, all [R], besides those of the loss."""

    weight: WeightKind = Field("margin*agreement", description="omega, the self-training weight")
    anchors_per_class: Annotated[int, Field(ge=1)] = Field(1, description="J, anchors a class starts with")
    fixed_share: Share = Field(0.0, description="gamma, share of the fixed description score in the label's score")
    teacher_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.8, description="of the running mean of the anchors that labels; 0: the anchors as they are"
    )
    label_balance: Share = Field(0.0, description="how far labels are evened out over the classes; 1: all the way")


class Fair(SelfTrainingMethod):
    """Images are labelled by their crops' LAS, mixed with the whole image's score where crops are not trusted. [ours]

    The anchors are the current ones, or a running mean of them.
    """

    Options = FairOptions
    options: FairOptions
    training_options = (
        *SelfTrainingMethod.training_options,
        "weight",
        "fixed_share",
        "teacher_momentum",
        "label_balance",
    )
    training_state = (*SelfTrainingMethod.training_state, "pair_counts", "fixed", "teacher", "mean_label")
    uses_crops = True
    settles = True
    begin_with_anchors = ("fixed", "teacher")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"reconstruction": RECONSTRUCTION}
    scores: ClassVar[tuple[Score, ...]] = ("fused", "las", "global")
    pair_counts: Tensor  # (C, C), sum of ``count_pairs``; (0, 0) where the weight does not use it
    fixed: Tensor  # (C, J, D), the anchors before training
    teacher: Tensor  # (C, J, D), running mean of the anchors
    mean_label: Tensor  # (C,), running mean of the label probabilities

    def __init__(self, options: FairOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        anchors = class_description_anchors(
            texts.descriptions, texts.class_of, num_classes=texts.num_classes, per_class=options.anchors_per_class
        )
        super().__init__(options, texts, anchors, logit_scale=logit_scale)
        # A C x C matrix is large and slow for many classes, so it is kept only where the weight uses it.
        classes = texts.num_classes if self._by_confusion else 0
        self.register_buffer("pair_counts", anchors.new_zeros(classes, classes))
        self.register_buffer("fixed", anchors.clone())
        self.register_buffer("teacher", anchors.clone())
        self.register_buffer("mean_label", self.mean_prediction.clone())

    def expect(self, class_prior: Tensor, *, estimated: bool = False) -> None:
        """Begin the running mean of the label probabilities at the prior, too."""
        super().expect(class_prior, estimated=estimated)
        self.mean_label.copy_(class_prior)

    @property
    def _by_confusion(self) -> bool:
        return "confusion" in self.options.weight

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """Steps 3 to 6 of the method: q = softmax(s score), y = argmax q, omega the weight that the options name.

        The score is ``fused``, which is LAS, as in the paper, where ``whole_share`` is 0. Also updates the teacher, the
        running mean of the probabilities and the pair counts.
        """
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
        """The score with the teacher's anchors, mixed with that of the initial anchors: (B, C). [R: the mixture]"""
        share = self.options.fixed_share
        learned = self.score_by(normalize(self.teacher, dim=-1), features, "fused")
        return (1 - share) * learned + share * self.score_by(self.fixed, features, "fused") if share else learned

    def _balanced(self, probabilities: Tensor) -> Tensor:
        """Divide the probabilities by their running mean to the power ``label_balance``, against class collapse."""
        mean = running_mean(self.mean_label, probabilities.mean(0), momentum=self._momentum(len(probabilities)))
        self.mean_label.copy_(mean)
        return balanced(probabilities, mean, self.class_prior, self.options.label_balance)


METHOD = Fair
