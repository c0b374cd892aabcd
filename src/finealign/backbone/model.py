"""open_clip backbones: encode images and texts, list the trainable parameters, save the model."""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from finealign.backbone.text_tower import save_text_tower
from finealign.backbone.tower_backbone import TowerBackbone, image_chunk
from finealign.backbone.towers import is_convolutional, token_width, tokens_of, working_copy
from finealign.errors import BackboneError
from finealign.method.alignment import saliency_pooled
from finealign.runtime.atomic import save_tensors
from finealign.runtime.devices import fast_products
from finealign.types import Gaze

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
TEXT_CHUNK = 256
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The share of memory that a training step may use for activations. A batch that needs more is encoded in chunks, with
# gradient checkpointing. It is a share of total, not of free memory: a machine must always split a batch the same way.
ACTIVATION_SHARE = 1 / 6


@dataclass(frozen=True)
class Parts:
    """What a backbone is made of, as it was read from a hub, a folder or a file."""

    model: Any  # open_clip's CLIP, CustomTextCLIP or CoCa
    tokenizer: Any
    config: dict[str, Any]  # open_clip's model_cfg
    preprocess: dict[str, Any]  # open_clip's preprocess_cfg
    # "repository" and "revision" of a model from a hub; "file" and "sha256" of one from files; empty for any other.
    origin: dict[str, str]


@dataclass(kw_only=True)
class OpenClipBackbone(TowerBackbone):
    """An open_clip model with its tokenizer and preprocessing: one implementation of ``Backbone``.

    The model is always in evaluation mode, so that BatchNorm's running statistics never change.
    """

    model: Any  # open_clip's CLIP, CustomTextCLIP or CoCa
    tokenizer: Any
    config: dict[str, Any]  # open_clip's model_cfg
    preprocess: dict[str, Any]  # open_clip's preprocess_cfg
    geometry: Callable[[Image.Image], Image.Image] = field()
    # The model around each working copy of the image tower, by the dtype of the copy.
    _encoders: dict[torch.dtype, Any] = field(default_factory=dict, init=False, repr=False)
    # Bytes that autograd keeps for the backward pass of one image, by the dtype of the working copy.
    _kept_bytes: dict[torch.dtype, int] = field(default_factory=dict, init=False, repr=False)

    @property
    def tower(self) -> nn.Module:
        """The image tower."""
        visual: nn.Module = self.model.visual
        return visual

    def weights(self) -> Mapping[str, Tensor]:
        """The model's parameters and buffers by name."""
        state: Mapping[str, Tensor] = self.model.state_dict()
        return state

    @property
    def input_size(self) -> int:
        """S, the side of the square input, in pixels."""
        size = self.preprocess["size"]
        return int(size if isinstance(size, int) else size[0])

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel that is subtracted from pixels in [0, 1]."""
        return tuple(float(value) for value in self.preprocess["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel, by which pixels less the mean are divided."""
        return tuple(float(value) for value in self.preprocess["std"])

    @property
    def embed_dim(self) -> int:
        """D, the width of the embeddings."""
        return int(self.config["embed_dim"])

    @property
    def logit_scale(self) -> float:
        """The factor by which the model was trained to multiply cosines; 100 for CLIP."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def token_width(self) -> int:
        """W, the width of the image tower's tokens; 0 if it is not a transformer of open_clip with plain pooling."""
        return token_width(self.model.visual)

    def encode_images(self, images: Tensor, gaze: Gaze | None = None) -> Tensor:
        """Encode uint8 images (B, 3, S, S), on any device, as L2-normalised float32 (B, D) on the backbone's device.

        Gradients flow to the normalisation parameters and to the prompts of ``gaze``, unless the caller disables
        gradients. If the activations of the whole batch exceed ``ACTIVATION_SHARE`` of the memory, the batch is
        encoded in chunks with gradient checkpointing: each chunk is encoded again in the backward pass. That costs one
        more forward pass and changes the result only by rounding.
        """
        chunk = self._gradient_chunk(images)
        if len(images) <= chunk:
            return self._encode(images, gaze)
        # The model is in evaluation mode and draws no random numbers, so no generator state has to be restored.
        parts = [
            checkpoint(self._encode, part, gaze, use_reentrant=False, preserve_rng_state=False)
            for part in torch.split(images, chunk)
        ]
        return torch.cat(parts)

    def _encode(self, images: Tensor, gaze: Gaze | None = None) -> Tensor:
        dtype = self._working_type
        layout = torch.channels_last if self.convolutional else torch.contiguous_format
        pixels = self.pixels(images).to(dtype).contiguous(memory_format=layout)
        encoder = self._encoder(dtype)
        asked = gaze if self.token_width else None  # other towers ignore it
        with fast_products(self.device) if dtype == torch.float32 else nullcontext():
            if asked is None:
                return normalize(encoder.encode_image(pixels).float(), dim=-1)
            with tokens_of(encoder.visual, asked.prompts) as recorded:
                features = normalize(encoder.encode_image(pixels).float(), dim=-1)
        if not asked.salient:
            return normalize(features, dim=-1)
        # Without the class token. Which patches are salient is computed in float32, whatever the tower is in.
        patches = encoder.visual.ln_post(recorded[0][:, 1:]) @ encoder.visual.proj
        return normalize(features + saliency_pooled(patches.float(), scale=self.logit_scale), dim=-1)

    @property
    def _learns(self) -> bool:
        """Whether gradients are recorded for any parameter of the tower."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.model.visual.parameters())

    @property
    def _working_type(self) -> torch.dtype:
        """The dtype of the working copy, whose weights are cast once; autocast would cast them at every call.

        In fp16 gradients would vanish, of which the smallest are below what it can hold, so what learns is in fp32.
        """
        return torch.float32 if self.precision == "fp16" and self._learns else _TYPES[self.precision]

    def _encoder(self, dtype: torch.dtype) -> Any:
        """The model with its image tower replaced by a working copy in ``dtype``."""
        if dtype not in self._encoders:
            encoder = copy.copy(self.model)
            # ``embed`` may be the first caller: buffers copied in inference mode could never take part in a gradient.
            with torch.inference_mode(False):
                visual = working_copy(self.model.visual, dtype=dtype, on=self.device.type)
            # ``copy.copy`` shares ``_modules`` with the model: replace the dictionary, do not change it.
            encoder._modules = {**self.model._modules, "visual": visual}
            self._encoders[dtype] = encoder
        return self._encoders[dtype]

    def _gradient_chunk(self, images: Tensor) -> int:
        """How many images may be encoded at once; all of them if no gradient is recorded."""
        if not self._learns:
            return len(images)
        dtype = self._working_type
        if dtype not in self._kept_bytes:
            weights = self._encoder(dtype).visual.parameters()
            self._kept_bytes[dtype] = max(1, _bytes_kept(lambda: self._encode(images[:1]), beside=weights))
        return max(1, int(ACTIVATION_SHARE * _memory(self.device)) // self._kept_bytes[dtype])

    @torch.inference_mode()
    def embed(self, images: Tensor, gaze: Gaze | None = None) -> Tensor:
        """Encode images as ``encode_images`` does, without gradients, in chunks that bound the memory used."""
        return torch.cat([self._encode(chunk, gaze) for chunk in torch.split(images, image_chunk(self.device))])

    @torch.inference_mode()
    def encode_sentences(self, sentences: Sequence[str]) -> Tensor:
        """Encode B texts as L2-normalised float32 embeddings (B, D). Raises BackboneError as ``encode_texts`` does."""
        features = []
        for start in range(0, len(sentences), TEXT_CHUNK):
            chunk = list(sentences[start : start + TEXT_CHUNK])
            self._refuse_overflow(chunk)
            tokens = self.tokenizer(chunk).to(self.device)
            features.append(normalize(self.model.encode_text(tokens).float(), dim=-1))
        return torch.cat(features)

    @property
    def window(self) -> int:
        """The context window: how many tokens of a text the model reads."""
        return int(self.tokenizer(["a"]).shape[1])

    def beyond_window(self, sentences: Sequence[str]) -> list[bool]:
        """For each text, whether it is longer than the model's context window.

        Texts are tokenised to twice the window; a text that fits has only padding in the second half.
        """
        window = self.window
        padding = self.tokenizer(["a"], context_length=2 * window)[0, -1]
        beyond: list[bool] = (
            (self.tokenizer(list(sentences), context_length=2 * window)[:, window:] != padding).any(1).tolist()
        )
        return beyond

    def spelled_out(self, names: Sequence[str]) -> dict[str, int]:
        """The names that the tokenizer knows no words of, and how many pieces it takes each for.

        Of such a name, as one in Chinese to a tokenizer of English, no piece holds more than one letter, and many hold
        but a byte of one. Nothing is said of other tokenizers than open_clip's own.
        """
        encode = getattr(self.tokenizer, "encode", None)
        if encode is None or not hasattr(self.tokenizer, "byte_decoder"):
            return {}
        found = {}
        for name in names:
            letters = sum(character.isalpha() for character in name)
            foreign = sum(character.isalpha() and not character.isascii() for character in name)
            if 2 * foreign > letters and (pieces := len(encode(name))) >= letters:
                found[name] = pieces
        return found

    def _refuse_overflow(self, sentences: list[str]) -> None:
        too_long = [text for text, beyond in zip(sentences, self.beyond_window(sentences), strict=True) if beyond]
        if too_long:
            raise BackboneError(
                f"{len(too_long)} texts are longer than the {self.window} tokens that {self.identifier} reads, and "
                f"would be cut silently. The first: {too_long[0]!r:.120}. Shorten them."
            )

    @property
    def convolutional(self) -> bool:
        """Whether the image tower is convolutional."""
        return is_convolutional(self.model.visual)

    def save(self, folder: Path) -> None:
        """Write the model as a folder that ``local-dir:`` loads: configuration, safetensors weights, tokenizer files.

        A text tower of transformers is described in a folder of its own, so that no hub is needed to build it again.
        Raises OutputError if the weights cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = save_text_tower(self.model, self.config, folder)
        settings = {"model_cfg": config, "preprocess_cfg": self.preprocess}
        (folder / CONFIG).write_text(json.dumps(settings, indent=1), encoding="utf-8")
        save_tensors(self.model.state_dict(), folder / WEIGHTS)
        # open_clip wraps a tokenizer of transformers, which has files of its own; its built-in one has none.
        wrapped: Any = getattr(self.tokenizer, "tokenizer", None)
        if hasattr(wrapped, "save_pretrained"):
            wrapped.save_pretrained(folder)


def _memory(device: torch.device) -> int:
    """Total memory of the device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _bytes_kept(encode: Callable[[], Tensor], *, beside: Iterable[Tensor]) -> int:
    """How many bytes autograd keeps of a forward pass for the backward pass, not counting the weights ``beside``."""
    weights = {weight.untyped_storage().data_ptr() for weight in beside}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Compared by storage, because a linear layer saves its weight as a transposed view.
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encoded = encode()  # keeps the graph alive until the sum is taken, so that no address is reused
    total = sum(storages.values())
    del encoded
    return total
