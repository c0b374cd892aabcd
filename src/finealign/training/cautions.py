"""What speaks against training on these images, seen before it begins: in the features and scores of the start.

The start is the model before adaptation. Nothing here knows true labels, so each caution is a guess and says what to do
if it is right. The limits were set so that even folders of real photos give none, with two backbones of which one is
much biased towards some classes; so what is uneven is often not noticed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finealign.errors import first_few
from finealign.method.copies import copies

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Kind = Literal["few_images", "absent", "dominant", "copies", "alike", "unknown_words"]

NAMED = 8  # most classes or pairs named in a message
FEW = 5  # images a class below which there are few
ABSENT = 0.1  # of an even share. Of classes that were there, the start gave no less than 0.12 of an even share
DOMINANT = 0.5  # share of the images
TOP_DOMINANT = 1 / 3  # share of the start's labels. Of even folders, no class had more than 0.2 of them
COPIES = 0.1  # share of the images
GROUP = 5  # least size of a group of copies that is worth a word
ALIKE = 0.05  # of the mean distance of two classes; of real descriptions, the two nearest had 0.085 and more
SAME_TEXTS = 1e-4  # 1 - cosine of two classes that are alike whatever the others are
ROWS = 1024  # classes compared at a time with all others

PRIOR = "give the share of each class with --class-prior FILE"


@dataclass(frozen=True)
class Caution:
    """What was seen, and the option that helps, in sentences for the user."""

    kind: Kind
    message: str


def cautions(
    weak: Floats,
    probabilities: Floats,
    *,
    shares: Floats,
    class_text: Floats,
    classes: Sequence[str],
    descriptions: Sequence[Sequence[str]],
    groups: Ints | None = None,
    images: int | None = None,
) -> list[Caution]:
    """What the user should know before training on n images of C classes; at most one caution of each kind.

    Args:
        weak: (n, D) L2-normalised features of the whole images.
        probabilities: (n, C) of the classes by the start; rows sum to 1.
        shares: (C,) estimated shares of the classes among the images; they sum to 1.
        class_text: (C, D) L2-normalised mean of each class's encoded descriptions.
        classes: C names.
        descriptions: of each class.
        groups: (n,) what ``copies(weak)`` returned, if it was called before.
        images: how many images will be trained on, of which these are an even sample; by default n.

    Raises:
        ValueError: the arrays do not fit together, or there is no image.
    """
    count, num_classes = probabilities.shape
    if not count:
        raise ValueError("no image")
    if len(weak) != count or {shares.shape, (len(class_text),), (len(classes),), (len(descriptions),)} != {
        (num_classes,)
    }:
        raise ValueError(
            f"{len(weak)} features, probabilities {probabilities.shape}, shares {shares.shape}, {len(class_text)} "
            f"texts, {len(classes)} classes and {len(descriptions)} descriptions do not fit together"
        )
    found = [
        few_images(count if images is None else images, num_classes),
        absent(probabilities, shares, classes),
        dominant(probabilities, shares, classes),
        many_copies(copies(weak) if groups is None else groups, num_classes),
        alike(class_text, classes, descriptions),
    ]
    return [caution for caution in found if caution]


def few_images(count: int, num_classes: int) -> Caution | None:
    """Warn of fewer images than classes, or fewer than FEW a class."""
    if count >= FEW * num_classes:
        return None
    what = "Fewer images than classes" if count < num_classes else "Few images a class"
    return Caution(
        "few_images",
        f"{what}: {count} for {num_classes} classes, wanted {FEW} or more a class. Add images, or leave classes out "
        "that you do not need.",
    )


def absent(probabilities: Floats, shares: Floats, classes: Sequence[str]) -> Caution | None:
    """Warn of classes that seem to have no images.

    Both their estimated share is at most ABSENT of an even one, or worth less than half an image, and their mean
    probability by the start is at most ABSENT of an even one: estimates that follow their own labels are often nought
    for classes that are there. With fewer images than classes, absence says nothing.
    """
    count, num_classes = probabilities.shape
    if count < num_classes:
        return None
    few = shares <= max(ABSENT / num_classes, 0.5 / count)
    gone = np.flatnonzero(few & (probabilities.mean(axis=0) <= ABSENT / num_classes))
    if not len(gone):
        return None
    what = "1 class seems" if len(gone) == 1 else f"{len(gone)} classes seem"
    names = first_few((_name(classes[index]) for index in gone.tolist()), len(gone), NAMED)
    return Caution(
        "absent",
        f"{what} to have no images: {names}. If so, leave out of the class list what is not there, or {PRIOR}.",
    )


def dominant(probabilities: Floats, shares: Floats, classes: Sequence[str]) -> Caution | None:
    """Warn of one class that seems to have most images, at least thrice an even share, of three classes or more.

    The start must also give its label to a third of the images and twice an even share: estimates that follow their own
    labels may run away to one class.
    """
    num_classes = len(classes)
    largest = int(shares.argmax())
    share, top = float(shares[largest]), float((probabilities.argmax(axis=1) == largest).mean())
    if num_classes < 3 or share <= DOMINANT or share < 3 / num_classes or top < max(TOP_DOMINANT, 2 / num_classes):
        return None
    return Caution(
        "dominant",
        f"About {share:.0%} of the images seem to be of one class, {_name(classes[largest])}. If so, {PRIOR}. If not, "
        "its descriptions may fit too much: better ones can be given with --descriptions.",
    )


def many_copies(groups: Ints, num_classes: int) -> Caution | None:
    """Warn of copies that outweigh other images. ``groups`` is (n,), as ``copies`` returns them.

    That is where more than COPIES of the images are copies of others, or where one image has GROUP copies or more and
    half as many as there are images a class.
    """
    sizes = np.bincount(groups)
    surplus, largest = len(groups) - len(sizes), int(sizes.max())
    if surplus <= COPIES * len(groups) and largest < max(GROUP, len(groups) / num_classes / 2):
        return None
    return Caution(
        "copies",
        f"{surplus} of the {len(groups)} images are copies, or nearly, of others; of one image there are "
        f"{largest}. Training takes each for an image of its own. Remove the copies, or {PRIOR}.",
    )


def alike(class_text: Floats, classes: Sequence[str], descriptions: Sequence[Sequence[str]]) -> Caution | None:
    """Warn of pairs of classes that their descriptions do not tell apart, for the encoder or for anyone.

    Texts lie in a narrow cone, so distances (1 - cosine) are held against their mean over all pairs: a pair is alike at
    less than ALIKE of it, or at SAME_TEXTS, or where the descriptions are the same. Of each class, the nearest one
    before it is looked at.
    """
    pairs = sorted({*_same_descriptions(descriptions), *_near(class_text)})
    if not pairs:
        return None
    shown = (f"{_name(classes[first])} and {_name(classes[second])}" for first, second in pairs)
    return Caution(
        "alike",
        f"The descriptions do not tell apart {first_few(shown, len(pairs), NAMED)}. Say what differs with "
        "--descriptions FILE, or have it written with `finealign describe`.",
    )


def _same_descriptions(descriptions: Sequence[Sequence[str]]) -> list[tuple[int, int]]:
    """Each class that has the descriptions of an earlier one, in any order and case: (the first such, the class)."""
    first: dict[tuple[str, ...], int] = {}
    keys = [tuple(sorted(" ".join(text.split()).casefold() for text in texts)) for texts in descriptions]
    return [(first[key], index) for index, key in enumerate(keys) if first.setdefault(key, index) != index]


def _near(class_text: Floats) -> list[tuple[int, int]]:
    """Each class that is nearly where an earlier one is: (the nearest earlier one, the class)."""
    count = len(class_text)
    texts = np.asarray(class_text, dtype=np.float64)
    mean_distance = (1 - float((texts.mean(axis=0) ** 2).sum())) * count / max(1, count - 1)
    limit = max(ALIKE * mean_distance, SAME_TEXTS)
    pairs = []
    for start in range(0, count, ROWS):
        cosines = texts[start : start + ROWS] @ texts.T
        cosines[np.arange(count) >= np.arange(start, start + len(cosines))[:, None]] = -np.inf  # earlier ones alone
        nearest = cosines.argmax(axis=1)
        close = np.flatnonzero(1 - cosines.max(axis=1) < limit)
        pairs += [(int(nearest[row]), start + int(row)) for row in close]
    return pairs


def _name(name: str) -> str:
    return f"{name!r:.100}"
