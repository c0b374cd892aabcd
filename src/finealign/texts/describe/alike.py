"""Which classes are close to each other for the text encoder: by their names, and by their descriptions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from finealign.backbone.base import Backbone
from finealign.texts.prompts import make_texts

ROWS = 4096  # texts compared with all classes at a time, which bounds the memory used


@dataclass(frozen=True)
class Alike:
    """Two classes whose texts the encoder mixes up, and which share of the texts of each is nearer to the other."""

    classes: tuple[str, str]
    shares: tuple[float, float]  # in [0, 1]: the first's texts nearer to the second, the second's nearer to the first


def siblings_of(
    classes: Sequence[str], backbone: Backbone, *, count: int, templates: Sequence[str] | None = None
) -> dict[str, tuple[str, ...]]:
    """For each class, the ``count`` nearest other classes, nearest first.

    Nearness is the cosine between the class names, each averaged over the templates (default templates if None). Raises
    PromptError for names or templates that cannot be used, BackboneError for names that are too long for the encoder.
    """
    names = backbone.encode_texts(make_texts(classes, None, templates)).names.cpu()
    cosines = (names @ names.T).fill_diagonal_(-2.0)  # below every cosine: a class is not its own sibling
    order = cosines.argsort(dim=1, descending=True, stable=True)[:, : min(count, len(classes) - 1)]
    return {name: tuple(classes[index] for index in row) for name, row in zip(classes, order.tolist(), strict=True)}


def mixed_up(features: Tensor, class_of: Tensor, classes: int) -> Tensor:
    """For each pair of classes, the share of the first one's texts that the encoder puts nearer to the second.

    A text is nearer to another class if its cosine to that class's mean is larger than its cosine to the mean of the
    other texts of its own class. The only text of a class always counts as nearest to its own class. Because shares do
    not depend on the size of the cosines, encoders whose texts all lie close together can be judged like any other.

    Takes features (M, D) normalised, class_of (M,) int64 with the class of each text, and ``classes``, their number C.
    Returns (C, C) in [0, 1]: the row is the class of the texts, the column the other class; the diagonal is 0.
    """
    own_cosines, means = _nearness(features, class_of, classes)
    shares = torch.zeros(classes, classes)
    for start in range(0, len(features), ROWS):
        part = slice(start, start + ROWS)
        shares.index_add_(0, class_of[part], (features[part] @ means.T > own_cosines[part, None]).float())
    return _as_shares(shares, class_of)


def _nearness(features: Tensor, class_of: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Each text's cosine to the mean of its class's other texts (M,), inf if there are none; the class means (C, D)."""
    counts = torch.bincount(class_of, minlength=classes)
    sums = torch.zeros(classes, features.shape[1]).index_add_(0, class_of, features)
    other_means = normalize(sums[class_of] - features, dim=-1)
    return (features * other_means).sum(1).masked_fill(counts[class_of] < 2, torch.inf), normalize(sums, dim=-1)


def _as_shares(nearer: Tensor, class_of: Tensor) -> Tensor:
    """Turn counts of texts (C, C) into shares of the texts of each row's class, with a diagonal of 0."""
    counts = torch.bincount(class_of, minlength=len(nearer))
    return nearer.fill_diagonal_(0.0) / counts.clamp(min=1)[:, None]


def alike_pairs(shares: Tensor, classes: Sequence[str]) -> list[Alike]:
    """The pairs of classes that are mixed up, from the largest share to the smallest.

    A pair is mixed up if more than half of the texts of either class is nearer to the other class. ``shares`` is (C, C)
    as from ``mixed_up``.
    """
    worse = torch.maximum(shares, shares.T).triu(1)
    indices = (worse > 0.5).nonzero().tolist()
    pairs = [Alike((classes[a], classes[b]), (float(shares[a, b]), float(shares[b, a]))) for a, b in indices]
    return sorted(pairs, key=lambda pair: -max(pair.shares))


def shares_of(sets: Sequence[Tensor]) -> Tensor:
    """``mixed_up`` for C classes given as one tensor (texts, D) of encoded texts per class. Returns (C, C)."""
    return mixed_up(torch.cat(list(sets)), _class_of(sets), len(sets))


def shares_with(shares: Tensor, sets: Sequence[Tensor], place: int) -> Tensor:
    """Update the result of ``shares_of`` after the texts of one class have changed. Returns (C, C).

    ``sets`` are the encoded texts of all classes with the change, ``place`` is the index of the changed class, and
    ``shares`` are those from before the change. Only the row and the column of that class are computed anew.
    """
    features, class_of = torch.cat(list(sets)), _class_of(sets)
    own_cosines, means = _nearness(features, class_of, len(sets))
    of_class = class_of == place
    updated = shares.clone()
    nearer = torch.zeros(len(sets)).index_add_(0, class_of, (features @ means[place] > own_cosines).float())
    updated[:, place] = nearer / torch.bincount(class_of, minlength=len(sets)).clamp(min=1)
    updated[place] = (features[of_class] @ means.T > own_cosines[of_class, None]).float().mean(0)
    updated[place, place] = 0.0
    return updated


def _class_of(sets: Sequence[Tensor]) -> Tensor:
    """The class of each text, (M,) int64, when the sets are joined."""
    return torch.repeat_interleave(torch.tensor([len(group) for group in sets]))


def worst_share(shares: Tensor, place: int) -> float:
    """The largest share between the class with index ``place`` and any other class, in either direction."""
    return float(torch.maximum(shares[place], shares[:, place]).max())
