"""The settings: typed, strictly checked, with every default, and the only place where "auto" is resolved.

The fields below define the YAML file, ``--set section.key=value`` and the documentation. The options of a method are
defined and checked in the method's own module (see ``methods/``); here they pass through as further keys of ``method``.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from finealign.errors import ConfigError, unknown_name
from finealign.runtime.atomic import save_text
from finealign.runtime.strict_yaml import parse_yaml
from finealign.runtime.textfile import TextFileError, read_text
from finealign.types import ClassPrior

Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Fraction = Annotated[float, Field(gt=0, le=1)]

DEFAULT_BACKBONE = "ViT-B-32-quickgelu/openai"
# Label passes in a run, at most and without the last (each encodes weak views and crops anew), when `refresh_epochs` is
# "auto".
LABEL_PASSES = 2
# As ``training.drift`` measures it. Crops that are drawn anew lie further from those before: the mean of eight of them
# an eighth as far as a single one.
LEAST_MOVED = 0.1
# The anchors' learning rate from IMAGES_A_CLASS images per class on; with fewer images it is lower in proportion.
ANCHOR_RATE, IMAGES_A_CLASS = 1e-3, 50
ANCHOR_STEPS = 160  # of the anchors alone after each label pass, when `anchor_steps` is "auto"
WEIGHT_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")  # endings of the files that ARCH/FILE names
MOST_BYTES = 100_000  # most that a settings file may hold; it usually takes a few thousand


def without_folder(backbone: str) -> str:
    """The backbone's name without local folders: of the path of a folder or a file only the last part is kept."""
    if backbone.startswith("local-dir:"):
        return f"local-dir:{Path(backbone.removeprefix('local-dir:')).name}"
    architecture, _, path = backbone.partition("/")
    is_file = path.lower().endswith(WEIGHT_FILES) and not backbone.startswith("hf-hub:")
    return f"{architecture}/{Path(path).name}" if is_file else backbone


def _has(annotation: Any, *wanted: Any) -> bool:
    """Whether one of these is among what an annotation allows: a type, or a value of a ``Literal``."""
    return annotation in wanted or any(_has(part, *wanted) for part in get_args(annotation))


class Settings(BaseModel):
    """Base class of the sections. Unknown keys are errors, and an instance cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse booleans for numbers: Python takes true for 1, and YAML reads yes, no, on and off as booleans.

        False where "off" is allowed is that word.
        """
        annotation = cls.model_fields[info.field_name or ""].annotation
        if value is False and _has(annotation, "off") and not _has(annotation, bool):
            return "off"
        given = value.values() if isinstance(value, Mapping) else (value,)
        if any(isinstance(one, bool) for one in given) and _has(annotation, int, float):
            raise PydanticCustomError("truth", "A number is wanted, not true or false (yes, no, on and off are those)")
        return value


class DataSettings(Settings):
    """How images are read and cached."""

    max_pixels: Positive = Field(200_000_000, description="images with more pixels than this are set aside unread")
    exclude: list[str] = Field(
        [], description="patterns of names, or of paths below the folder of images, of files and folders to leave out"
    )
    white_value: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto",
        description="the value that is white in images of more than 8 bits a channel; auto: the largest value of the "
        "10, 12, 14 or 16 bits that the image's own largest needs, 1 for floats in [0, 1], else the image's largest",
    )
    working_size: Positive | Auto = Field(
        "auto", description="shorter side images are reduced to; auto: the input size over the smallest crop's share"
    )
    cache: str = Field(
        "auto", description="folder for decoded images; auto: the user's cache folder; temporary: gone after the run"
    )
    cache_gb: Annotated[float, Field(ge=0)] = Field(
        8.0, description="bound on the decoded images kept there; those beyond it are decoded at each use"
    )
    workers: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto", description="processes that make views; 0: a thread; auto: 0 on a CPU, up to 8 for a GPU"
    )


class ViewSettings(Settings):
    """The views that are made of each image [R]: step 2 of the method."""

    crops: Positive = Field(8, description="N, square crops per image")
    crop_low: Fraction = Field(0.5, description="alpha: smallest crop side as a share of the shorter side")
    crop_high: Fraction = Field(0.9, description="beta: largest crop side as a share of the shorter side")
    strong_low: Fraction = Field(0.3, description="smallest area of the strong view's random resized crop")
    randaugment: Annotated[str, Field(pattern=r"^rand(-(m|n|p|mstd|mmax|inc|t|w)\d+(\.\d+)?)*$")] = Field(
        "rand-m9-mstd0.5-inc1", description="timm RandAugment policy of the strong view"
    )
    refresh_epochs: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] | Auto = Field(
        "auto",
        description="epochs a crop feature is reused; below 1 an epoch goes by blocks, each encoded just before it is "
        f"trained on; 0: encoded at every step; auto: {LABEL_PASSES} refreshes a run",
    )
    refresh_moved: Annotated[float, Field(ge=0)] | Auto = Field(
        "auto",
        description="crop features are used on, even so, while the encoder has moved images less than this since, as a "
        f"multiple of how far crops lie from images; auto: {LEAST_MOVED} where refresh_epochs is auto, else 0",
    )


class MethodSettings(BaseModel):
    """The method's name. The method's own options are further keys of this section and are checked by the method."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field("fair", description="the method, as `finealign methods` lists them")

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options, not yet checked."""
        return dict(self.model_extra or {})


class TrainingSettings(Settings):
    """Which parameters learn, at which learning rates and for how long [R]: steps 7 and 8 of the method."""

    encoder: Literal["full", "frozen"] = Field(
        "full", description="full: normalisation and anchors learn; frozen: anchors alone, on features encoded once"
    )
    learn: Literal["norms+anchors", "norms", "anchors"] = Field("norms+anchors", description="what learns")
    epochs: Positive | Auto = Field("auto", description="passes over the images; auto: enough for `steps`")
    steps: Positive = Field(80, description="optimiser steps aimed at when epochs is auto")
    max_images: Positive | Literal["auto", "all"] = Field(
        "auto",
        description="most images to adapt to, drawn evenly with the seed where there are more; where epochs is auto "
        "these are also no more than `steps` can read; all: all, whatever `steps` says; auto: no other bound",
    )
    block_images: Positive = Field(
        8192, description="most images whose features are kept at a time; more are read, and labelled, in blocks"
    )
    max_epochs: Positive = Field(60, description="bound on the epochs when they are auto")
    batch_size: Positive = Field(64, description="images a step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="of the normalisation parameters")
    drift_limit: Annotated[float, Field(gt=0)] | Literal["off"] = Field(
        1.0,
        description="how far the encoder may move images, in the mean and as a multiple of how far it saw their crops "
        "from them; where it has gone further, what it learned is halved before label passes and at the end. Methods "
        "without crops, and runs that keep no features of crops, know no limit",
    )
    anchor_learning_rate: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto",
        description=f"of the anchors; auto: {ANCHOR_RATE:g}, less in proportion below {IMAGES_A_CLASS} images a class",
    )
    final_learning_rate: Annotated[float, Field(ge=0)] = Field(2e-6, description="where the cosine schedule ends")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of the anchors")
    norm_weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of the normalisation parameters")
    anchor_steps: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto",
        description=f"steps of the anchors alone on kept crop features after each label pass; auto: {ANCHOR_STEPS}, "
        "0 where no features are kept or the anchors do not learn",
    )
    anchor_batch_size: Positive = Field(256, description="images in each of those steps")
    last_label_pass: bool = Field(True, description="another label pass at the end, for the anchors' last steps")
    checkpoint_minutes: Annotated[float, Field(ge=0)] = Field(
        10.0, description="between checkpoints within an epoch; the end of each epoch leaves one in any case"
    )
    strangers: Literal["auto", "off"] = Field(
        "auto", description="auto: images that seem to show none of the classes count less in training; off: all alike"
    )
    strong_views: Positive = Field(4, description="strong views encoded per image when the encoder is frozen")


class PredictionSettings(Settings):
    """How an adapted model scores an image [R]: step 9 of the method."""

    score: Literal["auto", "global", "las", "fused"] = Field(
        "auto", description="score used when none is asked for; auto: the method's own"
    )
    calibrate: bool = Field(
        True, description="bring confidences near the accuracy, as estimated without labels; labels stay as they are"
    )
    class_prior: ClassPrior = Field(
        "folder",
        description="how images to classify are distributed; folder: as those adapted to; even: each class as likely",
    )


class Config(Settings):
    """All settings of a run. Together with the images and the texts they determine its result."""

    backbone: str = Field(
        DEFAULT_BACKBONE, description="ARCH/PRETRAINED, ARCH/FILE, ARCH/random, hf-hub:NAME or local-dir:PATH"
    )
    seed: Annotated[int, Field(ge=0, lt=2**64)] = Field(0, description="decides every random draw")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="auto: bf16 where the processor is good at it, fp16 (gradients in fp32) on GPUs good at that alone",
    )
    data: DataSettings = DataSettings()
    views: ViewSettings = ViewSettings()
    method: MethodSettings = MethodSettings()
    training: TrainingSettings = TrainingSettings()
    prediction: PredictionSettings = PredictionSettings()


def make_config(values: Mapping[str, Any]) -> Config:
    """Check nested plain values and return the configuration they describe.

    Raises ConfigError with one line per wrong setting; for an unknown key the line suggests the nearest valid one.
    """
    try:
        config = Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_readable(Config, detail) for detail in error.errors())) from None
    if config.views.crop_low > config.views.crop_high:
        raise ConfigError(
            f"views.crop_low ({config.views.crop_low}) is above views.crop_high ({config.views.crop_high}). "
            "Wanted: the smallest crop no larger than the largest. Lower one or raise the other."
        )
    if config.training.encoder == "frozen" and config.training.learn == "norms":
        raise ConfigError(
            "training.encoder=frozen leaves the normalisation as it is, so training.learn=norms would learn nothing. "
            "Use training.learn=anchors, or training.encoder=full."
        )
    _refuse_steps_without_features(config)
    return config


def _refuse_steps_without_features(config: Config) -> None:
    """Raise ConfigError where anchor steps are set, but no features are kept for them or the anchors do not learn."""
    training = config.training
    if training.anchor_steps in ("auto", 0):
        return
    if not _keeps_features(config):
        raise ConfigError(
            f"views.refresh_epochs=0 keeps no crop features, on which training.anchor_steps={training.anchor_steps} "
            "would be taken. Use training.anchor_steps=0, or views.refresh_epochs of at least 1."
        )
    if training.learn == "norms":
        raise ConfigError(
            f"training.learn=norms leaves the anchors as they are, so training.anchor_steps={training.anchor_steps} "
            "would move nothing. Use training.anchor_steps=0, or training.learn=norms+anchors."
        )


def _keeps_features(config: Config) -> bool:
    return config.views.refresh_epochs != 0 or config.training.encoder == "frozen"


def read_config(
    path: Path | None = None, overrides: Sequence[str] = (), *, base: Mapping[str, Any] | None = None, **flags: Any
) -> Config:
    """Read the configuration from a YAML file, overrides and flags.

    Later sources take precedence: ``base`` (a method's preset), the file at ``path``, the ``overrides`` as
    ``section.key=value``, then the ``flags`` that are not None, of which ``section__key`` sets ``section.key``. Values
    of overrides are parsed as YAML, so ``training.epochs=5`` is a number. Raises ConfigError.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_yaml(path)
    values = read_overrides(overrides, merged(base or {}, values))
    for dotted, value in flags.items():
        if value is not None:
            _assign(values, dotted.split("__"), value)
    return make_config(values)


def read_overrides(overrides: Sequence[str], below: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Nested settings from ``section.key=value`` texts, which take precedence over those in ``below``.

    Values are parsed as YAML. Raises ConfigError.
    """
    values = merged({}, below or {})
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override!r} is not a setting. Wanted: section.key=value, as training.epochs=5.")
        _assign(values, key.split("."), parse_yaml(text, f"--set {key}"))
    return values


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested settings: those in ``above`` take precedence over those in ``below``. Neither mapping is changed."""
    result: dict[str, Any] = {
        key: merged(value, {}) if isinstance(value, Mapping) else value for key, value in below.items()
    }
    for key, value in above.items():
        lower = result.get(key)
        if isinstance(value, Mapping):
            value = merged(lower if isinstance(lower, Mapping) else {}, value)
        result[key] = value
    return result


def write_config(config: Config, path: Path) -> None:
    """Write every setting as YAML that ``read_config`` can read. Raises OutputError."""
    values = config.model_dump()
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if any(separator in text for separator in "\x85\u2028\u2029"):  # PyYAML loses these unless it escapes them
        text = yaml.safe_dump(values, sort_keys=False)
    save_text(text, path)


def resolve(config: Config, *, images: int, classes: int, input_size: int, by_steps: bool = True) -> Config:
    """Replace every "auto" in the data, views and training sections that does not depend on the machine.

    ``images`` and ``classes`` are their numbers; ``input_size`` is the backbone's input side in pixels. ``by_steps`` is
    false for a method that takes no steps. The device, the precision and the number of workers may stay "auto", as they
    are chosen for the machine that runs, and the white value, as each image has its own.
    """
    training, views, data = config.training, config.views, config.data
    most, enough = training.max_images, training.steps * training.batch_size
    if most != "all" and by_steps and training.epochs == "auto" and images > enough:
        most = enough if most == "auto" else min(most, enough)
    most = "all" if most == "auto" else most
    images = images if most == "all" else min(images, most)
    steps_per_epoch = math.ceil(images / training.batch_size)
    auto_epochs = min(training.max_epochs, max(1, round(training.steps / steps_per_epoch)))
    epochs = auto_epochs if training.epochs == "auto" else training.epochs
    refresh = views.refresh_epochs
    if refresh == "auto":
        refresh = max(1, math.ceil(epochs / LABEL_PASSES))
        # Labels of an epoch that is enough for all steps would else be those of the encoder as it was at the start.
        if training.epochs == "auto" and epochs == 1 < training.max_epochs and training.encoder == "full":
            refresh = 1 / LABEL_PASSES
    unmoved = views.refresh_moved
    if unmoved == "auto":
        unmoved = LEAST_MOVED if views.refresh_epochs == "auto" else 0.0
    anchor_rate = training.anchor_learning_rate
    if anchor_rate == "auto":
        anchor_rate = ANCHOR_RATE * min(1.0, images / classes / IMAGES_A_CLASS)
    anchor_steps = training.anchor_steps
    if anchor_steps == "auto":
        anchor_steps = ANCHOR_STEPS if _keeps_features(config) and training.learn != "norms" else 0
    working_size = data.working_size
    if working_size == "auto":
        working_size = math.ceil(input_size / views.crop_low)
    return config.model_copy(
        update={
            "data": data.model_copy(update={"working_size": working_size}),
            "views": views.model_copy(update={"refresh_epochs": refresh, "refresh_moved": unmoved}),
            "training": training.model_copy(
                update={
                    "epochs": epochs,
                    "max_images": most,
                    "anchor_learning_rate": anchor_rate,
                    "anchor_steps": anchor_steps,
                }
            ),
        }
    )


def readable_errors(model: type[BaseModel], error: ValidationError, prefix: str) -> str:
    """Pydantic's errors as text, one per line, each starting with ``prefix`` and the setting's name.

    ``model`` is the section that was being checked.
    """
    return "\n".join(_readable(model, detail, prefix) for detail in error.errors())


def _readable(model: type[BaseModel], detail: Any, prefix: str = "") -> str:
    """One of Pydantic's errors as a line: the setting's name, the value it was given, and what is valid."""
    location = [str(part) for part in detail["loc"]]
    if detail["type"] == "extra_forbidden":
        section: type[BaseModel] = model
        for part in location[:-1]:
            annotation = section.model_fields[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                section = annotation
        full_name = prefix + ".".join(location)
        return f"{full_name}: " + unknown_name("setting", location[-1], section.model_fields)
    # For a union, Pydantic appends the member's type to the location; the user wrote nothing of the kind.
    fields = [part for part in location if part.replace("_", "").isalnum() and not part[:1].isdigit()]
    known = []
    current: Any = model
    for part in fields:
        if not (isinstance(current, type) and issubclass(current, BaseModel)) or part not in current.model_fields:
            break
        known.append(part)
        current = current.model_fields[part].annotation
    choices = [str(choice) for choice in get_args(current) if isinstance(choice, str)]
    hint = f" Valid: {', '.join(choices)}." if choices else ""
    return f"{prefix}{'.'.join(known or location)}: found {_shown(detail['input'])}. {detail['msg']}.{hint}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = read_text(path, most_bytes=MOST_BYTES)
    except TextFileError as error:
        if error.missing:
            raise ConfigError(
                f"No configuration file at {path}. Wanted: a YAML file, as a run folder's config.yaml."
            ) from None
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}. Wanted: a YAML file.") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} holds no settings. Wanted: sections with keys, as `training: {{epochs: 5}}`.")
    return values


def _shown(value: object) -> str:
    try:
        return f"{value!r:.200}"
    except ValueError:  # Python refuses to format an integer of more than a few thousand digits
        return "a very large number"


def _assign(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key!r} is a single value, not a section.")
        values = inner
    values[keys[-1]] = value
