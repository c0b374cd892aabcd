"""Saved models: an open_clip local directory, with two more files for the classifier.

The folder holds two models, the adapted one and its start (the model before adaptation), and names the one in use. The
open_clip directory has the weights of the one in use. A backbone that is not open_clip's saves itself, as it was
loaded, into ``backbone/``, and has to be given when the model is read.

``finealign.json`` holds the format, which model is in use, the classes, the texts, what inference with the adapted
model needs, and the checksums of every tensor file and of the images whose labels it was given.
``finealign.safetensors`` holds the text features, the tensors that the adapted model's method scores with, and, if they
learned, the normalisation parameters of the model whose weights are not in the folder: ``start.NAME`` or
``adapted.NAME``. Of a method that is not ours it also holds what scores without it, ``plain.NAME``.

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
from finealign.backbone.base import Backbone, own_norms
from finealign.backbone.load import load_backbone
from finealign.backbone.model import CONFIG, WEIGHTS, OpenClipBackbone
from finealign.config import Settings, readable_errors
from finealign.errors import BackboneError, ConfigError, FinealignError, ModelError, one_line
from finealign.method.base import Method, MethodOptions
from finealign.method.plain import Plain, plain_tensors
from finealign.method.registry import bare_method, choose_score, find_method, origin_of
from finealign.method.strangers import StrangerModel
from finealign.model.fitted import OTHER, FittedModel, InferenceSettings, what_learned
from finealign.runtime.atomic import make_folder, save_tensors, save_text
from finealign.types import Precision, Score, TextFeatures, Texts, Use

FORMAT = 2
MANIFEST, TENSORS, BACKBONE = "finealign.json", "finealign.safetensors", "backbone"


class PlugIn(Settings):
    """Where a method that is not ours is from, and the scores that it can compute."""

    origin: str
    scores: Annotated[list[Score], Field(min_length=1)]


class GivenBackbone(Settings):
    """By what a backbone that has to be given is recognised."""

    kind: str  # the path of its class
    checksum: str


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
    plug_in: PlugIn | None = None  # of a method that is not ours
    given: GivenBackbone | None = None  # of a backbone that is not open_clip's
    learned_from: tuple[str, ...] = ()


def write_model(model: FittedModel, folder: Path) -> None:
    """Write the model and the other one that belongs to it into ``folder``; ``model`` is the one in use.

    The files of a model saved there before are replaced. Raises OutputError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapted, given = model.using("adapted"), _to_be_given(model.backbone)
    held = model.using("start") if given else model  # the one whose weights are in the folder
    other = model.using(OTHER[held.use])
    if given:
        for name in (WEIGHTS, CONFIG):  # of a model saved there before
            (folder / name).unlink(missing_ok=True)
        make_folder(folder / BACKBONE)
        model.backbone.save(folder / BACKBONE)
    else:
        with model.backbone.lend(held.norms):
            model.backbone.save(folder)
    features = model.text_features
    tensors = {"texts.names": features.names, "texts.descriptions": features.descriptions}
    tensors["texts.class_of"] = features.class_of
    method, plug_in = adapted.method, _plug_in(adapted)
    if not isinstance(method, Plain):
        tensors |= {f"method.{name}": value for name, value in method.inference_tensors().items()}
    if plug_in:
        tensors |= {f"plain.{name}": value for name, value in plain_tensors(method).items()}
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
        "sha256": {name: _sha256(folder / name) for name in _files(given)},
        "plug_in": plug_in and plug_in.model_dump(),
        "given": given and given.model_dump(),
    }
    if model.learned_from:
        manifest["learned_from"] = list(model.learned_from)
    save_text(json.dumps(manifest, indent=1, ensure_ascii=False), folder / MANIFEST)


def _files(given: GivenBackbone | None) -> list[str]:
    """The tensor files whose checksums are kept."""
    return [TENSORS] if given else [WEIGHTS, TENSORS]


def _plug_in(adapted: FittedModel) -> PlugIn | None:
    """What is kept of the model's method if it is not ours."""
    method = adapted.method
    origin = method.origin if isinstance(method, Plain) else origin_of(adapted.name)
    return PlugIn(origin=origin, scores=list(method.scores)) if origin else None


def _to_be_given(backbone: Backbone) -> GivenBackbone | None:
    """By what a backbone is recognised that is not open_clip's."""
    kind = type(backbone)
    if kind is OpenClipBackbone:
        return None
    return GivenBackbone(kind=f"{kind.__module__}.{kind.__qualname__}", checksum=backbone.checksum)


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


def read_model(
    path: Path, *, device: torch.device, precision: Precision, backbone: Backbone | None = None
) -> FittedModel:
    """Read a model that ``write_model`` wrote, in the current format or in the one before it: the one in use.

    ``backbone`` is the one that the model was adapted from, if it is not open_clip's; it has its own device and
    precision. Raises ModelError if a file is missing, damaged or changed, or if a backbone is missing or another one
    was given, and BackboneError if the backbone cannot be loaded.
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
    _refuse_other_backbone(manifest, backbone, folder)
    try:
        if backbone is None:
            backbone = load_backbone(f"local-dir:{folder}", device=device, precision=precision, texts=False)
        tensors = load_file(folder / TENSORS, device=str(backbone.device))
        return _assembled(manifest, tensors, backbone)
    except BackboneError:
        raise
    except (SafetensorError, FinealignError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"The model in {folder} cannot be read: {one_line(error, 300)}.") from error


def _refuse_other_backbone(manifest: Manifest, backbone: Backbone | None, folder: Path) -> None:
    """Raise ModelError if a backbone is missing, is not the one that was adapted, or is given where none is wanted."""
    given = manifest.given
    if given is None and backbone is None:
        return
    if given is None or backbone is None:
        found = "holds its own backbone" if given is None else f"was adapted from a backbone of the class {given.kind}"
        wanted = (
            "FineAlign.load(folder) without backbone"
            if given is None
            else "FineAlign.load(folder, backbone=...) with an instance of that class; its weights are in "
            f"{folder / BACKBONE}"
        )
        raise ModelError(f"The model in {folder} {found}. Wanted: {wanted}.")
    if backbone.checksum != given.checksum:
        raise ModelError(
            f"The model in {folder} was adapted from other weights than those of the backbone that was given: their "
            f"checksums are {given.checksum[:12]}... and {backbone.checksum[:12]}.... Wanted: the weights that are in "
            f"{folder / BACKBONE}."
        )


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
    held: Use = "start" if manifest.given else manifest.use  # the model whose parameters the backbone has
    own, others = own_norms(backbone), _section(tensors, OTHER[held])
    _refuse_misfits(texts, features, backbone.embed_dim, own, OTHER[held], tensors)
    method = _method(manifest, tensors, features, backbone)
    choose_score(inference.method.name, inference.score, method.scores)
    method.requires_grad_(False)
    swapped = held == "start" and others
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
        learned_from=manifest.learned_from,
        strangers=_strangers(tensors, classes=len(texts.classes), width=backbone.embed_dim),
    )
    return model.using(manifest.use)


def _method(manifest: Manifest, tensors: dict[str, Tensor], features: TextFeatures, backbone: Backbone) -> Method:
    """Make the adapted model's method, or what stands for one whose package is missing. Raises as ``_assembled``."""
    settings, scale, plug_in = manifest.inference.method, manifest.logit_scale, manifest.plug_in
    state, plain = _section(tensors, "method"), _section(tensors, "plain")
    try:
        if plug_in and plain and not state:  # saved where the package was missing
            raise ConfigError("its own state is not in the file")
        method = bare_method(settings, features, logit_scale=scale, token_width=backbone.token_width)
    except ConfigError as error:
        if plug_in is None:
            raise
        if not plain:
            raise ModelError(
                f"it is of the method {settings.name!r} of {plug_in.origin}, which is not here, and which scores by "
                f"more than class vectors. Install it, or register() the class. ({one_line(error, 100)})"
            ) from error
        known = {name: value for name, value in settings.options.items() if name in MethodOptions.model_fields}
        options = MethodOptions.model_validate(known)
        scores, origin = plug_in.scores, plug_in.origin
        return Plain(options, features, plain, logit_scale=scale, scores=scores, origin=origin).to(backbone.device)
    method = method.to(backbone.device)
    if manifest.format == 1:  # which also stored the state that only training needs
        state = {name: value for name, value in state.items() if name in method.inference_tensors()}
    method.load_inference_tensors(state)
    return method


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
    sections = ("method.", "plain.", f"{other}.", *(f"strangers.{use}." for use in get_args(Use)))
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
    if set(manifest.sha256) != set(_files(manifest.given)):
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
    scoring = {option: options[option] for option in find_method(name).inference_options() if option in options}
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
