"""All measures of an adapted model and of the start (the model before adaptation), side by side."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finealign.errors import ImageInputError
from finealign.evaluate.metrics import (
    Bin,
    Bools,
    ConfusedPair,
    Floats,
    Interval,
    Ints,
    balanced_difference,
    balanced_mean,
    bootstrap_interval,
    brier_score,
    calibration_bins,
    check_classes,
    check_scores,
    confused_pairs,
    confusion_matrix,
    expected_calibration_error,
    paired_difference,
    recall,
    top_k_accuracy,
)
from finealign.types import ImagePath, Prediction, Truth, Use

OLD_NAME_OF_START = "zero_shot"  # the JSON key of release 0.1, which scripts may still read


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All measures of one set of scores; fractions in [0, 1], but for the Brier score, which lies in [0, 2]."""

    top1: Interval
    balanced: Interval  # the mean of the accuracies of the classes that have images
    top5: float
    ece: float  # expected calibration error
    brier: float  # sum over classes of squared errors of the probabilities, mean over images
    calibration: tuple["Bin", ...]
    per_class: dict[str, float | None]  # in the order of the classes; None where a class has no image
    confusion: NDArray[np.int64]  # (C, C), one row per true class, one column per predicted class
    pairs: tuple[ConfusedPair, ...]  # the most frequent mistakes
    correct: Bools  # (n,) whether each image is labelled correctly, for `paired_difference`


# --- everything at once -----------------------------------------------------------------------------------------------


def evaluate_scores(
    scores: Floats, probabilities: Floats, labels: Ints, classes: Sequence[str], *, seed: int = 0
) -> Evaluation:
    """All measures of one set of scores.

    Args:
        scores: (n, C), higher is better; accuracies and confusions are computed from them.
        probabilities: (n, C), rows sum to 1; calibration error and Brier score are computed from them.
        labels: (n,) in [0, C).
        classes: C different names.
        seed: of the bootstrap.

    Raises:
        ValueError: the arrays do not fit together, or a class name occurs twice.
    """
    check_classes(classes)
    if scores.shape != probabilities.shape or scores.shape[1:] != (len(classes),):
        raise ValueError(f"scores {scores.shape}, probabilities {probabilities.shape} for {len(classes)} classes")
    scores, labels = check_scores(scores, labels)
    predicted = scores.argmax(axis=1)
    correct = predicted == labels
    confusion = confusion_matrix(predicted, labels, len(classes))
    return Evaluation(
        top1=bootstrap_interval(correct, seed=seed),
        balanced=balanced_mean(correct, labels, seed=seed),
        top5=top_k_accuracy(scores, labels, k=5),
        ece=expected_calibration_error(probabilities, labels),
        brier=brier_score(probabilities, labels),
        calibration=calibration_bins(probabilities, labels),
        per_class={
            name: None if np.isnan(accuracy) else float(accuracy)
            for name, accuracy in zip(classes, recall(confusion), strict=True)
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
    use: Use = "adapted",
) -> dict[str, object]:
    """The ``summary`` of predictions that the adapted model made ``with_start``, matched to the truth by path.

    ``set_aside`` is the number of labelled images that could not be read. ``use`` is the model in use. ``in_full`` adds
    what the report draws: ``confusion``, for each model the cells that are not zero as [true class, predicted class,
    images], classes by index, and ``calibration``, for each model its bins.

    Raises ``ImageInputError`` if there are no predictions, and ``KeyError`` for an image that the truth lacks.
    """
    if not predictions:
        raise ImageInputError("None of the labelled images could be read, so there is nothing to evaluate.")
    label_of: dict[ImagePath, int] = dict(zip(truth.paths, truth.labels, strict=True))
    labels = np.array([label_of[prediction.path] for prediction in predictions])
    adapted = evaluate_scores(
        np.stack([prediction.scores for prediction in predictions]),
        np.stack([prediction.probabilities for prediction in predictions]),
        labels,
        classes,
    )
    start = evaluate_scores(
        np.stack([prediction.start_scores for prediction in predictions if prediction.start_scores is not None]),
        np.stack(
            [prediction.start_probabilities for prediction in predictions if prediction.start_probabilities is not None]
        ),
        labels,
        classes,
    )
    figures = summary(
        adapted,
        start,
        paired_difference(adapted.correct, start.correct),
        balanced_difference(adapted.correct, start.correct, labels),
        images=len(predictions),
        set_aside=set_aside,
        use=use,
    )
    if in_full:
        evaluations = {"adapted": adapted, "start": start}
        figures["confusion"] = _beside({name: _cells(evaluation.confusion) for name, evaluation in evaluations.items()})
        figures["calibration"] = _beside(
            {name: [asdict(bin_) for bin_ in evaluation.calibration] for name, evaluation in evaluations.items()}
        )
    return figures


def _cells(confusion: NDArray[np.int64]) -> list[list[int]]:
    return [[int(truth), int(label), int(confusion[truth, label])] for truth, label in np.argwhere(confusion)]


def _beside(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with those of the start also under its name in release 0.1. To be removed after 0.2."""
    return {**values, OLD_NAME_OF_START: values["start"]}


def summary(
    adapted: Evaluation,
    start: Evaluation,
    difference: Interval,
    balanced: Interval,
    *,
    images: int,
    set_aside: int,
    use: Use = "adapted",
) -> dict[str, object]:
    """Both evaluations side by side as JSON values: fractions in [0, 1], and null for a class without images.

    ``difference`` is of the accuracies, ``balanced`` of the balanced accuracies. Brier scores lie in [0, 2].

    The confused pairs are those of the model in use, which ``use`` names. The start's values are repeated under
    ``zero_shot``, their name in release 0.1. Raises ``ValueError`` if the two evaluations differ in classes or in
    images per class.
    """
    class_images = adapted.confusion.sum(axis=1)
    if list(adapted.per_class) != list(start.per_class) or not np.array_equal(
        class_images, start.confusion.sum(axis=1)
    ):
        raise ValueError("the two evaluations are of different classes or images")
    return {
        **_beside({"adapted": _headline(adapted), "start": _headline(start)}),
        "difference": {
            "top1": difference.mean,
            "low": difference.low,
            "high": difference.high,
            **_balanced(balanced),
        },
        "use": use,
        "images": images,
        "set_aside": set_aside,
        "per_class": {
            name: _beside({"adapted": accuracy, "start": start.per_class[name], "images": int(count)})
            for (name, accuracy), count in zip(adapted.per_class.items(), class_images, strict=True)
        },
        "confused_pairs": [
            {"truth": pair.truth, "predicted": pair.predicted, "count": pair.count, "share": pair.share}
            for pair in (adapted if use == "adapted" else start).pairs
        ],
    }


def _headline(evaluation: Evaluation) -> dict[str, float]:
    return {
        "top1": evaluation.top1.mean,
        "top5": evaluation.top5,
        "ece": evaluation.ece,
        "top1_low": evaluation.top1.low,
        "top1_high": evaluation.top1.high,
        "brier": evaluation.brier,
        **_balanced(evaluation.balanced),
    }


def _balanced(found: Interval) -> dict[str, float]:
    return {"balanced": found.mean, "balanced_low": found.low, "balanced_high": found.high}
