"""Decide without labels how far crops are to be trusted against the whole image: pure tensor functions. Ours.

Crops show what a whole image hides, but not always: an image smaller than the tower's input has no more to show, and
some backbones embed crops badly. Both kinds of score label all images. Labels that follow what the images have in
common explain more of the variance of their features, and the features looked at are those of whole image and crops
together, so that neither has an advantage. Both labellings come from the same fixed texts; of labels that were learned
from the images this evidence would say nothing, because learning makes any clusters explain more.
"""

import torch
from torch import Tensor

from finealign.method.joint import explained_variance, joint_features

EQUAL = 0.5  # the share of the whole image in the score ``fused`` where nothing is known
CROPS_ALONE, WHOLE_ALONE = 0.0, 1.0
SHARES = (CROPS_ALONE, EQUAL, 0.75, WHOLE_ALONE)  # that are compared; of equally good ones the first is taken
FEWEST_IMAGES = 8  # fewer say nothing
MOST_IMAGES = 20_000  # that are looked at; more change nothing


@torch.no_grad()
def explained_by_share(
    weak: Tensor, mean_crops: Tensor, anchors: Tensor, *, weights: Tensor | None = None
) -> dict[float, float]:
    """How much of the joint features' variance the labels explain, in [0, 1], by the whole image's share in the score.

    weak (n, D) are the features of whole images, mean_crops (n, D) the mean features of each image's crops, whose
    cosine with an anchor is LAS with even weights, anchors (C, D) the start's classifier, rows of length 1, and weights
    (n,) in [0, 1] how far each image counts, by default 1. Of more than ``MOST_IMAGES`` images, evenly spaced ones are
    looked at. Nothing is drawn.
    """
    step = -(-len(weak) // MOST_IMAGES) or 1
    weak, mean_crops, anchors = weak[::step].double(), mean_crops[::step].double(), anchors.double()
    counts = None if weights is None else weights[::step]
    joint, by_whole, by_crops = joint_features(weak, mean_crops), weak @ anchors.T, mean_crops @ anchors.T
    return {
        share: explained_variance(joint, torch.lerp(by_crops, by_whole, share).argmax(1), counts) for share in SHARES
    }


def chosen_share(explained: dict[float, float], images: float) -> float:
    """The share of the whole image: 0, crops alone as in the paper, where their labels explain more than its own.

    Else the share whose labels explain most. ``EQUAL`` for fewer than ``FEWEST_IMAGES`` images, or where labels by
    crops and by whole images explain as much, as they do where each crop is the whole image.
    """
    by_crops, by_whole = explained[CROPS_ALONE], explained[WHOLE_ALONE]
    if images < FEWEST_IMAGES or by_crops == by_whole:
        return EQUAL
    return CROPS_ALONE if by_crops > by_whole else max(SHARES, key=explained.__getitem__)
