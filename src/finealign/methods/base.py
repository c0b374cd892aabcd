"""What every method is, and the part that all self-training methods share."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from finealign.alignment import crop_relevance, crop_weights, global_score, learned_alignment_score
from finealign.config import Auto, Settings
from finealign.losses import fairness, running_mean, weighted_cross_entropy
from finealign.types import ImageFeatures, Loss, PseudoLabels, Score, TextFeatures

Anchors = Tensor  # (C, J, D), rows of length 1
# What the peers that train report alike, as METHOD gives it.
PUBLISHED_PACE = {"epochs": 15, "batch_size": 64, "learning_rate": 1e-4, "anchor_learning_rate": 1e-4}
PUBLISHED_DECAY = {"weight_decay": 0.1, "norm_weight_decay": 0.1}
Share = Annotated[float, Field(ge=0, le=1)]


class MethodOptions(Settings):
    """Options every method has: how cosines become probabilities, and how crops are weighed (step 3 of METHOD)."""

    logit_scale: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="factor on the cosines before a softmax; auto: the backbone's own"
    )
    crops_kept: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        "all", description="K, the crops of largest relevance that count"
    )
    crop_temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="tau of the softmax over kept crops")


class Method(nn.Module):
    """A way to score images and, when it trains, to label and learn from them.

    Parameters are what it learns beside the backbone, buffers what it remembers: together the whole state, so saving,
    loading and resuming need to know no method.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    trains: ClassVar[bool] = False
    uses_crops: ClassVar[bool] = False  # whether training looks at crops
    settles: ClassVar[bool] = False  # whether its anchors have steps of their own on the crops that are kept
    surveys: ClassVar[bool] = False  # whether it looks at all images at once, by ``survey``
    scores: ClassVar[tuple[Score, ...]] = ("global", "las", "fused")  # the first is the default
    salient: ClassVar[bool] = False  # whether whole images are embedded half by their salient patches
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # settings by name, as "published"
    prompts: nn.Parameter | None  # (P, W) tokens that strong views and images to classify are seen with

    def __init__(self, options: MethodOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__()
        self.options = options
        self.logit_scale = logit_scale if options.logit_scale == "auto" else options.logit_scale
        self.num_classes = texts.num_classes
        self.register_parameter("prompts", None)

    def classifier(self) -> Anchors:
        """The class vectors images are scored against, normalised: (C, J, D)."""
        raise NotImplementedError

    def make_prompts(self, width: int) -> None:
        """Make ``prompts`` for tokens of this width, if the method learns any; a width of 0 has none."""

    def survey(self, weak: Tensor) -> None:
        """Look at all images (n, D) as they are encoded now: before each epoch, or once if nothing is trained."""

    def crop_weights(self, features: ImageFeatures) -> Tensor:
        """The weight of each crop: (B, N) in [0, 1], rows sum to 1. Step 3 of METHOD [R]."""
        keep = None if self.options.crops_kept == "all" else self.options.crops_kept
        relevance = crop_relevance(features.weak, features.crops)
        return crop_weights(relevance, keep=keep, temperature=self.options.crop_temperature)

    def score(self, features: ImageFeatures, kind: Score) -> Tensor:
        """The cosine-like score of every class: (B, C). ``las`` and ``fused`` need crops. Step 9 of METHOD [R]."""
        anchors = self.classifier()
        if kind == "global":
            return global_score(features.weak, anchors)
        las = learned_alignment_score(features.crops, self.crop_weights(features), anchors)
        return las if kind == "las" else (las + global_score(features.weak, anchors)) / 2

    def probabilities(self, score: Tensor) -> Tensor:
        """softmax(s * score): (B, C), rows sum to 1."""
        return torch.softmax(self.logit_scale * score, dim=1)

    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """What the method believes of a batch, without gradient."""
        raise NotImplementedError

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        """The loss of strong views (B, D) against their pseudo-labels."""
        raise NotImplementedError


class SelfTrainingOptions(MethodOptions):
    """Options of the loss, step 7 of METHOD [R]."""

    # YAML reads a bare off as false.
    fairness: Annotated[Literal["running", "batch", "off"], BeforeValidator(lambda v: "off" if v is False else v)] = (
        Field("running", description="mean prediction the term judges")
    )
    fairness_weight: Annotated[float, Field(ge=0)] = Field(2.0, description="lambda")
    fairness_temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="divides the logits the fairness term looks at; above 1 it also hears of second choices"
    )
    fairness_window: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="images the running mean looks back on; auto: 8 a class"
    )


class SelfTrainingMethod(Method):
    """Learnable anchors, weighted cross-entropy on strong views, fairness term: steps 7 and 8 of METHOD.

    Subclasses say how an image is labelled and weighted.
    """

    Options: ClassVar[type[MethodOptions]] = SelfTrainingOptions
    options: SelfTrainingOptions
    trains = True
    mean_prediction: Tensor

    def __init__(
        self, options: SelfTrainingOptions, texts: TextFeatures, anchors: Anchors, *, logit_scale: float
    ) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        self.anchors = nn.Parameter(anchors.clone())
        self.register_buffer("mean_prediction", anchors.new_full((self.num_classes,), 1 / self.num_classes))

    def classifier(self) -> Anchors:
        return normalize(self.anchors, dim=-1)

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        logits = self.logit_scale * global_score(strong, self.classifier())
        believed = weighted_cross_entropy(logits, pseudo.labels, pseudo.weights)
        if self.options.fairness == "off":
            return Loss(believed, {"cross_entropy": believed.detach()})
        mean = torch.softmax(logits / self.options.fairness_temperature, dim=1).mean(0)
        if self.options.fairness == "running":
            mean = running_mean(self.mean_prediction, mean, momentum=self._momentum(strong.shape[0]))
            self.mean_prediction.copy_(mean.detach())
        balance = fairness(mean)
        total = believed + self.options.fairness_weight * balance
        return Loss(total, {"cross_entropy": believed.detach(), "fairness": balance.detach()})

    def _momentum(self, batch: int) -> float:
        """The share of the past that is kept so that about ``fairness_window`` images count."""
        window = 8 * self.num_classes if self.options.fairness_window == "auto" else self.options.fairness_window
        return max(0.0, 1 - batch / window)
