"""ReCLIP (Hu et al., WACV 2024, arXiv 2308.03793): labels spread from texts to images; two classifiers must agree.

Written from the paper's equations and its authors' settings. They adapt two copies of CLIP, of one the text tower and
of the other the image tower. Here the class vectors learn in place of the text tower, and both see one image tower.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from finealign.method.alignment import class_means, global_score
from finealign.method.base import PUBLISHED_PACE, Anchors, SelfTrainingMethod, SelfTrainingOptions
from finealign.method.few_labels import UNKNOWN, known_first
from finealign.method.losses import weighted_cross_entropy
from finealign.method.propagation import propagated, without_common_direction
from finealign.method.pseudo_labels import over_counted
from finealign.types import ImageFeatures, Loss, PseudoLabels, Score, TextFeatures


class ReclipOptions(SelfTrainingOptions):
    """Options of ReCLIP, besides those of the loss; their defaults are what suits sets of few images."""

    neighbours: Annotated[int, Field(ge=1)] = Field(10, description="nearest images and texts that labels spread to")
    spreading: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="alpha, how far labels spread")
    solver_steps: Annotated[int, Field(ge=1)] = Field(20, description="at most, of the solver of the spreading")


class Reclip(SelfTrainingMethod):
    """y spreads from the texts to the images; omega = 1 where learned and fixed texts give the same y, else 0.

    score = (<g, A_c> + <g, P_c>) / 2. A, the learned texts, are trained on the features as they are. P_c, which trains
    the image tower, is the mean of all that is labelled c from the fixed texts: images, and the text itself.
    """

    Options = ReclipOptions
    options: ReclipOptions
    training_options = (*SelfTrainingMethod.training_options, "neighbours", "spreading", "solver_steps")
    training_state = (*SelfTrainingMethod.training_state, "fixed", "images", "reached", "agreed")
    sized_by_images = ("images", "reached", "agreed")
    begin_with_anchors = ("fixed", "centroids")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The authors train with SGD at a rate of 1e-3, which says nothing of the rate here. Their number of epochs is
        # 2, and one more for every 5,000 images. Their loss has no fairness term.
        "published": {
            "training": {**PUBLISHED_PACE, "epochs": 2, "weight_decay": 1e-4, "norm_weight_decay": 1e-4},
            "views": {"strong_low": 1.0, "randaugment": "rand-n0"},
            "method": {"fairness": "off", "neighbours": 20, "spreading": 0.99},
        }
    }
    fixed: Tensor  # (C, 1, D), the means of the descriptions
    centroids: Tensor  # (C, 1, D), P
    images: Tensor  # (n, D), as they were surveyed
    reached: Tensor  # (n,) int64, the class that spread to each image from the learned texts
    agreed: Tensor  # (n,) bool, whether the fixed texts give the same

    def __init__(self, options: ReclipOptions, texts: TextFeatures, *, logit_scale: float) -> None:
        means = class_means(texts.descriptions, texts.class_of, texts.num_classes)
        super().__init__(options, texts, means[:, None], logit_scale=logit_scale)
        self.register_buffer("fixed", means[:, None])
        self.register_buffer("centroids", means[:, None].clone())
        self.register_buffer("images", means[:0])  # n is 0 until the method has surveyed
        self.register_buffer("reached", torch.zeros(0, dtype=torch.int64, device=means.device))
        self.register_buffer("agreed", torch.zeros(0, dtype=torch.bool, device=means.device))

    @torch.no_grad()
    def survey(self, weak: Tensor, known: Tensor | None = None) -> None:
        """Spread labels over the weak features of all images, (n, D), from the learned and from the fixed texts.

        Also sets P. Labels spread from images whose class is ``known``, (n,), as they do from texts.
        """
        self.images = weak.to(self.fixed)
        by_learned, by_fixed = (self._spread(texts, known) for texts in (self.classifier(), self.fixed))
        self.reached = by_learned[self.num_classes :]
        self.agreed = self.reached == by_fixed[self.num_classes :]
        nodes = torch.cat([self.fixed[:, 0], self.images])
        self.centroids.copy_(class_means(nodes, by_fixed, self.num_classes)[:, None])

    def _spread(self, texts: Anchors, known: Tensor | None) -> Tensor:
        """The labels of texts and images, (C + n,), that spread from these texts (C, 1, D)."""
        own = torch.arange(self.num_classes, device=texts.device)
        given = torch.cat([own, own.new_full((len(self.images),), UNKNOWN) if known is None else known.to(own)])
        nodes = without_common_direction(texts[:, 0], torch.cat([texts[:, 0], self.images]))
        found = propagated(
            nodes,
            one_hot(given.clamp_min(0), self.num_classes).to(nodes) * (given >= 0)[:, None],
            count=self.options.neighbours,
            alpha=self.options.spreading,
            most_steps=self.options.solver_steps,
        )
        return known_first(found.argmax(1), given)

    @torch.no_grad()
    def pseudo_label(self, features: ImageFeatures) -> PseudoLabels:
        """Give each whole image the label of the surveyed image nearest to it, which is itself."""
        if not len(self.images):
            return self.fully_believed(self.probabilities(self.score(features, "global")))
        nearest = (features.weak @ self.images.T).argmax(1)
        labels, weights = self.reached[nearest], self.agreed[nearest].to(self.fixed)
        return PseudoLabels(labels, weights, one_hot(labels, self.num_classes).to(self.fixed))

    def loss(self, strong: Tensor, pseudo: PseudoLabels) -> Loss:
        """Compute the self-training loss of A, of features as they are, and CE(s <g, P>, y), which trains the tower."""
        counted = over_counted(pseudo)
        by_texts = super().loss(strong.detach(), counted)
        logits = self.logit_scale * global_score(strong, self.centroids)
        by_images = weighted_cross_entropy(logits, counted.labels, counted.weights)
        return Loss(by_texts.total + by_images, {**by_texts.parts, "image_cross_entropy": by_images.detach()})

    def score(self, features: ImageFeatures, kind: Score) -> Tensor:
        """Compute the mean of the scores by A and by P: (B, C)."""
        return (self.score_by(self.classifier(), features, kind) + self.score_by(self.centroids, features, kind)) / 2


METHOD = Reclip
