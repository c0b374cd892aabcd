"""Self-training weights, which say how far a pseudo-label is trusted: pure tensor functions, used without gradient.

Step 6 of docs/method.md. The paper states that ambiguous pseudo-labels get a lower weight; every formula here is our
reconstruction [R], and can be chosen by its name.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from finealign.types import PseudoLabels

WeightKind = Literal[
    "none", "margin", "agreement", "confusion", "margin*agreement", "confusion*agreement", "margin*agreement*confusion"
]


def margin_weight(probabilities: Tensor) -> Tensor:
    """Compute 1 - q_(2) / q_(1): near 0 if the two best classes are about equally probable, near 1 if they are not.

    probabilities (B, C) with C >= 2 -> (B,) in [0, 1]. [R]
    """
    first, second = probabilities.topk(2, dim=1).values.unbind(1)
    return 1 - second / first


def agreement_weight(global_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Compute q_global(y) / max_c q_global(c): how far the whole image supports the label that its crops gave.

    global_probabilities (B, C), labels (B,) int64 -> (B,) in [0, 1]; 1 if the whole image and the crops give the same
    class. DPA (WACV 2025) uses this ratio between its two classifiers; its use here is [R].
    """
    chosen = global_probabilities.gather(1, labels[:, None]).squeeze(1)
    return chosen / global_probabilities.amax(1)


def confusability(anchors: Tensor, pair_counts: Tensor) -> Tensor:
    """Estimate how easily two classes are confused, from their anchors and from how often they are the two best ones.

    anchors (C, D) normalised, pair_counts (C, C) non-negative as from ``count_pairs`` -> (C, C) in [0, 1], symmetric,
    zero diagonal. The value is 1 - (1 - s)(1 - f), where s is the anchors' cosine, scaled to [0, 1] over all pairs of
    classes, and f is the pair's count in either order, divided by the largest such count. With a single pair, or equal
    cosines of all pairs, s is 1. [R]
    """
    count = anchors.shape[0]
    diagonal = torch.eye(count, dtype=torch.bool, device=anchors.device)
    cosine = anchors @ anchors.T
    low, high = cosine.masked_fill(diagonal, torch.inf).min(), cosine.masked_fill(diagonal, -torch.inf).max()
    spread = high - low
    # Cosines that differ only by rounding count as equal: scaled to [0, 1], the differences would be noise.
    rounding = 16 * torch.finfo(cosine.dtype).eps
    similar = torch.where(spread > rounding, (cosine - low) / spread.clamp_min(rounding), 1.0)
    pair_totals = pair_counts + pair_counts.T
    frequent = pair_totals / pair_totals.amax().clamp_min(1)
    return (1 - (1 - similar.clamp(0, 1)) * (1 - frequent)) * ~diagonal


def confusion_weight(probabilities: Tensor, confusable: Tensor) -> Tensor:
    """Compute 1 - kappa * q_(2) / q_(1), where kappa is the confusability of the two best classes.

    probabilities (B, C), confusable (C, C) in [0, 1] -> (B,) in [0, 1]. Two nearly equal probabilities lower the weight
    more if the two classes are easily confused. [R]
    """
    top = probabilities.topk(2, dim=1)
    first, second = top.indices.unbind(1)
    return 1 - confusable[first, second] * top.values[:, 1] / top.values[:, 0]


def balanced(probabilities: Tensor, mean: Tensor, class_prior: Tensor, strength: float) -> Tensor:
    """Compute q_c (pi_c / pbar_c)^beta, scaled to sum to 1: lowers classes that are predicted more often than expected.

    probabilities q (B, C), mean (C,) pbar, the mean prediction, class_prior (C,) pi, strength beta in [0, 1] -> (B, C),
    rows sum to 1. At beta 1 this is distribution alignment (ReMixMatch, arXiv 1911.09785), which DPA uses with an even
    prior; at beta 0 nothing changes. Its use here is [R].
    """
    if not strength:
        return probabilities
    tiny = torch.finfo(mean.dtype).tiny
    weighted = probabilities * (class_prior.clamp_min(tiny) / mean.clamp_min(tiny)) ** strength
    return weighted / weighted.sum(1, keepdim=True).clamp_min(tiny)


def over_counted(pseudo: PseudoLabels) -> PseudoLabels:
    """Scale the weights so that the loss, a mean over the batch, is one over the images whose labels weigh anything.

    UPL, ReCLIP and MUST leave images out of their losses altogether. A batch without a label that counts stays at 0.
    """
    counted = (pseudo.weights > 0).sum().clamp_min(1)
    return replace(pseudo, weights=pseudo.weights * (len(pseudo.weights) / counted))


def count_pairs(probabilities: Tensor) -> Tensor:
    """Count the images of a batch whose most probable class is i and whose second is j: (B, C) -> (C, C)."""
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
    """Compute the weight that ``kind`` names, or the product of those it names: (B,) in [0, 1]. ``none`` gives 1.

    probabilities (B, C) are those that gave the labels (B,), global_probabilities (B, C) those of the whole image.
    ``confusable`` (C, C) is used only if ``kind`` names ``confusion``. Raises ValueError if it is then missing.
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
