"""The record of a fitted model, and the settings that it needs to classify an image."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, get_args

from pydantic import Field
from torch import Tensor

from finealign.backbone.base import Backbone
from finealign.config import Auto, Config, Fraction, MethodSettings, Positive, Settings
from finealign.errors import ConfigError, unknown_name
from finealign.method.base import Method
from finealign.method.registry import choose_score, create_method, inference_method
from finealign.method.strangers import StrangerModel, p_none
from finealign.types import ClassPrior, ImageFeatures, Score, TextFeatures, Texts, Use

OTHER: Mapping[Use, Use] = {"start": "adapted", "adapted": "start"}
CALLED: Mapping[Use, str] = {"start": "the model before adaptation", "adapted": "the adapted model"}

Temperature = Annotated[float, Field(gt=0)]


class InferenceSettings(Settings):
    """What a fitted model needs to classify an image, besides its texts and tensors. No value is "auto"."""

    backbone: str = Field(description="identifier of the backbone that was adapted")
    method: MethodSettings = Field(description="the method's name, and those of its options that scoring needs")
    score: Score = Field(description="score used when none is asked for")
    crops: Positive = Field(description="N, square crops per image")
    crop_low: Fraction = Field(description="smallest crop side as a share of the shorter side")
    crop_high: Fraction = Field(description="largest crop side as a share of the shorter side")
    seed: Annotated[int, Field(ge=0, lt=2**64)] = Field(description="decides where the crops lie")
    working_size: Positive | None = Field(description="shorter side that images are reduced to; null: not at all")
    max_pixels: Positive = Field(description="images with more pixels than this are set aside unread")
    white_value: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="the value that is white in images of more than 8 bits a channel"
    )
    temperatures: dict[Score, Temperature] = Field(
        {}, description="by score, what its logits are divided by before the softmax; 1 for a score that is not named"
    )
    start_temperature: Temperature = Field(1.0, description="the same, of the model before adaptation")
    class_prior: ClassPrior = Field("folder", description="how the images to classify are distributed")
    images: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="images by which the model was taught the shares of the classes; 0: it was taught none"
    )


def inference_settings(config: Config) -> InferenceSettings:
    """Return the part of a resolved configuration that a fitted model needs.

    Raises ConfigError for a score that the method does not have, and ValueError if the configuration is not resolved.
    """
    if config.data.working_size == "auto":
        raise ValueError("the configuration is not resolved")
    return InferenceSettings(
        backbone=config.backbone,
        method=inference_method(config.method),
        score=choose_score(config.method.name, config.prediction.score),
        crops=config.views.crops,
        crop_low=config.views.crop_low,
        crop_high=config.views.crop_high,
        seed=config.seed,
        working_size=config.data.working_size,
        max_pixels=config.data.max_pixels,
        white_value=config.data.white_value,
        class_prior=config.prediction.class_prior,
    )


@dataclass(frozen=True, eq=False)
class FittedModel:
    """Everything that makes up a fitted model, in memory and on disk.

    The record is of one model, the one in use. It leads to the other: an adapted model to its start, which is made from
    it, and a start to the adapted model that it was made from.
    """

    inference: InferenceSettings
    texts: Texts
    text_features: TextFeatures
    backbone: Backbone  # with the weights it was loaded with
    method: Method
    norms: Mapping[str, Tensor]  # the model's own normalisation parameters, lent to the backbone while it encodes
    start_norms: Mapping[str, Tensor]  # their values before adaptation; empty if they did not learn
    learned: str  # what differs from the model before adaptation, in words
    training: Mapping[str, Any]  # the settings it was trained with, kept as a record and not used
    adapted: "FittedModel | None" = None  # of a start: the adapted model
    learned_from: tuple[str, ...] = ()  # checksums of the images whose labels it was given
    strangers: Mapping[Use, StrangerModel] = field(default_factory=dict)  # of each model; empty if it was not fitted

    @property
    def name(self) -> str:
        """The method's name."""
        return self.inference.method.name

    @property
    def use(self) -> Use:
        """Which of the two models this is."""
        return "adapted" if self.adapted is None else "start"

    @property
    def encodes_as_start(self) -> bool:
        """Whether it encodes whole images as the model before adaptation does, so that one encoding serves both."""
        return not self.start_norms and self.method.gaze is None

    def using(self, use: Use) -> "FittedModel":
        """Return the adapted model or its start, whichever of them this is. Raises ConfigError for another word."""
        check_use(use)
        return self.start() if use == "start" else self.adapted or self

    def with_own_score(self, config: Config) -> "FittedModel":
        """Return the model with the score that its method would classify by, unless ``config`` asks for one."""
        if config.prediction.score != "auto":
            return self
        return replace(self, inference=self.inference.model_copy(update={"score": self.method.own_score()}))

    @property
    def tells_strangers(self) -> StrangerModel | None:
        """What tells images that show none of the classes; None if this model cannot tell them."""
        strangers = self.strangers.get(self.use)
        return strangers if strangers is not None and strangers.tells else None

    @property
    def class_prior(self) -> ClassPrior | None:
        """How images to classify are taken to be distributed; None for a method that expects no shares of classes."""
        return None if self.method.class_prior is None else self.inference.class_prior

    def with_prior(self, class_prior: ClassPrior) -> "FittedModel":
        """Return the same model for images that are distributed so. Raises ConfigError for another word."""
        check_class_prior(class_prior)
        adapted = self.using("adapted")
        changed = replace(adapted, inference=adapted.inference.model_copy(update={"class_prior": class_prior}))
        return changed.using(self.use)

    def p_none(self, weak: Tensor) -> Tensor | None:
        """How likely each image shows none of the classes: weak features (B, D) -> (B,) in [0, 1]; None if unknown."""
        strangers = self.tells_strangers
        return None if strangers is None else p_none(strangers, weak, None)

    def offsets(self) -> Tensor | None:
        """What is subtracted from the scores, so that no class has a lead from its share of the images adapted to.

        (C,), or None where scores stay as they are: for images distributed as those, or if the shares were even. The
        shares p that n images were expected to have are smoothed, s_c = (n p_c + 1) / (n + C), and divided out of the
        probabilities: log(C s_c) is subtracted from the logits.
        """
        method, images = self.method, self.inference.images
        if self.class_prior != "even" or not images or method.class_prior is None:
            return None
        shares = method.class_prior.detach().cpu().double()
        if bool((shares == shares[0]).all()):
            return None
        smoothed = (images * shares + 1) / (images + len(shares))
        return ((len(shares) * smoothed).log() / method.logit_scale).float().to(method.class_prior.device)

    def score(self, features: ImageFeatures, kind: Score) -> Tensor:
        """Compute the score of every class for images distributed as ``class_prior`` says: (B, C).

        ``kind`` is one of the method's scores. These are the method's own, less ``offsets``.
        """
        scores, offsets = self.method.score(features, kind), self.offsets()
        return scores if offsets is None else scores - offsets

    def temperature(self, score: Score) -> float:
        """What the logits of a score are divided by before the softmax; 1 where they were not calibrated."""
        return self.inference.temperatures.get(score, 1.0)

    def probabilities(self, scores: Tensor, score: Score) -> Tensor:
        """Compute the class probabilities of an image: softmax(s * scores / T), with s the logit scale.

        scores (B, C) are what ``self.score`` gives for ``score``, and T is its temperature -> (B, C), rows sum to 1.
        """
        return self.method.probabilities(scores / self.temperature(score))

    def start(self) -> "FittedModel":
        """Return the model before adaptation: it scores the whole image by the mean of each class's descriptions."""
        if self.adapted is not None:
            return self
        method = create_method(MethodSettings(name="cupl"), self.text_features, logit_scale=self.method.logit_scale)
        return replace(
            self,
            inference=self.inference.model_copy(
                update={
                    "method": MethodSettings(name="cupl"),
                    "score": "global",
                    "temperatures": {"global": self.inference.start_temperature},
                }
            ),
            method=method.to(self.backbone.device),
            norms=self.start_norms or self.norms,
            start_norms={},
            learned="nothing",
            adapted=self,
        )


def check_use(use: str) -> None:
    """Raise ConfigError if ``use`` names neither of a fitted model's two models."""
    if use not in get_args(Use):
        raise ConfigError(f"use: {unknown_name('model', str(use), get_args(Use))}")


def check_class_prior(class_prior: str) -> None:
    """Raise ConfigError if ``class_prior`` does not say how images to classify are distributed."""
    if class_prior not in get_args(ClassPrior):
        raise ConfigError(f"class_prior: {unknown_name('class prior', str(class_prior), get_args(ClassPrior))}")


def what_learned(method: Method, training: Mapping[str, Any]) -> str:
    """Describe what differs from the model before adaptation. ``training`` holds the settings it was trained with."""
    if not method.trains:
        if method.known_labels == "needed":
            return "to classify images, from those with a label"
        return f"{method.learns}, from all images at once" if method.surveys else "nothing"
    settings = training["training"]
    if settings["encoder"] == "frozen" or settings["learn"] == "anchors":
        parts = [method.learns]
    else:
        parts = ["scale and shift of the image tower's normalisation layers"]
        if settings["learn"] == "norms+anchors":
            parts.append(method.learns)
    if method.prompts is not None:
        parts.append("tokens shown with each image")
    return " and ".join(parts)
