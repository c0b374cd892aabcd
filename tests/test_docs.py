"""The site: it builds, its links lead somewhere, and every snippet of its pages runs, in order, as a reader would."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chat_server import ChatServer
from conftest import HANG
from forked import CLIENT, forking
from test_cli import command
from test_readme import ROOT, prepare

DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "how-to").glob("*.md"))
# tests/test_demo.py runs it as it is.
SMALL_DEMO = """
import finealign.demo.run as demo
demo.QUICK_IMAGES = {"unlabelled": 96, "test": 48}
demo.SETTINGS["training"]["epochs"] = 1
"""
SNIPPET = re.compile(r"^```(bash|python)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


# What `pip` is here: it installs beside the photos, without an index, and leaves the environment of the tests alone.
PIP = """#!/bin/sh
if [ "$1" = install ]; then
    shift
    exec {python} -m pip install --quiet --no-index --no-deps --no-build-isolation --target {plugins} "$@"
fi
exec rm -r {plugins}
"""
# How a Python snippet is run. The settings of a FineAlign that is given none are those of a small run.
SNIPPET_COMMAND = """#!{python} -S
import sys
code = '''import finealign
finealign.FineAlign.__init__.__kwdefaults__["config"] = finealign.read_config(
    overrides=["backbone={backbone}", "training.epochs=2", "views.crops=2", "prediction.calibrate=false"]
)
'''
sys.argv = ["snippet", code + sys.argv[1]]
"""


def snippets(page: Path) -> list[tuple[str, str]]:
    """Language and code of what is to be run; other blocks, indented or of other languages, show and are not run."""
    return SNIPPET.findall(page.read_text(encoding="utf-8"))


def run(page: Path, folder: Path, **more: str) -> None:
    environment = os.environ | {"PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"} | more
    plugins = [str(folder / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(plugins)
    for language, code in snippets(page):
        command = ["bash", "-e", "-c", code] if language == "bash" else [str(folder / "bin" / "snippet"), code]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANG, check=False
        )
        assert done.returncode == 0, f"{page.name}:\n{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def begin(folder: Path, backbone: str, forks: str) -> Path:
    """Photos, names, descriptions, and the commands."""
    prepare(folder, backbone, CLIENT.format(address=forks))
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    snippet = SNIPPET_COMMAND.format(python=sys.executable, backbone=backbone) + CLIENT.format(address=forks)
    (folder / "bin" / "snippet").write_text(snippet, encoding="utf-8")
    (folder / "bin" / "snippet").chmod(0o755)
    (folder / "bin" / "pip").write_text(PIP.format(python=sys.executable, plugins=folder / "plugins"), encoding="utf-8")
    (folder / "bin" / "pip").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def forks() -> Iterator[str]:
    with forking(SMALL_DEMO) as address:
        yield address


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Callable[[str], str], forks: str) -> Path:
    """Where a reader of the front page stands: with ``runs/birds``."""
    folder = begin(tmp_path_factory.mktemp("reader"), tiny_backbone("transformer"), forks)
    run(DOCS / "index.md", folder)
    return folder


@pytest.fixture
def chat() -> Iterator[ChatServer]:
    with ChatServer() as server:
        yield server


def test_tutorial__its_snippets_run(tmp_path: Path, tiny_backbone: Callable[[str], str], forks: str) -> None:
    run(DOCS / "tutorial.md", begin(tmp_path, tiny_backbone("transformer"), forks))


@pytest.mark.parametrize(
    "page",
    # A cluster takes a minute to start.
    [pytest.param(page, id=page.stem, marks=[pytest.mark.nightly] * (page.stem == "ray")) for page in PAGES],
)
def test_page__its_snippets_run(page: Path, adapted: Path, chat: ChatServer) -> None:
    run(page, adapted, OPENAI_BASE_URL=chat.url, OPENAI_API_KEY="sk-of-a-test")


def test_pages__each_has_something_to_run() -> None:
    assert len(PAGES) >= 9
    for page in [DOCS / "tutorial.md", *PAGES]:
        assert snippets(page), page


def test_site__is_built_without_a_warning(tmp_path: Path) -> None:
    """Strict: a link or an anchor that leads nowhere, or a name that mkdocstrings cannot find, is an error."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {str(path.relative_to(tmp_path).parent) for path in tmp_path.rglob("index.html")}
    assert {".", "tutorial", "commands", "settings", "python", "how-to/describe", "how-to/add-a-method"} <= pages
    commands = (tmp_path / "commands" / "index.html").read_text(encoding="utf-8")
    settings = (tmp_path / "settings" / "index.html").read_text(encoding="utf-8")
    assert "--keep-adapted" in commands and "training.anchor_steps" in settings
    fetched = re.findall(r'(?:src|href)="(https?://[^"]+)"[^>]*(?:stylesheet|></script)', commands)
    assert not fetched  # nothing of the page itself comes from elsewhere


def test_site__commands_are_those_of_the_command() -> None:
    """Each verb's part names every option that its help does."""
    page = runpy.run_path(str(DOCS / "hooks.py"))["commands"]()
    verbs = re.findall(r"^## (\w+)$", page, flags=re.MULTILINE)
    assert len(verbs) > 8
    for verb in verbs:
        shown = command(verb, "--help").stdout
        part = page.partition(f"## {verb}\n")[2].partition("\n## ")[0]
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", shown)) - {"--help"} <= set(re.findall(r"--[a-z-]+", part))
