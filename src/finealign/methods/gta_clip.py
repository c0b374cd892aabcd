"""GTA-CLIP (Saha et al., ICCV 2025, arXiv 2501.06031): TransCLIP in turn with learning from the surest images.

Written from the paper's equations and its authors' settings, without their language model, which is asked for further
attributes of classes that are confused: the attributes are the descriptions that are given. The authors train both
towers; here the descriptions' vectors learn in place of the text tower.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from finealign.method.alignment import class_means
from finealign.method.base import Anchors
from finealign.method.transductive import SharedVarianceMethod, SharedVarianceOptions
from finealign.types import ImageFeatures, Loss, PseudoLabels, TextFeatures


class GtaClipOptions(SharedVarianceOptions):
    """Options of GTA-CLIP; the defaults are the published values."""

    confident: Annotated[int, Field(ge=0)] = Field(
        8, description="most confident images a class that its mean starts from; 0: from the text"
    )
    tuned_on: Annotated[int, Field(ge=1)] = Field(
        8, description="most probable images of each class that tower and descriptions learn from"
    )


class GtaClip(SharedVarianceMethod):
    """TransCLIP with yhat_i = softmax_c(s mean_j <f_i, t_cj>); before each epoch z is found anew.

    Then descriptions t and images learn of each other, from the ``tuned_on`` images of largest z_c of each class c: an
    image is to find the descriptions of its classes among all, and a description the images of its class in the batch.
    An image may be among those of more classes than one.
    """

    Options = GtaClipOptions
    options: GtaClipOptions
    training_options = (*SharedVarianceMethod.training_options, "tuned_on")
    training_state = ("picked",)
    sized_by_images = (*SharedVarianceMethod.sized_by_images, "picked")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The rates are the authors' of the towers and of their last layers.
        "published": {
            "views": {"strong_low": 0.08, "randaugment": "rand-n0"},
            "training": {
                "epochs": 30,
                "batch_size": 32,
                "learning_rate": 2e-7,
                "anchor_learning_rate": 1e-6,
                "final_learning_rate": 2e-7,
                "weight_decay": 1e-4,
                "norm_weight_decay": 1e-4,
                "strangers": "off",
                "drift_limit": "off",
            },
        }
    }
    class_of: Tensor  # (M,) int64
    picked: Tensor  # (K, C) int64, the images that each class learns from

    def __init__(self, options: GtaClipOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        super().__init__(options, texts, logit_scale=logit_scale)
        self.descriptions = nn.Parameter(texts.descriptions.clone())
        self.register_buffer("class_of", texts.class_of.clone())
        self.register_buffer("picked", texts.class_of.new_zeros(0, self.num_classes))

    @property
    def learns(self) -> str:
        """What it learns besides the backbone."""
        return "a vector for each description"

    def classifier(self) -> Anchors:
        """Return the normalised mean of each class's learned descriptions: (C, 1, D)."""
        return class_means(normalize(self.descriptions, dim=1), self.class_of, self.num_classes)[:, None]

    def _log_by_texts(self, weak: Tensor) -> Tensor:
        by_class = self._each.T @ normalize(self.descriptions, dim=1)
        return torch.log_softmax(self.logit_scale * weak @ by_class.T, dim=1)

    @property
    def _each(self) -> Tensor:
        """The share of each description in its class: (M, C), columns sum to 1."""
        own = one_hot(self.class_of, self.num_classes).to(self.prototypes)
        return own / own.sum(0)

    @torch.no_grad()
    def survey(self, weak: Tensor, known: Tensor | None = None) -> None:
        """Fit means, variance and assignments to the weak features of all images, (n, D), then pick images."""
        self.prototypes.copy_(self.classifier()[:, 0])
        super().survey(weak, known)
        self.picked = self.assigned.topk(min(self.options.tuned_on, len(weak)), dim=0).indices

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """Label whole images as the surveyed images nearest to them are, which are themselves.

        The probabilities of a picked image are even over the classes that it is picked for. Others have weight 0.
        """
        if not len(self.images):
            probabilities = self._log_by_texts(features.weak).exp()
            return PseudoLabels(probabilities.argmax(1), torch.ones_like(probabilities[:, 0]), probabilities)
        nearest = (features.weak @ self.images.T).argmax(1)
        assigned = self.assigned[nearest]
        for_class = (self.picked == nearest[:, None, None]).any(1).to(assigned)
        picked = for_class.sum(1)
        labels = torch.where(picked[:, None] > 0, for_class * (1 + assigned), assigned).argmax(1)
        even = for_class / picked.clamp_min(1)[:, None]
        return PseudoLabels(labels, (picked > 0).to(assigned), torch.where(picked[:, None] > 0, even, assigned))

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        """Compute the two cross-entropies between images (B, D) and descriptions; both 0 if no image is picked.

        Images that belong less to the classes count less.
        """
        chosen = pseudo.weights > 0
        logits = self.logit_scale * strong[chosen] @ normalize(self.descriptions, dim=1).T  # (B', M)
        if not len(logits):
            return Loss(0 * (self.descriptions.sum() + strong.sum()))
        weights = pseudo.weights[chosen, None]
        of_image = pseudo.probabilities[chosen] @ self._each.T  # rows sum to 1
        to_texts = -(weights * of_image * torch.log_softmax(logits, dim=1)).sum(1).mean()
        of_text = weights * (of_image > 0)
        there = of_text.sum(0) > 0
        found = (of_text * torch.log_softmax(logits, dim=0))[:, there].sum(0) / of_text[:, there].sum(0)
        to_images = -found.mean()
        return Loss(to_texts + to_images, {"to_texts": to_texts.detach(), "to_images": to_images.detach()})


METHOD = GtaClip
