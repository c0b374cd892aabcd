"""Read lists and CSV tables that users provide, and write the CSV file of images that were set aside."""

from collections.abc import Sequence
from pathlib import Path

from finealign.errors import ImageInputError, OutputError, display_path
from finealign.images.files import reason_of
from finealign.runtime.atomic import row_writer
from finealign.runtime.delimited import Table, TableError, open_table
from finealign.runtime.textfile import TextFileError, read_text
from finealign.types import SetAside


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read ``columns``, in lower case, of a table with a header line, as ``open_table`` does.

    Each row maps these columns, and no others, to their values, stripped of surrounding whitespace. In the column
    ``path`` the backslashes of Windows become slashes where a file is there by that name alone.

    Raises:
        ImageInputError: the file cannot be read as such a table, one of the columns is missing or occurs twice, or a
            row has no value in one of them. For a row, the message gives the line.
    """
    shown = f"'{display_path(path)}'"
    rows: list[dict[str, str]] = []
    try:
        table = open_table(read_list(path), columns)
        for column in columns:
            if table.count(column) != 1:
                raise ImageInputError(
                    f"{shown} has {table.count(column)} columns named {column!r}, wanted one; its header is "
                    f"{','.join(table.header)!r:.200}. Start the file with a header line, its columns separated by "
                    "commas, semicolons or tabs."
                )
        for line, row in table.rows():
            rows.append(_values(row, line, table, columns, shown))
    except TableError as error:
        raise ImageInputError(f"{shown}, line {error.line}: {error}. Check the quotes there.") from error
    for found in rows:
        if "path" in found:
            found["path"] = with_slashes(found["path"], path.parent)
    return rows


def _values(row: Sequence[str], line: int, table: Table, columns: Sequence[str], shown: str) -> dict[str, str]:
    """The values of a row in ``columns``. Raises ImageInputError."""
    where, width = f"{shown}, line {line}", len(table.header)
    if len(row) > width:
        raise ImageInputError(
            f"{where}: more values than the {width} columns of the header. Quote values with {table.separator!r}."
        )
    values = {}
    for column in columns:
        place = table.index(column)
        values[column] = row[place].strip() if place < len(row) else ""
        if not values[column]:
            raise ImageInputError(f"{where}: no value for {column!r}. Fill it in or delete the line.")
    return values


def with_slashes(path: str, folder: Path) -> str:
    """The path, below ``folder``, as Windows means it, where that is there and the path as written is not."""
    if "\\" not in path:
        return path
    meant = path.replace("\\", "/")
    try:
        return meant if (folder / meant).exists() and not (folder / path).exists() else path
    except OSError:  # such as a name that is too long, which is told when the image is read
        return path


def set_aside_csv(rows: Sequence[SetAside], path: Path) -> None:
    """Write ``rows`` to ``path`` as a UTF-8 CSV file with the columns path and reason. An existing file is replaced.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    try:
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            write = row_writer(file)
            write(["path", "reason"])
            for row in rows:
                write([row.path, row.reason])
    except OSError as error:
        raise OutputError(
            f"Cannot write '{display_path(path)}': {reason_of(error)}. Choose an output folder that can be written."
        ) from error


def read_list(path: Path) -> str:
    """Read the text of a list or a table of images. Raises ImageInputError where it cannot be read."""
    try:
        text, problem = read_text(path), "empty file"
    except TextFileError as error:
        text, problem = "", str(error)
    if not text:
        shown = f"'{display_path(path)}'"
        raise ImageInputError(f"Cannot read {shown}: {problem}. Give a list that can be read. Save it as UTF-8.")
    return text
