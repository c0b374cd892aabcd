"""Accuracy, and its change, from a stratified sample of labels: estimates and 95 % intervals, as pure functions.

An estimate is the mean of the strata's means, weighted by their numbers of images (Horvitz and Thompson, 1952). Its
interval is Wilson's (1927), with the sample size that a simple random sample would need to have the design's variance
(Korn and Graubard, 1998), less what drawing without replacement takes away, and cut to what the labels leave possible.

It is looked at while labels come in, so it must not be wrong because of when a person stops. Figures are renewed at
``looks`` alone, five on the way to the planned number of labels and one at each doubling from there on, and at each of
them the interval is wider than one for a single look: repeated confidence intervals (Jennison and Turnbull, 1989), with
O'Brien and Fleming's (1979) bounds. All of them together are wrong in at most 5 % of reviews.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]

LOOKS = 5  # up to the planned number of labels
FEWEST = 10  # labels before the first look
# By simulation of Brownian motion, so that the bounds of all looks, with six doublings, are passed in 5 % of reviews.
AT_PLAN, BEYOND = 2.13, 3.05  # standard errors: at the planned number, and at each doubling of it
PRIOR = 1.0  # how many images of the expected accuracy are added to a stratum where its variance is estimated


@dataclass(frozen=True)
class Estimate:
    """An estimate and its 95 % interval, all fractions of the images."""

    value: float
    low: float
    high: float


def looks(budget: int, images: int) -> list[int]:
    """After how many labels the figures are renewed, for a plan of ``budget`` labels of ``images`` images."""
    planned = min(budget, images)
    at = {min(planned, max(FEWEST, math.ceil(planned * look / LOOKS))) for look in range(1, LOOKS + 1)}
    while planned < images:
        planned = min(2 * planned, images)
        at.add(planned)
    return sorted(at)


def width_factor(labels: int, budget: int, images: int) -> float:
    """How many standard errors the interval reaches to either side at a look after so many labels.

    The fewer of the planned labels there are, the wider: by the square root of the inverse share of the information,
    which is the inverse variance of a mean of so many of the images.
    """
    planned = min(budget, images)
    if labels >= planned:
        return BEYOND if labels > planned else AT_PLAN
    if planned == images:
        return AT_PLAN * math.sqrt(planned / labels)
    return AT_PLAN * math.sqrt((1 / labels - 1 / images) / (1 / planned - 1 / images))


def estimate(
    counts: Ints, sizes: Ints, expected: Floats, *, values: tuple[float, ...], factor: float, zero: Bools | None = None
) -> tuple[Floats, Floats, Floats]:
    """Estimate the mean over all images of a value that each labelled image has: estimate, low and high, each (...).

    Args:
        counts: (..., H, V) labelled images of each stratum by their value; several samples may stand before.
        sizes: (H,) images of each stratum.
        expected: (H, V) how frequent each value is expected to be, rows sum to 1. It is used for the variance alone,
            where it counts as PRIOR images a stratum.
        values: V whole numbers that an image can have, as 1 where it is labelled correctly and 0 where not.
        factor: standard errors to either side, as ``width_factor`` gives them.
        zero: (H,) strata all of whose images have the value 0, labelled or not; None: there are none.

    Raises ValueError where a stratum has no label, unless it is one of ``zero``.
    """
    known = np.zeros(len(sizes), dtype=bool) if zero is None else zero
    labelled = counts.sum(-1)  # (..., H)
    if (labelled[..., ~known] == 0).any():
        raise ValueError("a stratum has no label")
    scale, images = np.array(values), int(sizes.sum())
    weights = np.where(known, 0, sizes) / images
    reach = float(weights.sum())  # the share of the images that can have another value than 0
    if not reach:
        nothing = np.zeros(counts.shape[:-2])
        return nothing, nothing, nothing
    number = np.maximum(labelled, 1)
    mean = ((counts / number[..., None]) @ scale * weights).sum(-1)
    centre = _smoothed(counts, expected) @ scale
    unseen = 1 - labelled / sizes
    error = (weights**2 * variance(counts, expected, values) / number * unseen).sum(-1)
    bottom, width = reach * scale.min(), reach * (scale.max() - scale.min())
    low, high = _wilson(
        (mean - bottom) / width, ((centre * weights).sum(-1) - bottom) / width, error / width**2, factor
    )
    # Times the number of images it is a whole number, so the limits are moved outwards to one.
    low = np.floor(images * (bottom + width * low) + 1e-6) / images
    high = np.ceil(images * (bottom + width * high) - 1e-6) / images
    sure = ((counts @ scale) * ~known).sum(-1) / images
    left = (weights * unseen).sum(-1)  # the share of the images that are still to be labelled
    return mean, np.maximum(low, sure + left * scale.min()), np.minimum(high, sure + left * scale.max())


def variance(counts: Ints, expected: Floats, values: tuple[float, ...]) -> Floats:
    """The variance of the value within each stratum, as estimated from its labels: (..., H); see ``estimate``."""
    rates, scale = _smoothed(counts, expected), np.array(values)
    found: Floats = rates @ scale**2 - (rates @ scale) ** 2
    return found


def _smoothed(counts: Ints, expected: Floats) -> Floats:
    found: Floats = (counts + PRIOR * expected) / (counts.sum(-1) + PRIOR)[..., None]
    return found


def labels_for(half_width: float, spread: Floats, sizes: Ints, shares: Floats, *, factor: float) -> int | None:
    """How many labels an interval of this half width takes; None if all images together do not suffice.

    spread (H,) variance of the value within each stratum, sizes (H,) images of each, shares (H,) of the labels.
    """
    images = int(sizes.sum())

    def given(pace: float) -> Floats:
        """Labels of each stratum where those with images left have their share of ``pace``."""
        found: Floats = np.minimum(sizes, np.maximum(shares * pace, 1))
        return found

    def reach(pace: float) -> float:
        number = given(pace)
        return factor * math.sqrt(float(((sizes / images) ** 2 * spread / number * (1 - number / sizes)).sum()))

    low, high = 0.0, float((sizes / np.maximum(shares, 1e-9)).max())
    if reach(high) > half_width:
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reach(middle) <= half_width else (middle, high)
    return min(images, math.ceil(float(given(high).sum()) - 1e-6))


def _wilson(share: Floats, smoothed: Floats, variance: Floats, factor: float) -> tuple[Floats, Floats]:
    """Wilson's interval for a share in [0, 1] whose estimate has this variance where it is ``smoothed``.

    The variance is taken to be proportional to p (1 - p) around there.
    """
    weight = factor**2 * variance / np.maximum(smoothed * (1 - smoothed), 1e-12)  # z^2 / n, n the effective size
    middle = (share + weight / 2) / (1 + weight)
    reach = np.sqrt(np.maximum(weight * share * (1 - share) + weight**2 / 4, 0)) / (1 + weight)
    return middle - reach, middle + reach
