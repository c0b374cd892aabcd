"""One short file a method: how a batch becomes a loss, how an image gets its scores.

A new method is one new file here with a ``Method`` subclass named ``METHOD``; its name on the command line is the
file's, with hyphens.
"""

import pkgutil
import sys
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from finealign.config import MethodSettings, merged, readable_errors
from finealign.errors import ConfigError, unknown_name
from finealign.methods.base import Method, MethodOptions
from finealign.types import TextFeatures

__all__ = [
    "Method",
    "MethodOptions",
    "create_method",
    "describe_methods",
    "find_method",
    "method_names",
    "method_options",
    "method_settings",
]


def method_names() -> tuple[str, ...]:
    """The methods that can be asked for, sorted."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name.replace("_", "-") for name in modules if name != "base"))


def find_method(name: str) -> type[Method]:
    """The class of a method. Raises ConfigError for an unknown name."""
    if name not in method_names():
        raise ConfigError("method.name: " + unknown_name("method", name, method_names()))
    found: type[Method] = import_module(f"{__name__}.{name.replace('-', '_')}").METHOD
    return found


def describe_methods() -> list[dict[str, Any]]:
    """Name, presets, whether it trains, and the first line its file says of each method."""
    found = []
    for name in method_names():
        kind = find_method(name)
        about = (sys.modules[kind.__module__].__doc__ or "").splitlines()[0]
        found.append({"name": name, "presets": list(kind.presets), "trains": kind.trains, "about": about})
    return found


def method_settings(spec: str) -> dict[str, Any]:
    """What ``NAME`` or ``NAME@PRESET`` stands for, as ``make_config`` takes it. Raises ConfigError.

    A bare name has the defaults that all methods share; ``@published`` those its authors report.
    """
    name, at, preset = spec.partition("@")
    presets = find_method(name).presets
    if not at:
        return {"method": {"name": name}}
    if preset not in presets:
        valid = ", ".join(f"{name}@{one}" for one in presets) or f"{name} alone"
        raise ConfigError(f"method.name: {name!r} has no preset {preset!r}. Valid: {valid}.")
    return merged(presets[preset], {"method": {"name": name}})


def method_options(settings: MethodSettings) -> MethodOptions:
    """The method's own options, checked. Raises ConfigError naming each wrong one."""
    kind = find_method(settings.name)
    try:
        return kind.Options.model_validate(settings.options)
    except ValidationError as error:
        raise ConfigError(readable_errors(kind.Options, error, "method.")) from None


def create_method(settings: MethodSettings, texts: TextFeatures, *, logit_scale: float, token_width: int = 0) -> Method:
    """A method ready to train or to score, starting from the texts.

    ``token_width`` is the backbone's, 0 where it has no tokens. Raises ConfigError, also for a method that needs them.
    """
    options: Any = method_options(settings)
    kind = find_method(settings.name)
    if kind.salient and not token_width:
        raise ConfigError(
            f"method.name: {settings.name} pools patch tokens, and this backbone's image tower has none. "
            "Wanted: an open_clip vision transformer, as ViT-B-32-quickgelu/openai; or another method."
        )
    method = kind(options, texts, logit_scale=logit_scale)
    method.make_prompts(token_width)
    return method
