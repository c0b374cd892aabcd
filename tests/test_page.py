"""The page in a real browser: what a person sees, hears and gets, and what it must not do."""

import csv
import io
import os
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from browser import browsing, running, watched
from conftest import HANG, tiny_config, write_photos
from finealign import FineAlign
from finealign.images.decoding import read_image
from finealign.model.predictions import explained
from finealign.serve.forms import Limits
from test_serve import Gate, waiting

Tiny = Callable[[str], str]
NAMES = ['<img src=x onerror="document.title=1">', '=1+1, "a sum"', "@blue"]
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
TAKE = """([names, kind, content]) => {
    const transfer = new DataTransfer();
    const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0));
    for (const name of names) transfer.items.add(new File([bytes], name, {type: "image/png"}));
    const options = {bubbles: true, cancelable: true};
    document.body.dispatchEvent(kind === "drop"
        ? new DragEvent("drop", {...options, dataTransfer: transfer})
        : new ClipboardEvent("paste", {...options, clipboardData: transfer}));
}"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("shown") / "photos")


@pytest.fixture(scope="module")
def model(tiny_backbone: Tiny, photos: Path) -> FineAlign:
    """Its class names are what an attacker would call them."""
    return FineAlign(NAMES, config=tiny_config(tiny_backbone("transformer"), training__epochs=2)).fit(photos)


@pytest.fixture(scope="module")
def address(model: FineAlign) -> Iterator[str]:
    with running(model) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@pytest.fixture
def opened(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of an address; afterwards nothing may have failed in it or have been asked of another origin."""
    with watched(browser, schemes=("blob", "data"), timeout=30_000) as open_page:

        def open_ready(address: str, **how: Any) -> Page:
            page = open_page(address, **how)
            expect(page.locator("#status")).to_have_text("Ready. No images yet.")
            return page

        yield open_ready


def finished(page: Page, text: str) -> None:
    expect(page.locator("#status")).to_contain_text(text, timeout=1000 * HANG)
    expect(page.get_by_role("button", name="Stop")).to_be_disabled(timeout=1000 * HANG)


def fits(page: Page) -> bool:
    fitting: bool = page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    return fitting


def take(page: Page, names: list[str], kind: str = "drop") -> None:
    """Drop or paste so many small images of these names."""
    file = io.BytesIO()
    Image.new("RGB", (9, 6), "teal").save(file, "PNG")
    page.evaluate(TAKE, [names, kind, b64encode(file.getvalue()).decode()])


def downloaded(page: Page) -> list[dict[str, str]]:
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    assert download.value.suggested_filename == "predictions.csv"
    return list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"), newline="")))


def artefacts(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("FINEALIGN_ARTEFACTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- one image --------------------------------------------------------------------------------------------------------


def test_page__an_image_is_shown_with_what_the_model_makes_of_it(
    model: FineAlign, address: str, photos: Path, opened: Callable[..., Page]
) -> None:
    path = photos / "red" / "0.png"
    (found,) = model.explain_pixels([np.array(read_image(path))], with_start=True)
    wanted: Any = explained(found, NAMES, 3)
    page = opened(address)
    assert page.title() == "3 classes by fair: finealign"
    page.set_input_files("#files", path)
    finished(page, "1 of 1 image done")
    card = page.locator(".card")
    expect(card.get_by_role("heading", level=3)).to_have_text("0.png")
    changed = wanted["label"] != wanted["start"]["label"]
    expect(card.locator(".verdict")).to_contain_text("label changed" if changed else "same label as the start")
    expect(card.locator(".verdict strong")).to_have_text(wanted["label"])
    for place, guess in enumerate([wanted, wanted["start"]]):
        lines = card.locator(".guesses ol").nth(place).locator("li")
        texts = [f"{choice['label']}{100 * choice['confidence']:.1f}%" for choice in guess["top"]]
        expect(lines).to_have_text(texts)
    image = card.get_by_role("img", name="Preview of 0.png")
    expect(image).to_be_visible()
    width, height = image.evaluate("image => [image.clientWidth, image.clientHeight]")
    assert width / height == pytest.approx(found.width / found.height, rel=0.02)
    crops = card.locator(".seen .crop")
    expect(crops).to_have_count(len(found.boxes))
    seen = card.locator(".seen").bounding_box()
    first = crops.first.bounding_box()
    assert seen and first
    left, top, right, bottom = found.boxes[0]
    assert first["x"] - seen["x"] == pytest.approx(seen["width"] * left / found.width, abs=1)
    assert first["y"] - seen["y"] == pytest.approx(seen["height"] * top / found.height, abs=1)
    assert first["width"] == pytest.approx(seen["width"] * (right - left) / found.width, abs=1)
    assert first["height"] == pytest.approx(seen["height"] * (bottom - top) / found.height, abs=1)
    shares = [float(one.evaluate("crop => crop.style.getPropertyValue('--share')")) for one in crops.all()]
    assert max(shares) == 1
    card.get_by_text("crops and how much each counts").click()
    assert sorted(card.locator("details li").all_inner_texts()) == sorted(
        f"{100 * weight:.1f}%: from {left}, {top} to {right}, {bottom}"
        for (left, top, right, bottom), weight in zip(found.boxes, found.weights.tolist(), strict=True)
    )


def test_page__score_and_number_of_classes_can_be_chosen(
    address: str, photos: Path, opened: Callable[..., Page]
) -> None:
    page = opened(address)
    page.get_by_label("Classes to show").select_option("1")
    page.get_by_label("Score").select_option("global")
    page.set_input_files("#files", photos / "red" / "0.png")
    finished(page, "1 of 1 image done")
    expect(page.locator(".guesses li")).to_have_count(2)
    expect(page.locator(".crop")).to_have_count(0)
    expect(page.locator(".card")).to_contain_text("looks at the image as a whole")
    assert list(downloaded(page)[0]) == [
        "path",
        "label",
        "confidence",
        "start_label",
        "start_confidence",
        "error",
        "none",
    ]


def test_page__a_text_file_has_its_reason_and_the_others_go_on(
    address: str, photos: Path, tmp_path: Path, opened: Callable[..., Page]
) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    page = opened(address)
    page.set_input_files("#files", [tmp_path / "notes.txt", photos / "red" / "0.png"])
    finished(page, "1 of 2 images done, 1 failed")
    expect(page.locator(".card").first).to_contain_text("The image cannot be read: not an image. Send another.")
    expect(page.locator(".card").last.locator(".guesses")).to_be_visible()
    text, image = downloaded(page)
    assert (text["path"], text["label"], text["confidence"]) == ("notes.txt", "", "")
    assert text["error"] == "The image cannot be read: not an image. Send another."
    assert (image["path"], image["error"]) == ("0.png", "")
    assert image["label"]


def test_page__an_image_that_the_browser_cannot_show_is_classified(
    address: str, tmp_path: Path, opened: Callable[..., Page]
) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "scan.tif")
    page = opened(address)
    page.set_input_files("#files", tmp_path / "scan.tif")
    finished(page, "1 of 1 image done")
    expect(page.locator(".card")).to_contain_text("This browser cannot show the image.")
    expect(page.locator(".card .guesses")).to_be_visible()


def test_page__a_file_over_the_limit_is_not_sent(model: FineAlign, tmp_path: Path, opened: Callable[..., Page]) -> None:
    (tmp_path / "large.png").write_bytes(bytes(2_000_001))
    with running(model, Limits(max_upload_bytes=2_000_000)) as address:
        page = opened(address)
        sent: list[str] = []
        page.on("request", lambda request: sent.append(request.url))
        page.set_input_files("#files", tmp_path / "large.png")
        finished(page, "1 failed")
        expect(page.locator(".card")).to_contain_text("over the limit of 2 MB")
        assert not sent


@pytest.mark.parametrize(("kind", "name"), [("drop", "dropped.png"), ("paste", "pasted 1")])
def test_page__images_can_be_dropped_and_pasted(
    address: str, opened: Callable[..., Page], kind: str, name: str
) -> None:
    page = opened(address)
    take(page, ["dropped.png"], kind)
    finished(page, "1 of 1 image done")
    expect(page.locator(".card h3")).to_have_text(name)
    expect(page.locator(".card .guesses")).to_be_visible()


def test_page__what_cannot_be_opened_in_a_drop_is_told_and_the_others_go_on(
    address: str, opened: Callable[..., Page]
) -> None:
    """A folder that cannot be listed, and a file that has gone."""
    spoilt = """
    DataTransferItem.prototype.webkitGetAsEntry = function () {
        const name = this.getAsFile().name;
        const refuse = (_, no) => no(new DOMException("gone", "NotFoundError"));
        const file = (yes) => yes(new File([Uint8Array.from(atob(window.small), (one) => one.charCodeAt(0))], name));
        return {
            name, fullPath: `/${name}`, isDirectory: name === "folder",
            createReader: () => ({readEntries: refuse}),
            file: name === "gone.png" ? refuse : file,
        };
    };
    """
    page = opened(address, init=spoilt)
    small = io.BytesIO()
    Image.new("RGB", (9, 6), "teal").save(small, "PNG")
    page.evaluate("small => { window.small = small; }", b64encode(small.getvalue()).decode())
    take(page, ["gone.png", "whole.png", "folder"])
    finished(page, "1 of 3 images done, 2 failed")
    rows = {row["path"]: row["error"] for row in downloaded(page)}
    assert rows == {
        "folder": "The browser cannot open it.",
        "gone.png": "The browser cannot open it.",
        "whole.png": "",
    }


# --- many images ------------------------------------------------------------------------------------------------------


def test_page__a_folder_becomes_a_csv(
    model: FineAlign, address: str, photos: Path, tmp_path: Path, opened: Callable[..., Page]
) -> None:
    folder = tmp_path / "box"
    (folder / "in, side").mkdir(parents=True)
    names = ["=1+1.png", "+a.png", "-b.png", "@c.png", 'in, side/a "quoted".png', "in, side/plain.png"]
    for place, name in enumerate(names):
        (folder / name).write_bytes((photos / "red" / f"{place}.png").read_bytes())
    (folder / "in, side" / "plain.png").rename(folder / "in, side" / "plain")  # told by its bytes
    names[-1] = "in, side/plain"
    (folder / "notes.txt").write_text("left out")
    (folder / "a.mov").write_bytes(b"\0\0\0\x14ftypqt  \0\0\0\0qt  ")
    (folder / ".hidden.png").write_bytes(b"left out")
    page = opened(address)
    page.set_input_files("#folder", folder)
    finished(page, "6 of 6 images done. Left out as no images: ")
    for left_out in ("1 hidden or a system's own", "1 .txt", "1 .mov"):
        expect(page.locator("#status")).to_contain_text(left_out)
    rows = {row["path"]: row for row in downloaded(page)}
    assert set(rows) == {f"box/{name}" for name in names}
    for place, name in enumerate(names):
        (found,) = model.explain_pixels([np.array(read_image(photos / "red" / f"{place}.png"))], with_start=True)
        wanted: Any = explained(found, NAMES, 3)
        row = rows[f"box/{name}"]
        columns = (
            "path,label,confidence,label_2,confidence_2,label_3,confidence_3,start_label,start_confidence,error,none"
        )
        assert list(row) == columns.split(",")
        told = {row[f"label{rank}"]: float(row[f"confidence{rank}"]) for rank in ("", "_2", "_3")}
        # Two names begin as a formula would, so an apostrophe stands before them.
        guarded = {c["label"].replace("=", "'=", 1) if c["label"][0] == "=" else c["label"]: c for c in wanted["top"]}
        guarded = {f"'{name}" if name[0] == "@" else name: choice for name, choice in guarded.items()}
        assert told == pytest.approx({name: choice["confidence"] for name, choice in guarded.items()}, abs=1e-5)
        assert float(row["start_confidence"]) == pytest.approx(wanted["start"]["confidence"], abs=1e-5)


def test_page__a_file_name_like_a_formula_is_guarded(address: str, opened: Callable[..., Page]) -> None:
    page = opened(address)
    names = ["=1+1.png", "+a.png", "-b.png", "@c.png", "plain.png", "two\nlines.png"]
    take(page, names)
    finished(page, "6 of 6 images done")
    found = [row["path"] for row in downloaded(page)]
    assert sorted(found) == sorted(["'=1+1.png", "'+a.png", "'-b.png", "'@c.png", "plain.png", "two\nlines.png"])


def test_page__at_most_four_are_under_way_and_stop_ends_the_rest(model: FineAlign, opened: Callable[..., Page]) -> None:
    gate = Gate(model)
    with running(gate.model) as address:
        page = opened(address)
        take(page, [f"{number}.png" for number in range(800)])
        expect(page.locator("#status")).to_contain_text("0 of 800 images done")
        page.wait_for_timeout(500)
        assert waiting(address) == 4
        expect(page.locator(".card")).to_have_count(200)
        expect(page.locator("#rows tr")).to_have_count(500)
        expect(page.locator("#more-note")).to_contain_text("The first 200 images are shown in full, the other 600")
        page.get_by_role("button", name="Show more rows").click()
        expect(page.locator("#rows tr")).to_have_count(600)
        expect(page.get_by_role("button", name="Show more rows")).to_be_hidden()
        page.get_by_role("button", name="Stop").click()
        finished(page, "0 of 800 images done, 800 stopped")
        gate.opened.set()
        take(page, ["after.png"])  # and it goes on with new ones
        finished(page, "1 of 801 images done, 800 stopped")
        page.get_by_role("button", name="Show more rows").click()
        expect(page.locator("#rows tr").last).to_contain_text("after.png")
        rows = downloaded(page)
        assert [row["path"] for row in rows if row["label"]] == ["after.png"]
        assert {row["error"] for row in rows[:-1]} == {"Stopped before it was answered.", "Stopped before it was sent."}
        assert len(rows) == 801


def test_page__a_full_server_is_asked_again(model: FineAlign, photos: Path, opened: Callable[..., Page]) -> None:
    with running(model, Limits(waiting=1)) as address:
        page = opened(address)
        statuses: list[int] = []
        page.on("response", lambda response: statuses.append(response.status))
        page.set_input_files("#files", [photos / "red" / f"{number}.png" for number in range(6)])
        finished(page, "6 of 6 images done")
        expect(page.locator(".card .guesses")).to_have_count(6)
        assert set(statuses) <= {200, 503}


def test_page__a_server_that_is_gone_is_told(model: FineAlign, photos: Path, opened: Callable[..., Page]) -> None:
    with running(model) as address:
        page = opened(address)
    page.set_input_files("#files", photos / "red" / "0.png")
    finished(page, "1 failed")
    expect(page.locator(".card")).to_contain_text("The server did not answer. Is it still running?")


def test_page__clear_leaves_nothing(address: str, photos: Path, opened: Callable[..., Page]) -> None:
    count = """
    window.made = []; window.revoked = [];
    const make = URL.createObjectURL, revoke = URL.revokeObjectURL;
    URL.createObjectURL = (blob) => { const url = make(blob); window.made.push(url); return url; };
    URL.revokeObjectURL = (url) => { window.revoked.push(url); revoke(url); };
    """
    page = opened(address, init=count)
    page.set_input_files("#files", [photos / "red" / f"{number}.png" for number in range(8)])
    finished(page, "8 of 8 images done")
    expect(page.locator(".card img")).to_have_count(8)
    page.wait_for_timeout(300)
    assert page.evaluate("window.made.length") == 8
    assert page.evaluate("window.made.every((url) => window.revoked.includes(url))")
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#status")).to_have_text("No images yet.")
    expect(page.locator(".card")).to_have_count(0)
    expect(page.locator("#files")).to_be_focused()
    page.set_input_files("#files", photos / "red" / "0.png")
    finished(page, "1 of 1 image done")


# --- everybody --------------------------------------------------------------------------------------------------------


def test_page__the_keyboard_is_enough(address: str, photos: Path, opened: Callable[..., Page]) -> None:
    page = opened(address)
    page.on("filechooser", lambda _: None)  # from now on: the browser may not heed who begins to listen at the key
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the results")).to_be_focused()
    expect(page.get_by_role("link", name="Skip to the results")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("#results")).to_be_focused()
    page.keyboard.press("Shift+Tab")  # the list of classes
    for _ in range(4):
        page.keyboard.press("Shift+Tab")
    expect(page.locator("#files")).to_be_focused()
    outline = page.locator("label[for=files]").evaluate("label => getComputedStyle(label).outlineStyle")
    assert outline == "solid"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(photos / "red" / "0.png")
    finished(page, "1 of 1 image done")
    tab_to(page, "download")
    with page.expect_download():
        page.keyboard.press("Enter")
    tab_to(page, "clear")
    page.keyboard.press("Space")
    expect(page.locator(".card")).to_have_count(0)


def test_page__the_keyboards_place_is_kept_when_a_button_goes(model: FineAlign, opened: Callable[..., Page]) -> None:
    gate = Gate(model)
    with running(gate.model) as address:
        page = opened(address)
        take(page, [f"{number}.png" for number in range(750)])
        more = page.get_by_role("button", name="Show more rows")
        more.focus()
        page.keyboard.press("Enter")
        expect(more).to_be_hidden()
        expect(page.locator("#rows tr").nth(500)).to_be_focused()
        page.get_by_role("button", name="Stop").focus()
        page.keyboard.press("Enter")
        finished(page, "0 of 750 images done, 750 stopped")
        expect(page.locator("#results")).to_be_focused()
        gate.opened.set()


def tab_to(page: Page, name: str) -> None:
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == name:
            return
    raise AssertionError(f"{name} cannot be reached")


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (390, "dark"),
        (1280, "light"),
        pytest.param(390, "light", marks=pytest.mark.nightly),
        pytest.param(1280, "dark", marks=pytest.mark.nightly),
    ],
)
def test_page__is_accessible_in_each_state(
    address: str, photos: Path, tmp_path: Path, opened: Callable[..., Page], width: int, scheme: str
) -> None:
    """No serious or critical finding of axe-core; and a picture of each state."""
    (tmp_path / "notes.txt").write_text("no image")
    page, folder = opened(address, width=width, scheme=scheme), artefacts(tmp_path)

    def look(state: str) -> None:
        page.screenshot(path=folder / f"serve-{state}-{width}-{scheme}.png", full_page=True)
        found = Axe().run(page).response["violations"]
        grave = [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]
        assert not grave
        assert fits(page)

    look("empty")
    page.set_input_files("#files", [photos / "red" / "0.png", photos / "blue" / "1.png"])
    finished(page, "2 of 2 images done")
    expect(page.locator(".card img")).to_have_count(2)
    page.locator(".card summary").first.click()
    look("result")
    page.get_by_role("button", name="Clear").click()
    page.set_input_files("#files", tmp_path / "notes.txt")
    finished(page, "1 failed")
    look("error")


def test_page__two_hundred_and_more_are_accessible_too(model: FineAlign, opened: Callable[..., Page]) -> None:
    gate = Gate(model)
    with running(gate.model) as address:
        page = opened(address, width=390)
        take(page, [f"{number}.png" for number in range(203)])
        expect(page.locator("#rows tr")).to_have_count(3)
        found = Axe().run(page).response["violations"]
        assert not [one["id"] for one in found if one["impact"] in ("serious", "critical")]
        gate.opened.set()
        page.get_by_role("button", name="Stop").click()
        finished(page, "stopped")


def test_page__a_narrow_screen_needs_no_sideways_scrolling(
    address: str, photos: Path, tmp_path: Path, opened: Callable[..., Page]
) -> None:
    long = tmp_path / f"{'a' * 120}.png"
    long.write_bytes((photos / "red" / "0.png").read_bytes())
    (tmp_path / "notes.txt").write_text("no image")
    page = opened(address, width=320)
    assert fits(page)
    page.get_by_text("The classes").click()
    page.set_input_files("#files", [long, tmp_path / "notes.txt"])
    finished(page, "1 of 2 images done, 1 failed")
    for summary in page.locator(".card summary").all():
        summary.click()
    assert fits(page)


def test_page__each_theme_has_its_colours(address: str, opened: Callable[..., Page]) -> None:
    grounds = {
        opened(address, scheme=scheme).evaluate("getComputedStyle(document.body).backgroundColor") for scheme in SCHEMES
    }
    assert grounds == {"rgb(255, 255, 255)", "rgb(20, 23, 27)"}


# --- nobody else ------------------------------------------------------------------------------------------------------


def test_page__names_of_files_and_classes_are_text(address: str, opened: Callable[..., Page]) -> None:
    page = opened(address)
    name = "<img src=x onerror=\"document.title='broken in'\"><script>document.title=2<\\script>.png"
    take(page, [name])
    finished(page, "1 of 1 image done")
    page.get_by_text("The classes").click()
    expect(page.locator(".card h3")).to_have_text(name)
    expect(page.locator("#classes li")).to_have_text(NAMES)
    expect(page.locator("main img")).to_have_count(1)  # the preview
    expect(page.locator("main script")).to_have_count(0)
    page.wait_for_timeout(200)
    assert page.title() == "3 classes by fair: finealign"


def test_page__another_sites_page_gets_nothing(address: str, browser: Browser) -> None:
    """A page of another origin asks the server by its own name: the browser says whose it is, and it is refused."""
    page = browser.new_page()
    answers: list[int] = []
    page.on("response", lambda response: answers.append(response.status) if response.url.startswith(address) else None)
    page.route("http://evil.example/", lambda route: route.fulfill(body="<p>evil</p>", content_type="text/html"))
    page.goto("http://evil.example/")
    read = [
        page.evaluate(f"{call}.then((answer) => answer.status, () => 'refused')")
        for call in (
            f"fetch('{address}/model')",
            f"fetch('{address}/predict', {{method: 'POST', body: new FormData()}})",
            f"fetch('{address}/predict', {{method: 'POST', body: new FormData(), mode: 'no-cors'}})",
        )
    ]
    page.close()
    assert read[:2] == ["refused", "refused"]
    assert read[2] in (0, "refused")  # 0: an answer it may not look at
    assert all(status == 403 for status in answers)


def test_page__without_a_server_that_knows_its_model_says_so(address: str, browser: Browser) -> None:
    page = browser.new_page()
    page.route("**/model", lambda route: route.abort())
    page.goto(address)
    expect(page.locator("#status")).to_have_text("The server did not answer. Is it still running?")
    page.close()
