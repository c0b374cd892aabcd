"""Weights that a user trained: an architecture of open_clip filled from a file, prepared for as it was trained.

The file tells the image size and the context window. What it does not tell is read from the ``params.txt`` that
open_clip's training writes, where that lies beside it: QuickGELU and how images were prepared. Without one, images are
prepared as for the weights that open_clip lists for the architecture, where those agree.
"""

import copy
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

from torch import Tensor

from finealign.backbone.checkpoints import Checkpoint, file_origin, fill, read_checkpoint
from finealign.backbone.model import Parts
from finealign.backbone.text_tower import is_transformers, read_tokenizer, require_tower
from finealign.errors import BackboneError, display_path

PREPARED = ("mean", "std", "interpolation", "resize_mode")  # the settings of preprocess_cfg that weights go with
POSITIONS = ("visual.positional_embedding", "visual.attnpool.positional_embedding", "visual.trunk.pos_embed")
PATCHES = ("visual.conv1.weight", "visual.trunk.patch_embed.proj.weight")
RESNET_STRIDE = 32  # pixels of the image to a place of a ResNet's last grid


def read_trained(name: str, file: Path) -> Parts:
    """The parts of the architecture ``name`` with the weights in ``file``.

    Raises BackboneError if the file is not one of weights, or they are not those of the architecture, and errors of
    many types of the libraries.
    """
    import open_clip

    shown = display_path(file)
    checkpoint = read_checkpoint(file)
    _refuse_other_architecture(checkpoint, name)
    config = copy.deepcopy(dict(open_clip.get_model_config(name) or {}))
    if is_transformers(config):
        require_tower(config, f"{name}/{shown}")
    if checkpoint.settings.get("force_quick_gelu") is True:
        config["quick_gelu"] = True
    if "logit_bias" in checkpoint.weights and config.get("init_logit_bias") is None:
        config["init_logit_bias"] = -10.0  # any number: it says that there is one, as in training with --siglip
    preprocess = _preprocessing(name, checkpoint.settings)
    model = _build(name, config, preprocess)
    if _resized(config, model.state_dict(), checkpoint.weights):
        model = _build(name, config, preprocess)
    fill(model, checkpoint.weights, shown=shown, architecture=name)
    return Parts(
        model=model,
        tokenizer=read_tokenizer(name, config, f"{name}/{shown}"),
        config=config,
        preprocess=dict(open_clip.get_model_preprocess_cfg(model)),
        origin=file_origin([file]),
    )


def _build(name: str, config: Mapping[str, Any], preprocess: Mapping[str, Any]) -> Any:
    """The model that ``config`` describes, which is that of ``name`` but for what a training can change."""
    import open_clip

    return open_clip.create_model(
        name,
        load_weights=False,
        pretrained_text=False,
        force_quick_gelu=bool(config.get("quick_gelu")),
        force_image_size=config["vision_cfg"].get("image_size"),
        force_context_length=config["text_cfg"].get("context_length"),
        force_preprocess_cfg=dict(preprocess),
        **({"init_logit_bias": config["init_logit_bias"]} if "init_logit_bias" in config else {}),
    )


def _refuse_other_architecture(checkpoint: Checkpoint, name: str) -> None:
    """Raises BackboneError where the training says that it was of another architecture of open_clip."""
    import open_clip

    trained = str(checkpoint.settings.get("model", "")).replace("/", "-")
    if trained in open_clip.list_models() and trained != name:
        shown = display_path(checkpoint.file)
        raise BackboneError(
            f"The weights of {shown} are not those of {name}: open_clip's training, which wrote them, was of "
            f"{trained}. Type {trained}/{shown}."
        )


def _resized(config: Mapping[str, Any], own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> bool:
    """Set the image size and the context window in ``config`` to those of the weights. Returns whether one changed."""
    changed = False
    image, text = config["vision_cfg"], config["text_cfg"]
    for name in POSITIONS:
        side = image.get("image_size", 224)
        if name not in own or name not in weights or not isinstance(side, int):
            continue
        patch = next(
            (int(own[one].shape[-1]) for one in PATCHES if one in own and "attnpool" not in name), RESNET_STRIDE
        )
        places, found = (int(one[name].shape[-2]) for one in (own, weights))
        beside = places - (side // patch) ** 2  # places that are no patch, as the class token's
        grid = isqrt(max(0, found - beside))
        if found != places and beside >= 0 and grid > 0 and grid**2 == found - beside:
            image["image_size"], changed = grid * patch, True
    for name in ("positional_embedding", "text.positional_embedding"):
        theirs = weights.get(name, weights.get(name.removeprefix("text.")))
        if name in own and theirs is not None and theirs.shape[0] != own[name].shape[0]:
            text["context_length"] = text.get("context_length", 77) + int(theirs.shape[0] - own[name].shape[0])
            changed = True
    return changed


def _preprocessing(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How the images of a training were prepared, where that is known or agreed upon; else empty."""
    import open_clip

    if "image_mean" in settings:  # of a params.txt
        known = open_clip.get_pretrained_cfg(name, str(settings.get("pretrained") or "")) or {}
        found = {key: known[key] for key in PREPARED if known.get(key) is not None}
        return found | {key: settings[f"image_{key}"] for key in PREPARED if settings.get(f"image_{key}") is not None}
    tags = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    kinds = [{key: tag[key] for key in PREPARED if tag.get(key) is not None} for tag in tags]
    return kinds[0] if kinds and all(kind == kinds[0] for kind in kinds) else {}
