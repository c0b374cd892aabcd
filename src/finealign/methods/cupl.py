"""CuPL (Pratt et al., arXiv 2209.03320): the mean of a class's descriptions in place of its name."""

from torch import Tensor

from finealign.method.alignment import class_means
from finealign.method.base import Anchors, Method, MethodOptions
from finealign.types import TextFeatures


class Cupl(Method):
    """score = <g, T_c>, where g is the whole image and T_c = mean_j t_cj, normalised, the mean of the descriptions."""

    prototypes: Tensor  # (C, 1, D)

    def __init__(self, options: MethodOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)
        self.register_buffer("prototypes", means[:, None])

    def classifier(self) -> Anchors:
        """Return the normalised mean of each class's descriptions: (C, 1, D)."""
        return self.prototypes


METHOD = Cupl
