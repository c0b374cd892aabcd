"""What backbones have in common whose image tower is a PyTorch module."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.functional import normalize

from finealign.backbone.towers import is_normalisation
from finealign.errors import BackboneError
from finealign.runtime.atomic import save_tensors
from finealign.types import Gaze, Precision, TextFeatures, Texts

WEIGHTS = "weights.safetensors"
# Images encoded at once without gradients. On a CPU larger chunks no longer fit the caches and are no faster; a GPU is
# kept busy only by more. The chunk changes results only by rounding.
IMAGE_CHUNK, IMAGE_CHUNK_ON_GPU = 32, 256


def image_chunk(device: torch.device) -> int:
    """How many images to encode at once where no gradient is recorded."""
    return IMAGE_CHUNK_ON_GPU if device.type == "cuda" else IMAGE_CHUNK


@dataclass(kw_only=True)
class TowerBackbone:
    """The part of ``Backbone`` that is the same for every PyTorch image tower.

    A subclass offers ``tower``, ``weights``, ``input_size``, ``mean``, ``std``, ``embed_dim``, ``logit_scale``,
    ``encode_pixels``, ``encode_sentences`` and ``beyond_window``, with a model in evaluation mode whose parameters
    require no gradient. It may override the rest.
    """

    identifier: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: Precision = "fp32"
    origin: dict[str, str] = field(default_factory=dict)  # "repository" and "revision" of a model from a hub
    # Held by the thread that is inside ``lend``.
    _borrowed: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    # --- what a subclass offers ---------------------------------------------------------------------------------------

    @property
    def tower(self) -> nn.Module:
        """The image tower, whose normalisation layers are adapted."""
        raise NotImplementedError

    def weights(self) -> Mapping[str, Tensor]:
        """All parameters and buffers of the model by name, those of the text tower too."""
        raise NotImplementedError

    @property
    def input_size(self) -> int:
        """S, the side of the square input, in pixels."""
        raise NotImplementedError

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel that is subtracted from pixels in [0, 1]."""
        raise NotImplementedError

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel, by which pixels less the mean are divided."""
        raise NotImplementedError

    @property
    def embed_dim(self) -> int:
        """D, the width of the embeddings."""
        raise NotImplementedError

    @property
    def logit_scale(self) -> float:
        """The factor by which the model was trained to multiply cosines; 100 for CLIP."""
        raise NotImplementedError

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, S, S), less the mean and divided by the standard deviation, as (B, D) of any length."""
        raise NotImplementedError

    def encode_sentences(self, sentences: Sequence[str]) -> Tensor:
        """Encode B texts as L2-normalised float32 embeddings (B, D).

        Raises BackboneError if a text is too long for the model.
        """
        raise NotImplementedError

    def beyond_window(self, sentences: Sequence[str]) -> list[bool]:
        """For each text, whether it is longer than the model's context window."""
        raise NotImplementedError

    # --- what all have in common --------------------------------------------------------------------------------------

    @cached_property  # which, unlike a property, a field of a subclass can replace
    def geometry(self) -> Callable[[Image.Image], Image.Image]:
        """Scale the shorter side to S and crop the middle; a subclass may offer the model's own."""
        return partial(_fit, size=self.input_size)

    @property
    def token_width(self) -> int:
        """W, the width of the image tower's tokens; 0: it takes no prompts and exposes no patch tokens."""
        return 0

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the weights, in hexadecimal; the same model has the same checksum on every machine.

        It covers name, dtype, shape and values of every tensor, in the order of the names. It is computed at the first
        access and then stays the same, whatever happens to the weights.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.weights().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def encode_images(self, images: Tensor, gaze: Gaze | None = None) -> Tensor:
        """Encode uint8 images (B, 3, S, S), on any device, as L2-normalised float32 (B, D) on the backbone's device.

        Gradients flow to the normalisation parameters, unless the caller disables them. ``gaze`` is ignored.
        """
        return normalize(self.encode_pixels(self.pixels(images)).float(), dim=-1)

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, S, S), on any device, as what the tower takes: float32, on the backbone's device."""
        mean, std = self._normal
        return images.to(self.device, non_blocking=True).float().div_(255).sub_(mean).div_(std)

    @cached_property  # copying them to a GPU at every call would make it wait
    def _normal(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the channels, each (3, 1, 1)."""
        mean, std = torch.tensor([self.mean, self.std], device=self.device)
        return mean[:, None, None], std[:, None, None]

    @torch.inference_mode()
    def embed(self, images: Tensor, gaze: Gaze | None = None) -> Tensor:
        """Encode images as ``encode_images`` does, without gradients, in chunks that bound the memory used."""
        chunks = torch.split(images, image_chunk(self.device))
        return torch.cat([self.encode_images(chunk, gaze) for chunk in chunks])

    @torch.inference_mode()
    def encode_texts(self, texts: Texts) -> TextFeatures:
        """Encode each class name in every template, and all descriptions, in float32.

        Raises BackboneError if a text is longer than the tokenizer's context window, which would truncate it silently.
        """
        prompts = [template.replace("{}", name) for name in texts.classes for template in texts.templates]
        sentences = [sentence for group in texts.descriptions for sentence in group]
        encoded = self.encode_sentences(prompts + sentences)
        names = encoded[: len(prompts)].reshape(len(texts.classes), len(texts.templates), -1).mean(1)
        class_of = [index for index, group in enumerate(texts.descriptions) for _ in group]
        return TextFeatures(
            names=normalize(names, dim=-1),
            descriptions=encoded[len(prompts) :],
            class_of=torch.tensor(class_of, device=self.device),
        )

    def norm_parameters(self) -> dict[str, nn.Parameter]:
        """Scale and shift of every normalisation layer of the image tower, by name: step 8 of the method.

        Raises BackboneError if the tower has no normalisation layer.
        """
        if not self._norms:
            raise BackboneError(
                f"{self.identifier} has no normalisation layer in its image tower, so there is nothing to adapt there. "
                "Use training.learn=anchors."
            )
        return dict(self._norms)

    @cached_property
    def _norms(self) -> dict[str, nn.Parameter]:
        """As ``norm_parameters``, but empty for a tower without normalisation layers."""
        return {
            f"{prefix}.{name}" if prefix else name: parameter
            for prefix, module in self.tower.named_modules()
            if is_normalisation(module)
            for name, parameter in module.named_parameters(recurse=False)
        }

    def load_norms(self, values: Mapping[str, Tensor]) -> None:
        """Set the named normalisation parameters to these values, in place. Names are those of ``norm_parameters``."""
        parameters = self._norms
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)

    @contextmanager
    def lend(self, norms: Mapping[str, Tensor]) -> Iterator[None]:
        """A context in which the tower uses these normalisation parameters. On exit its own are restored.

        Only one thread at a time can be inside this context of a backbone; others wait. Copying the parameters takes
        about a millisecond.
        """
        if not norms:
            yield
            return
        with self._borrowed:
            originals = {name: self._norms[name].detach().clone() for name in norms}
            self.load_norms(norms)
            try:
                yield
            finally:
                self.load_norms(originals)

    def save(self, folder: Path) -> None:
        """Write ``weights`` to weights.safetensors in the folder. Raises OutputError if that fails."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(dict(self.weights()), folder / WEIGHTS)


def _fit(image: Image.Image, *, size: int) -> Image.Image:
    """A function of the module, as worker processes receive it pickled."""
    return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
