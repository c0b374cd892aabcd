"""The web application around one fitted model: the API and the page."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from html import escape
from importlib.resources import files
from string import Template
from typing import Annotated, Any, get_args

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse
from starlette.routing import Route

from finealign import __version__
from finealign.classifier import FineAlign
from finealign.config import without_folder
from finealign.images.files import ImageReadError, TooManyPixelsError
from finealign.model.fitted import CALLED
from finealign.model.predictions import explained
from finealign.model.refusal import cutoff
from finealign.runtime.render import base_style
from finealign.serve.addresses import Addresses
from finealign.serve.answers import About, Bounds, Health, Predicted, Refusal
from finealign.serve.batches import Batches, FullError
from finealign.serve.forms import Limits, RefusedError, most_bytes, read_upload, refuse_declared, require_form
from finealign.serve.guard import LOOPBACK, Guard, refusal
from finealign.types import Explanation, Reject, Score

CLOSE_SECONDS = 5  # for the threads to end, on top of the time limit of a request
RETRY_AFTER = 1  # seconds
KNOWN = {  # kind and message of errors that Starlette raises, by status
    404: ("not-found", "There is no such page. The page is at {root}/, and {root}/openapi.json describes the API."),
    405: ("method-not-allowed", "This method is not taken here. {root}/openapi.json describes the API."),
}
ASSETS = {  # files of the page and their media types
    "page.css": "text/css",
    "page.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
EVERYWHERE = {  # error responses of every route, as the OpenAPI document describes them
    403: "A page of another site asks.",
    421: "The Host header is no name of this machine.",
    500: "The server failed.",
}
OF_PREDICT = {  # further ones of POST /predict
    400: "The form is malformed.",
    408: "The upload took too long.",
    413: "The upload is too large.",
    415: "The body is no multipart form.",
    422: "There is no image that can be read, or a query is out of range.",
    503: "There is no place for it now; Retry-After says when to ask again.",
    504: "The answer took too long.",
    507: "The server has no space for the upload.",
}


def create_app(
    model: FineAlign,
    limits: Limits | None = None,
    *,
    hosts: frozenset[str] | None = LOOPBACK,
    addresses: Addresses | None = None,
    reject: Reject | None = None,
) -> FastAPI:
    """Create the application around a fitted model.

    ``hosts`` are the host names that it answers to; None means any. ``addresses`` has additional ones, such as those of
    a reverse proxy in front of it, the proxy's path, and the origins whose pages may send requests, as pages from the
    additional hosts may. ``reject`` is as for ``FineAlign.predict``. Raises ConfigError when the model cannot reject
    so.
    """
    limits, addresses = limits or Limits(), addresses or Addresses()
    batches = Batches(model, capacity=limits.waiting, max_pixels=limits.max_pixels)
    refused_from = cutoff(model.model_, reject)
    about = _about(model, limits, refused_from)
    classes, scores = model.texts_.classes, about.scores

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        batches.start()
        yield
        await batches.close(limits.timeout + CLOSE_SECONDS)

    app = FastAPI(
        title="finealign",
        version=__version__,
        description="Classifies images with one model, beside the model adaptation started from.",
        docs_url=None,  # FastAPI's documentation pages load scripts from another site
        redoc_url=None,
        servers=[{"url": addresses.root}] if addresses.root else None,
        redirect_slashes=False,  # a redirection would lead out of a proxy's path, and to http
        lifespan=running,
        responses=_documented(EVERYWHERE),
    )
    tell_errors(app, addresses.root)

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
        require_form(request)
        refuse_declared(request, limits)
        try:
            with batches.place(most_bytes(request, limits)) as place:
                upload = await read_upload(request, limits)
                explanation = await _answer(batches.submit(place, upload.file, kind), request, limits.timeout)
        except FullError as full:
            raise RefusedError(
                503, "full", f"{full}. Ask again in {RETRY_AFTER} s.", {"Retry-After": str(RETRY_AFTER)}
            ) from None
        except ImageReadError as error:
            too_large = isinstance(error, TooManyPixelsError)
            larger = " The server takes larger ones with a larger --max-megapixels." if too_large else ""
            raise RefusedError(422, "unreadable", f"The image cannot be read: {error}. Send another.{larger}") from None
        except TimeoutError:
            raise RefusedError(
                504,
                "timeout",
                f"There was no answer within {limits.timeout:g} s (--timeout). Ask again when less is waiting.",
            ) from None
        return Predicted.model_validate(explained(explanation, classes, top_k, refused_from=refused_from))

    _add_pages(app, batches, about, addresses.root)
    paths = {route.path for route in app.routes if isinstance(route, Route)}
    app.add_middleware(Guard, hosts=hosts, allowed=addresses, paths=paths)
    return app


def tell_errors(app: FastAPI, root: str = "") -> None:
    """Have the application answer errors with JSON: a sentence and a word, as ``guard.refusal`` does.

    ``root`` is the path that a proxy has the application under.
    """
    app.add_exception_handler(StarletteHTTPException, partial(_http_error, root))
    app.add_exception_handler(RequestValidationError, _invalid)


def _add_pages(app: FastAPI, batches: Batches, about: About, root: str) -> None:
    """Add the routes beside POST /predict: health, model description, page and assets."""

    @app.get("/healthz", responses={503: {"model": Health, "description": "The server has failed."}})
    async def healthz(response: Response) -> Health:
        """Tell whether the server works and how busy it is."""
        works = batches.alive
        response.status_code = 200 if works else 503
        return Health(status="ok" if works else "failed", waiting=batches.waiting, capacity=batches.capacity)

    @app.get("/model")
    async def describe() -> About:
        """Describe the model and the limits of the server."""
        return about

    page = _page(about, root)

    @app.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """The web page."""
        return HTMLResponse(page)

    app.add_api_route("/", index, methods=["HEAD"], include_in_schema=False)
    app.add_api_route("/healthz", healthz, methods=["HEAD"], include_in_schema=False)
    for name, media_type in ASSETS.items():
        content = (files("finealign.serve") / "page" / name).read_bytes()
        app.add_api_route(f"/{name}", asset(content, media_type), include_in_schema=False)
    app.add_api_route("/base.css", asset(base_style().encode(), "text/css"), include_in_schema=False)


def _about(model: FineAlign, limits: Limits, refused_from: float | None) -> About:
    return About(
        classes=list(model.texts_.classes),
        use=model.use_,
        class_prior=model.class_prior_,
        method=model.model_.name,
        backbone=without_folder(model.model_.inference.backbone),
        score=model.score_,
        scores=list(model.method_.scores),
        refused_from=refused_from,
        input_size=model.backbone_.input_size,
        version=__version__,
        limits=Bounds(**asdict(limits)),
    )


def _page(about: About, root: str) -> str:
    """The page. Its addresses are relative, or below the proxy's path, which may be asked for without a last slash."""
    text = (files("finealign.serve") / "page" / "index.html").read_text(encoding="utf-8")
    return Template(text).substitute(
        classes=len(about.classes),
        used=CALLED[about.use],
        method=escape(about.method),
        backbone=escape(about.backbone),
        root=f"{root}/" if root else "",
    )


def asset(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    """A route's function that answers with this content."""

    async def give() -> Response:
        return Response(content, media_type=media_type)

    return give


def _score(score: str, scores: list[str]) -> Score:
    for known in get_args(Score):
        if score == known and score in scores:
            valid: Score = known  # taken from the Literal, because mypy does not narrow ``score``
            return valid
    raise RefusedError(422, "invalid", f"The model has no such score. Valid: {', '.join(scores)}.")


async def _answer(future: Future[Explanation], request: Request, seconds: float) -> Explanation:
    """Wait for the result of a job, which is cancelled if it is not done by the end of the wait.

    Raises TimeoutError when there is no result within ``seconds``, and ClientDisconnect when the client leaves first.
    """
    answer = asyncio.wrap_future(future)
    disconnect = asyncio.create_task(_left(request))
    tasks: set[asyncio.Future[Any]] = {answer, disconnect}
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        raise ClientDisconnect if disconnect.done() else TimeoutError
    finally:
        disconnect.cancel()
        answer.cancel()


async def _left(request: Request) -> None:
    """Return when the client disconnects. The body of its request must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _http_error(root: str, request: Request, error: Exception) -> Response:
    if isinstance(error, RefusedError):
        return refusal(error.status_code, error.kind, error.detail, error.headers)
    if not isinstance(error, StarletteHTTPException):
        raise error
    kind, sentence = KNOWN.get(error.status_code, ("refused", "{detail}."))
    return refusal(error.status_code, kind, sentence.format(root=root, detail=error.detail), error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestValidationError):
        raise error
    first = error.errors()[0]
    return refusal(422, "invalid", f"{first['loc'][-1]}: {first['msg']}.")


def _documented(statuses: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": Refusal, "description": text} for status, text in statuses.items()
    }
    if 503 in responses:
        responses[503]["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    return responses


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
                            "description": "JPEG, PNG, WebP, AVIF, TIFF, ... Its name and type are not looked at.",
                        }
                    },
                }
            }
        },
    }
}
