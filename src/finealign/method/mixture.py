"""A mixture of Gaussians, a class each, in which near images vote for one another: pure tensor functions.

n images fitted on, B images to score, C classes, D embedding width, k neighbours. Features have length 1. Nothing here
needs memory of n x n or n x C x D. ``finealign.method.transductive`` has the methods' common part.
"""

import torch
from torch import Tensor

CHUNK = 1024  # images whose cosines with all others are held at once
# A cosine this near 1 is that of an image with itself: rounding in bf16 changes it by less, and two different images
# differ by more.
SAME = 1e-4
ROUNDING = 1e-5  # of a cosine that is computed in another batch
LEAST_VARIANCE = 1e-8


def neighbours(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the k nearest other images of each image, where k is ``count`` or, of fewer images, n - 1.

    images (n, D) -> their numbers (n, k) int64, nearest first, and the cosines with them (n, k).
    """
    count = min(count, len(images) - 1)
    indices, cosines = [], []
    for start in range(0, len(images), CHUNK):
        cosine = images[start : start + CHUNK] @ images.T
        cosine.diagonal(start).fill_(-torch.inf)  # no image is its own neighbour
        top = cosine.topk(count, dim=1)
        indices.append(top.indices)
        cosines.append(top.values)
    return torch.cat(indices), torch.cat(cosines)


def mutual_votes(assigned: Tensor, indices: Tensor, cosines: Tensor) -> Tensor:
    """Sum what neighbours say of each image: those it has, and those that have it.

    assigned (n, C), and indices and cosines (n, k) from ``neighbours`` -> (n, C). A vote is the voter's row of
    ``assigned`` times the cosine, or 0 if that is negative.
    """
    votes, weights = torch.zeros_like(assigned), cosines.clamp_min(0)
    for of_rank, weight in zip(indices.T, weights.T, strict=True):
        votes += weight[:, None] * assigned[of_rank]
        votes.index_add_(0, of_rank, weight[:, None] * assigned)
    return votes


def reach(cosines: Tensor) -> Tensor:
    """The cosine of each image with the last of its neighbours, which a newcomer must have to be one: (n, k) -> (n,).

    It is infinite where k is 0.
    """
    return cosines[:, -1] if cosines.shape[1] else cosines.new_full((len(cosines),), torch.inf)


def votes_for_newcomers(images: Tensor, fitted: Tensor, assigned: Tensor, reaches: Tensor, count: int) -> Tensor:
    """Sum the votes that each image would have if it alone joined the images fitted on.

    images (B, D), fitted (n, D), assigned (n, C), reaches (n,) from ``reach`` -> (B, C). An image that is one of those
    fitted on has no vote from itself, so it gets the votes of ``mutual_votes``, unless cosines are tied.
    """
    count = min(count, len(fitted) - 1)
    votes = []
    for part in torch.split(images, CHUNK):
        cosine = part @ fitted.T
        nearest = cosine.max(1, keepdim=True)
        without = torch.where(nearest.values > 1 - SAME, -torch.inf, nearest.values)
        cosine.scatter_(1, nearest.indices, without)
        top = cosine.topk(count, dim=1)
        weights = torch.where(cosine >= reaches - ROUNDING, cosine, 0).clamp_min(0)
        weights.scatter_add_(1, top.indices, top.values.clamp_min(0))
        votes.append(weights @ assigned)
    return torch.cat(votes) if votes else images.new_zeros(0, assigned.shape[1])


def log_likelihood(images: Tensor, means: Tensor, variance: Tensor) -> Tensor:
    """Compute log N(f_i; mu_c, diag(v_c)) of each class, up to a constant.

    images (B, D), means (C, D), variance (C, D) or, one for all classes, (D,) -> (B, C).
    """
    # Squares are expanded, so that no (B, C, D) tensor is needed; around a point amid the means, they lose less.
    centre = means.mean(0)
    images, means = images - centre, means - centre
    precision = (1 / variance).expand_as(means)
    squares = images.square() @ precision.T - 2 * images @ (means * precision).T + (means.square() * precision).sum(1)
    return -(squares.clamp_min(0) + variance.log().expand_as(means).sum(1)) / 2


def weighted_means(assigned: Tensor, images: Tensor) -> Tensor:
    """Compute the mean of each class, sum_i z_ic f_i / sum_i z_ic: assigned (n, C), images (n, D) -> (C, D).

    The row of a class that nothing is assigned to is near zero.
    """
    return assigned.T @ images / assigned.sum(0).clamp_min(1e-12)[:, None]


def squared_deviations(assigned: Tensor, images: Tensor, means: Tensor) -> Tensor:
    """Compute sum_i z_ic (f_i - mu_c)^2: assigned (n, C), images (n, D), means (C, D) -> (C, D), at least 0."""
    total = assigned.sum(0)[:, None]
    sums = assigned.T @ images.square() - 2 * (assigned.T @ images) * means + total * means.square()
    return sums.clamp_min(0)
