"""What is kept of a method of another package: it scores as the method did, and refuses what does not fit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from finealign.method.base import MethodOptions
from finealign.method.plain import Plain, plain_tensors
from finealign.types import Score
from test_methods import SCALE, images, make, make_trained, move, texts

SCORES: tuple[Score, ...] = ("global", "las", "fused")


def plain(kept: dict[str, Tensor]) -> Plain:
    return Plain(MethodOptions(), texts(), kept, logit_scale=SCALE, scores=SCORES, origin="elsewhere")


@pytest.mark.parametrize("prior", [None, torch.tensor([0.4, 0.3, 0.2, 0.1])], ids=["no prior", "prior"])
def test_plain__scores_as_the_method_that_it_was_kept_of(prior: Tensor | None) -> None:
    method = make_trained("fair")
    move(method)
    method.whole_share.fill_(0.3)
    method.register_buffer("class_prior", prior)
    kept = plain_tensors(method)
    again = plain(kept)
    for kind in SCORES:
        assert torch.equal(again.score(images(), kind), method.score(images(), kind)), kind
    assert ("class_prior" in kept) == (prior is not None)
    assert (again.class_prior is None) if prior is None else torch.equal(again.class_prior, prior)  # type: ignore[arg-type]
    anchors = again.anchors.clone()
    move(method)
    assert torch.equal(again.anchors, anchors), "a copy, not the method's own"


def test_plain_tensors__a_method_that_scores_by_more_keeps_nothing() -> None:
    assert plain_tensors(make("transclip")) == {}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"anchors": torch.zeros(5, 2, 6)}, r"class vectors are of shape \(5, 2, 6\)"),
        ({"anchors": torch.zeros(4, 2, 7)}, r"class vectors are of shape \(4, 2, 7\)"),
        ({"anchors": torch.zeros(4, 6)}, r"class vectors are of shape \(4, 6\)"),
        ({"anchors": torch.eye(6).repeat(4, 1, 1) / torch.tensor([0.0, 1, 1, 1, 1, 1])}, "not finite"),
        ({"whole_share": torch.tensor(1.5)}, "share of the whole image is none"),
        ({"whole_share": torch.tensor(-0.5)}, "share of the whole image is none"),
        ({"class_prior": torch.ones(5) / 5}, r"class_prior is of shape \(5,\)"),
    ],
)
def test_plain__refuses_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plain(plain_tensors(make("fair")) | changed)
