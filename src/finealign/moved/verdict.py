"""Deprecated import path of names that are now in ``finealign.run.verdict``."""

from warnings import warn

from finealign.run.verdict import Verdict, judge_model

__all__ = ["Verdict", "judge_model"]

warn(
    "finealign.verdict has moved and goes after release 0.2. Use: from finealign import judge_model",
    DeprecationWarning,
    stacklevel=2,
)
