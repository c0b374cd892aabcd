"""Load a backbone by its identifier, and refuse combinations that would silently lose accuracy."""

import copy
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from finealign.backbone.build import build_model, preprocessing_for
from finealign.backbone.clip_folder import is_clip_folder, read_clip_folder
from finealign.backbone.hub import cached_commit, fetch
from finealign.backbone.identifiers import explain_identifier, folder_of_files, missing_file, not_open_clips
from finealign.backbone.model import CONFIG, WEIGHTS, OpenClipBackbone, Parts
from finealign.backbone.text_tower import (
    STUB,
    TEXT_TOWER,
    MissingTokenizer,
    StoredTower,
    TextTowerError,
    described_by,
    is_transformers,
    kept_in,
    read_tokenizer,
    require_tower,
    tower_settings,
)
from finealign.backbone.trained import read_trained
from finealign.config import WEIGHT_FILES
from finealign.errors import BackboneError, one_line, unknown_name
from finealign.types import Precision

THIN = 32  # an image whose sides differ by more than this factor is cropped to its middle before it is resized


def load_backbone(
    identifier: str,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    seed: int = 0,
    texts: bool = True,
) -> OpenClipBackbone:
    """Load a backbone: ``ARCH/PRETRAINED``, ``ARCH/FILE``, ``ARCH/random``, ``hf-hub:NAME`` or ``local-dir:PATH``.

    ``hf-hub:NAME[@REVISION]`` downloads only safetensors weights, the configuration and the tokenizer's files.
    ``ARCH/PRETRAINED`` downloads weights that open_clip lists. Neither downloads code. ``ARCH/FILE`` is the path of
    weights that were trained as ARCH, as open_clip's training saves them. ``local-dir:PATH`` is a folder of open_clip,
    or one that ``CLIPModel.save_pretrained`` of transformers wrote. ``ARCH/random`` builds the architecture with random
    weights drawn from ``seed``, for tests and timing; other identifiers ignore ``seed``.

    With ``texts`` False, a local folder of open_clip whose text tower cannot be built here, as its configuration is on
    a hub that is not within reach, is loaded all the same: it encodes images, and refuses texts.

    Raises BackboneError if the name is unknown, if the weights were trained with QuickGELU and the architecture is
    built without it (or the reverse), if they do not fit, or if they cannot be downloaded or loaded.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2

    device = torch.device(device)
    with warnings.catch_warnings():
        # timm and open_clip emit deprecation warnings about their own code; the user can do nothing about them.
        warnings.simplefilter("ignore")
        try:
            parts = _read(identifier, seed=seed, texts=texts)
            transform = image_transform_v2(PreprocessCfg(**parts.preprocess), is_train=False)
            geometry = _Geometry(transform.transforms)
            _refuse_wrong_preprocessing(parts.preprocess, geometry)
        except BackboneError:
            raise
        except Exception as error:  # open_clip, timm and the hub raise many types; the user gets one clear message
            raise _load_failure(identifier, error) from error
    backbone = OpenClipBackbone(
        identifier=identifier,
        origin=parts.origin,
        model=parts.model.to(device).eval().requires_grad_(False),
        tokenizer=parts.tokenizer,
        config=parts.config,
        preprocess=parts.preprocess,
        geometry=geometry,
        device=device,
        precision=precision,
    )
    if backbone.convolutional:
        backbone.model.visual.to(memory_format=torch.channels_last)
    return backbone


def _read(identifier: str, *, seed: int, texts: bool) -> Parts:
    """The parts of the backbone. Raises BackboneError, and errors of many types of the libraries."""
    if identifier.startswith("hf-hub:"):
        repository = identifier.removeprefix("hf-hub:")
        folder, commit = fetch(repository)
        parts = _from_folder(folder, identifier, texts=True)
        return replace(parts, origin={"repository": repository.partition("@")[0], "revision": commit})
    if identifier.startswith("local-dir:"):
        folder = Path(identifier.removeprefix("local-dir:")).expanduser()
        return _from_folder(folder, identifier, texts=texts)
    name, tag = _split(identifier)
    if tag.lower().endswith(WEIGHT_FILES):
        return read_trained(name, Path(tag).expanduser())
    return _from_open_clip(name, tag, seed)


def _from_folder(folder: Path, identifier: str, *, texts: bool) -> Parts:
    """The parts of a backbone in a folder of open_clip, or of transformers' CLIPModel."""
    import open_clip

    if not (folder / CONFIG).is_file():
        if is_clip_folder(folder):
            return read_clip_folder(folder)
        raise BackboneError(not_open_clips(folder))
    name = f"local-dir:{folder}"
    described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config: dict[str, Any] = described["model_cfg"]
    _refuse_code(config)
    kept = kept_in(folder, config)
    _refuse_oversized(config, folder, tower_settings(kept) if kept else {})
    try:
        tower = {"text_cfg": described_by(kept, config)} if kept else {}
        if is_transformers(config):
            require_tower(config, identifier, kept)
        model = open_clip.create_model(name, pretrained_text=False, require_pretrained=True, **tower)
        preprocess = dict(open_clip.get_model_preprocess_cfg(model))
    except TextTowerError as error:
        if texts or "multimodal_cfg" in config:  # whose third tower is built to fit the text tower
            raise
        model = _without_text_tower(folder, config, tower_settings(kept) if kept else {}, str(error))
        preprocess = preprocessing_for(model, described.get("preprocess_cfg") or {})
    try:
        tokenizer = read_tokenizer(name, config, identifier)
    except TextTowerError as error:
        if texts:
            raise
        tokenizer = MissingTokenizer(folder, str(error))
    return Parts(model=model, tokenizer=tokenizer, config=config, preprocess=preprocess, origin={})


def _without_text_tower(folder: Path, config: dict[str, Any], settings: dict[str, Any], why: str) -> Any:
    """The model in a folder with the weights of its text tower as they are stored. Raises errors of many types."""
    from safetensors.torch import load_file

    model = build_model({**config, "text_cfg": STUB, "custom_text": True})
    weights = load_file(folder / WEIGHTS)
    texts = {key.removeprefix("text."): value for key, value in weights.items() if key.startswith("text.")}
    model.text = StoredTower(texts, settings, why)
    model.load_state_dict({key: value for key, value in weights.items() if not key.startswith("text.")})
    return model


def _from_open_clip(name: str, tag: str, seed: int) -> Parts:
    """The parts of an architecture of open_clip with weights that it lists, or random ones."""
    import open_clip

    config = copy.deepcopy(dict(open_clip.get_model_config(name) or {}))
    _refuse_code(config)
    origin: dict[str, str] = {}
    if tag == "random":
        if is_transformers(config):
            require_tower(config, f"{name}/{tag}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = open_clip.create_model(name, pretrained=None, pretrained_text=False)
    else:
        model = open_clip.create_model(name, pretrained=tag, pretrained_text=False, require_pretrained=True)
        if repository := _repository(name, tag):
            origin = {"repository": repository, "revision": cached_commit(repository)}
    preprocess = dict(open_clip.get_model_preprocess_cfg(model))
    tokenizer = read_tokenizer(name, config, f"{name}/{tag}")
    return Parts(model=model, tokenizer=tokenizer, config=config, preprocess=preprocess, origin=origin)


def _refuse_code(config: dict[str, Any]) -> None:
    """Raises ValueError if this configuration would make transformers run code that is shipped with the tokenizer."""
    options = config["text_cfg"].get("tokenizer_kwargs", {})
    if options.get("trust_remote_code"):
        raise ValueError("its tokenizer_kwargs ask for code of its own to be run, by trust_remote_code; remove that")


def _refuse_oversized(config: dict[str, Any], folder: Path, text_tower: dict[str, Any]) -> None:
    """Raises ValueError if the configuration describes a far larger model than the weight files can hold.

    ``text_tower`` is the configuration of a text tower of transformers, or empty.

    Building such a model could exhaust the memory or take for ever. The estimate is only a lower bound; whether the
    weights really fit is checked when they are loaded.
    """
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pth")]
    weight_bytes = sum(path.stat().st_size for path in files)
    towers = {name: config.get(name) or {} for name in ("vision_cfg", "text_cfg", "multimodal_cfg")}
    for name in ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if name in text_tower:
            width = text_tower.get("hidden_size", text_tower.get("d_model", 1))
            towers[f"{TEXT_TOWER} ({name})"] = {**text_tower, "layers": text_tower[name], "width": width}
    for name, tower in towers.items():
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


def _split(identifier: str) -> tuple[str, str]:
    """An architecture that open_clip has, and the tag of its weights or the path of a file. Raises BackboneError."""
    import open_clip

    name, _, tag = identifier.partition("/")
    if not tag or name not in open_clip.list_models():
        raise BackboneError(explain_identifier(identifier, list_backbones()))
    if tag.lower().endswith(WEIGHT_FILES):
        if told := missing_file(name, tag):
            raise BackboneError(told)
        return name, tag
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in (*tags, "random"):
        if told := folder_of_files(name, tag):
            raise BackboneError(told)
        raise BackboneError(unknown_name(f"pretrained weights for {name}", tag, [*tags, "random"]))
    if tag != "random":
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
