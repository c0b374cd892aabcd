"""The server the application runs in: where it listens, how it stops, what it logs."""

import asyncio
import ipaddress
import logging
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from finealign.classifier import FineAlign
from finealign.errors import FinealignError
from finealign.serve.app import Limits, create_app
from finealign.serve.guard import LOG, LOOPBACK, is_loopback

MAX_PORT = 65_535
BACKLOG = 1024  # connections that the system holds until they are taken
HEAD_SECONDS = 10  # for the line and headers of a request to be sent in
STOP_SECONDS = 10  # beyond the time limits of a request
SPARE_CONNECTIONS = 256  # beside those of the requests that have a place
NAME = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:]+")


def serve(
    model: FineAlign,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    *,
    allow_hosts: Sequence[str] = (),
    on_listening: Callable[[str], None] = lambda address: None,
) -> None:
    """Answer until SIGTERM or Ctrl-C, then finish what was begun. A second Ctrl-C does not wait for that.

    Port 0 stands for a free one; ``on_listening`` gets the address. On a loopback address only this machine's own
    names and ``allow_hosts``, the names of a proxy before it, are answered to. Logs a line a request to standard
    error. Raises FinealignError: the address cannot be had, or what is allowed is no name.
    """
    server = Listener(model, host, port, limits or Limits(), allow_hosts)
    with _logging():
        server.run(on_listening)


class Listener:
    """A server that has its address and does not answer yet; ``address`` is the one to open on this machine.

    Raises FinealignError: the address cannot be had, or what is allowed is no name.
    """

    def __init__(self, model: FineAlign, host: str, port: int, limits: Limits, allow_hosts: Sequence[str] = ()) -> None:
        for name in allow_hosts:
            if not NAME.fullmatch(name):
                raise FinealignError(
                    f"--allow-host {name!r:.200} is no name of a machine. Wanted: a name as birds.example, without "
                    "http:// and port."
                )
        self._bound = _bind(host, port)
        bound, taken = self._bound.getsockname()[:2]
        hosts = LOOPBACK | {host.lower(), bound} if is_loopback(bound) else None
        app = create_app(model, limits, hosts=hosts, allow_hosts=allow_hosts)
        self.address = f"http://{_shown(host, bound)}:{taken}"
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
        """Answer until ``stop`` or, in the main thread, a signal. ``on_listening`` gets the address."""
        self._server.on_listening = partial(on_listening, self.address)
        with self._bound:
            self._server.run(sockets=[self._bound])

    def stop(self) -> None:
        """Have ``run`` finish what was begun and return; from any thread."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """Tells when it listens, and ends like any program that has done its work when a signal stops it."""

    on_listening: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.ensure_future(super().shutdown(sockets))
        while not ending.done() and not self.force_exit:
            await asyncio.wait({ending}, timeout=0.1)
        if ending.done():
            ending.result()
        else:  # the event loop cancels what else is under way as it ends, each of which would be told as an error
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
            ending.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


class _Protocol(H11Protocol):
    """A connection that is ended when the head of its next request does not come, or its answer is not read, in time.

    It is aborted, not closed: to close waits for what was written to be read.
    """

    def __init__(self, *arguments: Any, answer_seconds: float, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._answer_seconds = answer_seconds
        self._given_up: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio sets it only where a socket names its protocol, which an accepted one does not; without it the second
        # part of every answer waits some 40 ms for the client to acknowledge the first.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._give_up_in(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.transport.is_closing():  # after a request that is none
            self._give_up_in(HEAD_SECONDS)
        elif self.cycle is not before and not self.cycle.response_complete:
            self._wait_for_answer()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._given_up is None:  # one timer for the whole answer: not to be put off by reading a little
            self._give_up_in(self._answer_seconds)

    def on_response_complete(self) -> None:
        self._give_up_in(HEAD_SECONDS)
        super().on_response_complete()  # may begin with a request that waits already
        if not self.cycle.response_complete:
            self._wait_for_answer()

    def _wait_for_answer(self) -> None:
        self._stop_waiting()
        if self.flow.write_paused:  # the answer before it has not been read
            self._give_up_in(self._answer_seconds)

    def _give_up_in(self, seconds: float) -> None:
        self._stop_waiting()
        self._given_up = self.loop.call_later(seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._given_up is not None:
            self._given_up.cancel()
            self._given_up = None


def _shown(host: str, bound: str) -> str:
    """The host of the address to open: a bound one that stands for all of a machine's own cannot be asked for."""
    if ipaddress.ip_address(bound).is_unspecified:
        host = "::1" if ":" in bound else "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _bind(host: str, port: int) -> socket.socket:
    try:
        if not 0 <= port <= MAX_PORT:
            raise OSError(0, f"ports end at {MAX_PORT}")
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = text.partition(" (")[0].lower()  # Python adds the address once more
        raise FinealignError(
            f"Cannot listen on {host}, port {port}: {reason}. Give another --port (0: a free one), or an address of "
            "this machine as --host."
        ) from error


@contextmanager
def _logging() -> Iterator[None]:
    """While inside, a line a request goes to standard error, and what the server itself complains of."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    loggers = {logging.getLogger(LOG): logging.INFO, logging.getLogger("uvicorn.error"): logging.WARNING}
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    for logger, level in loggers.items():
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False  # else a root logger that has been set up prints every line again
    try:
        yield
    finally:
        for logger, level, propagate in before:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate
