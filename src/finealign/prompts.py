"""Class names, templates and descriptions: read, check, complete."""

import csv
import json
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from finealign.errors import PromptError
from finealign.images import display_path
from finealign.types import Texts

# Neutral photographs only: a template that names a domain would be a hidden per-set setting.
DEFAULT_TEMPLATES = (
    "a photo of a {}.",
    "a close-up photo of a {}.",
    "a photo of one {}.",
    "a cropped photo of a {}.",
    "a photo showing {}.",
    "an image of a {}.",
)
# Of a character, as JSON's "\ud800" has it: no tokenizer takes it, no file holds it.
_HALF = re.compile("[\ud800-\udfff]")


def read_classes(source: str | Path) -> tuple[str, ...]:
    """Class names from a text file (one a line), or from a comma-separated list.

    Names are Unicode, stripped and brought to NFC. Raises PromptError as ``check_classes`` does.
    """
    text = str(source)
    path = Path(text)
    if isinstance(source, Path) or _is_file(path):
        names = _read_text(path, "class names", "a UTF-8 text file with one class name a line").split("\n")
        # A closing blank line is how editors end a file, not a class.
        while names and not names[-1].strip():
            names.pop()
        return check_classes(names, where=display_path(path))
    if "," not in text:
        raise PromptError(
            f"Found neither a file nor a list in --classes {text!r:.200}. Wanted: a text file with one class name a "
            "line, or names with commas between them, as 'robin,wren,finch'."
        )
    try:
        names = next(csv.reader([text], skipinitialspace=True))
    except csv.Error as error:
        raise PromptError(
            f"The list of classes cannot be read: {error}. Put the names in a file, one a line."
        ) from None
    return check_classes(names)


def check_classes(names: Sequence[str], *, where: str = "the list of classes") -> tuple[str, ...]:
    """The names in NFC and stripped. Raises PromptError: blanks, duplicates, control characters, fewer than two."""
    if isinstance(names, str):
        raise PromptError(f"Found one text, {names!r:.100}, as class names. Wanted: a list with at least two names.")
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise PromptError(f"{where}: {wrong[0]!r:.100} is not text. Wanted: class names as text.")
    cleaned = tuple(" ".join(unicodedata.normalize("NFC", name).split()) for name in names)
    for name in cleaned:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
            raise PromptError(f"{where}: the name {name!r:.100} holds a control character or half of one. Remove it.")
    # A name of invisible characters alone is as blank as an empty one.
    visible = [any(unicodedata.category(character)[0] in "LMNPS" for character in name) for name in cleaned]
    blank = [str(position) for position, seen in enumerate(visible, 1) if not seen]
    if blank:
        raise PromptError(f"{where} has a blank name at position {', '.join(blank[:5])}. Remove it or fill it in.")
    seen: dict[str, str] = {}
    for name in cleaned:
        folded = fold(name)
        if folded in seen:
            other = seen[folded]
            alike = f"and {other!r:.100} are the same name but for case or spacing, or what cannot be seen"
            same = "stands twice" if other == name else alike
            raise PromptError(f"{where}: {name!r:.100} {same}. Keep one of them.")
        seen[folded] = name
    if len(cleaned) < 2:
        found = f"only {cleaned[0]!r:.100}" if cleaned else "no name"
        raise PromptError(f"{where} holds {found}. Wanted: at least two classes, or there is nothing to tell apart.")
    return cleaned


def fold(name: str) -> str:
    """The form under which two spellings count as the same class.

    NFC, with case, ``_``, ``-`` and white space folded, and without invisible characters such as a stray BOM.
    """
    seen = "".join(character for character in name if unicodedata.category(character) != "Cf")
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", seen).casefold())
    return " ".join(folded.replace("_", " ").replace("-", " ").split())


def read_descriptions(path: Path) -> dict[str, list[str]]:
    """Descriptions from a JSON file ``{"class": ["a sentence", ...]}``. Raises PromptError."""
    text = _read_text(path, "descriptions", 'a JSON file {"class": ["a sentence", ...]}')
    shown = display_path(path)
    try:
        found = json.loads(text, object_pairs_hook=_without_repeats)
    except ValueError as error:
        raise PromptError(f"{shown} is not JSON: {error}. Wanted: {{'class': ['a sentence', ...]}}.") from None
    except RecursionError:
        raise PromptError(f"{shown} is nested too deep. Wanted: {{'class': ['a sentence', ...]}}.") from None
    return _check_mapping(found, shown)


def read_templates(path: Path) -> tuple[str, ...]:
    """Templates from a text file, one a line with one ``{}`` for the class name. Raises PromptError."""
    lines = _read_text(path, "templates", "a text file with one template a line").split("\n")
    return check_templates([line for line in lines if line.strip()], where=display_path(path))


def check_templates(templates: Sequence[str], *, where: str = "the templates") -> tuple[str, ...]:
    """The templates stripped. Raises PromptError when there is none, or one that is no text with exactly one ``{}``."""
    if isinstance(templates, str):
        raise PromptError(f"{where}: found one text, {templates!r:.100}. Wanted: a list of templates.")
    if not templates:
        raise PromptError(f"{where}: found no template. Wanted: at least one, as 'a photo of a {{}}.'.")
    for template in templates:
        if not isinstance(template, str) or _HALF.search(template):
            raise PromptError(f"{where}: {template!r:.100} is not text. Wanted: templates as 'a photo of a {{}}.'.")
        if template.count("{}") != 1:
            raise PromptError(f"{where}: {template!r:.100} needs exactly one {{}} where the class name goes.")
    return tuple(template.strip() for template in templates)


def make_texts(
    classes: Sequence[str],
    descriptions: Mapping[str, Sequence[str]] | None = None,
    templates: Sequence[str] | None = None,
) -> Texts:
    """The checked texts of a run. Without descriptions, the filled templates stand in for them.

    Description keys are matched to class names exactly, else after ``fold``; keys of no class are errors, as are
    classes without a description. Raises PromptError.
    """
    names = check_classes(classes)
    checked = check_templates(DEFAULT_TEMPLATES if templates is None else templates)
    if descriptions is None:
        filled = tuple(tuple(template.replace("{}", name) for template in checked) for name in names)
        return Texts(classes=names, descriptions=filled, templates=checked)
    given = _check_mapping(descriptions, "the descriptions")
    by_folded = {fold(key): key for key in given}
    keys = [name if name in given else by_folded.get(fold(name)) for name in names]
    missing = [name for name, key in zip(names, keys, strict=True) if key is None]
    if missing:
        raise PromptError(
            f"The descriptions miss {len(missing)} of {len(names)} classes: {_some(missing)}. "
            "Wanted: at least one sentence for every class name, under that very name."
        )
    strangers = sorted(set(given) - set(keys))
    if strangers:
        raise PromptError(
            f"The descriptions name {len(strangers)} classes that are not in the class list: {_some(strangers)}. "
            "Remove them or add the class names."
        )
    sentences = tuple(tuple(given[key]) for key in keys if key is not None)
    return Texts(classes=names, descriptions=sentences, templates=checked)


def _check_mapping(found: object, where: str) -> dict[str, list[str]]:
    if not isinstance(found, Mapping):
        raise PromptError(f"{where}: found {type(found).__name__}. Wanted: a mapping of class name to sentences.")
    checked: dict[str, list[str]] = {}
    for key, sentences in found.items():
        single = isinstance(sentences, str | bytes)
        if not isinstance(key, str) or single or not isinstance(sentences, Sequence):
            raise PromptError(f"{where}: {key!r:.100} holds {sentences!r:.60}. Wanted: a list of sentences.")
        if _HALF.search(key):
            raise PromptError(f"{where}: the class {key!r:.100} holds half of a character. Write it anew.")
        if not sentences:
            raise PromptError(f"{where}: the class {key!r:.100} has no description. Wanted: at least one sentence.")
        for sentence in sentences:
            if not isinstance(sentence, str) or not sentence.strip() or _HALF.search(sentence):
                raise PromptError(
                    f"{where}: the class {key!r:.100} has the description {sentence!r:.60}, which is no sentence."
                )
        name = " ".join(unicodedata.normalize("NFC", key).split())
        if name in checked:
            raise PromptError(f"{where}: the class {name!r:.100} stands twice. Put its sentences into one list.")
        checked[name] = [sentence.strip() for sentence in sentences]
    return checked


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """JSON lets a key stand twice and keeps the last; the first one's sentences would be lost unsaid."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice!r:.100} stands twice")
    return found


def _read_text(path: Path, what: str, wanted: str) -> str:
    shown = display_path(path)
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path.read_text(encoding="utf-8-sig")
        problem = "not a regular file"  # to open a pipe can wait for ever, and a device may have no end
    except FileNotFoundError:
        raise PromptError(f"No {what} at {shown}: no such file. Wanted: {wanted}.") from None
    except OSError as error:
        problem = error.strerror or str(error)
    except ValueError as error:  # not UTF-8, or a name that no file can have
        problem = str(error)
    raise PromptError(f"The {what} in {shown} cannot be read: {problem}. Wanted: {wanted}.")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _some(names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(f"{name!r:.100}" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
