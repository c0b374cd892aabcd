"""Deprecated import path of names that are now in ``finealign.method.pseudo_labels``."""

from warnings import warn

from finealign.method.pseudo_labels import (
    WeightKind,
    agreement_weight,
    balanced,
    confusability,
    confusion_weight,
    count_pairs,
    margin_weight,
    self_training_weight,
)

__all__ = [
    "WeightKind",
    "agreement_weight",
    "balanced",
    "confusability",
    "confusion_weight",
    "count_pairs",
    "margin_weight",
    "self_training_weight",
]

warn(
    "finealign.pseudo_labels has moved and goes after release 0.2. Use: import finealign.method.pseudo_labels",
    DeprecationWarning,
    stacklevel=2,
)
