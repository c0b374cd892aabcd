"""CLIP as it comes: the class name in templates, nothing learned (Radford et al., arXiv 2103.00020)."""

from torch import Tensor

from finealign.methods.base import Anchors, Method, MethodOptions
from finealign.types import TextFeatures


class ZeroShot(Method):
    """score = <g, T_c>, T_c the normalised mean of the class's template prompts."""

    prototypes: Tensor

    def __init__(self, options: MethodOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        self.register_buffer("prototypes", texts.names[:, None])

    def classifier(self) -> Anchors:
        return self.prototypes


METHOD = ZeroShot
