"""Each measure against a plain-Python statement of its formula; each reader against real files."""

import json
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from real_data import ADVICE, shared_folder

from finealign.errors import ImageInputError
from finealign.evaluate import metrics as evaluate
from finealign.evaluate.metrics import (
    ConfusedPair,
    Interval,
    balanced_difference,
    balanced_mean,
    bootstrap_interval,
    brier_score,
    confused_pairs,
    confusion_matrix,
    expected_calibration_error,
    paired_difference,
    per_class_accuracy,
    top_k_accuracy,
)
from finealign.evaluate.summary import Evaluation, evaluate_scores, summary
from finealign.evaluate.truth import read_truth
from finealign.images.listing import list_images

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

few = settings(max_examples=60, deadline=None)


@st.composite
def scored(draw: st.DrawFn) -> tuple[Floats, Ints]:
    """Scores (n, C) on a coarse grid, so that ties are common, and labels (n,)."""
    n, num_classes = draw(st.integers(1, 12)), draw(st.integers(1, 7))
    cells = st.lists(st.integers(-2, 2), min_size=n * num_classes, max_size=n * num_classes)
    labels = st.lists(st.integers(0, num_classes - 1), min_size=n, max_size=n)
    return np.array(draw(cells), dtype=np.float64).reshape(n, num_classes), np.array(draw(labels))


def softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def names(num_classes: int) -> list[str]:
    return [f"class {index}" for index in range(num_classes)]


def example(n: int = 200, num_classes: int = 6, seed: int = 0) -> tuple[Floats, Ints]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, n)
    return generator.normal(size=(n, num_classes)) + np.eye(num_classes)[labels], labels


def of(scores: Floats, labels: Ints) -> Evaluation:
    return evaluate_scores(scores, softmax(scores), labels, names(scores.shape[1]))


# --- top_k_accuracy ---------------------------------------------------------------------------------------------------


@few
@given(scored(), st.integers(1, 9))
def test_top_k_accuracy__is_membership_in_a_stable_sort(case: tuple[Floats, Ints], k: int) -> None:
    scores, labels = case
    hits = 0
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        best_first = sorted(range(len(row)), key=lambda index: -row[index])  # sorted() is stable: ties by index
        hits += label in best_first[:k]
    assert top_k_accuracy(scores, labels, k) == pytest.approx(hits / len(labels))


@few
@given(scored())
def test_top_k_accuracy__of_one_is_argmax(case: tuple[Floats, Ints]) -> None:
    scores, labels = case
    assert top_k_accuracy(scores, labels, 1) == np.mean(scores.argmax(axis=1) == labels)


def test_top_k_accuracy__tied_scores_earn_no_more_than_k_classes() -> None:
    labels = np.arange(10)
    assert [top_k_accuracy(np.zeros((10, 10)), labels, k) for k in (1, 5, 10)] == [0.1, 0.5, 1.0]


def test_top_k_accuracy__k_beyond_the_classes_is_one() -> None:
    assert top_k_accuracy(np.array([[0.1, 0.9, 0.5]]), np.array([0]), 5) == 1.0
    assert top_k_accuracy(np.array([[0.1, 0.9, 0.5]]), np.array([0]), 2) == 0.0


def test_top_k_accuracy__one_image_of_one_class() -> None:
    assert top_k_accuracy(np.array([[-3.0]]), np.array([0]), 1) == 1.0


@pytest.mark.parametrize(
    ("scores", "labels", "k", "message"),
    [
        (np.zeros((2, 3)), np.array([0, 1]), 0, "k must be"),
        (np.zeros((0, 3)), np.zeros(0, dtype=int), 1, "at least one image"),
        (np.zeros((2, 3)), np.array([0]), 1, "2 rows of scores for 1 labels"),
        (np.zeros((2, 3)), np.array([0, 3]), 1, r"labels must be in \[0, 3\)"),
        (np.zeros((2, 3)), np.array([0, -1]), 1, r"labels must be in \[0, 3\)"),
        (np.zeros((2, 3)), np.array([0.0, 1.0]), 1, "one integer an image"),
        (np.array([[np.nan, 1.0]]), np.array([0]), 1, "NaN"),
    ],
)
def test_top_k_accuracy__refuses_what_does_not_fit(scores: Floats, labels: Ints, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k_accuracy(scores, labels, k)


# --- per_class_accuracy, confusion_matrix, confused_pairs -------------------------------------------------------------


@few
@given(scored())
def test_confusion_matrix__counts_one_image_at_a_time(case: tuple[Floats, Ints]) -> None:
    scores, labels = case
    predicted, size = scores.argmax(axis=1), scores.shape[1]
    counted = [[0] * size for _ in range(size)]
    for truth, guess in zip(labels, predicted, strict=True):
        counted[truth][guess] += 1
    assert confusion_matrix(predicted, labels, size).tolist() == counted


def test_confusion_matrix__takes_small_integer_types() -> None:
    labels = np.array([199, 0], dtype=np.uint8)  # 199 * 200 + 199 does not fit in eight bits
    assert confusion_matrix(labels, labels, 200)[199, 199] == 1


def test_confusion_matrix__refuses_a_prediction_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 2\)"):
        confusion_matrix(np.array([2]), np.array([0]), 2)


@few
@given(scored())
def test_per_class_accuracy__is_the_mean_over_the_images_of_a_class(case: tuple[Floats, Ints]) -> None:
    scores, labels = case
    predicted, size = scores.argmax(axis=1), scores.shape[1]
    found = per_class_accuracy(predicted, labels, size)
    assert found.shape == (size,)
    for index in range(size):
        hits = [guess == index for guess, truth in zip(predicted, labels, strict=True) if truth == index]
        assert found[index] == pytest.approx(sum(hits) / len(hits) if hits else math.nan, nan_ok=True)


def test_per_class_accuracy__empty_class_is_nan() -> None:
    found = per_class_accuracy(np.array([0, 1, 1]), np.array([0, 0, 0]), 3)
    assert found[0] == pytest.approx(1 / 3)
    assert np.isnan(found[1:]).all()


def test_confused_pairs__sorts_by_count_and_leaves_out_the_diagonal() -> None:
    confusion = np.array([[5, 3, 0], [1, 9, 0], [3, 0, 0]])
    assert confused_pairs(confusion, ["a", "b", "c"]) == [
        ConfusedPair("c", "a", 3, 1.0),
        ConfusedPair("a", "b", 3, 0.375),
        ConfusedPair("b", "a", 1, 0.1),
    ]
    assert [pair.truth for pair in confused_pairs(confusion, ["a", "b", "c"], most=2)] == ["c", "a"]


def test_confused_pairs__none_when_all_is_right() -> None:
    assert confused_pairs(np.diag([4, 0, 2]), ["a", "b", "c"]) == []


def test_confused_pairs__refuses_the_wrong_number_of_names() -> None:
    with pytest.raises(ValueError, match="for 2 classes"):
        confused_pairs(np.zeros((3, 3), dtype=np.int64), ["a", "b"])


# --- expected_calibration_error ---------------------------------------------------------------------------------------


def calibration_error(probabilities: Floats, labels: Ints, bins: int) -> float:
    """Guo et al. 2017, one bin at a time."""
    total = 0.0
    for index in range(bins):
        low, high = index / bins, (index + 1) / bins
        inside = [(max(p), p.index(max(p)) == y) for p, y in zip(probabilities.tolist(), labels, strict=True)]
        inside = [(confidence, hit) for confidence, hit in inside if low < confidence <= high]
        if inside:
            accuracy = sum(hit for _, hit in inside) / len(inside)
            confidence = sum(confidence for confidence, _ in inside) / len(inside)
            total += len(inside) / len(labels) * abs(accuracy - confidence)
    return total


@few
@given(scored(), st.sampled_from([1, 2, 3, 10, 15]))
def test_expected_calibration_error__is_the_sum_over_bins(case: tuple[Floats, Ints], bins: int) -> None:
    probabilities = np.minimum(softmax(case[0]), 1.0)
    expected = calibration_error(probabilities, case[1], bins)
    assert expected_calibration_error(probabilities, case[1], bins) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bins", [2, 4, 5, 10])
def test_expected_calibration_error__a_bin_holds_its_upper_edge(bins: int) -> None:
    # Confidence on the edge of two bins, one right and one wrong: in one bin with 0.9, the errors would cancel.
    for edge in (index / bins for index in range(1, bins + 1) if index / bins > 0.5):
        probabilities = np.array([[edge, 1 - edge], [edge - 0.01, 1.01 - edge], [1.0, 0.0]])
        labels = np.array([1, 0, 0])
        expected = calibration_error(probabilities, labels, bins)
        assert expected_calibration_error(probabilities, labels, bins) == pytest.approx(expected, abs=1e-12)


def test_expected_calibration_error__by_hand() -> None:
    sure, unsure = [1.0, 0.0], [0.6, 0.4]
    assert expected_calibration_error(np.array([sure, sure]), np.array([0, 0])) == 0.0
    assert expected_calibration_error(np.array([sure, sure]), np.array([1, 1])) == 1.0
    assert expected_calibration_error(np.array([unsure] * 5), np.array([0, 0, 0, 1, 1])) == pytest.approx(0.0)
    # Two bins: 0.5 * |1 - 0.6| + 0.5 * |0 - 1|. One bin: |0.5 - 0.8|.
    assert expected_calibration_error(np.array([unsure, sure]), np.array([0, 1])) == pytest.approx(0.7)
    assert expected_calibration_error(np.array([unsure, sure]), np.array([0, 1]), bins=1) == pytest.approx(0.3)


def test_expected_calibration_error__rounding_past_one_stays_in_the_last_bin() -> None:
    # One image of four wrong, at a confidence of 3/4 in all: no error, as long as all four share a bin.
    past, below = [1.0 + 1e-7, 0.0], [0.5 - 1e-7, 0.5 + 1e-7]
    probabilities, labels = np.array([past, past, below, below]), np.array([0, 1, 1, 1])
    assert expected_calibration_error(probabilities, labels, bins=1) == pytest.approx(0.0, abs=1e-6)


def test_expected_calibration_error__takes_half_precision() -> None:
    scores, labels = example(num_classes=100)
    exact = expected_calibration_error(softmax(scores), labels)
    half = expected_calibration_error(softmax(scores).astype(np.float16), labels)
    assert half == pytest.approx(exact, abs=2e-3)


@pytest.mark.parametrize("scores", [[[0.5, 0.9]], [[1.5, -0.5]], [[0.1, 0.2]], [[np.inf, 0.0]]])
def test_expected_calibration_error__refuses_scores(scores: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="were scores given"):
        expected_calibration_error(np.array(scores), np.array([0]))


# --- brier_score ------------------------------------------------------------------------------------------------------


@few
@given(scored())
def test_brier_score__is_the_sum_over_classes_image_by_image(case: tuple[Floats, Ints]) -> None:
    probabilities, labels = softmax(case[0]), case[1]
    total = 0.0
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        total += sum((value - (index == label)) ** 2 for index, value in enumerate(row))
    assert brier_score(probabilities, labels) == pytest.approx(total / len(labels), abs=1e-12)
    assert 0 <= brier_score(probabilities, labels) <= 2


def test_brier_score__by_hand() -> None:
    sure, unsure, even = [1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [1 / 3] * 3
    assert brier_score(np.array([sure]), np.array([0])) == 0.0
    assert brier_score(np.array([sure]), np.array([2])) == 2.0
    assert brier_score(np.array([even]), np.array([1])) == pytest.approx(1 - 1 / 3)
    assert brier_score(np.array([unsure, sure]), np.array([1, 0])) == pytest.approx((0.36 + 0.36) / 2)


def test_brier_score__leaves_its_argument_and_takes_half_precision() -> None:
    scores, labels = example(num_classes=100)
    probabilities = softmax(scores).astype(np.float16)
    before = probabilities.copy()
    assert brier_score(probabilities, labels) == pytest.approx(brier_score(softmax(scores), labels), abs=2e-3)
    assert np.array_equal(probabilities, before)


def test_brier_score__refuses_scores() -> None:
    with pytest.raises(ValueError, match="were scores given"):
        brier_score(np.array([[0.5, 0.9]]), np.array([0]))


# --- balanced_mean, balanced_difference -------------------------------------------------------------------------------


def balanced_accuracy(predicted: Ints, labels: Ints) -> float:
    """The mean of the recalls of the classes that have images, one image at a time."""
    images: dict[int, int] = {}
    hits: dict[int, int] = {}
    for guess, truth in zip(predicted.tolist(), labels.tolist(), strict=True):
        images[truth] = images.get(truth, 0) + 1
        hits[truth] = hits.get(truth, 0) + (guess == truth)
    return sum(hits[truth] / images[truth] for truth in images) / len(images)


def uneven(seed: int = 0) -> tuple[Ints, Ints]:
    """Predictions and labels of 190, 10, 10 and 10 images: the large class is right nine times in ten, others half."""
    labels = np.repeat([0, 1, 2, 3], [190, 10, 10, 10])
    right = np.random.default_rng(seed).random(220) < np.where(labels == 0, 0.9, 0.5)
    return np.where(right, labels, (labels + 1) % 4), labels


@few
@given(scored())
def test_balanced_mean__of_correctness_is_the_mean_of_the_recalls(case: tuple[Floats, Ints]) -> None:
    predicted, labels = case[0].argmax(axis=1), case[1]
    found = balanced_mean(predicted == labels, labels)
    assert found.mean == pytest.approx(balanced_accuracy(predicted, labels))
    assert 0 <= found.low <= found.high <= 1


def test_balanced_mean__differs_from_accuracy_on_uneven_classes_alone() -> None:
    predicted, labels = uneven()
    assert np.mean(predicted == labels) > balanced_mean(predicted == labels, labels).mean + 0.15
    everything = np.zeros(220, dtype=int)  # one class for all: accurate, and of no use
    assert np.mean(everything == labels) == pytest.approx(190 / 220)
    assert balanced_mean(everything == labels, labels).mean == 0.25
    even = np.tile([0, 1, 2, 3], 55)
    correct = np.random.default_rng(1).random(220) < 0.6
    assert balanced_mean(correct, even).mean == pytest.approx(correct.mean())


def test_balanced_mean__interval_agrees_with_drawing_images_of_each_class() -> None:
    predicted, labels = uneven()
    correct, generator = predicted == labels, np.random.default_rng(3)
    means = np.zeros(8000)
    for index, size in enumerate([190, 10, 10, 10]):
        draws = generator.integers(0, size, size=(8000, size))
        means += correct[labels == index][draws].mean(axis=1) / 4
    low, high = np.percentile(means, [2.5, 97.5])
    found = balanced_mean(correct, labels)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_balanced_mean__neither_order_of_images_nor_of_classes_matters() -> None:
    predicted, labels = uneven()
    correct, order = predicted == labels, np.random.default_rng(5).permutation(220)
    found = balanced_mean(correct, labels)
    assert balanced_mean(correct[order], labels[order]) == found
    assert balanced_mean(correct, np.array([2, 0, 3, 1])[labels]) == found
    assert balanced_mean(correct, labels, seed=1) != found


def test_balanced_mean__all_right_has_no_width() -> None:
    labels = np.array([0, 0, 1, 2, 4, 4, 4])
    assert balanced_mean(np.ones(7, dtype=bool), labels) == Interval(1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "labels"), [([], []), ([[1.0]], [[0]]), ([np.nan], [0]), ([1.0, 0.0], [0]), ([1.0], [0, 1])]
)
def test_balanced_mean__refuses_what_does_not_fit(values: list[float], labels: list[int]) -> None:
    with pytest.raises(ValueError, match="values"):
        balanced_mean(np.array(values), np.array(labels, dtype=np.int64))


def test_balanced_difference__is_that_of_the_balanced_accuracies_and_paired() -> None:
    (start, labels), generator = uneven(), np.random.default_rng(7)
    adapted = np.where(generator.random(220) < 0.1, labels, start)  # a tenth of the answers mended
    found = balanced_difference(adapted == labels, start == labels, labels)
    assert found.mean == pytest.approx(balanced_accuracy(adapted, labels) - balanced_accuracy(start, labels))
    assert 0 <= found.low < found.mean < found.high
    alone = balanced_mean(adapted == labels, labels)
    assert found.high - found.low < alone.high - alone.low
    assert balanced_difference(start == labels, start == labels, labels) == Interval(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="different images"):
        balanced_difference(np.array([True, False]), np.array([True]), np.array([0, 1]))


# --- bootstrap_interval, paired_difference ----------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(200, 400), (320, 400), (3600, 4000)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bootstrap_interval__of_coin_tosses_is_near_the_normal_approximation(right: int, n: int, level: float) -> None:
    found = bootstrap_interval(np.arange(n) < right, level=level, resamples=4000)
    share = right / n
    half = {0.8: 1.2816, 0.95: 1.9600}[level] * math.sqrt(share * (1 - share) / n)
    assert found.mean == share
    assert found.low == pytest.approx(share - half, abs=0.12 * half)
    assert found.high == pytest.approx(share + half, abs=0.12 * half)


def test_bootstrap_interval__agrees_with_drawing_images() -> None:
    values = np.random.default_rng(1).exponential(size=60)
    draws = np.random.default_rng(2).integers(0, 60, size=(8000, 60))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    found = bootstrap_interval(values, resamples=8000)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_bootstrap_interval__same_seed_same_interval_whatever_the_order() -> None:
    values = np.arange(100) % 3 == 0
    first = bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values[::-1], seed=3) == first
    assert {bootstrap_interval(values, seed=seed) for seed in range(5)} != {first}


def test_bootstrap_interval__chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=30)
    whole = bootstrap_interval(values, resamples=101)
    monkeypatch.setattr(evaluate, "CELLS_AT_ONCE", 200)  # six resamples at a time, and five at the end
    assert bootstrap_interval(values, resamples=101) == whole


@pytest.mark.parametrize("values", [[1.0], [0.0], [0.1, 0.1, 0.1], [-1.0] * 7])
def test_bootstrap_interval__equal_values_have_no_width(values: list[float]) -> None:
    assert bootstrap_interval(np.array(values)) == Interval(values[0], values[0], values[0])


def test_bootstrap_interval__does_not_touch_the_global_generator() -> None:
    np.random.seed(0)
    untouched = np.random.random()
    np.random.seed(0)
    bootstrap_interval(np.array([0.0, 1.0]))
    assert np.random.random() == untouched


@pytest.mark.parametrize("values", [[], [np.nan, 1.0], [np.inf], [[1.0, 0.0]]])
def test_bootstrap_interval__refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values must be"):
        bootstrap_interval(np.array(values))


@pytest.mark.parametrize(("resamples", "level"), [(0, 0.95), (10, 0.0), (10, 1.0), (10, 95.0)])
def test_bootstrap_interval__refuses_settings_out_of_range(resamples: int, level: float) -> None:
    with pytest.raises(ValueError, match="resamples must be"):
        bootstrap_interval(np.array([0.0, 1.0]), resamples=resamples, level=level)


def test_paired_difference__is_narrower_than_unpaired_when_correctness_goes_together() -> None:
    generator = np.random.default_rng(0)
    start = generator.random(500) < 0.6
    adapted = np.where(generator.random(500) < 0.1, ~start, start)  # nine images in ten answer alike
    paired = paired_difference(adapted, start)
    unpaired = paired_difference(generator.permutation(adapted), start)
    assert paired.mean == pytest.approx(adapted.mean() - start.mean())
    assert unpaired.mean == pytest.approx(paired.mean)
    assert paired.high - paired.low < 0.6 * (unpaired.high - unpaired.low)
    apart = math.sqrt(np.var(adapted.astype(float) - start) / 500)
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * apart, rel=0.1)


def test_paired_difference__is_signed_adapted_minus_start() -> None:
    adapted, start = np.array([True, True, True, False]), np.array([True, False, False, False])
    found = paired_difference(adapted, start)
    assert found.mean == 0.5
    assert 0 <= found.low < 0.5 < found.high <= 1
    assert paired_difference(start, adapted).mean == -0.5


def test_paired_difference__of_the_same_answers_is_zero() -> None:
    same = np.array([True, False, True])
    assert paired_difference(same, same) == Interval(0.0, 0.0, 0.0)


def test_paired_difference__refuses_different_images() -> None:
    with pytest.raises(ValueError, match="different images"):
        paired_difference(np.array([True, False]), np.array([True]))


# --- evaluate_scores --------------------------------------------------------------------------------------------------


def test_evaluate_scores__gathers_the_measures() -> None:
    scores, labels = example()
    found = of(scores, labels)
    predicted = scores.argmax(axis=1)
    assert found.top1 == bootstrap_interval(predicted == labels)
    assert found.top1.low < found.top1.mean == top_k_accuracy(scores, labels, 1) < found.top1.high
    assert found.top5 == top_k_accuracy(scores, labels, 5)
    assert found.ece == expected_calibration_error(softmax(scores), labels)
    assert found.brier == brier_score(softmax(scores), labels)
    assert found.balanced == balanced_mean(predicted == labels, labels)
    assert list(found.per_class.values()) == per_class_accuracy(predicted, labels, 6).tolist()
    assert np.array_equal(found.confusion, confusion_matrix(predicted, labels, 6))
    assert found.pairs == tuple(confused_pairs(found.confusion, names(6)))
    assert np.array_equal(found.correct, predicted == labels)


@pytest.mark.parametrize("seed", range(3))
def test_evaluate_scores__permuting_classes_permutes_the_results(seed: int) -> None:
    scores, labels = example(seed=seed)
    order = np.random.default_rng(seed + 10).permutation(6)
    classes = names(6)
    found = of(scores, labels)
    permuted = evaluate_scores(
        scores[:, order], softmax(scores)[:, order], np.argsort(order)[labels], [classes[index] for index in order]
    )
    assert permuted.top1 == found.top1
    assert permuted.balanced == found.balanced
    assert permuted.brier == pytest.approx(found.brier)
    assert permuted.top5 == found.top5
    assert permuted.ece == pytest.approx(found.ece)
    assert permuted.per_class == found.per_class  # by name
    assert list(permuted.per_class) == [classes[index] for index in order]
    assert np.array_equal(permuted.confusion, found.confusion[np.ix_(order, order)])
    assert permuted.pairs == found.pairs


def test_evaluate_scores__one_image_and_empty_classes() -> None:
    found = of(np.array([[0.0, 2.0, 1.0]]), np.array([2]))
    assert found.top1 == Interval(0.0, 0.0, 0.0)
    assert found.top5 == 1.0
    assert found.per_class == {"class 0": None, "class 1": None, "class 2": 0.0}
    assert found.pairs == (ConfusedPair("class 2", "class 1", 1, 1.0),)


def test_evaluate_scores__one_class() -> None:
    found = of(np.zeros((3, 1)), np.zeros(3, dtype=int))
    assert (found.top1.mean, found.top5, found.ece, found.pairs) == (1.0, 1.0, 0.0, ())
    assert (found.balanced, found.brier) == (Interval(1.0, 1.0, 1.0), 0.0)


def test_evaluate_scores__tied_scores() -> None:
    found = of(np.zeros((12, 6)), np.arange(12) % 6)
    assert found.top1.mean == pytest.approx(1 / 6)
    assert found.top5 == pytest.approx(5 / 6)
    assert found.ece == pytest.approx(0.0)
    assert found.confusion.sum(axis=0).tolist() == [12, 0, 0, 0, 0, 0]


def test_evaluate_scores__labels_come_from_scores_and_calibration_from_probabilities() -> None:
    scores, probabilities = np.array([[1.0, 0.0]]), np.array([[0.2, 0.8]])
    found = evaluate_scores(scores, probabilities, np.array([0]), ["a", "b"])
    assert found.top1.mean == 1.0
    assert found.ece == pytest.approx(0.8)


@pytest.mark.parametrize("classes", [["a"], ["a", "b", "c"], ["a", "a"]])
def test_evaluate_scores__refuses_other_classes(classes: list[str]) -> None:
    with pytest.raises(ValueError, match="class"):
        evaluate_scores(np.zeros((1, 2)), np.full((1, 2), 0.5), np.array([0]), classes)


# --- summary ----------------------------------------------------------------------------------------------------------


def test_summary__is_this_json() -> None:
    labels = np.array([0, 0, 1, 1])
    adapted = of(np.eye(3)[[0, 0, 1, 0]], labels)
    start = of(np.eye(3)[[1, 0, 0, 0]], labels)
    difference = paired_difference(adapted.correct, start.correct)
    balanced = balanced_difference(adapted.correct, start.correct, labels)
    found = json.loads(
        json.dumps(summary(adapted, start, difference, balanced, images=4, set_aside=2), allow_nan=False)
    )
    of_start = {
        "top1": 0.25,
        "top5": 1.0,
        "ece": start.ece,
        "top1_low": start.top1.low,
        "top1_high": start.top1.high,
        "balanced": 0.25,
        "balanced_low": start.balanced.low,
        "balanced_high": start.balanced.high,
        "brier": start.brier,
    }
    assert found == {
        "adapted": {
            "top1": 0.75,
            "top5": 1.0,
            "ece": adapted.ece,
            "top1_low": adapted.top1.low,
            "top1_high": adapted.top1.high,
            "balanced": 0.75,
            "balanced_low": adapted.balanced.low,
            "balanced_high": adapted.balanced.high,
            "brier": adapted.brier,
        },
        "start": of_start,
        "zero_shot": of_start,
        "difference": {
            "top1": 0.5,
            "low": difference.low,
            "high": difference.high,
            "balanced": 0.5,
            "balanced_low": balanced.low,
            "balanced_high": balanced.high,
        },
        "use": "adapted",
        "images": 4,
        "set_aside": 2,
        "per_class": {
            "class 0": {"adapted": 1.0, "start": 0.5, "zero_shot": 0.5, "images": 2},
            "class 1": {"adapted": 0.5, "start": 0.0, "zero_shot": 0.0, "images": 2},
            "class 2": {"adapted": None, "start": None, "zero_shot": None, "images": 0},
        },
        "confused_pairs": [{"truth": "class 1", "predicted": "class 0", "count": 1, "share": 0.5}],
    }


def test_summary__refuses_evaluations_of_different_images() -> None:
    first, second = of(np.eye(2), np.array([0, 1])), of(np.eye(2), np.array([0, 0]))
    with pytest.raises(ValueError, match="different classes or images"):
        summary(first, second, Interval(0.0, 0.0, 0.0), Interval(0.0, 0.0, 0.0), images=2, set_aside=0)


# --- read_truth -------------------------------------------------------------------------------------------------------


Draw = Callable[..., None]


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Writes tiny images at paths relative to tmp_path."""

    def write(*paths: str) -> None:
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(tmp_path / path)

    return write


def labelled(source: Path, classes: list[str]) -> dict[str, str]:
    """The truth as image name to class name."""
    truth = read_truth(source, classes)
    assert len(truth.paths) == len(truth.labels) == len(set(truth.paths))
    assert all(path.exists() for path in truth.paths)
    return {path.name: classes[label] for path, label in zip(truth.paths, truth.labels, strict=True)}


def test_read_truth__folder_of_class_folders(tmp_path: Path, draw: Draw) -> None:
    draw("cat/1.png", "cat/deep/er/2.png", "dog/3.jpg")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "notes").mkdir()  # holds no image: not a class, and no harm
    assert labelled(tmp_path, ["dog", "cat", "emu"]) == {"1.png": "cat", "2.png": "cat", "3.jpg": "dog"}
    assert read_truth(str(tmp_path), ["dog", "cat"]) == read_truth(tmp_path, ["dog", "cat"])


def test_read_truth__paths_lie_under_the_folder_as_given(
    tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw("photos/cat/1.png")
    monkeypatch.chdir(tmp_path)
    assert read_truth("photos", ["cat"]).paths == (Path("photos/cat/1.png"),)
    monkeypatch.chdir(tmp_path / "photos")
    assert labelled(Path(), ["cat"]) == {"1.png": "cat"}


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("boeing_737-200", "Boeing 737-200"),
        ("BOEING  737 200", "Boeing 737-200"),
        (unicodedata.normalize("NFD", "café_crème"), "Café Crème"),
        ("café crème", unicodedata.normalize("NFD", "Café Crème")),
        ("STRASSE", "straße"),
        ("_tree-", "tree"),
    ],
)
def test_read_truth__names_that_mean_the_same(tmp_path: Path, draw: Draw, folder: str, name: str) -> None:
    draw(f"{folder}/1.png")
    assert labelled(tmp_path, ["other", name]) == {"1.png": name}


def test_read_truth__two_folders_of_one_class(tmp_path: Path, draw: Draw) -> None:
    draw("tabby cat/1.png", "tabby_cat/2.png")
    assert labelled(tmp_path, ["tabby cat"]) == {"1.png": "tabby cat", "2.png": "tabby cat"}


def test_read_truth__colliding_class_names_match_exactly_or_not_at_all(tmp_path: Path, draw: Draw) -> None:
    classes = ["polish", "Polish", "emu"]
    draw("1.png", "2.png", "3.png", "4.png")
    table = tmp_path / "truth.csv"  # a folder could not hold both names on every file system
    table.write_text("path,label\n1.png,polish\n2.png,Polish\n3.png,EMU\n")
    assert labelled(table, classes) == {"1.png": "polish", "2.png": "Polish", "3.png": "emu"}
    table.write_text("path,label\n1.png,polish\n4.png,POLISH\n")
    with pytest.raises(ImageInputError, match=r"'POLISH' \(1 image; could be 'polish' or 'Polish'"):
        read_truth(table, classes)


def test_read_truth__unknown_names_are_listed(tmp_path: Path, draw: Draw) -> None:
    draw("cat/1.png", "cta/2.png", "cta/3.png", "unicorn/4.png")
    with pytest.raises(ImageInputError) as raised:
        read_truth(tmp_path, ["cat", "dog"], strict=True)
    message = str(raised.value)
    assert "2 folder names match no class" in message
    assert "with 3 images" in message
    assert "'cta' (2 images), 'unicorn' (1 image)" in message
    assert "Valid class names: 'cat', 'dog'." in message


def test_read_truth__what_is_no_class_is_left_out_and_said(tmp_path: Path, draw: Draw) -> None:
    draw("cat/1.png", "cta/2.png", "cta/3.png", "unicorn/4.png")
    with pytest.warns(UserWarning, match=r"Left out, .*: 'cta' \(2 images\), 'unicorn' \(1 image\)\."):
        truth = read_truth(tmp_path, ["cat", "dog"])
    assert (truth.paths, truth.labels) == ((tmp_path / "cat" / "1.png",), (0,))
    assert truth.unknown == {"cta": 2, "unicorn": 1}
    table = tmp_path / "truth.csv"
    table.write_text("path,label\ncat/1.png,cat\ncta/2.png,cta\n")
    with pytest.warns(UserWarning, match=r"'cta' \(1 image\)"):
        assert read_truth(table, ["cat", "dog"]).unknown == {"cta": 1}


@pytest.mark.parametrize("folder", ["AC/DC", "ac_dc", "AC DC", "AC-DC", "AC:DC", "AC\u2215DC"])
def test_read_truth__a_name_with_a_slash(tmp_path: Path, draw: Draw, folder: str) -> None:
    draw(f"{folder}/1.png", f"{folder}/deeper/2.png", "AC/3.png")
    classes = ["AC/DC", "AC"]
    assert labelled(tmp_path, classes) == {"1.png": "AC/DC", "2.png": "AC/DC", "3.png": "AC"}


def test_read_truth__folders_in_a_class_folder_are_no_names(tmp_path: Path, draw: Draw) -> None:
    draw("tabby/cat/1.png", "tabby cat/2.png", "F-16A-B/3.png")
    found = labelled(tmp_path, ["tabby", "tabby cat", "F-16A/B"])
    assert found == {"1.png": "tabby", "2.png": "tabby cat", "3.png": "F-16A/B"}


@pytest.mark.parametrize(
    "content",
    [
        "path;label\nin/1.png;cat\n2.png;dog\n",
        "Label\tPATH\ncat\tin/1.png\ndog\t2.png\n",
        "sep=;\r\nPath;Label\r\nin/1.png;cat\r\n2.png;dog\r\n",
        "path,label\nin\\1.png,cat\n2.png,dog\n",
        "path\tlabel\nin\\1.png\tcat\n2.png\tdog\n".encode("utf-16"),
        b"\xfe\xff" + "path,label\nin/1.png,cat\n2.png,dog\n".encode("utf-16-be"),
    ],
)
@pytest.mark.parametrize("name", ["truth.csv", "TRUTH.CSV"])
def test_read_truth__tables_of_spreadsheets(tmp_path: Path, draw: Draw, content: str | bytes, name: str) -> None:
    draw("in/1.png", "2.png")
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert labelled(tmp_path / name, ["dog", "cat"]) == {"1.png": "cat", "2.png": "dog"}
    assert sorted(path.name for path in list_images(tmp_path / name)) == ["1.png", "2.png"]


def test_read_truth__a_backslash_that_is_part_of_a_name_stays(tmp_path: Path, draw: Draw) -> None:
    draw("a\\1.png", "a/1.png")
    (tmp_path / "truth.csv").write_text("path,label\na\\1.png,cat\n")
    assert read_truth(tmp_path / "truth.csv", ["cat"]).paths == (tmp_path / "a\\1.png",)


def test_read_truth__the_table_that_failed() -> None:
    table = shared_folder() / "cases" / "labels_semicolon.csv"
    if not table.is_file():
        pytest.skip(f"no {table.name} here. {ADVICE}")
    assert labelled(table, ["iris", "pansy"]) == {"photo.jfif": "pansy"}


def test_read_truth__long_lists_are_cut(tmp_path: Path, draw: Draw) -> None:
    draw(*(f"wrong{index:02}/1.png" for index in range(13)))
    with pytest.raises(ImageInputError) as raised:
        read_truth(tmp_path, [f"right{index:02}" for index in range(25)])
    message = str(raised.value)
    assert "'wrong09' (1 image) and 3 more" in message
    assert "wrong10" not in message
    assert "'right19' and 5 more" in message
    assert "right20" not in message


def test_read_truth__images_without_class_folders(tmp_path: Path, draw: Draw) -> None:
    draw("1.png", "2.png")
    with pytest.raises(ImageInputError, match=r"no class folders and 2 images directly in it.*sub-folder named after"):
        read_truth(tmp_path, ["cat"])


def test_read_truth__an_image_beside_the_class_folders(tmp_path: Path, draw: Draw) -> None:
    draw("cat/1.png", "stray.png")
    with pytest.raises(ImageInputError, match=r"1 image directly in it, such as 'stray\.png'"):
        read_truth(tmp_path, ["cat"])


def test_read_truth__nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ImageInputError, match="nowhere"):
        read_truth(tmp_path / "nowhere", ["cat"])
    (tmp_path / "cat").mkdir()
    with pytest.raises(ImageInputError, match="No image"):
        read_truth(tmp_path, ["cat"])


def test_read_truth__classes_named_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than once: cat"):
        read_truth(tmp_path, ["cat", "dog", "cat"])


def test_read_truth__csv_beside_its_images(tmp_path: Path, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    draw("lists/in/1.png", "2.png")
    table = tmp_path / "lists" / "truth.csv"
    table.write_text(f'path,label\nin/1.png,"crème, brûlée"\n{tmp_path / "2.png"},DOG\n', encoding="utf-8")
    monkeypatch.chdir("/")
    assert labelled(table, ["dog", "Crème, brûlée"]) == {"1.png": "Crème, brûlée", "2.png": "dog"}


def test_read_truth__csv_with_an_unknown_label(tmp_path: Path, draw: Draw) -> None:
    draw("1.png", "2.png")
    (tmp_path / "truth.csv").write_text("path,label\n1.png,cat\n2.png,cow\n")
    with pytest.raises(ImageInputError, match=r"1 label name matches no class.*1 image: 'cow' \(1 image\).*'cat'"):
        read_truth(tmp_path / "truth.csv", ["cat"], strict=True)


def test_read_truth__csv_naming_an_image_twice(tmp_path: Path, draw: Draw) -> None:
    draw("1.png")
    (tmp_path / "truth.csv").write_text("path,label\n1.png,cat\n./1.png,dog\n")
    with pytest.raises(ImageInputError, match=r"1 image more than once.*1\.png"):
        read_truth(tmp_path / "truth.csv", ["cat", "dog"])


def test_read_truth__csv_of_images_that_are_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "truth.csv").write_text("path,label\ngone/1.png,cat\ngone/2.png,cat\n")
    with pytest.raises(ImageInputError, match=r"None of the 2 images.*gone/1\.png.*relative to"):
        read_truth(tmp_path / "truth.csv", ["cat"])


@pytest.mark.parametrize("content", ["path,label\n", "path,class\n1.png,cat\n"])
def test_read_truth__csv_without_rows_or_columns(tmp_path: Path, content: str) -> None:
    (tmp_path / "truth.csv").write_text(content)
    with pytest.raises(ImageInputError, match=r"truth\.csv"):
        read_truth(tmp_path / "truth.csv", ["cat"])
