"""Saved models: an open_clip local directory, with two more files for the classifier.

The folder holds two models, the adapted one and its start (the model before adaptation), and names the one in use. The
open_clip directory has the weights of the one in use.

``finealign.json`` holds the format, which model is in use, the classes, the texts, what inference with the adapted
model needs, and the checksum of every tensor file. ``finealign.safetensors`` holds the text features, the tensors that
the adapted model's method scores with, and, if they learned, the normalisation parameters of the model not in use:
``start.NAME`` or ``adapted.NAME``.

The settings a model was trained with are stored as a record and never used, so that renaming a setting does not make
older models unreadable. This version reads its own format and the one before it, whose models are in use as they were
saved.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from finealign import __version__
from finealign.backbone.base import Backbone
from finealign.backbone.load import load_backbone
from finealign.backbone.model import WEIGHTS
from finealign.config import Settings, readable_errors
from finealign.errors import BackboneError, FinealignError, ModelError, one_line
from finealign.method.registry import choose_score, create_method, find_method
from finealign.method.strangers import StrangerModel
from finealign.model.fitted import OTHER, FittedModel, InferenceSettings, what_learned
from finealign.runtime.atomic import save_tensors, save_text
from finealign.types import Precision, TextFeatures, Texts, Use

FORMAT = 2
MANIFEST, TENSORS = "finealign.json", "finealign.safetensors"


class Manifest(Settings):
    """The content of ``finealign.json``."""

    format: Literal[1, 2]  # of the file as it was written
    finealign: str
    use: Use = "adapted"
    classes: Annotated[list[str], Field(min_length=2)]
    descriptions: dict[str, Annotated[list[str], Field(min_length=1)]]
    templates: Annotated[list[str], Field(min_length=1)]
    logit_scale: Annotated[float, Field(gt=0, strict=True)]
    inference: InferenceSettings
    learned: str
    training: dict[str, Any]
    sha256: dict[str, str]


def write_model(model: FittedModel, folder: Path) -> None:
    """Write the model and the other one that belongs to it into ``folder``; ``model`` is the one in use.

    The files of a model saved there before are replaced. Raises OutputError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapted, other = model.using("adapted"), model.using(OTHER[model.use])
    with model.backbone.lend(model.norms):
        model.backbone.save(folder)
    features = model.text_features
    tensors = {"texts.names": features.names, "texts.descriptions": features.descriptions}
    tensors["texts.class_of"] = features.class_of
    tensors |= {f"method.{name}": value for name, value in adapted.method.inference_tensors().items()}
    if adapted.start_norms:
        tensors |= {f"{other.use}.{name}": value for name, value in other.norms.items()}
    for use, strangers in adapted.strangers.items():
        tensors |= {f"strangers.{use}.{name}": value for name, value in strangers.tensors().items()}
    save_tensors(tensors, folder / TENSORS)
    manifest = {
        "format": FORMAT,
        "finealign": __version__,
        "use": model.use,
        "classes": model.texts.classes,
        "descriptions": dict(zip(model.texts.classes, model.texts.descriptions, strict=True)),
        "templates": model.texts.templates,
        "logit_scale": adapted.method.logit_scale,
        "inference": adapted.inference.model_dump(),
        "learned": adapted.learned,
        "training": model.training,
        "sha256": {name: _sha256(folder / name) for name in (WEIGHTS, TENSORS)},
    }
    save_text(json.dumps(manifest, indent=1, ensure_ascii=False), folder / MANIFEST)


def model_folder(path: Path) -> Path:
    """Return the folder of a saved model: ``path`` itself, or ``model`` in the run folder ``path``.

    Raises ModelError if neither holds a model.
    """
    for folder in (path, path / "model"):
        if (folder / MANIFEST).is_file():
            return folder
    raise ModelError(
        f"No model at {path}: neither {MANIFEST} nor model/{MANIFEST} is there. Wanted: a run folder of `finealign "
        "adapt`, or its model/."
    )


def read_model(path: Path, *, device: torch.device, precision: Precision) -> FittedModel:
    """Read a model that ``write_model`` wrote, in the current format or in the one before it: the one in use.

    Raises ModelError if a file is missing, damaged or changed, and BackboneError if the backbone cannot be loaded.
    """
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
        backbone = load_backbone(f"local-dir:{folder}", device=device, precision=precision, texts=False)
        return _assembled(manifest, tensors, backbone)
    except BackboneError:
        raise
    except (SafetensorError, FinealignError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"The model in {folder} cannot be read: {one_line(error, 300)}.") from error


def _assembled(manifest: Manifest, tensors: dict[str, Tensor], backbone: Backbone) -> FittedModel:
    """Make the model from its parts. Raises FinealignError, KeyError, ValueError or RuntimeError if they do not fit."""
    texts = Texts(
        classes=tuple(manifest.classes),
        descriptions=tuple(tuple(manifest.descriptions[name]) for name in manifest.classes),
        templates=tuple(manifest.templates),
    )
    features = TextFeatures(
        names=tensors["texts.names"], descriptions=tensors["texts.descriptions"], class_of=tensors["texts.class_of"]
    )
    inference = manifest.inference
    choose_score(inference.method.name, inference.score)
    own, others = own_norms(backbone), _section(tensors, OTHER[manifest.use])
    _refuse_misfits(texts, features, backbone.embed_dim, own, OTHER[manifest.use], tensors)
    method = create_method(
        inference.method, features, logit_scale=manifest.logit_scale, token_width=backbone.token_width
    ).to(backbone.device)
    state = _section(tensors, "method")
    if manifest.format == 1:  # which also stored the state that only training needs
        state = {name: value for name, value in state.items() if name in method.inference_state}
    method.load_inference_tensors(state)
    method.requires_grad_(False)
    swapped = manifest.use == "start" and others  # the backbone has the start's parameters
    model = FittedModel(
        inference=inference,
        texts=texts,
        text_features=features,
        backbone=backbone,
        method=method,
        norms=others if swapped else own,
        start_norms=own if swapped else others,
        learned=manifest.learned or what_learned(method, manifest.training),
        training=manifest.training,
        strangers=_strangers(tensors, classes=len(texts.classes), width=backbone.embed_dim),
    )
    return model.using(manifest.use)


def _strangers(tensors: dict[str, Tensor], *, classes: int, width: int) -> dict[Use, StrangerModel]:
    """What tells strangers, for each model that has it. Raises ValueError if it does not fit."""
    found: dict[Use, StrangerModel] = {}
    for use in get_args(Use):
        if section := _section(tensors, f"strangers.{use}"):
            found[use] = StrangerModel.from_tensors(section)
            if tuple(found[use].anchors.shape) != (classes, width):
                raise ValueError(
                    f"what tells strangers is for {tuple(found[use].anchors.shape)}, not {(classes, width)}"
                )
    return found


def own_norms(backbone: Backbone) -> dict[str, Tensor]:
    """Return a copy of the backbone's current normalisation parameters, by name; empty for a tower without any."""
    try:
        parameters = backbone.norm_parameters()
    except BackboneError:
        return {}
    return {name: value.detach().clone() for name, value in parameters.items()}


def _section(tensors: dict[str, Tensor], section: str) -> dict[str, Tensor]:
    """The tensors whose names begin with the section's name and a dot, by the rest of their names."""
    return {
        name.removeprefix(f"{section}."): value for name, value in tensors.items() if name.startswith(f"{section}.")
    }


def _refuse_misfits(
    texts: Texts,
    features: TextFeatures,
    width: int,
    norms: Mapping[str, Tensor],
    other: Use,
    tensors: dict[str, Tensor],
) -> None:
    """Raise ValueError if the parts do not belong together. The method checks its own tensors.

    ``width`` is that of the backbone's embeddings, ``norms`` are its normalisation parameters, and ``other`` is the
    model whose own ones are among the tensors.
    """
    class_of = [index for index, group in enumerate(texts.descriptions) for _ in group]
    if features.class_of.dtype != torch.int64 or features.class_of.tolist() != class_of:
        raise ValueError("texts.class_of does not follow the descriptions")
    shapes: dict[str, tuple[int, ...]] = {
        "texts.names": (len(texts.classes), width),
        "texts.descriptions": (len(class_of), width),
    }
    if others := _section(tensors, other):
        if norms.keys() != others.keys():
            raise ValueError(f"the {other} model's parameters are not those of the backbone")
        shapes |= {f"{other}.{name}": tuple(value.shape) for name, value in norms.items()}
    for name, shape in shapes.items():
        if tensors[name].dtype != torch.float32 or tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} is {tensors[name].dtype} of shape {tuple(tensors[name].shape)}, not {shape}")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{name} is not finite")
    known = {"texts.names", "texts.descriptions", "texts.class_of"}
    sections = ("method.", f"{other}.", *(f"strangers.{use}." for use in get_args(Use)))
    unknown = [name for name in tensors if name not in known and not name.startswith(sections)]
    if unknown:
        raise ValueError(f"it holds a tensor {unknown[0]!r:.100} that no such model has")


# --- the manifest, and the format before it ---------------------------------------------------------------------------


def _read_manifest(path: Path) -> Manifest:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}. Copy the folder again.") from error
    version = values.get("format") if isinstance(values, dict) else None
    if type(version) is not int or version not in (FORMAT - 1, FORMAT):
        raise ModelError(
            f"{path} is of format {version!r:.100}; this version, {__version__}, reads formats {FORMAT - 1} and "
            f"{FORMAT}. Adapt again, or use the version that wrote it."
        )
    try:
        if version == 1:
            values = _from_format_1(values)
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise ModelError(
            f"{path} is not whole: {readable_errors(Manifest, error, '')} Copy the folder again."
        ) from error
    except FinealignError as error:
        raise ModelError(f"{path} is not whole: {one_line(error)} Copy the folder again.") from error
    except (LookupError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {one_line(error)}"
        raise ModelError(f"{path} is not whole: {problem}. Copy the folder again.") from error
    if set(manifest.sha256) != {WEIGHTS, TENSORS}:
        raise ModelError(f"{path} is not whole: a checksum is missing. Copy the folder again.")
    if sorted(manifest.classes) != sorted(manifest.descriptions):
        raise ModelError(f"{path} is not whole: its descriptions are not those of its classes. Copy the folder again.")
    return manifest


def _from_format_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a manifest of format 1, which held the whole configuration, to the current format.

    Models of format 1 classified photos at their full size, so their ``working_size`` is None. Those of ``fair`` scored
    by ``las`` unless they were told otherwise.
    """
    values = dict(values)
    config = values.pop("config")
    name, options, asked = config["method"]["name"], config["method"], config["prediction"]["score"]
    scoring = {option: options[option] for option in find_method(name).inference_options if option in options}
    inference = {
        "backbone": config["backbone"],
        "method": {"name": name, **scoring},
        "score": "las" if (name, asked) == ("fair", "auto") else choose_score(name, asked),
        "crops": config["views"]["crops"],
        "crop_low": config["views"]["crop_low"],
        "crop_high": config["views"]["crop_high"],
        "seed": config["seed"],
        "working_size": None,
        "max_pixels": config["data"]["max_pixels"],
    }
    return {**values, "inference": inference, "learned": "", "training": config}


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FinealignError(f"{path} cannot be read: {error}.") from error
