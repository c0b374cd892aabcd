"""The web application around one review: the page, the images, and the answers of a person."""

import asyncio
import io
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import HTMLResponse

from finealign import __version__
from finealign.errors import OutputError
from finealign.images.decoding import read_image
from finealign.images.files import ImageReadError
from finealign.model.known_labels import CANNOT_TELL
from finealign.model.refusal import NONE_OF_THESE
from finealign.review.plan import Item
from finealign.review.session import AnswerError, Session
from finealign.runtime.render import base_style
from finealign.serve.addresses import Addresses
from finealign.serve.app import asset, tell_errors
from finealign.serve.forms import RefusedError
from finealign.serve.guard import LOOPBACK, Guard

MOST_BYTES = 10_000  # of what a page sends
LONGEST_SIDE = 1600  # pixels of an image as it is shown
JPEG_QUALITY = 90
ASSETS = {
    "page.css": "text/css",
    "review.css": "text/css",
    "review.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
STATUS = {"answered": 409, "nothing": 409, "unknown": 404, "label": 422}  # by the kind of an AnswerError


class Asking(BaseModel):
    """What a window sends: who it is, and whether it shows the models' answers before a label is given."""

    window: Annotated[str, Field(min_length=1, max_length=64)]
    show: bool = False


class Answer(Asking):
    """The answer for an image."""

    number: int
    label: Annotated[str, Field(max_length=1000)]


Sent = TypeVar("Sent", bound=Asking)


def create_review(
    session: Session, *, hosts: frozenset[str] | None = LOOPBACK, addresses: Addresses | None = None
) -> FastAPI:
    """Create the application around a review. ``hosts`` and ``addresses`` are as for ``create_app``."""
    app = FastAPI(title="finealign review", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, hosts=hosts, allowed=addresses)
    tell_errors(app)
    one_at_a_time = asyncio.Lock()  # decoding takes much memory

    @app.post("/next")
    async def following(request: Request) -> dict[str, Any]:
        asking = await _read(request, Asking)
        return _state(session, asking, session.take(asking.window))

    @app.post("/answer")
    async def answer(request: Request) -> dict[str, Any]:
        given = await _read(request, Answer)
        try:
            item = session.answer(given.window, given.number, given.label)
        except (AnswerError, OutputError) as error:
            raise _refused(error) from None
        told = {"label": given.label, **_models(session, item)}
        return {**_state(session, given, session.take(given.window)), "answered": told}

    @app.post("/undo")
    async def undo(request: Request) -> dict[str, Any]:
        asking = await _read(request, Asking)
        try:
            number, label = session.undo(asking.window)
        except (AnswerError, OutputError) as error:
            raise _refused(error) from None
        return {**_state(session, asking, number), "undone": label}

    @app.post("/leave")
    async def leave(request: Request) -> dict[str, Any]:
        session.leave((await _read(request, Asking)).window)
        return {}

    @app.get("/image/{number}")
    async def image(number: int) -> Response:
        try:
            path = Path(session.item(number).path)
            async with one_at_a_time:
                content = await asyncio.to_thread(_shown, path)
        except AnswerError as error:
            raise _refused(error) from None
        except ImageReadError as error:
            raise RefusedError(422, "unreadable", f"The image cannot be read: {error}.") from None
        return Response(content, media_type="image/jpeg")

    page = _page(session)

    @app.get("/classes")
    async def classes() -> list[str]:
        return list(session.plan.classes)

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    for name, media_type in ASSETS.items():
        content = (files("finealign.serve") / "page" / name).read_bytes()
        app.add_api_route(f"/{name}", asset(content, media_type))
    app.add_api_route("/base.css", asset(base_style().encode(), "text/css"))
    return app


def _page(session: Session) -> str:
    text = (files("finealign.serve") / "page" / "review.html").read_text(encoding="utf-8")
    return Template(text).substitute(labels=escape(str(session.labels.path)), none=NONE_OF_THESE, cannot=CANNOT_TELL)


async def _read(request: Request, kind: type[Sent]) -> Sent:
    """What a page sent as JSON. Raises RefusedError."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise RefusedError(413, "too-large", f"A request may have at most {MOST_BYTES} bytes.")
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the request"
        raise RefusedError(422, "invalid", f"{where}: {first['msg']}.") from None


def _refused(error: AnswerError | OutputError) -> RefusedError:
    if isinstance(error, OutputError):
        return RefusedError(507, "not-kept", str(error))
    return RefusedError(STATUS[error.kind], error.kind, str(error))


def _state(session: Session, asking: Asking, number: int | None) -> dict[str, Any]:
    """What a window shows: its image, how far the review is, and the figures so far."""
    progress = session.progress(asking.window)
    found = session.figures().as_json()
    told: dict[str, Any] = {
        "image": None,
        "labelled": progress.labelled,
        "target": progress.target,
        "cannot_tell": progress.cannot_tell,
        "learned": progress.learned,
        "to_learn": progress.to_learn,
        "held": progress.held,
        "done": progress.done,
        "can_undo": session.can_undo(asking.window),
        "figures": {name: found[name] for name in ("labels", "next_look", "none", "adapted", "start", "difference")},
    }
    if number is not None:
        item, classes = session.item(number), session.plan.classes
        told["image"] = {
            "number": number,
            "name": Path(item.path).name,
            "why": item.why,
            "choices": [classes[choice] for choice in item.choices],
            "models": _models(session, item) if asking.show else None,
        }
    return told


def _models(session: Session, item: Item) -> dict[str, str]:
    return {"adapted": session.plan.classes[item.adapted], "start": session.plan.classes[item.start]}


def _shown(path: Path) -> bytes:
    """The image as a JPEG that every browser shows, upright and of moderate size. Raises ImageReadError."""
    photo = read_image(path)
    photo.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    stream = io.BytesIO()
    photo.save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()
