"""Read text files that users provide: regular files of bounded size in UTF-8, or in UTF-16 that says so."""

import codecs
import stat
from pathlib import Path

MOST_BYTES = 2**30  # enough for a list of ten million paths


class TextFileError(Exception):
    """A text file cannot be read. The message is the reason alone, without the path and without a full stop."""

    def __init__(self, reason: str, *, missing: bool = False) -> None:
        super().__init__(reason)
        self.missing = missing  # whether the file does not exist


def read_text(path: Path, *, most_bytes: int = MOST_BYTES) -> str:
    """Read the whole text of a UTF-8 file, without its byte order mark.

    UTF-16 and UTF-32, in which spreadsheets save "Unicode text", are read if the file begins with their mark. Pipes and
    devices are refused, because opening one can block for ever and it may have no end.

    Raises:
        TextFileError: the file does not exist, is not a regular file, holds more than ``most_bytes`` bytes, cannot be
            read, or is not text in these encodings.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise TextFileError("not a regular file")
        if status.st_size > most_bytes:
            raise TextFileError(f"it holds {status.st_size:,} bytes, and at most {most_bytes:,} are read")
        data = path.read_bytes()
    except FileNotFoundError:
        raise TextFileError("no such file", missing=True) from None
    except PermissionError:
        raise TextFileError("permission denied") from None
    except OSError as error:
        raise TextFileError((error.strerror or str(error)).lower()) from error
    except ValueError:  # a null byte, or characters the file system cannot encode
        raise TextFileError("not a usable file name") from None
    return _decoded(data)


# UTF-32 first, as its mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


# Files that are given in place of a text, by how they begin.
_NO_TEXT = {
    b"PK\x03\x04": "a workbook of a spreadsheet, or another ZIP file",
    b"\xd0\xcf\x11\xe0": "a workbook of an old spreadsheet",
    b"\x1f\x8b": "a compressed file",
    b"PAR1": "a Parquet file",
    b"%PDF": "a PDF document",
    b"SQLite format 3": "a database",
}


def _decoded(data: bytes) -> str:
    for magic, kind in _NO_TEXT.items():
        if data.startswith(magic):
            raise TextFileError(f"it is {kind}, and no text; save it as text, or as CSV, in UTF-8")
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8-sig")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        named = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
        way = ", which spreadsheets save as CSV UTF-8" if named == "UTF-8" else ""
        raise TextFileError(f"line {line}: not {named} text{way}") from None
