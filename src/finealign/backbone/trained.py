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

from finealign.backbone.build import build_model, preprocessing_for
from finealign.backbone.checkpoints import Checkpoint, file_origin, fill, read_checkpoint
from finealign.backbone.model import Parts
from finealign.backbone.text_tower import is_transformers, read_tokenizer, require_tower
from finealign.errors import BackboneError, display_path

PREPARED = ("mean", "std", "interpolation", "resize_mode")  # the settings of preprocess_cfg that weights go with
POSITIONS = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
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
    model = build_model(config)
    if _resized(config, model.state_dict(), checkpoint.weights):
        model = build_model(config)
    fill(model, checkpoint.weights, shown=shown, architecture=name)
    return Parts(
        model=model,
        tokenizer=read_tokenizer(name, config, f"{name}/{shown}"),
        config=config,
        preprocess=preprocessing_for(model, _preprocessing(name, checkpoint.settings)),
        origin=file_origin([file]),
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
        patch = RESNET_STRIDE if "attnpool" in name else int(own["visual.conv1.weight"].shape[-1])
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
