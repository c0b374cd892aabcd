"""TransCLIP, zero-shot (Zanella et al., NeurIPS 2024, arXiv 2406.01837): labels all images jointly, trains nothing.

The paper labels only the images that it is fitted on. For these, the scores here are the paper's, up to the rounding of
one more assignment step. Other images are scored by one assignment step in which everything fitted is held fixed.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from finealign.method.alignment import class_means
from finealign.method.base import Anchors, Method, MethodOptions
from finealign.types import ImageFeatures, Score, TextFeatures

# A cosine this near 1 is that of an image with itself: rounding in bf16 changes it by less, and two different images
# differ by more.
SAME = 1e-4


class TransclipOptions(MethodOptions):
    """Options of TransCLIP; the defaults are the published values."""

    text_power: Annotated[float, Field(ge=0)] = Field(1.0, description="lambda, how much the texts' opinion counts")
    neighbours: Annotated[int, Field(ge=0)] = Field(3, description="nearest images that have a say in an image's class")
    confident: Annotated[int, Field(ge=1)] = Field(8, description="images a class that its mean starts from")
    rounds: Annotated[int, Field(ge=1)] = Field(10, description="of assignments, then means and covariance")
    assignments: Annotated[int, Field(ge=1)] = Field(5, description="in a round")


class Transclip(Method):
    """z_i ~ yhat_i^lambda exp(log N(f_i; mu, Sigma) + sum_j w_ij z_j), normalised over the classes.

    z_i are the class probabilities of image i, yhat_i those by the texts alone, and f_i is its weak feature. mu are the
    class means, and Sigma is the diagonal covariance that all classes share. The sum is over the nearest images j, and
    w_ij is the cosine with image j, or 0 if that is negative.
    """

    Options = TransclipOptions
    options: TransclipOptions
    surveys = True
    scores: ClassVar[tuple[Score, ...]] = ("global",)
    inference_options = (*Method.inference_options, "text_power", "neighbours")
    inference_state = ("prototypes", "means", "variance", "images", "assigned")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {}}  # the defaults are the published values
    prototypes: Tensor  # (C, D), the means of the descriptions
    means: Tensor  # (C, D), mu
    variance: Tensor  # (D,), the diagonal of Sigma
    images: Tensor  # (n, D), the images fitted on
    assigned: Tensor  # (n, C), z of those images; rows sum to 1

    def __init__(self, options: TransclipOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        prototypes = class_means(texts.descriptions, texts.class_of, texts.num_classes)
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("means", prototypes.clone())
        self.register_buffer("variance", torch.full_like(prototypes[0], 1 / prototypes.shape[1]))
        self.register_buffer("images", prototypes[:0])  # n is 0 until the method is fitted
        self.register_buffer("assigned", prototypes.new_zeros(0, self.num_classes))

    def classifier(self) -> Anchors:
        """Return the normalised mean of each class's descriptions: (C, 1, D)."""
        return self.prototypes[:, None]

    @torch.no_grad()
    def survey(self, weak: Tensor) -> None:
        """Fit means, covariance and assignments to the weak features of all images, (n, D)."""
        weak = weak.to(self.prototypes)
        by_texts = self.probabilities(weak @ self.prototypes.T)
        best_images = by_texts.topk(min(self.options.confident, len(weak)), dim=0).indices  # (confident, C)
        self.means.copy_(weak[best_images].mean(0))
        self.variance.fill_(1 / weak.shape[1])
        self.assigned, self.images = by_texts, weak
        neighbours, similarity = self._neighbours(weak, itself=True)
        for _ in range(self.options.rounds):
            fixed = self.options.text_power * by_texts.clamp_min(1e-30).log() + self._log_likelihood(weak)
            for _ in range(self.options.assignments):
                votes = (similarity[..., None] * self.assigned[neighbours]).sum(1)
                self.assigned = torch.softmax(fixed + votes, dim=1)
            total = self.assigned.sum(0)
            means = self.assigned.T @ weak / total.clamp_min(1e-12)[:, None]
            self.means.copy_(torch.where(total[:, None] > 1e-6, means, self.means))
            # Expanded squares of f_i - mu_c, which need no (n, C, D) tensor.
            squares = self.assigned.sum(0) @ self.means.square() - 2 * ((self.assigned.T @ weak) * self.means).sum(0)
            self.variance.copy_(((squares + weak.square().sum(0)) / len(weak)).clamp_min(1e-8))

    def score(self, features: ImageFeatures, kind: Score) -> Tensor:
        """Compute log z divided by the logit scale, so that ``probabilities`` returns z: (B, C).

        Before the method is fitted, z are the probabilities by the texts alone. ``kind`` is ignored, because ``scores``
        lists only one.
        """
        weak = features.weak
        log_by_texts = torch.log_softmax(self.logit_scale * weak @ self.prototypes.T, dim=1)
        if not len(self.images):
            return log_by_texts / self.logit_scale
        neighbours, similarity = self._neighbours(weak, itself=False)
        votes = (similarity[..., None] * self.assigned[neighbours]).sum(1)
        logits = self.options.text_power * log_by_texts + self._log_likelihood(weak) + votes
        return torch.log_softmax(logits, dim=1) / self.logit_scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Resize the buffers first: PyTorch refuses a state with another number of fitted images."""
        for name in ("images", "assigned"):
            if f"{prefix}{name}" in state_dict:
                setattr(self, name, self.prototypes.new_empty(state_dict[f"{prefix}{name}"].shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _neighbours(self, weak: Tensor, *, itself: bool) -> tuple[Tensor, Tensor]:
        """The k nearest fitted images of each image, (B, k) int64, and their cosines, (B, k), negative ones set to 0.

        An image is not its own neighbour: the nearest fitted image is left out where it is the image itself. With
        ``itself`` that holds for every image, otherwise for those whose cosine with it is 1 up to rounding.
        """
        count = min(self.options.neighbours, len(self.images) - 1)
        parts = []
        for part in torch.split(weak, 1024):
            cosine = part @ self.images.T
            top = cosine.topk(count + 1, dim=1)
            nearest_is_itself = itself | (top.values[:, 0] > 1 - SAME)
            first = torch.as_tensor(nearest_is_itself, device=weak.device).expand(len(part)).long()[:, None]
            columns = first + torch.arange(count, device=weak.device)
            parts.append((top.indices.gather(1, columns), top.values.gather(1, columns).clamp_min(0)))
        return torch.cat([indices for indices, _ in parts]), torch.cat([values for _, values in parts])

    def _log_likelihood(self, weak: Tensor) -> Tensor:
        """log N(f; mu_c, Sigma) of each class, without the terms that are the same for all classes: (B, C)."""
        scaled, means = weak / self.variance.sqrt(), self.means / self.variance.sqrt()
        return -torch.cdist(scaled, means).square() / 2


METHOD = Transclip
