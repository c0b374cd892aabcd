"""Deprecated import path of names that are now in ``finealign.run.report``."""

from warnings import warn

from finealign.run.report import write_report

__all__ = ["write_report"]

warn(
    "finealign.report has moved and goes after release 0.2. Use: from finealign import write_report",
    DeprecationWarning,
    stacklevel=2,
)
