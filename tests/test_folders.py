"""What benchmarks/folders.py measures by: how folders are drawn, and its two measures against plain statements."""

import numpy as np
import pytest
from folders import VARIANTS, auroc, chosen_per_class, ece
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=3, max_size=12), st.sampled_from(VARIANTS), st.integers(0, 99))
def test_chosen_per_class__never_more_than_there_are_and_as_many_classes_as_meant(
    sizes: list[int], variant: str, seed: int
) -> None:
    found = chosen_per_class(sizes, variant, np.random.default_rng(seed))
    assert all(0 <= count <= size for count, size in zip(found, sizes, strict=True))
    present = {"half": (len(sizes) + 1) // 2, "three": 3, "one": 1}.get(variant, len(sizes))
    assert sum(count > 0 for count in found) == present
    if variant in ("even", "strangers", "copies"):
        assert found == sizes
    assert found == chosen_per_class(sizes, variant, np.random.default_rng(seed))


def test_chosen_per_class__a_tail_and_a_dominant_class_of_twenty_to_one() -> None:
    rng = np.random.default_rng(0)
    assert sorted(chosen_per_class([100] * 3, "tail", rng)) == [5, 22, 100]
    assert sorted(chosen_per_class([100] * 4, "dominated", rng)) == [5, 5, 5, 100]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=20))
def test_auroc__is_the_share_of_pairs_in_order(rows: list[tuple[int, bool]]) -> None:
    high, low = ([score for score, positive in rows if positive == wanted] for wanted in (True, False))
    if high and low:
        pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in high for b in low]
        found = auroc(np.array([float(score) for score, _ in rows]), np.array([positive for _, positive in rows]))
        assert found == pytest.approx(sum(pairs) / len(pairs))


def test_ece__by_hand() -> None:
    run = {
        "start_confidence": [0.95, 0.95, 0.99, 1.0, 0.55, 0.55],
        "start_right": [True, True, False, True, False, True],
    }
    assert ece(run, "start", bins=2) == pytest.approx(abs((0.95 * 2 + 0.99 + 1.0 + 1.1) / 6 - 4 / 6))
    first, second = abs(3.89 / 4 - 3 / 4) * 4 / 6, abs(0.55 - 0.5) * 2 / 6
    assert ece(run, "start", bins=10) == pytest.approx(first + second)
    assert ece({"start_confidence": [1.0, 1.0], "start_right": [True, True]}, "start") == 0
