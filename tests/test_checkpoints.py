"""Checkpoints: bit for bit, whole or not there, the last two kept, no pickle."""

import errno
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from finealign.errors import ModelError, OutputError
from finealign.training.checkpoints import Checkpoint, read_last_checkpoint, write_checkpoint


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(5, 7, generator=generator)
    return {
        "float32": normal,
        "odd values": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3.4e38]),
        "float64": normal.double() / 3,
        "bfloat16": normal.bfloat16(),
        "float16": normal.half(),
        "int64": torch.randint(-(2**62), 2**62, (4,), generator=generator),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": normal > 0,
        "scalar": torch.tensor(3.25),
        "empty": torch.empty(0, 3),
        "transposed": normal.t(),
        "strided": torch.arange(20.0)[::3],
        "the same again": normal,
        "parameter": torch.nn.Parameter(normal * 2),
        "имя.名前": torch.ones(2),
    }


def checkpoint(epoch: int, **values: Any) -> Checkpoint:
    return Checkpoint(epoch=epoch, tensors=tensors(epoch), values=values)


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = tensor.detach().contiguous().reshape(-1)
    return tensor.dtype, tensor.shape, bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def same(first: Checkpoint, second: Checkpoint | None) -> bool:
    return (
        second is not None
        and first.epoch == second.epoch
        and first.values == second.values
        and {name: bits(value) for name, value in first.tensors.items()}
        == {name: bits(value) for name, value in second.tensors.items()}
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[-1]


def fill(folder: Path, *epochs: int) -> None:
    for epoch in epochs:
        write_checkpoint(folder, checkpoint(epoch))


# --- the round trip ---------------------------------------------------------------------------------------------------


def test_write_checkpoint__read_back_bit_for_bit(tmp_path: Path) -> None:
    values = {
        "loss": 0.1 + 0.2,
        "record": {"parts": {"fair": 1e-300}, "share": [1 / 3, 0.0]},
        "name": "мир 🦉",
        "no": None,
    }
    written = checkpoint(7, **values)
    write_checkpoint(tmp_path / "made" / "on the way", written)
    assert same(written, read_last_checkpoint(tmp_path / "made" / "on the way"))


def test_write_checkpoint__leaves_the_state_it_writes_alone(tmp_path: Path) -> None:
    state = checkpoint(1, loss=1.5)
    before = {name: bits(value) for name, value in state.tensors.items()}
    write_checkpoint(tmp_path, state)
    assert {name: bits(value) for name, value in state.tensors.items()} == before
    assert state.values == {"loss": 1.5}


def test_write_checkpoint__the_same_epoch_again_replaces_it(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    again = Checkpoint(epoch=1, tensors={"x": torch.ones(1)}, values={"second": True})
    write_checkpoint(tmp_path, again)
    assert names(tmp_path) == ["epoch-0001.safetensors"]
    assert same(again, read_last_checkpoint(tmp_path))


def test_write_checkpoint__no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("pickle is not to be used")

    for place, name in [(pickle, "dump"), (pickle, "dumps"), (pickle, "load"), (pickle, "loads")]:
        monkeypatch.setattr(place, name, refuse)
    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    written = checkpoint(3)
    write_checkpoint(tmp_path, written)
    assert same(written, read_last_checkpoint(tmp_path))
    content = newest(tmp_path).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert set(header) == {"__metadata__", *written.tensors}
    assert json.loads(header["__metadata__"]["finealign"])["epoch"] == 3


# --- the last two -----------------------------------------------------------------------------------------------------


def test_write_checkpoint__keeps_the_last_two(tmp_path: Path) -> None:
    for epoch in range(1, 13):
        write_checkpoint(tmp_path, checkpoint(epoch))
        kept = [number for number in (epoch - 1, epoch) if number > 0]
        assert names(tmp_path) == [f"epoch-{number:04d}.safetensors" for number in kept]
        assert same(checkpoint(epoch), read_last_checkpoint(tmp_path))


def test_write_checkpoint__removes_nothing_of_others(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "best.safetensors").write_bytes(b"mine")
    fill(tmp_path, 1, 2, 3)
    assert names(tmp_path) == ["best.safetensors", "epoch-0002.safetensors", "epoch-0003.safetensors", "notes.txt"]
    assert same(checkpoint(3), read_last_checkpoint(tmp_path))


def test_write_checkpoint__beyond_four_digits(tmp_path: Path) -> None:
    fill(tmp_path, 9_998, 9_999, 10_000)
    assert same(checkpoint(10_000), read_last_checkpoint(tmp_path))


# --- torn files -------------------------------------------------------------------------------------------------------


def tear(path: Path, how: str) -> None:
    content = path.read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    torn = {
        "empty": b"",
        "seven bytes": content[:7],
        "length alone": content[:8],
        "half a header": content[: 8 + header // 2],
        "header alone": content[: 8 + header],
        "half": content[: len(content) // 2],
        "all but a byte": content[:-1],
        "zeros": bytes(len(content)),
        "ones": b"\xff" * len(content),
        "header overwritten": content[:8] + b"?" * header + content[8 + header :],
    }
    path.write_bytes(torn[how])


TEARS = [
    "empty",
    "seven bytes",
    "length alone",
    "half a header",
    "header alone",
    "half",
    "all but a byte",
    "zeros",
    "ones",
    "header overwritten",
]


@pytest.mark.parametrize("how", TEARS)
def test_read_last_checkpoint__a_torn_one_is_passed_over(how: str, tmp_path: Path) -> None:
    fill(tmp_path, 4, 5)
    tear(newest(tmp_path), how)
    assert same(checkpoint(4), read_last_checkpoint(tmp_path))


@pytest.mark.parametrize("how", TEARS)
def test_read_last_checkpoint__all_torn(how: str, tmp_path: Path) -> None:
    fill(tmp_path, 4, 5)
    for path in list(tmp_path.iterdir()):
        tear(path, how)
    with pytest.raises(ModelError, match=r"epoch-0005\.safetensors: .*epoch-0004\.safetensors: ") as caught:
        read_last_checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "--overwrite" in str(caught.value)


def test_read_last_checkpoint__someone_elses_safetensors_is_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    fill(tmp_path, 4)
    save_file({"x": torch.ones(1)}, tmp_path / "epoch-0005.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "epoch-0006.safetensors", metadata={"finealign": "not JSON"})
    save_file({"x": torch.ones(1)}, tmp_path / "epoch-0007.safetensors", metadata={"finealign": "{}"})
    assert same(checkpoint(4), read_last_checkpoint(tmp_path))


def test_read_last_checkpoint__none(tmp_path: Path) -> None:
    assert read_last_checkpoint(tmp_path) is None
    assert read_last_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "epoch-0001.part").write_bytes(b"half a file, left by a power cut")
    assert read_last_checkpoint(tmp_path) is None


def test_write_checkpoint__a_part_left_by_a_power_cut_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "epoch-0001.part").write_bytes(b"half a file")
    fill(tmp_path, 1)
    assert names(tmp_path) == ["epoch-0001.safetensors"]
    assert same(checkpoint(1), read_last_checkpoint(tmp_path))


# --- where nothing can be written -------------------------------------------------------------------------------------


def fails(folder: Path, epoch: int) -> None:
    """Writing raises OutputError, leaves no ``.part``, and the files before are the same bytes."""
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(OutputError, match="cannot be written"):
        write_checkpoint(folder, checkpoint(epoch))
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert not list(folder.glob("*.part"))


def test_write_checkpoint__a_folder_in_its_place(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    (tmp_path / "epoch-0002.safetensors").mkdir()
    fails(tmp_path, 2)
    assert same(checkpoint(1), read_last_checkpoint(tmp_path))


def test_write_checkpoint__the_disk_refuses_to_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fill(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", refuse)
    fails(tmp_path, 2)
    fails(tmp_path, 1)


def test_write_checkpoint__nothing_bears_the_name_before_it_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    flush = os.fsync

    def watch(descriptor: int) -> None:
        seen.append(names(tmp_path))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    fill(tmp_path, 1)
    assert seen
    assert all("epoch-0001.safetensors" not in there for there in seen)


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may write anywhere")
def test_write_checkpoint__a_folder_that_is_read_only(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    tmp_path.chmod(0o500)
    try:
        fails(tmp_path, 2)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("below", ["", "sub"])
def test_write_checkpoint__the_folder_is_a_file(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError):
        write_checkpoint(tmp_path / "file" / below, checkpoint(1))
    assert (tmp_path / "file").read_text() == "mine"


def test_write_checkpoint__the_disk_is_full(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="no bound on the size of files here")
    fill(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # a write past it fails, as on a full disk
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            write_checkpoint(tmp_path, checkpoint(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        left = names(tmp_path)
    assert left == ["epoch-0001.safetensors"]
    assert same(checkpoint(1), read_last_checkpoint(tmp_path))
