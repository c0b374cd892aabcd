"""The client of a chat endpoint with OpenAI's protocol: settings, requests, and parsing of the answers.

Answers are untrusted: their size and time are bounded, and they are never executed or rendered. The API key is read
only from the environment and is never written anywhere.
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

from finealign.errors import ConfigError, FinealignError
from finealign.texts.describe.wording import SYSTEM

if TYPE_CHECKING:  # openai is slow to import, and an optional dependency
    from openai import APIStatusError

MAX_BYTES = 100_000  # of one answer
MAX_PER_CLASS = 50  # texts; more would not fit one answer
MAX_OBJECTS = 200  # JSON objects of one answer that are tried in search of the texts
LONG_SECRET = 8  # characters; a shorter secret is not removed, because it would occur inside ordinary words

_SCHEMA = {
    "type": "object",
    "properties": {"descriptions": {"type": "array", "items": {"type": "string"}}},
    "required": ["descriptions"],
    "additionalProperties": False,
}
FORMATS: tuple[dict[str, Any] | None, ...] = (  # response formats, in the order in which they are tried on a server
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
    """How an endpoint is asked. Raises ConfigError if a value is out of range.

    If ``endpoint`` is None, the client's default is used: OPENAI_BASE_URL if it is set, else OpenAI's endpoint.
    ``attempts`` is the largest number of requests for one class, including the client's retries. A request that fails
    because the server does not know the response format does not count.
    """

    model: str
    endpoint: str | None = None
    per_class: int = 8  # texts asked for
    siblings: int = 3  # nearest classes that the prompt for a class names
    per_minute: int = 60  # requests
    at_once: int = 4  # requests at the same time
    timeout: float = 60.0  # seconds for one request
    attempts: int = 4
    max_tokens: int = 4096  # of one answer, including hidden reasoning

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
    """Limits the requests of all threads together to ``per_minute`` in any minute."""

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
        """Block until the next request may be sent."""
        with self._lock:
            now = self._clock()
            full = len(self._begun) == self._begun.maxlen
            # At the earliest a minute after the oldest of the last ``per_minute`` requests.
            start = max(now, self._begun[0] + 60) if full else now
            self._begun.append(start)
        if start > now:
            self._sleep(start - now)


class Secrets:
    """The secrets that must not be written anywhere: the API key, and credentials in the endpoint's address.

    Each secret is known in all forms in which a server may repeat it: plain, percent-encoded, as Basic authorization.
    Values of fewer than eight characters, such as the dummy keys of local servers, are not treated as secrets, because
    they would be removed from inside ordinary words.
    """

    def __init__(self, key: str, endpoint: str = "") -> None:
        parts = urlsplit(endpoint)
        user, password = parts.username or "", parts.password or ""
        raw = [user, password, *(pair.partition("=")[2] for pair in parts.query.split("&"))]
        plain = [key, key.strip(), *map(unquote, raw), *(value for _, value in parse_qsl(parts.query))]
        quoted = [form for value in plain for form in (quote(value), quote(value, safe=""), quote_plus(value))]
        basic = [f"{unquote(user)}:{word}" for word in ("", unquote(password))] if user or password else []
        secrets = {*raw, *plain, *quoted, *(base64.b64encode(pair.encode()).decode() for pair in basic)}
        # The longest first: a secret may be part of another one.
        self._found = sorted((secret for secret in secrets if len(secret) >= LONG_SECRET), key=len, reverse=True)

    def scrub(self, text: str) -> str:
        """The text with every secret replaced by ``[secret]``."""
        for secret in self._found:
            text = text.replace(secret, "[secret]")
        return text


def bare_endpoint(endpoint: str) -> str:
    """An endpoint's address without user, password, query, fragment, and slashes at the end."""
    parts = urlsplit(endpoint)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def find_texts(content: str) -> list[str] | None:
    """The texts in the first JSON object of an answer that has the requested form; None if there is no such object.

    The object may be surrounded by other text, by a code fence, or by a model's reasoning, even if that holds braces.
    """
    answer = content.rpartition("</think>")[2]
    for start in islice((brace.start() for brace in re.finditer(r'\{(?=\s*")', answer)), MAX_OBJECTS):
        with suppress(ValueError, RecursionError):
            _, end = json.JSONDecoder().raw_decode(answer, start)
            # Parsed again by pydantic, because json accepts lone surrogates.
            return _Texts.model_validate_json(answer[start:end]).descriptions
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
    """The fields of a chat completion that are read."""

    choices: list[_Choice]
    model: str | None = None
    usage: dict[str, Any] | None = None

    def tokens(self, kind: str) -> int:
        """The number of tokens used; ``kind`` is "prompt" or "completion". 0 if the server does not report it."""
        count = (self.usage or {}).get(f"{kind}_tokens")
        return count if isinstance(count, int) and count > 0 else 0


@dataclass(frozen=True)
class Reply:
    """The result of one call of ``Line.ask``.

    ``kind`` is one of:

    - "answer": an answer came; ``problem`` says why it cannot be used, or is empty.
    - "silent": no answer came, in spite of the client's retries.
    - "unfit": the server refuses this prompt.
    - "format": the server does not know the response format.
    - "limit": the server does not know the name of the token limit.
    - "refused": the endpoint refuses every request.
    - "halted": the run is stopping.
    """

    kind: Kind
    requests: int  # sent, including the client's retries
    problem: str = ""
    content: str = ""
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _HaltedError(Exception):
    pass


class Line:
    """The client of one endpoint. ``ask`` may be called from several threads at once.

    Raises ConfigError if the key, the endpoint's address or the proxy cannot be used, FinealignError if the package
    openai is not installed.
    """

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
        self._limit = "max_tokens"  # newer models of OpenAI only accept max_completion_tokens
        self._stopping = threading.Event()
        self._pace = Pace(asking.per_minute, sleep=self._stopping.wait)
        self._mine = threading.local()  # ``requests`` sent in the current call of ``ask``, for each thread
        parts = urlsplit(endpoint)
        try:
            http = DefaultHttpxClient(
                event_hooks={"request": [self._before], "response": [self._after]},
                trust_env=not _is_loopback(parts.hostname or ""),  # no proxy for a server on this machine
            )
        except Exception as error:  # the HTTP library raises several types for a proxy that it cannot use
            raise ConfigError(_proxy_problem(error)) from None
        address = urlunsplit(parts._replace(query="", fragment=""))
        try:
            if address:
                http.build_request("POST", address)
            self._client = OpenAI(
                api_key=key or "none",  # local servers need no key, but the client insists on one
                base_url=address or None,
                default_query=dict(parse_qsl(parts.query)),
                timeout=asking.timeout,
                http_client=http,
            )
        except Exception:  # the HTTP library raises several types for an invalid host
            http.close()
            raise ConfigError(NO_ADDRESS) from None
        self.endpoint = bare_endpoint(str(self._client.base_url))

    def close(self) -> None:
        """Stop, and close the connections. Calls that still wait for an answer fail."""
        self.stop()
        self._client.close()

    def stop(self) -> None:
        """Send no further requests, not even the client's retries."""
        self._stopping.set()

    def ask(self, prompt: str, form: int, *, settled: bool, retries: int) -> Reply:
        """Send a prompt and return the answer, or why there is none.

        ``form`` is the index of the response format in ``FORMATS``. ``settled`` is whether the server is known to
        accept that format. ``retries`` is how often the client may repeat the request if it fails.
        """
        from openai import APIStatusError, OpenAIError

        self._mine.requests = 0
        limit, response_format = self._limit, FORMATS[form]
        options: dict[str, Any] = {
            "model": self.asking.model,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}],
            limit: self.asking.max_tokens,
        }
        if response_format:
            options["response_format"] = response_format
        completions = self._client.with_options(max_retries=retries).chat.completions
        try:
            with completions.with_streaming_response.create(**options) as response:
                return self._read(response.iter_bytes())
        except _HaltedError:
            return self._reply("halted")
        except APIStatusError as error:
            kind = _kind(error, limit=limit, may_be_format=bool(response_format) and not settled)
            if kind == "limit":
                self._limit = "max_completion_tokens"
            body = error.body
            message = body["message"] if isinstance(body, dict) and "message" in body else error.message
            return self._reply(kind, f"{error.status_code}: {self._one_line(str(message))}")
        except OpenAIError as error:  # usually a failed connection
            return self._reply("silent", self._one_line(f"{error} {error.__cause__ or ''}"))

    def _before(self, request: object) -> None:
        """Called by the HTTP library before every request, including the client's retries."""
        self._pace.wait()
        if self._stopping.is_set():
            raise _HaltedError
        self._mine.requests += 1

    def _after(self, response: Any) -> None:
        """Called by the HTTP library with every response: read the body of an error within the bounds of an answer.

        The client itself would read it without a bound. If the connection breaks while it is read, the client sees a
        broken connection and retries. A used-up quota is reported as 429, which the client must be told not to retry.
        """
        if response.is_success:
            return
        # Replace the stream by one that holds only the bounded body. The response's own class makes both, so that no
        # HTTP library has to be imported by name.
        response_class = type(response)
        raw = response_class(
            response.status_code, headers=response.headers, stream=response.stream, request=response.request
        )
        body, _ = read_bounded(raw.iter_bytes(), self.asking.timeout)
        raw.close()
        response.stream = response_class(response.status_code, content=body).stream
        response.headers.pop("content-encoding", None)  # the body is decoded already
        if b"insufficient_quota" in response.read():
            response.headers["x-should-retry"] = "false"

    def _read(self, parts: Iterator[bytes]) -> Reply:
        """The reply for the body of a successful response, given in parts."""
        try:
            body, problem = read_bounded(parts, self.asking.timeout)
        except Exception as error:  # only the HTTP library's own types can occur here
            return self._reply("answer", f"the connection broke in mid-answer ({type(error).__name__})")
        if problem:
            return self._reply("answer", problem)
        try:
            completion = _Completion.model_validate_json(body)
        except ValidationError:
            return self._reply("answer", "the answer is no chat completion")
        reply = replace(
            self._reply("answer"),
            model=self._one_line(completion.model or ""),
            prompt_tokens=completion.tokens("prompt"),
            completion_tokens=completion.tokens("completion"),
        )
        if not completion.choices:
            return replace(reply, problem="the answer holds no choices")
        choice = completion.choices[0]
        if choice.finish_reason == "length":
            return replace(reply, problem="the answer was cut short because it was too long")
        return replace(reply, content=self.secrets.scrub(choice.message.content or ""))

    def _reply(self, kind: Kind, problem: str = "") -> Reply:
        return Reply(kind, self._mine.requests, problem)

    def _one_line(self, text: str) -> str:
        """A server's text as one printable line of at most 200 characters, without secrets."""
        printable = "".join(
            character if character.isprintable() else " " for character in self.secrets.scrub(text[:MAX_BYTES])
        )
        line = " ".join(printable.split())
        return line if len(line) <= 200 else f"{line[:197]}..."


def _kind(error: "APIStatusError", *, limit: str, may_be_format: bool) -> Kind:
    """The kind of reply that an error status of the endpoint stands for."""
    status = error.status_code
    if status == 400 and "max_completion_tokens" in error.message and limit == "max_tokens":
        return "limit"
    if status in (400, 404, 422) and may_be_format and not _is_of_model(error):
        return "format"
    if status in (401, 402, 403, 404) or "insufficient_quota" in (error.code, error.type):
        return "refused"
    return "unfit" if status in (400, 413, 422) else "silent"


def _is_of_model(error: "APIStatusError") -> bool:
    """Whether the error says that the model is unknown. Ollama has no error code for that, only a message."""
    message = error.message.lower()
    names_model = error.status_code == 404 and "model" in message and not ("format" in message or "json" in message)
    return error.code == "model_not_found" or names_model


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _proxy_problem(error: Exception) -> str:
    variables = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    names = sorted(name for name in os.environ if name.upper() in variables) or variables
    return (
        f"The proxy cannot be used ({type(error).__name__}). Look at {', '.join(names)}. Wanted: an address as "
        "http://host:port, or none."
    )


def _check_endpoint(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or not endpoint.isprintable() or " " in endpoint:
        raise ConfigError(NO_ADDRESS)


def read_bounded(parts: Iterator[bytes], timeout: float) -> tuple[bytes, str]:
    """Read a body until it ends, exceeds ``MAX_BYTES``, or takes longer than ``timeout`` seconds.

    Returns what was read, at most ``MAX_BYTES``, and why it is not the whole body; empty if it is.
    """
    body, deadline = b"", time.monotonic() + timeout
    for part in parts:
        body += part
        if len(body) > MAX_BYTES:
            return body[:MAX_BYTES], f"the answer is longer than {MAX_BYTES:,} bytes"
        if time.monotonic() > deadline:
            return body, f"the answer took longer than {timeout:g} seconds"
    return body, ""
