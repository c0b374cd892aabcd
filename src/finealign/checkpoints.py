"""Checkpoints: one safetensors file each, written aside and renamed, the last two kept."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finealign.errors import ModelError
from finealign.storage import save_tensors

KEPT = 2
_NAME = re.compile(r"epoch-([0-9]+)(?:-step-([0-9]+))?")


@dataclass(frozen=True)
class Checkpoint:
    """The whole state of a run after so many epochs and steps: tensors by name, and small values as JSON."""

    epoch: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]
    step: int = 0


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write ``epoch-0007.safetensors``, or ``epoch-0007-step-0120``, into the folder and drop all but the last two.

    Raises OutputError.
    """
    header = {"finealign": json.dumps({"epoch": checkpoint.epoch, "step": checkpoint.step, **checkpoint.values})}
    name = f"epoch-{checkpoint.epoch:04d}" + (f"-step-{checkpoint.step:04d}" if checkpoint.step else "")
    save_tensors(checkpoint.tensors, folder / f"{name}.safetensors", metadata=header)
    for old in _in_order(folder)[:-KEPT]:
        with suppress(OSError):  # one too many does no harm
            old.unlink()


def read_last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole, or None where there is none.

    Raises ModelError when there are checkpoints and every one is torn.
    """
    from safetensors import SafetensorError, safe_open

    torn = []
    for path in reversed(_in_order(folder)):
        try:
            with safe_open(path, framework="pt") as opened:
                values = json.loads((opened.metadata() or {})["finealign"])
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
            epoch, step = values.pop("epoch"), values.pop("step", 0)
            if not all(type(count) is int and count >= 0 for count in (epoch, step)):
                raise ValueError(f"its epoch is {epoch!r:.100} and its step {step!r:.100}")
            return Checkpoint(epoch, tensors, values, step=step)
        except (SafetensorError, AttributeError, KeyError, TypeError, ValueError, OSError, RecursionError) as error:
            torn.append(f"{path.name}: {error}")
    if torn:
        raise ModelError(f"No checkpoint in {folder} can be read ({'; '.join(torn)}). Start afresh with --overwrite.")
    return None


def _in_order(folder: Path) -> list[Path]:
    found = [(place, path) for path in folder.glob("epoch-*.safetensors") if (place := _NAME.fullmatch(path.stem))]
    return [path for *_, path in sorted((int(place[1]), int(place[2] or 0), path) for place, path in found)]
