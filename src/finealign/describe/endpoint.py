"""One chat endpoint that speaks OpenAI's protocol: how it is asked, and what its answers come to.

What comes back is untrusted: bounded, and never run or rendered. The key comes from the environment alone and is
written nowhere.
"""

import base64
import ipaddress
import json
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from finealign.describe.wording import SYSTEM
from finealign.errors import ConfigError, FinealignError

if TYPE_CHECKING:  # heavy, and not everybody has it
    from openai import APIStatusError

MAX_BYTES = 100_000  # of one answer
MAX_PER_CLASS = 50  # texts, to fit one answer
MAX_OBJECTS = 200  # looked at in one answer for that with the texts
LONG_SECRET = 8  # characters; a shorter one would be cut out of every other word

_SCHEMA = {
    "type": "object",
    "properties": {"descriptions": {"type": "array", "items": {"type": "string"}}},
    "required": ["descriptions"],
    "additionalProperties": False,
}
FORMATS: tuple[dict[str, Any] | None, ...] = (  # of an answer, in the order in which a server is tried
    {"type": "json_schema", "json_schema": {"name": "descriptions", "strict": True, "schema": _SCHEMA}},
    {"type": "json_object"},
    None,
)

NO_ADDRESS = "The endpoint is no address. Wanted: as http://localhost:11434/v1."
Kind = Literal["answer", "silent", "unfit", "format", "limit", "refused", "halted"]


class EndpointError(FinealignError):
    """A chat endpoint refuses, cannot be reached, or gives no texts that can be used."""


@dataclass(frozen=True)
class Asking:
    """How an endpoint is asked. Raises ConfigError for what is out of range.

    ``endpoint`` is the client's own where None: OPENAI_BASE_URL, else OpenAI. ``attempts`` bounds the requests for one
    class, the client's retries included; a response format that a server does not know costs none of them.
    """

    model: str
    endpoint: str | None = None
    per_class: int = 8  # texts
    siblings: int = 3  # nearest classes that a class is told apart from
    per_minute: int = 60  # requests
    at_once: int = 4  # requests
    timeout: float = 60.0  # seconds for one request
    attempts: int = 4
    max_tokens: int = 4096  # of one answer, what a model thinks unseen included

    def __post_init__(self) -> None:
        if not (self.model.strip() and self.model.isprintable()):
            raise ConfigError(f"{self.model!r:.100} names no model. Wanted: a model that the endpoint knows.")
        least = {"per_class": 1, "siblings": 0, "per_minute": 1, "at_once": 1, "attempts": 1, "max_tokens": 1}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"{name} is {getattr(self, name)}. Wanted: {smallest} or more.")
        if self.per_class > MAX_PER_CLASS:
            raise ConfigError(f"per_class is {self.per_class}. Wanted: {MAX_PER_CLASS} or fewer, to fit one answer.")
        if not (self.timeout > 0 and math.isfinite(self.timeout)):
            raise ConfigError(f"timeout is {self.timeout}. Wanted: seconds above 0.")


class Pace:
    """At most so many requests in any minute, over all threads."""

    def __init__(
        self,
        per_minute: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._clock, self._sleep = clock, sleep
        self._begun: deque[float] = deque(maxlen=per_minute)
        self._lock = threading.Lock()

    def wait(self) -> None:
        """Return when the next request may go out."""
        with self._lock:
            now = self._clock()
            full = len(self._begun) == self._begun.maxlen
            start = max(now, self._begun[0] + 60) if full else now
            self._begun.append(start)
        if start > now:
            self._sleep(start - now)


class Secrets:
    """What must be written nowhere: the key, and what an endpoint's address holds of the kind.

    Each in the forms it may come back in: plain, quoted for an address, or as Basic authorization. One of fewer than
    eight characters, as local servers take, is no secret to keep: it would be cut out of other words.
    """

    def __init__(self, key: str, endpoint: str = "") -> None:
        parts = urlsplit(endpoint)
        user, password = parts.username or "", parts.password or ""
        raw = [user, password, *(pair.partition("=")[2] for pair in parts.query.split("&"))]
        plain = [key, key.strip(), *map(unquote, raw), *(value for _, value in parse_qsl(parts.query))]
        quoted = [form for one in plain for form in (quote(one), quote(one, safe=""), quote_plus(one))]
        basic = [f"{unquote(user)}:{word}" for word in ("", unquote(password))] if user or password else []
        found = {*raw, *plain, *quoted, *(base64.b64encode(one.encode()).decode() for one in basic)}
        self._found = sorted((one for one in found if len(one) >= LONG_SECRET), key=len, reverse=True)

    def scrub(self, text: str) -> str:
        for secret in self._found:
            text = text.replace(secret, "[secret]")
        return text


def bare_endpoint(endpoint: str) -> str:
    """An endpoint's address without user, password, query and fragment."""
    parts = urlsplit(endpoint)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def find_texts(content: str) -> list[str] | None:
    """The texts of an answer, from the first JSON object of the shape that was asked for; None if there is none.

    Around the object there may be words, a fence, or what a model thought before, braces and all.
    """
    said = content.rpartition("</think>")[2]
    for start in islice((found.start() for found in re.finditer(r'\{(?=\s*")', said)), MAX_OBJECTS):
        with suppress(ValueError, RecursionError):
            _, end = json.JSONDecoder().raw_decode(said, start)
            return _Texts.model_validate_json(said[start:end]).descriptions  # json lets half characters by
    return None


class _Texts(BaseModel):
    model_config = ConfigDict(strict=True)
    descriptions: list[str]


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    """Of a chat completion, what is read of it."""

    choices: list[_Choice]
    model: str | None = None
    usage: dict[str, Any] | None = None

    def tokens(self, kind: str) -> int:
        found = (self.usage or {}).get(f"{kind}_tokens")
        return found if isinstance(found, int) and found > 0 else 0


@dataclass(frozen=True)
class Reply:
    """What became of one call of the client.

    ``kind``: an answer (with ``problem`` where it cannot be used); silent: no answer came in spite of the client's
    retries; unfit: this very prompt is refused; format and limit: the server does not know what was sent beside the
    prompt; refused: the endpoint refuses everything; halted: the run is stopping.
    """

    kind: Kind
    requests: int
    problem: str = ""
    content: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _HaltedError(Exception):
    pass


class Line:
    """The client of one endpoint; ``ask`` may be called from several threads. Raises ConfigError."""

    def __init__(self, asking: Asking) -> None:
        try:
            from openai import DefaultHttpxClient, OpenAI
        except ImportError:
            raise FinealignError(
                "To ask an endpoint takes the package openai. Install it: pip install 'finealign[describe]'."
            ) from None
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("OPENAI_API_KEY holds a character that no request can carry. Set it anew.")
        endpoint = asking.endpoint or os.environ.get("OPENAI_BASE_URL") or ""
        if endpoint:
            _check_endpoint(endpoint)
        elif not key:
            raise ConfigError(
                "No key for OpenAI's endpoint. Set OPENAI_API_KEY, give --endpoint URL for another one, or "
                "--from-templates to ask none."
            )
        self.asking = asking
        self.secrets = Secrets(key, endpoint)
        self._limit = "max_tokens"  # newer models of OpenAI's know only max_completion_tokens
        self._stopping = threading.Event()
        self._pace = Pace(asking.per_minute, sleep=self._stopping.wait)
        self._mine = threading.local()
        parts = urlsplit(endpoint)
        try:
            http = DefaultHttpxClient(
                event_hooks={"request": [self._before], "response": [self._after]},
                trust_env=not _is_loopback(parts.hostname or ""),  # no proxy is to see what stays on this machine
            )
        except Exception as error:  # of whatever kind the HTTP library has for a proxy that it cannot use
            raise ConfigError(_proxy_problem(error)) from None
        address = urlunsplit(parts._replace(query="", fragment=""))
        try:
            if address:
                http.build_request("POST", address)
            self._client = OpenAI(
                api_key=key or "none",  # local servers want none, the client always sends one
                base_url=address or None,
                default_query=dict(parse_qsl(parts.query)),
                timeout=asking.timeout,
                http_client=http,
            )
        except Exception:  # of whatever kind the HTTP library has for a host that is none
            http.close()
            raise ConfigError(NO_ADDRESS) from None
        self.endpoint = bare_endpoint(str(self._client.base_url))

    def close(self) -> None:
        """Give the connections up; what still waits for an answer on them does so in vain."""
        self.stop()
        self._client.close()

    def stop(self) -> None:
        """No further request goes out, the client's retries included."""
        self._stopping.set()

    def ask(self, prompt: str, form: int, *, settled: bool, retries: int) -> Reply:
        """One answer, or why there is none. ``settled``: the server is known to take this one of ``FORMATS``."""
        from openai import APIStatusError, OpenAIError

        self._mine.requests = 0
        limit, wanted = self._limit, FORMATS[form]
        options: dict[str, Any] = {
            "model": self.asking.model,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}],
            limit: self.asking.max_tokens,
        }
        if wanted:
            options["response_format"] = wanted
        completions = self._client.with_options(max_retries=retries).chat.completions
        try:
            with completions.with_streaming_response.create(**options) as response:
                return self._read(response.iter_bytes())
        except _HaltedError:
            return self._reply("halted")
        except APIStatusError as error:
            kind = _kind(error, limit=limit, may_be_format=bool(wanted) and not settled)
            if kind == "limit":
                self._limit = "max_completion_tokens"
            told = error.body
            message = told["message"] if isinstance(told, dict) and "message" in told else error.message
            return self._reply(kind, f"{error.status_code}: {self._one_line(str(message))}")
        except OpenAIError as error:  # no connection, most often
            return self._reply("silent", self._one_line(f"{error} {error.__cause__ or ''}"))

    def _before(self, request: object) -> None:
        """Before every request, retries included."""
        self._pace.wait()
        if self._stopping.is_set():
            raise _HaltedError
        self._mine.requests += 1

    def _after(self, response: Any) -> None:
        """Read what is no success here, within the bounds of an answer, for the client would read all there is.

        What breaks off is a broken connection to the client, and asked again. A quota that is used up comes as 429,
        which the client would ask again.
        """
        if response.is_success:
            return
        # The client is handed a short body in place of the stream; the HTTP library, whichever it is, has the classes.
        kind = type(response)
        raw = kind(response.status_code, headers=response.headers, stream=response.stream, request=response.request)
        body, _ = read_bounded(raw.iter_bytes(), self.asking.timeout)
        raw.close()
        response.stream = kind(response.status_code, content=body).stream
        response.headers.pop("content-encoding", None)
        if b"insufficient_quota" in response.read():
            response.headers["x-should-retry"] = "false"

    def _read(self, parts: Iterator[bytes]) -> Reply:
        try:
            body, problem = read_bounded(parts, self.asking.timeout)
        except Exception as error:  # the HTTP library's own, whichever the client has; no other code runs here
            return self._reply("answer", f"the connection broke in mid-answer ({type(error).__name__})")
        if problem:
            return self._reply("answer", problem)
        try:
            found = _Completion.model_validate_json(body)
        except ValidationError:
            return self._reply("answer", "the answer is no chat completion")
        reply = replace(
            self._reply("answer"),
            model=self._one_line(found.model or ""),
            prompt_tokens=found.tokens("prompt"),
            completion_tokens=found.tokens("completion"),
        )
        if not found.choices:
            return replace(reply, problem="the answer holds no choices")
        choice = found.choices[0]
        if choice.finish_reason == "length":
            return replace(reply, problem="the answer was cut short because it was too long")
        return replace(reply, content=self.secrets.scrub(choice.message.content or ""))

    def _reply(self, kind: Kind, problem: str = "") -> Reply:
        return Reply(kind, self._mine.requests, problem)

    def _one_line(self, text: str) -> str:
        """What a server said, fit for a screen and a file."""
        seen = "".join(one if one.isprintable() else " " for one in self.secrets.scrub(text[:MAX_BYTES]))
        found = " ".join(seen.split())
        return found if len(found) <= 200 else f"{found[:197]}..."


def _kind(error: "APIStatusError", *, limit: str, may_be_format: bool) -> Kind:
    """What an error of the endpoint says of the request."""
    status = error.status_code
    if status == 400 and "max_completion_tokens" in error.message and limit == "max_tokens":
        return "limit"
    if status in (400, 404, 422) and may_be_format and not _is_of_model(error):
        return "format"
    if status in (401, 402, 403, 404) or "insufficient_quota" in (error.code, error.type):
        return "refused"
    return "unfit" if status in (400, 413, 422) else "silent"


def _is_of_model(error: "APIStatusError") -> bool:
    """Whether the model is what is not known: Ollama says so in words alone."""
    said = error.message.lower()
    in_words = error.status_code == 404 and "model" in said and not ("format" in said or "json" in said)
    return error.code == "model_not_found" or in_words


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _proxy_problem(error: Exception) -> str:
    usual = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    names = sorted(name for name in os.environ if name.upper() in usual) or usual
    return (
        f"The proxy cannot be used ({type(error).__name__}). Look at {', '.join(names)}. Wanted: an address as "
        "http://host:port, or none."
    )


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or not endpoint.isprintable() or " " in endpoint:
        raise ConfigError(NO_ADDRESS)


def read_bounded(parts: Iterator[bytes], timeout: float) -> tuple[bytes, str]:
    """The beginning of a body, and what kept it from being all: its length or its time; empty if it is all."""
    body, until = b"", time.monotonic() + timeout
    for part in parts:
        body += part
        if len(body) > MAX_BYTES:
            return body[:MAX_BYTES], f"the answer is longer than {MAX_BYTES:,} bytes"
        if time.monotonic() > until:
            return body, f"the answer took longer than {timeout:g} seconds"
    return body, ""
