"""What is found out about the images before the first step: strangers, the classes' shares, and trust in crops.

All look at the features of all images as the start encodes them, and at the start's classifier. No label is read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from finealign.config import Config
from finealign.method.base import SelfTrainingMethod
from finealign.method.class_prior import estimate_shares, even_or
from finealign.method.copies import Floats, Ints, copies
from finealign.method.crop_trust import chosen_share, explained_by_share
from finealign.method.few_labels import begun_anchors, belonging_as_known
from finealign.method.strangers import fit, p_none
from finealign.training.features import ImageSource
from finealign.training.state import State

CHUNK = 1024  # images whose crops are in memory together
LEAST_BELONGING = 0.01  # so that a batch of strangers alone still has a mean prediction


@dataclass(frozen=True, eq=False)
class Stock:
    """What the start tells of n images, before the first step."""

    weak: Floats  # (n, D) features of the whole images
    probabilities: Floats  # (n, C) by the start's classifier on the whole images
    shares: Floats  # (C,) estimated share of the images that each class has
    class_text: Floats  # (C, D) the start's classifier
    groups: Ints  # (n,) near copies of one image share a number
    explained: dict[float, float]  # ``explained_by_share``; empty without crops


@torch.no_grad()
def take_stock(
    state: State,
    source: ImageSource,
    config: Config,
    *,
    images: Tensor | None = None,
    on_stock: Callable[[Stock], dict[str, Any]] | None = None,
) -> None:
    """Set how far images belong to the classes, the share that each class is expected to have, and the trust in crops.

    ``images`` (n,) are the positions of those to look at, which stand for all; None for all.

    ``training.strangers`` off lets all images belong. Of a ``SelfTrainingMethod``, the estimated shares become the
    class prior where ``method.class_prior`` is auto, and the share of the whole image in the score is decided where
    ``method.whole_share`` is auto. Near copies of one image count once for both, and strangers as little as they
    belong. ``on_stock``, if given, is called with what was seen, and returns JSON values that checkpoints are to keep.
    Nothing is done for a method without class vectors.
    """
    method = state.method
    if not method.has_classifier:
        return
    learner = method if isinstance(method, SelfTrainingMethod) else None
    estimates = learner is not None and learner.options.class_prior == "auto"
    trusts = learner is not None and learner.options.whole_share == "auto" and method.uses_crops
    needed = estimates or trusts or state.known is not None
    if not needed and config.training.strangers == "off" and on_stock is None:
        return
    images = torch.arange(len(state.labels)) if images is None else images
    weak, mean_crops = _features(source, images, 0)
    anchors = normalize(method.classifier().mean(1), dim=1).to(weak.device)
    if config.training.strangers == "auto":
        doubts = p_none(fit(weak, mean_crops, anchors), weak, mean_crops)
        state.belonging[images] = (1 - doubts).clamp_min(LEAST_BELONGING).cpu()
    known = None if state.known is None else state.known[images]
    if known is not None:
        state.belonging[images] = belonging_as_known(state.belonging[images], known, LEAST_BELONGING)
    groups = copies(weak.float().cpu().numpy())
    counts = state.belonging[images] / torch.from_numpy(np.bincount(groups)[groups])
    estimate = estimate_shares(weak, mean_crops, anchors, logit_scale=method.logit_scale, weights=counts, known=known)
    if learner and estimates:
        learner.expect(even_or(estimate, float(counts.sum())).to(learner.class_prior), estimated=True)
    explained = {} if mean_crops is None else explained_by_share(weak, mean_crops, anchors, weights=counts)
    if learner and trusts and explained:
        learner.trust_whole(chosen_share(explained, float(counts.sum())))
    if learner and known is not None:
        begin_at_labels(learner, weak, mean_crops, known)
    state.ranks.follow([state.belonging, *state.tensors().values()])  # rounding may have made the ranks differ
    if on_stock is not None:
        probabilities = method.probabilities(weak @ anchors.T)
        weak, probabilities, anchors = weak.float().cpu(), probabilities.float().cpu(), anchors.float().cpu()
        found = Stock(
            weak.numpy(), probabilities.numpy(), estimate.shares.cpu().numpy(), anchors.numpy(), groups, explained
        )
        state.outset = on_stock(found)


def begin_at_labels(method: SelfTrainingMethod, weak: Tensor, mean_crops: Tensor | None, known: Tensor) -> None:
    """Begin the anchors of classes with labelled images near these, as they are seen by what the method labels by."""
    share = float(method.share_of_whole())
    features = weak if mean_crops is None else torch.lerp(mean_crops, weak, share)
    begun = begun_anchors(
        method.classifier(), features, known.to(features.device), text_images=method.options.text_images
    )
    method.begin_at(begun)


@torch.no_grad()
def tell_strangers(state: State, source: ImageSource, config: Config, images: Tensor) -> None:
    """Set how far these further images belong to the classes: (n,) positions, of which features are kept.

    Does what ``take_stock`` did for the first ones, by the encoder and the classifier as they are now.
    """
    method = state.method
    if method.has_classifier and config.training.strangers == "auto":
        weak, mean_crops = _features(source, images, state.epoch)
        anchors = normalize(method.classifier().mean(1), dim=1).to(weak.device)
        doubts = p_none(fit(weak, mean_crops, anchors), weak, mean_crops)
        state.belonging[images] = (1 - doubts).clamp_min(LEAST_BELONGING).cpu()
    if state.known is not None:
        state.belonging[images] = belonging_as_known(state.belonging[images], state.known[images], LEAST_BELONGING)
    state.ranks.follow([state.belonging])


def _features(source: ImageSource, images: Tensor, epoch: int) -> tuple[Tensor, Tensor | None]:
    """The weak features of these images (n, D), and the mean of each one's crops (n, D); None without crops."""
    parts = [source.label_features(chunk, epoch) for chunk in torch.split(images, CHUNK)]
    weak = torch.cat([part.weak for part in parts])
    if not parts[0].crops.shape[1]:
        return weak, None
    return weak, torch.cat([part.crops.mean(1) for part in parts])
