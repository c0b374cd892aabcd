"""Load an open_clip backbone by its identifier, and refuse combinations that would silently lose accuracy."""

import copy
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from finealign.backbone.hub import cached_commit, fetch
from finealign.backbone.identifiers import explain_identifier, not_open_clips
from finealign.backbone.model import CONFIG, WEIGHTS, OpenClipBackbone
from finealign.errors import BackboneError, one_line, unknown_name
from finealign.types import Precision

THIN = 32  # an image whose sides differ by more than this factor is cropped to its middle before it is resized


def load_backbone(
    identifier: str, *, device: torch.device | str = "cpu", precision: Precision = "fp32", seed: int = 0
) -> OpenClipBackbone:
    """Load a backbone: ``ARCH/PRETRAINED``, ``ARCH/random``, ``hf-hub:NAME[@REVISION]`` or ``local-dir:PATH``.

    ``hf-hub:`` downloads only safetensors weights, the configuration and the tokenizer's files. ``ARCH/PRETRAINED``
    downloads weights that open_clip lists. Neither downloads code. ``ARCH/random`` builds the architecture with
    random weights drawn from ``seed``, for tests and timing; other identifiers ignore ``seed``.

    Raises BackboneError if the name is unknown, if the weights were trained with QuickGELU and the architecture is
    built without it (or the reverse), or if the weights cannot be downloaded or loaded.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    device = torch.device(device)
    name, tag = _split(identifier)
    origin: dict[str, str] = {}
    with warnings.catch_warnings():
        # timm and open_clip emit deprecation warnings about their own code; the user can do nothing about them.
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
        except Exception as error:  # open_clip, timm and the hub raise many types; the user gets one clear message
            raise _load_failure(identifier, error) from error
    if tag not in (None, "random") and (repository := _repository(name, tag)):
        origin = {"repository": repository, "revision": cached_commit(repository)}
    model = model.to(device).eval().requires_grad_(False)
    backbone = OpenClipBackbone(
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
    """Raises ValueError if this configuration would make transformers run code that is shipped with the tokenizer."""
    options = config["text_cfg"].get("tokenizer_kwargs", {})
    if options.get("trust_remote_code"):
        raise ValueError("its tokenizer_kwargs ask for code of its own to be run, by trust_remote_code; remove that")


def _refuse_oversized(config: dict[str, Any], folder: Path) -> None:
    """Raises ValueError if the configuration describes a far larger model than the weight files can hold.

    Building such a model could exhaust the memory or take for ever. The estimate is only a lower bound; whether the
    weights really fit is checked when they are loaded.
    """
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth")]
    weight_bytes = sum(path.stat().st_size for path in files)
    for name in ("vision_cfg", "text_cfg", "multimodal_cfg"):
        tower = config.get(name) or {}
        layers, width, side = tower.get("layers", 1), tower.get("width", 1), tower.get("image_size", 1)
        blocks = sum(layers) if isinstance(layers, list) else layers
        patches = (max(side) if isinstance(side, list) else side) / (tower.get("patch_size") or 32)  # ResNets have none
        counts = [value for value in tower.values() if isinstance(value, int)]
        needed = max(
            500 * blocks,  # the file's header alone: names, shapes and offsets of a layer's tensors
            blocks * width**2 * tower.get("mlp_ratio", 1),
            width * tower.get("vocab_size", 1),
            width * patches**2 / 100,  # open_clip resizes position embeddings, so the file may hold fewer of them
            config["embed_dim"],
            *counts,
        )
        if needed > weight_bytes:
            raise ValueError(f"{name} describes a tower that the {weight_bytes:,} bytes of weights cannot fill")


def _refuse_wrong_preprocessing(preprocess: dict[str, Any], geometry: Callable[[Image.Image], Image.Image]) -> None:
    """Raises an error of some type for settings that would fail, or give nonsense, at the first image."""
    values = torch.tensor([preprocess["mean"], preprocess["std"]], dtype=torch.float64)
    if values.shape != (2, 3) or not values.isfinite().all() or values[1].min() <= 0:
        raise ValueError("preprocess_cfg wants mean and std as three numbers each, std above 0")
    size = preprocess["size"]
    width, height = (size, size) if isinstance(size, int) else size
    if width != height or geometry(Image.new("RGB", (3, 2))).size != (width, height):
        raise ValueError(f"preprocess_cfg makes no square image of {size!r:.100} pixels")


class _Geometry:
    """The steps of open_clip's preprocessing that act on the PIL image: resize, crop and colour conversion."""

    def __init__(self, transforms: Iterable[Any]) -> None:
        self.steps = [step for step in transforms if type(step).__name__ not in ("MaybeToTensor", "Normalize")]
        names = [type(step).__name__ for step in self.steps[:2]]
        # These scale the shorter side, then crop the centre: of a very long image most enlarged pixels are thrown away.
        self.keeps_centre = names == ["Resize", "CenterCrop"] and not isinstance(self.steps[0].size, tuple)

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.keeps_centre and max(image.size) > THIN * min(image.size):
            image = _centre(image)
        for step in self.steps:
            image = step(image)
        return image


def _centre(image: Image.Image) -> Image.Image:
    """Crop a very long image to its middle, THIN / 2 times as long as its shorter side; the centre does not move."""
    longest = THIN // 2 * min(image.size)
    # The length stays odd or even, so that the same number of pixels is cut off at both ends.
    width, height = (side if side <= longest else longest + (side - longest) % 2 for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _split(identifier: str) -> tuple[str, str | None]:
    """The name for open_clip and the tag of its weights; the tag is None for ``hf-hub:`` and ``local-dir:``."""
    import open_clip

    if identifier.startswith("local-dir:"):
        folder = Path(identifier.removeprefix("local-dir:")).expanduser()
        if not (folder / CONFIG).is_file():
            raise BackboneError(not_open_clips(folder))
        return f"local-dir:{folder}", None
    if identifier.startswith("hf-hub:"):
        return identifier, None
    name, _, tag = identifier.rpartition("/")
    if name not in open_clip.list_models():
        raise BackboneError(explain_identifier(identifier, list_backbones()))
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
    better = f"{name}-quickgelu" if weights_quick else name.removesuffix("-quickgelu")
    advice = f"Use {better}/{tag}." if better != name and better in open_clip.list_models() else "Use other weights."
    trained, built = ("with", "without") if weights_quick else ("without", "with")
    raise BackboneError(
        f"The weights {tag!r} were trained {trained} QuickGELU, but the architecture {name!r} is built {built} it: "
        f"the pair loads and silently loses 4 to 20 points of accuracy. {advice}"
    )


def _load_failure(identifier: str, error: Exception) -> BackboneError:
    if identifier.startswith("local-dir:"):
        return BackboneError(
            f"{identifier} does not load: {one_line(error)}. "
            f"Wanted: an open_clip folder whose {WEIGHTS} fits its {CONFIG}."
        )
    return BackboneError(
        f"The weights of {identifier} cannot be had: the model hub is not within reach, or does not hold them. Without "
        f"a hub: --backbone local-dir:PATH, with PATH an open_clip folder ({CONFIG} and {WEIGHTS}) copied from a "
        "machine that has one; or set HF_HOME to a cache that already holds the weights. `finealign doctor` shows "
        f"what is within reach. (open_clip said: {one_line(error)})"
    )


def _model_config(name: str) -> dict[str, Any]:
    import open_clip

    if name.startswith("local-dir:"):
        path = Path(name.removeprefix("local-dir:")) / CONFIG
    else:
        return copy.deepcopy(dict(open_clip.get_model_config(name)))
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
    return config


def _repository(name: str, tag: str) -> str:
    """The hub repository that open_clip loads these weights from; empty if they are not on the hub."""
    import open_clip

    return str((open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub", "")).rstrip("/")


def imagenet_names() -> list[str]:
    """ImageNet's class names as OpenAI chose them for CLIP, ordered by WordNet ID. Some names occur twice."""
    from open_clip import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def list_backbones() -> list[str]:
    """All ``ARCH/PRETRAINED`` pairs of open_clip that use the activation their weights were trained with, sorted."""
    import open_clip

    pairs = []
    for name, tag in open_clip.list_pretrained():
        try:
            _refuse_wrong_activation(name, tag)
        except BackboneError:
            continue
        pairs.append(f"{name}/{tag}")
    return sorted(pairs)
