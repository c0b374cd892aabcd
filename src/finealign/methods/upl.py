"""UPL (Huang et al., arXiv 2204.03649): learns from the images that CLIP is surest of, as many of each class.

Written from the paper's equations. UPL learns prompt tokens that all classes share. Here the class vectors themselves
learn, each by itself, so this is UPL's choice of images and not its way to learn.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from finealign.method.alignment import class_means, global_score
from finealign.method.base import PUBLISHED_PACE, SelfTrainingMethod, SelfTrainingOptions
from finealign.method.pseudo_labels import over_counted
from finealign.types import ImageFeatures, Loss, PseudoLabels, TextFeatures


class UplOptions(SelfTrainingOptions):
    """Options of UPL, besides those of the loss."""

    confident: Annotated[int, Field(ge=1)] = Field(16, description="K, images of each class that are learned from")


class Upl(SelfTrainingMethod):
    """y = argmax_c <g_weak, T_c>, T fixed; omega = 1 for the K likeliest images of each label, 0 for all others.

    The loss is a mean over the images that are learned from.
    """

    Options = UplOptions
    options: UplOptions
    training_options = (*SelfTrainingMethod.training_options, "confident")
    training_state = (*SelfTrainingMethod.training_state, "fixed", "images", "chosen")
    sized_by_images = ("images", "chosen")
    begin_with_anchors = ("fixed",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The image tower is frozen, and the loss has no fairness term. The authors train prompts with SGD at a rate of
        # 2e-3, which says nothing of the rate here.
        "published": {
            "views": {"strong_low": 0.08, "randaugment": "rand-n0"},
            "training": {**PUBLISHED_PACE, "encoder": "frozen", "epochs": 50, "batch_size": 32},
            "method": {"confident": 16, "fairness": "off"},
        }
    }
    fixed: Tensor  # (C, 1, D), T, the means of the descriptions
    images: Tensor  # (n, D), as they were surveyed
    chosen: Tensor  # (n,) bool, those that are learned from

    def __init__(self, options: UplOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)[:, None]
        super().__init__(options, texts, means, logit_scale=logit_scale)
        self.register_buffer("fixed", means)
        self.register_buffer("images", means[:0, 0])  # n is 0 until the method has surveyed
        self.register_buffer("chosen", torch.zeros(0, dtype=torch.bool, device=means.device))

    @torch.no_grad()
    def survey(self, weak: Tensor, known: Tensor | None = None) -> None:
        """Choose the images to learn from, given the weak features of all images, (n, D).

        Images of a ``known`` class, (n,), keep their places among the K.
        """
        self.images = weak.to(self.fixed)
        sure, labels = self._by_texts(self.images).max(1)
        self.chosen = torch.zeros_like(sure, dtype=torch.bool)
        for c in range(self.num_classes):
            of_class = (labels == c).nonzero().squeeze(1)
            best = sure[of_class].topk(min(self.options.confident, len(of_class))).indices
            self.chosen[of_class[best]] = True

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """Label whole images by the fixed texts; weight 1 if the surveyed image nearest to it, itself, is chosen.

        Before any survey all are.
        """
        found = self.fully_believed(self._by_texts(features.weak))
        if not len(self.images):
            return found
        nearest = (features.weak @ self.images.T).argmax(1)
        return replace(found, weights=self.chosen[nearest].to(found.weights))

    def _by_texts(self, weak: Tensor) -> Tensor:
        return self.probabilities(global_score(weak, self.fixed))

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        """Compute the self-training loss, as a mean over the images that are learned from."""
        return super().loss(strong, over_counted(pseudo))


METHOD = Upl
