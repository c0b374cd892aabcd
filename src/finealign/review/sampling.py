"""Which images to ask a person about, so that few labels say much: stratified random samples, as pure functions.

The images are divided into strata by the confidence of the adapted model and by whether their label changed, and each
stratum is a random sample without replacement. A stratum's share of the labels grows with its number of images times
the standard deviation that its confidence lets expect (Neyman's allocation, 1934), so the boundaries are drawn where
every stratum of a group earns the same number of labels. The order is such that any beginning of it is such a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]
Aim = Literal["both", "accuracy", "difference", "random"]
AIMS: tuple[Aim, ...] = get_args(Aim)

# Calibrated confidence is an estimate, so no image is taken for surer than this when labels are shared out.
SUREST = 0.95
EXPECTED = 0.8  # nor when its variance is estimated, where a few right labels by chance must not seem to confirm it
LABELS_A_STRATUM = 8
MOST_STRATA = 12
OF_DIFFERENCE = 0.2  # of the labels of "both", the share that is given out as for "difference"


@dataclass(frozen=True)
class Design:
    """A sample of N images in the order in which they are to be asked, and the strata that it is drawn from."""

    stratum: Ints  # (N,) the stratum of each image, in [0, H)
    sizes: Ints  # (H,) images of each stratum
    unchanged: Bools  # (H,) whether no label of it changed, so that its accuracy cannot have changed either
    expected: Floats  # (H,) mean confidence of its images, each at most EXPECTED
    order: Ints  # (N,) the images, the first to ask first


def draw(confidence: Floats, changed: Bools, predicted: Ints, *, aim: Aim, budget: int, seed: int) -> Design:
    """Draw a sample of N images.

    Args:
        confidence: (N,) calibrated confidence of the adapted model in its label, in [0, 1].
        changed: (N,) whether the start labels the image otherwise.
        predicted: (N,) the adapted model's label, a class index. Images of a stratum are spread over these.
        aim: what is to be measured: the accuracies ("accuracy"), their difference ("difference"), to which images
            whose label did not change add nothing, or "both", whose shares of labels are the mean of those of the two.
            "random" draws every image alike.
        budget: number of labels to plan for, at least 1.
        seed: of the draw.

    Raises ValueError where the arrays do not fit together.
    """
    if not len(confidence) or {confidence.shape, changed.shape, predicted.shape} != {(len(confidence),)}:
        raise ValueError(f"confidence {confidence.shape}, changed {changed.shape}, predicted {predicted.shape}")
    rng = np.random.default_rng(seed)
    sure = np.clip(confidence, 1 - SUREST, SUREST)
    spread = np.sqrt(sure * (1 - sure))
    stratum = np.zeros(len(confidence), dtype=np.int64)
    weights: list[float] = []  # a stratum's share of the labels, up to a factor
    for members, share in _groups(spread, changed, aim):
        parts = [members] if aim == "random" else _cut(members, sure, spread, _strata(len(members), share * budget))
        for part in parts:
            stratum[part] = len(weights)
            weights.append(share / len(parts))
    sizes = np.bincount(stratum, minlength=len(weights))
    unchanged = [not changed[stratum == h].any() for h in range(len(weights))]
    drawn = [_spread_over(np.flatnonzero(stratum == h), predicted, rng) for h in range(len(weights))]
    return Design(
        stratum=stratum,
        sizes=sizes,
        unchanged=np.array(unchanged),
        expected=np.bincount(stratum, np.minimum(sure, EXPECTED)) / sizes,
        order=_interleaved(drawn, weights),
    )


def _groups(spread: Floats, changed: Bools, aim: Aim) -> list[tuple[Ints, float]]:
    """The images that are divided into strata together, and their share of the labels, as (images, share)."""
    everyone = np.arange(len(spread))
    if aim in ("accuracy", "random") or changed.all() or not changed.any():
        return [(everyone, 1.0)]
    of_accuracy = float(spread[changed].sum() / spread.sum())
    share = 1.0 if aim == "difference" else OF_DIFFERENCE + (1 - OF_DIFFERENCE) * of_accuracy
    return [(everyone[changed], share), (everyone[~changed], 1 - share)]


def _strata(images: int, labels: float) -> int:
    """How many strata to make of so many images: fewer where few of the images remain without a label."""
    return max(1, min(MOST_STRATA, round(labels / LABELS_A_STRATUM), round((images - labels) / LABELS_A_STRATUM)))


def _cut(members: Ints, sure: Floats, spread: Floats, count: int) -> list[Ints]:
    """Cut images into at most ``count`` parts by confidence, each with the same sum of ``spread``."""
    ranked = members[np.argsort(sure[members], kind="stable")]
    passed = np.cumsum(spread[ranked])
    place = np.minimum((count * (passed - spread[ranked] / 2) / passed[-1]).astype(int), count - 1)
    return [ranked[place == part] for part in range(count) if (place == part).any()]


def _spread_over(members: Ints, predicted: Ints, rng: np.random.Generator) -> Ints:
    """A random order of a stratum's images, any beginning of which is spread over their predicted classes.

    Images lie on a circle, those of a class side by side; the places are taken in the order of reversed bits, from a
    random one on. So every image is equally likely to be at every place of the order.
    """
    shuffled = rng.permutation(members)
    classes = rng.permutation(int(predicted.max()) + 1)  # no class is always beside the same ones
    circle = np.roll(shuffled[np.argsort(classes[predicted[shuffled]], kind="stable")], rng.integers(len(members)))
    bits = max(1, int(len(members) - 1).bit_length())
    slots = np.arange(len(members)) * 2**bits // len(members)
    reversed_bits = np.zeros_like(slots)
    for bit in range(bits):
        reversed_bits |= (slots >> bit & 1) << (bits - 1 - bit)
    found: Ints = circle[np.argsort(reversed_bits)]
    return found


def _interleaved(drawn: Sequence[Ints], weights: Sequence[float]) -> Ints:
    """One order of all strata's images, any beginning of which has each stratum's share of the labels.

    The next image is of the stratum with the smallest ratio of labels to weight (Webster's method). Strata of weight 0
    come last.
    """
    keys = [
        (np.arange(len(images)) + 0.5) / weight if weight else np.inf + np.arange(len(images))
        for images, weight in zip(drawn, weights, strict=True)
    ]
    found: Ints = np.concatenate(drawn)[np.argsort(np.concatenate(keys), kind="stable")]
    return found
