"""Settings: strict, typed, one place for every default, and the one place where "auto" is resolved.

The fields below feed the YAML file, ``--set section.key=value`` and the documentation. A method's own options live
beside the method (see ``methods/``) and are checked there; here they pass through as the rest of ``method``.
"""

import math
import stat
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from finealign.errors import ConfigError, unknown_name
from finealign.storage import save_text

Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Fraction = Annotated[float, Field(gt=0, le=1)]

DEFAULT_BACKBONE = "ViT-B-32-quickgelu/openai"
# Label passes (fresh weak and crop features) in a run when the refresh is "auto".
LABEL_PASSES = 2
# The anchors' learning rate where images are many, and how many a class that takes: with fewer, less in proportion.
ANCHOR_RATE, IMAGES_A_CLASS = 1e-3, 50
# A file of settings takes a few thousand bytes and some fifty values; far beyond that, it is something else.
MOST_BYTES, MOST_VALUES = 100_000, 10_000


def without_folder(backbone: str) -> str:
    """A backbone's name as others may see it: of a folder of this machine only the last part."""
    place, found, path = backbone.partition("local-dir:")
    return f"local-dir:{Path(path).name}" if found and not place else backbone


def _is_number(annotation: Any) -> bool:
    return annotation in (int, float) or any(_is_number(part) for part in get_args(annotation))


class Settings(BaseModel):
    """A section: unknown keys are errors, and a made section never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1, and YAML takes yes, on and off for true and false."""
        if isinstance(value, bool) and _is_number(cls.model_fields[info.field_name or ""].annotation):
            raise PydanticCustomError("truth", "A number is wanted, not true or false (yes, no, on and off are those)")
        return value


class DataSettings(Settings):
    """How images are read."""

    max_pixels: Positive = Field(200_000_000, description="images with more pixels than this are set aside unread")
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
    """The views of one image [R]: step 2 of the method."""

    crops: Positive = Field(8, description="N, square crops per image")
    crop_low: Fraction = Field(0.5, description="alpha: smallest crop side as a share of the shorter side")
    crop_high: Fraction = Field(0.9, description="beta: largest crop side as a share of the shorter side")
    strong_low: Fraction = Field(0.3, description="smallest area of the strong view's random resized crop")
    randaugment: Annotated[str, Field(pattern=r"^rand(-(m|n|p|mstd|mmax|inc|t|w)\d+(\.\d+)?)*$")] = Field(
        "rand-m9-mstd0.5-inc1", description="timm RandAugment policy of the strong view"
    )
    refresh_epochs: Annotated[int, Field(ge=0)] | Auto = Field(
        "auto",
        description=f"epochs a crop feature is reused; 0: encoded at every step; auto: {LABEL_PASSES} refreshes a run",
    )


class MethodSettings(BaseModel):
    """The method's name; its own options stand beside it and are checked by the method."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field("fair", description="the method, by file name in methods/")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class TrainingSettings(Settings):
    """What learns, and at what pace [R]: steps 7 and 8 of the method."""

    encoder: Literal["full", "frozen"] = Field(
        "full", description="full: normalisation and anchors learn; frozen: anchors alone, on features encoded once"
    )
    learn: Literal["norms+anchors", "norms", "anchors"] = Field("norms+anchors", description="what learns")
    epochs: Positive | Auto = Field("auto", description="passes over the images; auto: enough for `steps`")
    steps: Positive = Field(80, description="optimiser steps aimed at when epochs is auto")
    max_epochs: Positive = Field(60, description="bound on the epochs when they are auto")
    batch_size: Positive = Field(64, description="images a step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="of the normalisation parameters")
    anchor_learning_rate: Annotated[float, Field(gt=0)] | Auto = Field(
        "auto",
        description=f"of the anchors; auto: {ANCHOR_RATE:g}, less in proportion below {IMAGES_A_CLASS} images a class",
    )
    final_learning_rate: Annotated[float, Field(ge=0)] = Field(2e-6, description="where the cosine schedule ends")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of the anchors")
    norm_weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of the normalisation parameters")
    anchor_steps: Annotated[int, Field(ge=0)] = Field(
        160, description="steps of the anchors alone on kept crop features after each label pass"
    )
    anchor_batch_size: Positive = Field(256, description="images in each of those steps")
    last_label_pass: bool = Field(True, description="another label pass at the end, for the anchors' last steps")
    checkpoint_minutes: Annotated[float, Field(ge=0)] = Field(
        10.0, description="between checkpoints within an epoch; the end of each epoch leaves one in any case"
    )
    strong_views: Positive = Field(4, description="strong views encoded per image when the encoder is frozen")


class PredictionSettings(Settings):
    """How an adapted model scores an image [R]: step 9 of the method."""

    score: Literal["auto", "global", "las", "fused"] = Field(
        "auto", description="score used when none is asked for; auto: the method's own"
    )


class Config(Settings):
    """Everything that decides a run, apart from the images and the texts."""

    backbone: str = Field(DEFAULT_BACKBONE, description="ARCH/PRETRAINED, ARCH/random, hf-hub:NAME or local-dir:PATH")
    seed: Annotated[int, Field(ge=0, lt=2**64)] = Field(0, description="decides every random draw")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where the processor is good at it"
    )
    data: DataSettings = DataSettings()
    views: ViewSettings = ViewSettings()
    method: MethodSettings = MethodSettings()
    training: TrainingSettings = TrainingSettings()
    prediction: PredictionSettings = PredictionSettings()


def make_config(values: Mapping[str, Any]) -> Config:
    """A checked configuration from nested plain values.

    Raises ConfigError with one line for every wrong setting; an unknown key is answered with the nearest valid one.
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
    return config


def read_config(
    path: Path | None = None, overrides: Sequence[str] = (), *, base: Mapping[str, Any] | None = None, **flags: Any
) -> Config:
    """The configuration from a YAML file, then ``section.key=value`` overrides, then the flags that are not None.

    ``base`` lies under them all: a method's preset.
    Values of overrides are read as YAML, so ``training.epochs=5`` is a number. Raises ConfigError.
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
    """Nested settings from ``section.key=value`` texts, over those ``below``; values are YAML. Raises ConfigError."""
    values = merged({}, below or {})
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override!r} is not a setting. Wanted: section.key=value, as training.epochs=5.")
        _assign(values, key.split("."), _parse_yaml(text, f"--set {key}"))
    return values


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, those above over those below; neither is changed."""
    found: dict[str, Any] = {k: merged(v, {}) if isinstance(v, Mapping) else v for k, v in below.items()}
    for key, value in above.items():
        under = found.get(key)
        if isinstance(value, Mapping):
            value = merged(under if isinstance(under, Mapping) else {}, value)
        found[key] = value
    return found


def write_config(config: Config, path: Path) -> None:
    """Write every setting as YAML that ``read_config`` takes back. Raises OutputError."""
    values = config.model_dump()
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if any(separator in text for separator in "\x85\u2028\u2029"):  # PyYAML loses them unless it escapes them
        text = yaml.safe_dump(values, sort_keys=False)
    save_text(text, path)


def resolve(config: Config, *, images: int, classes: int, input_size: int) -> Config:
    """Replace every "auto" of data, views and training by its value for so many images, classes and this input size.

    ``input_size`` is the backbone's input side in pixels. Device and precision stay: the machine decides those.
    """
    training, views, data = config.training, config.views, config.data
    steps_an_epoch = math.ceil(images / training.batch_size)
    enough = min(training.max_epochs, max(1, round(training.steps / steps_an_epoch)))
    epochs = enough if training.epochs == "auto" else training.epochs
    refresh = max(1, math.ceil(epochs / LABEL_PASSES)) if views.refresh_epochs == "auto" else views.refresh_epochs
    rate = training.anchor_learning_rate
    if rate == "auto":
        rate = ANCHOR_RATE * min(1.0, images / classes / IMAGES_A_CLASS)
    working_size = data.working_size
    if working_size == "auto":
        working_size = math.ceil(input_size / views.crop_low)
    return config.model_copy(
        update={
            "data": data.model_copy(update={"working_size": working_size}),
            "views": views.model_copy(update={"refresh_epochs": refresh}),
            "training": training.model_copy(update={"epochs": epochs, "anchor_learning_rate": rate}),
        }
    )


def readable_errors(model: type[BaseModel], error: ValidationError, prefix: str) -> str:
    """Pydantic's findings as sentences, each setting named in full from ``prefix``."""
    return "\n".join(_readable(model, detail, prefix) for detail in error.errors())


def _readable(model: type[BaseModel], detail: Any, prefix: str = "") -> str:
    location = [str(part) for part in detail["loc"]]
    if detail["type"] == "extra_forbidden":
        section: type[BaseModel] = model
        for part in location[:-1]:
            annotation = section.model_fields[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                section = annotation
        full = prefix + ".".join(location)
        return f"{full}: " + unknown_name("setting", location[-1], section.model_fields)
    # Members of a union come back with the member's type as the last part of the place; the user wrote none of it.
    fields = [part for part in location if part.replace("_", "").isalnum() and not part[:1].isdigit()]
    known = []
    current: Any = model
    for part in fields:
        if not (isinstance(current, type) and issubclass(current, BaseModel)) or part not in current.model_fields:
            break
        known.append(part)
        current = current.model_fields[part].annotation
    choices = [str(choice) for choice in get_args(current) if isinstance(choice, str)]
    wanted = f" Valid: {', '.join(choices)}." if choices else ""
    return f"{prefix}{'.'.join(known or location)}: found {_shown(detail['input'])}. {detail['msg']}.{wanted}"


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size > MOST_BYTES:
            raise ConfigError(f"{path} holds {status.st_size:,} bytes. Wanted: settings, at most {MOST_BYTES:,} bytes.")
        if not stat.S_ISREG(status.st_mode):  # to open a pipe can wait for ever, and a device may have no end
            raise OSError("not a regular file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"No configuration file at {path}. Wanted: a YAML file, as a run folder's config.yaml."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text: {error}.") from None
    values = _parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} holds no settings. Wanted: sections with keys, as `training: {{epochs: 5}}`.")
    return values


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    # PyYAML lets through what Python says of a date, a number or a nesting that it cannot construct.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{where} is not YAML: {' '.join(str(error).split())[:300]}.") from None


class _Loader(yaml.SafeLoader):
    """Safe, and strict where YAML is silent or has no bound: keys that stand twice, aliases of aliases, numbers."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[yaml.Node, int] = {}  # values in each node, every alias written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if node is None or node in self._sizes:
            return node
        if alias:
            raise yaml.YAMLError(f"a value holds itself{node.start_mark}")
        if len(self._sizes) > MOST_VALUES:
            raise yaml.YAMLError(f"it holds more than {MOST_VALUES:,} values")
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
            keys: set[tuple[str, str]] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if (key.tag, key.value) in keys:
                    raise yaml.YAMLError(f"the key {key.value!r:.100} stands twice in one section{key.start_mark}")
                keys.add((key.tag, key.value))
        self._sizes[node] = 1 + sum(self._sizes[part] for part in inner)
        if self._sizes[node] > MOST_VALUES:
            raise yaml.YAMLError(f"it holds more than {MOST_VALUES:,} values, each alias counted")
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value: str = super().construct_scalar(node)
        value.encode()  # half of a character, as "\\ud800", is no text
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if abs(value) > sys.float_info.max:
            raise yaml.YAMLError(f"a number of {value.bit_length()} bits is too large{node.start_mark}")
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _shown(value: object) -> str:
    try:
        return f"{value!r:.200}"
    except ValueError:  # Python writes no integer of more than a few thousand digits
        return "a very large number"


def _assign(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key!r} is a single value, not a section.")
        values = inner
    values[keys[-1]] = value
