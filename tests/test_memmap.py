"""Tensors on disk: what is filled in is what is read, by safetensors too; a file is whole or not there."""

import errno
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from finealign.errors import OutputError
from finealign.training.memmap import MemmapTensors, read_memmap

SHAPES: list[dict[str, tuple[int, ...]]] = [
    {"weak": (5, 8), "crops": (5, 3, 8)},
    {"weak": (5, 8), "crops": (5, 0, 8)},  # a method that looks at no crops
    {"weak": (0, 8), "crops": (0, 0, 8)},
    {"strong": (2, 3, 4)},
    {"a": (1,), "bb": (3,), "ccc": (1, 1, 1, 1), "dddd": (5000,)},
    {"crops": (7, 0, 2), "weak": (7, 3)},  # the empty one first
    {},
]
over_shapes = pytest.mark.parametrize("shapes", SHAPES, ids=str)


def values(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def filled(path: Path, wanted: Mapping[str, Tensor]) -> MemmapTensors:
    made = MemmapTensors(path, {name: tuple(value.shape) for name, value in wanted.items()})
    for name, value in wanted.items():
        made.tensors[name][:] = value
    return made


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    assert found.keys() == wanted.keys()
    assert all(found[name].shape == value.shape for name, value in wanted.items())
    assert {value.dtype for value in found.values()} <= {torch.float32}
    return all(torch.equal(found[name], value) for name, value in wanted.items())


# --- there and back ---------------------------------------------------------------------------------------------------


@over_shapes
def test_read_mapped__gives_what_was_filled_in(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    path, wanted = tmp_path / "some.safetensors", values(shapes)
    assert same(filled(path, wanted).finish(), wanted)
    assert same(read_memmap(path), wanted)


@over_shapes
def test_mapped_tensors__safetensors_reads_them(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    path, wanted = tmp_path / "some.safetensors", values(shapes)
    filled(path, wanted).finish()
    assert same(load_file(path), wanted)
    with safe_open(path, framework="pt") as opened:
        assert same({name: opened.get_tensor(name) for name in opened.keys()}, wanted)  # noqa: SIM118, not a mapping


@pytest.mark.parametrize("length", range(1, 9))
def test_mapped_tensors__start_at_a_multiple_of_eight(tmp_path: Path, length: int) -> None:
    path, wanted = tmp_path / "some.safetensors", values({"n" * length: (3,)})
    filled(path, wanted).finish()
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0
    assert path.stat().st_size == 8 + header + 3 * 4
    assert same(load_file(path), wanted)
    assert same(read_memmap(path), wanted)


def test_read_mapped__any_bits_survive(tmp_path: Path) -> None:
    wanted = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4e38])
    filled(tmp_path / "some.safetensors", {"odd": wanted}).finish()
    found = read_memmap(tmp_path / "some.safetensors")["odd"]
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))


def test_mapped_tensors__are_filled_part_by_part_in_any_order(tmp_path: Path) -> None:
    wanted = values({"weak": (9, 4), "crops": (9, 2, 4)})
    made = MemmapTensors(tmp_path / "some.safetensors", {"weak": (9, 4), "crops": (9, 2, 4)})
    for start in (6, 0, 3):
        for name, value in wanted.items():
            made.tensors[name][start : start + 3] = value[start : start + 3]
    made.finish()
    assert same(read_memmap(tmp_path / "some.safetensors"), wanted)


def test_mapped_tensors__not_filled_in_are_nought(tmp_path: Path) -> None:
    assert not MemmapTensors(tmp_path / "some.safetensors", {"a": (3, 2)}).finish()["a"].any()


def test_read_mapped__what_is_written_there_stays_out_of_the_file(tmp_path: Path) -> None:
    path, wanted = tmp_path / "some.safetensors", values({"weak": (5, 8)})
    filled(path, wanted).finish()
    found = read_memmap(path)
    found["weak"] += 1
    assert same(read_memmap(path), wanted)
    assert same(found, {"weak": wanted["weak"] + 1})


def test_read_mapped__outlives_its_file(tmp_path: Path) -> None:
    """The last files of features are removed while they may still be in use."""
    path, wanted = tmp_path / "some.safetensors", values({"weak": (5, 8)})
    made = filled(path, wanted).finish()
    found = read_memmap(path)
    path.unlink()
    assert same(made, wanted)
    assert same(found, wanted)


def test_mapped_tensors__can_be_read_by_whoever_may_read_other_files(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    filled(tmp_path / "some.safetensors", values({"weak": (5, 8)})).finish()
    assert stat.S_IMODE((tmp_path / "some.safetensors").stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


# --- whole or not there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [False, True])
def test_mapped_tensors__nothing_changes_under_the_name_before_finish(tmp_path: Path, there: bool) -> None:
    path, wanted, before = tmp_path / "some.safetensors", values({"weak": (5, 8)}), values({"other": (2,)})
    if there:
        filled(path, before).finish()
    made = filled(path, wanted)
    assert path.exists() == there
    if there:
        assert same(read_memmap(path), before)
    made.finish()
    assert same(read_memmap(path), wanted)
    assert [found.name for found in tmp_path.iterdir()] == ["some.safetensors"]


def test_mapped_tensors__takes_the_place_of_one_that_was_never_finished(tmp_path: Path) -> None:
    path, wanted = tmp_path / "some.safetensors", values({"weak": (5, 8)})
    filled(path, values({"weak": (500, 8), "crops": (500, 2, 8)}))
    filled(path, wanted).finish()
    assert same(load_file(path), wanted)
    assert [found.name for found in tmp_path.iterdir()] == ["some.safetensors"]


def test_mapped_tensors__makes_no_folder(tmp_path: Path) -> None:
    """One that goes away during a run is an error, not to be made anew with half of a run in it."""
    with pytest.raises(OutputError, match="cannot be written"):
        filled(tmp_path / "a" / "some.safetensors", values({"weak": (5, 8)}))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("there", [False, True])
def test_mapped_tensors__no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    path, before = tmp_path / "some.safetensors", values({"weak": (5, 8)})
    if there:
        filled(path, before).finish()

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"some.safetensors cannot be written: .*No space left.* needs 3\.2 GB"):
        MemmapTensors(path, {"weak": (100_000, 8_000)})
    assert [found.name for found in tmp_path.iterdir()] == (["some.safetensors"] if there else [])
    if there:
        assert same(read_memmap(path), before)


def test_mapped_tensors__reserves_the_room_of_the_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "posix_fallocate", lambda descriptor, offset, size: asked.append(offset + size))
    filled(tmp_path / "some.safetensors", values({"weak": (5, 8), "crops": (5, 3, 8)})).finish()
    assert asked == [(tmp_path / "some.safetensors").stat().st_size]


def test_mapped_tensors__where_nothing_can_be_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    wanted = values({"weak": (5, 8), "crops": (5, 3, 8)})
    filled(tmp_path / "some.safetensors", wanted).finish()
    assert same(load_file(tmp_path / "some.safetensors"), wanted)


@pytest.mark.parametrize("below", ["file", "file/folder"])
def test_mapped_tensors__a_file_where_the_folder_should_be(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="cannot be written"):
        MemmapTensors(tmp_path / below / "some.safetensors", {"weak": (5, 8)})
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_mapped_tensors__a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "some.safetensors" / "mine").mkdir(parents=True)
    made = filled(tmp_path / "some.safetensors", values({"weak": (5, 8)}))
    with pytest.raises(OutputError, match="cannot be written"):
        made.finish()
    assert (tmp_path / "some.safetensors" / "mine").is_dir()


def test_mapped_tensors__the_disk_refuses_to_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled(tmp_path / "some.safetensors", values({"weak": (5, 8)}))

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError, match="cannot be written"):
        made.finish()
    assert not (tmp_path / "some.safetensors").exists()


# --- files that are not whole, or not ours ----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 3, 8, 9, 60, "header", -161, -160, -40, -4, -1])
def test_read_mapped__a_torn_file(tmp_path: Path, kept: int | str) -> None:
    path = tmp_path / "some.safetensors"
    filled(path, values({"weak": (5, 8), "crops": (5, 1, 8)})).finish()
    whole = path.read_bytes()
    path.write_bytes(whole[: 8 + int.from_bytes(whole[:8], "little") if kept == "header" else int(kept)])
    with pytest.raises((OSError, ValueError)):
        read_memmap(path)


def test_read_mapped__a_torn_file_of_many_pages(tmp_path: Path) -> None:
    """Reading beyond the end of a map would end the process."""
    path = tmp_path / "some.safetensors"
    filled(path, values({"weak": (5_000, 8), "crops": (5_000, 2, 8)})).finish()
    os.truncate(path, 50_000)
    with pytest.raises((OSError, ValueError)):
        read_memmap(path)


def test_read_mapped__no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(OSError):
            read_memmap(path)


def with_header(header: Any, size: int = 40) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"path,reason\n" * 20, id="text"),
        pytest.param(bytes(4096), id="zeros"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(200), id="picture"),
        pytest.param(b"\x10\0\0\0\0\0\0\0" + b"\xff" * 100, id="no header"),
        pytest.param(with_header([1, 2]), id="a list"),
        pytest.param(with_header({"weak": 3}), id="a number"),
        pytest.param(with_header({"weak": {"dtype": "F32"}}), id="no shape"),
        pytest.param(with_header({"weak": {"dtype": "F32", "shape": [-5], "data_offsets": [0, 20]}}), id="negative"),
        pytest.param(with_header({"weak": {"dtype": "F32", "shape": [50], "data_offsets": [0, 200]}}), id="beyond"),
        pytest.param(with_header({"weak": {"dtype": "I32", "shape": [5], "data_offsets": [0, 20]}}), id="integers"),
        pytest.param(with_header({"weak": {"dtype": "F16", "shape": [5], "data_offsets": [0, 10]}}), id="halves"),
    ],
)
def test_read_mapped__another_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.safetensors").write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        read_memmap(tmp_path / "some.safetensors")


def test_read_mapped__a_checkpoint_is_not_one(tmp_path: Path) -> None:
    save_file({"labels": torch.arange(4)}, tmp_path / "some.safetensors", metadata={"finealign": "{}"})
    with pytest.raises((OSError, ValueError)):
        read_memmap(tmp_path / "some.safetensors")
