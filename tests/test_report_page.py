"""The report in a real browser: it asks nothing of any network, fits a phone, prints whole, and axe finds no fault."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from browser import browsing
from conftest import CLASSES
from test_cli import command
from test_report import finished  # noqa: F401 - the fixture

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTHS = [1280, 390]
THEMES: list[Literal["light", "dark"]] = ["light", "dark"]


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def mailed(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A report with everything in it, alone in a folder, as a mail's attachment would be."""
    run = Path(shutil.copytree(finished, tmp_path_factory.mktemp("measured") / "run"))
    labelled = finished.parent / "photos" / "truth.csv"
    labelled.write_text("path,label\n" + "".join(f"{name}/{n}.png,{name}\n" for name in CLASSES for n in range(8)))
    assert command("report", run, "--labelled", labelled, "--device", "cpu").exit_code == 0
    return Path(shutil.copy(run / "report.html", tmp_path_factory.mktemp("mail") / "report.html"))


@pytest.fixture
def artefacts(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("FINEALIGN_ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def opened(browser: "Browser", mailed: Path, *, width: int, theme: Any) -> tuple["Page", list[str]]:
    """The page with everything unfolded, and the addresses it asked for."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(mailed.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    return page, asked


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_report__looks_right_and_asks_for_nothing(
    browser: "Browser", mailed: Path, artefacts: Path, width: int, theme: Any
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page, asked = opened(browser, mailed, width=width, theme=theme)
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.screenshot(path=artefacts / f"report-{width}-{theme}.png", full_page=True)
    assert {one for one in asked if not one.startswith("data:")} == {mailed.as_uri()}
    broken = page.evaluate("[...document.images].filter(one => !one.complete || !one.naturalWidth).length")
    assert (page.locator("img").count() > 0, broken) == (True, 0)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    found = Axe().run(page).response["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in found] == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (theme == "light")
    assert not errors
    page.close()


def test_report__crops_lie_on_their_image(browser: "Browser", mailed: Path) -> None:
    page, _ = opened(browser, mailed, width=1280, theme="light")
    figure = page.locator(".example", has=page.locator(".crop")).first
    outer = figure.locator("img").bounding_box()
    assert outer
    boxes = [one.bounding_box() for one in figure.locator(".crop").all()]
    assert len(boxes) == 2
    for box in boxes:
        assert box
        assert outer["x"] - 1 <= box["x"] and box["x"] + box["width"] <= outer["x"] + outer["width"] + 1
        assert outer["y"] - 1 <= box["y"] and box["y"] + box["height"] <= outer["y"] + outer["height"] + 1
        assert box["width"] == pytest.approx(box["height"], abs=3)  # crops are square
    page.close()


def test_report__prints_with_what_was_folded(browser: "Browser", mailed: Path) -> None:
    """Folded parts are on paper too, dark or not, and the page is black on white there."""
    page = browser.new_page(color_scheme="dark")
    page.goto(mailed.as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav").is_hidden()
    folded = page.locator("details .matrix").first
    assert folded.evaluate("one => one.checkVisibility({contentVisibilityAuto: true})")
    assert len(page.pdf()) > 10_000
    page.close()


def test_report__by_keyboard_every_part_can_be_reached(browser: "Browser", mailed: Path) -> None:
    page = browser.new_page()
    page.goto(mailed.as_uri())
    reached = set()
    for _ in range(200):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.outerHTML.slice(0, 60)"))
        if page.evaluate("document.activeElement === document.body"):
            break
    text = " ".join(reached)
    assert "<summary>All settings" in text and 'href="#verdict"' in text and "What the verdict goes by" in text
    page.close()


def test_axe__would_find_a_fault(browser: "Browser") -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page()
    page.set_content("<html><body><img src='data:,'><p style='color:#aaa;background:#fff'>faint</p></body></html>")
    assert {"image-alt", "color-contrast"} <= {one["id"] for one in Axe().run(page).response["violations"]}
    page.close()
