"""Estimated shares of the classes: near the truth on made folders, what must not matter to them, and real features."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from finealign.method import class_prior
from finealign.method.class_prior import ShareEstimate, estimate_shares, even_or, even_shares, total_variation

D, SCALE = 48, 60.0


def folder(
    sizes: list[int], *, seed: int = 0, text_noise: float = 0.7, apart: float = 0.8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whole images and mean crops (n, D), class anchors (C, D), all of length 1 in a narrow cone; the true shares."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    gap, cone, centres = noise(D), noise(D), noise(len(sizes), D) * apart
    labels = torch.tensor([c for c, size in enumerate(sizes) for _ in range(size)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    weak = normalize(cone + centres[labels] + noise(len(labels), D) * 0.6, dim=1)
    crops = normalize(cone + centres[labels] + noise(len(labels), D) * 0.6, dim=1)
    anchors = normalize(cone + gap + centres + noise(len(sizes), D) * text_noise, dim=1)
    shares = torch.tensor(sizes, dtype=torch.float32)
    return weak, crops, anchors, shares / shares.sum()


def estimate_of(weak: Tensor, crops: Tensor | None, anchors: Tensor, weights: Tensor | None = None) -> ShareEstimate:
    found = estimate_shares(weak, crops, anchors, logit_scale=SCALE, weights=weights)
    assert found.shares.shape == (len(anchors),) and found.shares.dtype == torch.float32
    assert bool((found.shares > 0).all()) and float(found.shares.sum()) == pytest.approx(1, abs=1e-5)
    assert 0 <= found.named_alike <= 1
    return found


def shares_of(weak: Tensor, crops: Tensor | None, anchors: Tensor, weights: Tensor | None = None) -> Tensor:
    return estimate_of(weak, crops, anchors, weights).shares


def away(found: Tensor, truth: Tensor) -> float:
    return math.fsum(abs(a - b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)) / 2


# --- near the truth ---------------------------------------------------------------------------------------------------

UNEVEN = {
    "long tail": [120, 75, 47, 30, 19, 12, 7, 5],
    "half absent": [40, 40, 40, 40, 0, 0, 0, 0],
    "dominated": [140, *[7] * 7],
    "three": [60, 0, 0, 60, 0, 60, 0, 0],
    "one class": [0, 0, 120, 0, 0, 0, 0, 0],
    "two classes": [120, 30],
    "more classes than directions": [12] * 25 + [0] * 25,
}


@pytest.mark.parametrize("crops", [True, False], ids=["crops", "no crops"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", UNEVEN)
def test_estimated_shares__are_near_uneven_ones(case: str, seed: int, crops: bool) -> None:
    weak, mean_crops, anchors, truth = folder(UNEVEN[case], seed=seed)
    estimate = estimate_of(weak, mean_crops if crops else None, anchors)
    found = estimate.shares
    assert away(found, truth) < 0.12
    assert away(found, truth) < away(even_shares(len(truth)), truth) / 3
    absent = truth == 0
    assert float(found[absent].sum()) < 0.1
    assert float(total_variation(even_or(estimate, len(weak)), truth)) < 0.12  # not taken for even


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("each", [5, 40])
def test_estimated_shares__of_an_even_folder_are_taken_for_even(each: int, seed: int) -> None:
    weak, crops, anchors, _ = folder([each] * 8, seed=seed)
    assert torch.equal(even_or(estimate_of(weak, crops, anchors), len(weak)), even_shares(8))


def test_estimated_shares__with_few_classes_a_text_that_is_near_to_all_images_takes_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first class's text is drawn to the mean of all images, as if any photo showed it."""

    def errors(own_nearness: float) -> list[float]:
        monkeypatch.setattr(class_prior, "OWN_NEARNESS", own_nearness)
        found = []
        for sizes in ([40, 40], [60, 20], [20, 60], [30] * 4, [60, 30, 15]):
            for seed in range(4):
                weak, crops, anchors, truth = folder(sizes, seed=seed, text_noise=0.3, apart=0.4)
                anchors[0] = normalize(anchors[0] + 0.2 * normalize(weak.mean(0), dim=0), dim=0)
                found.append(away(shares_of(weak, crops, anchors), truth))
        return found

    taken, left = errors(class_prior.OWN_NEARNESS), errors(0.0)
    assert math.fsum(taken) < 0.6 * math.fsum(left)
    assert all(one <= other + 0.02 for one, other in zip(taken, left, strict=True))


@pytest.mark.parametrize("classes", [2, 7, 8, 10, 30])
def test_estimated_shares__of_ten_classes_and_more_texts_are_taken_as_they_are(
    classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weak, crops, anchors, _ = folder([300 // classes] * classes, text_noise=1.0, apart=0.2)
    found = shares_of(weak, crops, anchors)
    monkeypatch.setattr(class_prior, "OWN_NEARNESS", 0.0)
    assert torch.equal(found, shares_of(weak, crops, anchors)) == (classes >= 10)


def test_estimated_shares__are_nearer_than_the_count_of_first_labels() -> None:
    """Where the texts are poor: that is what the estimate is for."""
    better = []
    for seed in range(6):
        weak, crops, anchors, truth = folder(UNEVEN["half absent"], seed=seed, text_noise=1.0)
        labels = torch.bincount((weak @ anchors.T).argmax(1), minlength=8) / len(weak)
        better.append(away(labels, truth) - away(shares_of(weak, crops, anchors), truth))
    assert sum(better) / 6 > 0.03


# --- what does not matter ---------------------------------------------------------------------------------------------


def test_estimated_shares__follow_the_classes_and_not_the_order_of_images() -> None:
    weak, crops, anchors, _ = folder(UNEVEN["long tail"])
    found = shares_of(weak, crops, anchors)
    classes = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    torch.testing.assert_close(shares_of(weak, crops, anchors[classes]), found[classes], atol=1e-5, rtol=0)
    order = torch.randperm(len(weak), generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(shares_of(weak[order], crops[order], anchors), found, atol=1e-5, rtol=0)


def test_estimated_shares__lengths_of_features_and_their_precision_do_not_matter() -> None:
    weak, crops, anchors, _ = folder(UNEVEN["long tail"])
    found = shares_of(weak, None, anchors)
    torch.testing.assert_close(shares_of(3 * weak, None, anchors), found, atol=1e-6, rtol=0)
    single = shares_of(weak.float(), crops.float(), anchors.float())
    torch.testing.assert_close(single, shares_of(weak, crops, anchors), atol=1e-3, rtol=0)


def test_estimated_shares__the_same_again_with_nothing_changed_and_no_gradient() -> None:
    weak, crops, anchors, _ = folder(UNEVEN["dominated"])
    before = [value.clone() for value in (weak, crops, anchors)]
    found = shares_of(weak, crops, anchors.requires_grad_())
    assert not found.requires_grad and torch.equal(shares_of(weak, crops, anchors), found)
    for value, old in zip((weak, crops, anchors), before, strict=True):
        assert torch.equal(value.detach(), old)


def test_estimated_shares__copies_that_share_a_weight_count_once() -> None:
    weak, crops, anchors, _ = folder([20] * 6)
    copied = torch.cat([torch.arange(len(weak)), torch.zeros(80, dtype=torch.int64)])  # the first image 81 times
    weights = torch.ones(len(copied))
    weights[[0, *range(len(weak), len(copied))]] = 1 / 81
    found = shares_of(weak[copied], crops[copied], anchors, weights)
    torch.testing.assert_close(found, shares_of(weak, crops, anchors), atol=0.01, rtol=0)
    assert away(shares_of(weak[copied], crops[copied], anchors), found) > 0.2  # as they would count otherwise


def test_estimated_shares__images_of_no_weight_are_not_there() -> None:
    weak, crops, anchors, _ = folder(UNEVEN["long tail"])
    other = normalize(torch.randn(60, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64), dim=1)
    weights = torch.cat([torch.ones(len(weak)), torch.full((60,), 1e-9)])
    found = shares_of(torch.cat([weak, other]), torch.cat([crops, other]), anchors, weights)
    torch.testing.assert_close(found, shares_of(weak, crops, anchors), atol=0.01, rtol=0)


def test_estimated_shares__of_many_images_are_those_of_every_so_manieth(monkeypatch: pytest.MonkeyPatch) -> None:
    weak, crops, anchors, truth = folder(UNEVEN["long tail"])
    weights = torch.rand(len(weak), generator=torch.Generator().manual_seed(0)) / 2 + 0.5
    third = shares_of(weak[::3], crops[::3], anchors, weights[::3])
    monkeypatch.setattr(class_prior, "MOST_IMAGES", len(weak) // 3 + 1)
    found = shares_of(weak, crops, anchors, weights)
    assert torch.equal(found, third) and away(found, truth) < 0.15


# --- degenerate folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_estimated_shares__too_few_images_say_nothing(count: int) -> None:
    weak, crops, anchors, _ = folder(UNEVEN["half absent"])
    assert torch.equal(shares_of(weak[:count], crops[:count], anchors), even_shares(8))


@pytest.mark.parametrize("same", ["zero weights", "hardly any weight", "identical images"])
def test_estimated_shares__nothing_to_go_by_says_nothing(same: str) -> None:
    weak, crops, anchors, _ = folder(UNEVEN["half absent"])
    weights = {"zero weights": torch.zeros(160), "hardly any weight": torch.full((160,), 1e-3)}.get(same)
    if weights is None:
        weak, crops = weak[:1].expand(160, -1), crops[:1].expand(160, -1)
    assert torch.equal(shares_of(weak, crops, anchors, weights), even_shares(8))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 30),
    classes=st.integers(1, 6),
    width=st.sampled_from([1, 2, 3, 16]),
    distinct=st.integers(1, 6),
    crops=st.booleans(),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_estimated_shares__of_any_folder_are_shares(
    n: int, classes: int, width: int, distinct: int, crops: bool, weighted: bool, dtype: torch.dtype, seed: int
) -> None:
    """Also of few distinct images, of fewer dimensions than directions, of more classes than images."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(distinct, width, generator=generator, dtype=dtype)
    weak = kinds[torch.randint(distinct, (n,), generator=generator)]
    anchors = normalize(torch.randn(classes, width, generator=generator, dtype=dtype), dim=1)
    weights = torch.randint(0, 3, (n,), generator=generator).to(dtype) / 2 if weighted else None
    shares_of(weak, weak.flip(1) if crops else None, anchors, weights)


# --- even or not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alike", [1.0, 0.8, 0.4])
@pytest.mark.parametrize(("classes", "few"), [(2, 1), (6, 1), (8, 2 / 3), (10, 0), (100, 0), (400, 0)])
def test_even_or__keeps_what_differs_by_more_than_it_may_err(classes: int, few: float, alike: float) -> None:
    images = 1000 if classes < 100 else 200 * classes
    enough, otherwise = 0.09 * (1 - few), 0.25 + 0.5 * few
    bound = enough + otherwise * (1 - alike) + 0.17 * min(1.0, classes / 100) + 0.15 * math.sqrt(classes / images)
    if bound > 0.49:
        pytest.skip("no such shares by half the classes differ by more")
    for part, kept in ((0.99, False), (1.01, True)):
        moved = 2 * part * bound / classes  # from each of one half of the classes to one of the other half
        shares = torch.tensor([1 / classes + moved, 1 / classes - moved] * (classes // 2), dtype=torch.float64)
        found = even_or(ShareEstimate(shares, alike), images)
        assert torch.equal(found, shares) == kept
        assert kept or torch.equal(found, even_shares(classes).double())


@pytest.mark.parametrize(
    ("shares", "images", "alike", "kept"),
    [
        ([0.19] * 5 + [0.01] * 5, 100, 0.75, True),  # 5 to 6 classes are seen, of some 18 images each
        ([0.18] * 5 + [0.02] * 5, 35, 0.75, False),  # 6.9 of 10 are seen, of 5 images each,
        ([0.18] * 5 + [0.02] * 5, 45, 0.75, True),
        ([0.18] * 5 + [0.02] * 5, 35, 0.85, True),  # and too few are named otherwise for 3.1 that are not seen
        ([0.18] * 5 + [0.02] * 5, 19, 0.85, False),
        ([0.45] + [0.55 / 9] * 9, 40, 0.75, True),  # one class stands out
        ([0.24] * 4 + [0.04 / 16] * 16, 30, 0.4, True),  # most classes are not seen at all
        ([0.15] * 5 + [0.05] * 5, 10_000, 0.75, True),
        ([0.11] * 5 + [0.09] * 5, 10_000, 0.75, False),  # as good as even
        ([0.0095] * 98 + [0.0007] * 98, 825, 0.75, True),  # as far from even as where half of 196 classes are absent,
        ([0.0077] * 98 + [0.0025] * 98, 1600, 0.75, False),  # and where all are there
    ],
)
def test_even_or__believes_few_images_only_a_large_claim(
    shares: list[float], images: int, alike: float, kept: bool
) -> None:
    given = torch.tensor(shares, dtype=torch.float64)
    assert torch.equal(
        even_or(ShareEstimate(given, alike), images), given if kept else even_shares(len(shares)).double()
    )


def test_even_or__no_images_at_all() -> None:
    assert torch.equal(even_or(ShareEstimate(even_shares(3), 1.0), 0.0), even_shares(3))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=2, max_size=8))
def test_total_variation__is_the_most_that_two_say_differently_of_any_set(counts: list[tuple[int, int]]) -> None:
    first = [a / sum(a for a, _ in counts) for a, _ in counts]
    total = sum(b for _, b in counts)
    second = [b / total for _, b in counts] if total else [1 / len(counts)] * len(counts)
    most = math.fsum(max(0.0, a - b) for a, b in zip(first, second, strict=True))
    found = total_variation(torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64))
    assert found == pytest.approx(most, abs=1e-12)


# --- features of real photos ------------------------------------------------------------------------------------------


def real(shared: Path, name: str, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Whole images (n, D) by OpenAI's B/32, its class vectors (C, D) and the labels, of a set as published."""
    from safetensors.torch import load_file

    place = shared / "features" / "clip-b32"
    if not (place / f"{name}.safetensors").is_file():
        pytest.skip(f"no features at {place}")
    found = load_file(place / f"{name}.safetensors")
    rows = json.loads((place / "texts.json").read_text(encoding="utf-8"))["rows"][name]
    texts = normalize(load_file(place / "texts.safetensors")["texts"][rows].float(), dim=1)
    return found[kind].float(), texts, found[f"{kind}_labels"].long()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["val", "test"])
def test_real_features__half_of_the_classes_absent(shared: Path, kind: str, seed: int) -> None:
    weak, texts, labels = real(shared, "dtd", kind)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    there = torch.isin(labels, order[: len(texts) // 2])
    truth = torch.bincount(labels[there], minlength=len(texts)) / there.sum()
    found = estimate_shares(weak[there], None, texts, logit_scale=100.0).shares
    assert away(found, truth) < 0.85 * away(even_shares(len(texts)), truth)
    assert float(found[truth == 0].sum()) < 0.4


@pytest.mark.parametrize("kind", ["val", "test"])
def test_real_features__an_even_folder_of_many_classes_that_are_hard_to_tell(shared: Path, kind: str) -> None:
    weak, texts, _ = real(shared, "dtd", kind)
    found = estimate_shares(weak, None, texts, logit_scale=100.0)
    assert torch.equal(even_or(found, len(weak)), even_shares(len(texts)))


def test_real_features__most_of_many_classes_absent_are_believed(shared: Path) -> None:
    weak, texts, labels = real(shared, "stanford_cars", "val")
    there = labels % 10 == 0
    truth = torch.bincount(labels[there], minlength=len(texts)) / there.sum()
    found = estimate_shares(weak[there], None, texts, logit_scale=100.0)
    assert away(even_or(found, int(there.sum())), truth) < 0.5 * away(even_shares(len(texts)), truth)


@pytest.fixture(scope="module")
def encoded(shared: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Photos of twelve flowers by the small model, 16 of each: whole images, class vectors, labels."""
    from finealign.classifier import FineAlign
    from finealign.config import make_config
    from finealign.images.decoding import read_pixels
    from finealign.images.views import Views
    from finealign.method.alignment import class_means
    from finealign.texts.prompts import make_texts, read_classes, read_descriptions

    place = shared / "data" / "flowers12"
    texts = make_texts(read_classes(place / "classes.txt"), read_descriptions(place / "descriptions.json"))
    config = make_config({"backbone": f"local-dir:{shared / 'models' / 'miniclip'}"})
    backbone = FineAlign(texts.classes).load_backbone(config)
    views = Views(config.views, size=backbone.input_size, geometry=backbone.geometry, mean=backbone.mean, seed=0)
    photos = [(c, path) for c in texts.classes for path in sorted((place / "train" / c).iterdir())[:16]]
    pixels = [views.weak(read_pixels(path, shorter_side=2 * views.size)) for _, path in photos]
    features = backbone.encode_texts(texts)
    anchors = class_means(features.descriptions, features.class_of, features.num_classes)
    labels = torch.tensor([texts.classes.index(c) for c, _ in photos])
    return backbone.embed(torch.stack(pixels)), anchors, labels


def test_real_photos__an_even_folder_stays_even(encoded: tuple[Tensor, Tensor, Tensor]) -> None:
    weak, anchors, _ = encoded
    found = estimate_shares(weak, None, anchors, logit_scale=100.0)
    assert torch.equal(even_or(found, len(weak)), even_shares(12))


@pytest.mark.parametrize("seed", range(3))
def test_real_photos__half_of_the_classes_absent(encoded: tuple[Tensor, Tensor, Tensor], seed: int) -> None:
    weak, anchors, labels = encoded
    there = torch.isin(labels, torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:6])
    truth = torch.bincount(labels[there], minlength=12) / there.sum()
    found = estimate_shares(weak[there], None, anchors, logit_scale=100.0).shares
    assert away(found, truth) < 0.7 * away(even_shares(12), truth)
