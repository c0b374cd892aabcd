"""Accuracy, confusion, calibration and bootstrap intervals, as pure functions of numpy arrays.

n is the number of images, C of classes. Accuracies, shares and errors are fractions in [0, 1], Brier scores lie in
[0, 2]; a confusion matrix counts images. The functions raise ``ValueError`` for arrays that do not fit together (a
wrong shape, a label outside [0, C), NaN, no image at all): that is a programming error of the caller, never a mistake
of the user.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]
CELLS_AT_ONCE = 1 << 20  # most counts that the bootstrap holds at a time, which bounds its memory


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval, both in the unit of the values averaged."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ConfusedPair:
    """The images of class ``truth`` that were labelled ``predicted``; ``share`` is their share of class ``truth``."""

    truth: str
    predicted: str
    count: int
    share: float


@dataclass(frozen=True)
class Bin:
    """The images in one interval of confidence, with their mean confidence and their accuracy."""

    images: int
    confidence: float  # mean, in [0, 1]
    accuracy: float


# --- the measures -----------------------------------------------------------------------------------------------------


def top_k_accuracy(scores: Floats, labels: Ints, k: int) -> float:
    """The fraction of images whose class is among the ``k`` highest scores; ``k`` above C counts as C.

    Of classes with equal scores the one with the smaller index ranks first, as in ``argmax``. So ``k=1`` is the
    accuracy of the argmax, and a model that scores all classes alike is credited with the first ``k`` classes only.

    Args:
        scores: (n, C), any unit, higher is better; infinities are allowed, NaN is not.
        labels: (n,) in [0, C).
        k: at least 1.

    Raises:
        ValueError: ``k`` is below 1, or the arrays do not fit together.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    scores, labels = check_scores(scores, labels)
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    rank = np.count_nonzero((scores > own) | ((scores == own) & before), axis=1)
    return float(np.mean(rank < k))


def confusion_matrix(predicted: Ints, labels: Ints, num_classes: int) -> NDArray[np.int64]:
    """Counts of images (C, C), one row per true class, one column per predicted class.

    ``predicted`` and ``labels`` are (n,) integers in [0, C). Raises ValueError where they do not fit together.
    """
    predicted = _check_labels(predicted, num_classes)
    labels = _check_labels(labels, num_classes)
    if len(predicted) != len(labels):
        raise ValueError(f"{len(predicted)} predictions for {len(labels)} labels")
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def per_class_accuracy(predicted: Ints, labels: Ints, num_classes: int) -> NDArray[np.float64]:
    """The fraction of each class's images that were labelled correctly: (C,), NaN where a class has no image.

    ``predicted`` and ``labels`` are (n,) integers in [0, C). Raises ValueError where they do not fit together.
    """
    return recall(confusion_matrix(predicted, labels, num_classes))


def confused_pairs(confusion: NDArray[np.int64], classes: Sequence[str], most: int = 10) -> list[ConfusedPair]:
    """The ``most`` most frequent mistakes in a (C, C) confusion matrix, in descending order of images.

    Equal counts are ordered by share, largest first, then by name, so that the order of the classes does not matter.
    Raises ValueError where the shape of ``confusion`` does not fit ``classes``.
    """
    if confusion.shape != (len(classes), len(classes)):
        raise ValueError(f"a confusion matrix of shape {confusion.shape} for {len(classes)} classes")
    images = confusion.sum(axis=1)
    pairs = [
        ConfusedPair(
            truth=classes[truth],
            predicted=classes[predicted],
            count=int(confusion[truth, predicted]),
            share=float(confusion[truth, predicted] / images[truth]),
        )
        for truth, predicted in np.argwhere(confusion)
        if truth != predicted
    ]
    return sorted(pairs, key=lambda pair: (-pair.count, -pair.share, pair.truth, pair.predicted))[:most]


def expected_calibration_error(probabilities: Floats, labels: Ints, bins: int = 15) -> float:
    """The mean difference between confidence and accuracy: ``sum_b (n_b / n) |accuracy_b - confidence_b|``, in [0, 1].

    The confidence of an image is its largest probability; bin b holds the images with a confidence in
    ``((b - 1) / bins, b / bins]``. Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017,
    equations 2 to 5, with the 15 bins used there.

    Args:
        probabilities: (n, C), rows sum to 1 (within 0.01, for half precision).
        labels: (n,) in [0, C).
        bins: at least 1.

    Raises:
        ValueError: ``bins`` is below 1, rows do not sum to 1, or the arrays do not fit together.
    """
    filled = calibration_bins(probabilities, labels, bins)
    return sum(bin_.images * abs(bin_.accuracy - bin_.confidence) for bin_ in filled) / len(labels)


def calibration_bins(probabilities: Floats, labels: Ints, bins: int = 15) -> tuple[Bin, ...]:
    """The bins that ``expected_calibration_error`` sums over, in order of confidence; empty bins are left out.

    Takes the arguments of ``expected_calibration_error`` and raises its errors.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    probabilities, labels = _check_probabilities(probabilities, labels)
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    upper = np.arange(1, bins + 1) / bins
    # Rounding may raise a confidence above 1, hence the minimum.
    bin_of = np.minimum(np.searchsorted(upper, confidence, side="left"), bins - 1)
    members = [bin_of == index for index in range(bins)]
    return tuple(
        Bin(int(mask.sum()), float(confidence[mask].mean()), float(correct[mask].mean()))
        for mask in members
        if mask.any()
    )


def brier_score(probabilities: Floats, labels: Ints) -> float:
    """The mean over images of ``sum_c (p_c - [c is the true class])^2``, in [0, 2]; lower is better.

    0 is certain and right, 2 certain and wrong, ``1 - 1 / C`` every class alike. Unlike the calibration error it also
    rewards telling the classes apart. Source: Brier, "Verification of forecasts expressed in terms of probability",
    Monthly Weather Review 1950. For two classes it is twice the score of the one probability.

    Args:
        probabilities: (n, C), rows sum to 1 (within 0.01, for half precision).
        labels: (n,) in [0, C).

    Raises:
        ValueError: rows do not sum to 1, or the arrays do not fit together.
    """
    probabilities, labels = _check_probabilities(probabilities, labels)
    errors = probabilities.copy()
    errors[np.arange(len(labels)), labels] -= 1
    return float(np.einsum("nc,nc->", errors, errors, dtype=np.float64)) / len(labels)


def bootstrap_interval(
    values: Floats | Bools, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """The mean of ``values`` (n,), one per image, and its percentile bootstrap interval over images (Efron 1979).

    A resample is drawn as a multinomial count of each distinct value. This has the same distribution as drawing n
    images, but for values with few levels, such as correctness (0 or 1), the cost does not grow with n. The order of
    the images does not matter, and the same seed gives the same interval.

    Values that are all equal, or a single value, give an interval of zero width. Such a sample carries no information
    about the spread, so this means "unknown", not "certain".

    Args:
        values: (n,) finite, at least one.
        seed: of the resampling.
        resamples: at least 1.
        level: of confidence, between 0 and 1.

    Raises:
        ValueError: an argument is outside the range above.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"values must be one number an image for at least one image, not of shape {sample.shape}")
    if not np.all(np.isfinite(sample)):
        raise ValueError("values must be finite")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples must be at least 1 and level between 0 and 1, not {resamples} and {level}")
    if np.all(sample == sample[0]):
        value = float(sample[0])
        return Interval(mean=value, low=value, high=value)
    means = _resampled_means(sample, np.random.default_rng(seed), resamples)
    return _percentiles(float(sample.mean()), means, level)


def bootstrap_mean_of_sets(
    sets: Sequence[Floats], *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """The mean over data sets of each set's mean, and its percentile bootstrap interval over images.

    ``sets`` has one array (n_s,) of values per set. The images of each set are resampled separately; the sets
    themselves are fixed. ``resamples`` is at least 1, ``level`` (of confidence) between 0 and 1.
    """
    generator = np.random.default_rng(seed)
    sums = np.zeros(resamples)
    for values in sets:
        sums += _resampled_means(values, generator, resamples)
    return _percentiles(sum(float(values.mean()) for values in sets) / len(sets), sums / len(sets), level)


def balanced_mean(values: Floats | Bools, labels: Ints, *, seed: int = 0) -> Interval:
    """The mean over classes of each class's mean value, and its 95 % percentile bootstrap interval.

    Of ``values`` that say whether each image is right it is the balanced accuracy: the mean of the recalls, in which
    every class counts alike however many images it has. Classes without images do not count.

    Images are resampled within their class, so each resample has as many images of each class as there are: the
    interval is for classes of these sizes. A class whose images all have the same value adds no width, least of all a
    class of one image; with such classes the interval is too narrow. The order of images and classes does not matter.

    Args:
        values: (n,) finite, at least one.
        labels: (n,) integers, the class of each image.
        seed: of the resampling.

    Raises:
        ValueError: the arrays do not fit together.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample) or not np.all(np.isfinite(sample)):
        raise ValueError(f"values must be one finite number an image for at least one image, shape {sample.shape}")
    if labels.shape != sample.shape:
        raise ValueError(f"{len(labels)} labels for {len(sample)} values")
    by_class = [np.sort(sample[labels == label]) for label in np.unique(labels)]
    return bootstrap_mean_of_sets(sorted(by_class, key=lambda values: values.tobytes()), seed=seed)


def _resampled_means(sample: Floats, generator: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """The mean of each resample: (resamples,), drawn in chunks to bound the memory."""
    distinct, counts = np.unique(sample, return_counts=True)
    share = counts / len(sample)
    means = np.empty(resamples)
    step = max(1, CELLS_AT_ONCE // len(distinct))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        means[start:stop] = generator.multinomial(len(sample), share, size=stop - start) @ distinct / len(sample)
    return means


def _percentiles(mean: float, means: NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=mean, low=float(low), high=float(high))


def paired_difference(adapted_correct: Bools, start_correct: Bools, *, seed: int = 0) -> Interval:
    """The change in accuracy, ``mean(adapted - start)`` in [-1, 1], with its 95 % bootstrap interval.

    Both arguments are (n,), whether each image is right, for the same images in the same order. Resampling the
    differences image by image removes the variance common to both, which comes from images that are hard for either.
    Raises ValueError where the shapes differ.
    """
    return bootstrap_interval(_change(adapted_correct, start_correct), seed=seed)


def balanced_difference(adapted_correct: Bools, start_correct: Bools, labels: Ints, *, seed: int = 0) -> Interval:
    """The change in balanced accuracy, in [-1, 1], with its 95 % bootstrap interval: ``balanced_mean`` of differences.

    All arguments are (n,), for the same images in the same order; see ``paired_difference``. Raises ValueError where
    the shapes differ.
    """
    return balanced_mean(_change(adapted_correct, start_correct), labels, seed=seed)


def _change(adapted_correct: Bools, start_correct: Bools) -> NDArray[np.float64]:
    adapted, start = np.asarray(adapted_correct, dtype=np.float64), np.asarray(start_correct, dtype=np.float64)
    if adapted.shape != start.shape:
        raise ValueError(f"correctness of different images: shapes {adapted.shape} and {start.shape}")
    return adapted - start


def recall(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each class's share of images on the diagonal of a (C, C) confusion matrix: (C,), NaN where it has no images."""
    images = confusion.sum(axis=1)
    hits = np.diag(confusion).astype(np.float64)
    accuracy = np.full(len(images), np.nan)
    np.divide(hits, images, out=accuracy, where=images > 0)
    return accuracy


def check_classes(classes: Sequence[str]) -> None:
    """Raise ValueError where a class name occurs more than once."""
    repeated = [name for name, times in Counter(classes).items() if times > 1]
    if repeated:
        raise ValueError(f"class names must differ; more than once: {', '.join(repeated)}")


def _check_labels(labels: Ints, num_classes: int) -> NDArray[np.int64]:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be one integer an image, not {labels.dtype} of shape {labels.shape}")
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(f"labels must be in [0, {num_classes}), not in [{labels.min()}, {labels.max()}]")
    return labels.astype(np.int64)


def check_scores(scores: Floats, labels: Ints) -> tuple[Floats, NDArray[np.int64]]:
    """The scores (n, C) as they are, and the labels (n,) as int64.

    Raises ValueError where they do not fit together, there is no image, a score is NaN or a label outside [0, C).
    """
    if scores.ndim != 2 or not len(scores):
        raise ValueError(f"one row of scores an image for at least one image, not of shape {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError("scores must not be NaN")
    if len(scores) != len(labels):
        raise ValueError(f"{len(scores)} rows of scores for {len(labels)} labels")
    return scores, _check_labels(labels, scores.shape[1])


def _check_probabilities(probabilities: Floats, labels: Ints) -> tuple[Floats, NDArray[np.int64]]:
    """As ``check_scores``; raises ValueError also where a probability is negative or a row does not sum to 1."""
    probabilities, labels = check_scores(probabilities, labels)
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if probabilities.min() < 0 or not np.all(np.abs(sums - 1) <= 0.01):
        raise ValueError("probabilities must not be negative and rows must sum to 1; were scores given?")
    return probabilities, labels
