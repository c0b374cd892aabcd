"""How far a model trusts crops against the whole image, as values for ``run.json`` and in words."""

from collections.abc import Mapping
from typing import Any

from finealign.config import Config
from finealign.method.base import SelfTrainingMethod
from finealign.method.crop_trust import CROPS_ALONE, WHOLE_ALONE
from finealign.model.fitted import FittedModel

DIGITS = 4


def told_trust(model: FittedModel, config: Config, explained: Mapping[float, float]) -> dict[str, Any] | None:
    """The share of the whole image in the score ``fused`` as JSON values; None for a method that learns no labels.

    ``kind`` is "auto" if it was decided without labels, else "given". ``explained`` has the evidence,
    ``explained_by_share``; it is empty where nothing was looked at.
    """
    adapted = model.using("adapted")
    if not isinstance(adapted.method, SelfTrainingMethod):
        return None
    return {
        "kind": "auto" if config.method.options.get("whole_share", "auto") == "auto" else "given",
        "whole_share": round(float(adapted.method.whole_share), DIGITS),
        "score": adapted.inference.score,
        "explained": {f"{share:g}": round(value, DIGITS) for share, value in sorted(explained.items())},
    }


def trust_in_words(told: Mapping[str, Any]) -> str:
    """What ``told_trust`` tells, as a clause."""
    share, explained = told["whole_share"], told["explained"]
    only = {CROPS_ALONE: "crops alone", WHOLE_ALONE: "the whole image alone"}
    text = only.get(share, f"crops, and the whole image with a share of {share:.0%}")
    if told["kind"] == "given":
        return f"{text}, as it was given"
    if not explained:
        return text
    return (
        f"{text}, decided without labels: the start's labels by crops explain {explained['0']:.1%} of the variance of "
        f"the images, those by whole images {explained['1']:.1%}"
    )
