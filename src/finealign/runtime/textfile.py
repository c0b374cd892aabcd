"""Read text files that users provide: regular files of bounded size in UTF-8."""

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

    Pipes and devices are refused, because opening one can block for ever and it may have no end.

    Raises:
        TextFileError: the file does not exist, is not a regular file, holds more than ``most_bytes`` bytes, cannot be
            read, or is not UTF-8.
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
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TextFileError(f"line {line}: not UTF-8 text") from None
