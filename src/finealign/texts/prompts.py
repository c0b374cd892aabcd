"""Class names, templates and descriptions: read them from files, check them, and build the ``Texts`` of a run."""

import csv
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from finealign.errors import PromptError, display_path
from finealign.runtime.textfile import TextFileError, read_text
from finealign.texts.class_lists import names_in, names_in_json
from finealign.texts.names import Matcher, fold, same
from finealign.types import Texts

# Neutral wording only: a template that names a domain would be a hidden setting for one data set.
DEFAULT_TEMPLATES = (
    "a photo of a {}.",
    "a close-up photo of a {}.",
    "a photo of one {}.",
    "a cropped photo of a {}.",
    "a photo showing {}.",
    "an image of a {}.",
)
MOST_BYTES = 100_000_000  # the largest file of names, templates or descriptions that is read
# Lone surrogates, as JSON's "\ud800" yields them: they cannot be tokenised or written as UTF-8.
_HALF = re.compile("[\ud800-\udfff]")

# What cannot be seen and copying leaves around a name: white space, its kin of no width, and byte order marks.
_AROUND = re.compile(r"^[\s\u200b\u2060\ufeff]+|[\s\u200b\u2060\ufeff]+$")


def read_classes(source: str | Path) -> tuple[str, ...]:
    """Read class names from a file, as ``class_lists.names_in`` does, or from a comma-separated list.

    A string is taken as a path if a file of that name exists, else as a list. Names are stripped and normalised to
    Unicode NFC. Raises PromptError if the file or the list cannot be read, or as ``check_classes`` does.
    """
    text = str(source)
    path = Path(text)
    if isinstance(source, Path) or _is_there(path, Path.is_file):
        text = _read_text(path, "class names", "a UTF-8 text file with one class name a line")
        names = names_in(text, path)
        return check_classes(names, where=display_path(path))
    if text.lstrip().startswith("[") and text.rstrip().endswith("]"):
        return check_classes(names_in_json(text, "The list in --classes"), where="--classes")
    if "," not in text:
        found = (
            "Found a folder, which is neither a file nor a list,"
            if text and _is_there(path, Path.is_dir)
            else "Found neither a file nor a list"
        )
        raise PromptError(
            f"{found} in --classes {text!r:.200}. Wanted: a text file with one class name a "
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
    """Check class names. Returns them stripped, with white space collapsed, in Unicode NFC.

    ``where`` says in error messages where the names come from. Raises PromptError if a name is blank, is not text,
    holds a control character or lone surrogate, or is the ``same`` as another, or if there are fewer than two names.
    """
    if isinstance(names, str):
        raise PromptError(f"Found one text, {names!r:.100}, as class names. Wanted: a list with at least two names.")
    not_text = [name for name in names if not isinstance(name, str)]
    if not_text:
        raise PromptError(f"{where}: {not_text[0]!r:.100} is not text. Wanted: class names as text.")
    cleaned = tuple(" ".join(unicodedata.normalize("NFC", name).split()) for name in names)
    for name in cleaned:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
            raise PromptError(f"{where}: the name {name!r:.100} holds a control character or half of one. Remove it.")
    # A name of invisible characters alone counts as blank.
    visible = [any(unicodedata.category(character)[0] in "LMNPS" for character in name) for name in cleaned]
    blank = [str(position) for position, is_visible in enumerate(visible, 1) if not is_visible]
    if blank:
        raise PromptError(f"{where} has a blank name at position {', '.join(blank[:5])}. Remove it or fill it in.")
    _refuse_twins(cleaned, where)
    if len(cleaned) < 2:
        content = f"only {cleaned[0]!r:.100}" if cleaned else "no name"
        raise PromptError(f"{where} holds {content}. Wanted: at least two classes, or there is nothing to tell apart.")
    return tuple(_AROUND.sub("", name) for name in cleaned)


def _refuse_twins(names: Sequence[str], where: str) -> None:
    """Raise PromptError where a name is the ``same`` as an earlier one."""
    by_folded: dict[str, list[str]] = {}
    for name in names:
        alike = by_folded.setdefault(fold(name), [])
        for earlier in alike:
            if same(earlier, name):
                variant = f"and {earlier!r:.100} are the same name but for case or spacing, or what cannot be seen"
                problem = "stands twice" if earlier == name else variant
                raise PromptError(f"{where}: {name!r:.100} {problem}. Keep one of them.")
        alike.append(name)


def read_descriptions(path: Path) -> dict[str, list[str]]:
    """Read descriptions from a JSON file of the form ``{"class": ["a sentence", ...]}``.

    Returns the stripped sentences by class name. Raises PromptError if the file cannot be read or has another form, if
    a class stands twice in it, or if a class has no sentence or a blank one.
    """
    text = _read_text(path, "descriptions", 'a JSON file {"class": ["a sentence", ...]}')
    shown = display_path(path)
    try:
        parsed = json.loads(text, object_pairs_hook=_without_repeats)
    except ValueError as error:
        raise PromptError(f"{shown} is not JSON: {error}. Wanted: {{'class': ['a sentence', ...]}}.") from None
    except RecursionError:
        raise PromptError(f"{shown} is nested too deep. Wanted: {{'class': ['a sentence', ...]}}.") from None
    return _check_mapping(parsed, shown)


def read_templates(path: Path) -> tuple[str, ...]:
    """Read templates from a text file: one per line, each with one ``{}`` for the class name. Blank lines are skipped.

    Raises PromptError if the file cannot be read, or as ``check_templates`` does.
    """
    lines = _read_text(path, "templates", "a text file with one template a line").split("\n")
    return check_templates([line for line in lines if line.strip()], where=display_path(path))


def check_templates(templates: Sequence[str], *, where: str = "the templates") -> tuple[str, ...]:
    """Check templates. Returns them stripped.

    ``where`` says in error messages where the templates come from. Raises PromptError if there is no template, or if
    one is not text with exactly one ``{}``.
    """
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
    """Check class names, descriptions and templates, and combine them into the texts of a run.

    Without ``descriptions``, the templates filled with the class name are used as descriptions. Without ``templates``,
    ``DEFAULT_TEMPLATES`` are used. Keys of ``descriptions`` are matched to class names as ``Matcher`` does.

    Raises PromptError as the checks of the parts do, if a key matches no class, or if a class has no description.
    """
    names = check_classes(classes)
    prompts = check_templates(DEFAULT_TEMPLATES if templates is None else templates)
    if descriptions is None:
        filled = tuple(tuple(template.replace("{}", name) for template in prompts) for name in names)
        return Texts(classes=names, descriptions=filled, templates=prompts)
    by_key = _check_mapping(descriptions, "the descriptions")
    keys = _keys_of(names, list(by_key))
    missing = [name for name, key in zip(names, keys, strict=True) if key is None]
    if missing:
        raise PromptError(
            f"The descriptions miss {len(missing)} of {len(names)} classes: {_some(missing)}. "
            "Wanted: at least one sentence for every class name, under that very name."
        )
    unknown = sorted(set(by_key) - set(keys))
    if unknown:
        raise PromptError(
            f"The descriptions name {len(unknown)} classes that are not in the class list: {_some(unknown)}. "
            "Remove them or add the class names."
        )
    sentences = tuple(tuple(by_key[key]) for key in keys if key is not None)
    return Texts(classes=names, descriptions=sentences, templates=prompts)


def _keys_of(names: Sequence[str], keys: Sequence[str]) -> list[str | None]:
    """The key that means each name, None where there is none. A key that is a name itself goes first."""
    meant, known = Matcher(names), set(names)
    found: dict[int, str] = {}
    for key in sorted(keys, key=lambda key: key not in known):
        if len(places := meant(key)) == 1:
            found.setdefault(places[0], key)
    return [found.get(index) for index in range(len(names))]


def _check_mapping(descriptions: object, where: str) -> dict[str, list[str]]:
    """The stripped sentences by class name in NFC. Raises PromptError."""
    if not isinstance(descriptions, Mapping):
        raise PromptError(
            f"{where}: found {type(descriptions).__name__}. Wanted: a mapping of class name to sentences."
        )
    checked: dict[str, list[str]] = {}
    for key, sentences in descriptions.items():
        is_text = isinstance(sentences, str | bytes)
        if not isinstance(key, str) or is_text or not isinstance(sentences, Sequence):
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
    """A JSON object as a dict. Raises ValueError for a repeated key, of which ``json`` would keep only the last."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        repeated = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {repeated!r:.100} stands twice")
    return mapping


def _read_text(path: Path, what: str, expected: str) -> str:
    r"""The text of a file, with every line end as ``\n``. Raises PromptError."""
    shown = display_path(path)
    try:
        return io.StringIO(read_text(path, most_bytes=MOST_BYTES), newline=None).read()
    except TextFileError as error:
        problem = f"No {what} at {shown}" if error.missing else f"The {what} in {shown} cannot be read"
        raise PromptError(f"{problem}: {error}. Wanted: {expected}.") from None


def _is_there(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except (OSError, ValueError):  # a list of names may be too long for a path, or hold a null byte
        return False


def _some(names: Sequence[str], most: int = 10) -> str:
    listed = ", ".join(f"{name!r:.100}" for name in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
