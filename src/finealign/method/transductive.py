"""The common part of the methods that label all images jointly, as a mixture of Gaussians, and train nothing."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from finealign.method.alignment import class_means
from finealign.method.base import Anchors, Method, MethodOptions
from finealign.method.few_labels import assigned_as_known
from finealign.method.mixture import (
    LEAST_VARIANCE,
    log_likelihood,
    mutual_votes,
    neighbours,
    reach,
    squared_deviations,
    votes_for_newcomers,
    weighted_means,
)
from finealign.types import ImageFeatures, Score, TextFeatures


class TransductiveOptions(MethodOptions):
    """Options of TransCLIP and StatA; the defaults are those of their authors."""

    text_power: Annotated[float, Field(ge=0)] = Field(1.0, description="lambda, how much the texts' opinion counts")
    damping: Annotated[float, Field(gt=0)] = Field(50.0, description="divides the log-likelihood by the class means")
    neighbours: Annotated[int, Field(ge=0)] = Field(3, description="nearest images that have a say in an image's class")
    rounds: Annotated[int, Field(ge=1)] = Field(10, description="of assignments, then means and variances")
    assignments: Annotated[int, Field(ge=1)] = Field(5, description="in a round")


class TransductiveMethod(Method):
    """z_i ~ yhat_i^lambda exp(log N(f_i; mu, v) / damping + votes_i / 2k), normalised over the classes.

    z_i are the class probabilities of image i, yhat_i those by the texts alone, and f_i is its weak feature. mu are the
    class means and v the variances of a Gaussian with a diagonal covariance. The votes are the sum of w_ij z_j over the
    k nearest images j of i, and over those that have i among their nearest; w_ij is the cosine of the two.

    The papers label only the images that a method is fitted on. Other images are scored by one assignment step in which
    everything fitted is held fixed. So are the images fitted on, once more: that step gives the authors' figures.

    Subclasses say where means and variances start, in ``begin``, and how they follow the assignments, in ``refit``.
    """

    Options: ClassVar[type[MethodOptions]] = TransductiveOptions
    options: TransductiveOptions
    scores: ClassVar[tuple[Score, ...]] = ("global",)
    training_options: ClassVar[tuple[str, ...]] = (*Method.training_options, "rounds", "assignments")
    sized_by_images: ClassVar[tuple[str, ...]] = ("images", "assigned", "reaches")
    prototypes: Tensor  # (C, D), the means of the descriptions
    means: Tensor  # (C, D), mu
    variance: Tensor  # (C, D), or (D,) for all classes: v
    images: Tensor  # (n, D), the images fitted on
    assigned: Tensor  # (n, C), z of those images; rows sum to 1
    reaches: Tensor  # (n,), their cosines with their last neighbour

    def __init__(
        self, options: TransductiveOptions, texts: TextFeatures, *, logit_scale: float, variance_shape: tuple[int, ...]
    ) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        prototypes = class_means(texts.descriptions, texts.class_of, texts.num_classes)
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("means", prototypes.clone())
        self.register_buffer("variance", prototypes.new_full(variance_shape, 1 / prototypes.shape[1]))
        self.register_buffer("images", prototypes[:0])  # n is 0 until the method is fitted
        self.register_buffer("assigned", prototypes.new_zeros(0, self.num_classes))
        self.register_buffer("reaches", prototypes.new_zeros(0))

    def begin(self) -> None:
        """Set the first means and variances, given ``images`` and, as ``assigned``, what the texts say of them."""
        raise NotImplementedError

    def refit(self) -> None:
        """Set means and variances again, given ``images`` and ``assigned``."""
        raise NotImplementedError

    def classifier(self) -> Anchors:
        """Return the normalised mean of each class's descriptions: (C, 1, D)."""
        return self.prototypes[:, None]

    @torch.no_grad()
    def survey(self, weak: Tensor, known: Tensor | None = None) -> None:
        """Fit means, variances and assignments to the weak features of all images, (n, D).

        Images whose class is ``known``, (n,) or None, are assigned to it throughout.
        """
        self.images = weak.to(self.prototypes)
        log_by_texts = self._log_by_texts(self.images)
        self.assigned = assigned_as_known(log_by_texts.exp(), known)
        indices, cosines = neighbours(self.images, self.options.neighbours)
        self.reaches = reach(cosines)
        self.begin()
        for _ in range(self.options.rounds):
            fixed = self._without_votes(log_by_texts, self.images)
            for _ in range(self.options.assignments):
                votes = mutual_votes(self.assigned, indices, cosines)
                self.assigned = assigned_as_known(torch.softmax(fixed + votes / self._most_votes, dim=1), known)
            self.refit()

    def score(self, features: ImageFeatures, kind: Score) -> Tensor:
        """Compute log z divided by the logit scale, so that ``probabilities`` returns z: (B, C).

        Before the method is fitted, z are the probabilities by the texts alone. ``kind`` is ignored, because ``scores``
        lists only one.
        """
        weak = features.weak
        log_by_texts = self._log_by_texts(weak)
        if not len(self.images):
            return log_by_texts / self.logit_scale
        votes = votes_for_newcomers(weak, self.images, self.assigned, self.reaches, self.options.neighbours)
        logits = self._without_votes(log_by_texts, weak) + votes / self._most_votes
        return torch.log_softmax(logits, dim=1) / self.logit_scale

    @property
    def _most_votes(self) -> int:
        """2k, the sum of an image's votes where it is chosen as often as it chooses and all cosines are 1."""
        return 2 * max(1, self.options.neighbours)

    def _log_by_texts(self, weak: Tensor) -> Tensor:
        """Log yhat: (B, D) -> (B, C)."""
        return torch.log_softmax(self.logit_scale * weak @ self.prototypes.T, dim=1)

    def _without_votes(self, log_by_texts: Tensor, weak: Tensor) -> Tensor:
        """Log z without the votes, up to a constant: (B, C), (B, D) -> (B, C)."""
        by_means = log_likelihood(weak, self.means, self.variance)
        return self.options.text_power * log_by_texts + by_means / self.options.damping


class SharedVarianceOptions(TransductiveOptions):
    """Options of TransCLIP and GTA-CLIP; the defaults are those of TransCLIP's authors' solver."""

    confident: Annotated[int, Field(ge=0)] = Field(
        0, description="most confident images a class, the paper's 8, that its mean starts from; 0: from the text"
    )


class SharedVarianceMethod(TransductiveMethod):
    """The assignments of ``TransductiveMethod``, with one diagonal covariance that all classes share."""

    Options: ClassVar[type[MethodOptions]] = SharedVarianceOptions
    options: SharedVarianceOptions
    training_options: ClassVar[tuple[str, ...]] = (*TransductiveMethod.training_options, "confident")

    def __init__(self, options: SharedVarianceOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        width = texts.descriptions.shape[1]
        super().__init__(options, texts, logit_scale=logit_scale, variance_shape=(width,))

    def begin(self) -> None:
        """Start from the texts, or from each class's most confident images weighted by confidence; v is 1 / D."""
        self.means.copy_(self.prototypes)
        if self.options.confident:
            best = self.assigned.topk(min(self.options.confident, len(self.images)), dim=0)  # (confident, C)
            means = torch.zeros_like(self.means)
            for confidence, image in zip(best.values, best.indices, strict=True):
                means += confidence[:, None] * self.images[image]
            self.means.copy_(normalize(means, dim=1))
        self.variance.fill_(1 / self.images.shape[1])

    def refit(self) -> None:
        """mu_c is the unit mean of the images by their share in class c, v the mean squared deviation from them."""
        some = self.assigned.sum(0)[:, None] > 1e-6  # a class that nothing is assigned to keeps its mean
        means = normalize(weighted_means(self.assigned, self.images), dim=1)
        self.means.copy_(torch.where(some, means, self.means))
        deviations = squared_deviations(self.assigned, self.images, self.means)
        self.variance.copy_((deviations.sum(0) / len(self.images)).clamp_min(LEAST_VARIANCE))
