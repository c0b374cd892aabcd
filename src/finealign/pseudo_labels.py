"""Self-training weights: how far a pseudo-label is believed. Pure tensor maths, no gradient.

Step 6 of METHOD. The paper states that ambiguous pseudo-labels are weighted down; each formula here is [R], our
reconstruction, and an option by name.
"""

from typing import Literal

import torch
from torch import Tensor

WeightKind = Literal[
    "none", "margin", "agreement", "confusion", "margin*agreement", "confusion*agreement", "margin*agreement*confusion"
]


def margin_weight(probabilities: Tensor) -> Tensor:
    """1 - q_(2) / q_(1): near 0 when the two best classes are level, near 1 when one stands alone.

    probabilities (B, C) with C >= 2 -> (B,) in [0, 1]. [R]
    """
    first, second = probabilities.topk(2, dim=1).values.unbind(1)
    return 1 - second / first


def agreement_weight(global_probabilities: Tensor, labels: Tensor) -> Tensor:
    """q_global(y) / max_c q_global(c): the whole image's opinion of the label its crops gave.

    global_probabilities (B, C), labels (B,) int64 -> (B,) in [0, 1]; 1 when both choose the same class.
    The ratio is DPA's (WACV 2025), there between its two classifiers; its use here is [R].
    """
    chosen = global_probabilities.gather(1, labels[:, None]).squeeze(1)
    return chosen / global_probabilities.amax(1)


def confusability(anchors: Tensor, pair_counts: Tensor) -> Tensor:
    """How easily two classes are taken for each other, from their anchors and from how often they came 1st and 2nd.

    anchors (C, D) normalised, pair_counts (C, C) non-negative -> (C, C) in [0, 1], symmetric, zero diagonal.
    1 - (1 - s)(1 - f): s is the anchors' cosine scaled to [0, 1] over all pairs, f the pair's count over the largest.
    With a single pair, or all pairs alike, s is 1. [R]
    """
    count = anchors.shape[0]
    diagonal = torch.eye(count, dtype=torch.bool, device=anchors.device)
    cosine = anchors @ anchors.T
    low, high = cosine.masked_fill(diagonal, torch.inf).min(), cosine.masked_fill(diagonal, -torch.inf).max()
    spread = high - low
    # Cosines that differ by rounding alone are all alike: stretched to [0, 1] they would be noise.
    rounding = 16 * torch.finfo(cosine.dtype).eps
    similar = torch.where(spread > rounding, (cosine - low) / spread.clamp_min(rounding), 1.0)
    both_ways = pair_counts + pair_counts.T
    frequent = both_ways / both_ways.amax().clamp_min(1)
    return (1 - (1 - similar.clamp(0, 1)) * (1 - frequent)) * ~diagonal


def confusion_weight(probabilities: Tensor, confusable: Tensor) -> Tensor:
    """1 - kappa * q_(2) / q_(1), kappa the confusability of the two best classes.

    probabilities (B, C), confusable (C, C) in [0, 1] -> (B,) in [0, 1]: a close race between siblings counts less than
    one between strangers. [R]
    """
    top = probabilities.topk(2, dim=1)
    first, second = top.indices.unbind(1)
    return 1 - confusable[first, second] * top.values[:, 1] / top.values[:, 0]


def balanced(probabilities: Tensor, mean: Tensor, strength: float) -> Tensor:
    """q_c / pbar_c^beta, made to sum to 1: what is predicted too often counts for less.

    probabilities (B, C), mean (C,) the mean prediction, strength beta in [0, 1] -> (B, C). Distribution alignment
    (ReMixMatch, arXiv 1911.09785) to a uniform marginal at beta 1, nothing at 0; DPA aligns so. Its use here is [R].
    """
    if not strength:
        return probabilities
    weighted = probabilities / mean.clamp_min(torch.finfo(mean.dtype).tiny) ** strength
    return weighted / weighted.sum(1, keepdim=True)


def count_pairs(probabilities: Tensor) -> Tensor:
    """How often class i came first and class j second in this batch: (B, C) -> (C, C)."""
    classes = probabilities.shape[1]
    first, second = probabilities.topk(2, dim=1).indices.unbind(1)
    counts = torch.bincount(first * classes + second, minlength=classes * classes)
    return counts.reshape(classes, classes).to(probabilities.dtype)


def self_training_weight(
    kind: WeightKind,
    *,
    probabilities: Tensor,
    global_probabilities: Tensor,
    labels: Tensor,
    confusable: Tensor | None = None,
) -> Tensor:
    """The named weight, or the product of those named: (B,) in [0, 1]. ``none`` is a weight of 1.

    ``confusable`` (C, C) is looked at only where ``confusion`` is named; ValueError if it is missing there.
    """
    weight = torch.ones_like(probabilities[:, 0])
    for name in kind.split("*"):
        if name == "margin":
            weight = weight * margin_weight(probabilities)
        elif name == "agreement":
            weight = weight * agreement_weight(global_probabilities, labels)
        elif name == "confusion":
            if confusable is None:
                raise ValueError("the confusion weight needs the classes' confusability")
            weight = weight * confusion_weight(probabilities, confusable)
    return weight
