"""Deprecated import path of names that are now in ``finealign.method.alignment``."""

from warnings import warn

from finealign.method.alignment import (
    class_description_anchors,
    class_means,
    crop_relevance,
    crop_weights,
    description_weights,
    global_score,
    learned_alignment_score,
    normalised_cut,
    saliency_pooled,
    weighted_alignment_score,
)

__all__ = [
    "class_description_anchors",
    "class_means",
    "crop_relevance",
    "crop_weights",
    "description_weights",
    "global_score",
    "learned_alignment_score",
    "normalised_cut",
    "saliency_pooled",
    "weighted_alignment_score",
]

warn(
    "finealign.alignment has moved and goes after release 0.2. Use: import finealign.method.alignment",
    DeprecationWarning,
    stacklevel=2,
)
