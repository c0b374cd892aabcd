"""Output that cannot be printed as it is: streams that are closed, full, cut or not UTF-8; users without a home."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import HANG, unprivileged
from finealign.cli.streams import tell_escaped
from finealign.runtime.home import ensure_home

Done = subprocess.CompletedProcess[str]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
METHODS = [sys.executable, "-m", "finealign", "methods"]


def run(words: list[str], *, environment: Mapping[str, str] = os.environ, **how: Any) -> Done:
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    return subprocess.run(words, env=environment, text=True, timeout=HANG, check=False, **streams)


def by_shell(redirection: str, *more: str) -> Done:
    return run(["sh", "-c", f'"$@" {redirection}', "sh", *METHODS, *more])


MORE = [[], pytest.param(["--json"], marks=pytest.mark.nightly)]


@needs_full
@pytest.mark.parametrize("more", MORE)
def test_full__is_told_and_is_an_error(more: list[str]) -> None:
    done = by_shell(">/dev/full", *more)
    assert done.returncode == 1
    assert done.stderr.startswith("error: The output cannot be written: no space left on device. What was printed is")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("more", MORE)
def test_closed__is_told_and_is_an_error(more: list[str]) -> None:
    done = by_shell(">&-", *more)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "The output cannot be written: standard output is closed" in done.stderr


def test_closed__nothing_is_opened_in_its_place(tmp_path: Path) -> None:
    """A file opened while standard output is closed would get its number, and what is printed to it."""
    code = (
        "import os\nfrom finealign.cli.streams import protect_streams\nprotect_streams()\n"
        f"with open({str(tmp_path / 'file')!r}, 'w') as file:\n    assert file.fileno() > 2\n"
    )
    assert run(["sh", "-c", '"$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]).returncode == 0


def test_left__by_a_reader_that_has_enough_ends_quietly_as_in_a_shell() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run(METHODS, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("redirection", ["2>&-", pytest.param("2>/dev/full", marks=[needs_full, pytest.mark.nightly])])
def test_error_stream__lost_is_no_error_of_the_command(redirection: str) -> None:
    assert by_shell(redirection).returncode == 0
    failed = by_shell(redirection, "--nonsense")
    assert (failed.returncode, failed.stdout) == (2, "")


@pytest.mark.parametrize(
    "encoding", ["ascii", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("latin-1", "cp1252"))]
)
def test_encoding__characters_it_lacks_are_escaped_and_told(encoding: str) -> None:
    code = (
        "import sys\nimport finealign.cli\nfrom finealign.model.predictions import Row, write_csv\n"
        "rows = [Row(path='é.png', labels=['三毛猫'], confidences=[1.0])] * 2\n"
        "sys.modules['finealign.cli.app'].app = lambda: write_csv(rows, sys.stdout, 1)\nfinealign.cli.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = done.stdout.decode(encoding)
    path = "\\xe9.png" if encoding == "ascii" else "é.png"
    assert shown.splitlines()[1:] == [f"{path},\\u4e09\\u6bdb\\u732b,1.0,"] * 2
    assert b"which lacks some characters" in done.stderr
    assert b"PYTHONIOENCODING=utf-8" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_encoding__one_object_is_utf8_whatever_the_stream() -> None:
    done = run([*METHODS, "--json"], environment=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert json.loads(done.stdout)["methods"]
    assert done.stderr == ""


def test_tell_escaped__nothing_was(capsys: pytest.CaptureFixture[str]) -> None:
    tell_escaped()
    assert capsys.readouterr().err == ""


# --- no home ----------------------------------------------------------------------------------------------------------


def test_no_home__doctor_has_a_folder_for_its_cache(tmp_path: Path) -> None:
    """As in a container that runs under a bare user id."""
    code = (
        "import pwd, sys\ndef unknown(number):\n    raise KeyError(number)\npwd.getpwuid = unknown\n"
        "sys.argv[1:] = ['doctor', '--json']\nfrom finealign.cli import main\nmain()\n"
    )
    names = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    done = run([sys.executable, "-c", code], environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["cache"]["folder"]).is_relative_to(tmp_path)
    assert not (tmp_path / "~").exists()


def test_no_home__pixels_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from finealign.images import training_set

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(training_set, "user_cache_dir", fail)
    assert training_set._cache_folder("auto") is None


def test_ensure_home__is_private_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("no name")

    monkeypatch.setattr("getpass.getuser", unknown)
    monkeypatch.setattr("finealign.runtime.home._has_home", lambda: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "USER"):
        monkeypatch.setenv(name, "")
    ensure_home()
    home = Path(os.environ["HOME"])
    assert os.environ["USER"] == f"user-{os.getuid()}"
    assert (home.parent, home.stat().st_mode & 0o777) == (tmp_path, 0o700)
    ensure_home()
    assert Path(os.environ["HOME"]) == home

    home.chmod(0o777)  # as one that somebody else has laid there
    ensure_home()
    assert Path(os.environ["HOME"]) != home


@pytest.mark.parametrize("home", ["there", "not/yet/there", "read-only"])
def test_ensure_home__leaves_one_that_can_be_used(home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "read-only" / ".cache").mkdir(parents=True)  # it may have weights
    (tmp_path / "read-only").chmod(0o555)
    monkeypatch.setenv("HOME", str(tmp_path / home))
    monkeypatch.setenv("USER", "somebody")
    with unprivileged():
        ensure_home()
    assert (os.environ["HOME"], os.environ["USER"]) == (str(tmp_path / home), "somebody")


@pytest.mark.parametrize("home", ["closed", "closed/deeper"])
def test_ensure_home__one_that_cannot_be_written_is_none(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / home))
    with unprivileged():
        ensure_home()
    assert os.environ["HOME"] == str(tmp_path / f"finealign-home-{os.getuid()}")
