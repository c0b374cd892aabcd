"""Folders that ``CLIPModel.save_pretrained`` of transformers wrote, read as open_clip's CLIP, which computes the same.

transformers itself is needed only where the tokenizer is not CLIP's own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finealign.backbone.checkpoints import file_origin, fill, read_weights
from finealign.backbone.clip_names import open_clip_weights
from finealign.backbone.model import Parts
from finealign.errors import BackboneError, display_path, sentence

SETTINGS, ADAPTER = "config.json", "adapter_config.json"
SINGLE = ("model.safetensors", "pytorch_model.bin")
TOWER = {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu"}
# What transformers takes for a value that config.json leaves out.
VISION = TOWER | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
TEXT = TOWER | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "eos_token_id": 49407,
}
PROCESSOR: Mapping[str, Any] = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],  # OpenAI's, which open_clip takes as well
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
ACTIVATIONS: Mapping[str, dict[str, Any] | None] = {
    "quick_gelu": None,
    "gelu": None,
    "gelu_new": {"approximate": "tanh"},
    "gelu_pytorch_tanh": {"approximate": "tanh"},
}
# What other folders of transformers are, by the model_type in their config.json.
OTHERS = {
    "siglip": "SigLIP. open_clip has it under names of its own, as ViT-B-16-SigLIP/webli",
    "siglip2": "SigLIP 2. open_clip has it under names of its own, as ViT-B-16-SigLIP2/webli",
    "vision-text-dual-encoder": "a VisionTextDualEncoderModel, two towers of any kind",
    "chinese_clip": "Chinese-CLIP, whose text tower is a BERT",
    "clip_vision_model": "CLIP's image tower alone, without the text tower",
    "clip_text_model": "CLIP's text tower alone, without the image tower",
}


def is_clip_folder(folder: Path) -> bool:
    """Whether the folder is one of a CLIPModel of transformers."""
    return _json(folder / SETTINGS).get("model_type") == "clip"


def what_transformers_saved(folder: Path) -> str:
    """What a folder of transformers or peft is that is not read, in a sentence or two; empty for any other folder."""
    if (folder / ADAPTER).is_file():
        base = _json(folder / ADAPTER).get("base_model_name_or_path")
        of = f" of {base!r:.200}" if isinstance(base, str) and base else ""
        return (
            f"What is there is an adapter (LoRA){of}: a change to another model's weights. Merge it first, with peft "
            "model.merge_and_unload().save_pretrained(FOLDER), and give that folder."
        )
    if not (folder / SETTINGS).is_file():
        return ""
    kind = _json(folder / SETTINGS).get("model_type")
    told = OTHERS.get(kind, f"a model of the type {kind!r:.100}") if isinstance(kind, str) else "no CLIPModel"
    return f"What is there is a model for transformers ({SETTINGS}): {told}. Of those, CLIPModel alone is read."


def read_clip_folder(folder: Path) -> Parts:
    """Read the folder.

    Raises BackboneError for what open_clip's CLIP cannot compute, and for weights that do not fit.
    """
    import open_clip

    shown = display_path(folder)
    settings = _json(folder / SETTINGS)
    vision, text = _tower(settings, "vision", VISION), _tower(settings, "text", TEXT)
    try:
        config = _configuration(settings, vision, text)
        preprocess = _preprocessing(folder, config["vision_cfg"]["image_size"])
    except (TypeError, ValueError, KeyError, ZeroDivisionError) as error:
        raise BackboneError(f"{shown} does not load: its settings are not CLIP's: {sentence(error)}") from error
    files = _files(folder)
    weights = {name: value for file in files for name, value in read_weights(file).items()}
    _refuse_oversized(vision, text, weights, shown)
    tokenizer = _tokenizer(folder, config["text_cfg"])
    model = open_clip.CLIP(**config)
    described = f"the CLIPModel that its {SETTINGS} describes"
    advice = f"Copy {SETTINGS} and the weights of one model, or save it again with save_pretrained."
    fill(model, open_clip_weights(weights), shown=shown, architecture=described, advice=advice)
    return Parts(model=model, tokenizer=tokenizer, config=config, preprocess=preprocess, origin=file_origin(files))


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file or it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _tower(settings: Mapping[str, Any], name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a tower. Those of older versions are in ``text_config_dict``, which then holds all of them."""
    given = settings.get(f"{name}_config_dict") or settings.get(f"{name}_config") or {}
    if not isinstance(given, dict):
        raise BackboneError(f"{SETTINGS} has no settings in {name}_config, but {given!r:.100}.")
    return {**defaults, **{key: value for key, value in given.items() if value is not None}}


def _configuration(settings: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's model_cfg. Raises BackboneError for what it cannot describe."""
    activations = vision["hidden_act"], text["hidden_act"]
    quick = {name == "quick_gelu" for name in activations}
    problems = [
        (any(name not in ACTIVATIONS for name in activations), f"its activation is {' and '.join(activations)}"),
        (len(quick) > 1, f"its towers have different activations, {' and '.join(activations)}"),
        (vision["num_channels"] != 3, f"it takes images of {vision['num_channels']} channels"),
    ]
    for differs, what in problems:
        if differs:
            raise BackboneError(f"This CLIPModel is none that open_clip builds: {what}. It cannot be adapted here.")

    def tower(given: Mapping[str, Any]) -> dict[str, Any]:
        width, inner = int(given["hidden_size"]), int(given["intermediate_size"])
        ratio = inner / width
        described: dict[str, Any] = {
            "width": width,
            "layers": int(given["num_hidden_layers"]),
            # open_clip cuts the product to a whole number, which must be the one that was meant.
            "mlp_ratio": ratio if int(width * ratio) == inner else (inner + 0.5) / width,
        }
        if (act := ACTIVATIONS[given["hidden_act"]]) is not None:
            described["act_kwargs"] = act
        if given["layer_norm_eps"] != TOWER["layer_norm_eps"]:
            described["norm_kwargs"] = {"eps": float(given["layer_norm_eps"])}
        return described

    image = {"image_size": int(vision["image_size"]), "patch_size": int(vision["patch_size"])}
    image["head_width"] = int(vision["hidden_size"]) // int(vision["num_attention_heads"])
    words: dict[str, Any] = {
        "context_length": int(text["max_position_embeddings"]),
        "vocab_size": int(text["vocab_size"]),
        "heads": int(text["num_attention_heads"]),
    }
    # 2 stands in old configurations of CLIP, where transformers takes the highest token for the end, as open_clip does.
    if text["eos_token_id"] not in (2, words["vocab_size"] - 1):
        words |= {"pool_type": "eos", "eos_id": int(text["eos_token_id"])}
    return {
        "embed_dim": int(settings.get("projection_dim") or 512),
        "quick_gelu": quick == {True},
        "vision_cfg": tower(vision) | image,
        "text_cfg": tower(text) | words,
    }


def _preprocessing(folder: Path, side: int) -> dict[str, Any]:
    """open_clip's preprocess_cfg. Raises BackboneError for steps that it does not have."""
    given = _json(folder / "preprocessor_config.json") or _json(folder / "processor_config.json").get("image_processor")
    found = {**PROCESSOR, **(given if isinstance(given, dict) else {})}
    size, crop = _sides(found.get("size", side)), _sides(found.get("crop_size", side))
    squashed = not found["do_center_crop"] and size == (side, side)
    shortest = found["do_center_crop"] and size == (side,) and set(crop) == {side}
    problem = ""
    if not found["do_resize"]:
        problem = "do_resize is false: images would have to come in the model's size"
    elif not (squashed or shortest):
        problem = f"it resizes to {found.get('size')} and crops to {found.get('crop_size')}, the model takes {side}"
    elif not found["do_rescale"] or abs(found["rescale_factor"] - 1 / 255) > 1e-6:
        problem = "its pixels are not scaled by 1/255"
    elif found["resample"] not in (2, 3):
        problem = f"resample is {found['resample']}, neither 2 (bilinear) nor 3 (bicubic)"
    if problem:
        raise BackboneError(
            f"The preprocessing of {display_path(folder)} is none that open_clip has: {problem}. Change "
            f"preprocessor_config.json if another does as well: size {{'shortest_edge': {side}}}, crop_size {side}."
        )
    plain = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3} if not found["do_normalize"] else {}
    found |= plain
    return {
        "size": side,
        "mode": "RGB",
        "mean": [float(value) for value in found["image_mean"]],
        "std": [float(value) for value in found["image_std"]],
        "interpolation": "bilinear" if found["resample"] == 2 else "bicubic",
        "resize_mode": "squash" if squashed else "shortest",
        "fill_color": 0,
    }


def _sides(size: Any) -> tuple[int, ...]:
    """A size of transformers as the shorter side alone, or as height and width."""
    if not isinstance(size, dict):
        return (int(size),)
    if "shortest_edge" in size:
        return (int(size["shortest_edge"]),)
    return int(size["height"]), int(size["width"])


def _files(folder: Path) -> list[Path]:
    """The files of weights, one or those that an index lists. Raises BackboneError if one is not there."""
    for name in SINGLE:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            places = _json(folder / f"{name}.index.json").get("weight_map")
            names = sorted(set(map(str, places.values()))) if isinstance(places, dict) else []
            files = [folder / Path(one).name for one in names]
            if missing := [file.name for file in files if not file.is_file()]:
                raise BackboneError(f"{display_path(folder)} is not whole: {missing[0]} is missing. Copy it again.")
            if files:
                return files
    raise BackboneError(
        f"{display_path(folder)} has {SETTINGS} of a CLIPModel and no weights: wanted {' or '.join(SINGLE)}. Save it "
        "again with save_pretrained."
    )


def _refuse_oversized(
    vision: Mapping[str, Any], text: Mapping[str, Any], weights: Mapping[str, Tensor], shown: str
) -> None:
    """Raises BackboneError where the settings describe a far larger model than the weights, which would fill memory."""
    held = sum(value.numel() for value in weights.values())
    for tower in (vision, text):
        width, layers = int(tower["hidden_size"]), int(tower["num_hidden_layers"])
        side = int(tower.get("image_size", 1)) / int(tower.get("patch_size", 1))
        rows = max(side**2, tower.get("vocab_size", 1), tower.get("max_position_embeddings", 1))
        needed = max(layers * width * (width + int(tower["intermediate_size"])), rows * width, layers)
        if width < 1 or layers < 0 or needed > held:
            raise BackboneError(
                f"The weights of {shown} are not those that its {SETTINGS} describes: it describes a tower of {layers} "
                f"layers {width} wide, which the {held:,} values there cannot fill. Copy both files of one model."
            )


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path, text_cfg: dict[str, Any]) -> Any:
    """open_clip's own tokenizer where the folder's has the same tokens, else the folder's, by transformers.

    For the latter ``text_cfg`` is told that it is needed. Raises BackboneError where there is no tokenizer.
    """
    from open_clip import SimpleTokenizer
    from open_clip.tokenizer import HFTokenizer

    own = SimpleTokenizer(context_length=text_cfg["context_length"])
    vocabulary = _vocabulary(folder)
    if not vocabulary:
        if text_cfg["vocab_size"] == len(own.encoder):
            return own
        raise BackboneError(
            f"{display_path(folder)} has no tokenizer, and its {text_cfg['vocab_size']} tokens are not CLIP's own "
            f"{len(own.encoder)}. Put the tokenizer's files beside the weights: tokenizer.save_pretrained(FOLDER)."
        )
    if vocabulary == clip_vocabulary(own):
        return own
    text_cfg["hf_tokenizer_name"] = folder.name
    try:
        return HFTokenizer(str(folder), context_length=text_cfg["context_length"], trust_remote_code=False)
    except Exception as error:  # transformers raises many types, and may not be installed
        raise BackboneError(
            f"The tokenizer in {display_path(folder)} does not load: {sentence(error)} Wanted: transformers "
            "(pip install 'finealign[export]') and the files that tokenizer.save_pretrained writes."
        ) from error


def clip_vocabulary(tokenizer: Any) -> dict[str, int]:
    """The tokens of open_clip's own tokenizer as transformers writes them."""
    special = {tokenizer.sot_token_id: "<|startoftext|>", tokenizer.eot_token_id: "<|endoftext|>"}
    return {special.get(number, token): number for token, number in tokenizer.encoder.items()}


def _vocabulary(folder: Path) -> dict[str, Any]:
    """The tokens of the folder's tokenizer with those added to it; empty where it has none."""
    whole = _json(folder / "tokenizer.json")
    if isinstance(model := whole.get("model"), dict) and isinstance(found := model.get("vocab"), dict):
        added = [one for one in whole.get("added_tokens") or [] if isinstance(one, dict)]
        return {**found, **{str(one.get("content")): one.get("id") for one in added}}
    return {**_json(folder / "vocab.json"), **_json(folder / "added_tokens.json")}
