"""open_clip backbones: encode images and texts, list the trainable parameters, save the model."""

import copy
import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from finealign.backbone.text_tower import save_text_tower
from finealign.backbone.towers import is_convolutional, is_normalisation, token_width, tokens_of, working_copy
from finealign.errors import BackboneError
from finealign.method.alignment import saliency_pooled
from finealign.runtime.atomic import save_tensors
from finealign.types import Gaze, Precision, TextFeatures, Texts

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
# Larger chunks no longer fit the processor's caches and are no faster. The chunk size changes results only by rounding.
IMAGE_CHUNK, TEXT_CHUNK = 32, 256
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


@dataclass
class OpenClipBackbone:
    """An open_clip model with its tokenizer and preprocessing: one implementation of ``Backbone``.

    The model is always in evaluation mode, so that BatchNorm's running statistics never change.
    """

    identifier: str
    origin: dict[str, str]  # these five as in Parts
    model: Any
    tokenizer: Any
    config: dict[str, Any]
    preprocess: dict[str, Any]
    geometry: Callable[[Image.Image], Image.Image]
    device: torch.device
    precision: Precision
    # The model around each working copy of the image tower, by the dtype of the copy.
    _encoders: dict[torch.dtype, Any] = field(default_factory=dict, init=False, repr=False)
    # Bytes that autograd keeps for the backward pass of one image, by the dtype of the working copy.
    _kept_bytes: dict[torch.dtype, int] = field(default_factory=dict, init=False, repr=False)
    # Held by the thread that is inside ``lend``.
    _borrowed: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

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
    def embed_dim(self) -> int:
        """D, the width of the embeddings."""
        return int(self.config["embed_dim"])

    @property
    def logit_scale(self) -> float:
        """The factor by which the model was trained to multiply cosines; 100 for CLIP."""
        return float(self.model.logit_scale.detach().exp())

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of the weights, in hexadecimal; the same model has the same checksum on every machine.

        It covers name, dtype, shape and values of every tensor, in the order of the names. It is computed at the first
        access and then stays the same, whatever happens to the weights.
        """
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

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
        mean, std = self._normal
        layout = torch.channels_last if self.convolutional else torch.contiguous_format
        pixels = images.to(self.device, non_blocking=True).float().div_(255).sub_(mean).div_(std)
        pixels = pixels.to(dtype).contiguous(memory_format=layout)
        autocast = self.precision == "bf16" and dtype == torch.float32
        encoder = self._encoder(dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            if gaze is None or not self.token_width:
                features = encoder.encode_image(pixels)
            else:
                features = _gazed(encoder, pixels, gaze, scale=self.logit_scale)
        return normalize(features.float(), dim=-1)

    @cached_property  # copying them to a GPU at every call would make it wait
    def _normal(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the channels, each (3, 1, 1)."""
        mean, std = torch.tensor([self.preprocess["mean"], self.preprocess["std"]], device=self.device)
        return mean[:, None, None], std[:, None, None]

    @property
    def _working_type(self) -> torch.dtype:
        """The dtype of the working copy. For bf16 on a CPU the tower is cast once: autocast casts at every call."""
        cast_once = self.precision == "bf16" and self.device.type == "cpu"
        return torch.bfloat16 if cast_once else torch.float32

    def _encoder(self, dtype: torch.dtype) -> Any:
        """The model with its image tower replaced by a working copy in ``dtype``."""
        if dtype not in self._encoders:
            encoder = copy.copy(self.model)
            # ``embed`` may be the first caller: buffers copied in inference mode could never take part in a gradient.
            with torch.inference_mode(False):
                visual = working_copy(self.model.visual, dtype=dtype)
            # ``copy.copy`` shares ``_modules`` with the model: replace the dictionary, do not change it.
            encoder._modules = {**self.model._modules, "visual": visual}
            self._encoders[dtype] = encoder
        return self._encoders[dtype]

    def _gradient_chunk(self, images: Tensor) -> int:
        """How many images may be encoded at once; all of them if no gradient is recorded."""
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in self.model.visual.parameters()):
            return len(images)
        dtype = self._working_type
        if dtype not in self._kept_bytes:
            weights = self._encoder(dtype).visual.parameters()
            self._kept_bytes[dtype] = max(1, _bytes_kept(lambda: self._encode(images[:1]), beside=weights))
        return max(1, int(ACTIVATION_SHARE * _memory(self.device)) // self._kept_bytes[dtype])

    @torch.inference_mode()
    def embed(self, images: Tensor, gaze: Gaze | None = None) -> Tensor:
        """Encode images as ``encode_images`` does, without gradients, in chunks that bound the memory used."""
        return torch.cat([self._encode(chunk, gaze) for chunk in torch.split(images, IMAGE_CHUNK)])

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
            for prefix, module in self.model.visual.named_modules()
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


def _gazed(encoder: Any, pixels: Tensor, gaze: Gaze, *, scale: float) -> Tensor:
    """Features (B, D) of the images with the prompts, plus those of the salient patches if asked for."""
    visual = encoder.visual
    with tokens_of(visual, gaze.prompts) as recorded:
        features = normalize(encoder.encode_image(pixels).float(), dim=-1)
    if not gaze.salient:
        return features
    patches = visual.ln_post(recorded[0][:, 1:]) @ visual.proj  # without the class token
    return features + saliency_pooled(patches.float(), scale=scale)


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
