"""DPA (Ali et al., WACV 2025, arXiv 2408.08855): a text and an image prototype per class label images together.

Written from a summary of the paper's equations. Only the text prototypes are trained and used for prediction.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from finealign.method.alignment import class_means, global_score
from finealign.method.base import PUBLISHED_DECAY, PUBLISHED_PACE, SelfTrainingMethod, SelfTrainingOptions, Share
from finealign.method.few_labels import known_first
from finealign.method.losses import running_mean
from finealign.method.pseudo_labels import agreement_weight, balanced
from finealign.types import ImageFeatures, Loss, PseudoLabels, TextFeatures


class DpaOptions(SelfTrainingOptions):
    """Options of DPA, besides those of the loss."""

    image_share: Share = Field(0.7, description="a, share of the image prototypes' opinion in the label")
    align_weight: float = Field(1.0, ge=0, description="of the term that aligns the two prototypes")


class Dpa(SelfTrainingMethod):
    """y = argmax(a p_v + (1 - a) p_t); omega = (p_v[y] / max p_v)(p_t[y] / max p_t).

    p_v and p_t are the class probabilities by the image prototypes P and by the text prototypes T. T are the learned
    anchors; a is ``image_share``.
    """

    Options = DpaOptions
    options: DpaOptions
    training_options = (*SelfTrainingMethod.training_options, "image_share", "align_weight")
    training_state = (*SelfTrainingMethod.training_state, "image_prototypes", "mean_text")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The authors choose the learning rate per data set; this preset has one. Their value of a is not known.
        "published": {
            "training": {**PUBLISHED_PACE, **PUBLISHED_DECAY},
            "method": {"fairness": "batch", "fairness_weight": 1.0, "image_share": 0.5, "class_prior": "even"},
        }
    }
    image_prototypes: Tensor  # (C, D)
    mean_text: Tensor  # (C,), running mean of p_t

    def __init__(self, options: DpaOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)
        super().__init__(options, texts, means[:, None], logit_scale=logit_scale)
        self.register_buffer("image_prototypes", means.clone())
        self.register_buffer("mean_text", self.mean_prediction.clone())

    def expect(self, class_prior: Tensor, *, estimated: bool = False) -> None:
        """Begin the running mean of p_t at the prior, too."""
        super().expect(class_prior, estimated=estimated)
        self.mean_text.copy_(class_prior)

    @torch.no_grad()
    def survey(self, weak: Tensor, known: Tensor | None = None) -> None:
        """Set P_c to the normalised mean of the weak features, out of (n, D), that are labelled c, before each epoch.

        An image whose class is ``known``, (n,), is labelled with it. A class that no image is labelled as keeps its
        P_c. Before the first call P equals T, so the first labels come from the texts alone.
        """
        by_images, by_texts = self._opinions(weak, by_text_mean=None)
        labels = (self.options.image_share * by_images + (1 - self.options.image_share) * by_texts).argmax(1)
        if known is not None:
            labels = known_first(labels, known)
        means = class_means(weak, labels, self.num_classes)
        empty = means.norm(dim=1, keepdim=True) == 0
        self.image_prototypes.copy_(torch.where(empty, self.image_prototypes, means))

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """Label whole images by both prototypes, and weight each label by how far both of them support it."""
        by_images, by_texts = self._opinions(features.weak, by_text_mean=self.mean_text)
        probabilities = self.options.image_share * by_images + (1 - self.options.image_share) * by_texts
        labels = probabilities.argmax(1)
        weights = agreement_weight(by_images, labels) * agreement_weight(by_texts, labels)
        return PseudoLabels(labels=labels, weights=weights, probabilities=probabilities)

    def _opinions(self, weak: Tensor, *, by_text_mean: Tensor | None) -> tuple[Tensor, Tensor]:
        """p_v and p_t of whole images (B, D), each (B, C).

        p_t is divided by its mean: the running mean ``by_text_mean`` (C,), which is updated in place, or that of this
        batch if it is None.
        """
        by_images = self.probabilities(weak @ self.image_prototypes.T)
        by_texts = self.probabilities(global_score(weak, self.classifier()))
        mean = by_texts.mean(0)
        if by_text_mean is not None:
            mean = running_mean(by_text_mean, mean, momentum=self._momentum(len(weak)))
            by_text_mean.copy_(mean)
        return by_images, balanced(by_texts, mean, self.class_prior, 1.0)

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        """Compute the self-training loss plus ``align_weight`` times CE(s P T', identity).

        The second term makes each image prototype most similar to the text prototype of its own class.
        """
        self_training = super().loss(strong, pseudo)
        logits = self.logit_scale * global_score(self.image_prototypes, self.classifier())
        align = cross_entropy(logits, torch.arange(self.num_classes, device=logits.device))
        return Loss(
            self_training.total + self.options.align_weight * align, {**self_training.parts, "align": align.detach()}
        )


METHOD = Dpa
