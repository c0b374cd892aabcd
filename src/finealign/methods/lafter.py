"""LaFTer (Mirza et al., NeurIPS 2023, arXiv 2305.18287): a classifier learned from texts alone labels the images.

Written from a summary of the paper. First the anchors are trained to tell the descriptions of the classes apart. Then a
fixed copy of them labels weak views, while anchors, normalisation parameters and visual prompt tokens learn from strong
views. A tower without tokens gets no prompts.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from finealign.method.alignment import class_means, global_score
from finealign.method.base import PUBLISHED_PACE, SelfTrainingMethod, SelfTrainingOptions
from finealign.types import ImageFeatures, PseudoLabels, TextFeatures


class LafterOptions(SelfTrainingOptions):
    """Options of LaFTer, besides those of the loss."""

    text_steps: Annotated[int, Field(ge=0)] = Field(200, description="steps of the classifier on the texts")
    text_learning_rate: Annotated[float, Field(gt=0)] = Field(1e-5, description="in those steps")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="in those steps")
    prompt_tokens: Annotated[int, Field(ge=0)] = Field(10, description="visual prompts, in a transformer tower")


class Lafter(SelfTrainingMethod):
    """y = argmax_c <g_weak, T_c>, where T is trained on the texts and then fixed; omega = 1."""

    Options = LafterOptions
    options: LafterOptions
    begin_with_anchors = ("fixed",)
    training_options = (
        *SelfTrainingMethod.training_options,
        "text_steps",
        "text_learning_rate",
        "label_smoothing",
    )
    training_state = (*SelfTrainingMethod.training_state, "fixed")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # LaFTer's loss has no fairness term.
        "published": {
            "training": {**PUBLISHED_PACE},
            "method": {"fairness": "off"},
        }
    }
    fixed: Tensor  # (C, 1, D), the classifier trained on the texts

    def __init__(self, options: LafterOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)[:, None]
        super().__init__(options, texts, means, logit_scale=logit_scale)
        self.register_buffer("fixed", means.clone())

    @torch.no_grad()
    def study(self, texts: TextFeatures) -> None:
        """Train the classifier on the texts, from the means of the descriptions, and begin the anchors there."""
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)
        learned = text_classifier(
            means,
            texts,
            steps=self.options.text_steps,
            learning_rate=self.options.text_learning_rate,
            smoothing=self.options.label_smoothing,
            scale=self.logit_scale,
        )[:, None]
        self.fixed.copy_(learned)
        self.anchors.copy_(learned)

    def suit_tower(self, width: int) -> None:
        """Create ``prompt_tokens`` random prompts of this width, the same in every run; none if the width is 0."""
        if width and self.options.prompt_tokens:
            generator = torch.Generator().manual_seed(0)
            drawn = 0.02 * torch.randn(self.options.prompt_tokens, width, generator=generator)
            self.prompts = nn.Parameter(drawn.to(self.fixed))

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """Label each whole image by the classifier trained on the texts, with weight 1."""
        return self.fully_believed(self.probabilities(global_score(features.weak, self.fixed)))


def text_classifier(
    start: Tensor, texts: TextFeatures, *, steps: int, learning_rate: float, smoothing: float, scale: float
) -> Tensor:
    """Train a linear classifier to tell the descriptions of the classes apart: (C, D), rows of length 1.

    ``start`` (C, D) is its initial value. Each of the ``steps`` uses all descriptions (M, D): AdamW on the
    cross-entropy, with label ``smoothing``, of ``scale`` times the cosines.
    """
    # Works under no_grad and inference_mode too. Encoded texts may be inference tensors, which autograd refuses; clones
    # of them made here are ordinary tensors.
    with torch.inference_mode(False), torch.enable_grad():
        weight = start.detach().clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([weight], lr=learning_rate, weight_decay=0.0)
        rows, classes = texts.descriptions.detach().clone(), texts.class_of.clone()
        for _ in range(steps):
            logits = scale * rows @ normalize(weight, dim=-1).T
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(cross_entropy(logits, classes, label_smoothing=smoothing))
            optimizer.step()
    return normalize(weight.detach(), dim=-1)


METHOD = Lafter
