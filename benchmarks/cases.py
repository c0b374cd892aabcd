"""What becomes of the files that people bring: class lists, tables, images and folders, each through the command.

    python benchmarks/cases.py --folder ../shared/cases

prints two tables for RELIABILITY.md: how many of every kind were tried, read and refused, and what became of each. The
files of ``--folder`` are tried as well: class lists by their name ``classes_*``, tables by ``labels_*``, the others as
images. Nothing is said of accuracy.
"""

import argparse
import gzip
import json
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from typer.testing import CliRunner

from finealign.cli.app import app
from finealign.demo.model import demo_model

Kind = Literal["class list", "table", "image", "folder", "name for images"]
Outcome = Literal["read", "refused", "fault"]
CLASSES = ("pansy", "iris", "daisy")
COLOURS = ((150, 60, 160), (70, 70, 200), (230, 230, 210))
LIST = ("adapt", "--method", "cupl", "--dry-run")


@dataclass(frozen=True)
class Case:
    """A file or folder that somebody brings, and what is to become of it."""

    kind: Kind
    name: str
    make: Callable[[Path], object]  # writes it at a path
    outcome: Outcome
    told: str = ""  # in the sentence of a refusal, or in what is read


@dataclass(frozen=True)
class Found:
    """What became of a case."""

    outcome: Outcome
    told: str  # the sentence of a refusal, or what was read


def text(content: str | bytes) -> Callable[[Path], object]:
    """Write these bytes, or this text in UTF-8."""
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def workbook() -> bytes:
    """The beginning of an Excel workbook, which is a ZIP archive."""
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
    return file.getvalue()


def photo(number: int = 0) -> Image.Image:
    """A noisy picture of one of the classes' colours."""
    noise = np.random.default_rng(number).integers(-40, 40, (40, 48, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[number % 3]) + noise, 0, 255).astype(np.uint8))


def album(folder: Path, each: int = 3) -> Path:
    """A folder of class folders with ``each`` pictures."""
    for place, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(each):
            photo(place + 3 * number).save(folder / name / f"{number}.png")
    return folder


def _lists() -> Iterator[Case]:
    def case(name: str, content: str | bytes, outcome: Outcome, told: str = "") -> Case:
        return Case("class list", name, text(content), outcome, told)

    names, rows = "pansy\niris\ndaisy\n", "Name;Anzahl\r\nStiefmütterchen;3\r\nIris;4\r\n"
    yield case("a spreadsheet's CSV, BOM and semicolons.csv", "\ufeff" + rows, "read", "Stiefmütterchen, Iris")
    yield case("a spreadsheet's CSV in Windows-1252.csv", rows.encode("cp1252"), "refused", "CSV UTF-8")
    yield case("a workbook.xlsx", workbook(), "refused", "a workbook of a spreadsheet")
    yield case("a workbook named so.csv", workbook(), "refused", "a workbook of a spreadsheet")
    yield case("a compressed list.txt", gzip.compress(names.encode()), "refused", "a compressed file")
    yield case("the settings of a model in transformers.json", ID2LABEL, "read", "pansy, iris")
    yield case("settings without classes.json", '{"model_type": "vit", "layers": 12}', "refused", "no classes")
    yield case("features of a data set.json", '{"features": {"label": {"names": ["pansy"]}}}', "refused", "no classes")
    yield case("numbers by name.json", '{"pansy": 0, "iris": 1}', "read", "pansy, iris")
    yield case(
        "ids of ImageNet.json", '{"0": ["n01440764", "tench"], "1": ["n01443537", "carp"]}', "refused", "entry 1"
    )
    yield case("JSON lines.jsonl", '{"name": "pansy"}\n{"name": "iris"}\n', "refused", "part of a list")
    yield case("the head of a column.txt", "name\npansy\niris\n", "refused", "head of a column")
    yield case("counted by letters.txt", "a) pansy\nb) iris\n", "refused", "letter that counts")
    yield case("a comment by a semicolon.txt", "; mine\npansy\niris\n", "refused", "comment")
    yield case("comments behind names.txt", "pansy  # nice\niris  # blue\n", "refused", "comment")
    yield case("files of images.txt", "pansy.jpg\niris.jpg\n", "refused", "files of images")
    yield case("what cannot be seen around names.txt", "\u00a0pansy\u200b\n\ufeffiris \u2060\n", "read", "pansy, iris")
    yield case("bullets.txt", "• pansy\n• iris\n", "refused", "take the mark before it away")
    yield case("lines of an old Macintosh.txt", names.replace("\n", "\r"), "read", "pansy, iris, daisy")
    yield case("UTF-32.txt", names.encode("utf-32"), "read", "pansy, iris, daisy")
    yield Case("class list", "a folder", Path.mkdir, "refused", "Found a folder")


ID2LABEL = '{"model_type": "vit", "id2label": {"0": "pansy", "1": "iris"}, "label2id": {"pansy": 0, "iris": 1}}'
ROWS = "pansy/0.png,pansy\niris/0.png,iris\ndaisy/0.png,daisy\n"


def _tables() -> Iterator[Case]:
    def case(name: str, content: str | bytes, outcome: Outcome, told: str = "") -> Case:
        return Case("table", name, text(content), outcome, told)

    yield case("spaces behind commas.csv", "path, label\n" + ROWS.replace(",", ", "), "read", "3 images")
    yield case("a column of numbers before.csv", ",path,label\n0,pansy/0.png,pansy\n", "read", "1 images")
    yield case("a comma at each end.csv", ("path,label\n" + ROWS).replace("\n", ",\n"), "read", "3 images")
    yield case("lines of an old Macintosh.csv", ("path,label\n" + ROWS).replace("\n", "\r"), "read", "3 images")
    yield case("numbers for labels.csv", "path,label\npansy/0.png,0\n", "refused", "Valid class names: 'pansy'")
    yield case("other names of columns.csv", "filename,class\n" + ROWS, "refused", "0 columns named 'path'")
    yield case("no first line.csv", ROWS, "refused", "Start the file with a header line")
    yield case("a row without its label.csv", "path,label\npansy/0.png\n", "refused", "line 2: no value for 'label'")
    yield case("addresses.csv", "path,label\nhttps://x.example/0.png,pansy\n", "refused", "None of the 1 image")
    yield case("annotations of COCO.csv", '{"images": [], "annotations": []}', "refused", "is JSON and no table")
    yield case("a workbook.xlsx", workbook(), "refused", "a workbook of a spreadsheet")


def _folders() -> Iterator[Case]:
    def split(folder: Path) -> None:
        album(folder / "train", 1)
        album(folder / "val", 1)

    def videos(folder: Path) -> None:
        folder.mkdir()
        (folder / "a.mov").write_bytes(b"\0\0\0\x14ftypqt  " + bytes(40))

    def broken(folder: Path) -> None:
        album(folder, 1)
        (folder / "pansy" / "pointer.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        (folder / "pansy" / "archive.jpg").write_bytes(workbook())
        (folder / "iris" / "page.jpg").write_text("<!DOCTYPE html><title>404</title>")
        (folder / "iris" / "zeros.jpg").write_bytes(bytes(500))
        (folder / "daisy" / "gone.png").symlink_to(folder / "nowhere.png")
        (folder / "daisy" / "round").symlink_to(folder)

    yield Case("folder", "of labelled images", album, "read", "9 images")
    yield Case("folder", "with a split", split, "refused", "called as classes: give that one")
    yield Case("folder", "of videos", videos, "refused", "1 .mov")
    yield Case("folder", "of which half is no image", broken, "read", "3 images; 5 set aside")
    names = {
        "": "an empty name",  # a variable that is not set
        "https://x.example/photos": "download them",
        "~/photos": "not in quotes",
        "photos/*.jpg": "patterns are not expanded",
        "-": "not read from standard input",
    }
    for name, told in names.items():
        yield Case("name for images", name, lambda path: None, "refused", told)


def made() -> list[Case]:
    """The cases that this file makes."""
    return [*_lists(), *_tables(), *_folders()]


def lying_in(folder: Path) -> list[Case]:
    """The cases of a folder. What is to become of them is not known, but no fault."""
    cases = []
    for path in sorted(folder.iterdir()):
        begin = path.name.partition("_")[0]
        kind: Kind = "class list" if begin == "classes" else "table" if begin == "labels" else "image"
        cases.append(Case(kind, path.name, text(path.read_bytes()), "read"))
    return cases


class Bench:
    """A model, photos and a place to try cases in."""

    def __init__(self, place: Path, backbone: str) -> None:
        self.place, self.backbone = place, backbone
        self.photos = album(place / "photos")
        words = ["--classes", ",".join(CLASSES), "--backbone", backbone, "--out", str(place / "run")]
        done = CliRunner().invoke(app, ["adapt", str(self.photos), *words, "--method", "cupl"])
        if done.exit_code:
            raise RuntimeError(done.output)

    def tried(self, case: Case) -> Found:
        """Run the command on a case. A traceback is a fault, and so is a refusal without a sentence."""
        # A table lies beside the photos that it lists, and nothing else does beside what is a folder.
        here = self.photos if case.kind == "table" else self.place / "brought"
        here.mkdir(exist_ok=True)
        case.make(here / case.name)
        if case.kind == "table" and case.name.startswith("labels_"):  # its photos are those of its folder
            photo().save(here / "photo.jfif", "JPEG")
        given = case.name if case.kind == "name for images" else str(here / case.name)
        words = {
            "class list": [*LIST, str(self.photos), "--classes", given, "--backbone", self.backbone],
            "table": ["evaluate", str(self.place / "run"), given],
            "image": ["predict", str(self.place / "run"), given],
            "folder": ["evaluate", str(self.place / "run"), given],
            "name for images": ["predict", str(self.place / "run"), given],
        }[case.kind]
        done = CliRunner().invoke(app, [*words, "--json", *(["--device", "cpu"] if case.kind != "class list" else [])])
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            return Found("fault", repr(done.exception))
        try:
            found = json.loads(done.stdout)
        except ValueError:
            return Found("fault", done.output)
        if "error" in found:
            told = found["error"].replace(f"{self.place}/", "")
            return Found("refused" if done.exit_code == 1 and told.endswith(".") else "fault", told)
        if "classes" in found and case.kind == "class list":
            return Found("read", ", ".join(found["classes"]))
        aside = found.get("set_aside") or []
        count = aside if isinstance(aside, int) else len(aside)
        return Found("read", f"{found['images']} images" + (f"; {count} set aside" if count else ""))


def table(results: list[tuple[Case, Found]]) -> str:
    """The results in Markdown: a count of each kind, and what was refused with its sentence."""
    lines = ["| what | tried | read | refused with a sentence | faults |", "|---|---|---|---|---|"]
    for kind in dict.fromkeys(case.kind for case, _ in results):
        counts = Counter(found.outcome for case, found in results if case.kind == kind)
        lines.append(f"| {kind} | {counts.total()} | {counts['read']} | {counts['refused']} | {counts['fault']} |")
    lines += ["", "| brought | what becomes of it |", "|---|---|"]
    for case, found in results:
        shown = {"read": f"read: {found.told}", "refused": f'"{found.told}"', "fault": f"FAULT: {found.told}"}
        lines.append(f"| {case.kind}: {case.name or 'an empty name'} | {_cell(shown[found.outcome])} |")
    return "\n".join(lines)


def _cell(told: str) -> str:
    return " ".join(told.split()).replace("|", "\\|")


def main() -> int:
    """Print the table. The exit code is 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="Further files that were brought.")
    parser.add_argument("--backbone", help="Default: the demo's.")
    arguments = parser.parse_args()
    cases = made() + (lying_in(arguments.folder) if arguments.folder else [])
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(Path(place), arguments.backbone or demo_model())
        results = [(case, bench.tried(case)) for case in cases]
    print(table(results))
    return int(any(found.outcome == "fault" for _, found in results))


if __name__ == "__main__":
    sys.exit(main())
