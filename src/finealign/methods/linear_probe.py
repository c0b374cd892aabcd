"""The linear probe (Radford et al., ICML 2021, arXiv 2103.00020): logistic regression on whole images with labels.

Needs labels, and reads nothing else: no text, and no image without a label. A class without labels is never predicted.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from finealign.config import Auto
from finealign.method.alignment import class_means
from finealign.method.base import Anchors, Method, MethodOptions
from finealign.types import ImageFeatures, Score, TextFeatures

PENALTIES = (0.003, 0.03, 0.3, 3.0)
USUAL = 0.03
FOLDS = 4


class LinearProbeOptions(MethodOptions):
    """Options of the linear probe."""

    penalty: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto",
        description=f"lambda; auto: of {PENALTIES} the best by cross-validation on the labelled images, or {USUAL} "
        "where a class has but one",
    )


class LinearProbe(Method):
    """argmin over W, b of sum_i CE(W f_i + b, y_i) + lambda / 2 |W|^2, over the labelled images alone.

    The source chooses lambda on further labelled images; here are none, so it is cross-validated.
    """

    Options = LinearProbeOptions
    options: LinearProbeOptions
    known_labels: ClassVar[Literal["refused", "taken", "needed"]] = "needed"
    scores: ClassVar[tuple[Score, ...]] = ("global",)
    training_options = (*Method.training_options, "penalty")
    prototypes: Tensor  # (C, D), the means of the descriptions
    weights: Tensor  # (C, D), W
    bias: Tensor  # (C,), b; -inf for a class without labels

    def __init__(self, options: LinearProbeOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        prototypes = class_means(texts.descriptions, texts.class_of, texts.num_classes)
        self.register_buffer("prototypes", prototypes, persistent=False)
        self.register_buffer("weights", torch.zeros_like(prototypes))
        self.register_buffer("bias", torch.zeros_like(prototypes[:, 0]))

    def classifier(self) -> Anchors:
        """Return the normalised mean of each class's descriptions, which the probe makes no use of: (C, 1, D)."""
        return self.prototypes[:, None]

    def survey(self, weak: Tensor, known: Tensor | None = None) -> None:
        """Fit to those of the weak features (n, D) whose class is ``known``, (n,)."""
        if known is None or not bool((known >= 0).any()):
            raise ValueError("a linear probe needs known labels")
        known = known.to(weak.device)
        rows, labels = weak[known >= 0].double(), known[known >= 0]
        weights, bias = _regression(rows, labels, self.num_classes, self._penalty(rows, labels))
        self.weights.copy_(weights)
        self.bias.copy_(bias)

    def score(self, features: ImageFeatures, kind: Score) -> Tensor:
        """Compute the logits divided by the logit scale: (B, C). ``kind`` is ignored, there is only one."""
        return (features.weak @ self.weights.T + self.bias) / self.logit_scale

    def _penalty(self, rows: Tensor, labels: Tensor) -> float:
        """The penalty under which left-out images have the likeliest classes. Each class is spread over the folds."""
        if self.options.penalty != "auto":
            return self.options.penalty
        counts = torch.bincount(labels, minlength=self.num_classes)
        rank = torch.stack([(labels[:place] == label).sum() for place, label in enumerate(labels)])
        judged = (counts > 1)[labels]  # a class left out whole says nothing
        folds = min(FOLDS, int(counts.max()))
        if folds < 2:
            return USUAL

        def loss(penalty: float) -> float:
            total = 0.0
            for fold in range(folds):
                out = (rank % folds == fold) & judged
                weights, bias = _regression(rows[~out], labels[~out], self.num_classes, penalty)
                total += cross_entropy(rows[out] @ weights.T + bias, labels[out], reduction="sum").item()
            return total

        return min(PENALTIES, key=loss)


def _regression(rows: Tensor, labels: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Fit W (C, D) and b (C,) by L-BFGS. Classes without labels have a bias of -inf."""
    there = torch.bincount(labels, minlength=classes) > 0
    absent = torch.zeros(classes, dtype=rows.dtype, device=rows.device).masked_fill(~there, -torch.inf)
    with torch.inference_mode(False), torch.enable_grad():
        rows, labels = rows.detach().clone(), labels.clone()
        weights = rows.new_zeros(classes, rows.shape[1], requires_grad=True)
        bias = rows.new_zeros(classes, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            fit = cross_entropy(rows @ weights.T + bias + absent, labels, reduction="sum")
            value = fit + penalty / 2 * weights.square().sum()
            torch.autograd.backward(value)
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach(), bias.detach() + absent


METHOD = LinearProbe
