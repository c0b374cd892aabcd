"""CLIP without adaptation: the class name in templates, nothing learned (Radford et al., arXiv 2103.00020)."""

from torch import Tensor

from finealign.method.base import Anchors, Method, MethodOptions
from finealign.types import TextFeatures


class ZeroShot(Method):
    """score = <g, T_c>, where g is the whole image and T_c the normalised mean of the class's template prompts."""

    prototypes: Tensor  # (C, 1, D)

    def __init__(self, options: MethodOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        self.register_buffer("prototypes", texts.names[:, None])

    def classifier(self) -> Anchors:
        """Return the normalised mean of each class's template prompts: (C, 1, D)."""
        return self.prototypes


METHOD = ZeroShot
