"""The API and the page around one fitted model."""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Annotated, Any, get_args

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse
from starlette.types import Receive

from finealign import __version__
from finealign.classifier import FineAlign
from finealign.config import without_folder
from finealign.images import ImageReadError
from finealign.predictions import explained
from finealign.serve.answers import About, Bounds, Health, Predicted, Refusal
from finealign.serve.batches import Batches, FullError
from finealign.serve.guard import LOOPBACK, Guard, refusal
from finealign.types import Explanation, Score

FRAME_BYTES = 16_384  # of a form around its file
MAX_FIELDS = 1  # of a form beside its file; it is not looked at
MAX_FIELD_BYTES = 512
BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,./:=?-]{1,70}")
CLOSE_SECONDS = 5  # for the threads to end, beyond the time limit of a request
RETRY_AFTER = 1  # seconds
KNOWN = {
    404: ("not-found", "There is no such page. The page is at /, and /openapi.json describes the API."),
    405: ("method-not-allowed", "This method is not taken here. /openapi.json describes the API."),
}
ASSETS = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "icon.svg": "image/svg+xml",
    "base.css": "text/css",
}
EVERYWHERE = {
    403: "A page of another site asks.",
    421: "The Host header is no name of this machine.",
    500: "The server failed.",
}
OF_PREDICT = {
    400: "The form is malformed.",
    408: "The upload took too long.",
    413: "The upload is too large.",
    415: "The body is no multipart form.",
    422: "There is no image that can be read, or a query is out of range.",
    503: "There is no place for it now; Retry-After says when to ask again.",
    504: "The answer took too long.",
}


@dataclass(frozen=True)
class Limits:
    """What the server takes, so that no request can take it all."""

    max_upload_bytes: int = 20_000_000
    max_pixels: int = 25_000_000
    waiting: int = 256  # requests being read, worked on or answered; one more is refused
    timeout: float = 30.0  # seconds to send an upload in, and seconds to wait for its answer


class RefusedError(StarletteHTTPException):
    """A request that is answered by a sentence and a status."""

    def __init__(self, status: int, kind: str, error: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, error, headers)
        self.kind = kind


def create_app(
    model: FineAlign,
    limits: Limits | None = None,
    *,
    hosts: frozenset[str] | None = LOOPBACK,
    allow_hosts: Sequence[str] = (),
) -> FastAPI:
    """The application around a fitted model.

    ``hosts`` are the names it answers to; any if None. ``allow_hosts`` are further ones, which pages that ask may also
    come from: those of a proxy before it.
    """
    limits = limits or Limits()
    batches = Batches(model, capacity=limits.waiting, max_pixels=limits.max_pixels)
    about = _about(model, limits)
    classes, scores = model.texts_.classes, about.scores

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        batches.start()
        yield
        await batches.close(limits.timeout + CLOSE_SECONDS)

    app = FastAPI(
        title="finealign",
        version=__version__,
        description="Classifies images with one adapted model, beside the model adaptation started from.",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=running,
        responses=_documented(EVERYWHERE),
    )
    app.add_middleware(Guard, hosts=hosts, allowed=frozenset(name.lower() for name in allow_hosts))
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)

    @app.post("/predict", responses=_documented(OF_PREDICT), openapi_extra=_UPLOAD)
    async def predict(
        request: Request,
        top_k: Annotated[int, Query(ge=1, le=len(classes), description="How many classes to tell of.")] = min(
            5, len(classes)
        ),
        score: Annotated[
            str, Query(description="What to score by.", json_schema_extra={"enum": list(scores)})
        ] = about.score,
    ) -> Predicted:
        """Classify one image."""
        kind = _score(score, scores)
        _require_form(request)
        _refuse_declared(request, limits)
        try:
            with batches.place(_most_bytes(request, limits)) as place:
                upload = await _read_upload(request, limits)
                found = await _answer(batches.submit(place, upload.file, kind), request, limits.timeout)
        except FullError as full:
            raise RefusedError(
                503, "full", f"{full}. Ask again in {RETRY_AFTER} s.", {"Retry-After": str(RETRY_AFTER)}
            ) from None
        except ImageReadError as error:
            raise RefusedError(422, "unreadable", f"The image cannot be read: {error}. Send another.") from None
        except TimeoutError:
            raise RefusedError(
                504,
                "timeout",
                f"There was no answer within {limits.timeout:g} s. Ask again when less is waiting.",
            ) from None
        return Predicted.model_validate(explained(found, classes, top_k))

    @app.get("/healthz", responses={503: {"model": Health, "description": "The server has failed."}})
    async def healthz(response: Response) -> Health:
        """Whether the server works, and how busy it is."""
        works = batches.alive
        response.status_code = 200 if works else 503
        return Health(status="ok" if works else "failed", waiting=batches.waiting, capacity=batches.capacity)

    @app.get("/model")
    async def describe() -> About:
        """What answers, and what it takes."""
        return about

    page = _page(about)

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """The page for people."""
        return HTMLResponse(page)

    app.add_api_route("/", index, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/healthz", healthz, methods=["HEAD"], include_in_schema=False)
    for name, media_type in ASSETS.items():
        folder = files("finealign") / ("pages" if name == "base.css" else "serve/page")
        app.add_api_route(f"/{name}", _asset((folder / name).read_bytes(), media_type), include_in_schema=False)
    return app


def _about(model: FineAlign, limits: Limits) -> About:
    return About(
        classes=list(model.texts_.classes),
        method=model.config_.method.name,
        backbone=without_folder(model.config_.backbone),
        score=model.score_,
        scores=list(type(model.method_).scores),
        input_size=model.backbone_.input_size,
        version=__version__,
        limits=Bounds(**asdict(limits)),
    )


def _page(about: About) -> str:
    text = (files("finealign") / "serve/page/index.html").read_text(encoding="utf-8")
    return Template(text).substitute(
        classes=len(about.classes), method=escape(about.method), backbone=escape(about.backbone)
    )


def _asset(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def give() -> Response:
        return Response(content, media_type=media_type)

    return give


def _score(score: str, scores: list[str]) -> Score:
    for known in get_args(Score):
        if score == known and score in scores:
            valid: Score = known
            return valid
    raise RefusedError(422, "invalid", f"The model has no such score. Valid: {', '.join(scores)}.")


def _require_form(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raise RefusedError(
            415,
            "media-type",
            "Wanted: multipart/form-data with the image as its field 'file'.",
        )


def _refuse_declared(request: Request, limits: Limits) -> None:
    """What its own Content-Length says is too large need not be read to be refused."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limits.max_upload_bytes + FRAME_BYTES:
        raise _too_large(limits)


def _most_bytes(request: Request, limits: Limits) -> int:
    """What the body can come to: what it declares, which the server holds it to, or what is taken at most."""
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isdecimal() else limits.max_upload_bytes + FRAME_BYTES


async def _answer(future: Future[Explanation], request: Request, seconds: float) -> Explanation:
    """What a job comes to; it is cancelled when nobody waits any longer.

    Raises TimeoutError: not within so many seconds. ClientDisconnect: the client has left before.
    """
    waiting = asyncio.wrap_future(future)
    left = asyncio.create_task(_left(request))
    either: set[asyncio.Future[Any]] = {waiting, left}
    try:
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        raise ClientDisconnect if left.done() else TimeoutError
    finally:
        left.cancel()
        waiting.cancel()


async def _left(request: Request) -> None:
    """Return when the client of a request that has been read has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _too_large(limits: Limits) -> RefusedError:
    return RefusedError(
        413, "too-large", f"The upload is over the limit of {limits.max_upload_bytes:,} bytes. Send a smaller image."
    )


async def _read_upload(request: Request, limits: Limits) -> UploadFile:
    """The file of the form, in memory or in a temporary file without a name; to be closed by who gets it."""
    try:
        form = await _Form(request, limits).parse()
    except MultiPartException as error:
        raise RefusedError(400, "malformed", f"The form cannot be read: {error.message.rstrip('.')}.") from None
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
    """A form that is read within the limits and has to end: what of it came before is closed if it does not.

    It is UTF-8 whatever its client says: to decode other encodings can take very long.
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
        self._heads = 0  # bytes
        self._ended = False

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        super().on_header_field(data, start, end)

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        super().on_header_value(data, start, end)

    def _count(self, more: int) -> None:
        self._heads += more
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
    """The body as it comes in, at most so many bytes of it and for at most so long, whatever its headers say."""
    end, size, more = time.monotonic() + limits.timeout, 0, True
    while more:
        try:
            async with asyncio.timeout(max(0, end - time.monotonic())):
                message = await receive()
        except TimeoutError:
            raise RefusedError(
                408, "slow", f"The upload did not arrive within {limits.timeout:g} s. Send it faster, or a smaller one."
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        size += len(message.get("body", b""))
        if size > limits.max_upload_bytes + FRAME_BYTES:
            raise _too_large(limits)
        yield message.get("body", b"")
        more = message.get("more_body", False)


async def _http_error(request: Request, error: Exception) -> Response:
    if isinstance(error, RefusedError):
        return refusal(error.status_code, error.kind, error.detail, error.headers)
    if not isinstance(error, StarletteHTTPException):
        raise error
    kind, sentence = KNOWN.get(error.status_code, ("refused", f"{error.detail}."))
    return refusal(error.status_code, kind, sentence, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    return refusal(422, "invalid", f"{first['loc'][-1]}: {first['msg']}.")


def _documented(statuses: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": Refusal, "description": text} for status, text in statuses.items()
    }
    if 503 in found:
        found[503]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return found


_UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JPEG, PNG, WebP, GIF, BMP or TIFF. Its name and type are not looked at.",
                        }
                    },
                }
            }
        },
    }
}
