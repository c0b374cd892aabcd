"""The package's exceptions, whose messages say what was found, what was expected and what to do next.

Also helpers that turn paths and errors into text that can be displayed.
"""

import os
from collections.abc import Iterable
from difflib import get_close_matches


class FinealignError(Exception):
    """Base class of the errors that a user can fix. The command line prints the message without a traceback."""


class CautionWarning(UserWarning):
    """Something speaks against adapting to these images, seen before training, or a folder holds more than images."""


class ConfigError(FinealignError):
    """A setting is unknown, has the wrong type, is out of range, or contradicts another setting."""


class ParameterError(ConfigError, ValueError):
    """``set_params`` was given a name that is no parameter. A ValueError too, as scikit-learn expects."""


class NotFittedError(FinealignError, ValueError, AttributeError):
    """The model has not been fitted or loaded yet. It is the errors that scikit-learn's NotFittedError is, too."""


class ImageInputError(FinealignError):
    """There are no images to read: the folder is missing, no image is readable, or the list of images is not valid."""


class PromptError(FinealignError):
    """Class names, templates or descriptions cannot be used."""


class BackboneError(FinealignError):
    """A backbone cannot be loaded, or would silently lose accuracy if it were loaded this way."""


class ModelError(FinealignError):
    """A saved model or run folder is missing, incomplete, or does not match its own description."""


class OutputError(FinealignError):
    """A result cannot be written: the target exists already, or its location is not writable."""


class StoppedError(FinealignError):
    """The work was stopped on request, between two steps. The finished part is saved and the work can be resumed."""


class NotFiniteError(FinealignError):
    """The loss or a learned parameter is no longer finite; the last good state is kept.

    ``images`` lists the images of the batch in which this happened.
    """

    def __init__(self, message: str, *, images: list[str]) -> None:
        super().__init__(message)
        self.images = images


def unknown_name(kind: str, found: str, valid: Iterable[str]) -> str:
    """The message for an unknown name: the name, the closest valid name if one is similar, and all valid names.

    ``kind`` says what is named, as "setting"; ``found`` is the unknown name.
    """
    names = sorted(valid)
    nearest = get_close_matches(found, names, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"Unknown {kind} {found!r}.{hint} Valid: {', '.join(names)}."


def first_few(names: Iterable[str], total: int, most: int) -> str:
    """The first ``most`` of ``total`` names with commas between, and how many more there are, if any."""
    listed = ", ".join(name for name, _ in zip(names, range(most), strict=False))
    return f"{listed} and {total - most} more" if total > most else listed


def display_path(path: str | os.PathLike[str]) -> str:
    r"""The path as text that can be encoded as UTF-8. Bytes of a file name that are not UTF-8 appear as ``\xNN``."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # a lone surrogate that encodes no byte; no file has such a name
        return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def printable(text: str) -> str:
    """The text with each unprintable character as an escape sequence.

    A file name can hold characters that move the cursor or reverse the direction of the text.
    """
    return "".join(
        char if char.isprintable() or char == " " else char.encode("unicode_escape").decode() for char in text
    )


def one_line(error: Exception | str, most: int = 200) -> str:
    """The message of an error, or any text, on one line of at most ``most`` characters.

    Runs of whitespace become one space. A longer text is cut and ends in three dots. Where the text is empty, the name
    of the type is returned.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def sentence(error: Exception | str) -> str:
    """``one_line`` of an error or a text, with a full stop at its end."""
    line = one_line(error)
    return line if line.endswith(".") else f"{line}."
