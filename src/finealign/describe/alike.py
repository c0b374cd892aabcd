"""What the encoder makes of classes: the nearest to each by name, and those whose texts it mixes up."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from finealign.backbone import Backbone
from finealign.prompts import make_texts

ROWS = 4096  # texts compared with all classes at a time: memory


@dataclass(frozen=True)
class Alike:
    """Two classes whose texts the encoder mixes up, and the share of each one's texts that it does so with."""

    classes: tuple[str, str]
    shares: tuple[float, float]  # of the first's texts nearer the second, and of the second's nearer the first


def siblings_of(
    classes: Sequence[str], backbone: Backbone, *, count: int, templates: Sequence[str] | None = None
) -> dict[str, tuple[str, ...]]:
    """The ``count`` classes nearest to each by the cosine of their names in templates, the nearest first."""
    names = backbone.encode_texts(make_texts(classes, None, templates)).names.cpu()
    near = (names @ names.T).fill_diagonal_(-2.0)  # below every cosine
    order = near.argsort(dim=1, descending=True, stable=True)[:, : min(count, len(classes) - 1)]
    return {name: tuple(classes[other] for other in row) for name, row in zip(classes, order.tolist(), strict=True)}


def mixed_up(features: Tensor, class_of: Tensor, classes: int) -> Tensor:
    """The share of each class's texts that is nearer another class's mean than the mean of its own class's others.

    Features (M, D) normalised, class_of (M,) int64; the result is (C, C), row the texts' class, in [0, 1], with a
    diagonal of nought. Nearness is cosine. A share knows no scale: encoders whose texts all lie close together are
    judged as those whose texts lie apart. The only text of a class has no others, and counts as its own class's.
    """
    own, means = _nearness(features, class_of, classes)
    shares = torch.zeros(classes, classes)
    for start in range(0, len(features), ROWS):
        part = slice(start, start + ROWS)
        shares.index_add_(0, class_of[part], (features[part] @ means.T > own[part, None]).float())
    return _as_shares(shares, class_of)


def _nearness(features: Tensor, class_of: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Each text's cosine to the mean of its class's others (M,), infinite if it has none; the classes' means (C, D)."""
    counts = torch.bincount(class_of, minlength=classes)
    sums = torch.zeros(classes, features.shape[1]).index_add_(0, class_of, features)
    others = normalize(sums[class_of] - features, dim=-1)
    return (features * others).sum(1).masked_fill(counts[class_of] < 2, torch.inf), normalize(sums, dim=-1)


def _as_shares(nearer: Tensor, class_of: Tensor) -> Tensor:
    """Counts of texts (C, C) as shares of each row's texts, without those of a class and itself."""
    counts = torch.bincount(class_of, minlength=len(nearer))
    return nearer.fill_diagonal_(0.0) / counts.clamp(min=1)[:, None]


def alike_pairs(shares: Tensor, classes: Sequence[str]) -> list[Alike]:
    """The pairs of which more than half of either one's texts is nearer the other; the most mixed up first."""
    worse = torch.maximum(shares, shares.T).triu(1)
    pairs = (worse > 0.5).nonzero().tolist()
    found = [Alike((classes[a], classes[b]), (float(shares[a, b]), float(shares[b, a]))) for a, b in pairs]
    return sorted(found, key=lambda pair: -max(pair.shares))


def shares_of(sets: Sequence[Tensor]) -> Tensor:
    """``mixed_up`` of classes whose encoded texts come as one (M, D) tensor each."""
    return mixed_up(torch.cat(list(sets)), _class_of(sets), len(sets))


def shares_with(shares: Tensor, sets: Sequence[Tensor], place: int) -> Tensor:
    """``shares_of`` the sets, where ``shares`` are those from before the set at this place alone was changed."""
    features, class_of = torch.cat(list(sets)), _class_of(sets)
    own, means = _nearness(features, class_of, len(sets))
    mine = class_of == place
    changed = shares.clone()
    nearer = torch.zeros(len(sets)).index_add_(0, class_of, (features @ means[place] > own).float())
    changed[:, place] = nearer / torch.bincount(class_of, minlength=len(sets)).clamp(min=1)
    changed[place] = (features[mine] @ means.T > own[mine, None]).float().mean(0)
    changed[place, place] = 0.0
    return changed


def _class_of(sets: Sequence[Tensor]) -> Tensor:
    return torch.repeat_interleave(torch.tensor([len(group) for group in sets]))


def worst_share(shares: Tensor, place: int) -> float:
    """The largest share that the class at this place has a part in, in either direction."""
    return float(torch.maximum(shares[place], shares[:, place]).max())
