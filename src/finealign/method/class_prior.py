"""Estimate without labels what share of the images each class has: pure tensor functions. All of it is ours.

Two mixtures of Gaussians, one Gaussian for each class, are fitted to the features of all images. The start's
probabilities say which Gaussian is which class: they begin the assignment of images to classes and are multiplied into
it. The first mixture gives nearly every class some images, whether it is there or not; the second, which begins where
the first ended, is sparse and leaves out too many. The estimate is the mean of their shares.

n images, C classes, D embedding width, Q principal directions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from finealign.method.few_labels import log_of_known
from finealign.method.joint import joint_features
from finealign.method.mixture import LEAST_VARIANCE, log_likelihood, squared_deviations

MOST_IMAGES = 20_000  # that are looked at; more tell nothing new of shares
FEWEST_IMAGES = 8  # fewer have no clusters to speak of
ROUNDS = 40
SMOOTHING = 0.02  # part of the first mixture's shares that is spread evenly, so that no class is lost on the way
PLAIN_DIRECTIONS, SPARSE_DIRECTIONS = 32, 24  # Q
PLAIN_IMAGES, SPARSE_IMAGES = 2.0, 10.0  # images that the prior of a class's mean counts as
SPARSITY = 0.1  # of the Dirichlet prior: images that each class has before any is seen
LAPLACE = 0.5  # images added to each class at the end: a share of zero would be a claim that no folder supports
# With few classes a text that lies nearer to all images than another decides whole folders, and a list of few classes
# seldom has one that no image shows. So this part of each class's mean cosine is taken for its text's own nearness, and
# not for images of it, with up to FEW classes; none of it with MORE classes and above.
OWN_NEARNESS = 0.25
FEW, MORE = 7, 10
# An estimate is believed only if it differs from even shares, in total variation, by more than it does on even folders.
# There it differs because the start errs, which shows where the mixture names images otherwise than their texts do: by
# 0.03 to 0.19 for ten to 21 classes that it names alike, 0.25 for 24 of which it names two fifths alike, 0.38 for a
# hundred with six images each. So the bound grows with what is named otherwise, with classes, up to ``MANY`` of them,
# and with fewer images.
EVEN_ENOUGH, NAMED_OTHERWISE, MANY_CLASSES, FEWER_IMAGES = 0.09, 0.25, 0.17, 0.15
MANY = 100
# With few classes estimates err less, and only where images are named otherwise: the first two are these there.
FEW_ENOUGH, FEW_NAMED_OTHERWISE = 0.0, 0.75
# And only if it rests on clusters of many images, FEW_A_CLASS for each class that it sees, or claims much: one class
# with DOMINANT of the images, half of the classes not seen, or by UNSEEN more of them not seen than images are named
# otherwise, of FEW_IN_ALL for each class of the list. With few images a class, clusters of siblings merge, and smaller
# claims follow the mergers.
FEW_A_CLASS, DOMINANT, UNSEEN, FEW_IN_ALL = 6.0, 1 / 3, 0.1, 2.0


def even_shares(num_classes: int) -> Tensor:
    """Return 1/C for each class: (C,)."""
    return torch.full((num_classes,), 1 / num_classes)


@dataclass(frozen=True)
class ShareEstimate:
    """An estimate of the share of the images that each class has, and what tells how far to believe it."""

    shares: Tensor  # (C,), all above 0, sum 1
    named_alike: float  # share of images whose class by the plain mixture is that by the start's texts, in [0, 1]


@torch.no_grad()
def estimate_shares(
    weak: Tensor,
    mean_crops: Tensor | None,
    anchors: Tensor,
    *,
    logit_scale: float,
    weights: Tensor | None = None,
    known: Tensor | None = None,
) -> ShareEstimate:
    """Estimate the share of the images that each class has.

    The arguments are those of ``mixture_assignments``; of more than ``MOST_IMAGES`` images, evenly spaced ones are
    looked at. Nothing is drawn. Shares are even where that function assigns all images evenly.
    """
    if not len(weak):
        return ShareEstimate(even_shares(len(anchors)), 0.0)
    step = -(-len(weak) // MOST_IMAGES)
    crops = None if mean_crops is None else mean_crops[::step]
    counts, told = (None if each is None else each[::step] for each in (weights, known))
    first, second = mixture_assignments(
        weak[::step], crops, anchors, logit_scale=logit_scale, weights=counts, known=told
    )
    counts = torch.ones_like(first[:, 0]) if counts is None or float(counts.sum()) < 1 else counts.to(first)
    shares = (_smoothed(first, counts) + _laplace(second, counts)) / 2
    alike = first.argmax(1) == (normalize(weak[::step].to(first), dim=1) @ anchors.to(first).T).argmax(1)
    return ShareEstimate((shares / shares.sum()).float(), float((counts * alike).sum() / counts.sum()))


@torch.no_grad()
def mixture_assignments(
    weak: Tensor,
    mean_crops: Tensor | None,
    anchors: Tensor,
    *,
    logit_scale: float,
    weights: Tensor | None = None,
    known: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Assign images to classes by the first, plain mixture and by the second, sparse one: (n, C) each, rows sum to 1.

    weak (n, D) are the features of whole images, mean_crops (n, D) the mean features of each image's crops or None,
    anchors (C, D) the start's classifier, rows of length 1, weights (n,) in [0, 1] how far each image counts, by
    default 1, and known (n,) the labels that are known, as in ``few_labels``, or None. All images are assigned evenly
    if there are fewer than ``FEWEST_IMAGES`` of them, if they are all alike, or if their weights add up to less than
    one image.
    """
    whole = normalize(weak.double(), dim=1)
    counts = torch.ones_like(whole[:, 0]) if weights is None else weights.to(whole)
    classes, anchors = len(anchors), anchors.to(whole)
    by_whole = whole @ anchors.T
    joint = joint_features(whole, mean_crops)
    by_both = by_whole if mean_crops is None else (by_whole + mean_crops.to(whole) @ anchors.T) / 2
    evenly = torch.full_like(by_whole, 1 / classes)
    total = counts.sum()
    if len(whole) < FEWEST_IMAGES or float(total) < 1:
        return evenly, evenly
    mean = (counts[:, None] * joint).sum(0) / total
    axes = _principal_axes(joint - mean, counts)
    if not axes.shape[1]:
        return evenly, evenly
    points = (joint - mean) @ axes
    nearer = OWN_NEARNESS * fewness(classes) / total
    log_both, log_whole = (
        log_of_known(torch.log_softmax(logit_scale * (cosines - nearer * (counts @ cosines)), dim=1), known)
        for cosines in (by_both, by_whole)
    )
    first = _plain(points[:, :PLAIN_DIRECTIONS], log_both, counts)
    points, directions = points[:, :SPARSE_DIRECTIONS], axes[:, :SPARSE_DIRECTIONS]
    texts = (anchors - anchors.mean(0)) @ directions
    second = _sparse(points, log_whole, counts, texts, first)
    return first, second


def even_or(estimate: ShareEstimate, images: float) -> Tensor:
    """Return the shares of an estimate from ``images`` images, (C,), or even shares where it is not to be believed.

    They have to differ from even shares by more than ``farthest_of_even`` and to rest on enough images, or claim much.
    """
    shares, images = estimate.shares, max(images, 1.0)
    even = even_shares(len(shares)).to(shares)
    differs = total_variation(shares, even) > farthest_of_even(estimate, images)
    return shares if differs and _rests_on_enough(estimate, images) else even


def farthest_of_even(estimate: ShareEstimate, images: float) -> float:
    """Compute how far an estimate of an even folder of so many images may lie from even shares, in total variation.

    It is ``e + o (1 - a) + MANY_CLASSES min(C / MANY, 1) + FEWER_IMAGES sqrt(C / n)``, with a the estimate's
    ``named_alike``; e and o are ``EVEN_ENOUGH`` and ``NAMED_OTHERWISE``, with up to ``FEW`` classes ``FEW_ENOUGH`` and
    ``FEW_NAMED_OTHERWISE``, and between them and ``MORE`` the means of both, weighted by ``fewness``.
    """
    classes, few = len(estimate.shares), fewness(len(estimate.shares))
    enough = few * FEW_ENOUGH + (1 - few) * EVEN_ENOUGH
    otherwise = few * FEW_NAMED_OTHERWISE + (1 - few) * NAMED_OTHERWISE
    many, fewer = MANY_CLASSES * min(classes / MANY, 1.0), FEWER_IMAGES * math.sqrt(classes / images)
    return enough + otherwise * (1 - estimate.named_alike) + many + fewer


def _rests_on_enough(estimate: ShareEstimate, images: float) -> bool:
    """Whether each class that is seen has ``FEW_A_CLASS`` images, or the estimate claims much with fewer.

    The classes that it sees are as many as the exponential of its entropy. It claims much where they are at most half
    of all, or with ``FEW_IN_ALL`` images for each class of the list at most the part ``named_alike - UNSEEN`` of all;
    or where the largest share is ``DOMINANT``.
    """
    classes, seen = len(estimate.shares), float(torch.special.entr(estimate.shares).sum().exp())
    most_seen = estimate.named_alike - UNSEEN if images >= FEW_IN_ALL * classes else 0.0
    claims_much = float(estimate.shares.max()) >= DOMINANT or seen <= classes * max(0.5, most_seen)
    return claims_much or images / seen >= FEW_A_CLASS


def fewness(classes: int) -> float:
    """Compute how far a list counts as one of few classes: 1 up to ``FEW``, 0 from ``MORE`` on, linear in between."""
    return min(max((MORE - classes) / (MORE - FEW), 0.0), 1.0)


def total_variation(first: Tensor, second: Tensor) -> float:
    """Compute half the sum of absolute differences of two distributions, each (C,): in [0, 1]."""
    return float((first - second).abs().sum() / 2)


def _principal_axes(centred: Tensor, counts: Tensor) -> Tensor:
    """The principal directions of images (n, D) around their mean, weighted by counts (n,): (D, Q), by variance."""
    values, vectors = torch.linalg.eigh((counts[:, None] * centred).T @ centred / counts.sum())
    spread = values > 1e-9 * values[-1].clamp_min(1e-9)
    most = min(PLAIN_DIRECTIONS, len(centred) - 1, int(spread.sum()))
    largest: Tensor = vectors[:, vectors.shape[1] - most :].flip(1)
    return largest


def _smoothed(assigned: Tensor, counts: Tensor) -> Tensor:
    shares = (counts[:, None] * assigned).sum(0) / counts.sum()
    return (1 - SMOOTHING) * shares + SMOOTHING / len(shares)


def _laplace(assigned: Tensor, counts: Tensor) -> Tensor:
    images: Tensor = (counts[:, None] * assigned).sum(0) + LAPLACE
    return images / images.sum()


def _plain(points: Tensor, log_text: Tensor, counts: Tensor) -> Tensor:
    """Expectation maximisation with free shares; each class's mean is drawn to the folder's, which is 0.

    points (n, Q), log_text (n, C), counts (n,) -> the assignment (n, C), rows sum to 1.
    """
    assigned = log_text.exp()
    for _ in range(ROUNDS):
        weighed = counts[:, None] * assigned
        images = weighed.sum(0)
        means = weighed.T @ points / (images + PLAIN_IMAGES)[:, None]
        variance = _shared_variance(weighed, points, means)
        log_shares = _smoothed(assigned, counts).log()
        assigned = torch.softmax(log_text + log_shares + log_likelihood(points, means, variance), dim=1)
    return assigned


def _sparse(points: Tensor, log_text: Tensor, counts: Tensor, texts: Tensor, assigned: Tensor) -> Tensor:
    """Variational Bayes: the prior of a class's mean lies at its text, the prior of the shares is sparse.

    points (n, Q), log_text (n, C), counts (n,), texts (C, Q) the anchors around their mean, assigned (n, C) where it
    begins -> the assignment (n, C). How far images lie apart for a distance between texts is fitted along.
    """
    variance, width, classes = points.var(0).clamp_min(LEAST_VARIANCE), points.shape[1], len(texts)
    for _ in range(ROUNDS):
        weighed = counts[:, None] * assigned
        images = weighed.sum(0)
        sums = weighed.T @ points
        precision = texts / variance
        reach = ((sums * precision).sum() / (images[:, None] * texts * precision).sum().clamp_min(1e-9)).clamp(0, 20)
        means = (sums + SPARSE_IMAGES * reach * texts) / (images + SPARSE_IMAGES)[:, None]
        variance = _shared_variance(weighed, points, means)
        expected = torch.digamma(images + SPARSITY) - torch.digamma(counts.sum() + SPARSITY * classes)
        doubt = width / (2 * (images + SPARSE_IMAGES))  # a mean that few images fix costs likelihood
        assigned = torch.softmax(log_text + expected - doubt + log_likelihood(points, means, variance), dim=1)
    return assigned


def _shared_variance(weighed: Tensor, points: Tensor, means: Tensor) -> Tensor:
    variance: Tensor = (squared_deviations(weighed, points, means).sum(0) / weighed.sum()).clamp_min(LEAST_VARIANCE)
    return variance
