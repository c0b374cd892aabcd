"""When two spellings are one class name: strictly, to refuse the same name twice, and loosely, to match names."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence

_MINUS = "\N{MINUS SIGN}"  # stands for a hyphen that is a sign, so that it is not taken for a space
# Of a number, as in "-1" and "at -5 degrees"; behind a word of one or two characters, as in "A-" and "AB-".
_SIGN = re.compile(r"(?:^|(?<=\s))-(?=\d)|(?<=^\w)-$|(?<=^\w\w)-$|(?<=\s\w)-$|(?<=\s\w\w)-$")


def fold(name: str) -> str:
    """Reduce a name to a form that is equal for all spellings by which a class may be meant.

    The result is in Unicode NFC and case-folded. ``_``, ``-`` and runs of white space become one space, but a minus
    sign stays ("-1" is not "1", "A-" is not "A"). Invisible format characters, such as a stray BOM, are removed.
    Different classes can have the same form: see ``spelling``.
    """
    return _spaced(_normal(name).casefold())


def spelling(name: str) -> str:
    """Reduce a class name to a form that is equal for the same name written twice, and for no other name.

    As ``fold``, but a sharp s stays: "Maße" is not "Masse".
    """
    normal = _normal(name).replace("\N{LATIN CAPITAL LETTER SHARP S}", "ß")
    kept = "ß".join(part.casefold() for part in normal.split("ß"))
    return _spaced(kept)


def same(first: str, second: str) -> bool:
    """Whether two class names are the same name but for case, spacing or what cannot be seen.

    Capitals have no sharp s of their own, so "STRASSE" is "Straße".
    """
    if spelling(first) == spelling(second):
        return True
    capitals = first.isupper() or second.isupper()
    return capitals and fold(first) == fold(second)


def _normal(name: str) -> str:
    visible = "".join(character for character in name if unicodedata.category(character) != "Cf")
    return unicodedata.normalize("NFC", visible)


def _spaced(folded: str) -> str:
    signed = _SIGN.sub(_MINUS, " ".join(unicodedata.normalize("NFC", folded).split()))
    return " ".join(signed.replace("_", " ").replace("-", " ").split())


class Matcher:
    """Finds the classes that a name may mean."""

    def __init__(self, classes: Sequence[str]) -> None:
        self._places: list[defaultdict[str, list[int]]] = [defaultdict(list) for _ in _FORMS]
        for index, name in enumerate(classes):
            for form, place in zip(_FORMS, self._places, strict=True):
                place[form(name)].append(index)

    def __call__(self, name: str) -> list[int]:
        """The indices of the classes meant: one, none, or several where the name does not tell which.

        The exact name counts first, then ``spelling``, then ``fold``.
        """
        for form, place in zip(_FORMS, self._places, strict=True):
            if found := place.get(form(name)):
                return found
        return []


_FORMS: tuple[Callable[[str], str], ...] = (str, spelling, fold)
