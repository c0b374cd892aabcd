"""Deprecated import path of names that are now in ``finealign.run.adapt``."""

from warnings import warn

from finealign.run.adapt import RunSummary, adapt_into

__all__ = ["RunSummary", "adapt_into"]

warn(
    "finealign.run_folder has moved and goes after release 0.2. Use: from finealign import adapt_into",
    DeprecationWarning,
    stacklevel=2,
)
