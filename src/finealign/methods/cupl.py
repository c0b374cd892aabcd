"""CuPL (Pratt et al., arXiv 2209.03320): the mean of a class's descriptions in place of its name."""

from torch import Tensor

from finealign.alignment import class_means
from finealign.methods.base import Anchors, Method, MethodOptions
from finealign.types import TextFeatures


class Cupl(Method):
    """score = <g, T_c>, T_c = mean_j t_cj, normalised."""

    prototypes: Tensor

    def __init__(self, options: MethodOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)
        self.register_buffer("prototypes", means[:, None])

    def classifier(self) -> Anchors:
        return self.prototypes


METHOD = Cupl
