"""The server below a proxy's path, asked by pages of other sites, and out of space: what each side gets to see."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
from playwright.sync_api import Browser, expect
from starlette import formparsers

from browser import browsing, running
from conftest import CLASSES, HANG, tiny_config
from finealign import FineAlign
from finealign.errors import FinealignError
from finealign.serve.addresses import Addresses
from finealign.serve.forms import Limits
from test_serve import FORM, Answer, ask, form, pixels, png, predict

Tiny = Callable[[str], str]
SITE = "https://birds.example"
HOW_TO = Path(__file__).parent.parent / "docs" / "how-to" / "serve.md"


@pytest.fixture(scope="module")
def model(tiny_backbone: Tiny) -> FineAlign:
    return FineAlign(CLASSES, config=tiny_config(tiny_backbone("transformer"), method__name="cupl")).unlearned()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as browser:
        yield browser


@contextmanager
def proxy(server: str, path: str, *, strips: bool) -> Iterator[str]:
    """The address of a proxy that has a server below a path, and asks it with the path or without."""

    class Handler(BaseHTTPRequestHandler):
        def forward(self) -> None:
            inside = self.path.startswith(path)
            asked = (self.path.removeprefix(path) or "/") if strips else self.path
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name: value for name, value in self.headers.items() if name.lower() != "content-length"}
            answer = ask(server, asked, body, self.command, **headers) if inside else Answer(404, self.headers, b"")
            self.send_response(answer.status)
            for name, value in answer.headers.items() if inside else ():
                if name.lower() not in ("connection", "content-length"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        do_GET = do_POST = do_HEAD = do_OPTIONS = forward  # noqa: N815, names that the base class looks for

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with served(Handler) as address:
        yield address


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(HANG)


# --- below a path -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strips", [True, False])
@pytest.mark.parametrize("path", ["/birds", "/model"])
def test_root_path__the_page_and_the_api_are_found_below_it(model: FineAlign, path: str, strips: bool) -> None:
    with running(model, root_path=path) as server, proxy(server, path, strips=strips) as address:
        for page in (f"{path}/", path) if path == "/birds" else (f"{path}/",):
            answer = ask(address, page)
            assert (answer.status, answer.headers.get_content_type()) == (200, "text/html")
            links = re.findall(r'(?:href|src)="([^"#]+)"', answer.body.decode())
            assert len(links) == 5
            for link in links:
                found = urlsplit(urljoin(address + page, link)).path
                assert found.startswith(f"{path}/")
                assert ask(address, found).status == 200, found
        assert predict(address + path, png(pixels(0))).status == 404  # of the proxy, at /predict
        answer = ask(address, f"{path}/predict", form(png(pixels(0))), "POST", Content_Type=FORM)
        assert answer.status == 200
        description = ask(address, f"{path}/openapi.json").json
        assert description["servers"] == [{"url": path}]
        assert "/predict" in description["paths"]
        assert ask(address, f"{path}/model").json["classes"] == CLASSES
        assert f"{path}/openapi.json" in ask(address, f"{path}/nothing").json["error"]
        assert ask(address, f"{path}/healthz/").kind == "not-found"  # rather than led out of the path
        assert ask(server, "/healthz").status == 200  # asked directly, as a health check does


def test_root_path__by_default_addresses_are_relative(model: FineAlign) -> None:
    with running(model) as server, proxy(server, "/any/path", strips=True) as address:
        page = ask(address, "/any/path/").body.decode()
        links = re.findall(r'(?:href|src)="([^"#]+)"', page)
        assert len(links) == 5
        for link in links:
            assert ask(address, urljoin("/any/path/", link)).status == 200, link
        assert "servers" not in ask(address, "/any/path/openapi.json").json


@pytest.mark.parametrize(
    ("given", "root"),
    [("", ""), ("/", ""), ("/birds", "/birds"), ("/birds/", "/birds"), ("/a/b-c_d.e~1", "/a/b-c_d.e~1")],
)
def test_root_path__is_a_path(given: str, root: str) -> None:
    assert Addresses.from_options(root_path=given).root == root


@pytest.mark.parametrize(
    "given",
    ["birds", "https://x.example/birds", "//x.example", "/a//b", "/a/../b", "/.", "/a?b", "/a b", "/{x}", "/ä", " "],
)
def test_root_path__what_is_none_is_told(given: str) -> None:
    with pytest.raises(FinealignError, match=r"--root-path .* is no path\. Wanted: .* as /birds"):
        Addresses.from_options(root_path=given)


def test_page__works_below_a_path_in_a_browser(model: FineAlign, browser: Browser) -> None:
    with running(model, root_path="/birds") as server, proxy(server, "/birds", strips=True) as address:
        page = browser.new_page()
        failed = list[str]()
        page.on("response", lambda one: failed.append(one.url) if one.status >= 400 else None)
        page.goto(f"{address}/birds")
        page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": png(pixels(1))})
        expect(page.locator("#status")).to_contain_text("1 of 1 image done")
        page.close()
        assert not failed


def test_page__tells_of_a_proxy_that_refuses(model: FineAlign, browser: Browser) -> None:
    """It answers with a page of its own instead of JSON."""
    with running(model) as server:
        page = browser.new_page()
        page.route("**/predict?*", lambda route: route.fulfill(status=413, body="<html>too large</html>"))
        page.goto(server)
        page.set_input_files("#files", {"name": "a.png", "mimeType": "image/png", "buffer": png(pixels(1))})
        expect(page.locator("#cards")).to_contain_text("takes no file of this size (413)")
        page.close()


def nginx() -> str:
    found = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if found is None:
        pytest.skip("no nginx here: apt-get install nginx-light")
    return found


def snippet(server: str, port: int, folder: Path) -> str:
    """The configuration in the how-to, for a server and a port of this test and without TLS."""
    (text,) = re.findall(r"```nginx\n(.*?)```", HOW_TO.read_text(encoding="utf-8"), re.DOTALL)
    for wanted, here in {
        "http://127.0.0.1:8000": server,
        "listen 443 ssl;": f"listen 127.0.0.1:{port};",
        "/etc/nginx/birds.users": str(folder / "users"),
    }.items():
        assert wanted in text
        text = text.replace(wanted, here)
    return re.sub(r".*ssl_certificate.*\n", "", text)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


def test_nginx__the_how_to_works(model: FineAlign, tmp_path: Path) -> None:
    program, port = nginx(), free_port()
    with running(model, allow_hosts=["birds.example"], root_path="/birds") as server:
        (tmp_path / "users").write_text("me:{PLAIN}secret\n")
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = (f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)
        user = "user root;" if os.geteuid() == 0 else ""  # else its workers may not read the folder of this test
        (tmp_path / "nginx.conf").write_text(
            f"daemon off; {user} pid {tmp_path}/pid; error_log {tmp_path}/log;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{' '.join(temporary)}\n{snippet(server, port, tmp_path)}}}\n"
        )
        command = [program, "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as going:
            try:
                address = f"http://127.0.0.1:{port}"
                wait_for(port, going)
                known = {"Host": "birds.example", "Authorization": "Basic bWU6c2VjcmV0"}
                assert ask(address, "/birds/", Host="birds.example").status == 401
                assert "/birds/page.js" in ask(address, "/birds/", None, "GET", **known).body.decode()
                assert ask(address, "/birds", None, "GET", **known).status == 301
                large = png(pixels(0, 1000, 1000))  # 3 MB, more than nginx takes by default
                asking = {**known, "Content_Type": FORM, "Origin": SITE, "Sec_Fetch_Site": "same-origin"}
                assert ask(address, "/birds/predict", form(large), "POST", **asking).status == 200
                foreign = asking | {"Origin": "https://evil.example", "Sec_Fetch_Site": "cross-site"}
                assert ask(address, "/birds/predict", form(large), "POST", **foreign).kind == "cross-site"
                assert ask(address, "/birds/predict", form(bytes(20_010_000)), "POST", **asking).kind == "too-large"
            finally:
                going.send_signal(signal.SIGTERM)


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + HANG
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(process.stderr.read() if process.stderr and process.poll() is not None else "it hangs")


# --- pages of other sites ---------------------------------------------------------------------------------------------


PREFLIGHT = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Private_Network": "true"}


def test_allow_origin__a_page_of_it_may_ask_and_read(model: FineAlign) -> None:
    with running(model, allow_origins=[SITE, "http://localhost:3000"]) as address:
        for origin in (SITE, "http://localhost:3000"):
            asking = {"Origin": origin, "Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "cors"}
            before = ask(address, "/predict", None, "OPTIONS", **asking, **PREFLIGHT)
            assert (before.status, before.body) == (204, b"")
            assert before.headers["access-control-allow-origin"] == origin
            assert "POST" in before.headers["access-control-allow-methods"]
            assert before.headers["access-control-allow-private-network"] == "true"
            image = form(png(pixels(0)))
            for path, body, status in (("/predict", image, 200), ("/predict?top_k=0", image, 422), ("/x", image, 404)):
                answer = ask(address, path, body, "POST", Content_Type=FORM, **asking)
                assert answer.status == status
                assert answer.headers["access-control-allow-origin"] == origin
                assert "access-control-allow-credentials" not in answer.headers
                assert answer.headers["vary"] == "Origin"
                assert "X-Request-ID" in answer.headers["access-control-expose-headers"]


def test_allow_origin__others_are_refused_as_before(model: FineAlign) -> None:
    with running(model, allow_origins=[SITE]) as address:
        for origin in (
            "https://evil.example",
            "http://birds.example",
            "https://birds.example:8443",
            "https://birds.example.evil.example",
            "https://sub.birds.example",
            "null",
            "",
        ):
            asking = {"Origin": origin, "Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "cors"}
            for method, path, more in (("OPTIONS", "/predict", PREFLIGHT), ("GET", "/model", {})):
                answer = ask(address, path, None, method, **asking, **more)
                assert (answer.status, answer.kind) == (403, "cross-site"), origin
                assert "access-control-allow-origin" not in answer.headers
                assert "--allow-origin" in answer.json["error"]


def test_allow_origin__lets_no_other_host_in(model: FineAlign) -> None:
    for origins in ([SITE], ["*"]):
        with running(model, allow_origins=origins) as address:
            assert ask(address, "/model", Host="birds.example", Origin=SITE).kind == "host"
            assert (
                ask(address, "/predict", None, "OPTIONS", Host="evil.example", Origin=SITE, **PREFLIGHT).kind == "host"
            )


def test_allow_origin__every_site_where_that_is_said(model: FineAlign) -> None:
    with running(model, allow_origins=["*"]) as address:
        for origin in (SITE, "null", "chrome-extension://abc"):
            answer = ask(address, "/model", Origin=origin, Sec_Fetch_Site="cross-site")
            assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, "*")
            assert ask(address, "/predict", None, "OPTIONS", Origin=origin, **PREFLIGHT).status == 204


def test_allow_origin__none_is_allowed_by_default(model: FineAlign) -> None:
    with running(model) as address:
        for answer in (ask(address, "/model"), ask(address, "/model", Origin=address)):
            assert answer.status == 200
            assert not [name for name in answer.headers if name.lower().startswith("access-control") or name == "vary"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("https://Birds.example/", "https://birds.example"),
        ("https://birds.example:443", "https://birds.example"),
        ("http://birds.example:443", "http://birds.example:443"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("*", "*"),
    ],
)
def test_allow_origin__is_written_as_browsers_do(given: str, meant: str) -> None:
    assert Addresses.from_options(allow_origins=[given]).origins == {meant}


@pytest.mark.parametrize(
    "given",
    ["birds.example", "https://", "https://birds.example/page", "https://*.example", "null", "", "https://a b", "*, x"],
)
def test_allow_origin__what_is_none_is_told(given: str) -> None:
    with pytest.raises(FinealignError, match=r"--allow-origin .* is no origin\. Wanted: .* as https://"):
        Addresses.from_options(allow_origins=[given])


def test_allow_origin__in_a_browser(model: FineAlign, browser: Browser) -> None:
    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    fetching = "(at) => fetch(at).then((answer) => answer.json()).then((found) => found.classes, () => null)"
    with (
        served(Elsewhere) as elsewhere,
        running(model, allow_origins=[elsewhere]) as allowing,
        running(model) as closed,
    ):
        page = browser.new_page()
        page.goto(elsewhere)
        assert page.evaluate(fetching, f"{allowing}/model") == CLASSES
        assert page.evaluate(fetching, f"{closed}/model") is None
        page.close()


# --- out of space, too large ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EROFS])
def test_predict__an_upload_that_cannot_be_kept_is_507(
    model: FineAlign, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    class Full(tempfile.SpooledTemporaryFile[bytes]):
        def rollover(self) -> None:
            raise OSError(number, "No space left on device")

    monkeypatch.setattr(formparsers, "SpooledTemporaryFile", Full)
    with running(model) as address:
        answer = predict(address, png(pixels(0, 700, 700)))  # more than 1 MB, which is kept on the disk
        assert (answer.status, answer.kind) == (507, "no-space")
        assert "no space left on device" in answer.json["error"]
        assert "TMPDIR" in answer.json["error"]
        assert predict(address, png(pixels(0))).status == 200  # kept in memory
        assert json.loads(ask(address, "/healthz").body)["waiting"] == 0


def test_refusals__name_the_option(model: FineAlign) -> None:
    with running(model, Limits(max_upload_bytes=10_000, max_pixels=100)) as address:
        assert "--max-upload-mb" in predict(address, png(pixels(0, 100, 100))).json["error"]
        assert "--max-megapixels" in predict(address, png(pixels(0))).json["error"]
        assert "--" not in predict(address, b"text").json["error"]
