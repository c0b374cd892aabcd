"""Deprecated import path of names that are now in ``finealign.runtime.distributed``."""

from warnings import warn

from finealign.runtime.distributed import Ranks

__all__ = ["Ranks"]

warn(
    "finealign.ranks has moved and goes after release 0.2. Use: from finealign import Ranks",
    DeprecationWarning,
    stacklevel=2,
)
