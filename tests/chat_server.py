"""A chat endpoint on this machine, as OpenAI's, vLLM's or Ollama's, that writes passable texts and fails on demand.

A test hands it a script: a function from what was asked to the answer. Without one, every answer is good.
"""

import json
import re
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import TracebackType
from typing import Any

from conftest import HANG

COLOURS = ["red", "blue", "green", "white", "black", "brown", "yellow", "grey", "pink", "golden", "silver", "violet"]
PARTS = ["crown", "breast", "tail", "wings", "bill", "legs", "back", "throat", "belly", "cheeks", "rump"]
PATTERNS = ["plain", "streaked", "spotted", "barred", "mottled", "glossy", "scaly"]


@dataclass(frozen=True)
class Asked:
    """One request as the server saw it."""

    number: int  # from 0
    path: str
    headers: Mapping[str, str]  # names in lower case
    body: Mapping[str, Any]

    @property
    def prompt(self) -> str:
        return str(self.body["messages"][-1]["content"])

    @property
    def name(self) -> str:
        """The class asked for."""
        found = re.search(r'(?:Class: |descriptions of )"(.+?)"(?:\.| alone)', self.prompt)
        assert found, self.prompt
        return found.group(1)

    @property
    def wanted(self) -> int:
        """How many texts."""
        return int(re.findall(r"Write (\d+)", self.prompt)[-1])

    @property
    def again(self) -> bool:
        """Whether it asks for what tells two classes apart."""
        return "too much alike" in self.prompt

    @property
    def form(self) -> str:
        return str(self.body.get("response_format", {"type": "text"})["type"])


@dataclass(frozen=True)
class Answer:
    """What to send back. ``send``: all; half of the body; nothing, the connection being closed; drip: bit by bit."""

    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    send: str = "all"
    after: float = 0.0  # seconds of silence before it
    held: threading.Event | None = None  # silence until this is set


Script = Callable[[Asked], Answer]


def saying(content: str | None, *, finish: str = "stop", **more: Any) -> Answer:
    """An answer with this content, of 10 tokens to 20 of the prompt."""
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": finish}
    found = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": "parrot-1-2026",
        "choices": [choice],
        "usage": {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30},
    }
    return Answer(json.dumps(found).encode(), **more)


def texts(*sentences: str, **more: Any) -> Answer:
    return saying(json.dumps({"descriptions": sentences}), **more)


def failing(status: int, message: str = "no", code: str | None = None, **headers: str) -> Answer:
    body = {"error": {"message": message, "type": code, "code": code, "param": None}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(json.dumps(body).encode(), status, named)


class ChatServer:
    """On a free port of 127.0.0.1 while the context lasts. ``asked`` is what it saw, in the order of arrival."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script or self.good
        self.asked: list[Asked] = []
        self.most_at_once = 0
        self.sent = 0  # bytes of bodies
        self._at_once = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._sentences = count()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:  # the library's own name
                server._serve(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                if not isinstance(sys.exception(), ConnectionError):  # clients hang up
                    super().handle_error(request, client_address)

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def sentence(self, name: str) -> str:
        """A text that no other call gives, for any class."""
        number = next(self._sentences)
        part, number = PARTS[number % len(PARTS)], number // len(PARTS)
        colour, number = COLOURS[number % len(COLOURS)], number // len(COLOURS)
        pattern, size = PATTERNS[number % len(PATTERNS)], number // len(PATTERNS)
        return f"A {name} with {'very ' * size}{pattern} {colour} {part}."

    def good(self, asked: Asked) -> Answer:
        return texts(*(self.sentence(asked.name) for _ in range(asked.wanted)))

    def names(self, *, again: bool = False) -> list[str]:
        """The classes asked for, in the order of arrival; ``again``: to tell them apart."""
        return [one.name for one in self.asked if one.again == again]

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._lock:
            asked = Asked(len(self.asked), handler.path, headers, body)
            self.asked.append(asked)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            answer = self.script(asked)
        try:
            if answer.held:
                answer.held.wait(HANG)
            self._closing.wait(answer.after)
            with suppress(ConnectionError):
                self._send(handler, answer)
        finally:
            with self._lock:
                self._at_once -= 1

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer) -> None:
        handler.close_connection = answer.send in ("half", "nothing")
        if answer.send == "nothing":
            return
        handler.send_response(answer.status)
        for name, value in {"content-type": "application/json", **answer.headers}.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(answer.body)))
        handler.end_headers()
        body = answer.body[: len(answer.body) // 2] if answer.send == "half" else answer.body
        step = 4 if answer.send == "drip" else 1_000_000
        for start in range(0, len(body), step):
            part = body[start : start + step]
            handler.wfile.write(part)
            self.sent += len(part)  # no lock: tests that look at it ask once at a time
            self._closing.wait(0.1 if answer.send == "drip" else 0)
