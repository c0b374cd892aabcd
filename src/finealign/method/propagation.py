"""Label propagation from texts to images, as in ReCLIP: pure tensor functions.

C classes, D embedding width, N nodes: the class texts first, then the images. Nothing here needs memory of N x N.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from finealign.method.mixture import mutual_votes, neighbours

MANY_CLASSES, MOST_DIRECTIONS = 500, 250  # with more classes than the first, only so many directions are kept
CLOSE_ENOUGH = 1e-6  # length of what is left of the equation, where its right side has length 1


def without_common_direction(texts: Tensor, features: Tensor) -> Tensor:
    """Keep of features what tells classes apart: texts (C, D), features (N, D) -> (N, K), rows of length 1.

    With e_1, e_2, ... the directions of the texts (the right singular vectors of their matrix), e_1 is what all of them
    have in common, and a feature is projected on the others. A single class has no others, so it keeps e_1.
    """
    directions = torch.linalg.svd(texts, full_matrices=False).Vh
    if len(texts) > MANY_CLASSES:
        directions = directions[:MOST_DIRECTIONS]
    return normalize(features @ directions[1 if len(directions) > 1 else 0 :].T, dim=1)


def propagated(nodes: Tensor, labels: Tensor, *, count: int, alpha: float, most_steps: int) -> Tensor:
    """Solve (I - alpha W) Z = Y, by which each node has its label and passes on what reaches it: (N, C).

    nodes (N, D), rows of length 1, and labels Y (N, C) -> Z. The edge of a node to each of the ``count`` nodes nearest
    to it weighs (cosine + 1) / 2, the graph is the mean of these edges and of their reverse, and W is its adjacency
    divided by the roots of the degrees of both ends. Conjugate gradients take at most ``most_steps`` steps, each column
    by itself.
    """
    indices, cosines = neighbours(nodes, count)
    edges = ((cosines + 1) / 2).clamp_min(0)
    degrees = edges.sum(1).index_add_(0, indices.flatten(), edges.flatten()) / 2
    scale = torch.where(degrees > 0, degrees.rsqrt(), 0)[:, None]  # a node without an edge passes nothing on

    solution, left = torch.zeros_like(labels), labels.clone()
    direction, length = left, left.square().sum(0)
    for _ in range(most_steps):
        going = length > CLOSE_ENOUGH**2
        if not bool(going.any()):
            break
        image = direction - alpha * scale * mutual_votes(scale * direction, indices, edges) / 2
        step = torch.where(going, length / torch.where(going, (direction * image).sum(0), 1), 0)
        solution, left = solution + step * direction, left - step * image
        before, length = length, left.square().sum(0)
        direction = left + torch.where(going, length / torch.where(going, before, 1), 0) * direction
    return solution
