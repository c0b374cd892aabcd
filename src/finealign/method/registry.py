"""Find methods by name. Each is a file in ``finealign.methods`` whose variable ``METHOD`` is a ``Method`` subclass.

On the command line a method has the name of its file, with hyphens in place of underscores.
"""

import pkgutil
import sys
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from finealign.config import MethodSettings, merged, readable_errors
from finealign.errors import ConfigError, unknown_name
from finealign.method.base import Method, MethodOptions
from finealign.types import Score, TextFeatures

PLUGINS = "finealign.methods"


def method_names() -> tuple[str, ...]:
    """Return the names of all methods, sorted."""
    modules = pkgutil.iter_modules(import_module(PLUGINS).__path__)
    return tuple(sorted(module.name.replace("_", "-") for module in modules))


def find_method(name: str) -> type[Method]:
    """Return the class of the named method. Raises ConfigError for an unknown name."""
    if name not in method_names():
        raise ConfigError("method.name: " + unknown_name("method", name, method_names()))
    method_class: type[Method] = import_module(f"{PLUGINS}.{name.replace('-', '_')}").METHOD
    return method_class


def describe_methods() -> list[dict[str, Any]]:
    """Describe each method: its name, its presets, whether it trains, and the first line of its module's docstring."""
    rows = []
    for name in method_names():
        method_class = find_method(name)
        about = (sys.modules[method_class.__module__].__doc__ or "").splitlines()[0]
        rows.append(
            {"name": name, "presets": list(method_class.presets), "trains": method_class.trains, "about": about}
        )
    return rows


def method_settings(spec: str) -> dict[str, Any]:
    """Return the settings that ``NAME`` or ``NAME@PRESET`` stands for, nested as ``make_config`` takes them.

    With the name alone, all other settings keep the defaults that the methods share. The preset ``published`` has the
    settings that the method's authors report. Raises ConfigError for an unknown method or preset.
    """
    name, at, preset = spec.partition("@")
    presets = find_method(name).presets
    if not at:
        return {"method": {"name": name}}
    if preset not in presets:
        valid = ", ".join(f"{name}@{known}" for known in presets) or f"{name} alone"
        raise ConfigError(f"method.name: {name!r} has no preset {preset!r}. Valid: {valid}.")
    return merged(presets[preset], {"method": {"name": name}})


def method_options(settings: MethodSettings) -> MethodOptions:
    """Return the method's own options, checked. Raises ConfigError, which names each wrong option."""
    method_class = find_method(settings.name)
    try:
        return method_class.Options.model_validate(settings.options)
    except ValidationError as error:
        raise ConfigError(readable_errors(method_class.Options, error, "method.")) from None


def require_class_prior(name: str) -> None:
    """Raise ConfigError if the named method expects no shares of classes. The error names those that do."""
    valid = [known for known in method_names() if "class_prior" in find_method(known).Options.model_fields]
    if find_method(name) and name not in valid:
        raise ConfigError(
            f"method.class_prior: the method {name!r} expects no shares of classes, so there is none to give. Methods "
            f"that do: {', '.join(valid)}."
        )


def inference_method(settings: MethodSettings) -> MethodSettings:
    """Return the method's name and the options that scoring needs, defaults included. Raises ConfigError."""
    options = method_options(settings).model_dump(include=set(find_method(settings.name).inference_options))
    return MethodSettings(name=settings.name, **options)


def choose_score(name: str, asked: str | None) -> Score:
    """Return the score that the named method classifies by: ``asked``, or its default if that is None or "auto".

    Raises ConfigError for a score that the method does not have, or an unknown method.
    """
    valid = find_method(name).scores
    if asked in (None, "auto"):
        return valid[0]
    for score in valid:
        if asked == score:
            return score
    raise ConfigError(f"The method {name!r} has no score {asked!r}. Valid: {', '.join(valid)}.")


def create_method(settings: MethodSettings, texts: TextFeatures, *, logit_scale: float, token_width: int = 0) -> Method:
    """Make a method, initialised from the texts and ready to train or to score.

    ``token_width`` is the backbone's; 0 means that its image tower has no tokens. Raises ConfigError for an unknown
    method, for wrong options, and for a method that needs tokens if there are none.
    """
    options: Any = method_options(settings)
    method_class = find_method(settings.name)
    if method_class.salient and not token_width:
        raise ConfigError(
            f"method.name: {settings.name} pools patch tokens, and this backbone's image tower has none. "
            "Wanted: an open_clip vision transformer, as ViT-B-32-quickgelu/openai; or another method."
        )
    method = method_class(options, texts, logit_scale=logit_scale)
    method.make_prompts(token_width)
    return method
