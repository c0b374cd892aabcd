"""Finding, listing and decoding images, with real files."""

import contextlib
import csv
import io
import logging
import os
import re
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import HANG
from finealign.errors import ImageInputError, OutputError, display_path
from finealign.images import left_out
from finealign.images.decoding import MAX_SCANS, read_image, read_pixels
from finealign.images.files import ImageReadError
from finealign.images.listing import left_out_of, list_images
from finealign.images.prefetch import in_order
from finealign.images.tables import read_table, set_aside_csv
from finealign.run import contract
from finealign.types import SetAside
from hostile import tiff

ORIENTATION = 0x0112
KINDS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "JPEG2000", "PPM"]
HEIC = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic") + bytes(500)
same_folder = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(path: Path, size: tuple[int, int] = (4, 3), colour: str = "red") -> Path:
    return save(Image.new("RGB", size, colour), path)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(path: Path, **options: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    image = read_image(path, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(path: Path, **options: Any) -> str:
    with pytest.raises(ImageReadError) as caught:
        read_image(path, **options)
    assert path.name not in str(caught.value)
    return str(caught.value)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, data: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


@pytest.fixture(autouse=True)
def nothing_printed(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert capfd.readouterr() == ("", "")


# list_images: folders


def test_list_images__folder_is_recursive_sorted_and_stable(tmp_path: Path) -> None:
    names = [
        "b/2.PNG",
        "b/10.jpg",
        "a.jpeg",
        "a/z.gif",
        "B.bmp",
        "c d/é.webp",
        "c/x.TIF",
        "c/y.tiff",
        "c/w.jpe",
        "0.jpg",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    expected = [tmp_path / name for name in sorted(names)]
    assert list_images(tmp_path) == expected
    assert list_images(str(tmp_path)) == expected
    assert expected[:3] == [tmp_path / "0.jpg", tmp_path / "B.bmp", tmp_path / "a.jpeg"]


def test_list_images__folder_passes_over_hidden_and_other_files(tmp_path: Path) -> None:
    for name in [".x.jpg", ".git/y.jpg", "a/.z/y.png", "notes.txt", "data.csv", "jpg", "x.jpg.bak", "__MACOSX/._k.jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "k.jpg").touch()
    assert list_images(tmp_path) == [tmp_path / "folder.jpg" / "k.jpg"]


def test_list_images__hidden_root_is_listed(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.jpg").touch()
    assert list_images(tmp_path / ".cache") == [tmp_path / ".cache" / "a.jpg"]


def test_list_images__relative_folder_gives_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").touch()
    monkeypatch.chdir(tmp_path)
    assert list_images(".") == list_images("in") == [Path("in/a.jpg")]


def test_list_images__symlink_loops_end_and_no_folder_is_listed_twice(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "real" / "deep").mkdir(parents=True)
    (root / "real" / "deep" / "a.jpg").touch()
    (root / "real" / "deep" / "up").symlink_to(root)
    (root / "alias").symlink_to(root / "real")
    (root / "self").symlink_to(root / "self")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.jpg").touch()
    (root / "elsewhere").symlink_to(tmp_path / "other")
    found = list_images(root)
    assert found == [root / "elsewhere" / "b.jpg", root / "real" / "deep" / "a.jpg"]
    assert left_out_of(found) == "Left out: 1 file that is no image (1 without an ending)."  # the link to itself


def test_list_images__broken_link_is_listed_and_set_aside_later(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert list_images(tmp_path) == [tmp_path / "gone.jpg"]
    assert reason(tmp_path / "gone.jpg") == "no such file"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_list_images__name_that_is_not_utf8_survives(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(raw)).write_bytes(encode(Image.new("RGB", (2, 2), "red"), "PNG"))
    (found,) = list_images(tmp_path)
    assert os.fsencode(found) == raw
    assert read_image(found).size == (2, 2)
    assert display_path(found) == f"{tmp_path}/caf\\xe9.png"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_list_images__error_about_a_name_that_is_not_utf8_can_be_printed(tmp_path: Path) -> None:
    with pytest.raises(ImageInputError) as caught:
        list_images(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9"))
    assert "\\xe9" in str(caught.value)
    str(caught.value).encode("utf-8")


def test_list_images__empty_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(ImageInputError, match=r"No image in folder .*Left out: .*\(1 \.md\).*Wanted .*JPEG.*Check"):
        list_images(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_list_images__unreadable_subfolder_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "closed").mkdir(mode=0)
    assert left_out_of(list_images(tmp_path)) == "Left out: folder closed (permission denied)."


def test_list_images__folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").touch()
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(folder: bytes) -> Any:
        if Path(os.fsdecode(folder)).name == "closed":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    found = list_images(tmp_path)
    assert found == [tmp_path / "a.jpg"]
    assert left_out_of(found) == "Left out: folder closed (permission denied)."
    with pytest.raises(ImageInputError, match=r"closed.*permission denied.*Make it readable"):
        list_images(tmp_path / "closed")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_list_images__photos_of_a_phone_are_told_by_their_bytes(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), "red")
    data = {kind: encode(image, kind) for kind in ("JPEG", "AVIF", "JPEG2000", "PNG")}
    (tmp_path / "a.jpg").write_bytes(data["JPEG"])
    for number, (kind, name) in enumerate([("AVIF", "b.avif"), ("JPEG2000", "c.jp2"), ("JPEG", "d.JFIF")]):
        (tmp_path / name).write_bytes(data[kind] + bytes(number))
    (tmp_path / "e").write_bytes(data["JPEG"])
    (tmp_path / "f.dat").write_bytes(data["PNG"])
    (tmp_path / "g.heic").write_bytes(HEIC)
    (tmp_path / "h.unknown").write_bytes(HEIC)
    (tmp_path / "i.jxl").write_bytes(b"\xff\x0a" + bytes(90))
    for name in ("j.mov", "k.MOV", "l.json", "m", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\0\0\0\x14ftypqt  \0\0\0\0qt  ")
    os.mkfifo(tmp_path / "pipe.json")
    found = list_images(tmp_path)
    assert [path.name for path in found] == [
        "a.jpg",
        "b.avif",
        "c.jp2",
        "d.JFIF",
        "e",
        "f.dat",
        "g.heic",
        "h.unknown",
        "i.jxl",
    ]
    told = "Left out: 6 files that are no images (2 .json, 2 .mov, 1 without an ending, 1 .db)."
    assert left_out_of(found) == told


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_list_images__an_ending_of_an_image_is_enough(tmp_path: Path) -> None:
    """What such a file holds is for reading to say, which sets aside what is none."""
    endings = """.jpg .jpeg .jpe .jfif .jif .mpo .png .apng .webp .gif .bmp .dib .tif .tiff
    .avif .avifs .heic .heif .hif .jp2 .j2k .j2c .jpc .jpf .jpx .ppm .pgm .pbm .pnm"""
    for ending in endings.split():
        (tmp_path / f"torn{ending}").write_bytes(b"nothing")
    (tmp_path / "none.\udcff").write_bytes(b"nothing")
    assert sorted(path.suffix for path in list_images(tmp_path)) == sorted(endings.split())


def test_list_images__an_image_without_an_ending_alone(tmp_path: Path) -> None:
    (tmp_path / "photo").write_bytes(encode(Image.new("RGB", (4, 4)), "JPEG"))
    assert list_images(tmp_path / "photo") == [tmp_path / "photo"]


RUN_JSON = b'{"status": "complete", "identity": {"settings": "x"}}'


def test_list_images__folders_that_hold_no_photos_of_the_user(tmp_path: Path) -> None:
    assert left_out._RUN.decode() == contract.RUN and left_out._EXAMPLES.decode() == contract.EXAMPLES
    picture(tmp_path / "a.png")
    picture(tmp_path / "mine" / "b.png")
    (tmp_path / "mine" / "run.json").write_text('{"my": "own"}')
    for name in ("runs/first", "@eaDir", "sub/#recycle", "$RECYCLE.BIN", "lost+found", ".git"):
        picture(tmp_path / name / "examples" / "c.png")
    (tmp_path / "runs" / "first" / "run.json").write_bytes(RUN_JSON)
    found = list_images(tmp_path)
    assert found == [tmp_path / "a.png", tmp_path / "mine" / "b.png"]
    told = left_out_of(found)
    for name in (
        "runs/first (a run of finealign)",
        "@eaDir (thumbnails",
        "sub/#recycle (a bin)",
        "$RECYCLE.BIN (a bin)",
        "lost+found",
        "1 hidden",
        "1 file that is no image (1 .json)",
    ):
        assert name in told
    # What is given by name is listed, but for the pictures of its own run.
    assert list_images(tmp_path / "@eaDir") == [tmp_path / "@eaDir" / "examples" / "c.png"]
    picture(tmp_path / "runs" / "first" / "mine.png")
    assert list_images(tmp_path / "runs" / "first") == [tmp_path / "runs" / "first" / "mine.png"]


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ("thumbs", ["a.png", "b_mask.png", "x/d.png"]),
        ("thumbs/", ["a.png", "b_mask.png", "x/d.png"]),
        ("*_mask.png", ["a.png", "thumbs/c.png", "x/d.png", "x/thumbs/e.png"]),
        ("x/thumbs", ["a.png", "b_mask.png", "thumbs/c.png", "x/d.png"]),
        ("x/*", ["a.png", "b_mask.png", "thumbs/c.png"]),
        ("[ab]*", ["thumbs/c.png", "x/d.png", "x/thumbs/e.png"]),
    ],
)
def test_list_images__excluded(tmp_path: Path, pattern: str, kept: list[str]) -> None:
    names = ["a.png", "b_mask.png", "thumbs/c.png", "x/d.png", "x/thumbs/e.png"]
    for name in names:
        picture(tmp_path / name)
    found = list_images(tmp_path, exclude=[pattern])
    assert found == [tmp_path / name for name in kept]
    assert re.fullmatch(r"Left out: [12] excluded as asked\.", left_out_of(found))
    (tmp_path / "list.txt").write_text("\n".join(names))
    assert list_images(tmp_path / "list.txt", exclude=[pattern]) == found
    with pytest.raises(ImageInputError, match=r"No image in folder.*excluded as asked"):
        list_images(tmp_path, exclude=["*"])


# list_images: files and sequences


def test_list_images__single_image_is_itself(tmp_path: Path) -> None:
    path = picture(tmp_path / "one.JPG")
    assert list_images(path) == [path]
    assert list_images(str(path)) == [path]


def test_list_images__sequence_is_taken_as_given(tmp_path: Path) -> None:
    given_paths: list[str | Path] = [tmp_path / "b.xyz", str(tmp_path / "a.jpg"), tmp_path / "b.xyz"]
    assert list_images(given_paths) == [tmp_path / "b.xyz", tmp_path / "a.jpg", tmp_path / "b.xyz"]


def test_list_images__empty_sequence() -> None:
    with pytest.raises(ImageInputError, match="empty"):
        list_images([])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_list_images__text_list(tmp_path: Path, encoding: str, newline: str) -> None:
    lines = ["", "# a comment", "sub/a b.jpg", "   ", "/abs/é.png  ", "missing.jpg", "odd\u2028name.jpg"]
    (tmp_path / "list.TXT").write_bytes(newline.join(lines).encode(encoding))
    assert list_images(tmp_path / "list.TXT") == [
        tmp_path / "sub" / "a b.jpg",
        Path("/abs/é.png"),
        tmp_path / "missing.jpg",
        tmp_path / "odd\u2028name.jpg",
    ]


def test_list_images__csv_reads_path_and_never_the_label(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('\ufefflabel, path ,k\ncat,a.jpg,1\n\ndog,"b,c.jpg",2\n', encoding="utf-8")
    assert list_images(tmp_path / "list.csv") == [tmp_path / "a.jpg", tmp_path / "b,c.jpg"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.csv", b"file,label\na.jpg,cat\n", r"0 columns named 'path'.*'file,label'.*header"),
        ("l.csv", b"path|label\na.jpg|cat\n", r"'path.label'.*commas, semicolons or tabs"),
        ("l.csv", b"path,path\na.jpg,b.jpg\n", r"2 columns named 'path'"),
        ("l.csv", b"path,label\n", r"lists no images.*below the header"),
        ("l.csv", b"", r"empty file"),
        ("l.csv", b"path\na.jpg\nb\xff.jpg\n", r"line 3: not UTF-8 text.*Save"),
        ("l.txt", b"", r"empty file"),
        ("l.txt", b"# nothing\n\n", r"lists no images.*one path a line"),
        ("l.txt", b"a.jpg\n\xe9.jpg\n", r"line 2: not UTF-8 text.*Save"),
        ("l.txt", "a.jpg\n".encode("utf-16")[:-1], r"not UTF-16 text"),
        ("l.json", b"[]", r"suffix '.json'.*Wanted a folder.*Rename"),
        ("l", b"a.jpg", r"suffix ''"),
    ],
)
def test_list_images__lists_that_are_not(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageInputError, match=message):
        list_images(tmp_path / name)


@pytest.mark.parametrize("name", ["gone", "gone.jpg", "gone.txt", "gone.csv", "a\0b", "x" * 300])
def test_list_images__source_that_does_not_exist(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageInputError, match=r"Cannot open .*Give a folder"):
        list_images(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["pipe.jpg", "pipe.txt", "pipe.csv"])
def test_list_images__pipe_is_refused_unopened(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ImageInputError, match="neither a folder nor a regular file"):
        list_images(tmp_path / name)


name_text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda name: name.strip() == name and not name.startswith("#")
)


@same_folder
@given(names=st.lists(name_text, min_size=1))
def test_list_images__any_names_come_back_from_text_and_csv(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "list.txt").write_text("\n".join(names), encoding="utf-8")
    with (tmp_path / "list.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["path"], *([name] for name in names)])
    expected = [tmp_path / name for name in names]
    assert list_images(tmp_path / "list.txt") == expected
    assert list_images(tmp_path / "list.csv") == expected


# read_table


def test_read_table__returns_the_wanted_columns_only(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("label,path,secret\n cat ,a.jpg,1\ndog,b.jpg,\n")
    assert read_table(tmp_path / "t.csv", ["path", "label"]) == [
        {"path": "a.jpg", "label": "cat"},
        {"path": "b.jpg", "label": "dog"},
    ]


def test_read_table__header_alone_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path\n")
    assert read_table(tmp_path / "t.csv", ["path"]) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,label\na.jpg,cat\nb.jpg\n", r"line 3: no value for 'label'"),
        ("path,label\na.jpg,cat\n\n\n,dog\n", r"line 5: no value for 'path'"),
        ("path,label\na,b.jpg,cat\n", r"line 2: more values than the 2 columns.*Quote"),
        ('path,label\na.jpg,cat\n"b.jpg,cat\nc.jpg,cat\n', r"line 3: unexpected end of data.*quotes"),
        ('path,label\n"a"b.jpg,cat\n', r"line 2: .*expected"),
        ("path\na.jpg\n", r"0 columns named 'label'"),
    ],
)
def test_read_table__errors_name_the_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(ImageInputError, match=message):
        read_table(tmp_path / "t.csv", ["path", "label"])


def test_read_table__missing_file(tmp_path: Path) -> None:
    with pytest.raises(ImageInputError, match=r"no such file.*Give"):
        read_table(tmp_path / "t.csv", ["path"])


# read_image: what comes out


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.webp"])
def test_read_image__lossless_formats_are_exact(tmp_path: Path, name: str) -> None:
    image = noise(5, 7)
    options = {"lossless": True} if name == "a.webp" else {}
    assert (pixels(save(image, tmp_path / name, **options)) == np.asarray(image)).all()


def test_read_image__decodes_by_content_not_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(noise(3, 4), "PNG"))
    assert (pixels(tmp_path / "a.jpg") == np.asarray(noise(3, 4))).all()


@pytest.mark.parametrize(
    ("orientation", "where"),
    [(1, "NW"), (2, "NE"), (3, "SE"), (4, "SW"), (5, "NW"), (6, "NE"), (7, "SE"), (8, "SW")],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_read_image__exif_orientation(tmp_path: Path, kind: str, orientation: int, where: str) -> None:
    image = Image.new("RGB", (48, 32), "blue")
    image.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    (tmp_path / "a").write_bytes(encode(image, kind, exif=exif))

    upright = read_image(tmp_path / "a")
    assert upright.size == ((48, 32) if orientation < 5 else (32, 48))
    x, y = 4 if "W" in where else upright.width - 5, 4 if "N" in where else upright.height - 5
    marked = [
        corner
        for corner in [(4, 4), (upright.width - 5, 4), (4, upright.height - 5), (upright.width - 5, upright.height - 5)]
        if np.asarray(upright)[corner[1], corner[0], 0] > 128
    ]
    assert marked == [(x, y)]


def test_read_image__result_cannot_be_rotated_again(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    image = read_image(save(Image.new("RGB", (4, 2)), tmp_path / "a.jpg", exif=exif))
    assert image.info == {}
    assert dict(image.getexif()) == {}


@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0", (4, 2)),
        (b"Exif\0\0junkjunk", (4, 2)),
        (b"Exif\0\0", (4, 2)),
        (b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0", (4, 2)),
        (b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\0\0\0\x01\0\x06\0\0", (2, 4)),
    ],
    ids=["cut", "junk", "bare", "orientation_99", "cut_after_orientation"],
)
def test_read_image__broken_exif_is_tolerated(tmp_path: Path, exif: bytes, size: tuple[int, int]) -> None:
    assert read_image(save(Image.new("RGB", (4, 2), "red"), tmp_path / "a.jpg", exif=exif)).size == size


def test_read_image__exif_that_cannot_be_parsed_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = picture(tmp_path / "a.png")

    def fail(self: Image.Image) -> Image.Exif:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert (pixels(path) == (255, 0, 0)).all()


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_read_image__alpha_lies_on_white(tmp_path: Path, name: str) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 51)])
    options = {"lossless": True, "exact": True} if name == "a.webp" else {}
    assert pixels(save(image, tmp_path / name, **options)).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]


def test_read_image__grey_alpha_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("LA", (3, 1))
    image.putdata([(7, 255), (7, 0), (0, 51)])
    assert pixels(save(image, tmp_path / "a.png"))[0, :, 1].tolist() == [7, 255, 204]


def test_read_image__palette_with_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 0, 0])
    image.putdata([0, 1, 2])
    path = save(image, tmp_path / "a.png", transparency=bytes([255, 0, 51]))
    assert pixels(path).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    path = save(image, tmp_path / "b.gif", transparency=1)
    assert pixels(path).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 0]]]
    path = save(image, tmp_path / "c.png")
    assert pixels(path).tolist() == [[[255, 0, 0], [0, 0, 255], [0, 0, 0]]]


def test_read_image__transparent_colour_key_is_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (4, 5, 6)])
    assert pixels(save(image, tmp_path / "a.png", transparency=(1, 2, 3))).tolist() == [[[255] * 3, [4, 5, 6]]]


def test_read_image__cmyk_red_stays_red(tmp_path: Path) -> None:
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    for name in ["a.jpg", "a.tif"]:
        r, g, b = pixels(save(red, tmp_path / name))[4, 4].tolist()
        assert r > 230 and g < 25 and b < 25, name


def test_read_image__adobe_inverted_cmyk_red_stays_red(tmp_path: Path) -> None:
    data = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert b"Adobe" in data  # so it is stored inverted, and undone on reading
    with Image.open(io.BytesIO(data)) as stored:
        assert stored.getpixel((4, 4)) == pytest.approx((0, 255, 255, 0), abs=3)
    (tmp_path / "a.jpg").write_bytes(data)
    assert pixels(tmp_path / "a.jpg")[4, 4].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_read_image__one_bit(tmp_path: Path) -> None:
    image = Image.new("1", (2, 1))
    image.putdata([0, 255])
    for name in ["a.png", "a.tif", "a.bmp"]:
        assert pixels(save(image, tmp_path / name)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_read_image__sixteen_bit_grey_keeps_the_high_byte(tmp_path: Path, name: str) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = save(Image.fromarray(ramp), tmp_path / name)
    assert (pixels(path) == (ramp >> 8)[..., None]).all()


def test_read_image__big_endian_sixteen_bit_grey(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 257, dtype=">u2").reshape(16, 16)
    image = Image.frombytes("I;16B", (16, 16), ramp.tobytes())
    assert (pixels(save(image, tmp_path / "a.tif"))[..., 0] == np.arange(256).reshape(16, 16)).all()


def test_read_image__thirty_two_bit_grey(tmp_path: Path) -> None:
    within = np.array([[0, 255, 256, 65535]], dtype=np.int32)
    assert pixels(save(Image.fromarray(within), tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 0, 1, 255]
    beyond = np.array([[-1000, 0, 1000]], dtype=np.int32)
    assert pixels(save(Image.fromarray(beyond), tmp_path / "b.tif"))[0, :, 0].tolist() == [0, 128, 255]


def test_read_image__sixteen_bit_colour_keeps_the_high_byte(tmp_path: Path) -> None:
    data = b"\0" + struct.pack(">6H", 0, 0x1234, 0xFFFF, 0x00FF, 0x0100, 0x8000)
    (tmp_path / "a.png").write_bytes(png(2, 1, 16, 2, data))
    assert pixels(tmp_path / "a.png").tolist() == [[[0, 0x12, 0xFF], [0, 1, 0x80]]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.2, 1.0], [0, 51, 255]),
        ([0.2, 0.2, 0.4], [51, 51, 102]),
        ([-1.0, 0.0, 3.0], [0, 64, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 100.0, 1000.0], [0, 26, 255]),
        ([5.0, 5.0, 5.0], [0, 0, 0]),
    ],
)
def test_read_image__float(tmp_path: Path, values: list[float], expected: list[int]) -> None:
    path = save(Image.fromarray(np.array([values], dtype=np.float32)), tmp_path / "a.tif")
    assert pixels(path)[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_read_image__float_that_is_not_finite(tmp_path: Path, bad: float) -> None:
    path = save(Image.fromarray(np.array([[0.0, bad]], dtype=np.float32)), tmp_path / "a.tif")
    assert reason(path) == "pixel values that are not finite"


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_read_image__first_frame_of_an_animation(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if name == "a.webp" else {}
    path = save(frames[0], tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert (pixels(path) == (255, 0, 0)).all()


def test_read_image__first_picture_of_a_multi_picture_jpeg(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    (tmp_path / "a.jpg").write_bytes(encode(frames[0], "MPO", save_all=True, append_images=frames[1:]))
    assert pixels(tmp_path / "a.jpg")[8, 8].tolist() == pytest.approx([255, 0, 0], abs=5)


# read_image: what is refused


def scans(data: bytes, number: int) -> bytes:
    """A progressive JPEG with its last scan as often as wanted."""
    start = data.rindex(b"\xff\xda")
    assert data.endswith(b"\xff\xd9")
    return data[:start] + data[start:-2] * number + data[-2:]


def test_read_image__a_jpeg_of_very_many_scans_is_refused_undecoded(tmp_path: Path) -> None:
    data = encode(noise(40, 60), "JPEG", progressive=True)
    few = data.count(b"\xff\xda")
    path = tmp_path / "photo.jpg"
    path.write_bytes(scans(data, MAX_SCANS - few + 1))
    assert read_image(path).size == (60, 40)
    path.write_bytes(scans(data, MAX_SCANS - few + 2))
    assert reason(path) == "a JPEG of more than 100 scans"


def test_read_image__scans_of_a_thumbnail_and_of_further_pictures_do_not_count(tmp_path: Path) -> None:
    data, path = encode(noise(40, 60), "JPEG", progressive=True), tmp_path / "photo.jpg"
    comment = b"\xff\xfe" + (2 + 2 * 500).to_bytes(2, "big") + b"\xff\xda" * 500
    path.write_bytes(data[:2] + comment + data[2:] + data * 50)
    assert read_image(path).size == (60, 40)


def test_read_image__zero_bytes(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    assert reason(tmp_path / "a.jpg") == "empty file"


def test_read_image__text_named_jpg(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("<!DOCTYPE html><title>404</title>")
    assert reason(tmp_path / "a.jpg") == "not an image"


@pytest.mark.parametrize(
    ("kind", "said"), [("EPS", "a PostScript document"), ("PDF", "a PDF document"), ("ICO", "an icon")]
)
def test_read_image__other_formats_never_reach_their_decoders(tmp_path: Path, kind: str, said: str) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(Image.new("RGB", (16, 16)), kind))
    assert reason(tmp_path / "a.jpg") == f"{said}, which is not supported; save it as JPEG or PNG"


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "PPM", "TIFF", "JPEG"])
@pytest.mark.parametrize("name", ["a", "a.jpg", "a.heic"])
def test_read_image__by_its_bytes_whatever_its_name(tmp_path: Path, kind: str, name: str) -> None:
    image = Image.new("RGB", (40, 30), (200, 40, 40))
    (tmp_path / name).write_bytes(encode(image, kind))
    assert pixels(tmp_path / name)[15, 20].tolist() == pytest.approx([200, 40, 40], abs=6)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (HEIC, r"a HEIC image, for which a package is missing: pip install 'finealign\[heic\]'"),
        (b"\xff\x0a" + bytes(90), "a JPEG XL image, which is not supported.*"),
        (b"8BPS" + bytes(90), "a Photoshop file, which is not supported.*"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(90), "a camera's raw image, which is not supported.*"),
        (struct.pack(">I4s4sI4s", 20, b"ftyp", b"qt  ", 0, b"qt  "), "a video, which is not supported.*"),
        (b'<?xml version="1.0"?><svg>', "an SVG drawing, which is not supported.*"),
        (b"v/1\x01" + bytes(90), "an OpenEXR image, which is not supported.*"),
        (b"#?RADIANCE\n" + bytes(90), "a Radiance HDR image, which is not supported.*"),
        (b"\0\0\x01\0" + bytes(90), "an icon, which is not supported.*"),
        (b"%PDF-1.7" + bytes(90), "a PDF document, which is not supported.*"),
        (b"%!PS-Adobe-3.0" + bytes(90), "a PostScript document, which is not supported.*"),
        (b"SIMPLE  =" + bytes(90), "a FITS file, which is not supported.*"),
    ],
)
def test_read_image__what_is_not_read_is_called_what_it_is(
    tmp_path: Path, data: bytes, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finealign.images.decoding.heif_decoder", lambda: None)
    (tmp_path / "a.jpg").write_bytes(data)
    assert re.fullmatch(said, reason(tmp_path / "a.jpg"))


def test_list_images__a_list_with_the_backslashes_of_windows(tmp_path: Path) -> None:
    (tmp_path / "birds" / "wrens").mkdir(parents=True)
    for name in ("birds/wrens/a.png", "birds/b.png", "odd\\name.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "list.txt").write_text("birds\\wrens\\a.png\r\nbirds/b.png\r\nodd\\name.png\r\nno\\file.png\r\n")
    below = ["birds/wrens/a.png", "birds/b.png", "odd\\name.png", "no\\file.png"]
    assert list(list_images(tmp_path / "list.txt")) == [tmp_path / name for name in below]
    assert list(list_images(tmp_path / "list.txt", exclude=["wrens"])) == [tmp_path / name for name in below[1:]]


def test_read_image__heic_by_pillow_heif(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="needs the extra heic")
    image = Image.new("RGB", (64, 48), (200, 40, 40))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    heif.from_pillow(image).save(tmp_path / "a.jpg", exif=exif.tobytes(), quality=95)
    found = read_image(tmp_path / "a.jpg")
    assert found.size == (48, 64)
    assert found.getpixel((20, 20)) == pytest.approx((200, 40, 40), abs=6)
    (tmp_path / "b.jpg").write_bytes(HEIC)
    assert reason(tmp_path / "b.jpg") == "damaged or truncated file"


# read_image: what every viewer shows


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt", b"iCCP"])
@pytest.mark.parametrize("behind", [False, True])
def test_read_image__a_png_with_megabytes_of_text(tmp_path: Path, kind: bytes, behind: bool) -> None:
    text = b"a" * 3_000_000
    squeezed = zlib.compress(text)
    body = {b"tEXt": b"a\0" + text, b"iTXt": b"a\0\1\0\0\0" + squeezed}.get(kind, b"a\0\0" + squeezed)
    whole = encode(noise(24, 32), "PNG")
    place = whole.index(b"IEND") - 4 if behind else 33
    texts = png_chunk(kind, body) * (30 if kind == b"tEXt" else 1)
    (tmp_path / "a.png").write_bytes(whole[:place] + texts + whole[place:])
    assert (pixels(tmp_path / "a.png") == np.asarray(noise(24, 32))).all()
    (tmp_path / "a.png").write_bytes((whole[:place] + texts + whole[place:])[:200])
    assert reason(tmp_path / "a.png")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("lost", [1, 2])
def test_read_image__a_jpeg_without_its_end_mark(tmp_path: Path, progressive: bool, grey: bool, lost: int) -> None:
    image = noise(100, 70).convert("L") if grey else noise(100, 70)
    whole = encode(image, "JPEG", progressive=progressive)
    (tmp_path / "a.jpg").write_bytes(whole)
    expected = pixels(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(whole[:-lost])
    assert (pixels(tmp_path / "a.jpg") == expected).all()


@pytest.mark.parametrize("restart", [0, 1])
def test_read_image__a_jpeg_that_lacks_a_pixel_is_set_aside(tmp_path: Path, restart: int) -> None:
    options = {"restart_marker_rows": restart} if restart else {}
    for image in (noise(40, 50), Image.new("RGB", (400, 400), "white"), Image.new("L", (400, 400), 128)):
        whole = encode(image, "JPEG", **options)
        for length in {len(whole) * percent // 100 for percent in (60, 80, 90, 95, 98)} | {len(whole) - 5}:
            (tmp_path / "a.jpg").write_bytes(whole[:length])
            assert reason(tmp_path / "a.jpg") in ("truncated file", "damaged or truncated file")


def test_read_image__a_progressive_jpeg_without_its_last_scans_is_set_aside(tmp_path: Path) -> None:
    whole = encode(noise(40, 50), "JPEG", progressive=True)
    starts = [place for place in range(len(whole)) if whole[place : place + 2] == b"\xff\xda"]
    for start in starts:
        (tmp_path / "a.jpg").write_bytes(whole[:start])
        assert reason(tmp_path / "a.jpg") in ("truncated file", "damaged or truncated file")


def test_read_image__missing(tmp_path: Path) -> None:
    assert reason(tmp_path / "a.jpg") == "no such file"


def test_read_image__name_with_a_null_byte(tmp_path: Path) -> None:
    assert reason(tmp_path / "a\0.jpg") == "not a usable file name"


def test_read_image__link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(tmp_path / "a.jpg")
    assert "symbolic links" in reason(tmp_path / "a.jpg")


def test_read_image__folder(tmp_path: Path) -> None:
    assert reason(tmp_path) == "not a regular file"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_read_image__pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    assert reason(tmp_path / "a.jpg") == "not a regular file"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_read_image__unreadable(tmp_path: Path) -> None:
    picture(tmp_path / "a.png").chmod(0)
    assert reason(tmp_path / "a.png") == "permission denied"


def test_read_image__permission_denied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, mode: str) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    path = picture(tmp_path / "a.png")
    monkeypatch.setattr(Path, "open", refuse)
    assert reason(path) == "permission denied"


def test_read_image__bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(60000, 60000, 8, 2, b""))
    assert reason(tmp_path / "a.png") == "60000 x 60000 pixels, over the limit of 200,000,000"


def test_read_image__limit_is_ours_and_not_the_one_pillow_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = picture(tmp_path / "a.png", (8, 4))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_image(path, max_pixels=32).size == (8, 4)
    assert reason(path, max_pixels=31) == "8 x 4 pixels, over the limit of 31"
    assert Image.MAX_IMAGE_PIXELS == 10


def test_read_image__bomb_that_only_the_plugin_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(Image.new("RGB", (8, 8)), tmp_path / "a.webp")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert reason(path) == "more pixels than Pillow allows"


def test_read_image__out_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(self: Image.Image, *args: object) -> Image.Image:
        raise MemoryError

    path = picture(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", exhaust)
    assert reason(path) == "not enough memory to decode it"


@pytest.mark.parametrize(
    ("kind", "options", "spare"),
    [
        ("JPEG", {}, 2),  # the end mark
        ("JPEG", {"progressive": True}, 2),
        ("PNG", {}, 20),  # IEND, the checksum of IDAT, and that of the compressed stream
        ("GIF", {}, 2),  # the block terminator and the trailer
        ("BMP", {}, 0),
        ("WEBP", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("AVIF", {}, 0),
        ("JPEG2000", {}, 0),
        ("PPM", {}, 0),
    ],
)
def test_read_image__truncated_file_is_refused_wherever_it_is_cut(
    tmp_path: Path, kind: str, options: dict[str, Any], spare: int
) -> None:
    data = encode(noise(24, 32), kind, **options)
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    whole = pixels(path)
    for length in sorted({*range(1, len(data), 23), *range(len(data) - 30, len(data))}):
        path.write_bytes(data[:length])
        if length >= len(data) - spare:  # every pixel is there
            assert (pixels(path) == whole).all()
        else:
            assert reason(path) in {"truncated file", "damaged or truncated file", "not an image"}


def test_read_image__half_a_jpeg_is_called_truncated(tmp_path: Path) -> None:
    data = encode(noise(24, 32), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data[: len(data) * 3 // 4])
    assert reason(tmp_path / "a.jpg") == "truncated file"


@same_folder
@given(data=st.binary(max_size=200), magic=st.sampled_from(["", *KINDS]))
def test_read_image__garbage_raises_nothing_else(tmp_path: Path, data: bytes, magic: str) -> None:
    head = encode(Image.new("RGB", (2, 2)), magic)[:16] if magic else b""
    (tmp_path / "a.jpg").write_bytes(head + data)
    with contextlib.suppress(ImageReadError):
        assert read_image(tmp_path / "a.jpg").mode == "RGB"


@same_folder
@given(where=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), kind=st.sampled_from(["PNG", "GIF", "BMP"]))
def test_read_image__one_wrong_byte_raises_nothing_else(tmp_path: Path, where: float, byte: int, kind: str) -> None:
    data = bytearray(encode(noise(6, 7), kind))
    data[int(where * len(data))] = byte
    (tmp_path / "a.jpg").write_bytes(data)
    with contextlib.suppress(ImageReadError):
        assert read_image(tmp_path / "a.jpg", max_pixels=10_000).mode == "RGB"


# read_image: quiet, and leaving nothing behind


def broken_exif(path: Path) -> Path:
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0"
    save(Image.new("RGB", (4, 2)), path, exif=exif)
    with pytest.warns(UserWarning, match="Corrupt EXIF"), Image.open(path):
        pass
    return path


def test_read_image__pillow_warnings_stay_inside(tmp_path: Path) -> None:
    path = broken_exif(tmp_path / "a.jpg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        read_image(path)
        assert list(warnings.filters) == before
    with pytest.warns(UserWarning, match="Corrupt EXIF"), Image.open(path):
        pass


def test_read_image__pillow_log_stays_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger, last_resort = logging.getLogger("PIL"), io.StringIO()
    monkeypatch.setattr(logging, "lastResort", logging.StreamHandler(last_resort))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logging.getLogger("PIL.TiffImagePlugin").error("heard")
    before, load = list(logger.handlers), Image.Image.getexif

    def log(self: Image.Image) -> Image.Exif:
        logging.getLogger("PIL.TiffImagePlugin").error("not heard")
        return load(self)

    monkeypatch.setattr(Image.Image, "getexif", log)
    read_image(picture(tmp_path / "a.png"))
    assert last_resort.getvalue() == "heard\n"
    assert logger.handlers == before


def test_read_image__warnings_of_others_are_heard_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, getexif = picture(tmp_path / "a.png"), Image.Image.getexif

    def warn(self: Image.Image) -> Image.Exif:
        warnings.warn("mine", stacklevel=1)
        return getexif(self)

    monkeypatch.setattr(Image.Image, "getexif", warn)
    with pytest.warns(UserWarning, match="mine"):
        read_image(path)


def test_read_image__threads_leave_the_warning_filters_as_they_were(tmp_path: Path) -> None:
    paths = [broken_exif(tmp_path / "a.jpg"), picture(tmp_path / "b.png"), tmp_path / "gone.jpg"] * 30
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        before = list(warnings.filters)
        assert len(list(in_order(read_image, paths, threads=8))) == 90
        assert list(warnings.filters) == before
    assert heard == []


def test_read_image__file_is_closed_and_can_be_deleted(tmp_path: Path) -> None:
    listing = Path("/proc/self/fd")
    if not listing.is_dir():
        pytest.skip("no /proc here")

    def descriptors() -> int:
        return len(list(listing.iterdir()))

    frames = [Image.new("RGB", (6, 5), colour) for colour in ("red", "blue")]
    good = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    before = descriptors()
    kept = read_image(good)
    reason(tmp_path / "bad.jpg")
    assert descriptors() == before
    good.unlink()
    assert kept.getpixel((0, 0)) == (255, 0, 0)


# in_order


def test_in_order__keeps_order_and_sets_aside(tmp_path: Path) -> None:
    paths = [picture(tmp_path / f"{i}.png", (i + 1, 1)) for i in range(20)]
    paths[7].write_text("not a picture")
    paths.append(tmp_path / "gone.png")
    results = list(in_order(read_image, paths, threads=4))
    assert [path for path, _ in results] == paths
    for i, (path, result) in enumerate(results):
        if i == 7:
            assert result == SetAside(str(path), "not an image")
        elif i == 20:
            assert result == SetAside(str(path), "no such file")
        else:
            assert isinstance(result, Image.Image) and result.size == (i + 1, 1)


def test_in_order__passes_the_limit_on(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", (4, 3))
    ((_, result),) = in_order(partial(read_image, max_pixels=11), [path])
    assert result == SetAside(str(path), "4 x 3 pixels, over the limit of 11")


def test_in_order__looks_ahead_no_further_than_two_a_thread(tmp_path: Path) -> None:
    taken, path = 0, picture(tmp_path / "a.png")

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield path

    stream = in_order(read_image, endless(), threads=3)
    assert taken == 0
    for done in range(1, 30):
        next(stream)
        assert taken <= done - 1 + 6


def test_in_order__stopping_early_leaves_no_threads(tmp_path: Path) -> None:
    before = threading.active_count()
    stream = in_order(read_image, [picture(tmp_path / "a.png")] * 50, threads=4)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_in_order__stopping_early_reads_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    read, go_on = [], threading.Event()

    def wait(path: Path, **options: Any) -> Image.Image:
        read.append(path.name)
        if path.name != "0":
            go_on.wait(HANG)
        return Image.new("RGB", (1, 1))

    stream = in_order(wait, [Path(str(i)) for i in range(9)], threads=2)
    next(stream)
    timer = threading.Timer(0.1, go_on.set)
    timer.start()
    stream.close()
    timer.join()
    assert set(read) <= {"0", "1", "2"}  # "3" was queued behind the two that wait


def test_in_order__no_paths() -> None:
    assert list(in_order(read_image, [])) == []


def test_in_order__other_errors_are_not_swallowed() -> None:
    with pytest.raises(AttributeError):
        list(in_order(read_image, ["a string, not a path"]))  # type: ignore[type-var, arg-type]


# read_pixels


def test_read_pixels__are_writable_bytes_in_rows(tmp_path: Path) -> None:
    image = noise(5, 7)
    found = read_pixels(save(image, tmp_path / "a.png"), shorter_side=8)
    assert type(found) is np.ndarray and found.shape == (5, 7, 3) and found.dtype == np.uint8 and found.flags.writeable
    assert (found == np.asarray(image)).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((40, 20), (16, 8)), ((20, 40), (8, 16)), ((30, 9), (27, 8)), ((8, 50), (8, 50)), ((7, 50), (7, 50))],
)
def test_read_pixels__reduces_the_shorter_side_and_never_enlarges(
    tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert read_pixels(picture(tmp_path / "a.png", size), shorter_side=8).shape == (expected[1], expected[0], 3)


def test_read_pixels__reduces_as_pillow_does(tmp_path: Path) -> None:
    image = noise(60, 90)
    expected = image.resize((12, 8), Image.Resampling.BICUBIC, reducing_gap=3.0)
    assert (read_pixels(save(image, tmp_path / "a.png"), shorter_side=8) == np.asarray(expected)).all()


@same_folder
@given(width=st.integers(1, 60), height=st.integers(1, 60), side=st.integers(1, 30))
def test_read_pixels__sizes(tmp_path: Path, width: int, height: int, side: int) -> None:
    new_height, new_width, _ = read_pixels(picture(tmp_path / "a.bmp", (width, height)), shorter_side=side).shape
    assert min(new_height, new_width) == min(side, width, height)
    if min(width, height) > side:
        assert abs(new_width * height - new_height * width) <= max(width, height) / 2 + 1e-9
    else:
        assert (new_width, new_height) == (width, height)


def test_read_pixels__refuses_what_read_image_refuses(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", (4, 3))
    with pytest.raises(ImageReadError, match=r"^4 x 3 pixels, over the limit of 11$"):
        read_pixels(path, shorter_side=8, max_pixels=11)
    with pytest.raises(ImageReadError, match=r"^no such file$"):
        read_pixels(tmp_path / "gone.png", shorter_side=8)


# display_path and set_aside_csv


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("a/é.jpg", "a/é.jpg"),
        (Path("a/b.jpg"), "a/b.jpg"),
        (os.fsdecode(b"a/\xff\xc3.jpg"), "a/\\xff\\xc3.jpg"),
        ("a/\ud800.jpg", "a/\\ud800.jpg"),
    ],
)
def test_display_path__examples(path: str | Path, shown: str) -> None:
    assert display_path(path) == shown


@given(st.binary().filter(lambda raw: 0 not in raw))
def test_display_path__any_name_can_be_written(raw: bytes) -> None:
    shown = display_path(os.fsdecode(raw))
    shown.encode("utf-8")
    with contextlib.suppress(UnicodeDecodeError):
        assert shown == raw.decode("utf-8")


def test_set_aside_csv__exact(tmp_path: Path) -> None:
    rows = [SetAside("a,b.jpg", "not an image"), SetAside("é\nx.jpg", 'so-called "image"'), SetAside("\udce9.jpg", "r")]
    set_aside_csv(rows, tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_bytes().decode("utf-8") == (
        'path,reason\n"a,b.jpg",not an image\n"é\nx.jpg","so-called ""image"""\n\\udce9.jpg,r\n'
    )


def test_set_aside_csv__no_rows_is_a_header(tmp_path: Path) -> None:
    set_aside_csv([], tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_text() == "path,reason\n"


def test_set_aside_csv__can_be_read_as_a_table(tmp_path: Path) -> None:
    rows = [SetAside("a.jpg", "truncated file"), SetAside("b.jpg", "empty file")]
    set_aside_csv(rows, tmp_path / "s.csv")
    assert [SetAside(**row) for row in read_table(tmp_path / "s.csv", ["path", "reason"])] == rows


def test_set_aside_csv__place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"s\.csv.*no such file.*Choose"):
        set_aside_csv([], tmp_path / "gone" / "s.csv")


@pytest.mark.parametrize(("width", "height", "reason"), [(2, 2, "not supported"), (0, 2, "damaged"), (2, 0, "damaged")])
def test_read_image__a_tiff_without_pixels_is_damaged_whatever_its_kind(
    tmp_path: Path, width: int, height: int, reason: str
) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(width, height, b"some data", compression=34_661))
    with pytest.raises(ImageReadError, match=reason):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("source", "guess"),
    [
        ("https://example.org/a.jpg", "it is an address"),
        ("~nobody-of-this-name/photos", "a shell replaces ~"),
        ("photos/*.jpg", "patterns are not expanded"),
        ("photos/?.jpg", "patterns are not expanded"),
        ("-", "not read from standard input"),
        ("photos", None),
    ],
)
def test_list_images__why_nothing_is_there_is_guessed_from_the_name(source: str, guess: str | None) -> None:
    with pytest.raises(ImageInputError, match="no such file") as caught:
        list_images(source)
    guesses = ("is an address", "a shell replaces", "patterns are not", "standard input")
    assert [each for each in guesses if each in str(caught.value)] == [
        each for each in guesses if each in (guess or "")
    ]
