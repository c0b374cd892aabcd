"""The interface of a backbone. Any model that offers it can be adapted; open_clip's models are one implementation."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from finealign.errors import BackboneError
from finealign.types import Gaze, Precision, TextFeatures, Texts


class Backbone(Protocol):
    """An image-text model that can be adapted.

    Letters in the shapes: B images or texts, D embedding width, S input side in pixels, P prompts, W token width.

    A backbone stays in evaluation mode, so that BatchNorm's running statistics never change. Outside ``lend`` its
    weights are the ones it was loaded with: an adapted model keeps its own normalisation parameters and sets them on
    the backbone with ``lend`` while it encodes.
    """

    identifier: str  # as given to ``load_backbone``
    origin: dict[str, str]  # "repository" and "revision" of a model from a hub; empty for any other
    device: torch.device
    precision: Precision

    @property
    def geometry(self) -> Callable[[Image.Image], Image.Image]:
        """The function that resizes and crops an image to the (S, S) input that the model was trained with."""

    @property
    def input_size(self) -> int:
        """S, the side of the square input, in pixels."""

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel that is subtracted from pixels in [0, 1]."""

    @property
    def embed_dim(self) -> int:
        """D, the width of the embeddings."""

    @property
    def logit_scale(self) -> float:
        """The factor by which the model was trained to multiply cosines; 100 for CLIP."""

    @property
    def token_width(self) -> int:
        """W, the width of the image tower's tokens; 0 if the tower takes no prompts and exposes no patch tokens."""

    @property
    def checksum(self) -> str:
        """SHA-256 of the weights, in hexadecimal; the same model has the same checksum on every machine."""

    def encode_images(self, images: Tensor, gaze: Gaze | None = None) -> Tensor:
        """Encode uint8 images (B, 3, S, S) as L2-normalised float32 embeddings (B, D).

        Gradients are recorded unless the caller disables them, as with ``torch.no_grad``. ``gaze`` adds prompts or
        salient patches; a tower with ``token_width`` 0 ignores it.
        """

    def embed(self, images: Tensor, gaze: Gaze | None = None) -> Tensor:
        """Encode images as ``encode_images`` does, without gradients, in chunks that bound the memory used."""

    def encode_texts(self, texts: Texts) -> TextFeatures:
        """Encode each class name in every template, and all descriptions.

        Raises BackboneError if a text is too long for the model.
        """

    def encode_sentences(self, sentences: Sequence[str]) -> Tensor:
        """Encode B texts as L2-normalised float32 embeddings (B, D).

        Raises BackboneError if a text is too long for the model.
        """

    def beyond_window(self, sentences: Sequence[str]) -> list[bool]:
        """For each text, whether it is longer than the model's context window."""

    def norm_parameters(self) -> dict[str, nn.Parameter]:
        """The image tower's normalisation parameters by name. Adaptation trains these.

        Raises BackboneError if the tower has none.
        """

    def load_norms(self, values: Mapping[str, Tensor]) -> None:
        """Set the named normalisation parameters to these values, in place."""

    def lend(self, norms: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """A context in which the backbone uses these normalisation parameters. On exit its own are restored.

        Only one thread at a time can be inside this context of a backbone; others wait.
        """

    def save(self, folder: Path) -> None:
        """Write the model, as it is now, to a folder that can be loaded again. Raises OutputError if that fails."""


def lacking(backbone: object) -> list[str]:
    """Return the names of what a backbone must have, by ``Backbone``, and has not."""
    wanted = [*Backbone.__annotations__, *(name for name in vars(Backbone) if not name.startswith("_"))]
    return [name for name in wanted if not hasattr(backbone, name)]


def own_norms(backbone: Backbone) -> dict[str, Tensor]:
    """Return a copy of the backbone's current normalisation parameters, by name; empty for a tower without any."""
    try:
        parameters = backbone.norm_parameters()
    except BackboneError:
        return {}
    return {name: value.detach().clone() for name, value in parameters.items()}
