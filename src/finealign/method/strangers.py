"""How likely an image shows none of the classes, told without labels: pure tensor functions and one small record.

[ours]: FAIR (arXiv 2507.09615) assumes that every image shows one of the classes, and so do the methods it builds on.

Three kinds of evidence, each relative to the folder, so that no number depends on the backbone's scale:

- **Claim.** How much more one class's text says of an image than of the folder's other images. Averaged over clusters
  of images, because one image's text score is noisy and a cluster's is not.
- **Nearness.** How much an image resembles the better claimed half of the folder, its own cluster left out. Classes of
  one task resemble each other. Their strangers do not resemble them, unless they are further classes of the same task.
- **Whether there are strangers at all.** If the worst claimed quarter resembles the best claimed half as that half
  resembles itself, a low claim means a poor text, a rare class or a hard image, and p_none stays near 0. A low claim
  alone never counts, because a stranger and a badly described class look alike to the texts.

What is kept is a linear rule on a few principal directions and the claim, so an image is judged by itself, at
prediction as in training. Letters: n images, C classes, D embedding width, d <= 32 principal directions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import normalize

from finealign.method.joint import joint_features

DIRECTIONS = 32  # principal directions of the folder that are looked at
MOST_CLUSTERS, FEWEST_CLUSTERS = 64, 4  # else a cluster a class
FEWEST_IMAGES = 12  # fewer say nothing of what is usual in a folder
OWN_CLAIM = 0.3  # an image's own claim beside 1 for its cluster's
NEARNESS = 0.5  # beside 1 for the claim, both in standard deviations
NEIGHBOURS = 3  # over which nearness is the mean
REFERENCE = 2048  # images at most that nearness is measured against, so that time and memory are linear in n
CHUNK = 1024  # images compared with the reference at once
SHRINKAGE = 0.05  # ridge of the linear rule, a unit of it an image
FARNESS, STEEPNESS = 1.75, 6.0  # deviations by which the worst claimed quarter is farther: even odds, slope
SMALL_FOLDER = 20  # images by which FARNESS doubles: in a small folder a quarter may be a single class
MOST_DOUBT = 0.15  # mean probability of a stranger in the better half at which the folder counts as without any
QUANTILES = 101  # of p_none, kept so that a share of images can be refused without seeing them all
CLOSED = 0.02  # the most that p_none is where there seem to be no strangers; keeps the order
_TINY = 1e-6


@dataclass(frozen=True, eq=False)
class StrangerModel:
    """What ``p_none`` needs to judge an image. Float32 tensors, 4 (C + d + 1) D bytes and a little more.

    ``openness`` is how sure it is that the folder has strangers, in [0, 1], and ``share`` the estimated share of them,
    the mean of p_none over the images it was fitted on.
    """

    mean: Tensor  # (D,) of the folder's features
    axes: Tensor  # (d, D) rows of length 1, the principal directions
    anchors: Tensor  # (C, D) rows of length 1
    cosine_mean: Tensor  # (C,) over the folder, of each anchor's cosines
    cosine_deviation: Tensor  # (C,) above 0
    claim_mean: Tensor  # (2,) of the two claims that are added
    claim_deviation: Tensor  # (2,) above 0
    scale: Tensor  # () above 0, mean standard deviation along the axes
    weights: Tensor  # (d + 1,) of the axes and the claim
    bias: Tensor  # ()
    openness: Tensor  # ()
    share: Tensor  # ()
    quantiles: Tensor  # (101,) of p_none over the images that it was fitted on, from 0 to 1 in steps of 0.01

    @property
    def tells(self) -> bool:
        """Whether p_none differs among the images that it was fitted on; it does not if they were too few or alike."""
        lowest, highest = float(self.quantiles[0]), float(self.quantiles[-1])
        return highest - lowest > 1e-3 * highest

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, to be saved."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, values: Mapping[str, Tensor]) -> "StrangerModel":
        """Make the model from what ``tensors`` returned. Raises ValueError if names, shapes or values do not fit."""
        names = [field.name for field in fields(cls)]
        if set(values) != set(names):
            raise ValueError(f"the tensors of a stranger model are {sorted(names)}, found {sorted(values)}")
        (width,), (classes, _) = values["mean"].shape, values["anchors"].shape
        (axes, _) = values["axes"].shape
        shapes = {"mean": (width,), "axes": (axes, width), "anchors": (classes, width), "weights": (axes + 1,)}
        shapes |= {"cosine_mean": (classes,), "cosine_deviation": (classes,), "quantiles": (QUANTILES,)}
        shapes |= {"claim_mean": (2,), "claim_deviation": (2,)}
        for name, value in values.items():
            wanted = shapes.get(name, ())
            if tuple(value.shape) != wanted or value.dtype != torch.float32 or not bool(value.isfinite().all()):
                found = f"{value.dtype} of shape {tuple(value.shape)}"
                raise ValueError(f"{name} of a stranger model is {found}, not finite float32 of shape {wanted}")
        for name in ("cosine_deviation", "claim_deviation", "scale"):
            if not bool((values[name] > 0).all()):
                raise ValueError(f"{name} of a stranger model is not above 0")
        for name in ("openness", "share", "quantiles"):
            if not bool(((values[name] >= 0) & (values[name] <= 1)).all()):
                raise ValueError(f"{name} of a stranger model is not in [0, 1]")
        return cls(**values)


@torch.no_grad()
def fit(weak: Tensor, mean_crops: Tensor | None, anchors: Tensor) -> StrangerModel:
    """Fit to all images of a folder, without labels. The same inputs give the same model; nothing is drawn.

    weak (n, D) and mean_crops (n, D), the unweighted mean of each image's crops, or None; anchors (C, D) or (C, J, D),
    the class vectors that label at this moment: texts before adaptation, learned anchors after it, of whatever length.
    Time is O(n (D^2 + 2048 D)) and memory O(n D). Folders of fewer than 12 images, and folders of identical images,
    give a model whose p_none is 0.
    """
    features = joint_features(weak.float(), mean_crops)
    n = len(features)
    known = _describe(features, anchors)
    if n < FEWEST_IMAGES or float(known["scale"]) <= 1e-4:
        return StrangerModel(**known)
    model = StrangerModel(**known)
    points, claim = _coordinates(model, features)
    owner = _clusters(points, min(max(FEWEST_CLUSTERS, min(len(model.anchors), MOST_CLUSTERS)), n // 4))
    claimed = _cluster_means(claim, owner)[owner] + OWN_CLAIM * claim
    order = claimed.argsort(stable=True)
    doubtful, trusted = order[: n // 4], order[n // 2 :]
    nearness = _nearness(features, owner, trusted)
    openness = _openness(-nearness[doubtful].mean(), n)
    spread = claimed.std().clamp_min(_TINY)
    strangeness = -(claimed - claimed[trusted].mean()) / spread
    strangeness = strangeness - NEARNESS * openness * nearness / nearness.std().clamp_min(_TINY)
    target = upper_component(strangeness)
    # Strangers are the smaller part by assumption: a group that reaches into the better half is not one of strangers.
    doubt = target[strangeness.argsort(stable=True)[: n // 2]].mean() / MOST_DOUBT
    openness = openness * (1 - doubt).clamp_min(0)
    inputs = torch.cat([points / model.scale, claim[:, None]], dim=1)
    weights, bias = _logistic(inputs, target, ridge=SHRINKAGE * n)
    slope, offset = _logistic((inputs @ weights + bias)[:, None], target, ridge=1e-3)  # undoes what the ridge flattens
    slope = slope.clamp_min(0)
    ruled = {"weights": weights * slope, "bias": bias * slope[0] + offset, "openness": openness}
    doubts = _rule(StrangerModel(**{**known, **ruled}), points, claim)
    quantiles = doubts.quantile(torch.linspace(0, 1, QUANTILES, device=doubts.device))
    return StrangerModel(**{**known, **ruled, "share": doubts.mean(), "quantiles": quantiles})


def threshold(model: StrangerModel, share: float) -> float:
    """The p_none from which on ``share``, in [0, 1], of images like those that the model was fitted on are refused."""
    place = (1 - share) * (QUANTILES - 1)
    low = int(place)
    high = min(low + 1, QUANTILES - 1)
    return float(model.quantiles[low] + (place - low) * (model.quantiles[high] - model.quantiles[low]))


@torch.no_grad()
def p_none(model: StrangerModel, weak: Tensor, mean_crops: Tensor | None) -> Tensor:
    """Compute how likely each image belongs to none of the classes.

    weak (B, D), mean_crops (B, D) or None as in ``fit`` -> (B,) float32 in [0, 1]. An image's value does not depend on
    the other images of the batch.
    """
    return _rule(model, *_coordinates(model, joint_features(weak.float(), mean_crops)))


def _rule(model: StrangerModel, points: Tensor, claim: Tensor) -> Tensor:
    linear = torch.cat([points / model.scale, claim[:, None]], dim=1) @ model.weights + model.bias
    return torch.maximum(model.openness, model.openness.new_tensor(CLOSED)) * torch.sigmoid(linear)


def _describe(features: Tensor, anchors: Tensor) -> dict[str, Tensor]:
    """Everything of the model but its rule, which is left at "no image is a stranger"."""
    mean = features.mean(0)
    count = min(DIRECTIONS, features.shape[1], max(1, len(features) - 1))
    scatter = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64, device=features.device)
    for start in range(0, len(features), 8 * CHUNK):
        part = features[start : start + 8 * CHUNK] - mean
        scatter += (part.T @ part).double()
    values, vectors = torch.linalg.eigh(scatter / len(features))
    axes = vectors[:, -count:].T.flip(0).float().contiguous()
    lengths = normalize(anchors.float().mean(1) if anchors.dim() == 3 else anchors.float(), dim=1)
    cosines = features @ lengths.T
    zero = mean.new_zeros(())
    known = {
        "mean": mean,
        "axes": axes,
        "anchors": lengths,
        "cosine_mean": cosines.mean(0),
        "cosine_deviation": _deviation(cosines),
        "claim_mean": mean.new_zeros(2),
        "claim_deviation": mean.new_ones(2),
        "scale": values[-count:].clamp_min(0).sqrt().mean().float().clamp_min(_TINY),
        "weights": mean.new_zeros(count + 1),
        "bias": zero - 1e4,  # of which the sigmoid is 0
        "openness": zero,
        "share": zero,
        "quantiles": mean.new_zeros(QUANTILES),
    }
    claims = _claims(StrangerModel(**known), features)
    return {**known, "claim_mean": claims.mean(0), "claim_deviation": _deviation(claims)}


def _deviation(values: Tensor) -> Tensor:
    """Standard deviation of each column, kept from 0: (n, K) -> (K,)."""
    return (values - values.mean(0)).square().mean(0).sqrt().clamp_min(_TINY)


def _claims(model: StrangerModel, features: Tensor) -> Tensor:
    """Compute the largest over the classes of two scores that take out what all images, or all texts, share: (n, 2).

    First the cosine with the class, standardised over the folder. Then the cosine between image and text after each
    has lost its mean, which takes the gap between images and texts with it.
    """
    standard = (features @ model.anchors.T - model.cosine_mean) / model.cosine_deviation
    centred = normalize(model.anchors - model.anchors.mean(0), dim=1)
    cosine = normalize(features - model.mean, dim=1) @ centred.T
    return torch.stack([standard.amax(1), cosine.amax(1)], dim=1)


def _coordinates(model: StrangerModel, features: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the principal coordinates (n, d) and the claim (n,), the sum of the two standardised claims."""
    claim = ((_claims(model, features) - model.claim_mean) / model.claim_deviation).sum(1)
    return (features - model.mean) @ model.axes.T, claim


def _clusters(points: Tensor, count: int, *, rounds: int = 30) -> Tensor:
    """Assign each point to one of ``count`` clusters by k-means: (n, d) -> (n,) int64.

    The first centre is the point nearest the mean, each further one the point farthest from the centres
    so far, so nothing is drawn.
    """
    chosen = [int(points.square().sum(1).argmin())]
    distance = (points - points[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
    centres = points[chosen]
    owner = torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for _ in range(rounds):
        closest = (centres.square().sum(1) - 2 * points @ centres.T).argmin(1)
        if torch.equal(closest, owner):
            break
        owner = closest
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        sizes = torch.bincount(owner, minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp_min(1), centres)
    return owner


def _cluster_means(values: Tensor, owner: Tensor) -> Tensor:
    """Mean of the values of each cluster, 0 for an empty one: values (n,), owner (n,) -> (K,)."""
    members = torch.bincount(owner)
    return torch.zeros(len(members), device=values.device).index_add_(0, owner, values) / members.clamp_min(1)


def _nearness(features: Tensor, owner: Tensor, trusted: Tensor) -> Tensor:
    """Compute how much each image resembles its nearest trusted images of other clusters, relative to those images.

    features (n, D), owner (n,), trusted (R,) positions -> (n,), standardised so that the trusted images have mean 0 and
    deviation 1. An image without trusted images in other clusters gets 0, which says nothing.
    """
    reference = trusted.sort().values
    if len(reference) > REFERENCE:
        reference = reference[torch.linspace(0, len(reference) - 1, REFERENCE, device=reference.device).long()]
    found = []
    for start in range(0, len(features), CHUNK):
        rows = slice(start, start + CHUNK)
        cosine = features[rows] @ features[reference].T
        cosine = cosine.masked_fill(owner[rows, None] == owner[reference][None], -torch.inf)
        nearest = cosine.topk(min(NEIGHBOURS, len(reference)), dim=1).values
        there = nearest.isfinite()
        found.append(nearest.masked_fill(~there, 0).sum(1) / there.sum(1))  # nan where there is none
    closeness = torch.cat(found)
    usual = closeness[trusted]
    usual = usual[usual.isfinite()]
    if len(usual) < 2:
        return torch.zeros_like(closeness)
    return ((closeness - usual.mean()) / usual.std().clamp_min(1e-4)).nan_to_num(0.0)


def _openness(farness: Tensor, n: int) -> Tensor:
    """Compute how sure it is that there are strangers, from how far the doubtful quarter lies: scalar in [0, 1]."""
    return torch.sigmoid(STEEPNESS * (farness - FARNESS * (1 + SMALL_FOLDER / n)))


def upper_component(values: Tensor, *, rounds: int = 100) -> Tensor:
    """Compute the probability of belonging to the upper of two Gaussians of one variance, fitted by EM.

    values (n,) -> (n,) in [0, 1], rising with the value. The likeliest of four starts counts. Values that are all alike
    give 0.
    """
    v = values.double()
    if float(v.std()) < _TINY:
        return torch.zeros_like(values)
    floor = 1e-4 * v.var()
    starts = (v > v.quantile(v.new_tensor([0.4, 0.6, 0.75, 0.9]))[:, None]).double()
    r = starts[starts.any(dim=1)]
    if not len(r):
        return torch.zeros_like(values)
    for _ in range(rounds):
        share = r.mean(1, keepdim=True).clamp(1e-3, 1 - 1e-3)
        upper = (r * v).sum(1, keepdim=True) / r.sum(1, keepdim=True).clamp_min(1e-9)
        lower = ((1 - r) * v).sum(1, keepdim=True) / (1 - r).sum(1, keepdim=True).clamp_min(1e-9)
        squares = r * (v - upper).square() + (1 - r) * (v - lower).square()
        variance = squares.mean(1, keepdim=True) + floor
        high = share.log() - (v - upper).square() / (2 * variance)
        low = (1 - share).log() - (v - lower).square() / (2 * variance)
        r = torch.sigmoid(high - low)
    likelihood = (torch.logaddexp(high, low) - variance.log() / 2).sum(1)
    likelihood = torch.where((upper > lower)[:, 0], likelihood, -torch.inf)
    best = likelihood.argmax()
    return torch.where(likelihood[best].isfinite(), r[best], torch.zeros_like(v)).to(values.dtype)


def _logistic(inputs: Tensor, target: Tensor, *, ridge: float, rounds: int = 20) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression to soft targets by Newton's method: inputs (n, k), target (n,) -> (k,) and (), float32.

    ``ridge`` holds the weights back, 1e-3 the bias, so it ends even where the targets are separable or all alike.
    """
    x = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1).double()
    y = target.double().clamp(1e-3, 1 - 1e-3)
    penalty = torch.full((x.shape[1],), max(ridge, 1e-3), dtype=torch.float64, device=x.device)
    penalty[-1] = 1e-3
    solution = torch.zeros_like(penalty)
    for _ in range(rounds):
        p = torch.sigmoid(x @ solution)
        gradient = x.T @ (p - y) + penalty * solution
        hessian = (x * (p * (1 - p)).clamp_min(1e-6)[:, None]).T @ x + torch.diag(penalty)
        solution = solution - torch.linalg.solve(hessian, gradient)
    return solution[:-1].float(), solution[-1].float()
