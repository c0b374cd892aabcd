"""The records that cross the borders between rooms, each with the shape of every tensor beside it.

Letters: B images in a batch, N crops per image, K crops kept, C classes, M descriptions in all, J anchors per class,
D embedding width. All features are L2-normalised float32, so an inner product is a cosine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Score = Literal["global", "las", "fused"]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; the last two lie just outside


@dataclass(frozen=True)
class SetAside:
    """An image that could not be used, and why; the run goes on without it."""

    path: str
    reason: str


@dataclass(frozen=True)
class Texts:
    """What is known of the classes before any image is seen.

    ``descriptions`` has one non-empty tuple of sentences a class, in the order of ``classes``; ``templates`` are
    prompts with one ``{}`` for the class name.
    """

    classes: tuple[str, ...]
    descriptions: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class TextFeatures:
    """The encoded texts: fixed for a whole run."""

    names: Tensor  # (C, D) normalised mean over the templates, each filled with the class name
    descriptions: Tensor  # (M, D) every description of every class
    class_of: Tensor  # (M,) int64, the class of each description

    @property
    def num_classes(self) -> int:
        return self.names.shape[0]


@dataclass(frozen=True)
class ImageFeatures:
    """One image seen whole and in parts. ``crops`` is (B, 0, D) for methods that look at no crops."""

    weak: Tensor  # (B, D)
    crops: Tensor  # (B, N, D)


@dataclass(frozen=True)
class PseudoLabels:
    """What a method believes of a batch; never carries a gradient."""

    labels: Tensor  # (B,) int64
    weights: Tensor  # (B,) in [0, 1]
    probabilities: Tensor  # (B, C), rows sum to 1


@dataclass(frozen=True)
class Loss:
    """The scalar to minimise and its named parts, for the log."""

    total: Tensor  # ()
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """The scores of one image: of the adapted model, and of the one it started from where that was asked for.

    Scores are cosine-like; probabilities sum to 1.
    """

    path: Path
    scores: NDArray[np.float32]  # (C,)
    probabilities: NDArray[np.float32]  # (C,)
    start_scores: NDArray[np.float32] | None = None  # (C,)
    start_probabilities: NDArray[np.float32] | None = None  # (C,)


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a fitted model looks at in one image, and what it makes of it.

    Boxes are in pixels of the image as it is shown, its EXIF rotation applied. Scores and probabilities are those the
    model predicts with by the same score; so are those of the model it started from, where that was asked for.
    """

    width: int  # of the image as it is shown, in pixels
    height: int
    score: Score  # what the scores are
    boxes: tuple[Box, ...]  # N crops; none for "global", which looks at the image as a whole
    weights: NDArray[np.float32]  # (N,) how much each crop counts, in [0, 1]; they sum to 1
    scores: NDArray[np.float32]  # (C,)
    probabilities: NDArray[np.float32]  # (C,)
    start_scores: NDArray[np.float32] | None = None  # (C,)
    start_probabilities: NDArray[np.float32] | None = None  # (C,)


@dataclass(frozen=True)
class Truth:
    """Ground truth, read by evaluation alone: image paths and the index of each one's class."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
