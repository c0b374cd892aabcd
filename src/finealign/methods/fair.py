"""FAIR (Ali et al., arXiv 2507.09615): learnable Class Description Anchors, LAS pseudo-labels, self-training weights.

The paper's equations are not public: what is marked [R] here and in the rooms this file calls is our reconstruction.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from finealign.alignment import class_description_anchors
from finealign.methods.base import SelfTrainingMethod, SelfTrainingOptions
from finealign.pseudo_labels import WeightKind, confusability, count_pairs, self_training_weight
from finealign.types import ImageFeatures, PseudoLabels, Score, TextFeatures


class FairOptions(SelfTrainingOptions):
    """FAIR's choices, all [R]."""

    weight: WeightKind = Field("margin*agreement", description="omega, the self-training weight")
    anchors_per_class: Annotated[int, Field(ge=1)] = Field(1, description="J, anchors a class starts with")


class Fair(SelfTrainingMethod):
    """Labels come from the crops by LAS on the anchors as they are now."""

    Options = FairOptions
    options: FairOptions
    uses_crops = True
    scores: ClassVar[tuple[Score, ...]] = ("las", "fused", "global")
    pair_counts: Tensor

    def __init__(self, options: FairOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        anchors = class_description_anchors(
            texts.descriptions, texts.class_of, num_classes=texts.num_classes, per_class=options.anchors_per_class
        )
        super().__init__(options, texts, anchors, logit_scale=logit_scale)
        # C x C: for many classes neither small nor quick, so only where the weight looks at it.
        classes = texts.num_classes if self._by_confusion else 0
        self.register_buffer("pair_counts", anchors.new_zeros(classes, classes))

    @property
    def _by_confusion(self) -> bool:
        return "confusion" in self.options.weight

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """Steps 3 to 6: q = softmax(s LAS), y its best class, omega the named weight."""
        probabilities = self.probabilities(self.score(features, "las"))
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


METHOD = Fair
