"""microCLIP (Silva et al., arXiv 2510.02270): embeds salient patches too; a fixed and a learned classifier label.

Written from a summary of the paper's equations. The embedding of a whole image is the mean of the tower's own and that
of its salient patches (``finealign.types.Gaze``), so the method needs a transformer tower.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from finealign.errors import ConfigError
from finealign.method.alignment import class_means, global_score, learned_alignment_score
from finealign.method.base import PUBLISHED_DECAY, PUBLISHED_PACE, SelfTrainingMethod, SelfTrainingOptions, Share
from finealign.types import Gaze, ImageFeatures, PseudoLabels, TextFeatures


class MicroclipOptions(SelfTrainingOptions):
    """Options of microCLIP, besides those of the loss."""

    fixed_share: Share = Field(0.5, description="share of the fixed classifier's score of the crops in the label")


class Microclip(SelfTrainingMethod):
    """y = argmax_c(b LAS(crops, T_c) + (1 - b) <g, A_c>); omega = 1.

    T is the fixed mean of the descriptions, A the learned anchors, g the embedding of the whole image fused with that
    of its salient patches, and b is ``fixed_share``, by default a half.
    """

    Options = MicroclipOptions
    options: MicroclipOptions
    begin_with_anchors = ("fixed",)
    uses_crops = True
    training_options = (*SelfTrainingMethod.training_options, "fixed_share")
    training_state = (*SelfTrainingMethod.training_state, "fixed")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {
            "training": {**PUBLISHED_PACE, **PUBLISHED_DECAY},
            "method": {"fairness": "batch", "fairness_weight": 1.0, "class_prior": "even"},
        }
    }
    fixed: Tensor  # (C, 1, D), the means of the descriptions

    def __init__(self, options: MicroclipOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)[:, None]
        super().__init__(options, texts, means, logit_scale=logit_scale)
        self.register_buffer("fixed", means)

    def suit_tower(self, width: int) -> None:
        """Raise ConfigError for a tower without tokens, whose patches could not be pooled."""
        if not width:
            raise ConfigError(
                "method.name: microclip pools patch tokens, and this backbone's image tower has none. "
                "Wanted: an open_clip vision transformer, as ViT-B-32-quickgelu/openai; or another method."
            )

    @property
    def gaze(self) -> Gaze:
        """Half the tower's own embedding, half that of the salient patches."""
        return Gaze(self.prompts, salient=True)

    @property
    def weak_gaze(self) -> Gaze:
        """The same, without prompts."""
        return Gaze(salient=True)

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """Label images by the fixed classifier on crops and the learned one on whole images, all with weight 1."""
        by_crops = learned_alignment_score(features.crops, self.crop_weights(features), self.fixed)
        by_token = global_score(features.weak, self.classifier())
        share = self.options.fixed_share
        return self.fully_believed(self.probabilities(share * by_crops + (1 - share) * by_token))


METHOD = Microclip
