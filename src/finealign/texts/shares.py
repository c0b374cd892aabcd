"""The class prior as users give it: what share of the images each class is expected to have."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from finealign.errors import ConfigError, display_path
from finealign.runtime.delimited import Table, TableError, open_table
from finealign.runtime.textfile import TextFileError, read_text
from finealign.texts.names import Matcher

WANTED = 'JSON {"class": share or count}, or CSV with the columns class and share (or count)'
VALUES = ("share", "count")  # columns, of which one is wanted
MOST = 1e15  # of a count: floats are exact up to there, and sums stay finite
NUMBER = "Wanted: a share or a count, at least 0 and at most 1e15."
WORDS = ("auto", "even")
ROUNDING = 0.01  # by which shares that leave no class out may miss 1


def read_shares(path: Path) -> dict[str, float]:
    """Read a class prior from JSON, ``{"class": number}``, or from CSV with the columns class and share or count.

    Returns the numbers by class name, as they are written. Raises ConfigError if the file cannot be read, has another
    form, or names a class twice.
    """
    shown = f"'{display_path(path)}'"
    try:
        text = read_text(path)
    except TextFileError as error:
        raise ConfigError(f"The class prior {shown} cannot be read: {error}. Wanted: {WANTED}.") from None
    pairs = _from_csv(text, shown) if path.suffix.lower() in (".csv", ".tsv") else _from_json(text, shown)
    found: dict[str, float] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"The class prior {shown} names {name!r:.100} twice. Keep one line a class.")
        found[name] = value
    return found


def read_class_prior(text: str) -> str | dict[str, float]:
    """Return ``auto`` or ``even`` as they are, and of a file what ``read_shares`` reads. Raises ConfigError."""
    if text in WORDS:
        return text
    path = Path(text)
    if not path.is_file():
        raise ConfigError(
            f"The class prior '{display_path(path)}' is no word that is known here, and no file. Valid: "
            f"{', '.join(WORDS)}, or a file: {WANTED}."
        )
    return read_shares(path)


def _from_json(text: str, shown: str) -> list[tuple[str, float]]:
    try:
        parsed = json.loads(text, object_pairs_hook=tuple)  # an object is a tuple, an array a list
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The class prior {shown} is not JSON: {error}. Wanted: {WANTED}.") from None
    if not isinstance(parsed, tuple):
        raise ConfigError(f"The class prior {shown} is not an object of classes. Wanted: {WANTED}.")
    return [(str(name), _number(name, value, shown)) for name, value in parsed]


def _from_csv(text: str, shown: str) -> list[tuple[str, float]]:
    try:
        tables = [open_table(text, ("class", value)) for value in VALUES]
        table = next((table for table in tables if table.count("class")), tables[0])
        values = [value for value in VALUES if table.count(value)]
        if table.count("class") != 1 or [table.count(value) for value in values] != [1]:
            found = ",".join(table.header)
            raise ConfigError(f"The class prior {shown} has the columns {found!r:.200}. Wanted: {WANTED}.")
        return list(_rows_of(table, table.index(values[0]), shown))
    except TableError as error:
        raise ConfigError(f"The class prior {shown} is not CSV: {error}. Wanted: {WANTED}.") from None


def _rows_of(table: Table, value_column: int, shown: str) -> Iterator[tuple[str, float]]:
    class_column = table.index("class")
    for number, (_, row) in enumerate(table.rows(), start=2):
        if len(row) != len(table.header):
            raise ConfigError(
                f"The class prior {shown}, row {number}: {len(row)} values for {len(table.header)} columns."
            )
        value = row[value_column]
        if table.separator != ",":  # where commas are for decimals
            value = value.replace(",", ".")
        yield row[class_column].strip(), _number(row[class_column], value, shown)


def _number(name: object, value: object, shown: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number <= MOST:
        raise ConfigError(f"The class prior {shown} has {value!r:.60} for {str(name)!r:.100}. {NUMBER}")
    return number


def class_shares(given: Mapping[str, float], classes: Sequence[str]) -> list[float]:
    """Return the share of each class, in the order of ``classes``; they sum to 1.

    Whole numbers are counts, and a class that is not named has none. Other numbers are shares, and so are zeros alone:
    classes that are not named have what is left of 1 in equal parts. A name matches a class exactly, or else up to
    case, Unicode form and the difference between ``_``, ``-`` and white space. Raises ConfigError for a name that
    matches no class or several, for two names of one class, a number below 0 or beyond ``MOST``, shares that add up to
    more than 1, or to less without leaving a class out, and if no class is above 0.
    """
    values: dict[int, float] = {}
    matcher = Matcher(classes)
    for name, value in given.items():
        index = _class_of(name, classes, matcher)
        if index in values:
            raise ConfigError(f"The class prior names {classes[index]!r:.100} twice. Keep one number a class.")
        if not 0 <= value <= MOST:
            raise ConfigError(f"The class prior has {value} for {name!r:.100}. {NUMBER}")
        values[index] = value
    total, unnamed = math.fsum(values.values()), len(classes) - len(values)
    if total == 0 and not unnamed:
        raise ConfigError("The class prior has no class above 0. Give at least one class a share or a count.")
    if total and all(float(value).is_integer() for value in values.values()):
        return [values.get(index, 0.0) / total for index in range(len(classes))]
    if total > 1 + ROUNDING or (not unnamed and total < 1 - ROUNDING):
        raise ConfigError(
            f"The shares of the class prior add up to {total:g}. Wanted: 1, or less where classes are left out, which "
            "have what is left; or counts, which are whole numbers."
        )
    rest = max(0.0, 1 - total) / unnamed if unnamed else 0.0
    whole = total + rest * unnamed
    return [values.get(index, rest) / whole for index in range(len(classes))]


def _class_of(name: str, classes: Sequence[str], matcher: Matcher) -> int:
    matches = matcher(name)
    if len(matches) != 1:
        problem = "no class" if not matches else "several classes, write one exactly"
        valid = ", ".join(f"{known!r:.60}" for known in classes[:20])
        more = f" and {len(classes) - 20} more" if len(classes) > 20 else ""
        raise ConfigError(f"The class prior names {name!r:.100}, which is {problem}. Valid: {valid}{more}.")
    return matches[0]
