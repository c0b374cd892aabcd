"""Tip-Adapter (Zhang et al., ECCV 2022, arXiv 2207.09519): labelled images vote for their classes beside the texts.

Needs labels. Trains nothing; with ``key_steps``, as Tip-Adapter-F does, the labelled images' features are learned.
"""

from collections.abc import Mapping
from itertools import product
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from finealign.config import Auto
from finealign.method.alignment import class_means
from finealign.method.base import Anchors, Method, MethodOptions
from finealign.types import ImageFeatures, Score, TextFeatures

WEIGHTS, SHARPNESS = (0.5, 1.0, 2.0, 4.0, 8.0), (1.0, 3.0, 5.5, 9.0, 15.0)  # alpha and beta that are tried
PUBLISHED = 1.0, 5.5  # alpha and beta where there is nothing to choose by


class TipAdapterOptions(MethodOptions):
    """Options of Tip-Adapter."""

    votes_weight: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto",
        description="alpha, of the votes beside the texts' logits; auto: chosen with beta on the labelled images, each "
        "left out once, or 1 where a class has but one",
    )
    sharpness: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto", description="beta, how fast votes fade with distance; auto: as alpha, or 5.5"
    )
    key_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps in which keys learn; 0: as they are")
    key_learning_rate: Annotated[float, Field(gt=0)] = Field(1e-3, description="in those steps")


class TipAdapter(Method):
    """logits_c = s <f, T_c> + alpha sum_i exp(-beta (1 - <f, F_i>)) [y_i = c].

    F_i are the labelled images, y_i their classes, and T_c is the mean of the class's descriptions. The authors choose
    alpha and beta on further labelled images; here are none, so each labelled image is left out once.
    """

    Options = TipAdapterOptions
    options: TipAdapterOptions
    known_labels: ClassVar[Literal["refused", "taken", "needed"]] = "needed"
    scores: ClassVar[tuple[Score, ...]] = ("global",)
    # Tip-Adapter-F trains for 20 epochs; few labels are a single batch.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "published": {"method": {"votes_weight": PUBLISHED[0], "sharpness": PUBLISHED[1]}},
        "fine-tuned": {"method": {"key_steps": 20}},
    }
    training_options = (*Method.training_options, "votes_weight", "sharpness", "key_steps", "key_learning_rate")
    sized_by_images = ("keys", "classes")
    prototypes: Tensor  # (C, D), T
    keys: Tensor  # (L, D), F
    classes: Tensor  # (L,) int64, y
    chosen: Tensor  # (2,), alpha and beta

    def __init__(self, options: TipAdapterOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        prototypes = class_means(texts.descriptions, texts.class_of, texts.num_classes)
        self.register_buffer("prototypes", prototypes)
        self.register_buffer("keys", prototypes[:0])  # L is 0 until labels are known
        self.register_buffer("classes", torch.zeros(0, dtype=torch.int64, device=prototypes.device))
        self.register_buffer("chosen", prototypes.new_tensor(PUBLISHED))

    def classifier(self) -> Anchors:
        """Return the normalised mean of each class's descriptions: (C, 1, D)."""
        return self.prototypes[:, None]

    def survey(self, weak: Tensor, known: Tensor | None = None) -> None:
        """Keep the labelled ones of the weak features (n, D): those whose class is ``known``, (n,)."""
        if known is None or not bool((known >= 0).any()):
            raise ValueError("Tip-Adapter needs known labels")
        known = known.to(weak.device)
        self.keys, self.classes = weak[known >= 0].to(self.prototypes), known[known >= 0]
        self.chosen.copy_(self.chosen.new_tensor(self._choose()))
        self._learn_keys()

    def score(self, features: ImageFeatures, kind: Score) -> Tensor:
        """Compute the logits divided by the logit scale: (B, C). ``kind`` is ignored, there is only one."""
        return self._logits(features.weak, self.keys, *self.chosen.tolist()) / self.logit_scale

    def _logits(self, weak: Tensor, keys: Tensor, alpha: float, beta: float, *, others: bool = False) -> Tensor:
        """The logits of images (B, D); with ``others``, of the labelled images, whose own votes do not count."""
        votes = torch.exp(-beta * (1 - weak @ keys.T))
        if others:
            votes = votes - torch.diag(votes.diagonal())
        by_texts = self.logit_scale * weak @ self.prototypes.T
        return by_texts + alpha * votes @ one_hot(self.classes, self.num_classes).to(votes)

    def _choose(self) -> tuple[float, float]:
        """The alpha and beta under which labelled images that are left out have the likeliest classes."""
        alphas = _tried(self.options.votes_weight, WEIGHTS)
        betas = _tried(self.options.sharpness, SHARPNESS)
        if int(torch.bincount(self.classes).max()) < 2:
            alpha, beta = PUBLISHED  # nothing can be left out
            return (alphas[0] if len(alphas) == 1 else alpha), (betas[0] if len(betas) == 1 else beta)
        with torch.no_grad():
            return min(product(alphas, betas), key=lambda pair: self._loss(self.keys, *pair, others=True).item())

    def _loss(self, keys: Tensor, alpha: float, beta: float, *, others: bool = False) -> Tensor:
        return cross_entropy(self._logits(self.keys, keys, alpha, beta, others=others), self.classes)

    def _learn_keys(self) -> None:
        """Take steps on the cross-entropy of the labelled images, in which the keys learn and all else stays."""
        alpha, beta = self.chosen.tolist()
        with torch.inference_mode(False), torch.enable_grad():
            keys = self.keys.detach().clone().requires_grad_(True)
            optimizer = torch.optim.AdamW([keys], lr=self.options.key_learning_rate, eps=1e-4)
            for _ in range(self.options.key_steps):
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(self._loss(keys, alpha, beta))
                optimizer.step()
        self.keys = keys.detach()


def _tried(asked: float | Auto, values: tuple[float, ...]) -> tuple[float, ...]:
    return values if asked == "auto" else (asked,)


METHOD = TipAdapter
