"""What every request passes: who may ask, what every answer carries, one line in the log."""

import asyncio
import ipaddress
import logging
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOG = "finealign.serve"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
LINGER = 2.0  # seconds that the rest of a refused upload is read for, so that its sender gets to see the answer
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SHOWN_PATH = 200  # characters in the log
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "Cache-Control": "no-store",
}


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's own, which nobody else can reach."""
    found = ipaddress.ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def refusal(status: int, kind: str, error: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error as every one looks here: a sentence for a person and a word for a program."""
    return JSONResponse({"error": error, "kind": kind}, status, headers)


class Guard:
    """The outermost layer. ``hosts`` are the names the server answers to; any if None. ``allowed`` are further ones.

    The names guard against DNS rebinding: a stranger's page whose name was made to lead to this machine. What a
    browser says of a request's origin guards against a stranger's page that asks for this machine by its own name. A
    page of an allowed name may ask by another: its proxy need not pass on the name it was asked by.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str] | None, allowed: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._hosts = None if hosts is None else hosts | allowed
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passing, began = _Passing(scope, receive, send), time.monotonic()
        try:
            answer = self._refuse(passing.headers, scope)
            await (answer or self._app)(scope, passing.receive, passing.send)
        except ClientDisconnect:
            pass  # nobody is there to be answered
        except Exception:
            logging.getLogger(LOG).exception("%s failed", passing.id)
            if not passing.status:
                failed = refusal(500, "internal", "The server failed. Its log has the reason, under this request's id.")
                await failed(scope, passing.receive, passing.send)
        finally:
            path = scope["raw_path"].decode("ascii", "replace")[:SHOWN_PATH]
            milliseconds = 1000 * (time.monotonic() - began)
            status = passing.status or "gone"
            logging.getLogger(LOG).info("%s %s %s %s %.0f ms", passing.id, scope["method"], path, status, milliseconds)

    def _refuse(self, headers: Headers, scope: Scope) -> Response | None:
        named = headers.get("host", "")
        if self._hosts is not None and _hostname(named) not in self._hosts:
            return refusal(
                421,
                "host",
                "This server answers to the names of this machine alone. Ask for http://127.0.0.1 with its port, or "
                "start it with --allow-host and the name.",
            )
        # A link on another page may lead to this one: it shows the page and can read nothing of it.
        followed = scope["method"] == "GET" and scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
        strange = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        origin = headers.get("origin")
        elsewhere = origin is not None and _netloc(origin) != named and _hostname(_netloc(origin)) not in self._allowed
        if (strange and not followed) or elsewhere:
            return refusal(403, "cross-site", "Another site's page may not ask this server. Use the server's own.")
        return None


@dataclass
class _Passing:
    """One request on its way: knows whether its body has been read, and answers with what every answer carries."""

    scope: Scope
    inner_receive: Receive
    inner_send: Send
    status: int = 0  # 0: not answered yet
    headers: Headers = field(init=False)
    id: str = field(init=False)
    unread: bool = field(init=False)

    def __post_init__(self) -> None:
        self.headers = Headers(scope=self.scope)
        wanted = self.headers.get("x-request-id", "")
        self.id = wanted if SAFE_ID.fullmatch(wanted) else uuid4().hex
        self.unread = "transfer-encoding" in self.headers or self.headers.get("content-length", "0") != "0"

    async def receive(self) -> Message:
        message = await self.inner_receive()
        self.unread = self.unread and message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(SECURITY_HEADERS)
            headers["X-Request-ID"] = self.id
            if self.unread:
                headers["Connection"] = "close"
            await self.inner_send(message)
        elif self.unread and not message.get("more_body", False) and "expect" not in self.headers:
            await self.inner_send({**message, "more_body": True})
            await self._linger()
            await self.inner_send({"type": "http.response.body", "body": b""})
        else:
            await self.inner_send(message)

    async def _linger(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while self.unread:
                    await self.receive()


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""
