"""The records that the package's modules pass to each other, with the shape of every tensor.

Letters: B images in a batch, N crops per image, K crops kept, C classes, M descriptions of all classes together,
J anchors per class, D embedding width. All features are L2-normalised float32, so an inner product is a cosine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Score = Literal["global", "las", "fused"]
Use = Literal["start", "adapted"]  # the model before adaptation, or the adapted one
# How the images to classify are distributed: as those that were adapted to, or with each class as likely as another.
ClassPrior = Literal["folder", "even"]
Precision = Literal["fp32", "bf16", "fp16"]
WantedPrecision = Literal["auto", "fp32", "bf16", "fp16"]  # auto: the one that the processor computes fastest
Reject = Literal["auto"] | float  # refuse what likelier shows no class than one, or this share of the images
Blank = Literal["black", "white"]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are exclusive


class Collection(Protocol):
    """Images that are no files, or not each a file of its own: in memory, or rows of a dataset."""

    def name(self, index: int) -> str:
        """What the image at this index is called in lists and tables, as ``train/123``."""

    def open(self, index: int) -> BinaryIO:
        """Open the image for reading, as the bytes of an image file. Raises ImageReadError."""


@dataclass(frozen=True, repr=False)
class HeldImage:
    """One image of a collection. It stands wherever the path of an image file does, and its path is its name.

    Two are equal if they are at the same index of the same collection.
    """

    collection: Collection
    index: int

    def __fspath__(self) -> str:
        return self.collection.name(self.index)

    def __str__(self) -> str:
        return self.collection.name(self.index)

    def __repr__(self) -> str:
        return f"HeldImage({self.collection.name(self.index)!r})"


ImagePath = Path | HeldImage


@dataclass(frozen=True)
class SetAside:
    """An image that could not be used, and the reason. The run continues without it."""

    path: str
    reason: str


@dataclass(frozen=True)
class Texts:
    """The class names, descriptions and templates, which are known before any image is read.

    ``descriptions`` has one non-empty tuple of sentences per class, in the order of ``classes``. ``templates`` are
    prompts with one ``{}`` for the class name.
    """

    classes: tuple[str, ...]
    descriptions: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class TextFeatures:
    """The encoded texts. They do not change during a run."""

    names: Tensor  # (C, D) normalised mean over the templates, each filled with the class name
    descriptions: Tensor  # (M, D) every description of every class
    class_of: Tensor  # (M,) int64, the class of each description

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self.names.shape[0]


@dataclass(frozen=True)
class ImageFeatures:
    """The features of a batch of images: of each weak view and of its crops.

    ``crops`` is (B, 0, D) for methods that use no crops.
    """

    weak: Tensor  # (B, D)
    crops: Tensor  # (B, N, D)


@dataclass(frozen=True, eq=False)
class Gaze:
    """How the image tower encodes a whole image, where this differs from its default.

    It can take learned prompts and use salient patches. Towers without tokens (``Backbone.token_width`` 0) ignore both.
    """

    prompts: Tensor | None = None  # (P, W), P prompts of the token width W, appended to the tokens of every image
    salient: bool = False  # whether the embedding is half the tower's own and half that of the salient patches


@dataclass(frozen=True)
class PseudoLabels:
    """The pseudo-labels that a method gives to a batch. The tensors never carry a gradient."""

    labels: Tensor  # (B,) int64
    weights: Tensor  # (B,) in [0, 1]
    probabilities: Tensor  # (B, C), rows sum to 1
    belonging: Tensor | None = None  # (B,) in (0, 1], how far each image belongs to the classes; None: wholly


@dataclass(frozen=True)
class Loss:
    """The scalar to minimise, and its named parts for the log."""

    total: Tensor  # ()
    parts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """The scores of one image from the adapted model and, where requested, from the start.

    The start is the model before adaptation. Scores are on the scale of cosines; probabilities sum to 1.
    """

    path: ImagePath
    scores: NDArray[np.float32]  # (C,)
    probabilities: NDArray[np.float32]  # (C,)
    start_scores: NDArray[np.float32] | None = None  # (C,)
    start_probabilities: NDArray[np.float32] | None = None  # (C,)
    none: float | None = None  # how likely the image shows none of the classes, in [0, 1]; None if the model cannot say
    blank: Blank | None = None  # whether the image is all but black or all but white


@dataclass(frozen=True, eq=False)
class Explanation:
    """The crops that a fitted model uses in one image, their weights, and the resulting scores.

    Boxes are in pixels of the image as it is displayed, after its EXIF rotation. Scores and probabilities equal those
    that the model predicts with the same kind of score. Those of the start (the model before adaptation) are given
    where they were requested, and equal its predictions likewise.
    """

    width: int  # of the image as it is displayed, in pixels
    height: int
    score: Score  # the kind of score
    boxes: tuple[Box, ...]  # N crops; none for "global", which uses the whole image
    weights: NDArray[np.float32]  # (N,) weight of each crop, in [0, 1]; they sum to 1
    scores: NDArray[np.float32]  # (C,)
    probabilities: NDArray[np.float32]  # (C,)
    start_scores: NDArray[np.float32] | None = None  # (C,)
    start_probabilities: NDArray[np.float32] | None = None  # (C,)
    none: float | None = None  # as in Prediction


@dataclass(frozen=True)
class Truth:
    """Ground truth, which only evaluation reads: image paths and the class index of each image."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    left_out: str = ""  # what else was in the folder, as a sentence
    unknown: Mapping[str, int] = field(default_factory=dict)  # names that match no class: how many images each has
