"""The only room that knows open_clip: load, tokenise, encode, list what may be trained, save."""

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from finealign.alignment import saliency_pooled
from finealign.errors import BackboneError, unknown_name
from finealign.hub import cached_commit, fetch
from finealign.storage import save_tensors
from finealign.towers import is_convolutional, is_normalisation, token_width, tokens_of, working_copy
from finealign.types import TextFeatures, Texts

Precision = Literal["fp32", "bf16"]
WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
# Larger chunks fall out of the processor's caches and gain nothing; the result does not depend on it beyond rounding.
IMAGE_CHUNK, TEXT_CHUNK = 32, 256
# The share of memory that a step may fill with what its backward pass needs; past it, chunks are encoded again there.
# Of all memory, not of what is free: the same machine must split a batch the same way each time.
ACTIVATION_SHARE = 1 / 6
THIN = 32  # a side this many times the other makes a strip, of which only the middle is scaled


@dataclass(frozen=True, eq=False)
class Gaze:
    """How an image is looked at whole, where not as the tower does: with learned prompts, by its salient patches.

    Towers without tokens (``Backbone.token_width`` 0) look as they always do.
    """

    prompts: Tensor | None = None  # (P, W), behind the tokens of every image
    salient: bool = False  # whether the embedding is half the tower's own, half that of the salient patches


@dataclass
class Backbone:
    """A loaded image-text model and what is needed to feed it.

    Always in evaluation mode, so that BatchNorm's running statistics stay as they are.
    """

    identifier: str
    origin: dict[str, str]  # "repository" and "revision" of a hub's model, else empty
    model: Any  # open_clip's CLIP, CustomTextCLIP or CoCa
    tokenizer: Any
    config: dict[str, Any]  # open_clip's model_cfg
    preprocess: dict[str, Any]  # open_clip's preprocess_cfg
    geometry: Callable[[Image.Image], Image.Image]
    device: torch.device
    precision: Precision
    _encoders: dict[torch.dtype, Any] = field(default_factory=dict, init=False, repr=False)
    _kept_bytes: dict[torch.dtype, int] = field(default_factory=dict, init=False, repr=False)
    _texts: tuple[Texts, TextFeatures] | None = field(default=None, init=False, repr=False)

    @property
    def input_size(self) -> int:
        """Side of the square input in pixels."""
        size = self.preprocess["size"]
        return int(size if isinstance(size, int) else size[0])

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(float(value) for value in self.preprocess["mean"])

    @property
    def logit_scale(self) -> float:
        """The factor the model was trained to multiply cosines by (100 for CLIP)."""
        return float(self.model.logit_scale.detach().exp())

    @cached_property
    def checksum(self) -> str:
        """SHA-256 over the weights as they were when first asked, by name: of the same model everywhere."""
        found = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    @property
    def token_width(self) -> int:
        """Width of the image tower's tokens, for prompts and patches; 0 if it is no open_clip transformer."""
        return token_width(self.model.visual)

    def encode_images(self, images: Tensor, seen_by: "Gaze | None" = None) -> Tensor:
        """Normalised embeddings of uint8 (B, 3, S, S) images on any device: (B, D) float32 on the backbone's.

        Gradients flow into the normalisation parameters, and into the gaze's prompts, unless the caller forbids it.
        When what they need of a batch this large does not fit, it is encoded in chunks and each once more in the
        backward pass: slower by a forward pass, the same but for rounding.
        """
        chunk = self._gradient_chunk(images)
        if len(images) <= chunk:
            return self._encode(images, seen_by)
        parts = [
            checkpoint(self._encode, part, seen_by, use_reentrant=False, preserve_rng_state=False)
            for part in torch.split(images, chunk)
        ]
        return torch.cat(parts)

    def _encode(self, images: Tensor, seen_by: "Gaze | None" = None) -> Tensor:
        dtype = self._working_type
        mean, std = self._normal
        layout = torch.channels_last if self.convolutional else torch.contiguous_format
        pixels = images.to(self.device, non_blocking=True).float().div_(255).sub_(mean).div_(std)
        pixels = pixels.to(dtype).contiguous(memory_format=layout)
        autocast = self.precision == "bf16" and dtype == torch.float32
        encoder = self._encoder(dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            if seen_by is None or not self.token_width:
                features = encoder.encode_image(pixels)
            else:
                features = _gazed(encoder, pixels, seen_by, scale=self.logit_scale)
        return normalize(features.float(), dim=-1)

    @cached_property  # a copy to a GPU at every call would have it wait
    def _normal(self) -> tuple[Tensor, Tensor]:
        mean, std = torch.tensor([self.preprocess["mean"], self.preprocess["std"]], device=self.device)
        return mean[:, None, None], std[:, None, None]

    @property
    def _working_type(self) -> torch.dtype:
        """On a CPU the tower is cast whole: autocast would cast every weight anew at each call."""
        whole = self.precision == "bf16" and self.device.type == "cpu"
        return torch.bfloat16 if whole else torch.float32

    def _encoder(self, dtype: torch.dtype) -> Any:
        """The model around a working copy of its image tower."""
        if dtype not in self._encoders:
            encoder = copy.copy(self.model)
            with torch.inference_mode(False):  # or its buffers could never take part in a gradient
                visual = working_copy(self.model.visual, dtype=dtype)
            encoder._modules = {**self.model._modules, "visual": visual}
            self._encoders[dtype] = encoder
        return self._encoders[dtype]

    def _gradient_chunk(self, images: Tensor) -> int:
        """How many images may be encoded with gradient at once; all of them where none is recorded."""
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in self.model.visual.parameters()):
            return len(images)
        dtype = self._working_type
        if dtype not in self._kept_bytes:
            weights = self._encoder(dtype).visual.parameters()
            self._kept_bytes[dtype] = max(1, _bytes_kept(lambda: self._encode(images[:1]), beside=weights))
        return max(1, int(ACTIVATION_SHARE * _memory(self.device)) // self._kept_bytes[dtype])

    @torch.inference_mode()
    def embed(self, images: Tensor, seen_by: "Gaze | None" = None) -> Tensor:
        """As ``encode_images`` without gradients, in chunks that bound the memory."""
        return torch.cat([self._encode(chunk, seen_by) for chunk in torch.split(images, IMAGE_CHUNK)])

    @torch.inference_mode()
    def encode_texts(self, texts: Texts) -> TextFeatures:
        """The class names in every template and all descriptions, in float32; the same texts are encoded once.

        Raises BackboneError when a text is longer than the tokenizer's window, which would cut it silently.
        """
        if self._texts is not None and self._texts[0] == texts:
            return self._texts[1]
        prompts = [template.replace("{}", name) for name in texts.classes for template in texts.templates]
        sentences = [sentence for group in texts.descriptions for sentence in group]
        encoded = self.encode_sentences(prompts + sentences)
        names = encoded[: len(prompts)].reshape(len(texts.classes), len(texts.templates), -1).mean(1)
        class_of = [index for index, group in enumerate(texts.descriptions) for _ in group]
        features = TextFeatures(
            names=normalize(names, dim=-1),
            descriptions=encoded[len(prompts) :],
            class_of=torch.tensor(class_of, device=self.device),
        )
        self._texts = texts, features
        return features

    @torch.inference_mode()
    def encode_sentences(self, sentences: Sequence[str]) -> Tensor:
        """Normalised embeddings of texts (n, D), float32. Raises BackboneError as ``encode_texts`` does."""
        features = []
        for start in range(0, len(sentences), TEXT_CHUNK):
            chunk = list(sentences[start : start + TEXT_CHUNK])
            self._refuse_overflow(chunk)
            tokens = self.tokenizer(chunk).to(self.device)
            features.append(normalize(self.model.encode_text(tokens).float(), dim=-1))
        return torch.cat(features)

    @property
    def window(self) -> int:
        """How many tokens of a text are read."""
        return int(self.tokenizer(["a"]).shape[1])

    def beyond_window(self, sentences: Sequence[str]) -> list[bool]:
        """Whether each text is longer than what is read of one.

        Tokenised with room to spare, a text that fits has nothing but padding after the window.
        """
        window = self.window
        padding = self.tokenizer(["a"], context_length=2 * window)[0, -1]
        found: list[bool] = (
            (self.tokenizer(list(sentences), context_length=2 * window)[:, window:] != padding).any(1).tolist()
        )
        return found

    def _refuse_overflow(self, sentences: list[str]) -> None:
        cut = [text for text, longer in zip(sentences, self.beyond_window(sentences), strict=True) if longer]
        if cut:
            raise BackboneError(
                f"{len(cut)} texts are longer than the {self.window} tokens that {self.identifier} reads, and would be "
                f"cut silently. The first: {cut[0]!r:.120}. Shorten them."
            )

    @property
    def convolutional(self) -> bool:
        """Whether the image tower is a convolutional one."""
        return is_convolutional(self.model.visual)

    def norm_parameters(self) -> dict[str, nn.Parameter]:
        """Scale and shift of every normalisation layer of the image tower, by name. Step 8 of METHOD.

        Raises BackboneError when the tower has none.
        """
        found = {
            f"{prefix}.{name}" if prefix else name: parameter
            for prefix, module in self.model.visual.named_modules()
            if is_normalisation(module)
            for name, parameter in module.named_parameters(recurse=False)
        }
        if not found:
            raise BackboneError(
                f"{self.identifier} has no normalisation layer in its image tower, so there is nothing to adapt there. "
                "Use training.learn=anchors."
            )
        return found

    def load_norms(self, values: Mapping[str, Tensor]) -> None:
        """Put back parameters that ``norm_parameters`` listed."""
        parameters = self.norm_parameters()
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)

    @contextmanager
    def with_norms(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """The backbone with other normalisation parameters for a while, as those it started from."""
        current = {name: parameter.detach().clone() for name, parameter in self.norm_parameters().items()}
        self.load_norms(values)
        try:
            yield
        finally:
            self.load_norms(current)

    def save(self, folder: Path) -> None:
        """Write an open_clip local directory: configuration, weights as safetensors, and the tokenizer's own files."""
        folder.mkdir(parents=True, exist_ok=True)
        described = {"model_cfg": self.config, "preprocess_cfg": self.preprocess}
        (folder / CONFIG).write_text(json.dumps(described, indent=1), encoding="utf-8")
        save_tensors(self.model.state_dict(), folder / WEIGHTS)
        inner: Any = getattr(self.tokenizer, "tokenizer", None)
        if hasattr(inner, "save_pretrained"):
            inner.save_pretrained(folder)


def _gazed(encoder: Any, pixels: Tensor, gaze: Gaze, *, scale: float) -> Tensor:
    visual = encoder.visual
    with tokens_of(visual, gaze.prompts) as seen:
        whole = normalize(encoder.encode_image(pixels).float(), dim=-1)
    if not gaze.salient:
        return whole
    patches = visual.ln_post(seen[0][:, 1:]) @ visual.proj
    return whole + saliency_pooled(patches.float(), scale=scale)


def load_backbone(
    identifier: str, *, device: torch.device | str = "cpu", precision: Precision = "fp32", seed: int = 0
) -> Backbone:
    """Load ``ARCH/PRETRAINED``, ``ARCH/random``, ``hf-hub:NAME[@REVISION]`` or ``local-dir:PATH``.

    By ``hf-hub:`` only safetensors and texts are fetched; by ARCH/PRETRAINED what open_clip knows, never code.
    ``random`` builds the architecture with weights drawn from ``seed``: for tests and timing. Raises BackboneError for
    an unknown name, for weights that were trained with QuickGELU in a tower without it (and the reverse), and when
    the weights cannot be had.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    device = torch.device(device)
    name, tag = _split(identifier)
    origin: dict[str, str] = {}
    with warnings.catch_warnings():
        # timm and open_clip announce deprecations of their own at load; none is the user's to act on.
        warnings.simplefilter("ignore")
        try:
            if name.startswith("hf-hub:"):
                folder, commit = fetch(name.removeprefix("hf-hub:"))
                origin = {"repository": name.removeprefix("hf-hub:").partition("@")[0], "revision": commit}
                name = f"local-dir:{folder}"
            config = _model_config(name)
            _refuse_code(config)
            if name.startswith("local-dir:"):
                _refuse_oversized(config, Path(name.removeprefix("local-dir:")))
            if tag == "random":
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    model = open_clip.create_model(name, pretrained=None, pretrained_text=False)
            else:
                model = open_clip.create_model(name, pretrained=tag, pretrained_text=False, require_pretrained=True)
            tokenizer = open_clip.get_tokenizer(name)
            preprocess = dict(open_clip.get_model_preprocess_cfg(model))
            transform = image_transform_v2(PreprocessCfg(**preprocess), is_train=False)
            geometry = _Geometry(transform.transforms)
            _refuse_wrong_preprocessing(preprocess, geometry)
        except BackboneError:
            raise
        except Exception as error:  # open_clip, timm and the hub raise whatever they like; the user gets one sentence
            raise _load_failure(identifier, error) from error
    if tag not in (None, "random") and (repository := _repository(name, tag)):
        origin = {"repository": repository, "revision": cached_commit(repository)}
    model = model.to(device).eval().requires_grad_(False)
    backbone = Backbone(
        identifier=identifier,
        origin=origin,
        model=model,
        tokenizer=tokenizer,
        config=config,
        preprocess=preprocess,
        geometry=geometry,
        device=device,
        precision=precision,
    )
    if backbone.convolutional:
        backbone.model.visual.to(memory_format=torch.channels_last)
    return backbone


def _refuse_code(config: dict[str, Any]) -> None:
    """Raises ValueError where transformers, asked for a tokenizer by these settings, would run what lies beside it."""
    options = config["text_cfg"].get("tokenizer_kwargs", {})
    if options.get("trust_remote_code"):
        raise ValueError("its tokenizer_kwargs ask for code of its own to be run, by trust_remote_code; remove that")


def _refuse_oversized(config: dict[str, Any], folder: Path) -> None:
    """Raises ValueError where the weights are far too few: such a model could fill the memory, or never be built.

    A bound from below: whether the weights fit is found when they are loaded.
    """
    weights = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth")]
    room = sum(path.stat().st_size for path in weights)
    for name in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        tower = config.get(name) or {}
        layers, width, side = tower.get("layers", 1), tower.get("width", 1), tower.get("image_size", 1)
        blocks = sum(layers) if isinstance(layers, list) else layers
        patches = (max(side) if isinstance(side, list) else side) / (tower.get("patch_size") or 32)  # a ResNet has none
        counts = [value for value in tower.values() if isinstance(value, int)]
        least = max(
            500 * blocks,  # of a layer, the names, shapes and places of its tensors alone
            blocks * width**2 * tower.get("mlp_ratio", 1),
            width * tower.get("vocab_size", 1),
            width * patches**2 / 100,  # open_clip reduces and enlarges the positions
            config["embed_dim"],
            *counts,
        )
        if least > room:
            raise ValueError(f"{name} describes a tower that the {room:,} bytes of weights cannot fill")


def _refuse_wrong_preprocessing(preprocess: dict[str, Any], geometry: Callable[[Image.Image], Image.Image]) -> None:
    """Raises what it likes for settings that would come out as an error, or as nonsense, at the first image."""
    values = torch.tensor([preprocess["mean"], preprocess["std"]], dtype=torch.float64)
    if values.shape != (2, 3) or not values.isfinite().all() or values[1].min() <= 0:
        raise ValueError("preprocess_cfg wants mean and std as three numbers each, std above 0")
    size = preprocess["size"]
    width, height = (size, size) if isinstance(size, int) else size
    if width != height or geometry(Image.new("RGB", (3, 2))).size != (width, height):
        raise ValueError(f"preprocess_cfg makes no square image of {size!r:.100} pixels")


class _Geometry:
    """The part of open_clip's preprocessing that moves pixels: all before the tensor is made."""

    def __init__(self, transforms: Iterable[Any]) -> None:
        self.steps = [step for step in transforms if type(step).__name__ not in ("MaybeToTensor", "Normalize")]
        names = [type(step).__name__ for step in self.steps[:2]]
        # A shorter side to scale by, then the centre: the far ends of a strip would be enlarged for nothing.
        self.keeps_centre = names == ["Resize", "CenterCrop"] and not isinstance(self.steps[0].size, tuple)

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.keeps_centre and max(image.size) > THIN * min(image.size):
            image = _centre(image)
        for step in self.steps:
            image = step(image)
        return image


def _centre(image: Image.Image) -> Image.Image:
    """The middle of a strip, half as long as THIN allows; its centre stays where it is, to half a pixel."""
    room = THIN // 2 * min(image.size)
    width, height = (side if side <= room else room + (side - room) % 2 for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _split(identifier: str) -> tuple[str, str | None]:
    import open_clip

    if identifier.startswith("local-dir:"):
        folder = Path(identifier.removeprefix("local-dir:")).expanduser()
        if not (folder / CONFIG).is_file():
            raise BackboneError(
                f"No open_clip model in {folder}: {CONFIG} is not there. Wanted: a folder with {CONFIG} and {WEIGHTS}."
            )
        return f"local-dir:{folder}", None
    if identifier.startswith("hf-hub:"):
        return identifier, None
    name, separator, tag = identifier.rpartition("/")
    if not separator:
        raise BackboneError(
            f"Backbone {identifier!r} names no weights. Wanted: ARCH/PRETRAINED (as ViT-B-32-quickgelu/openai), "
            "ARCH/random, hf-hub:NAME or local-dir:PATH. `finealign models` lists the pairs."
        )
    if name not in open_clip.list_models():
        raise BackboneError(unknown_name("architecture", name, open_clip.list_models()))
    if tag == "random":
        return name, tag
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        raise BackboneError(unknown_name(f"pretrained weights for {name}", tag, [*tags, "random"]))
    _refuse_wrong_activation(name, tag)
    return name, tag


def _refuse_wrong_activation(name: str, tag: str) -> None:
    import open_clip

    weights_quick = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    tower_quick = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
    if weights_quick == tower_quick:
        return
    other = f"{name}-quickgelu" if weights_quick else name.removesuffix("-quickgelu")
    advice = f"Use {other}/{tag}." if other != name and other in open_clip.list_models() else "Use other weights."
    trained, built = ("with", "without") if weights_quick else ("without", "with")
    raise BackboneError(
        f"The weights {tag!r} were trained {trained} QuickGELU, but the architecture {name!r} is built {built} it: "
        f"the pair loads and silently loses 4 to 20 points of accuracy. {advice}"
    )


def _load_failure(identifier: str, error: Exception) -> BackboneError:
    if identifier.startswith("local-dir:"):
        return BackboneError(
            f"{identifier} does not load: {_one_line(error)}. "
            f"Wanted: an open_clip folder whose {WEIGHTS} fits its {CONFIG}."
        )
    return BackboneError(
        f"The weights of {identifier} cannot be had: the model hub is not within reach, or does not hold them. Without "
        f"a hub: --backbone local-dir:PATH, with PATH an open_clip folder ({CONFIG} and {WEIGHTS}) copied from a "
        "machine that has one; or set HF_HOME to a cache that already holds the weights. `finealign doctor` shows "
        f"what is within reach. (open_clip said: {_one_line(error)})"
    )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def _model_config(name: str) -> dict[str, Any]:
    import open_clip

    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / CONFIG
    else:
        return copy.deepcopy(dict(open_clip.get_model_config(name)))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
    return found


def _repository(name: str, tag: str) -> str:
    import open_clip

    return str((open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub", "")).rstrip("/")


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def _bytes_kept(encode: Callable[[], Tensor], *, beside: Iterable[Tensor]) -> int:
    """What autograd keeps of a forward pass for the backward pass, beside the weights."""
    weights = {weight.untyped_storage().data_ptr() for weight in beside}
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:  # a linear layer keeps its weight as a transposed view
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encoded = encode()  # alive until the sum is taken, so that no address is used twice
    kept = sum(storages.values())
    del encoded
    return kept


def imagenet_names() -> list[str]:
    """ImageNet's classes in words, in the order of their wnids: those that OpenAI chose for CLIP, some twice."""
    from open_clip import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def list_backbones() -> list[str]:
    """Every ARCH/PRETRAINED pair of open_clip whose activation is the one its weights were trained with."""
    import open_clip

    pairs = []
    for name, tag in open_clip.list_pretrained():
        try:
            _refuse_wrong_activation(name, tag)
        except BackboneError:
            continue
        pairs.append(f"{name}/{tag}")
    return sorted(pairs)
