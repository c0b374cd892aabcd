"""A newcomer's walk through the command as in a container: without a home, under a user id that has no name."""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import finealign
from conftest import HANG

Tiny = Callable[[str], str]
NOBODY = 54_321  # no system gives this number a name
NAMES = {"Stiefmütterchen": (150, 60, 160), "Iris": (70, 70, 200), "Gänseblümchen": (230, 230, 210)}
EACH = 6
# The command, verb after verb, in one process: what it prints for programs, as a list.
WALK = """
import ctypes, io, json, os, pwd, sys
from contextlib import redirect_stdout
who = int(sys.argv[2])
if who:  # a user without rights, who may read the files of this installation all the same
    libc = ctypes.CDLL(None)
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups([]), os.setgid(who), os.setuid(who)
    read_all = 1 << 2  # CAP_DAC_READ_SEARCH
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(read_all, read_all, 0, 0, 0, 0)
    assert libc.capset(header, sets) == 0
else:
    def unknown(number):
        raise KeyError(number)
    pwd.getpwuid = unknown
from finealign.runtime.home import ensure_home
ensure_home()
from finealign.cli.app import app
printed = []
for words in json.load(open(sys.argv[1])):
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with redirect_stdout(out):
        try:
            app(words)
        except SystemExit as end:
            code = end.code
    out.flush()
    printed.append([code, out.buffer.getvalue().decode()])
print(json.dumps({"printed": printed, "home": os.environ["HOME"], "user": os.environ["USER"]}))
"""


def photo(colour: tuple[int, int, int], number: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(-40, 40, (48, 64, 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def desk(tiny_backbone: Tiny) -> Iterator[Path]:
    """A folder for anybody: photos of a phone, labelled ones, a list out of a spreadsheet, a model."""
    heif = pytest.importorskip("pillow_heif")
    with tempfile.TemporaryDirectory(prefix="newcomer-") as made:
        desk = Path(made)
        phone, labelled = desk / "phone" / "100APPLE", desk / "labelled"
        phone.mkdir(parents=True)
        for kind, (name, colour) in enumerate(NAMES.items()):
            (labelled / name).mkdir(parents=True)
            for number in range(EACH):
                taken = photo(colour, kind * EACH + number)
                heif.from_pillow(taken).save(phone / f"IMG_{kind}{number}.HEIC", quality=90)
                taken.save(labelled / name / f"{number}.jpg", quality=95)
        whole = (phone / "IMG_00.HEIC").read_bytes()
        (phone / "IMG_90.HEIC").write_bytes(whole[: len(whole) // 2])
        (phone / "IMG_91.JPG").write_bytes(b"")
        (phone / "IMG_00.MOV").write_bytes(b"\0\0\0\x14ftypqt  " + bytes(40))
        (phone / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (labelled / "Iris" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
        rows = ["Nr;Name;Farbe", *(f"{number};{name};bunt" for number, name in enumerate(NAMES, 1))]
        (desk / "Arten.csv").write_text("\ufeff" + "\r\n".join(rows) + "\r\n", encoding="utf-8")
        shutil.copytree(tiny_backbone("transformer").removeprefix("local-dir:"), desk / "model")
        for path in (desk, *desk.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o644)
        yield desk


def may_become_nobody() -> bool:
    """Whether this process may become another user, and then still read files that only root can."""
    status = Path("/proc/self/status")
    if os.geteuid() != 0 or not status.exists():
        return False
    (permitted,) = [int(line.split()[1], 16) for line in status.read_text().splitlines() if line.startswith("CapPrm")]
    return bool(permitted & 1 << 2)


def walk(desk: Path, *verbs: list[str]) -> dict[str, Any]:
    """Run the verbs without a home and as a user without a name, or as if there were none; the answers as JSON."""
    (desk / "verbs.json").write_text(json.dumps(verbs), encoding="utf-8")
    (desk / "tmp").mkdir(exist_ok=True)
    (desk / "tmp").chmod(0o777)
    without = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    environment |= {"TMPDIR": str(desk / "tmp"), "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(Path(finealign.__file__).parent.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    who = NOBODY if may_become_nobody() else 0
    done = subprocess.run(
        [sys.executable, "-c", WALK, str(desk / "verbs.json"), str(who)],
        env=environment,
        cwd=desk,
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_newcomer__adapts_predicts_evaluates_and_reports(desk: Path) -> None:
    settings = {"views.crops": 2, "training.epochs": 1, "training.batch_size": 8, "prediction.calibrate": "false"}
    adapt = ["adapt", "phone", "--classes", "Arten.csv", "--backbone", "local-dir:model", "--out", "run", "--json"]
    adapt += [f"--set={name}={value}" for name, value in settings.items()]
    told = walk(
        desk,
        adapt,
        ["predict", "run", "phone", "--out", "labels.csv", "--json"],
        ["evaluate", "run", "labelled", "--json"],
        ["report", "run", "--labelled", "labelled", "--json"],
    )
    assert [code for code, _ in told["printed"]] == [0, 0, 0, 0], told["printed"]
    adapted, predicted, measured, _ = (json.loads(printed) for _, printed in told["printed"])
    who = NOBODY if may_become_nobody() else os.getuid()
    assert told["user"] == f"user-{who}"
    assert Path(told["home"]).is_relative_to(desk / "tmp")

    assert adapted["classes"] == list(NAMES)
    assert adapted["images"] == 3 * EACH
    aside = {Path(row["path"]).name: row["reason"] for row in adapted["set_aside"]}
    assert set(aside) == {"IMG_90.HEIC", "IMG_91.JPG"}
    assert "1 .mov" in adapted["left_out"]

    with (desk / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {Path(row["path"]).name for row in rows} == {f"IMG_{kind}{n}.HEIC" for kind in range(3) for n in range(EACH)}
    assert {row["label"] for row in rows} <= set(NAMES)
    assert len(predicted["set_aside"]) == 2

    assert measured["images"] == 3 * EACH
    assert measured["set_aside"] == 1
    assert "Gänseblümchen" in (desk / "run" / "report.html").read_text(encoding="utf-8")
    assert {path.stat().st_uid for path in (desk / "run").rglob("*")} == {who}
    assert not (desk / "~").exists()
