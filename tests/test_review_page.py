"""The review in a real browser, by keyboard alone, through a kill of the server; its server's guard; the command."""

import csv
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from browser import browsing, reviewing, watched
from conftest import CLASSES, HANG, tiny_config, write_photos
from finealign import FineAlign, adapt_into
from finealign.errors import FinealignError, ImageInputError
from finealign.images.listing import list_images
from finealign.review.labels import LabelFile
from finealign.review.plan import Plan, Population, make_plan
from finealign.review.session import Session
from test_cli import command

Tiny = Callable[[str], str]
# Class names as an attacker would choose them, and enough of them that most have no key.
NAMES = ['<img src=x onerror="document.title=1">', "Grünfink", "Zaunkönig", *(f"warbler {i}" for i in range(12))]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("reviewed") / "photos", each=6)


@pytest.fixture(scope="module")
def run(tiny_backbone: Tiny, photos: Path) -> Path:
    """A run whose images lie in ``photos``."""
    folder = photos.parent / "run"
    model = FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"), training__epochs=1))
    adapt_into(folder, model, photos)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page; afterwards nothing may have failed in it, or have been asked of another origin."""
    with watched(browser) as open_page:

        def open_ready(address: str, **how: Any) -> Page:
            page = open_page(address, **how)
            expect(page.locator("#status")).to_contain_text("labelled")
            return page

        yield open_ready


def plan_of(photos: Path, names: Sequence[str] = NAMES, *, budget: int = 12, learning: int = 0) -> Plan:
    paths = [str(path) for path in list_images(photos)]
    rng = np.random.default_rng(0)
    adapted, start = rng.integers(len(names), size=len(paths)), rng.integers(len(names), size=len(paths))
    others = [rng.permutation(len(names)).tolist() for _ in paths]
    choices = [
        sorted(list(dict.fromkeys([a, s, *more]))[:9]) for a, s, more in zip(adapted, start, others, strict=True)
    ]
    seen = Population(paths, adapted, start, rng.uniform(0.4, 1, len(paths)), np.array(choices))
    return make_plan(seen, names, budget=budget, learning=learning)


def session_of(photos: Path, labels: Path, **wanted: Any) -> Session:
    plan = plan_of(photos, **wanted)
    return Session(plan, LabelFile(labels, plan.classes), target=plan.budget)


def rows(labels: Path) -> list[list[str]]:
    with labels.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def labelled(page: Page, number: int) -> None:
    expect(page.locator("#status")).to_contain_text(f"{number} of ")


def press(page: Page, *keys: str) -> None:
    """Press keys one after the other, each once the answer to the one before has come."""
    for key in keys:
        page.keyboard.press(key)
        expect(page.locator("main")).to_have_attribute("aria-busy", "false")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_page__a_whole_review_by_keyboard_with_a_kill_in_between(
    photos: Path, tmp_path: Path, opened: Callable[..., Page]
) -> None:
    labels = tmp_path / "labels.csv"
    review = session_of(photos, labels, learning=1)
    items = review.items
    with reviewing(review) as address:
        page = opened(address)
        choices = page.locator("#choices button")
        expect(choices).to_have_count(9)
        offered = [review.plan.classes[choice] for choice in items[0].choices]
        assert choices.locator("bdi").all_inner_texts() == offered
        assert "says" not in page.locator("main").inner_text()  # what the models say is hidden
        assert page.evaluate("document.title") == "Label images: finealign"
        expect(page.locator("#figures")).to_contain_text("Too early to say. The first figures come with 10 labels.")
        page.keyboard.press("3")
        expect(page.locator("#last")).to_have_text(
            f"You said: {offered[2]}. The adapted model says: {NAMES[items[0].adapted]}. "
            f"The model before adaptation: {NAMES[items[0].start]}."
        )
        labelled(page, 1)
        assert rows(labels) == [[items[0].path, offered[2], "measuring"]]
        # Letters search; accents need not be typed.
        page.keyboard.type("zaunkonig")
        expect(page.get_by_role("option")).to_have_text(["Zaunkönig"])
        page.keyboard.press("Enter")
        labelled(page, 2)
        page.keyboard.type("warbler 1")
        expect(page.get_by_role("option")).to_have_text(["warbler 1", "warbler 10", "warbler 11"])
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        labelled(page, 3)
        press(page, "0")
        labelled(page, 4)
        press(page, "?")
        expect(page.locator("#status")).to_contain_text("1 image you could not tell")
        press(page, "Backspace")
        expect(page.locator("#last")).to_contain_text("Taken back: cannot tell.")
        press(page, "1")
        labelled(page, 5)
    answers = [row[1] for row in rows(labels)]
    assert answers[1:4] == ["Zaunkönig", "warbler 11", "none of these"]
    assert [row[0] for row in rows(labels)] == [item.path for item in items[:5]]
    # The server is gone in the middle of an answer, and another takes its address.
    page.keyboard.press("2")
    expect(page.locator("#problem")).to_contain_text("The server does not answer.")
    assert len(rows(labels)) == 5
    again = session_of(photos, labels, learning=1)
    with reviewing(again, port=urlsplit(address).port or 0):
        expect(page.locator("#problem")).to_be_hidden()
        labelled(page, 5)
        for number in range(6, 13):
            press(page, "2")
            labelled(page, number)
            if number == 10:
                expect(page.locator("#figures")).to_contain_text("The adapted model is right in")
                expect(page.locator("#figures dd").last).to_contain_text("between")
        expect(page.locator("#title")).to_have_text("Image 1 of 1 to learn from")
        page.keyboard.press("2")
        expect(page.locator("#end-title")).to_have_text("Done")
        expect(page.locator("#asking")).to_be_hidden()
    written = rows(labels)
    assert [row[0] for row in written] == [item.path for item in items[:12]] + [items[-1].path]
    assert [row[2] for row in written] == ["measuring"] * 12 + ["learning"]


def test_page__two_windows_share_the_images_and_a_closed_one_gives_its_image_back(
    photos: Path, tmp_path: Path, opened: Callable[..., Page]
) -> None:
    labels = tmp_path / "labels.csv"
    review = session_of(photos, labels, budget=6)
    with reviewing(review) as address:
        first, second = opened(address), opened(address)
        press(second, "1")
        press(first, "2")
        press(second, "3")
        second.goto("about:blank")
        press(first, "1", "2", "1")
        expect(first.locator("#end-title")).to_have_text("Done")
    assert [row[0] for row in rows(labels)][:1] == [review.items[1].path]
    assert sorted(row[0] for row in rows(labels)) == sorted(item.path for item in review.items[:6])


def test_page__can_show_the_models_first_and_leave_keys_alone(
    photos: Path, tmp_path: Path, opened: Callable[..., Page]
) -> None:
    review = session_of(photos, tmp_path / "labels.csv")
    with reviewing(review) as address:
        page = opened(address)
        page.get_by_label("Show what both models say").check()
        expect(page.locator("#models")).to_have_text(
            f"The adapted model says: {NAMES[review.items[0].adapted]}. "
            f"The model before adaptation: {NAMES[review.items[0].start]}."
        )
        page.get_by_label("Keys answer").uncheck()
        page.locator("#title").focus()
        page.keyboard.press("1")
        page.get_by_role("button", name="Cannot tell").click()
        expect(page.locator("#last")).to_contain_text("You said: cannot tell.")
    assert [row[1] for row in rows(tmp_path / "labels.csv")] == ["cannot tell"]


def test_page__an_image_that_has_gone_is_told(photos: Path, tmp_path: Path, opened: Callable[..., Page]) -> None:
    review = session_of(photos, tmp_path / "labels.csv")
    object.__setattr__(review.items[0], "path", str(tmp_path / "gone.png"))
    with reviewing(review) as address:
        page = opened(address)
        expect(page.locator("#unreadable")).to_contain_text("This image cannot be shown.")
        press(page, "?")
        expect(page.locator("#image")).to_be_visible()


@pytest.mark.parametrize(("width", "scheme"), [pytest.param(1280, "light", marks=pytest.mark.nightly), (360, "dark")])
def test_page__is_accessible_and_fits(
    photos: Path, tmp_path: Path, opened: Callable[..., Page], width: int, scheme: str
) -> None:
    """No serious or critical finding of axe-core in any state, nothing to scroll sideways, and a picture of each."""
    folder = Path(os.environ.get("FINEALIGN_ARTEFACTS", tmp_path))
    review = session_of(photos, tmp_path / "labels.csv")
    with reviewing(review) as address:
        page = opened(address, width=width, scheme=scheme)
        for state in ("first", "searching", "figures", "done"):
            if state == "searching":
                page.keyboard.type("warbler")
                expect(page.get_by_role("option")).to_have_count(8)
            elif state != "first":
                page.keyboard.press("Escape")
                press(page, *("0" * 10 if state == "figures" else "01"))
            page.screenshot(path=folder / f"review-{width}-{state}.png", full_page=True)
            found = Axe().run(page).response["violations"]
            assert [one["id"] for one in found if one["impact"] in ("serious", "critical")] == []
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        expect(page.locator("#end-title")).to_have_text("Done")


# --- the server -------------------------------------------------------------------------------------------------------


def send(address: str, path: str, body: Any, method: str = "POST", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=HANG)
    try:
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, text, {key.replace("_", "-"): value for key, value in headers.items()})
        answer = connection.getresponse()
        read = answer.read()
        return answer.status, json.loads(read) if answer.headers.get_content_subtype() == "json" else read
    finally:
        connection.close()


ANSWER = {"window": "w", "number": 0, "label": "Zaunkönig"}


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "kind"),
    [
        ("/answer", ANSWER, {"Host": "birds.example"}, 421, "host"),
        ("/answer", ANSWER, {"Origin": "http://birds.example"}, 403, "cross-site"),
        ("/answer", ANSWER, {"Sec_Fetch_Site": "cross-site"}, 403, "cross-site"),
        ("/answer", b"x" * 20_000, {}, 413, "too-large"),
        ("/answer", b"[1", {}, 422, "invalid"),
        ("/answer", {"window": "w", "number": "x", "label": "Zaunkönig"}, {}, 422, "invalid"),
        ("/answer", {**ANSWER, "window": ""}, {}, 422, "invalid"),
        ("/answer", {**ANSWER, "label": "owl"}, {}, 422, "label"),
        ("/answer", {**ANSWER, "number": 999}, {}, 404, "unknown"),
        ("/undo", {"window": "w"}, {}, 409, "nothing"),
        ("/nowhere", {}, {}, 404, "not-found"),
    ],
)
def test_server__refuses_and_writes_nothing(
    photos: Path, tmp_path: Path, path: str, body: Any, headers: dict[str, str], status: int, kind: str
) -> None:
    with reviewing(session_of(photos, tmp_path / "labels.csv")) as address:
        found, told = send(address, path, body, **headers)
        assert (found, told["kind"]) == (status, kind), told
        assert told["error"].endswith(".")
    assert not (tmp_path / "labels.csv").exists()


def test_server__an_image_is_a_jpeg_and_a_second_label_changes_nothing(photos: Path, tmp_path: Path) -> None:
    review = session_of(photos, tmp_path / "labels.csv")
    with reviewing(review) as address:
        status, content = send(address, "/image/0", b"", "GET")
        assert status == 200 and content.startswith(b"\xff\xd8\xff")
        assert send(address, "/image/999", b"", "GET")[0] == 404
        assert send(address, "/answer", ANSWER)[0] == 200
        status, told = send(address, "/answer", {**ANSWER, "window": "other", "label": "Grünfink"})
        assert (status, told["kind"]) == (409, "answered")
    assert [row[1] for row in rows(tmp_path / "labels.csv")] == ["Zaunkönig"]


# --- the command ------------------------------------------------------------------------------------------------------


@contextmanager
def serving(run: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    words = [sys.executable, "-m", "finealign", "review", str(run), "--port", "0", "--json", *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=run.parent)
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line, process.stderr.read() if process.stderr else ""
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def answer(address: str, label: str, times: int) -> list[str]:
    """Answer for the next images, and their names."""
    names = []
    _, state = send(address, "/next", {"window": "w"})
    for _ in range(times):
        names.append(state["image"]["name"])
        _, state = send(address, "/answer", {"window": "w", "number": state["image"]["number"], "label": label})
    return names


def test_command__goes_on_after_a_kill_and_the_report_has_the_figures(run: Path, photos: Path) -> None:
    labels = run / "labels.csv"
    with serving(run, "--budget", "12", "--learning", "2") as (process, told):
        assert (told["labelled"], told["target"], told["aim"]) == (0, 12, "both")
        assert told["measured"]["difference"] is None
        answer(told["address"], "red", 5)
        second = command("review", str(run), "--port", "0", "--json")
        assert second.exit_code == 1 and "is being written by process" in json.loads(second.stdout)["error"]
        process.send_signal(signal.SIGKILL)
        process.wait(HANG)
    kept = rows(labels)
    assert len(kept) == 5 and all(Path(row[0]).is_file() for row in kept)
    early = command("report", str(run))
    assert early.exit_code == 0 and "too early for figures" in (run / "report.html").read_text(encoding="utf-8")
    with serving(run) as (process, told):
        assert (told["labelled"], told["target"]) == (5, 12)
        answer(told["address"], "red", 7)
        answer(told["address"], "blue", 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG) == 0
    assert rows(labels)[:5] == kept
    assert [row[2] for row in rows(labels)] == ["measuring"] * 12 + ["learning"] * 2
    assert command("report", str(run)).exit_code == 0
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "Measured by a review of 12 images" in report and "How many labels more precision would take" in report
    other = command("review", str(run), "--aim", "accuracy", "--seed", "3", "--json")
    assert other.exit_code == 1
    assert "begun with another --aim and --seed" in json.loads(other.stdout)["error"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run: (run / "run.json").unlink(), "No run in"),
        (lambda run: (run / "run.json").write_text('{"status": "stopped"}'), "only a complete one can be reviewed"),
        (lambda run: (run / "review.json").write_text("{}"), "cannot be read (KeyError"),
        (lambda run: (run / "labels.csv").write_text("a,b\n"), "cannot be gone on with"),
        (lambda run: (run / "predictions.csv").write_text("path,label\ngone.png,red\n"), "not where they were"),
    ],
)
def test_command__refuses_in_a_sentence(
    tmp_path: Path, photos: Path, spoil: Callable[[Path], object], told: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"status": "complete", "classes": CLASSES}))
    (run / "predictions.csv").write_text(f"path,label\n{photos / 'red' / '0.png'},red\n")
    spoil(run)
    done = command("review", str(run), "--json")
    assert done.exit_code == 1
    assert told in json.loads(done.stdout)["error"]
    assert not (run / "labels.csv.lock").exists()


def test_command__of_a_port_that_is_taken_leaves_what_was_planned(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = command("review", str(run), "--port", port, "--json")
    assert done.exit_code == 1
    assert f"Cannot listen on 127.0.0.1, port {port}" in json.loads(done.stdout)["error"]


# --- from Python ------------------------------------------------------------------------------------------------------


def test_accuracy__is_that_of_the_labels_given(run: Path, photos: Path) -> None:
    model = FineAlign.load(run)
    with pytest.raises(FinealignError, match="Call review_batch"):
        model.accuracy({})
    batch = model.review_batch(photos, 18)
    assert len(set(batch)) == 18 and model.review_batch(photos, 18) == batch
    found = model.accuracy({str(path): path.parent.name for path in batch})
    right = [label == path.parent.name for path, label in zip(batch, model.use("adapted").predict(batch), strict=True)]
    assert found.adapted and found.start and found.difference
    assert found.adapted.value == pytest.approx(np.mean(right))  # all images are labelled, so it is exact
    assert found.difference.value == pytest.approx(found.adapted.value - found.start.value)
    few = model.review_batch(photos, 10, aim="random", seed=1)
    measured = model.accuracy({str(path): path.parent.name for path in few})
    assert measured.adapted and measured.adapted.low <= found.adapted.value <= measured.adapted.high
    with pytest.raises(ImageInputError, match="None of the 1 labelled images"):
        model.accuracy({"elsewhere.png": "red"})
