"""Class description anchors, crop relevance and alignment scores: pure tensor functions.

The letters for shapes are those of ``finealign.types``. Unless its docstring says otherwise, a function takes
L2-normalised features, keeps the dtype and device of its input, and is differentiable in its first floating-point
argument. [R] marks our reconstruction of FAIR (arXiv 2507.09615), whose equations are not public. Step numbers are
those of docs/method.md.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def class_means(features: Tensor, class_of: Tensor, num_classes: int) -> Tensor:
    """Compute the normalised mean of the features of each class.

    features (M, D), class_of (M,) int64 in [0, C) -> (C, D), rows of length 1; the row of a class without features is
    zero. Step 1 of the method [R]: the initial Class Description Anchors, and CuPL's classifier (arXiv 2209.03320).
    """
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, class_of, features)
    return normalize(sums, dim=-1)


def class_description_anchors(
    descriptions: Tensor, class_of: Tensor, *, num_classes: int, per_class: int = 1, iterations: int = 20
) -> Tensor:
    """Compute the initial anchors: for each class, the spherical k-means centres of its descriptions.

    descriptions (M, D), class_of (M,) int64 -> (C, J, D), rows of length 1, where C is ``num_classes`` and J is
    ``per_class``. With J = 1 the result is that of ``class_means``. For larger J, k-means makes at most ``iterations``
    updates. Its first centre is initialised at the description nearest the mean, and each further centre at the
    description farthest from those already chosen, so no random numbers are drawn. A class with fewer than J
    descriptions repeats its last centre. Step 1 of the method [R].
    """
    if per_class == 1:
        return class_means(descriptions, class_of, num_classes)[:, None]
    return torch.stack(
        [_spherical_means(descriptions[class_of == c], per_class, iterations) for c in range(num_classes)]
    )


def _spherical_means(points: Tensor, count: int, iterations: int) -> Tensor:
    distinct = min(count, points.shape[0])
    chosen = [int((points @ normalize(points.mean(0), dim=0)).argmax())]
    while len(chosen) < distinct:
        nearest = (points @ points[chosen].T).max(1).values
        nearest[chosen] = torch.inf  # so that no description is chosen twice
        chosen.append(int(nearest.argmin()))
    centres = points[chosen]
    for _ in range(iterations):
        owner = (points @ centres.T).argmax(1)
        means = class_means(points, owner, distinct)
        empty = means.norm(dim=1) == 0  # a centre that no description is nearest to stays where it is
        updated = torch.where(empty[:, None], centres, means)
        if torch.equal(updated, centres):
            break
        centres = updated
    return torch.cat([centres, centres[-1:].expand(count - distinct, -1)])


def crop_relevance(weak: Tensor, crops: Tensor) -> Tensor:
    """Compute the cosine of each crop with its whole image: r_i = <p_i, g>.

    weak (B, D), crops (B, N, D) -> (B, N) in [-1, 1]. Step 3 of the method.
    """
    return torch.einsum("bd,bnd->bn", weak, crops)


def crop_weights(relevance: Tensor, *, keep: int | None, temperature: float) -> Tensor:
    """Weight crops by a softmax of the relevance over the K most relevant crops; all other crops get weight 0.

    relevance (B, N) -> (B, N) in [0, 1], rows sum to 1. ``keep`` is K; None, or a number of at least N, keeps all
    crops. ``temperature`` is tau. Among equally relevant crops the first ones are kept, and kept crops of equal
    relevance get equal weights. Raises ValueError if keep < 1 or temperature <= 0. Step 3 of the method [R: K and tau].
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, found {temperature}")
    if keep is not None and keep < 1:
        raise ValueError(f"at least one crop must be kept, found {keep}")
    if keep is not None and keep < relevance.shape[1]:
        order = relevance.argsort(dim=1, descending=True, stable=True)
        dropped = torch.ones_like(relevance, dtype=torch.bool).scatter_(1, order[:, :keep], False)
        relevance = relevance.masked_fill(dropped, -torch.inf)
    return torch.softmax(relevance / temperature, dim=1)


def global_score(weak: Tensor, anchors: Tensor) -> Tensor:
    """Compute the cosine of the whole image with each class, which is the largest over the class's J anchors.

    weak (B, D), anchors (C, J, D) normalised -> (B, C) in [-1, 1]. Step 9 of the method.
    """
    return torch.einsum("bd,cjd->bcj", weak, anchors).amax(-1)


def learned_alignment_score(crops: Tensor, weights: Tensor, anchors: Tensor) -> Tensor:
    """Compute LAS(x, c) = sum_i w_i <p_i, a_c>, the weighted sum of the crops' cosines with the class's anchor.

    crops (B, N, D), weights (B, N), anchors (C, J, D) normalised -> (B, C) in [-1, 1]. With J anchors per class, the
    largest of the class's J sums is its score [R]. Step 4 of the method.
    """
    localised = torch.einsum("bn,bnd->bd", weights, crops)
    return global_score(localised, anchors)


def weighted_alignment_score(
    crops: Tensor, crop_weight: Tensor, descriptions: Tensor, description_weight: Tensor, class_of: Tensor
) -> Tensor:
    """Compute WCA's score, which has no learned part: sum_ij w_i v_cj <p_i, t_cj>.

    crops (B, N, D), crop_weight (B, N), descriptions (M, D), description_weight (M,) that sums to 1 within each class,
    class_of (M,) int64 -> (B, C). Li et al., ICML 2024 (arXiv 2406.02915).
    """
    num_classes = int(class_of.max()) + 1
    per_class = descriptions.new_zeros(num_classes, descriptions.shape[1])
    per_class.index_add_(0, class_of, descriptions * description_weight[:, None])
    return torch.einsum("bn,bnd,cd->bc", crop_weight, crops, per_class)


def description_weights(descriptions: Tensor, names: Tensor, class_of: Tensor, *, temperature: float) -> Tensor:
    """Compute WCA's description weights: within each class, a softmax of the cosines with the class name.

    descriptions (M, D), names (C, D), class_of (M,) int64 -> (M,) in [0, 1], summing to 1 within each class. The
    cosines are divided by ``temperature``. Li et al., ICML 2024 (arXiv 2406.02915).
    """
    closeness = (descriptions * names[class_of]).sum(-1) / temperature
    highest = closeness.new_full((names.shape[0],), -torch.inf).scatter_reduce_(0, class_of, closeness, "amax")
    exponent = (closeness - highest[class_of]).exp()  # without the maximum, exp could overflow
    totals = exponent.new_zeros(names.shape[0]).index_add_(0, class_of, exponent)
    return exponent / totals[class_of]


def normalised_cut(tokens: Tensor, *, faint: float = 1e-5) -> Tensor:
    """Find the patches that a normalised cut assigns to the object.

    tokens (B, L, D), rows normalised -> (B, L), 1 for patches of the object and 0 for the others, without gradient.
    The edge between two patches weighs 1 if their cosine is above the image's mean cosine, else ``faint``. The second
    eigenvector of the normalised Laplacian is split at its mean, and the side that holds the entry of largest absolute
    value is the object. The cut is TokenCut's (arXiv 2202.11539), which microCLIP builds on; the threshold is [R]. An
    image of a single patch cannot be split, so that patch is the object.
    """
    if tokens.shape[1] == 1:
        return torch.ones_like(tokens[:, :, 0])
    with torch.no_grad():
        cosine = tokens.detach().float() @ tokens.detach().float().transpose(1, 2)
        edges = torch.where(cosine > cosine.mean((1, 2), keepdim=True), 1.0, faint)
        scale = edges.sum(-1).rsqrt()  # the degrees to the power -1/2
        laplacian = torch.eye(edges.shape[1], device=edges.device) - scale[:, :, None] * edges * scale[:, None, :]
        eigenvector = torch.linalg.eigh(laplacian).eigenvectors[:, :, 1] * scale
        above = eigenvector > eigenvector.mean(1, keepdim=True)
        extreme = eigenvector.abs().argmax(1, keepdim=True)
        salient: Tensor = (above == above.gather(1, extreme)).to(tokens.dtype)
    return salient


def saliency_pooled(tokens: Tensor, *, scale: float) -> Tensor:
    """Pool the patches of each image into one embedding that emphasises the salient ones.

    tokens (B, L, D), rows of any length -> (B, D), rows of length 1. The query is the mean of the patches that
    ``normalised_cut`` assigns to the object. The result is the normalised mean of all patches, weighted by a softmax of
    ``scale`` times their cosines with the query. This is microCLIP's pooling (arXiv 2510.02270), written from a summary
    of it; the scale of the softmax is [R].
    """
    rows = normalize(tokens, dim=-1)
    query = normalize((normalised_cut(rows)[..., None] * rows).sum(1), dim=-1)
    attention = torch.softmax(scale * torch.einsum("bd,bld->bl", query, rows), dim=1)
    return normalize(torch.einsum("bl,bld->bd", attention, rows), dim=-1)
