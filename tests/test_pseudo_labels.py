"""Each weight against plain Python over lists, written from step 6 of METHOD.md and the docstrings."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from finealign.method.pseudo_labels import (
    WeightKind,
    agreement_weight,
    balanced,
    confusability,
    confusion_weight,
    count_pairs,
    margin_weight,
    self_training_weight,
)

Vector = list[float]
Matrix = list[Vector]

few = settings(max_examples=60, deadline=None)

SHAPES = [(1, 2), (5, 2), (4, 3), (3, 11), (32, 6)]  # images, classes; also more classes than images
SHARPNESS = [0.01, 1.0, 30.0, 100.0]  # from nearly even to nearly certain
KINDS: tuple[WeightKind, ...] = get_args(WeightKind)

over_shapes = pytest.mark.parametrize(("b", "c"), SHAPES)
over_kinds = pytest.mark.parametrize("kind", KINDS)


def agree(found: Tensor, wanted: object) -> None:
    expected = torch.tensor(wanted, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def predictions(b: int, c: int, *, sharpness: float = 3.0, seed: int = 0) -> Tensor:
    cosines = torch.rand(b, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.softmax(sharpness * cosines, dim=1)


def directions(c: int, d: int = 5, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(c, d, generator=generator, dtype=torch.float64), dim=1)


def seen_pairs(c: int, *, seed: int = 0) -> Tensor:
    """Counts (C, C) of ordered pairs, none on the diagonal."""
    drawn = torch.randint(0, 9, (c, c), generator=torch.Generator().manual_seed(seed)).double()
    return drawn.fill_diagonal_(0)


def any_kappa(c: int) -> Tensor:
    """Confusability (C, C) in [0, 1), symmetric as its maker promises."""
    drawn = torch.rand(c, c, generator=torch.Generator().manual_seed(c), dtype=torch.float64)
    return ((drawn + drawn.T) / 2).fill_diagonal_(0)


def first_two(row: Vector) -> tuple[int, int]:
    """The indices of the two largest."""
    first, second, *_ = sorted(range(len(row)), key=lambda index: -row[index])
    return first, second


@st.composite
def coarse_predictions(draw: st.DrawFn) -> Tensor:
    """Probabilities (B, C) from small counts: ties, zeros and certainty are common."""
    b, c = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    counts = st.lists(st.integers(0, 3), min_size=c, max_size=c).filter(any)
    rows = torch.tensor([draw(counts) for _ in range(b)], dtype=torch.float64)
    return rows / rows.sum(1, keepdim=True)


# --- margin_weight ----------------------------------------------------------------------------------------------------


@over_shapes
@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_margin_weight__is_one_minus_the_second_over_the_first(b: int, c: int, sharpness: float) -> None:
    probabilities = predictions(b, c, sharpness=sharpness)
    wanted = [1 - sorted(row)[-2] / sorted(row)[-1] for row in probabilities.tolist()]
    agree(margin_weight(probabilities), wanted)


@few
@given(coarse_predictions())
def test_margin_weight__is_in_the_unit_interval_with_ties_and_zeros(probabilities: Tensor) -> None:
    found = margin_weight(probabilities)
    assert bool(((found >= 0) & (found <= 1)).all())
    agree(found, [1 - sorted(row)[-2] / sorted(row)[-1] for row in probabilities.tolist()])


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ([0.5, 0.5], 0.0),  # q_1 == q_2
        ([0.25, 0.25, 0.25, 0.25], 0.0),
        ([0.2, 0.4, 0.4], 0.0),
        ([0.0, 1.0], 1.0),  # all mass on one class
        ([0.0, 0.0, 1.0, 0.0], 1.0),
        ([0.25, 0.75], 2 / 3),
    ],
)
def test_margin_weight__runs_from_level_to_alone(row: Vector, wanted: float) -> None:
    agree(margin_weight(torch.tensor([row], dtype=torch.float64)), [wanted])


# --- agreement_weight -------------------------------------------------------------------------------------------------


@over_shapes
@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_agreement_weight__is_the_labels_share_of_the_largest(b: int, c: int, sharpness: float) -> None:
    whole, labels = predictions(b, c, sharpness=sharpness), predictions(b, c, seed=1).argmax(1)
    wanted = [row[label] / max(row) for row, label in zip(whole.tolist(), labels.tolist(), strict=True)]
    agree(agreement_weight(whole, labels), wanted)


@few
@given(coarse_predictions(), st.integers(0, 5))
def test_agreement_weight__is_one_for_its_own_choice_and_never_more(whole: Tensor, label: int) -> None:
    labels = torch.full((len(whole),), label % whole.shape[1])
    found = agreement_weight(whole, labels)
    assert bool(((found >= 0) & (found <= 1)).all())
    assert agreement_weight(whole, whole.argmax(1)).tolist() == [1.0] * len(whole)
    agree(found, [row[label % len(row)] / max(row) for row in whole.tolist()])


def test_agreement_weight__mass_at_zero_or_one() -> None:
    whole = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert agreement_weight(whole, torch.tensor([0, 1])).tolist() == [0.0, 1.0]


# --- confusability ----------------------------------------------------------------------------------------------------


def confusable(anchors: Matrix, counts: Matrix) -> Matrix:
    """1 - (1 - s)(1 - f) for every pair of different classes."""
    pairs = [(one, other) for one in range(len(anchors)) for other in range(len(anchors)) if one != other]
    cosine = {(i, j): math.fsum(a * b for a, b in zip(anchors[i], anchors[j], strict=True)) for i, j in pairs}
    low, high = min(cosine.values()), max(cosine.values())
    together = {(i, j): counts[i][j] + counts[j][i] for i, j in pairs}
    most = max(together.values())
    found = [[0.0] * len(anchors) for _ in anchors]
    for pair in pairs:
        similar = (cosine[pair] - low) / (high - low) if high > low else 1.0
        frequent = together[pair] / most if most else 0.0
        found[pair[0]][pair[1]] = 1 - (1 - similar) * (1 - frequent)
    return found


@pytest.mark.parametrize("c", [3, 4, 11])
@pytest.mark.parametrize("d", [2, 8])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("seen", [True, False])
def test_confusability__is_similar_or_frequent(c: int, d: int, seed: int, seen: bool) -> None:
    anchors, counts = directions(c, d, seed=seed), seen_pairs(c, seed=seed) * seen
    found = confusability(anchors, counts)
    agree(found, confusable(anchors.tolist(), counts.tolist()))
    agree(found, found.T.tolist())
    assert bool(((found >= 0) & (found <= 1)).all())
    assert not found.diagonal().any()


def test_confusability__the_closest_pair_has_most_and_the_farthest_unseen_has_none() -> None:
    angles = [math.radians(angle) for angle in (0, 20, 90)]
    anchors = torch.tensor([[math.cos(angle), math.sin(angle)] for angle in angles], dtype=torch.float64)
    found = confusability(anchors, torch.zeros(3, 3, dtype=torch.float64))
    agree(found[0, [1, 2]], [1.0, 0.0])
    assert 0 < found[1, 2] < 1
    counts = torch.zeros(3, 3, dtype=torch.float64)
    counts[2, 0] = 4
    agree(confusability(anchors, counts)[0, 2], 1.0)


@pytest.mark.parametrize("counts", [[[0.0, 0.0], [0.0, 0.0]], [[0.0, 3.0], [1.0, 0.0]]])
def test_confusability__a_single_pair_is_fully_confusable(counts: Matrix) -> None:
    anchors = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    agree(confusability(anchors, torch.tensor(counts, dtype=torch.float64)), [[0.0, 1.0], [1.0, 0.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_confusability__a_single_pair_is_fully_confusable_at_any_width(dtype: torch.dtype) -> None:
    for d in range(2, 64):
        for seed in range(5):
            anchors = directions(2, d, seed=seed).to(dtype)
            agree(confusability(anchors, torch.zeros(2, 2, dtype=dtype)), [[0.0, 1.0], [1.0, 0.0]])


@pytest.mark.parametrize("c", [2, 3, 7])
def test_confusability__all_pairs_alike_are_fully_confusable(c: int) -> None:
    apart = torch.eye(c, dtype=torch.float64)
    wanted = (1 - apart).tolist()
    agree(confusability(apart, torch.zeros(c, c, dtype=torch.float64)), wanted)
    agree(confusability(apart[:1].expand(c, c), seen_pairs(c)), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_confusability__all_pairs_alike_but_for_rounding_are_fully_confusable(dtype: torch.dtype) -> None:
    for seed in range(5):
        turn, _ = torch.linalg.qr(directions(8, 8, seed=seed))
        corners = torch.eye(8, dtype=torch.float64)[:4]
        anchors = (normalize(corners - corners.mean(0), dim=1) @ turn).to(dtype)
        found = confusability(anchors, torch.zeros(4, 4, dtype=dtype))
        agree(found, (1 - torch.eye(4)).tolist())


def test_confusability__counts_matter_by_their_ratio_and_in_both_orders() -> None:
    anchors, counts = directions(5), seen_pairs(5)
    found = confusability(anchors, counts).tolist()
    agree(confusability(anchors, 10 * counts), found)
    agree(confusability(anchors, counts.T), found)


def test_confusability__permuting_classes_permutes() -> None:
    anchors, counts, order = directions(5), seen_pairs(5), torch.tensor([3, 0, 4, 1, 2])
    found = confusability(anchors, counts)
    agree(confusability(anchors[order], counts[order][:, order]), found[order][:, order].tolist())


# --- confusion_weight -------------------------------------------------------------------------------------------------


@over_shapes
@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_confusion_weight__scales_the_margins_penalty_by_the_pair(b: int, c: int, sharpness: float) -> None:
    probabilities, kappa = predictions(b, c, sharpness=sharpness), any_kappa(c)
    wanted = []
    for row in probabilities.tolist():
        first, second = first_two(row)
        wanted.append(1 - float(kappa[first, second]) * row[second] / row[first])
    found = confusion_weight(probabilities, kappa)
    agree(found, wanted)
    assert bool(((found >= 0) & (found <= 1)).all())


@few
@given(coarse_predictions(), st.floats(0, 1))
def test_confusion_weight__lies_between_the_margin_and_one(probabilities: Tensor, kappa: float) -> None:
    c = probabilities.shape[1]
    margin = margin_weight(probabilities)
    every = torch.full((c, c), kappa, dtype=torch.float64)
    agree(confusion_weight(probabilities, every), [1 - kappa * (1 - value) for value in margin.tolist()])
    agree(confusion_weight(probabilities, torch.ones_like(every)), margin.tolist())
    assert confusion_weight(probabilities, torch.zeros_like(every)).tolist() == [1.0] * len(probabilities)


def test_confusion_weight__a_close_race_counts_less_between_siblings_than_between_strangers() -> None:
    kappa = torch.tensor([[0.0, 0.9, 0.1], [0.9, 0.0, 0.1], [0.1, 0.1, 0.0]], dtype=torch.float64)
    races = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    agree(confusion_weight(races, kappa), [0.1, 0.9, 1.0])


# --- balanced ---------------------------------------------------------------------------------------------------------


def even(c: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((c,), 1 / c, dtype=dtype)


@over_shapes
@pytest.mark.parametrize("sharpness", SHARPNESS)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("expected", ["even", "uneven"])
def test_balanced__is_each_class_by_what_is_expected_over_its_mean_made_to_sum_to_one(
    b: int, c: int, sharpness: float, strength: float, expected: str
) -> None:
    probabilities = predictions(b, c, sharpness=sharpness)
    mean = predictions(1, c, seed=1)[0]
    prior = even(c) if expected == "even" else predictions(1, c, seed=2)[0]
    wanted = []
    for row in probabilities.tolist():
        scaled = [q * (pi / p) ** strength for q, pi, p in zip(row, prior.tolist(), mean.tolist(), strict=True)]
        wanted.append([value / math.fsum(scaled) for value in scaled])
    found = balanced(probabilities, mean, prior, strength)
    agree(found, wanted)
    assert found.dtype == probabilities.dtype


def test_balanced__by_an_even_mean_changes_nothing() -> None:
    probabilities = predictions(5, 4)
    agree(balanced(probabilities, even(4), even(4), 1.0), probabilities.tolist())


def test_balanced__by_a_mean_as_expected_changes_nothing() -> None:
    probabilities, mean = predictions(5, 4), predictions(1, 4, seed=1)[0]
    agree(balanced(probabilities, mean, mean, 1.0), probabilities.tolist())


def test_balanced__level_predictions_go_to_the_class_seen_least() -> None:
    mean = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    found = balanced(even(3)[None], mean, even(3), 1.0)[0]
    agree(found / found[0], [1.0, 0.5 / 0.2, 0.5 / 0.3])


@few
@given(st.integers(0, 10_000), st.integers(2, 8), st.floats(0.05, 1))
def test_balanced__brings_the_mean_nearer_to_what_is_expected(seed: int, c: int, strength: float) -> None:
    """Nearer in the sense of Kullback and Leibler, of which one step of scaling to given shares is a descent."""
    probabilities, prior = predictions(20, c, sharpness=6.0, seed=seed), predictions(1, c, seed=seed + 1)[0]
    mean = probabilities.mean(0)

    def away(shares: Tensor) -> float:
        return math.fsum(pi * math.log(pi / p) for pi, p in zip(prior.tolist(), shares.tolist(), strict=True))

    assert away(balanced(probabilities, mean, prior, strength).mean(0)) <= away(mean) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_balanced__a_class_never_predicted_before_stays_finite(dtype: torch.dtype) -> None:
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], dtype=dtype)
    found = balanced(probabilities, torch.tensor([1.0, 0.0, 0.0], dtype=dtype), even(3, dtype), 1.0)
    agree(found, [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_balanced__a_class_that_is_not_expected_loses_all_unless_there_is_no_other(dtype: torch.dtype) -> None:
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.9, 0.05, 0.05], [1.0, 0.0, 0.0]], dtype=dtype)
    prior = torch.tensor([0.0, 0.5, 0.5], dtype=dtype)
    found = balanced(probabilities, probabilities.mean(0), prior, 1.0)
    assert float(found[:2, 0].max()) < 1e-30
    agree(found[[0, 2]], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    agree(found.sum(1), [1.0] * 3)


@few
@given(coarse_predictions(), st.floats(0, 1), st.lists(st.integers(0, 3), min_size=6, max_size=6).filter(any))
def test_balanced__is_a_prediction_and_leaves_its_arguments_alone(
    probabilities: Tensor, strength: float, counts: list[int]
) -> None:
    mean = probabilities.mean(0)
    prior = torch.tensor(counts[: len(mean)], dtype=torch.float64)
    prior = prior / prior.sum() if prior.any() else even(len(mean))
    before = [value.clone() for value in (probabilities, mean, prior)]
    found = balanced(probabilities, mean, prior, strength)
    agree(found.sum(1), [1.0] * len(probabilities))
    assert bool((found >= 0).all())
    for value, old in zip((probabilities, mean, prior), before, strict=True):
        assert torch.equal(value, old)


# --- count_pairs ------------------------------------------------------------------------------------------------------


@over_shapes
def test_count_pairs__counts_one_image_at_a_time(b: int, c: int) -> None:
    probabilities = predictions(b, c)
    counted = [[0.0] * c for _ in range(c)]
    for row in probabilities.tolist():
        first, second = first_two(row)
        counted[first][second] += 1
    found = count_pairs(probabilities)
    assert found.tolist() == counted
    assert found.dtype == probabilities.dtype


@few
@given(coarse_predictions())
def test_count_pairs__counts_every_image_once_and_no_class_with_itself(probabilities: Tensor) -> None:
    found = count_pairs(probabilities)
    assert found.shape == (probabilities.shape[1],) * 2
    assert found.sum().item() == len(probabilities)
    assert not found.diagonal().any()


def test_count_pairs__batches_add_up() -> None:
    probabilities = predictions(20, 4)
    agree(count_pairs(probabilities[:7]) + count_pairs(probabilities[7:]), count_pairs(probabilities).tolist())


# --- self_training_weight ---------------------------------------------------------------------------------------------


def weight(kind: WeightKind, probabilities: Tensor, whole: Tensor, labels: Tensor, kappa: Tensor) -> Tensor:
    return self_training_weight(
        kind, probabilities=probabilities, global_probabilities=whole, labels=labels, confusable=kappa
    )


def believed(kind: str, row: Vector, whole: Vector, label: int, kappa: Matrix) -> float:
    """omega of one image: each factor the kind names."""
    first, second = first_two(row)
    factors = {
        "none": 1.0,
        "margin": 1 - row[second] / row[first],
        "agreement": whole[label] / max(whole),
        "confusion": 1 - kappa[first][second] * row[second] / row[first],
    }
    return math.prod(factors[name] for name in kind.split("*"))


@over_kinds
@over_shapes
@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_self_training_weight__is_the_product_of_what_it_names(
    kind: WeightKind, b: int, c: int, sharpness: float
) -> None:
    probabilities, whole = predictions(b, c, sharpness=sharpness), predictions(b, c, sharpness=sharpness, seed=1)
    labels, kappa = probabilities.argmax(1), any_kappa(c)
    rows = zip(probabilities.tolist(), whole.tolist(), labels.tolist(), strict=True)
    wanted = [believed(kind, row, other, label, kappa.tolist()) for row, other, label in rows]
    agree(weight(kind, probabilities, whole, labels, kappa), wanted)


@over_kinds
def test_self_training_weight__a_product_is_the_product_of_its_parts(kind: WeightKind) -> None:
    probabilities, whole, kappa = predictions(6, 4), predictions(6, 4, seed=1), any_kappa(4)
    parts: dict[str, WeightKind] = {name: name for name in KINDS if "*" not in name}
    product = torch.ones(6, dtype=torch.float64)
    for name in kind.split("*"):
        product = product * weight(parts[name], probabilities, whole, probabilities.argmax(1), kappa)
    agree(weight(kind, probabilities, whole, probabilities.argmax(1), kappa), product.tolist())


@over_kinds
@few
@given(probabilities=coarse_predictions(), sharp=st.booleans(), seed=st.integers(0, 1000))
def test_self_training_weight__is_in_the_unit_interval(
    kind: WeightKind, probabilities: Tensor, sharp: bool, seed: int
) -> None:
    b, c = probabilities.shape
    whole = predictions(b, c, sharpness=1000.0 if sharp else 1.0, seed=seed)
    kappa = confusability(directions(c, seed=seed), seen_pairs(c, seed=seed))
    for dtype in (torch.float32, torch.float64):
        found = weight(kind, probabilities.to(dtype), whole.to(dtype), probabilities.argmax(1), kappa.to(dtype))
        assert found.shape == (b,)
        assert found.dtype == dtype
        assert bool(((found >= 0) & (found <= 1)).all())


@over_kinds
def test_self_training_weight__without_confusability_unless_it_names_confusion(kind: WeightKind) -> None:
    probabilities, whole = predictions(6, 4), predictions(6, 4, seed=1)
    labels = probabilities.argmax(1)

    def without() -> Tensor:
        return self_training_weight(kind, probabilities=probabilities, global_probabilities=whole, labels=labels)

    if "confusion" in kind:
        with pytest.raises(ValueError, match="confusion weight needs the classes' confusability"):
            without()
    else:
        assert torch.equal(without(), weight(kind, probabilities, whole, labels, any_kappa(4)))


def test_self_training_weight__none_is_one() -> None:
    even = torch.full((3, 4), 0.25)
    assert weight("none", even, even, torch.arange(3), torch.ones(4, 4)).tolist() == [1.0] * 3


@over_kinds
def test_self_training_weight__permuting_images_permutes_and_classes_do_not_matter(kind: WeightKind) -> None:
    probabilities, whole = predictions(5, 4), predictions(5, 4, seed=1)
    labels, kappa = probabilities.argmax(1), confusability(directions(4), seen_pairs(4))
    found = weight(kind, probabilities, whole, labels, kappa)
    images, classes = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 3, 1])
    agree(weight(kind, probabilities[images], whole[images], labels[images], kappa), found[images].tolist())
    moved = weight(
        kind,
        probabilities[:, classes],
        whole[:, classes],
        classes.argsort()[labels],
        kappa[classes][:, classes],
    )
    agree(moved, found.tolist())


@over_kinds
def test_self_training_weight__of_two_classes_level_or_certain(kind: WeightKind) -> None:
    rows = torch.tensor([[0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    kappa = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    level = 0.0 if "margin" in kind or "confusion" in kind else 1.0
    assert weight(kind, rows, rows, rows.argmax(1), kappa).tolist() == [level, 1.0]
    against = 0.0 if "agreement" in kind else 1.0
    assert weight(kind, rows[[1]], rows[[1]].flip(1), torch.tensor([1]), kappa).tolist() == [against]
