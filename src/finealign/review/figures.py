"""What the labels of a review say: accuracy of both models and the difference, with intervals."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finealign.model.known_labels import CANNOT_TELL
from finealign.model.refusal import NONE_OF_THESE
from finealign.review.intervals import AT_PLAN, Estimate, estimate, labels_for, looks, variance, width_factor
from finealign.review.plan import Item, Plan
from finealign.review.sampling import Floats, Ints

GAPS = 3  # images that other windows may still have; which they are depends on no label
HALF_WIDTHS = (0.10, 0.05, 0.03, 0.02, 0.01)  # for which it is told how many labels they take


@dataclass(frozen=True)
class Measured:
    """Figures of a review, as fractions of the images that a person can name.

    An image that shows none of the classes counts as labelled wrongly by both models. Images that the person cannot
    name are left out.
    """

    images: int  # images that the figures are of
    learned_from: int  # images left out, as the model learned from their labels
    labels: int  # labels that the figures are from: those at the last look
    labelled: int  # labels so far that count towards them
    cannot_tell: int  # images so far that the person could not name
    none: int  # images so far that show none of the classes
    next_look: int | None  # at how many labels the figures are renewed; None if they are not
    adapted: Estimate | None  # accuracy; None while it is too early, and where the review does not measure it
    start: Estimate | None
    difference: Estimate | None  # accuracy of the adapted model less that of the start
    # How many labels in all an interval of so much to either side takes; None: more than there are images.
    labels_for_accuracy: Mapping[float, int | None]
    labels_for_difference: Mapping[float, int | None]

    def as_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        told = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("adapted", "start", "difference"):
            found: Estimate | None = told[name]
            told[name] = None if found is None else {"value": found.value, "low": found.low, "high": found.high}
        for name in ("labels_for_accuracy", "labels_for_difference"):
            told[name] = [{"within": within, "labels": labels} for within, labels in told[name].items()]
        return told


def measure(plan: Plan, labels: Mapping[str, str]) -> Measured:
    """The figures by the labels so far, by the absolute path of their image: class names, or one of the other answers.

    Labels count in the order of the plan, so that they are always a sample by it; the first GAPS images without one are
    passed over, and behind them none counts. So labels of another plan, or of images chosen for learning, do not.
    """
    answered = list(_in_order(plan, labels))
    named = [(item, label) for item, label in answered if label != CANNOT_TELL]
    planned = looks(plan.budget, plan.images)
    past = [look for look in planned if look <= len(named)]
    used, skipped = named[: past[-1] if past else 0], len(answered) - len(named)
    if len(answered) == plan.images:  # there are no more, however many could not be named
        used, planned = named, []
    return Measured(
        images=plan.images,
        learned_from=plan.learned_from,
        labels=len(used),
        labelled=len(named),
        cannot_tell=skipped,
        none=sum(label == NONE_OF_THESE for _, label in named),
        next_look=next((look for look in planned if look > len(named)), None),
        **_estimates(plan, used, answered),
    )


def _in_order(plan: Plan, labels: Mapping[str, str]) -> Iterator[tuple[Item, str]]:
    gaps = 0
    for item in plan.measuring:
        if item.path in labels:
            yield item, labels[item.path]
        elif (gaps := gaps + 1) > GAPS:
            return


def _estimates(plan: Plan, used: Sequence[tuple[Item, str]], answered: Sequence[tuple[Item, str]]) -> dict[str, Any]:
    strata = len(plan.sizes)
    right = np.zeros((strata, 2, 2), dtype=np.int64)  # by whether the adapted model is right, and the start
    for item, label in used:
        right[item.stratum, int(plan.classes[item.adapted] == label), int(plan.classes[item.start] == label)] += 1
    asked = np.bincount([item.stratum for item, _ in answered], minlength=strata)
    told = np.bincount([item.stratum for item, label in answered if label != CANNOT_TELL], minlength=strata)
    shares = np.bincount([item.stratum for item in plan.measuring[: plan.budget]], minlength=strata) / plan.budget
    sizes = _that_can_be_named(np.array(plan.sizes), asked, told, right.sum((1, 2)))
    there = sizes > 0
    right, sizes, shares = right[there], sizes[there], shares[there]
    expected, unchanged = np.array(plan.expected)[there], np.array(plan.unchanged)[there]
    labelled = right.sum((1, 2)) > 0
    factor = width_factor(len(used), plan.budget, plan.images) if used else AT_PLAN
    found: dict[str, Any] = {"adapted": None, "start": None, "difference": None}
    found |= {"labels_for_accuracy": {}, "labels_for_difference": {}}
    if used and labelled.all():
        as_right = (1.0, 0.0)
        for name, counts in (("adapted", right.sum(2)[:, ::-1]), ("start", right.sum(1)[:, ::-1])):
            sure = expected if name == "adapted" else np.where(unchanged, expected, 0.5)
            rates = np.stack([sure, 1 - sure], axis=1)
            found[name] = _told(estimate(counts, sizes, rates, values=as_right, factor=factor))
            if name == "adapted":
                spread = variance(counts, rates, as_right)
                found["labels_for_accuracy"] = _for_precision(spread, sizes, shares)
    if used and (labelled | unchanged).all():
        counts = np.stack([right[:, 1, 0], right[:, 0, 0] + right[:, 1, 1], right[:, 0, 1]], axis=1)
        rates = np.stack([expected, (1 - expected) / 2, (1 - expected) / 2], axis=1)
        gains = (1.0, 0.0, -1.0)
        found["difference"] = _told(estimate(counts, sizes, rates, values=gains, factor=factor, zero=unchanged))
        spread = np.where(unchanged, 0, variance(counts, rates, gains))
        if not unchanged.all():
            found["labels_for_difference"] = _for_precision(spread, sizes, shares)
    return found


def _that_can_be_named(sizes: Ints, asked: Ints, told: Ints, used: Ints) -> Ints:
    """Images of each stratum that a person can name, judged by the share of those asked: (H,), 0 where it is none."""
    share = told / np.maximum(asked, 1)
    found: Ints = np.where(asked > 0, np.maximum(np.rint(sizes * share), used), sizes).astype(np.int64)
    return found


def _told(found: tuple[Any, Any, Any]) -> Estimate:
    value, low, high = (round(float(one), 6) for one in found)
    return Estimate(value, low, high)


def _for_precision(spread: Floats, sizes: Ints, shares: Floats) -> dict[float, int | None]:
    return {width: labels_for(width, spread, sizes, shares, factor=AT_PLAN) for width in HALF_WIDTHS}
