"""Whether crops or whole images are trusted: decided by which of the start's labels explain the images."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from finealign.config import make_config
from finealign.method.base import SelfTrainingMethod
from finealign.method.crop_trust import EQUAL, SHARES, chosen_share, explained_by_share
from finealign.method.registry import create_method, method_options
from finealign.model.trust import trust_in_words
from finealign.types import ImageFeatures, TextFeatures

D, C = 32, 6


def world(noise_whole: float, noise_crops: float, *, n: int = 240, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images of six classes seen whole and by their mean crop, each with its own noise, and the classes' anchors."""
    generator = torch.Generator().manual_seed(seed)
    anchors = normalize(torch.randn(C, D, generator=generator), dim=1)
    labels = torch.arange(n) % C
    views = [
        normalize(anchors[labels] + noise * torch.randn(n, D, generator=generator) / D**0.5, dim=1)
        for noise in (noise_whole, noise_crops)
    ]
    return views[0], views[1], anchors


@pytest.mark.parametrize("seed", range(5))
def test_the_view_that_shows_the_classes_is_trusted(seed: int) -> None:
    weak, crops, anchors = world(3.0, 1.0, seed=seed)
    assert chosen_share(explained_by_share(weak, crops, anchors), len(weak)) == 0
    weak, crops, anchors = world(1.0, 3.0, seed=seed)
    assert chosen_share(explained_by_share(weak, crops, anchors), len(weak)) >= EQUAL


def test_crops_that_are_the_whole_image_get_an_equal_share() -> None:
    weak, _, anchors = world(2.0, 2.0)
    assert chosen_share(explained_by_share(weak, weak, anchors), len(weak)) == EQUAL


def test_few_images_say_nothing() -> None:
    weak, crops, anchors = world(3.0, 1.0)
    explained = explained_by_share(weak, crops, anchors)
    assert chosen_share(explained, 7) == EQUAL
    assert chosen_share(explained, 8) == 0


def test_images_that_do_not_count_change_nothing() -> None:
    weak, crops, anchors = world(1.5, 2.0)
    strange = normalize(torch.randn(50, D, generator=torch.Generator().manual_seed(9)), dim=1)
    counts = torch.cat([torch.ones(len(weak)), torch.zeros(50)])
    found = explained_by_share(torch.cat([weak, strange]), torch.cat([crops, strange]), anchors, weights=counts)
    assert found == pytest.approx(explained_by_share(weak, crops, anchors))


@given(st.integers(0, 10**6), st.integers(1, 30))
def test_explained__is_a_share_for_any_images(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weak, crops = (normalize(torch.randn(n, 4, generator=generator), dim=1) for _ in range(2))
    found = explained_by_share(weak, crops, normalize(torch.randn(3, 4, generator=generator), dim=1))
    assert tuple(found) == SHARES
    assert all(0 <= value <= 1 + 1e-9 for value in found.values())


def fair(share: float | str) -> SelfTrainingMethod:
    anchors = normalize(torch.randn(3, 5, generator=torch.Generator().manual_seed(2)), dim=1)
    settings = make_config({"method": {"name": "fair", "whole_share": share}}).method
    method = create_method(settings, TextFeatures(anchors, anchors, torch.arange(3)), logit_scale=50.0)
    assert isinstance(method, SelfTrainingMethod)
    return method


def test_share__mixes_the_scores_of_crops_and_whole_image() -> None:
    generator = torch.Generator().manual_seed(3)
    features = ImageFeatures(
        normalize(torch.randn(4, 5, generator=generator), dim=1),
        normalize(torch.randn(4, 2, 5, generator=generator), dim=2),
    )
    method = fair(0.25)
    mixed = 0.75 * method.score(features, "las") + 0.25 * method.score(features, "global")
    torch.testing.assert_close(method.score(features, "fused"), mixed)


def test_share__of_nothing_or_all_leaves_one_score() -> None:
    assert [fair(share).own_score() for share in (0.0, 0.5, 1.0, "auto")] == ["las", "fused", "global", "fused"]


def test_share__outside_its_range_is_refused() -> None:
    with pytest.raises(Exception, match="whole_share"):
        method_options(make_config({"method": {"name": "fair", "whole_share": 1.5}}).method)


def test_share__is_saved_and_loaded_and_equal_for_models_saved_before_there_was_one() -> None:
    method, other = fair("auto"), fair("auto")
    method.trust_whole(0.75)
    saved = method.inference_tensors()
    other.load_inference_tensors(saved)
    assert float(other.share_of_whole()) == 0.75
    other.load_inference_tensors({name: value for name, value in saved.items() if name != "whole_share"})
    assert float(other.share_of_whole()) == EQUAL
    with pytest.raises(ValueError, match="whole_share"):
        other.load_inference_tensors({**saved, "whole_share": torch.tensor(1.5)})
    with pytest.raises(ValueError, match="whole_share"):
        other.load_inference_tensors({**saved, "whole_share": torch.tensor(float("nan"))})


EXPLAINED = {"0": 0.3, "0.5": 0.28, "0.75": 0.25, "1": 0.2}


@pytest.mark.parametrize(
    ("kind", "share", "explained", "words"),
    [
        ("auto", 0.0, EXPLAINED, "crops alone, decided without labels: .*crops explain 30.0%.*whole images 20.0%"),
        ("auto", 0.75, EXPLAINED, "crops, and the whole image with a share of 75%, decided"),
        ("auto", 1.0, EXPLAINED, "the whole image alone, decided"),
        ("auto", 1.0, {}, "the whole image alone"),
        ("given", 0.5, EXPLAINED, "crops, and the whole image with a share of 50%, as it was given"),
    ],
)
def test_words__say_what_is_looked_at_and_why(kind: str, share: float, explained: dict[str, float], words: str) -> None:
    told = {"kind": kind, "whole_share": share, "explained": explained}
    assert re.fullmatch(f"{words}.*", trust_in_words(told))
    if not explained:
        assert "decided" not in trust_in_words(told)
