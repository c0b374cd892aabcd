"""Shards: what WebDataset writes we read, in its order, anywhere in the archive; what is hostile is set aside."""

import io
import os
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from conftest import CLASSES, tiny_config, write_photos
from finealign.classifier import FineAlign
from finealign.errors import ImageInputError
from finealign.images.decoding import read_image
from finealign.images.files import ImageReadError, fingerprint, open_regular
from finealign.images.listing import left_out_of, list_images
from finealign.images.paths import PathList
from finealign.images.shards import read_shard

Tiny = Callable[[str], str]


def picture(colour: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(data, "PNG")
    return data.getvalue()


def member(name: str | bytes, data: bytes = b"", **how: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(os.fsdecode(name))
    info.size = len(data)
    for key, value in how.items():
        setattr(info, key, value)
    return info, data


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", errors="surrogateescape") as written:
        for info, data in members:
            written.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards by WebDataset's own writer, a label and a description beside each picture."""
    folder = tmp_path / "shards"
    folder.mkdir()
    with webdataset.ShardWriter(f"file:{folder}/%03d.tar", maxcount=3, verbose=0) as writer:
        for number, colour in enumerate(["red", "lime", "blue", "black", "white"]):
            writer.write(
                {"__key__": f"{colour}/{number:04d}", "png": picture(colour), "cls": number, "json": {"of": colour}}
            )
    return folder


def test_list_images__are_webdatasets_samples_in_its_order(shards: Path) -> None:
    listed = list_images(shards)
    samples: list[dict[str, Any]] = []
    for shard in sorted(shards.iterdir()):
        with shard.open("rb") as file:
            members = webdataset.tariterators.tar_file_iterator(file)
            samples += webdataset.tariterators.group_by_keys({**one, "__url__": ""} for one in members)
    assert [str(path).partition(".tar/")[2] for path in listed] == [f"{one['__key__']}.png" for one in samples]
    for path, sample in zip(listed, samples, strict=True):
        with open_regular(path) as file:
            assert file.read() == sample["png"]
        assert fingerprint(path) == len(sample["png"])


def test_list_images__of_one_shard_of_a_pattern_and_beside_files(shards: Path) -> None:
    listed = list(list_images(shards))
    assert list_images(shards / "000.tar") == listed[:3]
    assert list_images(f"{shards}/{{000..001}}.tar") == listed
    assert list_images(f"{shards}/00{{1,0}}.tar") == [*listed[3:], *listed[:3]]
    (shards / "0005.png").write_bytes(picture())
    (shards / "zoo.png").write_bytes(picture())
    assert list_images(shards) == [*listed[:3], shards / "0005.png", *listed[3:], shards / "zoo.png"]
    (shards / "list.txt").write_text("001.tar/white/0004.png\nzoo.png\n")
    assert list_images(shards / "list.txt") == [listed[-1], shards / "zoo.png"]
    assert np.array(read_image(listed[-1])).min() == 255


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{000..002}.tar", "stands for 3 shards, of which 1 are not there, the first '.*002.tar'"),
        ("{000..99999999999}.tar", "more than 100,000 shards"),
        ("{000..001.tar", "Unbalanced braces"),
        ("shards.tar.gz", "no such file"),
    ],
)
def test_list_images__patterns_that_cannot_be(shards: Path, pattern: str, expected: str) -> None:
    with pytest.raises(ImageInputError, match=expected):
        list_images(shards / pattern)


def test_list_images__compressed_shards_are_refused(shards: Path) -> None:
    (shards / "all.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ImageInputError, match=r"a \.tar of images that is not compressed"):
        list_images(shards / "all.tar.gz")


def test_list_images__members_are_told_by_their_bytes_and_the_rest_is_named(tmp_path: Path) -> None:
    path = archive(
        tmp_path / "a.tar",
        member("0", picture()),
        member("0.cls", b"3"),
        member("1.jfif", picture()),
        member("1.cls", b"4"),
        member("@eaDir/2.png", picture()),
        member("masks/3.png", picture()),
    )
    for source in (path, tmp_path, f"{tmp_path}/{{a..a}}.tar"):
        listed = list_images(source, exclude=["masks"])
        assert [one.name for one in listed] == ["0", "1.jfif"]
        assert left_out_of(listed) == (
            "Left out: 2 files that are no images (2 .cls); folder a.tar/@eaDir (thumbnails of a NAS); "
            "1 excluded as asked."
        )


def test_list_images__a_shard_without_images(tmp_path: Path) -> None:
    with pytest.raises(ImageInputError, match=r"No image in .*a\.tar"):
        list_images(archive(tmp_path / "a.tar", member("a.txt", b"x")))


HOSTILE: dict[str, tuple[tuple[tarfile.TarInfo, bytes], str]] = {
    "absolute": (member("/etc/secret.png", picture()), "its name leads out of its archive"),
    "parent": (member("../secret.png", picture()), "its name leads out of its archive"),
    "parent within": (member("a/../../secret.png", picture()), "its name leads out of its archive"),
    "a zero byte": (member("\u00e4\0/secret.png", picture()), "its name leads out of its archive"),
    "symbolic link": (member("a.png", type=tarfile.SYMTYPE, linkname="../secret.png"), "not a regular file"),
    "hard link": (member("a.png", type=tarfile.LNKTYPE, linkname="/etc/secret.png"), "not a regular file"),
    "device": (member("a.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "not a regular file"),
    "pipe": (member("a.png", type=tarfile.FIFOTYPE), "not a regular file"),
    "empty": (member("a.png"), "empty file"),
    "text": (member("a.png", b"no picture"), "not an image"),
    "torn": (member("a.png", picture()[:60]), "truncated"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members__are_set_aside_and_lead_nowhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.png").write_bytes(picture("blue"))
    bad, expected = HOSTILE[name]
    path = archive(tmp_path / "inside" / "a.tar", member("first.png", picture()), bad, member("last.png", picture()))
    first, listed, last = list_images(path)
    assert read_image(first).size == read_image(last).size == (40, 30)
    assert path in listed.parents
    with pytest.raises(ImageReadError, match=expected):
        read_image(listed)
    assert sorted(one.name for one in (tmp_path / "inside").iterdir()) == ["a.tar"]  # nothing was extracted


@pytest.mark.parametrize("name", [b"\xff\xfe.png", "日本/ä.png", "line\nbreak.png", "x" * 300 + ".png", "a.b.c.PNG"])
def test_names__of_every_kind(tmp_path: Path, name: str | bytes) -> None:
    (listed,) = list_images(archive(tmp_path / "a.tar", member(name, picture())))
    assert os.fsencode(listed).endswith(os.fsencode(name))
    assert read_image(listed).size == (40, 30)


def test_names__dots_before_them_and_folders_named_as_shards(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    inner = archive(tmp_path / "x.tar" / "y.tar", member(".", type=tarfile.DIRTYPE), member("./a.png", picture()))
    assert list_images(tmp_path) == [inner / "a.png"]
    assert read_image(inner / "a.png").size == (40, 30)
    with pytest.raises(ImageReadError, match="no such file in its archive"):
        read_image(inner / "b.png")
    with pytest.raises(ImageReadError, match="no such file"):
        read_image(tmp_path / "x.tar" / "b.png")


def test_names__that_stand_twice_are_the_later_one(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", member("a.png", picture("red")), member("a.png", picture("blue")))
    (listed,) = list_images(path)
    assert read_image(listed).getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 700, 1024, 1500, 2048, 3072, 3500])
def test_cut_short__what_is_whole_is_read_and_the_archive_is_told(tmp_path: Path, size: int) -> None:
    """Three members of 1,024 bytes each, header included, and the mark of the end."""
    path = archive(tmp_path / "a.tar", *(member(f"{n}.png", picture()) for n in range(3)))
    path.write_bytes(path.read_bytes()[:size])
    whole = sum(size >= 1024 * number + 512 + len(picture()) for number in range(3))
    found: dict[str, str] = {}
    for one in list_images(path):
        try:
            read_image(one)
            found[one.name] = "read"
        except ImageReadError as error:
            found[one.name] = str(error)
    assert sum(outcome == "read" for outcome in found.values()) == whole
    if size < 3500:
        assert any("cut short" in outcome or "empty file" in outcome for outcome in found.values())


def test_damaged__in_the_middle(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", *(member(f"{n}.png", picture()) for n in range(3)))
    data = bytearray(path.read_bytes())
    data[1024:1100] = b"\xff" * 76
    path.write_bytes(data)
    assert [one.name for one in list_images(path)] == ["0.png", "a.tar"]
    with pytest.raises(ImageReadError, match="cut short or damaged after 1 members"):
        read_image(path)


@pytest.mark.parametrize("kind", ["text", "pipe"])
def test_not_an_archive(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text("no archive at all, but long enough to be looked at " * 40)
    with pytest.raises(ImageReadError, match=r"not a regular file|cut short or damaged .*after 0 members"):
        read_image(next(iter(list_images(tmp_path))))


def test_changed__is_listed_anew(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.tar", member("a.png", picture()))
    assert len(read_shard(path).files()) == 1
    archive(path, member("a.png", picture()), member("b.png", picture()), member("c.png", picture()))
    assert len(read_shard(path).files()) == 3


def test_adapt_and_predict__from_shards_as_from_files(tiny_backbone: Tiny, tmp_path: Path) -> None:
    """The same pictures in the same order: the same weights bit for bit, the same predictions."""
    photos = write_photos(tmp_path / "photos")
    paths = list_images(photos)
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as shard:
            for path in paths[8 * number : 8 * number + 8]:
                shard.add(path, path.relative_to(photos))
    models = []
    for source, cache_gb in ((photos, 1.0), (folder, 1.0), (folder, 0.0)):
        config = tiny_config(tiny_backbone("transformer"), data__cache_gb=cache_gb)
        models.append(FineAlign(CLASSES, config=config).fit(source))
    first, *others = (model.method_.state_dict() | dict(model.backbone_.norm_parameters()) for model in models)
    for other in others:
        assert all(torch.equal(value, other[name]) for name, value in first.items())
    assert np.array_equal(models[0].predict_proba(photos), models[0].predict_proba(folder))


# --- many paths -------------------------------------------------------------------------------------------------------


def test_path_list__is_a_sequence_like_a_list() -> None:
    names = ["a/b.png", "", "ä", "x\udcff.png", "a/b.png"]
    paths, plain = PathList(names), [Path(name) for name in names]
    assert paths == plain
    assert plain == paths
    assert paths == PathList(plain)
    assert list(paths) == plain
    assert paths[-1] == plain[-1]
    assert paths[1:4] == plain[1:4]
    assert paths[::-2] == plain[::-2]
    assert paths != plain[:-1]
    assert paths != "a/b.png"
    assert paths != names
    assert not PathList([])
    with pytest.raises(IndexError):
        paths[5]


def test_list_images__memory_is_that_of_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of 200,000 names that exist in a listing alone, each of 28 bytes."""
    count = 200_000

    class Entry:
        def __init__(self, number: int) -> None:
            self.name = b"observation-%011d.jpg" % (number * 7919 % count)

        def is_dir(self) -> bool:
            return False

    class Listing:
        def __enter__(self) -> Iterator[Entry]:
            return map(Entry, range(count))

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", lambda folder: Listing())
    tracemalloc.start()
    try:
        found = list_images(tmp_path)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found) == count
    assert found[5] == tmp_path / "observation-00000000005.jpg"
    name = len(os.fsencode(found[0]))
    assert kept / count < name + 8 + 4
    assert peak / count < 3 * name + 120
