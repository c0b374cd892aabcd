"""The API: what it answers, what it refuses, and that no request is lost. Real servers on 127.0.0.1."""

import copy
import http.client
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import ExifTags, Image

from browser import running
from conftest import CLASSES, HANG, tiny_config, write_photos
from finealign import FineAlign
from finealign.errors import FinealignError
from finealign.images.decoding import Photo, Pixels, decode_image
from finealign.model.predictions import explained
from finealign.serve.batches import Batches
from finealign.serve.forms import Limits
from finealign.serve.guard import SECURITY_HEADERS
from finealign.serve.server import Listener

Tiny = Callable[[str], str]
BOUNDARY = "a-boundary"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


@pytest.fixture(scope="module")
def model(tiny_backbone: Tiny, tmp_path_factory: pytest.TempPathFactory) -> FineAlign:
    config = tiny_config(tiny_backbone("transformer"), training__epochs=2)
    return FineAlign(CLASSES, config=config).fit(write_photos(tmp_path_factory.mktemp("served") / "photos"))


@pytest.fixture(scope="module")
def address(model: FineAlign) -> Iterator[str]:
    with running(model) as address:
        yield address


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Message
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def kind(self) -> str:
        """The word for a program; that there is a sentence for a person with it is checked here."""
        assert self.headers["content-type"] == "application/json"
        assert set(self.json) == {"error", "kind"}
        assert re.fullmatch(r"[A-Z'a-z].*\.", self.json["error"], re.DOTALL)
        kind: str = self.json["kind"]
        return kind


def ask(address: str, path: str, body: bytes | None = None, method: str = "GET", **headers: str) -> Answer:
    """One request on a connection of its own; underscores in the names of headers stand for hyphens."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=HANG)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


def form(content: bytes, *, name: str = "photo.png", field: str = "file") -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
    return f"{head}Content-Type: image/png\r\n\r\n".encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


def predict(address: str, content: bytes, query: str = "", **named: str) -> Answer:
    return ask(address, f"/predict{query}", form(content, **named), "POST", Content_Type=FORM)


def pixels(seed: int, height: int = 40, width: int = 56) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + HANG
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def waiting(address: str) -> int:
    found: int = ask(address, "/healthz").json["waiting"]
    return found


@contextmanager
def listening(model: FineAlign, limits: Limits, allow_hosts: Sequence[str] = ()) -> Iterator[Listener]:
    """A running server itself, to be looked into."""
    server, begun = Listener(model, "127.0.0.1", 0, limits, allow_hosts), threading.Event()
    thread = threading.Thread(target=server.run, args=[lambda _: begun.set()])
    thread.start()
    try:
        assert begun.wait(HANG)
        yield server
    finally:
        server.stop()
        thread.join(HANG)
        assert not thread.is_alive()


class Gate:
    """A model that is held up before it encodes, until the gate is opened. ``seen`` are the shapes that came to it."""

    def __init__(self, model: FineAlign) -> None:
        self.opened, self.seen = threading.Event(), list[tuple[int, ...]]()
        self.model = copy.copy(model)
        self.model._predictor = copy.copy(model.predictor_)
        explain = model.predictor_.explain

        def held(photos: Sequence[Photo], **options: Any) -> Any:
            self.seen += [photo.pixels.shape for photo in photos]
            assert self.opened.wait(HANG)
            return explain(photos, **options)

        self.model.predictor_.explain = held  # type: ignore[method-assign]


# --- what it answers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["las", "global", "fused"])
def test_predict__answers_what_the_model_makes_of_it(model: FineAlign, address: str, score: Any) -> None:
    image = pixels(0)
    (found,) = model.explain_pixels([image], score=score, with_start=True)
    answer = predict(address, png(image), f"?top_k=2&score={score}")
    assert answer.status == 200
    assert answer.json == explained(found, CLASSES, 2)
    assert len(answer.json["crops"]) == (0 if score == "global" else len(found.boxes))
    assert answer.json["start"]["label"] in CLASSES


def test_predict__without_a_query_uses_the_models_score_and_all_of_few_classes(model: FineAlign, address: str) -> None:
    answer = predict(address, png(pixels(1))).json
    assert answer["score"] == model.score_
    assert sorted(choice["label"] for choice in answer["top"]) == sorted(CLASSES)


def test_predict__an_image_is_turned_by_its_exif(address: str) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels(2, height=30, width=70)).save(file, "JPEG", exif=exif, quality=95)
    answer = predict(address, file.getvalue()).json
    assert (answer["width"], answer["height"]) == (30, 70)
    assert all(0 <= left < right <= 30 and 0 <= top < bottom <= 70 for left, top, right, bottom in boxes(answer))


def boxes(answer: dict[str, Any]) -> list[list[int]]:
    return [crop["box"] for crop in answer["crops"]]


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1)])
def test_predict__the_smallest_and_the_narrowest(address: str, shape: tuple[int, int]) -> None:
    assert predict(address, png(pixels(3, *shape))).status == 200


def test_predict__a_hundred_at_once_each_get_their_own(model: FineAlign, address: str) -> None:
    images = [pixels(100 + number, height=20 + number % 7, width=30 + number % 11) for number in range(100)]
    alone = [explained(model.explain_pixels([image], with_start=True)[0], CLASSES, 3) for image in images]
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda image: predict(address, png(image)), images))
    assert [answer.status for answer in answers] == [200] * 100
    for answer, wanted in zip(answers, alone, strict=True):
        assert confidences(answer.json) == pytest.approx(confidences(wanted), abs=1e-5)
        assert confidences(answer.json["start"]) == pytest.approx(confidences(wanted["start"]), abs=1e-5)
        assert boxes(answer.json) == boxes(wanted)
    assert waiting(address) == 0


def confidences(guess: Any) -> dict[str, float]:
    return {choice["label"]: choice["confidence"] for choice in guess["top"]}


def test_predict__several_scores_at_once(model: FineAlign, address: str) -> None:
    """They wait in one line and are encoded apart."""
    image, scores = pixels(4), ["las", "global", "fused"] * 8
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda score: predict(address, png(image), f"?score={score}").json, scores))
    assert [answer["score"] for answer in answers] == scores
    for answer in answers:
        (alone,) = model.explain_pixels([image], score=answer["score"])
        wanted = dict(zip(CLASSES, alone.probabilities.tolist(), strict=True))
        assert confidences(answer) == pytest.approx(wanted, abs=1e-5)


def test_healthz__tells_how_busy_it_is(address: str) -> None:
    assert ask(address, "/healthz").json == {"status": "ok", "waiting": 0, "capacity": 256}


def test_model__tells_what_answers_and_no_path_of_this_machine(model: FineAlign, address: str) -> None:
    found = ask(address, "/model").json
    assert found["classes"] == CLASSES
    assert (found["use"], found["class_prior"]) == ("adapted", "folder")
    assert (found["method"], found["score"], found["input_size"]) == ("fair", model.score_, 32)
    assert set(found["scores"]) == {"las", "global", "fused"}
    assert found["limits"] == {
        "max_upload_bytes": 20_000_000,
        "max_pixels": 25_000_000,
        "waiting": 256,
        "timeout": 30.0,
    }
    assert "/" not in found["backbone"]


def test_model__tells_of_the_start_where_it_answers(model: FineAlign, tmp_path: Path) -> None:
    model.save(tmp_path)
    start = FineAlign.load(tmp_path, use="start", device="cpu", precision="fp32")
    with running(start) as address:
        found = ask(address, "/model").json
        answer = predict(address, png(pixels(3))).json
        page = ask(address, "/").body.decode()
    assert (found["use"], found["score"]) == ("start", "global")
    assert (answer["label"], answer["confidence"]) == (answer["start"]["label"], answer["start"]["confidence"])
    assert "By <strong>the model before adaptation</strong>" in page


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/base.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/icon.svg", "image/svg+xml"),
    ],
)
def test_page__its_files_are_there(address: str, path: str, media_type: str) -> None:
    answer = ask(address, path)
    assert answer.status == 200
    assert answer.headers.get_content_type() == media_type


def test_page__its_title_says_classes_and_method_and_nothing_is_inline(address: str) -> None:
    text = ask(address, "/").body.decode()
    assert "<title>3 classes by fair: finealign</title>" in text
    assert "$" not in text
    assert not re.search(r"<style|<script(?![^>]* src=)|\son\w+=|\sstyle=|https?://", text)


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_predict__a_file_that_is_no_image_is_422_with_the_reason(address: str) -> None:
    answer = predict(address, b"some text")
    assert (answer.status, answer.kind) == (422, "unreadable")
    assert answer.json["error"] == "The image cannot be read: not an image. Send another."


@pytest.mark.parametrize(("cut", "reason"), [(0, "empty file"), (200, "truncated")])
def test_predict__a_torn_image_is_422(address: str, cut: int, reason: str) -> None:
    answer = predict(address, png(pixels(5))[:cut])
    assert (answer.status, answer.kind) == (422, "unreadable")
    assert reason in answer.json["error"]


def test_predict__too_many_pixels_is_422_with_the_limit(model: FineAlign) -> None:
    with running(model, Limits(max_pixels=1000)) as address:
        answer = predict(address, png(pixels(6)))
        assert (answer.status, answer.kind) == (422, "unreadable")
        assert "56 x 40 pixels, over the limit of 1,000" in answer.json["error"]
        assert predict(address, png(pixels(6, 20, 50))).status == 200


def test_predict__another_field_or_none_is_422(address: str) -> None:
    answer = predict(address, png(pixels(7)), field="image")
    assert (answer.status, answer.kind) == (422, "no-file")
    text = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"\r\n\r\ntext\r\n--{BOUNDARY}--\r\n'
    answer = ask(address, "/predict", text.encode(), "POST", Content_Type=FORM)
    assert (answer.status, answer.kind) == (422, "no-file")


@pytest.mark.parametrize("content_type", ["image/png", "application/json", "application/x-www-form-urlencoded", ""])
def test_predict__a_body_that_is_no_form_is_415(address: str, content_type: str) -> None:
    answer = ask(address, "/predict", png(pixels(8)), "POST", Content_Type=content_type)
    assert (answer.status, answer.kind) == (415, "media-type")


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        (FORM, b"no boundary at all"),
        (FORM, form(b"x") + form(b"y")),
        (FORM, form(b"x").replace(b'name="file"; ', b"")),
        (FORM, form(b"x").replace(f"--{BOUNDARY}--".encode(), form(b"y"))),
    ],
)
def test_predict__a_malformed_form_is_400_or_what_of_it_can_be_read(
    address: str, content_type: str, body: bytes
) -> None:
    answer = ask(address, "/predict", body, "POST", Content_Type=content_type)
    assert answer.status in (400, 422)
    assert answer.kind in ("malformed", "no-file", "unreadable")


def test_predict__a_form_is_utf8_whatever_its_client_says(address: str) -> None:
    """To decode punycode takes time by the square of the length: 200 kB held up everybody."""
    content_type = f"multipart/form-data; charset=punycode; boundary={BOUNDARY}"
    answer = ask(address, "/predict", form(png(pixels(8))), "POST", Content_Type=content_type)
    assert answer.status == 200
    field = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="a"\r\n\r\n{"a" * 600}\r\n'.encode()
    answer = ask(address, "/predict", field + form(png(pixels(8))), "POST", Content_Type=content_type)
    assert (answer.status, answer.kind) == (400, "malformed")


@pytest.mark.parametrize("name", ["x" * 20_000, "x" * 3_000_000])
def test_predict__a_head_of_a_part_that_does_not_end_is_400(address: str, name: str) -> None:
    answer = predict(address, png(pixels(8)), name=name)
    assert (answer.status, answer.kind) == (400, "malformed")


def test_predict__a_jpeg_of_very_many_scans_is_422(address: str) -> None:
    file = io.BytesIO()
    Image.fromarray(pixels(8)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    start = data.rindex(b"\xff\xda")
    answer = predict(address, data[:start] + data[start:-2] * 200 + data[-2:])
    assert (answer.status, answer.kind) == (422, "unreadable")
    assert "a JPEG of more than 100 scans" in answer.json["error"]


@pytest.mark.parametrize("query", ["top_k=0", "top_k=4", "top_k=x", "top_k=", "score=best", "score=", "top_k=1e9"])
def test_predict__a_query_out_of_range_is_422(address: str, query: str) -> None:
    answer = predict(address, png(pixels(9)), f"?{query}")
    assert (answer.status, answer.kind) == (422, "invalid")


def test_errors__unknown_paths_and_methods_are_json_too(address: str) -> None:
    for path in ("/nothing", "/docs", "/redoc", "/page.css/../../app.py", "/%2e%2e/%2e%2e/etc/passwd", "/page/"):
        answer = ask(address, path)
        assert (answer.status, answer.kind) == (404, "not-found")
    answer = ask(address, "/predict")
    assert (answer.status, answer.kind, answer.headers["allow"]) == (405, "method-not-allowed", "POST")
    answer = ask(address, "/healthz", b"body", "DELETE")
    assert (answer.status, answer.kind) == (405, "method-not-allowed")


def test_predict__an_upload_over_the_limit_is_413(model: FineAlign) -> None:
    with running(model, Limits(max_upload_bytes=100_000)) as address:
        for size in (100_001, 3_000_000):
            answer = predict(address, bytes(size))
            assert (answer.status, answer.kind) == (413, "too-large")
            assert "100,000 bytes" in answer.json["error"]
        assert predict(address, bytes(100_000)).status == 422  # no image, but not too large
        assert waiting(address) == 0


def test_predict__an_upload_without_a_length_is_cut_off_at_the_limit(model: FineAlign) -> None:
    with running(model, Limits(max_upload_bytes=100_000)) as address:
        body = form(bytes(5_000_000))
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [body[:2_000_000], body[2_000_000:]])
        answer = raw(address, "Transfer-Encoding: chunked", chunks + b"0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b'"kind":"too-large"' in answer
        assert predict(address, png(pixels(10))).status == 200


def test_predict__a_length_that_lies(model: FineAlign) -> None:
    body = form(png(pixels(11)))
    with running(model, Limits(timeout=0.5)) as address:
        assert raw(address, f"Content-Length: {len(body) + 50}", body).startswith(b"HTTP/1.1 408 ")
    with running(model, Limits(max_upload_bytes=100_000)) as address:
        assert raw(address, "Content-Length: 999999999", body).startswith(b"HTTP/1.1 413 ")
        short = raw(address, f"Content-Length: {len(body) - 80}", body)
        assert short.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 422 "))
        assert raw(address, f"Content-Length: {'9' * 5000}", body).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 "))
        assert raw(address, "Content-Length: -1", body).startswith(b"HTTP/1.1 400 ")
        assert predict(address, png(pixels(11))).status == 200
        assert waiting(address) == 0


def raw(address: str, header: str, body: bytes) -> bytes:
    """What comes back, until the server closes, for a body that goes out whatever its headers say of it."""
    parts = urlsplit(address)
    head = f"POST /predict HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {FORM}\r\n{header}\r\n"
    head += "Connection: close\r\n\r\n"
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=HANG) as sent:
        sent.sendall(head.encode() + body)
        return b"".join(iter(lambda: sent.recv(65536), b""))


def test_predict__a_client_that_trickles_is_408(model: FineAlign) -> None:
    with running(model, Limits(timeout=0.5)) as address:
        parts, body = urlsplit(address), form(png(pixels(12)))
        head = f"POST /predict HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {FORM}\r\n"
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=HANG) as sent:
            sent.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
            sent.settimeout(0.05)
            answer = b""
            for number in range(len(body)):
                sent.sendall(body[number : number + 1])
                try:
                    answer = sent.recv(65536)
                    break
                except TimeoutError:
                    continue
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer
        until(lambda: waiting(address) == 0)


def test_connection__a_head_that_does_not_come_is_given_up(model: FineAlign, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finealign.serve.server.HEAD_SECONDS", 0.2)
    with running(model) as address:
        parts = urlsplit(address)
        for begun in (b"", b"GET /healthz HTT", b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: "):
            with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=HANG) as sent:
                sent.sendall(begun)
                assert sent.recv(100) == b""


def test_connection__an_answer_that_is_not_read_is_given_up(model: FineAlign, monkeypatch: pytest.MonkeyPatch) -> None:
    """The openapi description is asked for again and again, until neither side can hold more of it."""
    monkeypatch.setattr("finealign.serve.server.HEAD_SECONDS", 0.3)
    with listening(model, Limits(timeout=0.3)) as server:
        parts = urlsplit(server.address)
        with socket.socket() as sent:
            sent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sent.connect((parts.hostname, parts.port))
            sent.settimeout(0.5)
            request = f"GET /openapi.json HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
            with suppress(OSError):  # it takes no more, or has ended the connection
                while True:
                    sent.sendall(request * 100)
            until(lambda: not server._server.server_state.connections)


def test_connections__past_all_places_and_some_more_it_is_503(
    model: FineAlign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finealign.serve.server.SPARE_CONNECTIONS", 2)
    with listening(model, Limits(waiting=1)) as server:
        parts = urlsplit(server.address)
        assert ask(server.address, "/healthz").status == 200
        with ExitStack() as open_ones:
            for _ in range(2):
                open_ones.enter_context(socket.create_connection((parts.hostname or "", parts.port or 0)))
            until(lambda: len(server._server.server_state.connections) == 2)
            assert ask(server.address, "/healthz").status == 503
        until(lambda: not server._server.server_state.connections)
        assert ask(server.address, "/healthz").status == 200


def test_predict__a_client_that_leaves_is_not_computed_for(model: FineAlign) -> None:
    gate = Gate(model)
    with running(gate.model) as address, ThreadPoolExecutor(1) as pool:
        first = pool.submit(predict, address, png(pixels(0, 20, 20)))
        until(lambda: bool(gate.seen))
        parts, body = urlsplit(address), form(png(pixels(1, 21, 21)))
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=HANG) as sent:
            head = f"POST /predict HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {FORM}\r\n"
            sent.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: waiting(address) == 2)
        until(lambda: waiting(address) == 1)
        gate.opened.set()
        assert first.result().status == 200
        assert predict(address, png(pixels(2, 22, 22))).status == 200
    assert gate.seen == [(20, 20, 3), (22, 22, 3)]


def test_predict__a_client_that_leaves_gives_its_place_back(address: str) -> None:
    parts = urlsplit(address)
    for _ in range(3):
        with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=HANG) as sent:
            head = f"POST /predict HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {FORM}\r\n"
            sent.sendall(f"{head}Content-Length: 5000\r\n\r\nhalf".encode())
    until(lambda: waiting(address) == 0)
    assert predict(address, png(pixels(13))).status == 200


# --- who may ask ------------------------------------------------------------------------------------------------------


def test_host__other_names_than_this_machines_are_refused(address: str) -> None:
    port = urlsplit(address).port
    for name in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "",
        "[::1",
        "localhost@evil.example",
    ):
        answer = ask(address, "/healthz", Host=name)
        assert (answer.status, answer.kind) == (421, "host"), name
    for name in (f"localhost:{port}", f"127.0.0.1:{port}", "[::1]", "LOCALHOST"):
        assert ask(address, "/healthz", Host=name).status == 200


def test_host__any_name_will_do_where_others_may_ask(model: FineAlign) -> None:
    with running(model, host="0.0.0.0") as address:
        assert ask(address.replace("0.0.0.0", "127.0.0.1"), "/healthz", Host="machine.example").status == 200


def test_host__a_loopback_address_by_any_spelling_is_guarded(model: FineAlign) -> None:
    with running(model, host="LOCALHOST") as address:
        assert ask(address, "/healthz", Host="evil.example").status == 421
        assert ask(address, "/healthz").status == 200


def test_host__the_address_of_all_is_opened_by_the_loopback_one(model: FineAlign) -> None:
    with running(model, host="0.0.0.0") as address:
        assert address.startswith("http://127.0.0.1:")
        assert ask(address, "/healthz").status == 200


def test_allowed__a_name_passes_as_host_and_as_origin(model: FineAlign) -> None:
    with listening(model, Limits(), ["Birds.example"]) as server:
        address = server.address
        port = urlsplit(address).port
        for headers in (
            {"Host": "birds.example"},
            {"Host": "birds.example:8443"},
            {"Host": "birds.example", "Origin": "https://birds.example"},
            {"Host": f"127.0.0.1:{port}", "Origin": "https://birds.example", "Sec_Fetch_Site": "same-origin"},
        ):
            assert ask(address, "/healthz", None, "GET", **headers).status == 200, headers
        assert ask(address, "/healthz", Host="other.example").kind == "host"
        for headers in (
            {"Origin": "https://other.example"},
            {"Origin": "https://birds.example.other.example"},
            {"Origin": "https://birds.example", "Sec_Fetch_Site": "cross-site"},
        ):
            assert ask(address, "/healthz", None, "GET", **headers).kind == "cross-site", headers


@pytest.mark.parametrize("name", ["https://birds.example", "birds.example:8443", "", "*"])
def test_allowed__what_is_no_name_is_told(model: FineAlign, name: str) -> None:
    with pytest.raises(FinealignError, match=r"--allow-host .* is no name"):
        Listener(model, "127.0.0.1", 0, Limits(), [name])


def test_head__is_taken_where_a_monitor_asks(address: str) -> None:
    for path in ("/", "/healthz"):
        answer = ask(address, path, method="HEAD")
        assert (answer.status, answer.body) == (200, b"")


def test_origin__a_page_of_another_site_is_refused(address: str) -> None:
    for headers in (
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"},
    ):
        answer = ask(address, "/predict", form(png(pixels(14))), "POST", Content_Type=FORM, **headers)
        assert (answer.status, answer.kind) == (403, "cross-site"), headers
    for headers in ({"Sec_Fetch_Site": "same-origin"}, {"Sec_Fetch_Site": "none"}, {"Origin": address}):
        answer = ask(address, "/predict", form(png(pixels(14))), "POST", Content_Type=FORM, **headers)
        assert answer.status == 200, headers


def test_origin__a_link_may_lead_to_the_page(address: str) -> None:
    assert ask(address, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status == 200
    assert ask(address, "/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors").status == 403
    assert ask(address, "/model", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status == 403


def test_headers__every_answer_has_them(address: str) -> None:
    answers = [
        ask(address, "/"),
        ask(address, "/healthz"),
        ask(address, "/nothing"),
        ask(address, "/predict"),
        ask(address, "/healthz", Host="evil.example"),
        predict(address, png(pixels(15))),
        predict(address, b"text"),
        predict(address, b"text", "?top_k=0"),
    ]
    for answer in answers:
        for name, value in SECURITY_HEADERS.items():
            assert answer.headers.get_all(name) == [value]
        assert "server" not in answer.headers
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)
    policy = answers[0].headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")


def test_request_id__a_safe_one_is_taken_over(address: str) -> None:
    assert ask(address, "/healthz", X_Request_ID="order-66.a_B").headers["x-request-id"] == "order-66.a_B"
    for wild in ("a b", "a" * 65, "<script>", "", "é"):
        assert re.fullmatch(r"[0-9a-f]{32}", ask(address, "/healthz", X_Request_ID=wild).headers["x-request-id"])


# --- the log, and names of files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../../../etc/passwd", "C:\\\\secret\\\\name.png", "/tmp/secret", "a\tb", "é.png"])
def test_names__an_uploads_name_is_never_used(
    address: str, caplog: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    image = png(pixels(16))
    with caplog.at_level(logging.INFO, logger="finealign.serve"):
        answer = predict(address, image, name=name)
        until(lambda: bool(lines(caplog, " POST ")))
    assert answer.status == 200
    assert answer.json == predict(address, image, name="photo.png").json
    assert not list(tmp_path.rglob("*"))
    assert re.fullmatch(r"[0-9a-f]{32} POST /predict 200 \d+ ms", lines(caplog, " POST ")[0])


def lines(caplog: pytest.LogCaptureFixture, *parts: str) -> list[str]:
    """What the log says with one of these parts; the test before may have had its last line written late."""
    return [line for line in caplog.messages if any(part in line for part in parts)]


def test_log__one_line_a_request_and_none_that_a_client_writes(address: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="finealign.serve"):
        ask(address, "/a%0Ab?secret=1", X_Request_ID="one")
        ask(address, f"/{'x' * 5000}", X_Request_ID="two")
        ask(address, "/healthz", Host="evil.example", X_Request_ID="three")
        until(lambda: len(lines(caplog, "one ", "two ", "three ")) == 3)
    first, second, third = lines(caplog, "one ", "two ", "three ")
    assert re.fullmatch(r"one GET /a%0Ab 404 \d+ ms", first)
    assert len(second) < 250
    assert re.fullmatch(r"three GET /healthz 421 \d+ ms", third)


# --- a bounded line ---------------------------------------------------------------------------------------------------


def test_places__past_them_it_is_503_and_then_it_recovers(model: FineAlign) -> None:
    gate = Gate(model)
    with running(gate.model, Limits(waiting=3)) as address, ThreadPoolExecutor(3) as pool:
        taken = [pool.submit(predict, address, png(pixels(number))) for number in range(3)]
        until(lambda: waiting(address) == 3)
        for content in (png(pixels(3)), bytes(2_000_000)):
            answer = predict(address, content)
            assert (answer.status, answer.kind, answer.headers["retry-after"]) == (503, "full", "1")
        gate.opened.set()
        assert [one.result().status for one in taken] == [200] * 3
        assert predict(address, png(pixels(3))).status == 200
        assert waiting(address) == 0


def test_places__uploads_are_bounded_by_their_bytes_together(model: FineAlign, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finealign.serve.batches.HELD_BYTES", 10_000)
    gate, image = Gate(model), png(pixels(0))  # some 7 kB
    with running(gate.model) as address, ThreadPoolExecutor(1) as pool:
        taken = pool.submit(predict, address, image)
        until(lambda: waiting(address) == 1)
        answer = predict(address, image)
        assert (answer.status, answer.kind, answer.headers["retry-after"]) == (503, "full", "1")
        gate.opened.set()
        assert taken.result().status == 200
        assert predict(address, png(pixels(0, 100, 100))).status == 200  # a larger one, alone


def test_pixels__are_counted_before_they_are_decoded(model: FineAlign, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finealign.serve.batches.HELD_PIXELS", 1000)
    began, gate = list[int](), Gate(model)

    def decode(file: Any, *, before: Callable[[int], None], **options: Any) -> Image.Image:
        def counted(number: int) -> None:
            before(number)
            began.append(number)

        return decode_image(file, before=counted, **options)

    monkeypatch.setattr("finealign.model.inference.decode_image", decode)
    with running(gate.model) as address, ThreadPoolExecutor(2) as pool:
        large = pool.submit(predict, address, png(pixels(0, 30, 30)))
        until(lambda: bool(gate.seen))
        small = pool.submit(predict, address, png(pixels(1, 20, 20)))
        until(lambda: waiting(address) == 2)
        time.sleep(0.2)
        assert began == [900]
        gate.opened.set()
        assert [large.result().status, small.result().status] == [200, 200]
    assert began == [900, 400]


def test_places__are_kept_until_the_decoder_is_done(model: FineAlign, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def decode(*arguments: Any, **options: Any) -> Image.Image:
        assert go_on.wait(HANG)
        return decode_image(*arguments, **options)

    monkeypatch.setattr("finealign.model.inference.decode_image", decode)
    with running(model, Limits(waiting=1, timeout=0.3)) as address:
        assert predict(address, png(pixels(0))).status == 504
        assert waiting(address) == 1
        assert predict(address, png(pixels(0))).status == 503
        go_on.set()
        until(lambda: waiting(address) == 0)
        until(lambda: predict(address, png(pixels(0))).status == 200)  # a slow machine may take longer than the limit


def test_timeout__is_504_and_work_not_begun_is_dropped(model: FineAlign) -> None:
    gate = Gate(model)
    # Long enough for any machine to decode a small image within it.
    with running(gate.model, Limits(timeout=5)) as address, ThreadPoolExecutor(2) as pool:
        first = pool.submit(predict, address, png(pixels(0, 20, 20)))
        until(lambda: bool(gate.seen))
        second = pool.submit(predict, address, png(pixels(1, 21, 21)))
        for one in (first, second):
            assert (one.result().status, one.result().kind) == (504, "timeout")
        until(lambda: waiting(address) == 1)  # the first is still being encoded
        gate.opened.set()
        assert predict(address, png(pixels(2, 22, 22))).status == 200
    assert gate.seen == [(20, 20, 3), (22, 22, 3)]


def test_failure__one_image_that_the_model_fails_on_leaves_its_neighbours(
    model: FineAlign, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(model)
    held = gate.model.predictor_.explain

    def fail(photos: Sequence[Photo], **options: Any) -> Any:
        explanations = held(photos, **options)
        assert not any(photo.pixels.shape == (13, 13, 3) for photo in photos), "a bug"
        return explanations

    gate.model.predictor_.explain = fail  # type: ignore[method-assign]
    with running(gate.model) as address, ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(predict, address, png(pixels(n, *([13, 13] if n == 3 else [12, 12])))) for n in range(6)]
        until(lambda: waiting(address) == 6)
        gate.opened.set()
        assert [one.result().status for one in answers] == [200, 200, 200, 500, 200, 200]
        failed = answers[3].result()
        assert failed.kind == "internal"
        assert "bug" not in failed.json["error"]
        assert failed.headers["x-content-type-options"] == "nosniff"
    assert any("a bug" in (record.exc_text or str(record.exc_info)) for record in caplog.records)


def test_failure__an_upload_that_cannot_be_closed_fails_alone(
    model: FineAlign, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Torn:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *arguments: object) -> None:
            self._file.close()
            raise OSError("no space left")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    submit, torn = Batches.submit, cast(Any, Torn)
    monkeypatch.setattr(Batches, "submit", lambda self, place, file, score: submit(self, place, torn(file), score))
    with running(model) as address:
        assert predict(address, png(pixels(0))).status == 500
        monkeypatch.setattr(Batches, "submit", submit)
        assert predict(address, png(pixels(0))).status == 200
        assert ask(address, "/healthz").json["status"] == "ok"


def test_failure__an_encoder_that_has_ended_is_told(model: FineAlign, caplog: pytest.LogCaptureFixture) -> None:
    broken = copy.copy(model)
    broken._predictor = copy.copy(model.predictor_)

    def end(photos: Sequence[Photo], **options: Any) -> Any:
        raise SystemExit

    broken.predictor_.explain = end  # type: ignore[method-assign]
    with running(broken) as address:
        assert predict(address, png(pixels(0))).status == 500
        until(lambda: ask(address, "/healthz").status == 503)
        assert ask(address, "/healthz").json == {"status": "failed", "waiting": 0, "capacity": 256}
        assert predict(address, png(pixels(0))).status == 500
    assert "thread encode has ended, restart the server" in caplog.messages


# --- the description of the API ---------------------------------------------------------------------------------------


def test_openapi__is_what_the_server_does(address: str) -> None:
    """Requests made from the description, valid and not: the answers are those it describes."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    described = schemathesis.openapi.from_url(f"{address}/openapi.json")
    conformance = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_headers_conformance,
        checks.response_schema_conformance,
    ]
    operations: list[Any] = [found.ok() for found in described.get_all_operations()]  # type: ignore[union-attr]
    assert {operation.label for operation in operations} == {"POST /predict", "GET /healthz", "GET /model", "GET /"}
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
        )
        def conforms(case: Any) -> None:
            case.call_and_validate(checks=conformance)

        conforms()


def test_openapi__every_error_that_is_seen_in_tests_is_described(address: str) -> None:
    found = ask(address, "/openapi.json").json
    predict_responses = found["paths"]["/predict"]["post"]["responses"]
    assert set(predict_responses) == {
        *("200", "400", "403", "408", "413", "415", "421", "422", "500", "503", "504", "507")
    }
    for status, response in predict_responses.items():
        name = "Predicted" if status == "200" else "Refusal"
        assert response["content"]["application/json"]["schema"] == {"$ref": f"#/components/schemas/{name}"}
    score = next(one for one in found["paths"]["/predict"]["post"]["parameters"] if one["name"] == "score")
    assert set(score["schema"]["enum"]) == {"las", "global", "fused"}
    assert "HTTPValidationError" not in found["components"]["schemas"]


# --- beginning and end ------------------------------------------------------------------------------------------------


def test_listener__a_port_that_is_taken_is_told(model: FineAlign) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(FinealignError, match=f"Cannot listen on 127.0.0.1, port {port}: .*--port"):
            Listener(model, "127.0.0.1", port, Limits())


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("127.0.0.1", 99_999), ("127.0.0.1", -1), ("a..b", 0)])
def test_listener__an_address_that_cannot_be_had_is_told(model: FineAlign, host: str, port: int) -> None:
    with pytest.raises(FinealignError, match=r"Cannot listen on .* --host"):
        Listener(model, host, port, Limits())


def test_listener__parts_of_an_answer_do_not_wait_for_one_another(model: FineAlign) -> None:
    """Nagle's algorithm is off on every connection: with it each answer would take 40 ms more."""
    server = Listener(model, "127.0.0.1", 0, Limits())
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        parts = urlsplit(server.address)
        with socket.create_connection((parts.hostname or "", parts.port or 0)):
            until(lambda: bool(server._server.server_state.connections))
            (connection,) = server._server.server_state.connections
            accepted = connection.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    finally:
        server.stop()
        thread.join(HANG)


def test_stop__does_not_wait_for_work_that_does_not_end(model: FineAlign, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finealign.serve.app.CLOSE_SECONDS", 0.2)
    gate = Gate(model)
    with running(gate.model, Limits(timeout=0.3)) as address:
        assert predict(address, png(pixels(0))).status == 504
    assert not gate.opened.is_set()  # and yet it has stopped
    gate.opened.set()


SLOW_SERVER = """
import sys, time
from finealign import FineAlign
from finealign.serve.forms import Limits
from finealign.serve.server import serve

model = FineAlign.load(sys.argv[1], device="cpu", precision="fp32")
explain = model.predictor_.explain

def slowly(photos, **options):
    time.sleep(0.5)
    return explain(photos, **options)

model.predictor_.explain = slowly
serve(model, port=0, limits=Limits(), on_listening=lambda address: print(address, flush=True))
print("stopped", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)])
def test_serve__a_signal_loses_no_request_under_way(model: FineAlign, tmp_path: Path, number: signal.Signals) -> None:
    model.save(tmp_path / "model")
    server = subprocess.Popen(
        [sys.executable, "-c", SLOW_SERVER, str(tmp_path / "model")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with server, ThreadPoolExecutor(8) as pool:
        try:
            assert server.stdout
            address = server.stdout.readline().strip()
            answers = [pool.submit(predict, address, png(pixels(seed))) for seed in range(8)]
            # All have a place or an answer: the first are answered meanwhile, the last are still to be decoded.
            until(lambda: waiting(address) + sum(one.done() for one in answers) == len(answers))
            server.send_signal(number)
            assert [one.result().status for one in answers] == [200] * 8
            out, log = server.communicate(timeout=HANG)
        finally:
            server.kill()
    assert server.returncode == 0
    assert out == "stopped\n"
    assert log.count("POST /predict 200") == 8
    assert "Traceback" not in log


def test_serve__a_second_ctrl_c_does_not_wait(model: FineAlign, tmp_path: Path) -> None:
    """Not even while the threads are waited for, when no request is left."""
    model.save(tmp_path / "model")
    code = SLOW_SERVER.replace("time.sleep(0.5)", "print('encoding', flush=True); time.sleep(600)")
    code = code.replace("Limits()", "Limits(timeout=600)")
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    with server:
        try:
            assert server.stdout
            parts, body = urlsplit(server.stdout.readline().strip()), form(png(pixels(0)))
            with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=HANG) as sent:
                head = f"POST /predict HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: {FORM}\r\n"
                sent.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                assert server.stdout.readline() == "encoding\n"
            server.send_signal(signal.SIGINT)
            until(lambda: refused(parts.hostname, parts.port))
            time.sleep(0.5)
            assert server.poll() is None  # it waits for the encoder
            server.send_signal(signal.SIGINT)
            out, log = server.communicate(timeout=HANG)
        finally:
            server.kill()
    assert server.returncode == 0
    assert out == "stopped\n"
    assert "Traceback" not in log


def refused(host: str | None, port: int | None) -> bool:
    try:
        with socket.create_connection((host or "", port or 0), timeout=HANG):
            return False
    except ConnectionRefusedError:
        return True
