"""Read tables as spreadsheets write them: separated by commas, semicolons or tabs, the header in any case."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MOST_HEADER = 1_000_000  # characters
SEPARATORS = (",", ";", "\t")
_TOLD = re.compile(r"sep=(.)\r?\n?")  # the line by which a spreadsheet tells the separator


class TableError(Exception):
    """A text is no such table. The message is the reason alone; ``line`` is where, counted from 1."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


@dataclass(frozen=True)
class Table:
    """A table whose header was read; its rows are still to be read."""

    header: tuple[str, ...]
    separator: str
    first_line: int  # of the header, counted from 1
    rest: str  # the text from the header on

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """The rows below the header that are not blank, each with its line. Raises TableError."""
        lines = csv.reader(io.StringIO(self.rest, newline=""), delimiter=self.separator, strict=True)
        last = 0
        try:
            for number, row in enumerate(lines):
                last = lines.line_num
                if number and row:
                    yield last + self.first_line - 1, row
        except csv.Error as error:
            raise TableError(str(error), last + self.first_line) from error

    def index(self, column: str) -> int:
        """The position of a column, given in lower case: by its exact name if one has it, else by any case."""
        names = self.header if self.header.count(column) == 1 else [name.casefold() for name in self.header]
        return names.index(column)

    def count(self, column: str) -> int:
        """How many columns have the name, given in lower case: exactly if one has, else in any case."""
        exact = self.header.count(column)
        return exact if exact == 1 else [name.casefold() for name in self.header].count(column)


def open_table(text: str, columns: Sequence[str]) -> Table:
    """Read the header of a table in which ``columns``, in lower case, are wanted.

    The separator is the one by which the header has these columns, or a comma if it has them by none; a first line such
    as ``sep=;`` tells it. Raises TableError.
    """
    told = _TOLD.match(text)
    rest, first_line = (text[told.end() :], 2) if told else (text, 1)
    tables = [
        Table(_header(rest, separator, first_line), separator, first_line, rest)
        for separator in ([told[1]] if told else SEPARATORS)
    ]
    return next((table for table in tables if all(map(table.count, columns))), tables[0])


def _header(text: str, separator: str, line: int) -> tuple[str, ...]:
    lines = csv.reader(io.StringIO(text[:MOST_HEADER], newline=""), delimiter=separator, strict=True)
    try:
        first: list[str] = next(lines, [])
    except csv.Error as error:
        raise TableError(str(error), line) from error
    return tuple(name.strip() for name in first)
