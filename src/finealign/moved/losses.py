"""Deprecated import path of names that are now in ``finealign.method.losses``."""

from warnings import warn

from finealign.method.losses import fairness, running_mean, weighted_cross_entropy

__all__ = ["fairness", "running_mean", "weighted_cross_entropy"]

warn(
    "finealign.losses has moved and goes after release 0.2. Use: import finealign.method.losses",
    DeprecationWarning,
    stacklevel=2,
)
