"""What a saved model keeps of a method of another package, so that it classifies where that package is missing."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from finealign.method.base import Anchors, Method, MethodOptions
from finealign.types import Score, TextFeatures

# What makes a method more than its class vectors, if it is overridden.
_SCORING = ("score", "score_by", "crop_weights", "probabilities")


class Plain(Method):
    """The class vectors that a method ended with, by which images are scored as ``Method`` does."""

    anchors: Tensor  # (C, J, D), rows of length 1
    whole_share: Tensor  # (), the share of the whole image in the score ``fused``

    def __init__(
        self,
        options: MethodOptions,
        texts: TextFeatures,
        kept: Mapping[str, Tensor],
        *,
        logit_scale: float,
        scores: Sequence[Score],
        origin: str,
    ) -> None:
        """``kept`` is what ``plain_tensors`` returned. Raises KeyError or ValueError if it does not fit the texts.

        ``scores`` are those of the method it stands for, and ``origin`` is where that is from.
        """
        super().__init__(options, texts, logit_scale=logit_scale)
        self.origin = origin
        self.register_buffer("anchors", kept["anchors"])
        self.register_buffer("whole_share", kept["whole_share"])
        self.register_buffer("class_prior", kept.get("class_prior"))
        self.scores = tuple(scores)  # type: ignore[misc]
        if self.anchors.ndim != 3 or self.anchors.shape[::2] != texts.names.shape:
            raise ValueError(f"the class vectors are of shape {tuple(self.anchors.shape)}")
        if not (bool(self.anchors.isfinite().all()) and 0 <= float(self.whole_share) <= 1):
            raise ValueError("the class vectors are not finite, or the share of the whole image is none")
        if self.class_prior is not None and self.class_prior.shape != (texts.num_classes,):
            raise ValueError(f"class_prior is of shape {tuple(self.class_prior.shape)}")

    def classifier(self) -> Anchors:
        """Return the kept class vectors: (C, J, D)."""
        return self.anchors

    def share_of_whole(self) -> Tensor:
        """Return ``whole_share``."""
        return self.whole_share


def plain_tensors(method: Method) -> dict[str, Tensor]:
    """Return what ``Plain`` needs to score as this method does; empty if it scores by more than class vectors."""
    kind = type(method)
    overridden = any(getattr(kind, name) is not getattr(Method, name) for name in _SCORING)
    if overridden or not kind.has_classifier or method.gaze:
        return {}
    kept = {"anchors": method.classifier().detach().clone(), "whole_share": method.share_of_whole().detach().clone()}
    if method.class_prior is not None:
        kept["class_prior"] = method.class_prior.clone()
    return kept
