"""Find methods by name: ours, those of installed packages, and those registered in this process.

Ours are the files in ``finealign.methods``, whose variable ``METHOD`` is a ``Method`` subclass; a method has the name
of its file, with hyphens in place of underscores. A package offers methods by entry points of the group
``finealign.methods``, NAME = "module:Class". Nothing of a package is imported before its method is asked for.
"""

import pkgutil
import re
import sys
from collections.abc import Sequence
from copy import deepcopy
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic import ValidationError

from finealign.config import MethodSettings, merged, readable_errors
from finealign.errors import ConfigError, one_line, unknown_name
from finealign.method.base import Method, MethodOptions
from finealign.types import Score, TextFeatures

GROUP = "finealign.methods"  # our package, and the group of entry points of others
_NAME = re.compile(r"[^\W_][\w.-]*")  # part of the name of a run's folder, and before the @ of a preset
_registered: dict[str, type[Method]] = {}  # by ``register``, in this process


def method_names() -> tuple[str, ...]:
    """Return the names of all methods, sorted. Those of packages may turn out not to load."""
    return tuple(sorted({*_own_names(), *_registered, *_offered()}))


def find_method(name: str) -> type[Method]:
    """Return the class of the named method.

    Raises ConfigError for an unknown name, and for a method of a package that does not load.
    """
    if name in _own_names():
        method_class: type[Method] = import_module(f"{GROUP}.{name.replace('-', '_')}").METHOD
        return method_class
    if name in _registered:
        return _registered[name]
    if offered := _offered().get(name):
        return _load(name, offered)
    raise ConfigError("method.name: " + unknown_name("method", name, method_names()))


def register(name: str, method: type[Method]) -> None:
    """Give a method a name, in this process. A class that was defined anew takes the place of its former self.

    Raises ConfigError if the class is no method, or the name is not free or cannot be one.
    """
    method_class = _checked(method, "The method to register")
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r:.100} cannot be the name of a method. Wanted: letters, digits, hyphens, dots and underscores, "
            "first a letter or a digit."
        )
    problem = ""
    if name in _own_names():
        problem = "is a method of finealign"
    elif name in _registered and _path(_registered[name]) != _path(method_class):
        problem = f"is registered for {_path(_registered[name])}"
    elif (offered := _offered().get(name)) and _load(name, offered) is not method_class:
        problem = f"is a method of {_package(offered[0])}"
    if problem:
        raise ConfigError(
            f"The name {name!r} {problem}, so {_path(method_class)} cannot have it. Wanted: register() with another "
            "name."
        )
    _registered[name] = method_class


def name_of(method: type[Method]) -> str:
    """Return a method's name. A class that has none is registered by its own: MyMethod as ``my-method``.

    Raises ConfigError as ``register`` does.
    """
    method_class = _checked(method, "method")
    for name in _own_names():
        if _path(method_class).startswith(f"{GROUP}.{name.replace('-', '_')}:"):
            return name
    for name, known in _registered.items():
        if known is method_class:
            return name
    package = method_class.__module__.partition(".")[0]
    for name, offered in _offered().items():  # only packages that are imported already
        there = offered[0].module.partition(".")[0] == package and name not in _own_names()
        if there and _load(name, offered) is method_class:
            return name
    name = re.sub(r"(?<=[^\W_A-Z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", method_class.__name__.strip("_")).lower()
    register(name, method_class)
    return name


def origin_of(name: str) -> str:
    """Return where a method is from: "" for ours, else its package with the version, or the path of its class."""
    if name in _own_names():
        return ""
    if name in _registered:
        return f"the class {_path(_registered[name])}"
    offered = _offered().get(name)
    return _package(offered[0]) if offered else ""


def broken_plug_ins() -> list[str]:
    """Return a sentence for each method of a package that cannot be used. All of them are imported for that."""
    return [problem for name in _offered() if (problem := _problem(name))]


def refuse_clash(name: str) -> list[str]:
    """Raise ConfigError if a package offers a method under the name of this one, which is ours.

    Returns a sentence for each other method of ours whose name a package claims. Nothing is imported.
    """
    clashes = {own: _clash(own, offered) for own, offered in _offered().items() if own in _own_names()}
    if problem := clashes.pop(name, ""):
        raise ConfigError(problem)
    return list(clashes.values())


def describe_methods() -> list[dict[str, Any]]:
    """Describe each method that loads: its name, its presets, whether it trains, what it is, and where it is from.

    What it is is the first line of its module's docstring, or of its class's if it is not ours.
    """
    rows = []
    for name in method_names():
        try:
            method_class = find_method(name)
        except ConfigError:
            continue
        origin, module = origin_of(name), sys.modules[method_class.__module__]
        texts = (method_class.__doc__, module.__doc__) if origin else (module.__doc__, method_class.__doc__)
        about = next((text.strip().splitlines()[0] for text in texts if text and text.strip()), "")
        rows.append(
            {
                "name": name,
                "presets": list(method_class.presets),
                "trains": method_class.trains,
                "about": about,
                "from": origin or "finealign",
            }
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
    if "class_prior" in find_method(name).Options.model_fields:
        return
    valid = [
        known
        for known in method_names()
        if not _problem(known) and "class_prior" in find_method(known).Options.model_fields
    ]
    raise ConfigError(
        f"method.class_prior: the method {name!r} expects no shares of classes, so there is none to give. Methods "
        f"that do: {', '.join(valid)}."
    )


def inference_method(settings: MethodSettings) -> MethodSettings:
    """Return the method's name and the options that scoring needs, defaults included. Raises ConfigError."""
    options = method_options(settings).model_dump(include=find_method(settings.name).inference_options())
    return MethodSettings(name=settings.name, **options)


def choose_score(name: str, asked: str | None, valid: Sequence[Score] | None = None) -> Score:
    """Return the score that the named method classifies by: ``asked``, or its default if that is None or "auto".

    ``valid`` are the method's scores, for one that is at hand. Raises ConfigError for a score that the method does not
    have, or an unknown method.
    """
    valid = find_method(name).scores if valid is None else valid
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
    method = bare_method(settings, texts, logit_scale=logit_scale, token_width=token_width)
    method.study(texts)
    return method


def bare_method(settings: MethodSettings, texts: TextFeatures, *, logit_scale: float, token_width: int = 0) -> Method:
    """Make a method whose state is to be loaded: as ``create_method``, but it does not study the texts."""
    options: Any = method_options(settings)
    method = find_method(settings.name)(options, texts, logit_scale=logit_scale)
    method.suit_tower(token_width)
    return method


def copy_method(given: Method, settings: MethodSettings, texts: TextFeatures, *, token_width: int = 0) -> Method:
    """Return a copy of a method that the caller made, to be trained in its place.

    Raises ConfigError if its state is not that of a method made from these settings and texts.
    """
    like = bare_method(settings, texts, logit_scale=given.logit_scale, token_width=token_width)
    found, wanted = ({name: tuple(value.shape) for name, value in of.state_dict().items()} for of in (given, like))
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise ConfigError(
                f"method: the instance of {_path(type(given))} was made for other texts or another backbone: its "
                f"{name!r} is of shape {found.get(name)}, wanted {wanted.get(name)}. Give the class, or an instance "
                "that create_method made from the texts of these classes."
            )
    return deepcopy(given)


# --- methods of packages ----------------------------------------------------------------------------------------------


def _own_names() -> set[str]:
    modules = pkgutil.iter_modules(import_module(GROUP).__path__)
    return {module.name.replace("_", "-") for module in modules}


def _offered() -> dict[str, list[EntryPoint]]:
    """The methods that installed packages offer, by name. Nothing of the packages is imported."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(point.name, []).append(point)
    return found


def _load(name: str, offered: Sequence[EntryPoint]) -> type[Method]:
    """Import the method that a package offers. Raises ConfigError, which names package and method."""
    point, *others = offered
    package = _package(point)
    where = f"method.name: the plug-in {name!r} of {package}"
    if others:
        also = ", ".join(_package(other) for other in others)
        raise ConfigError(f"{where} is also offered by {also}. Uninstall all but one of them.")
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where} has no name that a method can have: letters, digits, hyphens, dots and underscores, first a "
            f"letter or a digit. Ask its authors for another one, or uninstall it."
        )
    try:
        found = point.load()
    except (Exception, SystemExit) as error:  # whatever a stranger's module does while it is imported
        raise ConfigError(
            f"{where} cannot be imported from {point.value!r}: {type(error).__name__}: {one_line(str(error))}. Mend or "
            f"uninstall {package}."
        ) from error
    return _checked(found, f"{where}, {point.value!r},")


def _checked(found: Any, what: str) -> type[Method]:
    """Return what was found if it is a subclass of Method; else raise ConfigError. ``what`` begins the message."""
    if not (isinstance(found, type) and issubclass(found, Method)) or found is Method:
        raise ConfigError(f"{what} is {found!r:.100}, no method. Wanted: a subclass of finealign.method.base.Method.")
    if not (isinstance(found.Options, type) and issubclass(found.Options, MethodOptions)):
        raise ConfigError(
            f"{what} is {_path(found)}, whose Options are {found.Options!r:.100}. Wanted: a subclass of "
            "finealign.method.base.MethodOptions."
        )
    return found


def _problem(name: str) -> str:
    """Why a method of a package cannot be used; empty if it can, or is ours."""
    offered = _offered().get(name)
    if not offered:
        return ""
    if name in _own_names():
        return _clash(name, offered)
    try:
        _load(name, offered)
    except ConfigError as error:
        return str(error)
    return ""


def _clash(name: str, offered: Sequence[EntryPoint]) -> str:
    packages = ", ".join(_package(point) for point in offered)
    return (
        f"method.name: {packages} offers a plug-in {name!r}, which is the name of a method of finealign. Uninstall it, "
        "or ask its authors for another name."
    )


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _path(method_class: type) -> str:
    return f"{method_class.__module__}:{method_class.__qualname__}"
