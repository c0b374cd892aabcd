"""Prepare a fit: check the settings and encode the texts, once."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finealign.backbone.base import Backbone
from finealign.config import DEFAULT_BACKBONE, Config, MethodSettings, make_config, resolve
from finealign.errors import CautionWarning, ConfigError, first_few
from finealign.method.base import MethodOptions
from finealign.method.registry import choose_score, method_options, method_settings, refuse_clash
from finealign.model.known_labels import KnownLabels
from finealign.texts.shares import class_shares
from finealign.types import ImagePath, TextFeatures, Texts

MULTILINGUAL = "xlm-roberta-base-ViT-B-32/laion5b_s13b_b90k"


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a fit needs, checked, loaded and encoded. ``FineAlign.prepare`` makes it."""

    texts: Texts
    text_features: TextFeatures
    config: Config  # resolved for these images, classes and backbone
    paths: Sequence[ImagePath]  # of the images to adapt to; none has been opened yet
    backbone: Backbone
    unknown_words: str = ""  # what to tell of class names that the tokenizer has no words for
    labels: KnownLabels | None = None  # of some of the images; None where none is known


def prepare(
    texts: Texts,
    config: Config,
    paths: Sequence[ImagePath],
    backbone: Backbone,
    *,
    text_features: TextFeatures | None = None,
    labels: KnownLabels | None = None,
) -> Prepared:
    """Encode the texts, unless ``text_features`` are given, and resolve the settings. Raises BackboneError."""
    if text_features is None:
        text_features = backbone.encode_texts(texts)
    resolved = resolve(config, images=max(1, len(paths)), classes=len(texts.classes), input_size=backbone.input_size)
    return Prepared(
        texts=texts,
        text_features=text_features,
        config=resolved,
        paths=paths,
        backbone=backbone,
        unknown_words=unknown_words(texts, backbone),
        labels=labels,
    )


def unknown_words(texts: Texts, backbone: Backbone) -> str:
    """What to tell the user of class names that the backbone's tokenizer has no words for; empty if there are none.

    Only backbones that offer ``spelled_out``, which is not part of the protocol, can tell.
    """
    spelled_out = getattr(backbone, "spelled_out", None)
    found: dict[str, int] = spelled_out(texts.classes) if spelled_out else {}
    if not found:
        return ""
    what = "1 class name" if len(found) == 1 else f"{len(found)} class names"
    shown = first_few((f"{name!r:.60} as {pieces}" for name, pieces in found.items()), len(found), 3)
    return (
        f"The tokenizer has no words for {what} and reads {sum(found.values())} byte pieces: {shown}. The model may "
        "make nothing of them. Give English names, or descriptions in English, or take a backbone for more languages, "
        f"as {MULTILINGUAL}."
    )


def with_names(config: Config, *, backbone: str | None = None, method: str | None = None) -> Config:
    """The configuration with these names of a backbone or a method that is at hand, where it names no other."""
    named: dict[str, Any] = {}
    if backbone is not None and "backbone" not in config.model_fields_set:
        named["backbone"] = backbone
    if method is not None and "name" not in config.method.model_fields_set:
        named["method"] = MethodSettings(name=method, **config.method.options)
    return config.model_copy(update=named)


def check_settings(config: Config | None, arguments: Mapping[str, Any], options: MethodOptions | None = None) -> Config:
    """Return the checked settings of ``config``, or of the arguments if it is None, with all options of the method.

    ``arguments`` are backbone, method, seed, device and precision, each None if it was not given, and ``options`` are
    those of a method that is at hand. Raises ConfigError if settings are wrong or contradict each other.
    """
    if config is None:
        config = _from_arguments(arguments)
    else:
        _refuse_contradictions(config, arguments)
    # With all options written out, the record of a run stays right when a later version changes a default.
    for clash in refuse_clash(config.method.name):
        warnings.warn(clash, CautionWarning, stacklevel=2)
    if options is None:
        options = method_options(config.method)
    else:
        _refuse_other_options(config.method, options)
    written = options.model_dump()
    config = config.model_copy(update={"method": MethodSettings(name=config.method.name, **written)})
    choose_score(config.method.name, config.prediction.score)
    _refuse_missing_crops(config, options.crops_kept)
    return config


def given_shares(config: Config, classes: Sequence[str]) -> list[float] | None:
    """The share of each class if ``method.class_prior`` gives it; None if it is a word or the method has none.

    Raises ConfigError as ``class_shares`` does.
    """
    given = config.method.options.get("class_prior")
    return class_shares(given, classes) if isinstance(given, Mapping) else None


def _from_arguments(arguments: Mapping[str, Any]) -> Config:
    given = {name: value for name, value in arguments.items() if value is not None}
    method = method_settings(given.pop("method", "fair"))
    return make_config({"backbone": DEFAULT_BACKBONE, **method, **given})


def _refuse_contradictions(config: Config, arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument that differs from the configuration."""
    configured = {**config.model_dump(include=set(arguments) - {"method"}), "method": config.method.name}
    for name, argument in arguments.items():
        if argument is not None and argument != configured[name]:
            raise ConfigError(
                f"{name}={argument!r} contradicts config, which has {configured[name]!r}. Give one of them, or the "
                "same in both."
            )


def _refuse_other_options(settings: MethodSettings, options: MethodOptions) -> None:
    """Raise ConfigError for an option that the settings give otherwise than the method at hand has it."""
    checked = method_options(settings)
    for name in settings.options:
        found, wanted = getattr(checked, name), getattr(options, name)
        if found != wanted:
            raise ConfigError(
                f"method.{name}={found!r} contradicts the instance of the method, which has {wanted!r}. Give it once."
            )


def _refuse_missing_crops(config: Config, keep: int | str) -> None:
    """Raise ConfigError if more crops are to be kept than are drawn."""
    if isinstance(keep, int) and keep > config.views.crops:
        raise ConfigError(
            f"method.crops_kept={keep} is more than the {config.views.crops} crops of an image (views.crops). Use "
            "method.crops_kept=all, or raise views.crops."
        )
