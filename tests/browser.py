"""A server on this machine, and a Chromium that is installed already, driven by playwright."""

import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from conftest import HANG

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from finealign import FineAlign
    from finealign.review.session import Session
    from finealign.serve.forms import Limits
    from finealign.serve.server import AppListener

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def running(model: "FineAlign", limits: "Limits | None" = None, host: str = "127.0.0.1", **where: Any) -> Iterator[str]:
    """The address of a server that answers by a fitted model, on a free port. ``where`` is as for ``Listener``."""
    from finealign.serve.forms import Limits
    from finealign.serve.server import Listener

    with _served(Listener(model, host, 0, limits or Limits(), **where)) as address:
        yield address


@contextmanager
def reviewing(session: "Session", port: int = 0) -> Iterator[str]:
    """The address of the page of a review."""
    from functools import partial

    from finealign.serve.addresses import Addresses
    from finealign.serve.forms import Limits
    from finealign.serve.review import create_review
    from finealign.serve.server import AppListener

    with _served(AppListener(partial(create_review, session), "127.0.0.1", port, Limits(), Addresses())) as address:
        yield address


@contextmanager
def _served(server: "AppListener") -> Iterator[str]:
    listening = threading.Event()
    thread = threading.Thread(target=server.run, args=[lambda _: listening.set()])
    thread.start()
    try:
        assert listening.wait(HANG)
        yield server.address
    finally:
        server.stop()
        thread.join(HANG)
        assert not thread.is_alive()


def chromium() -> str:
    """The path of the browser: what CHROMIUM names, or the one on the PATH. Skips the test where there is none."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        pytest.skip("no Chromium here: install it, or set CHROMIUM to its path")
    return found


@contextmanager
def browsing() -> Iterator["Browser"]:
    """A browser for as long as it is wanted."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def watched(
    browser: "Browser", *, schemes: Collection[str] = (), timeout: float = 1000 * HANG
) -> Iterator[Callable[..., "Page"]]:
    """Opens pages; afterwards nothing may have failed in them, or have been asked of another origin.

    Addresses of ``schemes``, as those of what a page made itself, are of no origin. ``timeout`` is in milliseconds.
    """
    contexts, troubles = [], list[str]()

    def open_page(address: str, *, width: int = 1280, scheme: Any = "light", init: str = "") -> "Page":
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        context.add_init_script(init or "0")
        own = urlsplit(address).netloc

        def requested(url: str) -> None:
            if urlsplit(url).scheme not in schemes and urlsplit(url).netloc != own:
                troubles.append(f"asked {url}")

        context.on("request", lambda request: requested(request.url))
        page = context.new_page()
        page.set_default_timeout(timeout)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if "Policy" in message.text else None)
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles
