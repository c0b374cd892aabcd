"""Standard output and error as they may be: closed, full, read by a program that has ended, or not UTF-8."""

import codecs
import errno
import io
import os
import signal
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:  # Python has it from 3.12 on
    from typing_extensions import Buffer

ESCAPED = "finealign-escaped"  # the name of our error handler for characters that an encoding lacks
_escaped: list[str] = []  # the encodings that lacked a character which was written


class StreamError(Exception):
    """Standard output cannot be written. It is no OSError, so that nothing on the way takes it for another one."""

    def __init__(self, error: OSError) -> None:
        super().__init__((error.strerror or str(error)).lower())
        self.left = error.errno == errno.EPIPE  # the reader has ended, as `head` does, and misses nothing


class _Raw(io.FileIO):
    """Writes to a descriptor until that fails once: then raises StreamError, unless ``quiet``, and drops the rest."""

    def __init__(self, descriptor: int, *, quiet: bool, closed: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._quiet, self._dropping = quiet, False
        self._closed_before = closed

    def write(self, data: "Buffer", /) -> int:
        if self._dropping:
            return memoryview(data).nbytes
        try:
            if self._closed_before:
                raise OSError(errno.EBADF, "standard output is closed")
            return super().write(data)
        except OSError as error:
            self._dropping = True
            if not self._quiet:
                raise StreamError(error) from None
            return memoryview(data).nbytes


def protect_streams() -> None:
    """Replace ``sys.stdout`` and ``sys.stderr`` by streams that fail in one way, and lack no character.

    Characters that the encoding of a stream lacks are written as escape sequences. Descriptors that are closed are
    opened on nothing, or the next file that is opened would get their numbers and what is printed to them.
    """
    codecs.register_error(ESCAPED, _escape)
    closed = [_open_if_closed(descriptor) for descriptor in (0, 1, 2)]
    if sys.stdout is sys.__stdout__:
        sys.stdout = _stream(1, sys.__stdout__, quiet=False, closed=closed[1])
    if sys.stderr is sys.__stderr__:
        sys.stderr = _stream(2, sys.__stderr__, quiet=True, closed=closed[2])


def tell(error: StreamError) -> int:
    """Say on standard error that the output is not complete. Returns the exit code, for a broken pipe as in a shell."""
    if error.left:
        return 128 + getattr(signal, "SIGPIPE", 13)
    sys.stderr.write(
        f"error: The output cannot be written: {error}. What was printed is not complete. Print to another place, or "
        "give the command a file with --out where it takes one.\n"
    )
    return 1


def tell_escaped() -> None:
    """Say on standard error that characters were escaped, if any were."""
    if _escaped:
        sys.stderr.write(
            f"The output is in {_escaped[0]}, which lacks some characters; they are written as escape sequences. For "
            "the characters themselves set PYTHONIOENCODING=utf-8.\n"
        )


def _open_if_closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        return True
    return False


def _stream(descriptor: int, replaced: TextIO | None, *, quiet: bool, closed: bool) -> TextIO:
    if os.name == "nt" and isinstance(replaced, io.TextIOWrapper):  # a console there is no file
        replaced.reconfigure(errors=ESCAPED)
        return replaced
    if replaced is not None:
        replaced.flush()
    raw = _Raw(descriptor, quiet=quiet, closed=closed)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=replaced.encoding if replaced else "utf-8",
        errors="backslashreplace" if quiet else ESCAPED,
        line_buffering=quiet or raw.isatty(),
    )


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeEncodeError):
        _escaped.append(error.encoding)
    return codecs.backslashreplace_errors(error)
