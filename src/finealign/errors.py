"""Errors a user can act on: what was found, what was wanted, what to do next."""

from collections.abc import Iterable
from difflib import get_close_matches


class FinealignError(Exception):
    """Base of every error that is the user's to mend; the command line prints it without a traceback."""


class ConfigError(FinealignError):
    """A setting is unknown, of the wrong type, out of range, or at odds with another."""


class ImageInputError(FinealignError):
    """There is nothing to read: no folder, no readable image, or a list that is not one."""


class PromptError(FinealignError):
    """Class names, templates or descriptions cannot be used."""


class BackboneError(FinealignError):
    """A backbone cannot be loaded, or would silently lose accuracy if it were."""


class ModelError(FinealignError):
    """A saved model or run folder is missing, torn, or not what it says it is."""


class OutputError(FinealignError):
    """A result cannot be written: something is there already, or the place is not writable."""


class StoppedError(FinealignError):
    """The work was asked to stop and did so between two pieces of it: what is done is saved and can be gone on with."""


class NotFiniteError(FinealignError):
    """The loss or what learns is no longer finite; the last good state is kept. ``images`` names those of the batch."""

    def __init__(self, message: str, *, images: list[str]) -> None:
        super().__init__(message)
        self.images = images


def unknown_name(kind: str, found: str, valid: Iterable[str]) -> str:
    """The sentence for an unknown name: what was found, the nearest valid one, and all of them."""
    names = sorted(valid)
    nearest = get_close_matches(found, names, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"Unknown {kind} {found!r}.{hint} Valid: {', '.join(names)}."
