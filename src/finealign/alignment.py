"""Class description anchors, crop relevance and the alignment scores: pure tensor maths.

Letters as in ``types.py``. Every function takes L2-normalised features, keeps the input's dtype and device, and is
differentiable in its first floating input unless it says otherwise. [R] marks what is our reconstruction of FAIR
(arXiv 2507.09615), whose equations are not public.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def class_means(features: Tensor, class_of: Tensor, num_classes: int) -> Tensor:
    """Normalised mean of the features of each class.

    features (M, D), class_of (M,) int64 in [0, C) -> (C, D), rows of length 1; a class without features gets zeros.
    Step 1 of METHOD [R]: the starting Class Description Anchors, and CuPL's classifier (arXiv 2209.03320).
    """
    sums = features.new_zeros(num_classes, features.shape[1]).index_add_(0, class_of, features)
    return normalize(sums, dim=-1)


def class_description_anchors(
    descriptions: Tensor, class_of: Tensor, *, num_classes: int, per_class: int = 1, iterations: int = 20
) -> Tensor:
    """Where the learnable anchors start: per class, the spherical k-means centres of its descriptions.

    descriptions (M, D), class_of (M,) -> (C, J, D), rows of length 1. With J = 1 this is ``class_means``. Centres
    start from the description nearest the mean, then from the one farthest from those chosen: no random draw. A
    class with fewer than J descriptions repeats its last centre. Step 1 of METHOD [R].
    """
    if per_class == 1:
        return class_means(descriptions, class_of, num_classes)[:, None]
    return torch.stack(
        [_spherical_means(descriptions[class_of == c], per_class, iterations) for c in range(num_classes)]
    )


def _spherical_means(points: Tensor, count: int, iterations: int) -> Tensor:
    count_found = min(count, points.shape[0])
    chosen = [int((points @ normalize(points.mean(0), dim=0)).argmax())]
    while len(chosen) < count_found:
        nearest = (points @ points[chosen].T).max(1).values
        nearest[chosen] = torch.inf
        chosen.append(int(nearest.argmin()))
    centres = points[chosen]
    for _ in range(iterations):
        owner = (points @ centres.T).argmax(1)
        means = class_means(points, owner, count_found)
        empty = means.norm(dim=1) == 0
        updated = torch.where(empty[:, None], centres, means)
        if torch.equal(updated, centres):
            break
        centres = updated
    return torch.cat([centres, centres[-1:].expand(count - count_found, -1)])


def crop_relevance(weak: Tensor, crops: Tensor) -> Tensor:
    """How much a crop resembles its whole image: r_i = <p_i, g>.

    weak (B, D), crops (B, N, D) -> (B, N) in [-1, 1]. Step 3 of METHOD.
    """
    return torch.einsum("bd,bnd->bn", weak, crops)


def crop_weights(relevance: Tensor, *, keep: int | None, temperature: float) -> Tensor:
    """Softmax of the relevance over the K most relevant crops; nought for the others.

    relevance (B, N) -> (B, N) in [0, 1], rows sum to 1. ``keep`` None or at least N keeps all. Equal relevance shares
    the weight evenly among the kept, of which ties are broken by position. Raises ValueError if keep < 1 or
    temperature <= 0. Step 3 of METHOD [R: K and tau].
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
    """Cosine of the whole image with each class: the best of its anchors.

    weak (B, D), anchors (C, J, D) normalised -> (B, C) in [-1, 1]. Step 9 of METHOD.
    """
    return torch.einsum("bd,cjd->bcj", weak, anchors).amax(-1)


def learned_alignment_score(crops: Tensor, weights: Tensor, anchors: Tensor) -> Tensor:
    """LAS(x, c) = sum_i w_i <p_i, a_c>, the crops' weighted agreement with the class's anchor.

    crops (B, N, D), weights (B, N), anchors (C, J, D) normalised -> (B, C) in [-1, 1]. With J anchors a class the
    best of its J sums counts [R]. Step 4 of METHOD.
    """
    localised = torch.einsum("bn,bnd->bd", weights, crops)
    return global_score(localised, anchors)


def weighted_alignment_score(
    crops: Tensor, crop_weight: Tensor, descriptions: Tensor, description_weight: Tensor, class_of: Tensor
) -> Tensor:
    """WCA's fixed score: sum_ij w_i v_cj <p_i, t_cj>.

    crops (B, N, D), crop_weight (B, N), descriptions (M, D), description_weight (M,) summing to 1 within a class,
    class_of (M,) -> (B, C). Li et al., ICML 2024 (arXiv 2406.02915).
    """
    num_classes = int(class_of.max()) + 1
    per_class = descriptions.new_zeros(num_classes, descriptions.shape[1])
    per_class.index_add_(0, class_of, descriptions * description_weight[:, None])
    return torch.einsum("bn,bnd,cd->bc", crop_weight, crops, per_class)


def description_weights(descriptions: Tensor, names: Tensor, class_of: Tensor, *, temperature: float) -> Tensor:
    """WCA's weight of each description: a softmax, within its class, of its cosine with the class's name.

    descriptions (M, D), names (C, D), class_of (M,) -> (M,) in [0, 1], summing to 1 within every class.
    """
    closeness = (descriptions * names[class_of]).sum(-1) / temperature
    highest = closeness.new_full((names.shape[0],), -torch.inf).scatter_reduce_(0, class_of, closeness, "amax")
    exponent = (closeness - highest[class_of]).exp()
    totals = exponent.new_zeros(names.shape[0]).index_add_(0, class_of, exponent)
    return exponent / totals[class_of]


def normalised_cut(tokens: Tensor, *, faint: float = 1e-5) -> Tensor:
    """Which patches the normalised cut takes for the object: (B, L, D), rows normalised -> (B, L) of 0 and 1.

    Two patches are joined by 1 where their cosine is above the image's mean, else by ``faint``; the second
    eigenvector of the normalised Laplacian is cut at its mean, and the side with the larger extreme is the object. The
    cut is TokenCut's (arXiv 2202.11539), which microCLIP starts from; the threshold is [R]. No gradient. Of a single
    patch nothing can be cut: it is the object.
    """
    if tokens.shape[1] == 1:
        return torch.ones_like(tokens[:, :, 0])
    with torch.no_grad():
        cosine = tokens.detach().float() @ tokens.detach().float().transpose(1, 2)
        joined = torch.where(cosine > cosine.mean((1, 2), keepdim=True), 1.0, faint)
        degree = joined.sum(-1).rsqrt()
        laplacian = torch.eye(joined.shape[1], device=joined.device) - degree[:, :, None] * joined * degree[:, None, :]
        second = torch.linalg.eigh(laplacian).eigenvectors[:, :, 1] * degree
        above = second > second.mean(1, keepdim=True)
        extreme = second.abs().argmax(1, keepdim=True)
        found: Tensor = (above == above.gather(1, extreme)).to(tokens.dtype)
    return found


def saliency_pooled(tokens: Tensor, *, scale: float) -> Tensor:
    """One embedding of the salient patches: (B, L, D) of any length -> (B, D), rows of length 1.

    The mean of the patches that ``normalised_cut`` takes for the object asks all patches: a softmax over
    ``scale`` times their cosines with it weighs them. microCLIP's pooling (arXiv 2510.02270) as METHOD gives it; the
    softmax's scale is [R].
    """
    rows = normalize(tokens, dim=-1)
    query = normalize((normalised_cut(rows)[..., None] * rows).sum(1), dim=-1)
    attention = torch.softmax(scale * torch.einsum("bd,bld->bl", query, rows), dim=1)
    return normalize(torch.einsum("bl,bld->bd", attention, rows), dim=-1)
