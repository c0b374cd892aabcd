"""Joint features of whole images and crops, and the share of variance that labels explain."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finealign.method.joint import explained_variance, joint_features


def spread(rows: list[list[float]]) -> float:
    """Sum of squared distances from the mean, in plain Python."""
    middle = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    found: float = sum((value - mean) ** 2 for row in rows for value, mean in zip(row, middle, strict=True))
    return found


def test_joint_features_are_the_direction_of_the_sum_of_directions() -> None:
    found = joint_features(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 9.0]]))
    torch.testing.assert_close(found, torch.full((1, 2), 0.5**0.5))
    torch.testing.assert_close(joint_features(torch.tensor([[3.0, 4.0]]), None), torch.tensor([[0.6, 0.8]]))


@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 5))
def test_explained_variance__is_one_less_what_is_left_within_the_classes(seed: int, n: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 3, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    within = sum(spread(features[labels == c].tolist()) for c in set(labels.tolist()))
    assert explained_variance(features, labels) == pytest.approx(1 - within / spread(features.tolist()))


def test_explained_variance__degenerate() -> None:
    features = torch.arange(8.0).reshape(4, 2)
    assert explained_variance(features, torch.zeros(4, dtype=torch.int64)) == pytest.approx(0)
    assert explained_variance(features, torch.arange(4)) == pytest.approx(1)
    assert explained_variance(torch.ones(4, 2), torch.arange(4)) == 0


def test_explained_variance__an_image_that_counts_twice_is_as_two() -> None:
    features = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    counts = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0, 3.0])
    times = counts.long()
    repeated = explained_variance(features.repeat_interleave(times, 0), labels.repeat_interleave(times))
    assert explained_variance(features, labels, counts) == pytest.approx(repeated)
