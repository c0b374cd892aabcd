"""Each term of the loss against plain Python over lists, written from step 7 of METHOD.md and the docstrings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finealign.method.losses import fairness, mean_over, running_mean, weighted_cross_entropy

Vector = list[float]

few = settings(max_examples=60, deadline=None)

SHAPES = [(1, 2), (5, 2), (4, 3), (3, 11), (64, 10)]  # images, classes; also more classes than images
SCALES = [0.01, 1.0, 30.0, 100.0]

over_shapes = pytest.mark.parametrize(("b", "c"), SHAPES)


def agree(found: Tensor, wanted: object) -> None:
    expected = torch.tensor(wanted, dtype=found.dtype)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def example(b: int, c: int, *, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, C), labels (B,) and weights (B,)."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * (2 * torch.rand(b, c, generator=generator, dtype=torch.float64) - 1)
    labels = torch.randint(0, c, (b,), generator=generator)
    return logits, labels, torch.rand(b, generator=generator, dtype=torch.float64)


def surprise(logits: Vector, label: int) -> float:
    """-log of the label's share in the softmax."""
    highest = max(logits)
    return highest + math.log(math.fsum(math.exp(value - highest) for value in logits)) - logits[label]


def shares(c: int, seed: int) -> Tensor:
    raw = torch.rand(c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.01
    return raw / raw.sum()


def even(c: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((c,), 1 / c, dtype=dtype)


# --- weighted_cross_entropy -------------------------------------------------------------------------------------------


@over_shapes
@pytest.mark.parametrize("scale", SCALES)
def test_weighted_cross_entropy__is_the_mean_over_images_of_the_weighted_surprise(b: int, c: int, scale: float) -> None:
    logits, labels, weights = example(b, c, scale=scale)
    terms = [
        weight * surprise(row, label)
        for row, label, weight in zip(logits.tolist(), labels.tolist(), weights.tolist(), strict=True)
    ]
    agree(weighted_cross_entropy(logits, labels, weights), math.fsum(terms) / b)


@over_shapes
def test_weighted_cross_entropy__half_the_weights_are_half_the_loss(b: int, c: int) -> None:
    logits, labels, weights = example(b, c)
    whole = float(weighted_cross_entropy(logits, labels, weights))
    agree(weighted_cross_entropy(logits, labels, weights / 2), whole / 2)


@over_shapes
def test_weighted_cross_entropy__an_image_of_no_weight_counts_in_the_mean_alone(b: int, c: int) -> None:
    logits, labels, weights = example(b, c)
    more, other, _ = example(b, c, seed=1)
    found = weighted_cross_entropy(
        torch.cat([logits, more]), torch.cat([labels, other]), torch.cat([weights, torch.zeros_like(weights)])
    )
    agree(found, float(weighted_cross_entropy(logits, labels, weights)) / 2)


def test_weighted_cross_entropy__all_weights_zero_is_zero_and_pulls_nothing() -> None:
    logits, labels, weights = example(4, 3)
    logits.requires_grad_()
    found = weighted_cross_entropy(logits, labels, torch.zeros_like(weights))
    found.backward()  # type: ignore[no-untyped-call]
    assert found.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("c", [2, 7])
def test_weighted_cross_entropy__all_scores_equal_is_log_of_the_classes(c: int) -> None:
    _, labels, weights = example(5, c)
    found = weighted_cross_entropy(torch.full((5, c), 3.0, dtype=torch.float64), labels, torch.ones_like(weights))
    agree(found, math.log(c))


def test_weighted_cross_entropy__certainty_is_finite_right_or_wrong() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]] * 2)
    found = weighted_cross_entropy(logits, torch.tensor([0, 1]), torch.tensor([1.0, 0.5]))
    assert found.item() == 0.5 * 2e4 / 2


def test_weighted_cross_entropy__order_of_images_and_of_classes_do_not_matter() -> None:
    logits, labels, weights = example(5, 4)
    found = float(weighted_cross_entropy(logits, labels, weights))
    images, classes = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 3, 1])
    agree(weighted_cross_entropy(logits[images], labels[images], weights[images]), found)
    agree(weighted_cross_entropy(logits[:, classes], classes.argsort()[labels], weights), found)


def test_weighted_cross_entropy__gradient_is_the_weighted_error_a_share_of_the_batch() -> None:
    logits, labels, weights = example(4, 3)
    weighted_cross_entropy(logits.requires_grad_(), labels, weights).backward()  # type: ignore[no-untyped-call]
    wanted = []
    for row, label, weight in zip(logits.tolist(), labels.tolist(), weights.tolist(), strict=True):
        share = [math.exp(-surprise(row, c)) for c in range(3)]
        wanted.append([weight * (share[c] - (c == label)) / 4 for c in range(3)])
    assert logits.grad is not None
    agree(logits.grad, wanted)


# --- fairness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [2, 3, 10, 200])
@pytest.mark.parametrize("seed", range(3))
def test_fairness__with_an_even_prior_is_minus_the_mean_log(c: int, seed: int) -> None:
    mean = shares(c, seed)
    agree(fairness(mean, even(c)), -math.fsum(math.log(value) for value in mean.tolist()) / c)


@pytest.mark.parametrize("c", [2, 3, 10, 200])
@pytest.mark.parametrize("seed", range(3))
def test_fairness__is_minus_the_log_that_the_prior_expects(c: int, seed: int) -> None:
    mean, prior = shares(c, seed), shares(c, seed + 100)
    wanted = -math.fsum(pi * math.log(value) for pi, value in zip(prior.tolist(), mean.tolist(), strict=True))
    agree(fairness(mean, prior), wanted)


@pytest.mark.parametrize("c", [2, 3, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fairness__of_uniform_is_log_of_the_classes(c: int, dtype: torch.dtype) -> None:
    assert fairness(even(c, dtype), even(c, dtype)).item() == pytest.approx(math.log(c), rel=1e-6)


@st.composite
def two_distributions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A prior (C,), of which some shares are 0, and a mean prediction (C,) without zeros."""
    c = draw(st.integers(2, 12))
    prior = draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1.0)), min_size=c, max_size=c).filter(any))
    mean = draw(st.lists(st.floats(1e-6, 1.0), min_size=c, max_size=c))
    return tuple(torch.tensor(raw, dtype=torch.float64) / math.fsum(raw) for raw in (prior, mean))  # type: ignore[return-value]


@few
@given(two_distributions())
def test_fairness__is_least_where_the_mean_is_the_prior(drawn: tuple[Tensor, Tensor]) -> None:
    prior, mean = drawn
    least = -math.fsum(pi * math.log(pi) for pi in prior.tolist() if pi)  # Gibbs: the prior's entropy
    found = fairness(mean, prior).item()
    assert fairness(prior, prior).item() == pytest.approx(least, abs=1e-12)
    assert found >= least - 1e-12
    if float((mean - prior).abs().max()) > 1e-3:
        assert found > least


def test_fairness__pulls_towards_the_rarest_class_most_and_rests_at_uniform() -> None:
    mean = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64, requires_grad=True)
    (pull,) = torch.autograd.grad(fairness(mean, even(3)), mean)
    agree(pull, [-1 / (3 * value) for value in mean.tolist()])
    uniform = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    (rest,) = torch.autograd.grad(fairness(torch.softmax(uniform, dim=0), even(4)), uniform)
    agree(rest, [0.0] * 4)


def test_fairness__pulls_by_what_is_missing_and_rests_at_the_prior() -> None:
    mean, prior = shares(5, 0).requires_grad_(), shares(5, 1)
    (pull,) = torch.autograd.grad(fairness(mean, prior), mean)
    agree(pull, [-pi / value for pi, value in zip(prior.tolist(), mean.tolist(), strict=True)])
    logits = shares(5, 2).log().requires_grad_()
    (pull,) = torch.autograd.grad(fairness(torch.softmax(logits, dim=0), prior), logits)
    agree(pull, (shares(5, 2) - prior).tolist())  # as that of a cross-entropy
    logits = prior.log().requires_grad_()
    (rest,) = torch.autograd.grad(fairness(torch.softmax(logits, dim=0), prior), logits)
    agree(rest, [0.0] * 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mean", [[1.0, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0, 0.0]])
def test_fairness__a_class_of_no_mass_stays_finite(mean: Vector, dtype: torch.dtype) -> None:
    leaf = torch.tensor(mean, dtype=dtype, requires_grad=True)
    found = fairness(leaf, even(len(mean), dtype))
    (pull,) = torch.autograd.grad(found, leaf)
    smallest = torch.finfo(dtype).tiny
    wanted = -math.fsum(math.log(max(value, smallest)) for value in mean) / len(mean)
    assert found.item() == pytest.approx(wanted, rel=1e-6)
    assert found.item() > math.log(len(mean))
    assert bool(pull.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mean", [[0.5, 0.25, 0.25], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
def test_fairness__a_class_that_is_not_expected_counts_for_nothing(mean: Vector, dtype: torch.dtype) -> None:
    leaf = torch.tensor(mean, dtype=dtype, requires_grad=True)
    found = fairness(leaf, torch.tensor([0.75, 0.25, 0.0], dtype=dtype))
    (pull,) = torch.autograd.grad(found, leaf)
    smallest = torch.finfo(dtype).tiny
    wanted = -0.75 * math.log(max(mean[0], smallest)) - 0.25 * math.log(max(mean[1], smallest))
    assert found.item() == pytest.approx(wanted, rel=1e-6)
    assert bool(pull.isfinite().all()) and pull[2] == 0


def test_fairness__order_of_classes_does_not_matter() -> None:
    mean, prior, order = shares(5, 0), shares(5, 1), torch.tensor([3, 0, 4, 1, 2])
    agree(fairness(mean[order], prior[order]), fairness(mean, prior).item())


# --- mean_over --------------------------------------------------------------------------------------------------------


@over_shapes
def test_mean_over__counts_each_image_as_far_as_it_belongs(b: int, c: int) -> None:
    logits, _, belonging = example(b, c)
    rows = torch.softmax(logits, dim=1)
    wanted = [
        math.fsum(far * row[k] for far, row in zip(belonging.tolist(), rows.tolist(), strict=True))
        / math.fsum(belonging.tolist())
        for k in range(c)
    ]
    agree(mean_over(rows, belonging), wanted)
    agree(mean_over(rows, belonging).sum(), 1.0)


@over_shapes
def test_mean_over__where_all_belong_alike_is_the_mean(b: int, c: int) -> None:
    rows = torch.softmax(example(b, c)[0], dim=1)
    agree(mean_over(rows, None), [math.fsum(column) / b for column in rows.T.tolist()])
    for far in (1.0, 0.01):
        agree(mean_over(rows, torch.full((b,), far, dtype=torch.float64)), rows.mean(0).tolist())


def test_mean_over__two_halves_of_an_image_are_one_and_one_that_hardly_belongs_is_none() -> None:
    rows = torch.softmax(example(4, 3)[0], dim=1)
    halved = mean_over(torch.cat([rows, rows[:1]]), torch.tensor([0.5, 1, 1, 1, 0.5], dtype=torch.float64))
    agree(halved, mean_over(rows, None).tolist())
    without = mean_over(rows, torch.tensor([1e-30, 1, 1, 1], dtype=torch.float64))
    agree(without, rows[1:].mean(0).tolist())


# --- running_mean -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("c", [2, 7])
def test_running_mean__keeps_the_momentum_of_the_past(c: int, momentum: float) -> None:
    previous, current = shares(c, 0), shares(c, 1)
    wanted = [
        momentum * old + (1 - momentum) * new for old, new in zip(previous.tolist(), current.tolist(), strict=True)
    ]
    found = running_mean(previous, current, momentum=momentum)
    agree(found, wanted)
    agree(found.sum(), 1.0)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 1.0])
def test_running_mean__gradient_of_current_is_one_whatever_the_momentum(momentum: float) -> None:
    previous, current = shares(4, 0), shares(4, 1).requires_grad_()
    found = running_mean(previous, current, momentum=momentum)
    for c in range(4):
        (row,) = torch.autograd.grad(found[c], current, retain_graph=True)
        assert row.tolist() == [float(c == other) for other in range(4)]


def test_running_mean__is_as_wide_open_as_its_current_batch_and_changes_neither() -> None:
    previous, current = shares(4, 0), shares(4, 1)
    before = previous.tolist(), current.tolist()
    assert not running_mean(previous, current, momentum=0.5).requires_grad
    assert (previous.tolist(), current.tolist()) == before


def test_running_mean__no_gradient_through_previous() -> None:
    previous, current = shares(4, 0).requires_grad_(), shares(4, 1).requires_grad_()
    found = running_mean(previous, current, momentum=0.9)
    (pull,) = torch.autograd.grad(fairness(found, even(4)), previous, allow_unused=True)
    assert pull is None or not pull.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses__keep_the_dtype(dtype: torch.dtype) -> None:
    logits, labels, weights = example(3, 4)
    mean = shares(4, 0).to(dtype)
    assert weighted_cross_entropy(logits.to(dtype), labels, weights.to(dtype)).dtype == dtype
    assert fairness(mean, mean).dtype == running_mean(mean, mean, momentum=0.5).dtype == dtype
