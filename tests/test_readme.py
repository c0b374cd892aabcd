"""Every snippet of the README runs, in order, in a folder that holds what a reader would have."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import CLASSES, write_photos
from forked import CLIENT, forking

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHIM = """#!{python}
import sys
sys.argv[0] = "finealign"
if sys.argv[1] in ("adapt", "benchmark"):
    sys.argv += ["--set", "training.epochs=2", "--set", "views.crops=2", "--set", "training.anchor_steps=8"]
if sys.argv[1] in ("adapt", "benchmark", "describe") and "--backbone" not in sys.argv:
    sys.argv += ["--backbone", "{backbone}"]
"""
MAIN = """
from finealign.cli import main
main()
"""
# In place of a data set that would be downloaded: the same class, with photos made on the spot.
PETS = """import shutil
class OxfordIIITPet:
    classes = {classes!r}
    def __init__(self, root, download):
        assert download
        shutil.copytree("photos", root + "/oxford-iiit-pet/images")
"""


def snippets(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def reader(tmp_path: Path, tiny_backbone: Callable[[str], str]) -> Path:
    return prepare(tmp_path, tiny_backbone("transformer"))


def prepare(tmp_path: Path, backbone: str, main: str = MAIN) -> Path:
    """A folder with photos, names and descriptions, and a command whose default backbone is a tiny local one.

    ``main`` is the end of the script that is the command.
    """
    for name in ("photos", "more-photos", "labelled-photos"):
        write_photos(tmp_path / name, each=3)
    (tmp_path / "birds.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    described = {name: [f"A {name} bird is {name} all over."] for name in CLASSES}
    (tmp_path / "birds.json").write_text(json.dumps(described), encoding="utf-8")
    (tmp_path / "stub" / "torchvision").mkdir(parents=True)
    (tmp_path / "stub" / "torchvision" / "__init__.py").touch()
    (tmp_path / "stub" / "torchvision" / "datasets.py").write_text(PETS.format(classes=CLASSES), encoding="utf-8")
    command = tmp_path / "bin" / "finealign"
    command.parent.mkdir()
    command.write_text(SHIM.format(python=sys.executable, backbone=backbone) + main, encoding="utf-8")
    command.chmod(0o755)
    python = command.with_name("python")
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "stub"} exec {sys.executable} "$@"\n', encoding="utf-8")
    python.chmod(0o755)
    return tmp_path


def test_readme__the_commands_run(tmp_path: Path, tiny_backbone: Callable[[str], str]) -> None:
    commands = [snippet for snippet in snippets("bash") if "finealign" in snippet and "benchmarks/" not in snippet]
    assert commands
    with forking() as address:
        reader = prepare(tmp_path, tiny_backbone("transformer"), CLIENT.format(address=address))
        environment = os.environ | {"PATH": f"{reader / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        for snippet in commands:
            subprocess.run(["bash", "-e", "-c", snippet], cwd=reader, env=environment, check=True, capture_output=True)
    for table in ("labels.csv", "described.csv"):
        assert (reader / table).read_text(encoding="utf-8").count("\n") == 10
    assert (reader / "pets.txt").read_text(encoding="utf-8").split() == CLASSES
    assert (reader / "pets.csv").read_text(encoding="utf-8").count("\n") == 10


def test_readme__the_python_runs(
    reader: Path, monkeypatch: pytest.MonkeyPatch, tiny_backbone: Callable[[str], str]
) -> None:
    import finealign

    defaults = finealign.FineAlign.__init__.__kwdefaults__ or {}
    monkeypatch.setitem(defaults, "backbone", tiny_backbone("transformer"))
    monkeypatch.chdir(reader)
    assert snippets("python")
    for snippet in snippets("python"):
        exec(compile(snippet, "README.md", "exec"), {})
    assert (reader / "birds-model" / "finealign.json").is_file()


def test_readme__names_what_is_there() -> None:
    """Files and folders the README speaks of exist, and it stays short."""
    for path in re.findall(r"`((?:src|methods|docs|benchmarks)/[\w./-]*)`", README):
        assert (ROOT / path).exists() or (ROOT / "src" / "finealign" / path).exists(), path
    for path in re.findall(r"\]\(((?!http|#)[^)#]+)", README):
        assert (ROOT / path).exists(), path
    assert len(README.splitlines()) < 200


def test_readme__says_first_what_it_is_for_whom_and_whether_it_works() -> None:
    """In one screen: two commands, for whom, and a figure with a link to what stands behind it."""
    first = README.partition("\n## ")[0].splitlines()[:40]
    opening = "\n".join(first)
    assert "finealign adapt" in opening and "finealign predict" in opening and "make demo" in opening
    assert "**For whom.**" in opening and "**Does it work?**" in opening
    assert re.search(r"\d+\.\d points", opening) and "](#results)" in opening


def test_run_folder__its_page_lists_what_is_written() -> None:
    from finealign.run import contract

    page = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^      ([\w.]+)/? ", page, flags=re.MULTILINE)) == set(contract.CONTENTS)
