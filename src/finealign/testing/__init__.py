"""Checks for a method or a backbone of one's own, to be run in its tests."""

from finealign.testing.backbones import check_backbone
from finealign.testing.findings import CheckError
from finealign.testing.methods import check_method

__all__ = ["CheckError", "check_backbone", "check_method"]
