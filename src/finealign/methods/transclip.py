"""TransCLIP, zero-shot (Zanella et al., NeurIPS 2024, arXiv 2406.01837): all images labelled together, nothing trained.

The paper labels the images it is given. Fitted on those, its scores of the same images are the paper's, up to the
rounding of one more assignment; of other images they are that assignment with what was fitted held fixed.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from finealign.alignment import class_means
from finealign.methods.base import Anchors, Method, MethodOptions
from finealign.types import ImageFeatures, Score, TextFeatures

SAME = 1e-4  # cosines this near 1 are of one image: bf16 rounds by less, and another image is farther


class TransclipOptions(MethodOptions):
    """As published."""

    text_power: Annotated[float, Field(ge=0)] = Field(1.0, description="lambda, how much the texts' opinion counts")
    neighbours: Annotated[int, Field(ge=0)] = Field(3, description="nearest images that have a say in an image's class")
    confident: Annotated[int, Field(ge=1)] = Field(8, description="images a class that its mean starts from")
    rounds: Annotated[int, Field(ge=1)] = Field(10, description="of assignments, then means and covariance")
    assignments: Annotated[int, Field(ge=1)] = Field(5, description="in a round")


class Transclip(Method):
    """z_i ~ yhat_i^lambda exp(log N(f_i; mu, Sigma) + sum_j w_ij z_j) over the nearest j; Sigma diagonal, shared."""

    Options = TransclipOptions
    options: TransclipOptions
    surveys = True
    scores: ClassVar[tuple[Score, ...]] = ("global",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"published": {}}  # the defaults are
    prototypes: Tensor
    means: Tensor
    variance: Tensor
    images: Tensor
    assigned: Tensor

    def __init__(self, options: TransclipOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        prototypes = class_means(texts.descriptions, texts.class_of, texts.num_classes)
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("means", prototypes.clone())  # (C, D)
        self.register_buffer("variance", torch.full_like(prototypes[0], 1 / prototypes.shape[1]))  # (D,)
        self.register_buffer("images", prototypes[:0])  # (n, D), the images fitted on
        self.register_buffer("assigned", prototypes.new_zeros(0, self.num_classes))  # (n, C), rows sum to 1

    def classifier(self) -> Anchors:
        return self.prototypes[:, None]

    @torch.no_grad()
    def survey(self, weak: Tensor) -> None:
        """Fit means, covariance and assignments to all images (n, D)."""
        weak = weak.to(self.prototypes)
        texts = self.probabilities(weak @ self.prototypes.T)
        best = texts.topk(min(self.options.confident, len(weak)), dim=0).indices  # (confident, C)
        self.means.copy_(weak[best].mean(0))
        self.variance.fill_(1 / weak.shape[1])
        self.assigned, self.images = texts, weak
        neighbours, similarity = self._neighbours(weak, itself=True)
        for _ in range(self.options.rounds):
            fixed = self.options.text_power * texts.clamp_min(1e-30).log() + self._log_likelihood(weak)
            for _ in range(self.options.assignments):
                votes = (similarity[..., None] * self.assigned[neighbours]).sum(1)
                self.assigned = torch.softmax(fixed + votes, dim=1)
            total = self.assigned.sum(0)
            means = self.assigned.T @ weak / total.clamp_min(1e-12)[:, None]
            self.means.copy_(torch.where(total[:, None] > 1e-6, means, self.means))
            squares = self.assigned.sum(0) @ self.means.square() - 2 * ((self.assigned.T @ weak) * self.means).sum(0)
            self.variance.copy_(((squares + weak.square().sum(0)) / len(weak)).clamp_min(1e-8))

    def score(self, features: ImageFeatures, kind: Score) -> Tensor:
        """log z over the logit scale, so that ``probabilities`` gives z: (B, C)."""
        weak = features.weak
        texts = torch.log_softmax(self.logit_scale * weak @ self.prototypes.T, dim=1)
        if not len(self.images):
            return texts / self.logit_scale
        neighbours, similarity = self._neighbours(weak, itself=False)
        votes = (similarity[..., None] * self.assigned[neighbours]).sum(1)
        found = self.options.text_power * texts + self._log_likelihood(weak) + votes
        return torch.log_softmax(found, dim=1) / self.logit_scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As many images as were fitted, whatever is there now."""
        for name in ("images", "assigned"):
            if f"{prefix}{name}" in state_dict:
                setattr(self, name, self.prototypes.new_empty(state_dict[f"{prefix}{name}"].shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _neighbours(self, weak: Tensor, *, itself: bool) -> tuple[Tensor, Tensor]:
        """The nearest fitted images of each image and their cosines, cut at 0: (B, k) int64, (B, k).

        An image that was fitted is not its own neighbour: the first is left out where it is the image itself.
        """
        wanted = min(self.options.neighbours, len(self.images) - 1)
        parts = []
        for part in torch.split(weak, 1024):
            cosine = part @ self.images.T
            top = cosine.topk(wanted + 1, dim=1)
            own = itself | (top.values[:, 0] > 1 - SAME)
            first = torch.as_tensor(own, device=weak.device).expand(len(part)).long()[:, None]
            columns = first + torch.arange(wanted, device=weak.device)
            parts.append((top.indices.gather(1, columns), top.values.gather(1, columns).clamp_min(0)))
        return torch.cat([indices for indices, _ in parts]), torch.cat([values for _, values in parts])

    def _log_likelihood(self, weak: Tensor) -> Tensor:
        """log N(f; mu_c, diag) up to what all classes share: (B, C)."""
        scaled, means = weak / self.variance.sqrt(), self.means / self.variance.sqrt()
        return -torch.cdist(scaled, means).square() / 2


METHOD = Transclip
