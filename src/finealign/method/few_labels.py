"""What a few known labels change in self-training: pure tensor functions. All of it is ours.

n images, B images of a batch, C classes, J anchors a class, D embedding width. Of each image ``known`` has the class
that it was given, or ``UNKNOWN``, or ``STRANGER`` if it was said to show none of the classes.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from finealign.types import PseudoLabels

UNKNOWN, STRANGER = -1, -2
_TINY = 1e-9


def known_first(labels: Tensor, known: Tensor) -> Tensor:
    """Return the known class of each image, and of the others the label: (n,) and (n,) -> (n,) int64."""
    known = known.to(labels)
    return torch.where(known >= 0, known, labels)


def assigned_as_known(assigned: Tensor, known: Tensor | None) -> Tensor:
    """Assign images of known classes to these alone: assigned (n, C), known (n,) or None -> (n, C)."""
    if known is None:
        return assigned
    known = known.to(assigned.device)
    told = one_hot(known.clamp_min(0), assigned.shape[1]).to(assigned)
    return torch.where((known >= 0)[:, None], told, assigned)


def log_of_known(log_probabilities: Tensor, known: Tensor | None) -> Tensor:
    """The logarithm of ``assigned_as_known``, of logarithms: (n, C), known (n,) or None -> (n, C)."""
    if known is None:
        return log_probabilities
    certain = (known >= 0).to(log_probabilities.device)[:, None]
    return torch.where(certain, assigned_as_known(log_probabilities.exp(), known).log(), log_probabilities)


def with_known(pseudo: PseudoLabels, known: Tensor, weight: float) -> PseudoLabels:
    """Put the known classes of a batch in place of its pseudo-labels, each with this weight. known (B,)."""
    certain = known >= 0
    return replace(
        pseudo,
        labels=known_first(pseudo.labels, known),
        weights=torch.where(certain, weight, pseudo.weights),
        probabilities=assigned_as_known(pseudo.probabilities, known),
    )


def belonging_as_known(belonging: Tensor, known: Tensor, least: float) -> Tensor:
    """Images of known classes belong wholly, known strangers as little as ``least``: (n,) and (n,) -> (n,)."""
    return belonging.masked_fill(known >= 0, 1.0).masked_fill(known == STRANGER, least)


def class_sums(features: Tensor, known: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sum the features of each class's labelled images: (n, D) and (n,) -> (C, D), and how many they are, (C,)."""
    places = (known >= 0).nonzero().squeeze(1)
    counts = torch.bincount(known[places], minlength=classes).to(features)
    sums = features.new_zeros(classes, features.shape[1]).index_add_(0, known[places], features[places])
    return sums, counts


def begun_anchors(anchors: Tensor, features: Tensor, known: Tensor, *, text_images: float) -> Tensor:
    """Begin the anchors of classes with labelled images between their texts and the means of these images.

    anchors (C, J, D), features (n, D) of all images, known (n,) -> (C, J, D), rows of length 1. Images lie in one cone
    and texts in another, so what is mixed is how a class differs: its text from the mean text, its labelled images from
    the mean image, brought to the same length. The images' share is n / (n + ``text_images``) for n of them. Then the
    difference is shortened so that the cosines of all images with the class spread no more than with its text: images
    spread further along their own differences, which would make the first labels surer than they are right. A class
    without labelled images keeps its anchors.
    """
    centred = features - features.mean(0)
    sums, counts = class_sums(centred, known, len(anchors))
    there = counts > 0
    if not bool(there.any()):
        return anchors
    means = sums / counts.clamp_min(1)[:, None]
    texts = anchors.mean(1)
    offsets = texts - texts.mean(0)
    lengths = offsets[there].norm(dim=1).mean() / means[there].norm(dim=1).mean().clamp_min(_TINY)
    share = (counts / (counts + text_images))[:, None]
    mixed = (1 - share) * offsets + share * lengths * means
    spread, usual = (_spread(centred, directions) for directions in (mixed, offsets))
    moved = mixed * (usual / spread.clamp_min(_TINY)).clamp_max(1)[:, None] - offsets
    return torch.where(there[:, None, None], normalize(anchors + moved[:, None], dim=-1), anchors)


def _spread(centred: Tensor, directions: Tensor) -> Tensor:
    """The root mean square of the images' products with each direction: (n, D), (C, D) -> (C,)."""
    return (centred @ directions.T).square().mean(0).sqrt()
