"""Estimate without labels whether adaptation helped, from features and predictions before and after it.

Each piece of evidence is a number that went with the change in accuracy over the successful and failed runs of
``benchmarks/verdict.py``; the points that it gives were fitted there. The verdict is an estimate; ``finealign
evaluate`` measures the change on labelled images.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from finealign.classifier import FineAlign
from finealign.errors import ConfigError
from finealign.method.base import Method
from finealign.method.class_prior import even_shares, mixture_assignments, total_variation
from finealign.method.joint import explained_variance, joint_features
from finealign.model.calibration import sample
from finealign.runtime.progress import Progress
from finealign.types import ImageFeatures, ImagePath, Score, Use

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Call = Literal["helped", "unclear", "hurt"]

MANY_A_CLASS = 100.0  # images per class above which the evidence "images_a_class" grows no more


@dataclass(frozen=True)
class Steps:
    """Points by the value of one piece of evidence: the first up to the first edge, the last above the last one."""

    edges: tuple[float, ...]  # ascending
    points: tuple[float, ...]  # one more than edges

    def __call__(self, value: float) -> float:
        return self.points[bisect_left(self.edges, value)]


# Fitted by benchmarks/verdict.py to changes of accuracy in points, clipped to 10. The score of a run is the sum of the
# points of its evidence and the constant. The pieces overlap, so the points of one say little by themselves.
# docs/ABLATION.md has how often the verdict is right.
POINTS = {
    "structure": Steps(edges=(0.0362, 0.0897), points=(-0.69, 0.24, 0.38)),
    "images_a_class": Steps(edges=(2.4849, 3.2348), points=(-0.18, 0.16, 0.53)),
    "anchors_kept": Steps(edges=(0.4345,), points=(-0.28, 0.06)),
    "shift": Steps(edges=(0.0726, 0.3047), points=(-0.61, 0.17, -0.06)),
    "off_prior": Steps(edges=(0.13, 0.253, 0.3423), points=(0.51, 0.34, 0.26, -1.94)),
    "mixture": Steps(edges=(-0.08, 0.0033, 0.0331, 0.0843), points=(-4.8, -0.42, 0.29, 2.07, 3.26)),
    "text": Steps(edges=(-0.5101, -0.0956), points=(-0.88, 0.2, 0.13)),
}
CONSTANT = 3.01
HELPED, HURT = 6.565, 0.0  # scores above the first are called "helped", below the second "hurt"
MOST_RELABELLED = 0.35  # more new labels than these are never called "helped": whole clusters may have got wrong names


@dataclass(frozen=True)
class Verdict:
    """The estimate of whether adaptation helped.

    The change in accuracy itself is not estimated. The bound ``most`` is exact.
    """

    call: Call
    score: float  # sum of the evidence's points; positive where adaptation seems to help
    most: float  # percent of the judged images with a new label; their accuracy cannot have changed by more points
    advice: str
    evidence: dict[str, float]  # by name, as ``gather`` returns it
    images: int  # number of images judged by

    @property
    def favours(self) -> Use:
        """The model that the evidence favours: the adapted one above the score at which both are equally likely."""
        return "adapted" if self.score > 0 else "start"


def judge_model(
    model: FineAlign,
    images: Sequence[ImagePath],
    *,
    start: ImageFeatures | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Judge a fitted model on the images it was adapted to, or on a sample of them. No true label is read.

    ``start`` are the features of ``calibration.sample`` of the images before adaptation, with crops, where they are
    known. Raises ImageInputError when none of the images can be read, and ConfigError for a method that has no class
    vectors.
    """
    if not model.method_.has_classifier:
        raise ConfigError(
            f"The method {model.model_.name!r} has no class vectors to judge by. Wanted: a model of another method; or "
            "labelled images, on which `finealign evaluate` measures this one."
        )
    paths = sample(images, seed=model.model_.inference.seed)
    with (progress or Progress()).stage("judging without labels", None):
        before, after = model.sampled_features(images, start=start)
    evidence = gather(
        before, after, first=model.start_method_, method=model.method_, score=model.score_, images=len(images)
    )
    return judge(evidence, images=len(paths))


def why_unjudged(model: FineAlign) -> str:
    """Why there is no verdict on a model, as a clause; empty if there is one."""
    method, name = model.method_, model.model_.name
    if method.trains and method.has_classifier:
        return ""
    return f"there is no verdict on {name}, which " + ("has no class vectors" if method.trains else "does not train")


@torch.no_grad()
def gather(
    before: ImageFeatures, after: ImageFeatures, *, first: Method, method: Method, score: Score, images: int
) -> dict[str, float]:
    """The evidence by name, from the features of n judged images before and after adaptation. No true label is read.

    Args:
        before: with crops where the method uses them.
        after: with crops unless ``score`` is global.
        first: the method of the start, which scores whole images.
        method: the adapted method.
        score: the one it classifies by.
        images: how many images the model was adapted to.

    Returns:
        - structure: relative increase in the variance of the images that the labels explain, from old to new labels;
        - margin: mean margin of the new labels, see ``mean_margin``;
        - images_a_class: natural logarithm of the images per class, of at most MANY_A_CLASS;
        - confidence: mean probability of the new label;
        - anchors_kept: mean cosine of each class's vectors before and after, each less the mean of the classes;
        - unevenness: total variation of the class prior that the run expected from even shares, in [0, 1];
        - shift: total variation between the shares of the old and the new labels, in [0, 1];
        - off_prior: total variation between the class prior and the shares of the new labels, in [0, 1];
        - mixture: mean probability of the new labels, less that of the old ones, by the mixtures of
          ``method.class_prior``, which know nothing of the adaptation, in [-1, 1];
        - mixtures_agree: share of images that both mixtures label alike; they differ where a name is doubtful;
        - text: mean logarithm of the start's probability of the new label over its largest one, at most 0;
        - relabelled: share of images whose label differs from the start's. It bounds the change.
    """
    scores = method.score(after, score)
    labels_before, labels_after = first.score(before, "global").argmax(1), scores.argmax(1)
    old, new = labels_before.cpu().numpy(), labels_after.cpu().numpy()
    crops = before.crops.mean(1) if before.crops.shape[1] else None
    anchors = first.classifier().mean(1)
    classes = anchors.shape[0]
    plain, sparse = mixture_assignments(before.weak, crops, anchors, logit_scale=first.logit_scale)
    assigned = ((plain + sparse) / 2).cpu().numpy()
    at_start = first.probabilities(first.score(before, "global")).double().cpu().numpy()
    everyone = np.arange(len(new))
    looks = before.weak if crops is None else crops
    explained = explained_variance(looks, labels_before)
    joint = joint_features(before.weak, crops).double().cpu().numpy()
    even = even_shares(classes).double()
    prior = even if method.class_prior is None else method.class_prior.double().cpu()
    shares = [torch.from_numpy(np.bincount(labels, minlength=classes) / len(labels)) for labels in (old, new)]
    return {
        "structure": (explained_variance(looks, labels_after) - explained) / max(explained, 0.01),
        "margin": mean_margin(joint, new),
        "images_a_class": float(np.log(min(images / classes, MANY_A_CLASS))),
        "confidence": float(method.probabilities(scores).amax(1).mean()),
        "anchors_kept": anchors_kept(anchors.cpu().numpy(), method.classifier().mean(1).detach().cpu().numpy()),
        "unevenness": total_variation(prior, even),
        "shift": total_variation(*shares),
        "off_prior": total_variation(prior, shares[1]),
        "mixtures_agree": float((plain.argmax(1) == sparse.argmax(1)).double().mean()),
        "text": float(np.log(np.maximum(at_start[everyone, new], 1e-6) / at_start.max(1)).mean()),
        "mixture": float((assigned[everyone, new] - assigned[everyone, old]).mean()),
        "relabelled": float((new != old).mean()),
    }


def mean_margin(features: Floats, labels: Ints) -> float:
    """How much nearer images are to their own class than to the nearest other one, in [-2, 2]; 0 for one class.

    features: (n, D). labels: (n,). The mean over images of the cosine with the mean of the images of the same label,
    the image itself left out, less the largest cosine with the mean of another label. The mean of all features is
    subtracted first. An image that is alone with its label counts 0.
    """
    present = np.unique(labels)
    if len(present) < 2:
        return 0.0
    rows = _units(features - features.mean(0))
    own = np.searchsorted(present, labels)
    sums = np.zeros((len(present), rows.shape[1]))
    np.add.at(sums, own, rows)
    cosines = rows @ _units(sums).T
    cosines[np.arange(len(rows)), own] = -np.inf
    margins = (_units(sums[own] - rows) * rows).sum(1) - cosines.max(1)
    return float(np.where(np.bincount(own)[own] > 1, margins, 0.0).mean())


def _units(rows: Floats) -> Floats:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Floats = rows / np.maximum(lengths, 1e-12)
    return found


def anchors_kept(before: Floats, after: Floats) -> float:
    """Mean over classes of the cosine between a class's vectors before and after adaptation, in [-1, 1].

    ``before`` and ``after`` are (C, D); the mean of the classes is subtracted from each first, because CLIP's text
    embeddings lie in a narrow cone and differ only in what remains without that mean.
    """
    old, new = before - before.mean(0), after - after.mean(0)
    lengths = np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1)
    return float(((old * new).sum(1) / np.maximum(lengths, 1e-12)).mean())


def score_of(evidence: Mapping[str, float]) -> float:
    """The score of a run: the sum of the points of its evidence."""
    return CONSTANT + sum(points(evidence[name]) for name, points in POINTS.items())


def judge(evidence: dict[str, float], *, images: int) -> Verdict:
    """The verdict from the evidence of ``gather``; ``images`` is the number of images judged by."""
    score = score_of(evidence)
    call: Call = "hurt" if score < HURT else "unclear"
    if score > HELPED and evidence["relabelled"] <= MOST_RELABELLED:
        call = "helped"
    if not evidence["relabelled"]:
        call = "unclear"  # without a changed label, accuracy cannot have changed
    return Verdict(
        call=call,
        score=round(score, 3),
        most=round(100 * evidence["relabelled"], 2),
        advice=_advice(call, evidence),
        evidence={name: round(value, 5) for name, value in evidence.items()},
        images=images,
    )


def _advice(call: Call, evidence: dict[str, float]) -> str:
    if call == "helped":
        return (
            "Use the adapted model; `finealign review` measures by how much, on some dozens of images labelled by eye."
        )
    few = evidence["images_a_class"] < np.log(10)
    if call == "unclear":
        more = "More images a class would tell, and help" if few else "More descriptions of each class may help"
        return f"Measure before you rely on it: label some dozens by eye with `finealign review`. {more}."
    cause = "there are few images a class: add some" if few else "check class names and descriptions against the images"
    return f"Do not use the adapted model as it is: {cause}, or lower training.anchor_learning_rate."
