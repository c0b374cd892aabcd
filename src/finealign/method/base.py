"""The base class of all methods, and the base class of all self-training methods. Step numbers: docs/method.md."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from finealign.config import Auto, Settings
from finealign.method.alignment import crop_relevance, crop_weights, global_score, learned_alignment_score
from finealign.method.crop_trust import EQUAL
from finealign.method.losses import fairness, mean_over, running_mean, weighted_cross_entropy
from finealign.types import Gaze, ImageFeatures, Loss, PseudoLabels, Score, TextFeatures

Anchors = Tensor  # (C, J, D), rows of length 1
# Training settings that the authors of DPA, LaFTer and microCLIP report alike, and nothing of ours. PUBLISHED_DECAY: of
# DPA and microCLIP.
PUBLISHED_PACE = {
    "epochs": 15,
    "batch_size": 64,
    "learning_rate": 1e-4,
    "anchor_learning_rate": 1e-4,
    "strangers": "off",
    "drift_limit": "off",
}
PUBLISHED_DECAY = {"weight_decay": 0.1, "norm_weight_decay": 0.1}
Share = Annotated[float, Field(ge=0, le=1)]
# The weight lambda of the fairness term where the settings leave it open. Shares that are estimated may be wrong, so to
# them it is less while the mean prediction is near them, in total variation, and PULL again where it has run away.
PULL, ESTIMATED_PULL = 2.0, 0.25
NEAR, RUN_AWAY = 0.1, 0.3


class MethodOptions(Settings):
    """Options of every method: how cosines become probabilities, and how crops are weighted (step 3 of the method)."""

    logit_scale: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto", description="factor on the cosines before a softmax; auto: the backbone's own"
    )
    crops_kept: Annotated[int, Field(ge=1)] | Literal["all"] = Field(
        "all", description="K, the crops of largest relevance that count"
    )
    crop_temperature: Annotated[float, Field(gt=0)] = Field(1.0, description="tau of the softmax over kept crops")


class Method(nn.Module):
    """A way to score images and, if it trains, to label them and to learn from the labels.

    What a method can do is what it overrides; nothing else is declared. With a ``loss`` and ``pseudo_label`` it
    trains, with ``survey`` it sees all images at once, with ``study`` it learns from the texts. Parameters hold what
    the method learns besides the backbone, buffers hold what it remembers. Together they are its whole state, so
    saving, loading and resuming work for every method without special cases.

    A method is made from its checked options, the encoded texts, and the backbone's logit scale, which is used unless
    ``options.logit_scale`` is a number. Making one is quick: what takes time is done in ``study``.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    scores: ClassVar[tuple[Score, ...]] = ("global", "las", "fused")  # that it can compute; the first is the default
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # settings by name of the preset, such as "published"
    # What a saved model leaves out, as classifying does not need it: names of options, and of parameters and buffers.
    training_options: ClassVar[tuple[str, ...]] = ("logit_scale",)
    training_state: ClassVar[tuple[str, ...]] = ()
    # Buffers with a row for each image that was surveyed: a state with another number of them is loaded all the same.
    sized_by_images: ClassVar[tuple[str, ...]] = ()
    # Whether known labels of some images are refused, taken where there are any, or needed.
    known_labels: ClassVar[Literal["refused", "taken", "needed"]] = "refused"
    label_weight: float = 1.0  # of a known label in the loss, where it is 1 of a sure pseudo-label
    # Follow from what a subclass overrides, and are not to be set.
    trains: ClassVar[bool] = False  # it has a ``loss``
    surveys: ClassVar[bool] = False  # it has a ``survey``
    has_classifier: ClassVar[bool] = False  # it has a ``classifier``
    prompts: nn.Parameter | None  # (P, W) learned tokens, appended to those of strong views and images to classify
    class_prior: Tensor | None  # (C,), the share of the images that each class is expected to have; None: not asked

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.trains = cls.loss is not Method.loss
        cls.surveys = cls.survey is not Method.survey
        cls.has_classifier = cls.classifier is not Method.classifier

    def __init__(self, options: MethodOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__()
        self.options = options
        self.logit_scale = logit_scale if options.logit_scale == "auto" else options.logit_scale
        self.num_classes = texts.num_classes
        self.register_parameter("prompts", None)
        self.register_buffer("class_prior", None)

    def study(self, texts: TextFeatures) -> None:
        """Learn from the texts alone, before any image is seen.

        Called once for a new method, not for one whose state is loaded.
        """

    def suit_tower(self, width: int) -> None:
        """Suit the image tower, whose tokens have this width; 0 means that it has none.

        Called once, after the method is made: the place to create ``prompts`` (P, width). Raises ConfigError if the
        method cannot work with such a tower.
        """

    @property
    def uses_crops(self) -> bool:
        """Whether training needs crop features. Without, ``pseudo_label`` gets crops of the shape (B, 0, D)."""
        return False

    @property
    def settles(self) -> bool:
        """Whether its parameters are also trained alone, on kept crop features."""
        return False

    @property
    def learns(self) -> str:
        """What it learns besides the backbone, in words, as for the model card."""
        return "a vector for each class"

    @property
    def gaze(self) -> Gaze | None:
        """How the image tower encodes strong views and images to classify; None: without prompts or pooled patches."""
        return None if self.prompts is None else Gaze(self.prompts)

    @property
    def weak_gaze(self) -> Gaze | None:
        """How the image tower encodes the weak views that images are labelled by; None: without prompts or patches."""
        return None

    def classifier(self) -> Anchors:
        """Return the class vectors that images are scored against: (C, J, D), rows of length 1.

        Subclasses implement this unless they override ``score``.
        """
        raise NotImplementedError

    @classmethod
    def inference_options(cls) -> set[str]:
        """Return the names of the options that classifying needs: all but ``training_options``."""
        return set(cls.Options.model_fields) - set(cls.training_options)

    def inference_tensors(self) -> dict[str, Tensor]:
        """Return the parameters and buffers that classifying needs, by name: all but ``training_state``."""
        return {name: value for name, value in self.state_dict().items() if name not in self.training_state}

    def load_inference_tensors(self, values: Mapping[str, Tensor]) -> None:
        """Load what ``inference_tensors`` returned.

        Raises ValueError if the names, or RuntimeError if the shapes, are not those of this method.
        """
        expected = self.inference_tensors()
        if expected.keys() != values.keys():
            raise ValueError(f"the method's tensors are {sorted(values)}, wanted {sorted(expected)}")
        self.load_state_dict({**self.state_dict(), **values})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self.sized_by_images:
            if (given := state_dict.get(f"{prefix}{name}")) is not None:
                setattr(self, name, self.get_buffer(name).new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def survey(self, weak: Tensor, known: Tensor | None = None) -> None:
        """Process the weak features of all images, (n, D), as the backbone encodes them at this moment.

        Called before each epoch, or once for a method that does not train; not at all unless it is overridden.
        ``known`` (n,) has the known labels as ``method.few_labels`` describes them, and is passed only where there are
        any.
        """

    def crop_weights(self, features: ImageFeatures) -> Tensor:
        """Compute the weight of each crop: (B, N) in [0, 1], rows sum to 1. Step 3 of the method [R]."""
        keep = None if self.options.crops_kept == "all" else self.options.crops_kept
        relevance = crop_relevance(features.weak, features.crops)
        return crop_weights(relevance, keep=keep, temperature=self.options.crop_temperature)

    def score(self, features: ImageFeatures, kind: Score) -> Tensor:
        """Compute the score of every class, which is on the scale of a cosine: (B, C). Step 9 of the method [R].

        ``kind`` is ``global`` for the whole image, ``las`` for the crops, or ``fused`` for a mean of the two, in which
        the whole image has the share ``share_of_whole``. ``las`` and ``fused`` need crop features.
        """
        return self.score_by(self.classifier(), features, kind)

    def score_by(self, anchors: Anchors, features: ImageFeatures, kind: Score) -> Tensor:
        """Do what ``score`` does, with these anchors (C, J, D), rows of length 1."""
        if kind == "global":
            return global_score(features.weak, anchors)
        las = learned_alignment_score(features.crops, self.crop_weights(features), anchors)
        if kind == "las":
            return las
        share = self.share_of_whole()
        return (1 - share) * las + share * global_score(features.weak, anchors)

    def share_of_whole(self) -> Tensor:
        """Return the share of the whole image, against its crops, in the score ``fused``: a scalar in [0, 1]."""
        return torch.tensor(EQUAL)

    def own_score(self) -> Score:
        """Return the score to classify by where none is asked for: the first of ``scores``.

        If that is ``fused`` and only whole image or crops have a share in it, the score of these alone.
        """
        first = self.scores[0]
        only: dict[float, Score] = {0.0: "las", 1.0: "global"}
        return only.get(float(self.share_of_whole()), first) if first == "fused" else first

    def probabilities(self, score: Tensor) -> Tensor:
        """Compute softmax(s * score), with s the logit scale: (B, C) -> (B, C), rows sum to 1."""
        return torch.softmax(self.logit_scale * score, dim=1)

    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """Label a batch and weight its labels, without gradient. Methods that train implement this."""
        raise NotImplementedError

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        """Compute the loss of strong views (B, D) given their pseudo-labels. Methods that train implement this."""
        raise NotImplementedError


class SelfTrainingOptions(MethodOptions):
    """Options of the loss: step 7 of the method [R]."""

    fairness: Literal["running", "batch", "off"] = Field("running", description="mean prediction the term judges")
    fairness_weight: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto",
        description=f"lambda; auto: {PULL:g}, but to shares that are estimated and uneven between "
        f"{ESTIMATED_PULL:g} and {PULL:g}, the more the further predictions are from them",
    )
    fairness_temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="divides the logits the fairness term looks at; above 1 it also hears of second choices"
    )
    fairness_window: Annotated[int, Field(ge=1)] | Auto = Field(
        "auto", description="images the running mean looks back on; auto: 8 a class"
    )
    class_prior: Literal["auto", "even"] | dict[str, Annotated[float, Field(ge=0)]] = Field(
        "auto",
        description="share of the images that each class is expected to have: even, a share or count by class, or "
        "auto: estimated without labels",
    )
    label_weight: Annotated[float, Field(gt=0)] = Field(
        2.0, description="of a known label in the loss, where it is 1 of a sure pseudo-label"
    )
    text_images: Annotated[float, Field(gt=0)] = Field(
        8.0, description="as how many labelled images a class's text counts where its anchors begin"
    )
    whole_share: Share | Auto = Field(
        "auto",
        description="share of the whole image, against its crops, in the score fused and in what fair labels by; auto: "
        "decided without labels",
    )


class SelfTrainingMethod(Method):
    """Learnable anchors, trained with weighted cross-entropy on strong views and a fairness term.

    Steps 7 and 8 of the method. Subclasses implement ``pseudo_label``, which labels images and weights the labels. The
    constructor takes the initial anchors (C, J, D).
    """

    Options: ClassVar[type[MethodOptions]] = SelfTrainingOptions
    options: SelfTrainingOptions
    training_options: ClassVar[tuple[str, ...]] = (
        *Method.training_options,
        "fairness",
        "fairness_weight",
        "fairness_temperature",
        "fairness_window",
        "class_prior",
        "whole_share",
        "label_weight",
        "text_images",
    )
    training_state: ClassVar[tuple[str, ...]] = ("pull", "mean_prediction")
    known_labels: ClassVar[Literal["refused", "taken", "needed"]] = "taken"
    # Names of buffers (C, J, D) that begin where the anchors begin.
    begin_with_anchors: ClassVar[tuple[str, ...]] = ()
    class_prior: Tensor  # (C,), the share of the images that each class is expected to have; even until ``expect``
    whole_share: Tensor  # (), the share of the whole image in the score ``fused``; EQUAL until ``trust_whole``
    pull: Tensor  # (), lambda, the weight of the fairness term, or its least where this is open
    mean_prediction: Tensor  # (C,), running mean over strong views; updated only where ``fairness`` is running

    def __init__(
        self, options: SelfTrainingOptions, texts: TextFeatures, anchors: Anchors, *, logit_scale: float
    ) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        self.label_weight = options.label_weight
        self.anchors = nn.Parameter(anchors.clone())
        even = anchors.new_full((self.num_classes,), 1 / self.num_classes)
        self.register_buffer("class_prior", even)
        self.register_buffer("mean_prediction", even.clone())
        pull, share = options.fairness_weight, options.whole_share
        self.register_buffer("pull", anchors.new_tensor(PULL if pull == "auto" else pull))
        self.register_buffer("whole_share", anchors.new_tensor(EQUAL if share == "auto" else share))

    def classifier(self) -> Anchors:
        """Return the learned anchors, normalised: (C, J, D)."""
        return normalize(self.anchors, dim=-1)

    def expect(self, class_prior: Tensor, *, estimated: bool = False) -> None:
        """Set the share of the images that each class is expected to have, before the first step: (C,), sum 1.

        Running means begin there. The loss draws less to shares that are ``estimated``, unless these are even or
        ``fairness_weight`` is a number. Subclasses with further running means extend this.
        """
        self.class_prior.copy_(class_prior)
        self.mean_prediction.copy_(class_prior)
        if self.options.fairness_weight == "auto":
            uneven = estimated and not bool((class_prior == class_prior[0]).all())
            self.pull.fill_(ESTIMATED_PULL if uneven else PULL)

    def begin_at(self, anchors: Anchors) -> None:
        """Set the anchors (C, J, D), rows of length 1, and what begins with them, before the first step."""
        with torch.no_grad():
            self.anchors.copy_(anchors)
            for name in self.begin_with_anchors:
                self.get_buffer(name).copy_(anchors)

    def trust_whole(self, share: float) -> None:
        """Set the share of the whole image, in [0, 1], in the score ``fused``, before the first step."""
        self.whole_share.fill_(share)

    def share_of_whole(self) -> Tensor:
        """Return ``whole_share``."""
        return self.whole_share

    @property
    def teaches_shares(self) -> bool:
        """Whether the loss draws predictions to ``class_prior``."""
        return self.options.fairness != "off" and self.options.fairness_weight != 0

    def load_inference_tensors(self, values: Mapping[str, Tensor]) -> None:
        """Do what ``Method`` does. Models saved without ``class_prior`` or ``whole_share`` had even ones.

        Also raises ValueError if ``class_prior`` is no distribution, or ``whole_share`` no share.
        """
        even = torch.full_like(self.class_prior, 1 / self.num_classes)
        prior = values.get("class_prior", even)
        if not (bool(prior.isfinite().all()) and float(prior.min()) >= 0 and abs(float(prior.sum()) - 1) < 1e-3):
            raise ValueError("class_prior is no distribution over the classes")
        share = values.get("whole_share", torch.full_like(self.whole_share, EQUAL))
        if not 0 <= float(share) <= 1:
            raise ValueError("whole_share is not in [0, 1]")
        super().load_inference_tensors({**values, "class_prior": prior, "whole_share": share})

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        """Compute the weighted cross-entropy plus lambda times the fairness term, of strong views (B, D).

        Images count in the mean prediction as far as they belong to the classes. Also updates the running mean
        prediction if the fairness term uses it.
        """
        logits = self.logit_scale * global_score(strong, self.classifier())
        cross_entropy = weighted_cross_entropy(logits, pseudo.labels, pseudo.weights)
        if self.options.fairness == "off":
            return Loss(cross_entropy, {"cross_entropy": cross_entropy.detach()})
        mean = self._mean_of(logits, pseudo)
        balance = fairness(mean, self.class_prior)
        total = cross_entropy + self._pull_at(mean.detach()) * balance
        return Loss(total, {"cross_entropy": cross_entropy.detach(), "fairness": balance.detach()})

    @staticmethod
    def fully_believed(probabilities: Tensor) -> PseudoLabels:
        """Label each image with its most probable class, every label with weight 1. probabilities: (B, C)."""
        return PseudoLabels(
            labels=probabilities.argmax(1),
            weights=torch.ones_like(probabilities[:, 0]),
            probabilities=probabilities,
        )

    def _mean_of(self, logits: Tensor, pseudo: PseudoLabels) -> Tensor:
        """The mean prediction (C,) that the fairness term judges; the running one is brought up to date with it.

        logits (B, C). Images count as far as they belong to the classes.
        """
        mean = mean_over(torch.softmax(logits / self.options.fairness_temperature, dim=1), pseudo.belonging)
        if self.options.fairness == "running":
            mean = running_mean(self.mean_prediction, mean, momentum=self._momentum(len(logits)))
            self.mean_prediction.copy_(mean.detach())
        return mean

    def _pull_at(self, mean: Tensor) -> Tensor:
        """The weight of the fairness term, (), at a mean prediction (C,)."""
        if self.options.fairness_weight != "auto":
            return self.pull
        away = (mean - self.class_prior).abs().sum() / 2  # on the device, so that no step waits
        return self.pull + (PULL - self.pull) * ((away - NEAR) / (RUN_AWAY - NEAR)).clamp(0, 1)

    def _momentum(self, batch: int) -> float:
        """The momentum with which a running mean looks back on about ``fairness_window`` images."""
        window = 8 * self.num_classes if self.options.fairness_window == "auto" else self.options.fairness_window
        return max(0.0, 1 - batch / window)
