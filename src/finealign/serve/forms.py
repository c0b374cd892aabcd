"""Reading an upload within limits, and the errors that refuse a request."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from finealign.serve.guard import LOG

FRAME_BYTES = 16_384  # of a form in addition to its file's content
MAX_FIELDS = 1  # text fields allowed in a form; they are ignored
MAX_FIELD_BYTES = 512
BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=?-]{1,70}")


@dataclass(frozen=True)
class Limits:
    """The limits of the server, so that no request can use up its memory or its time."""

    max_upload_bytes: int = 20_000_000
    max_pixels: int = 25_000_000
    waiting: int = 256  # requests being read, worked on or answered; one more is refused
    timeout: float = 30.0  # seconds to send an upload in, and seconds to wait for its answer


class RefusedError(StarletteHTTPException):
    """A refused request, answered with ``status`` and a JSON object of ``error`` and ``kind``."""

    def __init__(self, status: int, kind: str, error: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, error, headers)
        self.kind = kind


def require_form(request: Request) -> None:
    """Raises RefusedError (415) when the body is not declared as multipart/form-data."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise RefusedError(
            415,
            "media-type",
            "Wanted: multipart/form-data with the image as its field 'file'.",
        )


def refuse_declared(request: Request, limits: Limits) -> None:
    """Raises RefusedError (413) when the Content-Length is too large, before the body is read."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.max_upload_bytes + FRAME_BYTES:
        raise _too_large(limits)


def most_bytes(request: Request, limits: Limits) -> int:
    """The largest possible size of the body in bytes.

    It is the Content-Length, which the server enforces, or without one the limit on the size of a body.
    """
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isdecimal() else limits.max_upload_bytes + FRAME_BYTES


def _too_large(limits: Limits) -> RefusedError:
    return RefusedError(
        413,
        "too-large",
        f"The upload is over the limit of {limits.max_upload_bytes:,} bytes. Send a smaller image, or start the server "
        "with a larger --max-upload-mb.",
    )


async def read_upload(request: Request, limits: Limits) -> UploadFile:
    """Read the form and return its file, in memory or in an unnamed temporary file. The caller closes the file.

    Raises RefusedError for a form that is malformed (400), too slow (408), too large (413), without a file or with an
    empty one (422), or for which there is no space (507), and ClientDisconnect when the client leaves.
    """
    try:
        form = await _Form(request, limits).parse()
    except MultiPartException as error:
        raise RefusedError(400, "malformed", f"The form cannot be read: {error.message.rstrip('.')}.") from None
    except OSError as error:  # from writing to the temporary file
        logging.getLogger(LOG).error("An upload cannot be kept: %s", error)
        raise RefusedError(
            507,
            "no-space",
            f"The server has no space for the upload ({(error.strerror or str(error)).lower()}). Send a smaller image, "
            "or make room in the server's folder for temporary files, which TMPDIR names.",
        ) from None
    upload = form.get("file")
    if isinstance(upload, UploadFile) and 0 < (upload.size or 0) <= limits.max_upload_bytes:
        return upload
    await form.close()
    if not isinstance(upload, UploadFile):
        raise RefusedError(422, "no-file", "There is no file. Send the image as the form's field 'file'.")
    if upload.size:
        raise _too_large(limits)
    raise RefusedError(422, "unreadable", "The image cannot be read: empty file. Send another.")


class _Form(MultiPartParser):
    """A form that is read within the limits and must be complete; if it is not, the files read so far are closed.

    Its text is decoded as UTF-8 whatever the client declares, because decoding other encodings can take very long.
    """

    def __init__(self, request: Request, limits: Limits) -> None:
        boundary = parse_options_header(request.headers["content-type"])[1].get(b"boundary", b"")
        if not BOUNDARY.fullmatch(boundary):
            raise MultiPartException("it has no boundary, or a malformed one")
        super().__init__(
            Headers(raw=[(b"content-type", b'multipart/form-data; charset=utf-8; boundary="%s"' % boundary)]),
            self._whole(request.receive, limits),
            max_files=1,
            max_fields=MAX_FIELDS,
            max_part_size=MAX_FIELD_BYTES,
        )
        self._heads = 0  # bytes of part headers so far
        self._ended = False

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        super().on_header_field(data, start, end)

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        super().on_header_value(data, start, end)

    def _count(self, length: int) -> None:
        """Raises MultiPartException when the headers of the parts are too long."""
        self._heads += length
        if self._heads > FRAME_BYTES:
            raise MultiPartException("its headers are too long")

    def on_end(self) -> None:
        self._ended = True

    async def _whole(self, receive: Receive, limits: Limits) -> AsyncGenerator[bytes, None]:
        async for chunk in _body(receive, limits):
            yield chunk
        if not self._ended:
            raise MultiPartException("it is cut off")


async def _body(receive: Receive, limits: Limits) -> AsyncGenerator[bytes, None]:
    """The body in chunks, within the limits on size and time, whatever its headers declare.

    Raises RefusedError beyond a limit, and ClientDisconnect when the client leaves.
    """
    end, size, more = time.monotonic() + limits.timeout, 0, True
    while more:
        try:
            async with asyncio.timeout(max(0, end - time.monotonic())):
                message = await receive()
        except TimeoutError:
            raise RefusedError(
                408,
                "slow",
                f"The upload did not arrive within {limits.timeout:g} s (--timeout). Send it faster, or a smaller one.",
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        size += len(message.get("body", b""))
        if size > limits.max_upload_bytes + FRAME_BYTES:
            raise _too_large(limits)
        yield message.get("body", b"")
        more = message.get("more_body", False)
