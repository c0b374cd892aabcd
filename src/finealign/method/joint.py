"""Whole image and crops looked at together: their joint features, and how much of them a labelling explains."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def joint_features(weak: Tensor, mean_crops: Tensor | None) -> Tensor:
    """Join whole image and crops: unit(unit(weak) + unit(mean crop)), or unit(weak) where there are no crops.

    weak (B, D), mean_crops (B, D) or None -> (B, D) of the type of weak, rows of length 1.
    """
    whole = normalize(weak, dim=1)
    return whole if mean_crops is None else normalize(whole + normalize(mean_crops.to(whole), dim=1), dim=1)


def explained_variance(features: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """The share of the features' variance that lies between classes, in [0, 1]; 0 for one class.

    features (n, D), labels (n,) int64 the class of each image, from 0, weights (n,) at least 0, how far each image
    counts, by default 1.
    """
    features = features.double()
    weights = torch.ones_like(features[:, 0]) if weights is None else weights.to(features)
    centred = features - (weights[:, None] * features).sum(0) / weights.sum().clamp_min(1e-12)
    total = float((weights[:, None] * centred**2).sum())
    if total <= 0:
        return 0.0
    classes = int(labels.max()) + 1
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, weights[:, None] * centred)
    counts = features.new_zeros(classes).index_add_(0, labels, weights)
    return float(((sums**2).sum(1) / counts.clamp_min(1e-12)).sum()) / total
