"""The HTTP server that runs the application: listening, stopping, logging."""

import asyncio
import ipaddress
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from finealign.classifier import FineAlign
from finealign.errors import FinealignError
from finealign.model.refusal import cutoff
from finealign.review.session import Session
from finealign.serve.addresses import Addresses
from finealign.serve.app import create_app
from finealign.serve.forms import Limits
from finealign.serve.guard import LOG, LOOPBACK, is_loopback
from finealign.serve.review import create_review
from finealign.types import Reject

MAX_PORT = 65_535
BACKLOG = 1024  # connections that the system queues until they are accepted
HEAD_SECONDS = 10  # for a client to send the request line and headers
STOP_SECONDS = 10  # on top of the time limits of a request
SPARE_CONNECTIONS = 256  # in addition to those of the requests that have a place


def serve(
    model: FineAlign,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    *,
    allow_hosts: Sequence[str] = (),
    allow_origins: Sequence[str] = (),
    root_path: str = "",
    reject: Reject | None = None,
    on_listening: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the requests in progress; a second Ctrl-C does not wait for them.

    Port 0 chooses a free port. ``on_listening`` is called with the URL of the server. On a loopback address the server
    answers only to names of this machine and to ``allow_hosts``, the names of a reverse proxy in front of it, which has
    it below ``root_path``, as "/birds". Pages of ``allow_origins``, as "https://birds.example" or "*" for all, may
    send requests.

    ``reject`` is as for ``FineAlign.predict``. Writes one log line per request to standard error. Raises FinealignError
    when the address cannot be used, when ``allow_hosts``, ``allow_origins`` or ``root_path`` are malformed, or when the
    model cannot reject so.
    """
    server = Listener(
        model,
        host,
        port,
        limits or Limits(),
        allow_hosts,
        allow_origins=allow_origins,
        root_path=root_path,
        reject=reject,
    )
    with _logging():
        server.run(on_listening)


def serve_review(
    session: Session,
    host: str = "127.0.0.1",
    port: int = 8010,
    *,
    allow_hosts: Sequence[str] = (),
    on_listening: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve the page of a review until SIGTERM or Ctrl-C, otherwise as ``serve``. Raises FinealignError."""
    addresses = Addresses.from_options(allow_hosts)
    server = AppListener(partial(create_review, session), host, port, Limits(), addresses)
    with _logging():
        server.run(on_listening)


class AppListener:
    """A server that listens on its address but does not answer yet. ``address`` is the URL to open on this machine.

    ``create`` makes the application from ``hosts`` and ``addresses``, which are as for ``create_app``. Raises
    FinealignError when the address cannot be used.
    """

    def __init__(
        self, create: Callable[..., FastAPI], host: str, port: int, limits: Limits, addresses: Addresses
    ) -> None:
        self._bound = _bind(host, port)
        ip, bound_port = self._bound.getsockname()[:2]
        hosts = LOOPBACK | {host.lower(), ip} if is_loopback(ip) else None
        app = create(hosts=hosts, addresses=addresses)
        self.address = f"http://{_shown(host, ip)}:{bound_port}"
        self._server = _Server(
            uvicorn.Config(
                app,
                http=partial(_Protocol, answer_seconds=limits.timeout),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=limits.waiting + SPARE_CONNECTIONS,
                timeout_graceful_shutdown=round(2 * limits.timeout) + STOP_SECONDS,
            )
        )

    def run(self, on_listening: Callable[[str], None] = lambda address: None) -> None:
        """Serve until ``stop`` or, in the main thread, a signal. ``on_listening`` is called with the URL."""
        self._server.on_listening = partial(on_listening, self.address)
        with self._bound:
            self._server.run(sockets=[self._bound])

    def stop(self) -> None:
        """Make ``run`` finish the requests in progress and return. Can be called from any thread."""
        self._server.should_exit = True


class Listener(AppListener):
    """The server that classifies images with a model, as an ``AppListener``.

    The arguments are those of ``serve``, which raises what this raises.
    """

    def __init__(
        self,
        model: FineAlign,
        host: str,
        port: int,
        limits: Limits,
        allow_hosts: Sequence[str] = (),
        *,
        allow_origins: Sequence[str] = (),
        root_path: str = "",
        reject: Reject | None = None,
    ) -> None:
        cutoff(model.model_, reject)  # before the address is taken
        addresses = Addresses.from_options(allow_hosts, root_path, allow_origins)
        super().__init__(partial(create_app, model, limits, reject=reject), host, port, limits, addresses)


class _Server(uvicorn.Server):
    """Calls ``on_listening`` once it listens. Unlike uvicorn's class it does not re-raise a signal that stopped it."""

    on_listening: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the requests in progress, unless ``force_exit`` is set meanwhile, by a second Ctrl-C."""
        ending = asyncio.ensure_future(super().shutdown(sockets))
        while not ending.done() and not self.force_exit:
            await asyncio.wait({ending}, timeout=0.1)
        if ending.done():
            ending.result()
        else:  # the event loop cancels the requests in progress at its end, and uvicorn would log an error for each
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            ending.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            yield
            return
        handlers = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


class _Protocol(H11Protocol):
    """A connection that is aborted when its next request's headers are not sent, or its response is not read, in time.

    It is aborted rather than closed, because closing waits until everything written has been read.
    """

    def __init__(self, *arguments: Any, answer_seconds: float, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._answer_seconds = answer_seconds
        self._given_up: asyncio.TimerHandle | None = None  # aborts the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio sets TCP_NODELAY only on sockets that name their protocol, which accepted ones do not. Without it the
        # second part of every response waits some 40 ms for the client to acknowledge the first.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._give_up_in(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        previous = self.cycle
        super().data_received(data)
        if self.transport.is_closing():  # after a malformed request
            self._give_up_in(HEAD_SECONDS)
        elif self.cycle is not previous and not self.cycle.response_complete:
            self._wait_for_answer()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._given_up is None:  # one timer for the whole response, which reading a little does not restart
            self._give_up_in(self._answer_seconds)

    def on_response_complete(self) -> None:
        self._give_up_in(HEAD_SECONDS)
        super().on_response_complete()  # may start on a request that is already buffered
        if not self.cycle.response_complete:
            self._wait_for_answer()

    def _wait_for_answer(self) -> None:
        self._stop_waiting()
        if self.flow.write_paused:  # the previous response has not been read
            self._give_up_in(self._answer_seconds)

    def _give_up_in(self, seconds: float) -> None:
        self._stop_waiting()
        self._given_up = self.loop.call_later(seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._given_up is not None:
            self._given_up.cancel()
            self._given_up = None


def _shown(host: str, ip: str) -> str:
    """The host for the URL to open. An unspecified address, as 0.0.0.0, is replaced by the loopback one."""
    if ipaddress.ip_address(ip).is_unspecified:
        host = "::1" if ":" in ip else "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _bind(host: str, port: int) -> socket.socket:
    try:
        if not 0 <= port <= MAX_PORT:
            raise OSError(0, f"ports end at {MAX_PORT}")
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = text.partition(" (")[0].lower()  # Python appends the address, which the message has already
        raise FinealignError(
            f"Cannot listen on {host}, port {port}: {reason}. Give another --port (0: a free one), or an address of "
            "this machine as --host."
        ) from error


@contextmanager
def _logging() -> Iterator[None]:
    """Within the context, the request log and the server's own warnings go to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    loggers = {logging.getLogger(LOG): logging.INFO, logging.getLogger("uvicorn.error"): logging.WARNING}
    previous = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger, level in loggers.items():
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False  # otherwise a configured root logger prints every line again
    try:
        yield
    finally:
        for logger, level, propagate in previous:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
