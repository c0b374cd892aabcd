"""Read lists and CSV tables that users provide, and write the CSV file of images that were set aside."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from finealign.errors import ImageInputError, OutputError, display_path
from finealign.images.files import reason_of
from finealign.runtime.atomic import row_writer
from finealign.runtime.textfile import TextFileError, read_text
from finealign.types import SetAside


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read ``columns`` of a UTF-8, comma-separated file with a header line.

    Each row maps these columns, and no others, to their values, stripped of surrounding whitespace.

    Raises:
        ImageInputError: the file cannot be read as such a table, one of the columns is missing or occurs twice, or a
            row has no value in one of them. For a row, the message gives the line.
    """
    shown = f"'{display_path(path)}'"
    reader = csv.DictReader(io.StringIO(read_list(path), newline=""), strict=True)
    rows: list[dict[str, str]] = []
    last_line = 0
    try:
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        for column in columns:
            if header.count(column) != 1:
                raise ImageInputError(
                    f"{shown} has {header.count(column)} columns named {column!r}, wanted one; its header is "
                    f"{','.join(header)!r:.200}. Start the file with a header line, its columns separated by commas."
                )
        last_line = 1
        for row in reader:
            last_line = reader.reader.line_num  # DictReader's own line_num is too low after blank lines
            where = f"{shown}, line {last_line}"
            if None in row:
                raise ImageInputError(
                    f"{where}: more values than the {len(header)} columns of the header. Quote values with commas."
                )
            # DictReader fills a row that is too short with None.
            values = {column: (row[column] or "").strip() for column in columns}
            for column, value in values.items():
                if not value:
                    raise ImageInputError(f"{where}: no value for {column!r}. Fill it in or delete the line.")
            rows.append(values)
    except csv.Error as error:
        raise ImageInputError(f"{shown}, line {last_line + 1}: {error}. Check the quotes there.") from error
    return rows


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
