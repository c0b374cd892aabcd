"""Checkpoints: one safetensors file each, written aside and renamed, the last two kept."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finealign.errors import ModelError
from finealign.storage import save_tensors

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The whole state of a run after ``epoch`` epochs: tensors by name, and small values as JSON."""

    epoch: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``epoch-0007.safetensors`` into the folder and drop all but the last two. Raises OutputError."""
    header = {"finealign": json.dumps({"epoch": checkpoint.epoch, **checkpoint.values})}
    save_tensors(checkpoint.tensors, folder / f"epoch-{checkpoint.epoch:04d}.safetensors", metadata=header)
    for old in _by_epoch(folder)[:-KEPT]:
        old.unlink()


def read_last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none.

    Raises ModelError when there are checkpoints and every one is torn.
    """
    from safetensors import SafetensorError, safe_open

    torn = []
    for path in reversed(_by_epoch(folder)):
        try:
            with safe_open(path, framework="pt") as opened:
                values = json.loads((opened.metadata() or {})["finealign"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
            return Checkpoint(epoch=values.pop("epoch"), tensors=tensors, values=values)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            torn.append(f"{path.name}: {error}")
    if torn:
        raise ModelError(f"No checkpoint in {folder} can be read ({'; '.join(torn)}). Start afresh with --overwrite.")
    return None


def _by_epoch(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("epoch-*.safetensors") if path.stem.removeprefix("epoch-").isdecimal()]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("epoch-")))
