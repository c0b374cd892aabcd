"""One short file a method: how a batch becomes a loss, how an image gets its scores.

A new method is one new file here with a ``Method`` subclass named ``METHOD``; its name on the command line is the
file's, with hyphens.
"""

import pkgutil
from importlib import import_module
from typing import Any

from pydantic import ValidationError

from finealign.config import MethodSettings, readable_errors
from finealign.errors import ConfigError, unknown_name
from finealign.methods.base import Method, MethodOptions
from finealign.types import TextFeatures

__all__ = ["Method", "MethodOptions", "create_method", "find_method", "method_names", "method_options"]


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


def method_options(settings: MethodSettings) -> MethodOptions:
    """The method's own options, checked. Raises ConfigError naming each wrong one."""
    kind = find_method(settings.name)
    try:
        return kind.Options.model_validate(settings.options)
    except ValidationError as error:
        raise ConfigError(readable_errors(kind.Options, error, "method.")) from None


def create_method(settings: MethodSettings, texts: TextFeatures, *, logit_scale: float) -> Method:
    """A method ready to train or to score, starting from the texts. Raises ConfigError."""
    options: Any = method_options(settings)
    return find_method(settings.name)(options, texts, logit_scale=logit_scale)
