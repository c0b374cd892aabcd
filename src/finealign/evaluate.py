"""How right the labels are: the only room that reads ground truth.

Letters: n images, C classes. Accuracies, shares and errors are fractions in [0, 1]; a confusion matrix counts images.
The maths is pure functions of numpy arrays. They raise ``ValueError`` for arrays that do not fit together (a wrong
shape, a label outside [0, C), NaN, no image at all): that is a mistake of the caller, never of the user.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finealign.errors import ImageInputError
from finealign.images import display_path, list_images, read_table
from finealign.prompts import fold
from finealign.types import Prediction, Truth

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]

UNKNOWN_SHOWN = 10
VALID_SHOWN = 20
CELLS_AT_ONCE = 1 << 20  # bounds the memory of the bootstrap: counts held at a time


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval, in the unit of the values it was taken over."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class ConfusedPair:
    """Images of class ``truth`` called ``predicted``; ``share`` is their part of all images of ``truth``."""

    truth: str
    predicted: str
    count: int
    share: float


@dataclass(frozen=True)
class Bin:
    """Images of like confidence: how sure the model was of them in the mean, and how often it was right."""

    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How one set of scores does against the truth."""

    top1: Interval
    top5: float
    ece: float
    calibration: tuple["Bin", ...]
    per_class: dict[str, float | None]  # in the order of the classes; None where a class has no image
    confusion: NDArray[np.int64]  # (C, C), a row a true class, a column a predicted one
    pairs: tuple[ConfusedPair, ...]
    correct: Bools  # (n,) whether each image's best class is its own, for `paired_difference`


# --- reading the truth ------------------------------------------------------------------------------------------------


def read_truth(source: str | Path, classes: Sequence[str]) -> Truth:
    """The true class of each image, from a folder of class folders or a CSV ``path,label``.

    A folder holds ``<class>/**/<image>``; paths in a CSV are relative to the CSV's own folder. A name is matched to
    the class names as it is written, and else with case, Unicode form and ``_``, ``-``, white space set aside; class
    names that differ in nothing else match only as they are written. A class without images is fine.

    Raises:
        ImageInputError: ``source`` is missing or holds no images, an image lies outside the class folders, a name is
            no class, a CSV lists an image twice or only images that do not exist.
        ValueError: ``classes`` holds a name twice.
    """
    _check_classes(classes)
    source = Path(source)
    if os.path.isdir(source):
        labelled = _read_folders(source)
    elif os.path.exists(source):
        labelled = _read_csv(source)
    else:
        raise ImageInputError(
            f"No ground truth at {_shown(source)}. "
            "Give a folder with one sub-folder a class, or a CSV with columns path,label."
        )
    matches = _matcher(classes)
    index = {name: matches(name) for name in {name for _, name in labelled}}
    unknown = Counter(name for _, name in labelled if len(index[name]) != 1)
    if unknown:
        raise ImageInputError(_unknown_classes(source, unknown, matches, classes))
    return Truth(
        paths=tuple(path for path, _ in labelled),
        labels=tuple(index[name][0] for _, name in labelled),
    )


def _read_folders(root: Path) -> list[tuple[Path, str]]:
    images = list_images(root)
    stray = [path for path in images if path.parent == root]
    if stray:
        found = "no class folders" if len(stray) == len(images) else "class folders"
        raise ImageInputError(
            f"{_shown(root)} holds {found} and {_images(len(stray))} directly in it, such as "
            f"{_shown(stray[0].name)}, whose class is not told. "
            "Put each image in a sub-folder named after its class, or give a CSV with columns path,label."
        )
    return [(path, path.relative_to(root).parts[0]) for path in images]


def _read_csv(table: Path) -> list[tuple[Path, str]]:
    labelled = [(table.parent / row["path"], row["label"]) for row in read_table(table, ("path", "label"))]
    if not labelled:
        raise ImageInputError(
            f"{_shown(table)} lists no images. Give one row an image: its path, and its class as the label."
        )
    twice = [path for path, times in Counter(os.path.abspath(path) for path, _ in labelled).items() if times > 1]
    if twice:
        raise ImageInputError(
            f"{_shown(table)} lists {_images(len(twice))} more than once, such as {_shown(twice[0])}. "
            "Keep one row an image."
        )
    if not any(os.path.exists(path) for path, _ in labelled):
        raise ImageInputError(
            f"None of the {_images(len(labelled))} in {_shown(table)} exists; "
            f"the first was looked for at {_shown(labelled[0][0])}. "
            f"Write paths relative to {_shown(table.parent)}, the folder of the CSV."
        )
    return labelled


def _matcher(classes: Sequence[str]) -> Callable[[str], list[int]]:
    """From a name to the indices of the classes it may mean: one if known, none if not, several if it is ambiguous."""
    exact = {name: [index] for index, name in enumerate(classes)}
    folded: defaultdict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(classes):
        folded[fold(name)].append(index)
    return lambda name: exact.get(name) or folded.get(fold(name), [])


def _unknown_classes(
    source: Path, unknown: Counter[str], matches: Callable[[str], list[int]], classes: Sequence[str]
) -> str:
    def described(name: str) -> str:
        could_be = " or ".join(f"{classes[index]!r:.100}" for index in matches(name))
        hint = f"; could be {could_be}, write one exactly" if could_be else ""
        return f"{name!r:.100} ({_images(unknown[name])}{hint})"

    kind = "folder" if os.path.isdir(source) else "label"
    names = f"{kind} name matches" if len(unknown) == 1 else f"{kind} names match"
    listed = _first((described(name) for name in sorted(unknown)), len(unknown), UNKNOWN_SHOWN)
    valid = _first((f"{name!r:.100}" for name in classes), len(classes), VALID_SHOWN)
    return (
        f"{len(unknown)} {names} no class in {_shown(source)}, with {_images(unknown.total())}: {listed}. "
        f"Rename or remove them. Valid class names: {valid}."
    )


def _first(names: Iterable[str], total: int, most: int) -> str:
    listed = ", ".join(name for name, _ in zip(names, range(most), strict=False))
    return f"{listed} and {total - most} more" if total > most else listed


def _shown(path: str | Path) -> str:
    return f"'{display_path(path)}'"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


# --- the measures -----------------------------------------------------------------------------------------------------


def top_k_accuracy(scores: Floats, labels: Ints, k: int) -> float:
    """The fraction of images whose class is among the ``k`` best; ``k`` beyond C behaves as C.

    Of tied classes the one with the smaller index goes first, as in ``argmax``: ``k=1`` is the accuracy of the argmax,
    and scores that are all equal earn nothing.

    Args:
        scores: (n, C), any unit, higher is better; infinities are allowed, NaN is not.
        labels: (n,) in [0, C).
        k: at least 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    scores, labels = _check_scores(scores, labels)
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    before = np.arange(scores.shape[1]) < labels[:, None]
    rank = np.count_nonzero((scores > own) | ((scores == own) & before), axis=1)
    return float(np.mean(rank < k))


def confusion_matrix(predicted: Ints, labels: Ints, num_classes: int) -> NDArray[np.int64]:
    """(C, C) counts of images: a row a true class, a column a predicted one. ``predicted``, ``labels``: (n,)."""
    predicted = _check_labels(predicted, num_classes)
    labels = _check_labels(labels, num_classes)
    if len(predicted) != len(labels):
        raise ValueError(f"{len(predicted)} predictions for {len(labels)} labels")
    cells = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).astype(np.int64)


def per_class_accuracy(predicted: Ints, labels: Ints, num_classes: int) -> NDArray[np.float64]:
    """(C,) the fraction of each class's images that were given it; NaN where a class has no image."""
    return _recall(confusion_matrix(predicted, labels, num_classes))


def confused_pairs(confusion: NDArray[np.int64], classes: Sequence[str], most: int = 10) -> list[ConfusedPair]:
    """The ``most`` frequent mistakes of a (C, C) confusion matrix, most images first.

    Equal counts are ordered by share, largest first, then by name, so that the order of the classes does not matter.
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
    """How far confidence is from accuracy, in [0, 1]: ``sum_b (n_b / n) |accuracy_b - confidence_b|``.

    The confidence of an image is its largest probability; bin b holds those in ``((b - 1) / bins, b / bins]``.
    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equations 2 to 5; 15 bins as there.

    Args:
        probabilities: (n, C), rows sum to 1 (within 0.01, for half precision).
        labels: (n,) in [0, C).
        bins: at least 1.
    """
    found = calibration_bins(probabilities, labels, bins)
    return sum(one.images * abs(one.accuracy - one.confidence) for one in found) / len(labels)


def calibration_bins(probabilities: Floats, labels: Ints, bins: int = 15) -> tuple[Bin, ...]:
    """The bins that ``expected_calibration_error`` sums over, which has the arguments; empty ones are left out."""
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")
    probabilities, labels = _check_scores(probabilities, labels)
    sums = probabilities.sum(axis=1, dtype=np.float64)
    if probabilities.min() < 0 or not np.all(np.abs(sums - 1) <= 0.01):
        raise ValueError("probabilities must not be negative and rows must sum to 1; were scores given?")
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    upper = np.arange(1, bins + 1) / bins
    bin_of = np.minimum(np.searchsorted(upper, confidence, side="left"), bins - 1)  # rounding may carry past 1
    members = [bin_of == index for index in range(bins)]
    return tuple(
        Bin(int(one.sum()), float(confidence[one].mean()), float(correct[one].mean())) for one in members if one.any()
    )


def bootstrap_interval(
    values: Floats | Bools, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """The mean of ``values`` (n,) and its percentile bootstrap interval over images (Efron 1979).

    A resample of n images is drawn as how often each distinct value comes up, a multinomial draw: the same
    distribution as drawing images, but for correctness, which takes two values, its cost does not grow with n.
    The order of the images does not matter, and the same seed gives the same interval.

    Values that are all equal, one value among them, give an interval of no width: nothing in the sample tells how
    much another would differ, so read it as "cannot say", not as "certain".
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"values must be one number an image for at least one image, not of shape {sample.shape}")
    if not np.all(np.isfinite(sample)):
        raise ValueError("values must be finite")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples must be at least 1 and level between 0 and 1, not {resamples} and {level}")
    distinct, counts = np.unique(sample, return_counts=True)
    if len(distinct) == 1:
        only = float(distinct[0])
        return Interval(mean=only, low=only, high=only)
    generator = np.random.default_rng(seed)
    share = counts / len(sample)
    means = np.empty(resamples)
    step = max(1, CELLS_AT_ONCE // len(distinct))
    for start in range(0, resamples, step):
        stop = min(start + step, resamples)
        means[start:stop] = generator.multinomial(len(sample), share, size=stop - start) @ distinct / len(sample)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(sample.mean()), low=float(low), high=float(high))


def paired_difference(adapted_correct: Bools, start_correct: Bools, *, seed: int = 0) -> Interval:
    """The change in accuracy, ``mean(adapted - start)`` in [-1, 1], with its 95 % interval.

    Both are (n,), the correctness of the same images in the same order. Resampling the differences, image by image,
    leaves out what both share: that some images are hard.
    """
    adapted, start = np.asarray(adapted_correct, dtype=np.float64), np.asarray(start_correct, dtype=np.float64)
    if adapted.shape != start.shape:
        raise ValueError(f"correctness of different images: shapes {adapted.shape} and {start.shape}")
    return bootstrap_interval(adapted - start, seed=seed)


# --- everything at once -----------------------------------------------------------------------------------------------


def evaluate_scores(
    scores: Floats, probabilities: Floats, labels: Ints, classes: Sequence[str], *, seed: int = 0
) -> Evaluation:
    """Every measure of one set of scores.

    Args:
        scores: (n, C), what decides the label: accuracies and confusions are of these.
        probabilities: (n, C), rows sum to 1: the calibration error is of these.
        labels: (n,) in [0, C).
        classes: C names, each once.
        seed: of the bootstrap.
    """
    _check_classes(classes)
    if scores.shape != probabilities.shape or scores.shape[1:] != (len(classes),):
        raise ValueError(f"scores {scores.shape}, probabilities {probabilities.shape} for {len(classes)} classes")
    scores, labels = _check_scores(scores, labels)
    predicted = scores.argmax(axis=1)
    correct = predicted == labels
    confusion = confusion_matrix(predicted, labels, len(classes))
    return Evaluation(
        top1=bootstrap_interval(correct, seed=seed),
        top5=top_k_accuracy(scores, labels, k=5),
        ece=expected_calibration_error(probabilities, labels),
        calibration=calibration_bins(probabilities, labels),
        per_class={
            name: None if np.isnan(accuracy) else float(accuracy)
            for name, accuracy in zip(classes, _recall(confusion), strict=True)
        },
        confusion=confusion,
        pairs=tuple(confused_pairs(confusion, classes)),
        correct=correct,
    )


def evaluate_predictions(
    predictions: Sequence[Prediction],
    truth: Truth,
    classes: Sequence[str],
    *,
    set_aside: int = 0,
    in_full: bool = False,
) -> dict[str, object]:
    """The summary of predictions made ``with_start``, held against the truth by their paths.

    ``in_full`` adds what a report draws: ``confusion``, for both models the cells that are not nought as
    [true class, predicted class, images] by index, and ``calibration``, their bins.

    Raises ``ImageInputError`` if there is none, and ``KeyError`` for an image the truth does not have.
    """
    if not predictions:
        raise ImageInputError("None of the labelled images could be read, so there is nothing to evaluate.")
    label_of = dict(zip(truth.paths, truth.labels, strict=True))
    labels = np.array([label_of[prediction.path] for prediction in predictions])
    adapted = evaluate_scores(
        np.stack([found.scores for found in predictions]),
        np.stack([found.probabilities for found in predictions]),
        labels,
        classes,
    )
    start = evaluate_scores(
        np.stack([found.start_scores for found in predictions if found.start_scores is not None]),
        np.stack([found.start_probabilities for found in predictions if found.start_probabilities is not None]),
        labels,
        classes,
    )
    difference = paired_difference(adapted.correct, start.correct)
    found = summary(adapted, start, difference, images=len(predictions), set_aside=set_aside)
    if in_full:
        both = {"zero_shot": start, "adapted": adapted}
        found["confusion"] = {name: _cells(one.confusion) for name, one in both.items()}
        found["calibration"] = {name: [asdict(each) for each in one.calibration] for name, one in both.items()}
    return found


def _cells(confusion: NDArray[np.int64]) -> list[list[int]]:
    return [[int(truth), int(named), int(confusion[truth, named])] for truth, named in np.argwhere(confusion)]


def summary(
    adapted: Evaluation, zero_shot: Evaluation, difference: Interval, *, images: int, set_aside: int
) -> dict[str, object]:
    """What is written as JSON: both evaluations side by side, fractions throughout, null for "no image".

    The confused pairs are those of ``adapted``. Raises ``ValueError`` if the two were not taken over the same images.
    """
    class_images = adapted.confusion.sum(axis=1)
    if list(adapted.per_class) != list(zero_shot.per_class) or not np.array_equal(
        class_images, zero_shot.confusion.sum(axis=1)
    ):
        raise ValueError("the two evaluations are of different classes or images")
    return {
        "adapted": _headline(adapted),
        "zero_shot": _headline(zero_shot),
        "difference": {"top1": difference.mean, "low": difference.low, "high": difference.high},
        "images": images,
        "set_aside": set_aside,
        "per_class": {
            name: {"adapted": accuracy, "zero_shot": zero_shot.per_class[name], "images": int(count)}
            for (name, accuracy), count in zip(adapted.per_class.items(), class_images, strict=True)
        },
        "confused_pairs": [
            {"truth": pair.truth, "predicted": pair.predicted, "count": pair.count, "share": pair.share}
            for pair in adapted.pairs
        ],
    }


def _headline(evaluation: Evaluation) -> dict[str, float]:
    return {
        "top1": evaluation.top1.mean,
        "top5": evaluation.top5,
        "ece": evaluation.ece,
        "top1_low": evaluation.top1.low,
        "top1_high": evaluation.top1.high,
    }


def _recall(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    images = confusion.sum(axis=1)
    right = np.diag(confusion).astype(np.float64)
    accuracy = np.full(len(images), np.nan)
    np.divide(right, images, out=accuracy, where=images > 0)
    return accuracy


def _check_classes(classes: Sequence[str]) -> None:
    twice = [name for name, times in Counter(classes).items() if times > 1]
    if twice:
        raise ValueError(f"class names must differ; more than once: {', '.join(twice)}")


def _check_labels(labels: Ints, num_classes: int) -> NDArray[np.int64]:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be one integer an image, not {labels.dtype} of shape {labels.shape}")
    if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(f"labels must be in [0, {num_classes}), not in [{labels.min()}, {labels.max()}]")
    return labels.astype(np.int64)


def _check_scores(scores: Floats, labels: Ints) -> tuple[Floats, NDArray[np.int64]]:
    if scores.ndim != 2 or not len(scores):
        raise ValueError(f"one row of scores an image for at least one image, not of shape {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError("scores must not be NaN")
    if len(scores) != len(labels):
        raise ValueError(f"{len(scores)} rows of scores for {len(labels)} labels")
    return scores, _check_labels(labels, scores.shape[1])
