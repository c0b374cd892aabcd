"""Read the weights of a file that a training wrote, and fill a model with them, or say what does not fit.

A file of weights is safetensors, or what ``torch.save`` wrote with tensors and plain values alone: no pickle that holds
more is loaded, as it could run code.
"""

import ast
import hashlib
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finealign.errors import BackboneError, display_path, first_few, sentence

# Where trainings keep the weights in what they save, the first that is there; the last three are running means.
SECTIONS = ("state_dict", "model_state_dict", "model", "module", "state_dict_ema", "model_ema", "ema")
# What wrappers put before the name of every weight, and what they put into names.
PREFIXES = ("module.", "model.", "clip_model.", "clip.")
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# Entries that are no weights: of OpenAI's archives, of torch's running means, of older versions of transformers.
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "n_averaged", "num_updates")
POSITION_IDS = ".position_ids"
TEXT_PARTS = ("text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.", "attn_mask")
SHOWN = 3  # names of tensors in a message


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file, and what the training that wrote it is known to have set."""

    file: Path
    weights: dict[str, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)  # of open_clip's ``params.txt``, by their names there


def read_checkpoint(file: Path) -> Checkpoint:
    """Read a file of weights.

    Raises BackboneError if it cannot be read, holds none, or holds more than tensors and plain values.
    """
    held = read_file(file)
    shown = display_path(file)
    weights = _plainly_named(_section(held, shown))
    if not weights:
        raise BackboneError(f"{shown} holds no weights.")
    _refuse_other_kinds(weights, shown)
    return Checkpoint(file, weights, _training_settings(file, held))


def read_weights(file: Path) -> dict[str, Tensor]:
    """The weights alone, by their names. Raises BackboneError as ``read_checkpoint`` does."""
    return read_checkpoint(file).weights


def read_file(file: Path) -> Mapping[str, Any]:
    """What a file of weights holds, on the CPU. Raises BackboneError as ``read_checkpoint`` does."""
    shown = display_path(file)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        # Mapped where the format allows, so that the optimiser's state, twice the size of the weights, is never read.
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except Exception as error:  # torch and safetensors raise many types for damaged files
        if type(error).__name__ == "UnpicklingError":  # whose module nothing here imports
            raise BackboneError(_unpicklable(shown, str(error))) from error
        if "TorchScript" in str(error):
            raise BackboneError(
                f"{shown} is a TorchScript archive, which is a program, and programs are not run. Wanted: a file of "
                "weights (safetensors, or a state_dict). OpenAI's own weights are ARCH/openai, as "
                "ViT-B-32-quickgelu/openai."
            ) from error
        raise BackboneError(
            f"{shown} cannot be read as weights: {sentence(error)} Wanted: safetensors, or a state_dict that torch "
            "saved. Copy it again."
        ) from error
    if not isinstance(held, Mapping):
        raise BackboneError(f"{shown} holds a {type(held).__name__}, not the weights of a model by their names.")
    return held


def _unpicklable(shown: str, error: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)|Unsupported class ([\w.]+)|Unsupported global: (?:GLOBAL )?([\w.]+)", error)
    what = next((name for name in found.groups() if name), "") if found else ""
    holds = f"holds more than tensors and plain values ({what})" if what else "is no file of tensors and plain values"
    return (
        f"{shown} {holds}. Reading that could run code, so it was not loaded. Wanted: weights alone, as safetensors or "
        "a state_dict. If you trust whoever made the file, write them out with the library that made it: "
        "torch.save({'state_dict': model.state_dict()}, 'weights.pt')."
    )


def _section(held: Mapping[str, Any], shown: str) -> dict[str, Tensor]:
    """The tensors by name in what a training saved, wherever it keeps them. Raises BackboneError if there are none."""
    while True:
        tensors = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
        if tensors and (len(tensors) == len(held) or any("." in name for name in tensors)):
            return tensors
        inner = next((held[name] for name in SECTIONS if isinstance(held.get(name), Mapping)), None)
        if inner is None:
            raise BackboneError(
                f"{shown} holds no weights: {first_few(map(str, held), len(held), 8) or 'nothing'}. Wanted: a "
                f"state_dict, or one below {', '.join(SECTIONS[:3])}."
            )
        held = inner


def _plainly_named(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without what wrappers (several GPUs, a compiler, a running mean) put before their names."""
    named = {}
    for name, value in weights.items():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        if name not in NO_WEIGHTS and not name.endswith(POSITION_IDS):
            named[name] = value
    while prefix := next((one for one in PREFIXES if named and all(name.startswith(one) for name in named)), ""):
        named = {name.removeprefix(prefix): value for name, value in named.items()}
    return named


def _refuse_other_kinds(weights: Mapping[str, Tensor], shown: str) -> None:
    """Raises BackboneError for weights of a kind that is recognised and not read."""
    if any("lora_" in name or "adapter" in name.partition(".")[0] for name in weights):
        raise BackboneError(
            f"{shown} holds an adapter (LoRA), which is a change to another model's weights. Merge it first, with peft "
            "model.merge_and_unload(), save the whole model, and give that."
        )


# --- what the training set --------------------------------------------------------------------------------------------


def _training_settings(file: Path, held: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of open_clip's training, of the ``params.txt`` beside its ``checkpoints`` folder; empty without one.

    Without it, the architecture is taken from the run's name in the checkpoint where that was made by open_clip.
    """
    for path in (file.parent.parent / "params.txt", file.parent / "params.txt"):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()[:1000]
        except (OSError, ValueError):
            continue
        settings = {name: _value(value) for name, separator, value in (line.partition(": ") for line in lines)}
        if isinstance(settings.get("model"), str):
            return settings
    name = held.get("name")
    found = re.search(r"-model_(.+)-lr_", name) if isinstance(name, str) else None
    return {"model": found[1]} if found else {}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return text


# --- filling a model --------------------------------------------------------------------------------------------------


def fill(
    model: nn.Module, weights: Mapping[str, Tensor], *, shown: str, architecture: str, advice: str | None = None
) -> None:
    """Copy the weights into the model. Raises BackboneError that names what does not fit.

    ``shown`` is the file's or folder's name and ``architecture`` the model's, for the message. ``advice`` ends it; with
    None it is which architecture to type.
    """
    own = model.state_dict()
    weights = _with_places(weights, own)
    _refuse_parts(weights, own, shown)
    shapes = [name for name, value in weights.items() if name in own and own[name].shape != value.shape]
    missing, unknown = [n for n in own if n not in weights], [n for n in weights if n not in own]
    problems = []
    if shapes:
        one = shapes[0]
        found, wanted = tuple(weights[one].shape), tuple(own[one].shape)
        problems.append(f"{one} is {found} in the file and {wanted} in the model{_more(shapes)}")
    if missing:
        problems.append(f"{len(missing)} of the model's {len(own)} tensors are not in the file ({_few(missing)})")
    if unknown:
        problems.append(f"{len(unknown)} of the file's {len(weights)} are not the model's ({_few(unknown)})")
    if problems:
        what = "; ".join(problems)
        raise BackboneError(
            f"The weights of {shown} are not those of {architecture}: {what}. {advice or _advice(weights)}"
        )
    if bad := [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]:
        raise BackboneError(f"{shown} holds values that are not finite, in {_few(bad)}. Use an earlier checkpoint.")
    model.load_state_dict(weights)


def _with_places(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names, and in the harmless shapes, that the model has them."""
    fitted = dict(weights)
    if "text.token_embedding.weight" in own and "token_embedding.weight" in fitted:
        fitted = {f"text.{name}" if name.startswith(TEXT_PARTS) else name: value for name, value in fitted.items()}
    elif "token_embedding.weight" in own and "text.token_embedding.weight" in fitted:
        fitted = {name.removeprefix("text."): value for name, value in fitted.items()}
    for name in ("logit_scale", "logit_bias"):  # () or (1,)
        if name in fitted and name in own and fitted[name].numel() == 1:
            fitted[name] = fitted[name].reshape(own[name].shape)
    if "logit_bias" in own and "logit_bias" not in fitted and "logit_scale" in fitted:
        fitted["logit_bias"] = torch.zeros_like(fitted["logit_scale"])  # as open_clip does
    return {name: value for name, value in fitted.items() if name in own or not name.endswith("attn_mask")}


def _refuse_parts(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], shown: str) -> None:
    """Raises BackboneError where the file has one of the two towers alone, or those of another library."""
    towers = {_is_image(name) for name in own if not name.startswith("logit_")}
    found = {_is_image(name) for name in weights if name in own and not name.startswith("logit_")}
    told = ""
    if not found and any(name.startswith(("vision_model.", "text_model.")) for name in weights):
        told = (
            f"{shown} holds weights under the names of transformers. Give the whole folder that save_pretrained wrote, "
            "with its config.json: local-dir:FOLDER."
        )
    elif {f"visual.{name}" for name in weights} <= own.keys():
        told = f"{shown} holds an image tower alone, without the text tower. Wanted: the whole model's weights."
    elif found == {True} and towers == {True, False} and not any(_is_text(name) for name in weights):
        told = (
            f"{shown} holds an image tower and no text tower, and classes are told apart by their texts. Wanted: the "
            "whole model's weights, as open_clip's training saves them."
        )
    elif found == {False} and not any(_is_image(name) for name in weights):
        told = f"{shown} holds a text tower and no image tower. Wanted: the whole model's weights."
    if told:
        raise BackboneError(told)


def _is_image(name: str) -> bool:
    return name.startswith("visual.")


def _is_text(name: str) -> bool:
    return name.startswith(("text.", *TEXT_PARTS))


def _few(names: list[str]) -> str:
    return first_few(names, len(names), SHOWN)


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more tensors have another shape" if len(names) > 1 else ""


def _advice(weights: Mapping[str, Tensor]) -> str:
    if alike := list(fitting(weights)):
        return f"They have the size of {' or '.join(alike[:4])}: type that for ARCH, in ARCH/FILE."
    return "Type the architecture that was trained, as --model was given to open_clip, in ARCH/FILE."


def fitting(weights: Mapping[str, Tensor]) -> Iterator[str]:
    """The architectures of open_clip's own image transformers that have the sizes of these weights."""
    import open_clip

    found = _sizes(weights)
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name) or {}
        vision, text = config["vision_cfg"], config["text_cfg"]
        plain = not {"timm_model_name"} & vision.keys() and not {"hf_model_name"} & text.keys()
        wanted = {
            "width": vision.get("width", 768),
            "patch": vision.get("patch_size", 16),
            "layers": vision.get("layers", 12),
            "embed_dim": config["embed_dim"],
            "text width": text.get("width", 512),
            "text layers": text.get("layers", 12),
        }
        if plain and found == wanted:
            yield name


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes of the towers by which ``fitting`` compares; 0 where the weights do not tell one."""

    def size(name: str, axis: int) -> int:
        value = weights.get(name, weights.get(f"text.{name}"))
        return int(value.shape[axis]) if value is not None and value.ndim > abs(axis) - (axis < 0) else 0

    def layers(before: str) -> int:
        numbers = {name.removeprefix(before).partition(".")[0] for name in weights if name.startswith(before)}
        return len(numbers)

    return {
        "width": size("visual.conv1.weight", 0),
        "patch": size("visual.conv1.weight", -1),
        "layers": layers("visual.transformer.resblocks."),
        "embed_dim": size("visual.proj", 1),
        "text width": size("ln_final.weight", 0),
        "text layers": layers("transformer.resblocks.") or layers("text.transformer.resblocks."),
    }


def file_origin(files: Iterable[Path]) -> dict[str, str]:
    """What a run records of the files its weights were read from: their names, and the SHA-256 of each file."""
    files = sorted(files)
    try:
        digests = []
        for file in files:
            with file.open("rb") as opened:
                digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    except OSError as error:
        raise BackboneError(f"{display_path(file)} cannot be read: {sentence(error)}") from error
    return {"file": ", ".join(display_path(file.name) for file in files), "sha256": ", ".join(digests)}
