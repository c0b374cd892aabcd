"""Read class names from a file: one name a line, JSON, YAML, or the column of a table with the names.

A file with one name a line may hold any names, but not lines that belong to another kind of list: such a line would
become a class of its own, called ``[`` or ``"pansy",``. A JSON list is the way to give names that look like that.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finealign.errors import ConfigError, PromptError, display_path
from finealign.runtime.delimited import Table, TableError, open_table
from finealign.runtime.strict_yaml import parse_yaml

# The columns that a table may have its class names in, the likeliest first.
COLUMNS = ("name", "class_name", "classname", "class name", "class", "category", "species", "label", "names", "classes")
# The keys under which settings of other tools, as YOLO's or COCO's, have their class names.
KEYS = ("names", "classes", "class_names", "categories", "labels", "id2label", "label2id")
# A number or an identifier of WordNet, and what comes behind it: "0 pansy", "1. pansy", "[2] pansy", "n01440764 tench".
ID = re.compile(r"[\[(]?(n\d{8}|\d+)(?:[\])]|\s*[.,:;=)]|\s)\s*([^\d\s].*)")
LONGEST = 1000  # characters of a line that are looked at; no text tower takes so many
WANTED = "Wanted: one class name a line, a JSON or YAML list, or a CSV with a column name"
WAY_OUT = 'If that is how the class is called, give a JSON list: ["first name", "second name"].'


def names_in(text: str, path: Path) -> list[str]:
    """The class names in the text of a file, in their order, as they are written; ``path`` is of the file.

    Raises PromptError where the text is none of the kinds above, or looks like another.
    """
    shown, suffix = display_path(path), path.suffix.lower()
    if suffix == ".json":
        return names_in_json(text, shown)
    if suffix in (".yaml", ".yml"):
        return _of_value(_yaml(text, shown), shown)
    if (table := _table(text, shown, suffix)) is not None:
        return table
    lines = text.split("\n")
    # Blank lines at the end of the file are not classes; a blank line between names is an error.
    while lines and not lines[-1].strip():
        lines.pop()
    begun = text.lstrip("\ufeff \t\r\n")[:1] in ("[", "{")
    bullets = [line.lstrip().startswith("- ") for line in lines if line.strip() not in ("", "---")]
    if begun or (bullets and all(bullets)):
        for parse in (_json, _yaml):
            try:
                return _of_value(parse(text, shown), shown)
            except _NotParsedError:
                continue
    _refuse_other_lists(lines, shown)
    return lines


def names_in_json(text: str, shown: str) -> list[str]:
    """The class names in a JSON text; ``shown`` says in messages where it is from. Raises PromptError."""
    return _of_value(_json(text, shown), shown)


class _NotParsedError(PromptError):
    """A text is not of the format that it was tried as."""


def _json(text: str, shown: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise _NotParsedError(f"{shown} is not JSON: {error}. {WANTED}.") from None


def _yaml(text: str, shown: str) -> Any:
    try:
        return parse_yaml(text, shown)
    except ConfigError as error:
        raise _NotParsedError(f"{error} {WANTED}.") from None


class _Pairs(dict[str, Any]):
    """A JSON object that knows of a key which stands twice."""

    def __init__(self, pairs: Sequence[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        if len(self) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r:.100} stands twice")


def _of_value(value: Any, shown: str) -> list[str]:
    """The class names in a parsed value.

    A list has the names, or objects with a name each. Of a mapping they are the value of one of ``KEYS``; the values,
    where the keys are numbers; else the keys.
    """
    if isinstance(value, Mapping):
        return _of_mapping(value, shown)
    if not isinstance(value, list):
        raise PromptError(f"{shown} holds no list of class names, but {type(value).__name__}. {WANTED}.")
    if value and all(isinstance(entry, Mapping) for entry in value):
        column = next((name for name in COLUMNS if all(name in entry for entry in value)), None)
        if column is None:
            raise PromptError(f"{shown} lists objects, not all of which have a name. {WANTED}.")
        value = [entry[column] for entry in value]
    for place, name in enumerate(value, 1):
        if not isinstance(name, str):
            raise PromptError(
                f"{shown}: entry {place} is not text, but {type(name).__name__}. Write class names in quotes."
            )
    return list(value)


def _of_mapping(value: Mapping[Any, Any], shown: str) -> list[str]:
    key = next((key for key in KEYS if isinstance(value.get(key), list | Mapping)), None)
    described = all(map(_is_sentences, value.values()))
    if key and (len(value) == 1 or not described):
        return _of_value(value[key], shown)
    if not any(all(map(kind, value.values())) for kind in (_is_text, _is_number)):
        raise PromptError(
            f"{shown} is a mapping with other things than sentences or numbers for its keys, so these are no classes, "
            f"and none of its keys is {', '.join(KEYS[:-1])} or {KEYS[-1]}. {WANTED}."
        )
    if value and all(str(key).isdecimal() for key in value):
        return _of_value([value[key] for key in sorted(value, key=int)], shown)
    return _of_value(list(value), shown)


def _is_text(held: Any) -> bool:
    texts = held if isinstance(held, list) else [held]
    return all(text is None or isinstance(text, str) for text in texts)


def _is_number(held: Any) -> bool:
    return isinstance(held, int | float)


def _is_sentences(held: Any) -> bool:
    return isinstance(held, list) and held != [] and all(isinstance(text, str) for text in held)


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(text: str, shown: str, suffix: str) -> list[str] | None:
    """The names in a table; None where the text is a plain list. Raises PromptError for a table without names."""
    named_so = suffix in (".csv", ".tsv")
    try:
        tables = [(open_table(text, (column,)), column) for column in COLUMNS]
        found = [(table, column) for table, column in tables if table.count(column)]
        if found and (named_so or len(found[0][0].header) > 1):
            columns = [_column(table, column, shown) for table, column in found]
            return next((names for names in columns if not all(map(str.isdecimal, names))), columns[0])
    except TableError as error:
        if not named_so:
            return None
        raise PromptError(f"{shown}, line {error.line}: {error}. Check the quotes there.") from None
    if named_so and re.search(r"[,;\t]", text):
        header = text.partition("\n")[0]
        raise PromptError(
            f"{shown} has no column for the class names; its first line is {header!r:.200}. Wanted: a first line with "
            "the names of the columns, one of them called name."
        )
    return None


def _column(table: Table, column: str, shown: str) -> list[str]:
    if table.count(column) > 1:
        raise PromptError(f"{shown} has {table.count(column)} columns named {column!r}. Keep one of them.")
    place, names = table.index(column), []
    for line, row in table.rows():
        if len(row) > len(table.header):
            raise PromptError(
                f"{shown}, line {line}: {len(row)} values for {len(table.header)} columns. Put a name that holds "
                f"{table.separator!r} in quotes."
            )
        if not any(value.strip() for value in row):
            continue
        if len(row) <= place or not row[place].strip():
            raise PromptError(f"{shown}, line {line}: no value for {column!r}. Fill it in or delete the line.")
        names.append(row[place])
    return names


# --- one name a line --------------------------------------------------------------------------------------------------


def _pattern(expression: str) -> Callable[[str], bool]:
    compiled = re.compile(expression)
    return lambda line: compiled.search(line) is not None


def _is_punctuation(line: str) -> bool:
    kinds = {unicodedata.category(character)[0] for character in line}
    return "P" in kinds and not kinds & set("LMNS")


def _numbered(lines: Sequence[str]) -> bool:
    """Whether all lines begin with numbers or identifiers that are no part of the names.

    Both these and what comes behind them then differ from line to line; "5 euro" and "10 euro" are names.
    """
    found = [match for match in map(ID.fullmatch, lines) if match]
    return len(found) == len(lines) and all(len({match[part] for match in found}) == len(found) for part in (1, 2))


def _every(looks: Callable[[str], bool]) -> Callable[[Sequence[str]], bool]:
    return lambda lines: all(map(looks, lines))


def _rows(lines: Sequence[str]) -> bool:
    """Whether all lines have the same number of semicolons, bars, or commas without a space behind."""
    counts = [{len(re.findall(separator, line)) for line in lines} for separator in (";", r"\|", r",(?!\s)")]
    return any(len(found) == 1 and found != {0} for found in counts)


_LINES: Sequence[tuple[str, Callable[[str], bool]]] = (
    ("is punctuation and no name", _is_punctuation),
    ("looks like a comment", _pattern(r"^(#|;|//|/\*|<!--)|\s#\s")),
    ("is in quotes, as in another kind of list", _pattern(r"^[\"“„«]|^'.*'[,;]?$|^`.*`[,;]?$|\"[,;]$")),
    ("looks like the beginning of a list or a mapping", _pattern(r"[:=\[{(]$")),
    ("looks like a part of a list or a mapping", _pattern(r"^[\[{(]\s*[\"']|^\[[^\[\]]*\]$|^\S+\s*[:=]>?\s*[\[{\"']")),
    ("ends as in another kind of list; take its last character away", _pattern(r"[,;]$")),
    ("looks like an entry of a list; take the mark before it away", _pattern(r"^([-*+•]|\d+\))\s+\S")),
    ("looks like a row of a table", _pattern(r"\S\t+\S|^\|.*\|$")),
    ("looks like markup", _pattern(r"^<[^<>]+>.*</[^<>]+>$|^</?\w[^<>]*>$")),
)
_ALL_LINES: Sequence[tuple[str, Callable[[Sequence[str]], bool]]] = (
    ("begin with a number or an identifier; take these away", _numbered),
    ("look like a mapping", _every(_pattern(r"\S\s*(:|=>|=)\s+\S|[^\d\s]\s*[:=,;]\s*\d+$"))),
    (
        "are files of images; give their classes",
        _every(_pattern(r"(?i)\.(jpe?g|png|webp|gif|bmp|tiff?|heic|avif)$")),
    ),
    ("begin with a letter that counts them; take these away", _every(_pattern(r"^\(?[A-Za-z]\)\s+\S"))),
    ("look like rows of a table; put a line with the names of the columns above them, one called name", _rows),
)


def _refuse_other_lists(lines: Sequence[str], shown: str) -> None:
    """Raise PromptError at a line, or for all lines, that belong to another kind of list."""
    lines = [line.strip()[:LONGEST] for line in lines]
    for number, line in enumerate(lines, 1):
        for problem, looks in _LINES:
            if line and looks(line):
                raise PromptError(f"{shown}, line {number}: {line!r:.100} {problem}. {WANTED}. {WAY_OUT}")
    filled = [line for line in lines if line]
    if len(filled) > 2 and filled[0].lower() in COLUMNS:
        raise PromptError(f"{shown}, line 1: {filled[0]!r:.100} looks like the head of a column. Delete it. {WAY_OUT}")
    for problem, look in _ALL_LINES:
        if len(filled) > 1 and look(filled):
            raise PromptError(f"{shown}, line 1: {filled[0]!r:.100} and all lines below {problem}. {WANTED}. {WAY_OUT}")
