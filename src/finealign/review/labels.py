"""The labels that a person gives: a CSV file with a row an image, each on disk before the next is asked for."""

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from finealign.errors import ImageInputError, OutputError, first_few
from finealign.images.tables import read_table
from finealign.model.known_labels import CANNOT_TELL
from finealign.model.refusal import NONE_OF_THESE
from finealign.review.plan import Why, absolute
from finealign.runtime.atomic import row_writer, save_text
from finealign.runtime.textfile import TextFileError, read_text
from finealign.texts.names import Matcher

HEADER = ("path", "label", "why_asked")
SHOWN = 5


class LabelFile:
    """The file ``path,label,why_asked``. A label is added at its end and flushed; taking one back writes it anew.

    One process at a time may write it.
    """

    def __init__(self, path: Path, classes: Sequence[str], *, mend: bool = True) -> None:
        """Read the labels of an earlier session, if there are any.

        A last line that a kill cut off is left out, and removed from the file unless ``mend`` is false. Raises
        OutputError for a file that is no such table, names an image twice or holds a label that is no answer.
        """
        self.path = path
        self.rows: dict[str, tuple[str, str]] = {}  # by the image's absolute path
        self.cut_off = ""  # the line that was removed
        self._unended = False  # whether the last line lacks its end, and is whole
        answers = {*classes, NONE_OF_THESE, CANNOT_TELL}
        for line, row in enumerate(self._lines(answers), 2):
            if len(row) != len(HEADER) or row[1] not in answers:
                raise self._refused(
                    f"line {line} is {row!r:.200}, wanted an image, one of the answers and why it was asked"
                )
            if row[0] in self.rows:
                raise self._refused(f"line {line} names {row[0]!r:.200} a second time")
            self.rows[row[0]] = row[1], row[2]
        if mend and (self.cut_off or self._unended):
            self._rewrite()

    def _lines(self, answers: set[str]) -> list[list[str]]:
        try:
            text = read_text(self.path)
        except TextFileError as error:
            if error.missing:
                return []
            raise self._refused(str(error)) from error
        try:
            lines = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row]
        except csv.Error as error:
            kept, _, self.cut_off = text.rpartition("\n")  # a quote that a kill left open
            try:
                lines = [row for row in csv.reader(io.StringIO(kept, newline=""), strict=True) if row]
            except csv.Error:
                raise self._refused(str(error)) from error
        if not lines or (len(lines) == 1 and not text.endswith("\n")):
            self.cut_off = self.cut_off or text  # the header itself was cut off, or nothing is there
            if lines and not ",".join(HEADER).startswith(text):
                raise self._refused(f"its header is {text!r:.200}, wanted {','.join(HEADER)}")
            return []
        if tuple(lines[0]) != HEADER:
            raise self._refused(f"its header is {','.join(lines[0])!r:.200}, wanted {','.join(HEADER)}")
        last = lines[-1]
        if not self.cut_off and not text.endswith("\n"):
            whole = len(last) == len(HEADER) and last[1] in answers and last[2] in ("measuring", "learning")
            self.cut_off = "" if whole else ",".join(last)
            self._unended = whole
            if not whole:
                lines.pop()
        return lines[1:]

    def _refused(self, reason: str) -> OutputError:
        return OutputError(f"{self.path} cannot be gone on with: {reason}. Mend it, or give another file with --out.")

    def add(self, path: str, label: str, why: Why) -> None:
        """Add a label; it is on disk when this returns. Raises OutputError, and KeyError if the image has one."""
        if path in self.rows:
            raise KeyError(path)
        text = _as_rows([[path, label, why]])
        self._append(text if self.path.exists() and self.path.stat().st_size else _as_rows([HEADER]) + text)
        self.rows[path] = label, why

    def _append(self, text: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", newline="") as file:
                before = file.tell()
                try:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.ftruncate(file.fileno(), before)  # half a line would spoil the next
                    raise
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error}. The label was not kept; the ones before it are."
            ) from error

    def take_back(self, path: str) -> None:
        """Remove the label of an image. Raises OutputError, and KeyError if it has none."""
        kept = self.rows.pop(path)
        try:
            self._rewrite()
        except OutputError:
            self.rows[path] = kept
            raise

    def _rewrite(self) -> None:
        rows = [[path, label, why] for path, (label, why) in self.rows.items()]
        save_text(_as_rows([HEADER, *rows]), self.path)


def _as_rows(rows: Iterable[Iterable[object]]) -> str:
    stream = io.StringIO()
    write = row_writer(stream)
    for row in rows:
        write(row)
    return stream.getvalue()


def read_labels(source: str | Path | Mapping[str, str], classes: Sequence[str]) -> dict[str, str]:
    """Labels by the absolute path of their image, from a mapping or from a CSV with the columns path and label.

    Names are matched as those of class folders are; "none of these" and "cannot tell" are answers too. Relative paths
    in a CSV are relative to its folder, others to the current one.

    Raises ImageInputError for a table that cannot be read, an image that is named twice, or a label that is neither.
    """
    folder, rows = Path(), []
    if isinstance(source, Mapping):
        rows = [(str(path), label) for path, label in source.items()]
    else:
        folder = Path(source).parent
        rows = [(row["path"], row["label"]) for row in read_table(Path(source), ("path", "label"))]
    matcher, found, wrong = Matcher(classes), dict[str, str](), list[str]()
    for path, label in rows:
        place = absolute(folder / path)
        if place in found:
            raise ImageInputError(f"{place!r:.200} is labelled twice. Keep one label an image.")
        matches = matcher(label)
        if label in (NONE_OF_THESE, CANNOT_TELL):
            found[place] = label
        elif len(matches) == 1:
            found[place] = classes[matches[0]]
        else:
            wrong.append(f"{label!r:.100}")
    if wrong:
        names = first_few(sorted(set(wrong)), len(set(wrong)), SHOWN)
        valid = first_few((f"{name!r:.100}" for name in classes), len(classes), 20)
        raise ImageInputError(f"No class is called {names}. Valid: {valid}, and '{NONE_OF_THESE}' and '{CANNOT_TELL}'.")
    return found
