"""Models of a hub are pinned by revision and recorded; the hub is a real HTTP server, on loopback."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conftest import CLASSES, HANG
from forked import CLIENT, forking

Tiny = Callable[[str], str]
FIRST, SECOND, THIRD = ("1" * 40, "2" * 40, "3" * 40)


class Hub(ThreadingHTTPServer):
    """One repository, ``birds/tiny``, with commits by name, and the commit that main leads to."""

    commits: dict[str, dict[str, bytes]]
    main: str
    asked: list[str]
    client: str  # the code that hands a command to the process that its hub is this one for


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0].replace("%40", "@")
        self.server.asked.append(path)
        api, file = "/api/models/birds/tiny/revision/", "/birds/tiny/resolve/"
        tree = "/api/models/birds/tiny/tree/"
        if path.startswith(tree):
            commit = self.commit(path.removeprefix(tree))
            files = self.server.commits[commit].items()
            listed = [{"type": "file", "path": name, "size": len(kept), "oid": "0"} for name, kept in files]
            data = json.dumps(listed).encode()
        elif path.startswith(api):
            commit = self.commit(path.removeprefix(api))
            siblings = [{"rfilename": name} for name in self.server.commits[commit]]
            data = json.dumps({"id": "birds/tiny", "sha": commit, "siblings": siblings}).encode()
        elif path.startswith(file):
            revision, _, name = path.removeprefix(file).partition("/")
            commit = self.commit(revision)
            data = self.server.commits[commit][name]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def commit(self, revision: str) -> str:
        return self.server.main if revision == "main" else revision

    def log_message(self, *_: object) -> None:
        pass


# The hub's library reads its environment when it is imported: the commands are forked from a process that has this one.
ENVIRONMENT = """
import os
for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE"):
    os.environ.pop(name, None)
os.environ |= {{"HF_ENDPOINT": "http://127.0.0.1:{port}", "HF_HOME": {home!r}, "NO_PROXY": "127.0.0.1"}}
os.environ["HF_HUB_DISABLE_XET"] = "1"
"""


@pytest.fixture
def hub(tiny_backbone: Tiny, tmp_path: Path) -> Iterator[Hub]:
    folder = Path(tiny_backbone("transformer").removeprefix("local-dir:"))
    config = (folder / "open_clip_config.json").read_bytes()
    commits = {}
    for number, commit in enumerate((FIRST, SECOND, THIRD)):
        tensors = load_file(folder / "open_clip_model.safetensors")
        tensors["visual.proj"] += 0.1 * number
        save_file(tensors, tmp_path / "weights")
        files = {"open_clip_config.json": config, "open_clip_model.safetensors": (tmp_path / "weights").read_bytes()}
        commits[commit] = {**files, "open_clip_pytorch_model.bin": b"a pickle", "code.py": b"raise SystemExit"}
    server = Hub(("127.0.0.1", 0), Answer)
    server.commits, server.main, server.asked = commits, SECOND, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    first = ENVIRONMENT.format(port=server.server_port, home=str(tmp_path / "hf"))
    with forking(first) as address:
        server.client = f"{first}\nimport sys\n{CLIENT.format(address=address)}"
        yield server
    server.shutdown()
    thread.join()
    server.server_close()


def adapt(hub: Hub, photos: Path, name: str, out: Path, *more: str, wanted: int = 0) -> str:
    words = ["adapt", str(photos), "--classes", ",".join(CLASSES), "--backbone", f"hf-hub:birds/{name}"]
    settings = ["--device", "cpu", "--out", str(out), *more]
    for setting in ("training.epochs=1", "training.anchor_steps=0", "views.crops=2", "prediction.calibrate=false"):
        settings += ["--set", setting]
    done = subprocess.run(
        [sys.executable, "-c", hub.client, *words, *settings], capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == wanted, done.stderr
    return done.stderr


def origin(out: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((out / "run.json").read_text())["origin"]
    return found


def test_hub__runs_record_the_revision_and_can_be_pinned_to_it(hub: Hub, photos: Path, tmp_path: Path) -> None:
    newest, pinned = tmp_path / "newest", tmp_path / "pinned"
    adapt(hub, photos, "tiny", newest)
    assert origin(newest) == {"repository": "birds/tiny", "revision": SECOND}
    assert not [path for path in hub.asked if path.endswith((".bin", ".py"))]  # neither pickle nor code is fetched
    adapt(hub, photos, f"tiny@{FIRST}", pinned)
    assert origin(pinned) == {"repository": "birds/tiny", "revision": FIRST}

    # The hub moves on: what was begun with other weights is not gone on with, unless pinned.
    hub.main = THIRD
    told = adapt(hub, photos, "tiny", newest, "--resume", wanted=1)
    assert "had other weights, so it cannot be resumed" in told
    adapt(hub, photos, f"tiny@{FIRST}", pinned, "--resume")


def test_hub__what_is_not_there_is_one_sentence(hub: Hub, photos: Path, tmp_path: Path) -> None:
    told = adapt(hub, photos, "other", tmp_path / "run", wanted=1)
    assert "The weights of hf-hub:birds/other cannot be had" in told
    assert "Traceback" not in told


def test_hub__weights_in_another_format_alone_are_told_as_that(hub: Hub, photos: Path, tmp_path: Path) -> None:
    del hub.commits[SECOND]["open_clip_model.safetensors"]
    told = adapt(hub, photos, "tiny", tmp_path / "run", wanted=1)
    assert (
        "birds/tiny has its weights as open_clip_pytorch_model.bin alone. Wanted: open_clip_model.safetensors" in told
    )
    assert "hf download birds/tiny --local-dir FOLDER, then --backbone local-dir:FOLDER" in told
    assert not [path for path in hub.asked if path.endswith(".bin")]

    del hub.commits[THIRD]["open_clip_config.json"]
    told = adapt(hub, photos, f"tiny@{THIRD}", tmp_path / "run", wanted=1)
    assert "birds/tiny holds no model for open_clip: open_clip_config.json is not in it" in told
