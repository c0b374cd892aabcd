"""WCA (Li et al., ICML 2024, arXiv 2406.02915): weighted crops against weighted descriptions; nothing learned.

The published setting, which draws 60 crops per image, is the preset ``wca@published``.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from finealign.method.alignment import description_weights, weighted_alignment_score
from finealign.method.base import Method, MethodOptions
from finealign.types import ImageFeatures, Score, TextFeatures


class WcaOptions(MethodOptions):
    """WCA's two temperatures; the defaults are the published values."""

    crop_temperature: Annotated[float, Field(gt=0)] = Field(math.exp(-4), description="of the softmax over crops")
    description_temperature: Annotated[float, Field(gt=0)] = Field(
        math.exp(-2), description="of the softmax over the descriptions of a class"
    )


class Wca(Method):
    """score = sum_ij w_i v_cj <p_i, t_cj>, where w weights the crops p, and v the descriptions t of class c."""

    Options = WcaOptions
    options: WcaOptions
    scores: ClassVar[tuple[Score, ...]] = ("las",)
    training_options = (*Method.training_options, "description_temperature")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {"views": {"crops": 60}}}
    descriptions: Tensor  # (M, D)
    class_of: Tensor  # (M,) int64
    description_weight: Tensor  # (M,), sums to 1 within each class

    def __init__(self, options: WcaOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        weights = description_weights(
            texts.descriptions, texts.names, texts.class_of, temperature=options.description_temperature
        )
        self.register_buffer("descriptions", texts.descriptions)
        self.register_buffer("class_of", texts.class_of)
        self.register_buffer("description_weight", weights)

    def score(self, features: ImageFeatures, kind: Score) -> Tensor:
        """Compute WCA's only score, ``las``: (B, C). ``kind`` is ignored, because ``scores`` lists no other."""
        return weighted_alignment_score(
            features.crops, self.crop_weights(features), self.descriptions, self.description_weight, self.class_of
        )


METHOD = Wca
