"""The outermost layer of the server: hosts, origins, the path below a proxy, common headers, request log."""

import asyncio
import ipaddress
import logging
import re
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finealign.serve.addresses import ANY, PREFLIGHT_ANSWER, PREFLIGHT_ASKS, Addresses

LOG = "finealign.serve"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})  # names of this machine
LINGER = 2.0  # seconds for which the rest of a refused upload is read, so that its sender receives the response
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
SHOWN_PATH = 200  # characters of a path that are logged
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
    """Whether an IP address is a loopback one, which only this machine can reach. Raises ValueError if malformed."""
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def refusal(status: int, kind: str, error: str, headers: Mapping[str, str] | None = None) -> Response:
    """An error response: JSON with ``error``, a sentence for people, and ``kind``, a word for programs."""
    return JSONResponse({"error": error, "kind": kind}, status, headers)


class Guard:
    """The outermost layer. ``hosts`` are the host names that the server answers to (None: any), with those allowed.

    The check of the Host header protects against DNS rebinding, in which another site's page makes its own name resolve
    to this machine. The check of the Origin and Sec-Fetch-Site headers protects against another site's page that sends
    requests to this machine by its own name. A page from an allowed host is accepted even where its origin differs from
    the Host header, because its proxy need not forward the original header. Pages of the origins in ``allowed`` may
    ask as well, and are told so by the headers of CORS; the Host header is checked all the same.

    Below a proxy's path, requests are taken with the path before them or without, as proxies keep it or strip it.
    ``paths`` are those that the application answers to, which are never taken for the proxy's path alone.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: frozenset[str] | None,
        allowed: Addresses | None = None,
        paths: Collection[str] = (),
    ) -> None:
        self._app = app
        self._allowed = allowed or Addresses()
        self._hosts = None if hosts is None else hosts | self._allowed.hosts
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": self._below_root(scope["path"])}
        origin = Headers(scope=scope).get("origin")
        passing = _Passing(scope, receive, send, SECURITY_HEADERS | self._allowed.headers(origin))
        began = time.monotonic()
        try:
            answer = self._refuse(passing.headers, scope) or self._preflight(passing.headers, scope)
            await (answer or self._app)(scope, passing.receive, passing.send)
        except ClientDisconnect:
            pass  # the client has left, so there is nobody to answer
        except Exception:
            logging.getLogger(LOG).exception("%s failed", passing.id)
            if not passing.status:
                response = refusal(
                    500, "internal", "The server failed. Its log has the reason, under this request's id."
                )
                await response(scope, passing.receive, passing.send)
        finally:
            path = scope["raw_path"].decode("ascii", "replace")[:SHOWN_PATH]
            milliseconds = 1000 * (time.monotonic() - began)
            status = passing.status or "gone"
            logging.getLogger(LOG).info("%s %s %s %s %.0f ms", passing.id, scope["method"], path, status, milliseconds)

    def _below_root(self, path: str) -> str:
        root = self._allowed.root
        if root and path.startswith(f"{root}/"):
            return path.removeprefix(root)
        return "/" if root and path == root and path not in self._paths else path

    def _preflight(self, headers: Headers, scope: Scope) -> Response | None:
        """The answer to a browser that asks whether a page of an allowed origin may ask."""
        if scope["method"] == "OPTIONS" and PREFLIGHT_ASKS in headers and self._allowed.allow(headers.get("origin")):
            return Response(None, 204, PREFLIGHT_ANSWER)
        return None

    def _refuse(self, headers: Headers, scope: Scope) -> Response | None:
        host = headers.get("host", "")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            return refusal(
                421,
                "host",
                "This server answers to the names of this machine alone. Ask for http://127.0.0.1 with its port, or "
                "start it with --allow-host and the name.",
            )
        origin = headers.get("origin")
        if ANY in self._allowed.origins or self._allowed.allow(origin):
            return None
        # A link on another site may lead to the page: the browser shows it, and the other site cannot read it.
        navigation = scope["method"] == "GET" and scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
        cross_site = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        other_origin = (
            origin is not None and _netloc(origin) != host and _hostname(_netloc(origin)) not in self._allowed.hosts
        )
        if (cross_site and not navigation) or other_origin:
            return refusal(
                403,
                "cross-site",
                "Another site's page may not ask this server. Use the server's own, or start it with --allow-origin "
                "and the other's.",
            )
        return None


@dataclass
class _Passing:
    """One request in progress: tracks whether its body has been read, and adds the common response headers."""

    scope: Scope
    inner_receive: Receive
    inner_send: Send
    common: Mapping[str, str]  # headers of every answer
    status: int = 0  # 0: not answered yet
    headers: Headers = field(init=False)
    id: str = field(init=False)
    unread: bool = field(init=False)  # whether part of the body has not been received yet

    def __post_init__(self) -> None:
        self.headers = Headers(scope=self.scope)
        request_id = self.headers.get("x-request-id", "")
        self.id = request_id if SAFE_ID.fullmatch(request_id) else uuid4().hex
        self.unread = "transfer-encoding" in self.headers or self.headers.get("content-length", "0") != "0"

    async def receive(self) -> Message:
        message = await self.inner_receive()
        self.unread = self.unread and message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(self.common)
            headers["X-Request-ID"] = self.id
            if self.unread:
                headers["Connection"] = "close"
            await self.inner_send(message)
        elif self.unread and not message.get("more_body", False) and "expect" not in self.headers:
            # Closing a connection with unread data resets it, and the client may lose the response: so the rest of the
            # upload is read before the response ends. A client that sent Expect waits before it sends the body.
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
