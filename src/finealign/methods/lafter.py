"""LaFTer (Mirza et al., NeurIPS 2023, arXiv 2305.18287): a classifier learned from texts alone labels the images.

Written from METHOD's summary. First the anchors are trained to tell the descriptions apart; fixed as they are then,
they label weak views, and anchors, normalisation and visual prompt tokens learn from strong views. A tower without
tokens has no prompts.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from finealign.alignment import class_means, global_score
from finealign.methods.base import PUBLISHED_PACE, SelfTrainingMethod, SelfTrainingOptions
from finealign.types import ImageFeatures, PseudoLabels, TextFeatures


class LafterOptions(SelfTrainingOptions):
    """LaFTer's choices."""

    text_steps: Annotated[int, Field(ge=0)] = Field(200, description="steps of the classifier on the texts")
    text_learning_rate: Annotated[float, Field(gt=0)] = Field(3e-5, description="in those steps")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(0.1, description="in those steps")
    prompt_tokens: Annotated[int, Field(ge=0)] = Field(10, description="visual prompts, in a transformer tower")


class Lafter(SelfTrainingMethod):
    """y = argmax_c <g_weak, T_c> with T trained on the texts, then fixed; omega = 1."""

    Options = LafterOptions
    options: LafterOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Its loss is the cross-entropy alone.
        "published": {
            "training": {**PUBLISHED_PACE},
            "method": {"fairness": "off", "text_learning_rate": 1e-3},
        }
    }
    fixed: Tensor

    def __init__(self, options: LafterOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)
        learned = text_classifier(
            means,
            texts,
            steps=options.text_steps,
            learning_rate=options.text_learning_rate,
            smoothing=options.label_smoothing,
            scale=logit_scale if options.logit_scale == "auto" else options.logit_scale,
        )
        super().__init__(options, texts, learned[:, None], logit_scale=logit_scale)
        self.register_buffer("fixed", learned[:, None].clone())

    def make_prompts(self, width: int) -> None:
        if width and self.options.prompt_tokens:
            generator = torch.Generator().manual_seed(0)
            drawn = 0.02 * torch.randn(self.options.prompt_tokens, width, generator=generator)
            self.prompts = nn.Parameter(drawn.to(self.fixed))

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        probabilities = self.probabilities(global_score(features.weak, self.fixed))
        labels = probabilities.argmax(1)
        return PseudoLabels(labels=labels, weights=torch.ones_like(probabilities[:, 0]), probabilities=probabilities)


def text_classifier(
    start: Tensor, texts: TextFeatures, *, steps: int, learning_rate: float, smoothing: float, scale: float
) -> Tensor:
    """A linear classifier (C, D), rows of length 1, that tells the descriptions (M, D) apart, from ``start``.

    All descriptions at every step, by AdamW on the smoothed cross-entropy of ``scale`` times the cosines.
    """
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
