"""A saved model: an open_clip local directory plus what the classifier needs, as JSON and safetensors.

``finealign.json`` names the format, classes, texts and settings and carries the checksum of every tensor file;
``finealign.safetensors`` holds the text features, the method's state, and the normalisation parameters the backbone
started from, so that the starting model can be scored beside the adapted one.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from finealign import __version__
from finealign.backbone import WEIGHTS, Backbone, load_backbone
from finealign.config import Config, Settings, make_config, readable_errors, resolve
from finealign.errors import BackboneError, FinealignError, ModelError
from finealign.methods import Method, create_method
from finealign.storage import save_tensors
from finealign.types import TextFeatures, Texts

FORMAT = 1
MANIFEST, TENSORS = "finealign.json", "finealign.safetensors"


@dataclass(frozen=True)
class SavedModel:
    """All that a saved model holds. ``start_norms`` is empty when the backbone was not changed."""

    config: Config  # resolved
    texts: Texts
    text_features: TextFeatures
    backbone: Backbone
    method: Method
    start_norms: dict[str, Tensor]


class Manifest(Settings):
    """What ``finealign.json`` holds."""

    format: Literal[1]
    finealign: str
    classes: Annotated[list[str], Field(min_length=2)]
    descriptions: dict[str, Annotated[list[str], Field(min_length=1)]]
    templates: Annotated[list[str], Field(min_length=1)]
    logit_scale: Annotated[float, Field(gt=0, strict=True)]
    config: dict[str, Any]
    sha256: dict[str, str]


def write_model(model: SavedModel, folder: Path) -> None:
    """Write the model into ``folder``, replacing what a model of ours left there. Raises OutputError."""
    folder.mkdir(parents=True, exist_ok=True)
    model.backbone.save(folder)
    features = model.text_features
    tensors = {"texts.names": features.names, "texts.descriptions": features.descriptions}
    tensors["texts.class_of"] = features.class_of
    tensors |= {f"method.{name}": value for name, value in model.method.state_dict().items()}
    tensors |= {f"start.{name}": value for name, value in model.start_norms.items()}
    save_tensors(tensors, folder / TENSORS)
    manifest = {
        "format": FORMAT,
        "finealign": __version__,
        "classes": model.texts.classes,
        "descriptions": dict(zip(model.texts.classes, model.texts.descriptions, strict=True)),
        "templates": model.texts.templates,
        "logit_scale": model.method.logit_scale,
        "config": model.config.model_dump(),
        "sha256": {name: _sha256(folder / name) for name in (WEIGHTS, TENSORS)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")


def model_folder(path: Path) -> Path:
    """The model's own folder, from itself or from the run folder around it. Raises ModelError."""
    for folder in (path, path / "model"):
        if (folder / MANIFEST).is_file():
            return folder
    raise ModelError(
        f"No model at {path}: neither {MANIFEST} nor model/{MANIFEST} is there. Wanted: a run folder of `finealign "
        "adapt`, or its model/."
    )


def read_model(path: Path, *, device: torch.device, precision: Any) -> SavedModel:
    """Read what ``write_model`` wrote. Raises ModelError if it is torn, changed or of another format."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = model_folder(path)
    manifest = _read_manifest(folder / MANIFEST)
    for name, expected in manifest.sha256.items():
        if not (folder / name).is_file():
            raise ModelError(f"The model in {folder} is not whole: {name} is missing. Copy the folder again.")
        if _sha256(folder / name) != expected:
            raise ModelError(f"{folder / name} is not the file that was saved: its checksum differs. Copy it again.")
    try:
        tensors = load_file(folder / TENSORS, device=str(device))
        config = make_config(manifest.config)
        texts = Texts(
            classes=tuple(manifest.classes),
            descriptions=tuple(tuple(manifest.descriptions[name]) for name in manifest.classes),
            templates=tuple(manifest.templates),
        )
        features = TextFeatures(
            names=tensors["texts.names"], descriptions=tensors["texts.descriptions"], class_of=tensors["texts.class_of"]
        )
        backbone = load_backbone(f"local-dir:{folder}", device=device, precision=precision)
        start_norms = _section(tensors, "start")
        _refuse_misfits(config, texts, features, backbone, tensors)
        method = create_method(
            config.method, features, logit_scale=manifest.logit_scale, token_width=backbone.token_width
        ).to(device)
        method.load_state_dict(_section(tensors, "method"))
    except BackboneError:
        raise
    except (SafetensorError, FinealignError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"The model in {folder} cannot be read: {' '.join(str(error).split())[:300]}.") from error
    return SavedModel(
        config=config,
        texts=texts,
        text_features=features,
        backbone=backbone,
        method=method,
        start_norms=start_norms,
    )


def _section(tensors: dict[str, Tensor], section: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(f"{section}."): value for name, value in tensors.items() if name.startswith(f"{section}.")
    }


def _refuse_misfits(
    config: Config, texts: Texts, features: TextFeatures, backbone: Backbone, tensors: dict[str, Tensor]
) -> None:
    """Raises ValueError where the parts do not belong together; the method looks after its own."""
    if config != resolve(config, images=1, classes=1, input_size=1):
        raise ValueError("its settings are not resolved: one is still auto")
    class_of = [index for index, group in enumerate(texts.descriptions) for _ in group]
    if features.class_of.dtype != torch.int64 or features.class_of.tolist() != class_of:
        raise ValueError("texts.class_of does not follow the descriptions")
    width = backbone.config["embed_dim"]
    wanted: dict[str, tuple[int, ...]] = {
        "texts.names": (len(texts.classes), width),
        "texts.descriptions": (len(class_of), width),
    }
    if start := _section(tensors, "start"):
        learned = {f"start.{name}": tuple(value.shape) for name, value in backbone.norm_parameters().items()}
        if learned.keys() != {f"start.{name}" for name in start}:
            raise ValueError("the start's parameters are not those of the backbone")
        wanted |= learned
    for name, shape in wanted.items():
        if tensors[name].dtype != torch.float32 or tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} is {tensors[name].dtype} of shape {tuple(tensors[name].shape)}, not {shape}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} is not finite")
    known = {"texts.names", "texts.descriptions", "texts.class_of"}
    strangers = [name for name in tensors if name not in known and not name.startswith(("method.", "start."))]
    if strangers:
        raise ValueError(f"it holds a tensor {strangers[0]!r:.100} that no such model has")


def _read_manifest(path: Path) -> Manifest:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy the folder again.") from error
    kind = found.get("format") if isinstance(found, dict) else None
    if kind is True or kind != FORMAT:
        raise ModelError(
            f"{path} is of format {kind!r:.100}; this version, {__version__}, reads format {FORMAT}. "
            "Adapt again, or use the version that wrote it."
        )
    try:
        manifest = Manifest.model_validate(found)
    except ValidationError as error:
        raise ModelError(
            f"{path} is not whole: {readable_errors(Manifest, error, '')} Copy the folder again."
        ) from error
    if set(manifest.sha256) != {WEIGHTS, TENSORS}:
        raise ModelError(f"{path} is not whole: a checksum is missing. Copy the folder again.")
    if sorted(manifest.classes) != sorted(manifest.descriptions):
        raise ModelError(f"{path} is not whole: its descriptions are not those of its classes. Copy the folder again.")
    return manifest


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise FinealignError(f"{path} cannot be read: {error}.") from error
