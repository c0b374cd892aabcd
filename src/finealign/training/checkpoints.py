"""Checkpoints: one safetensors file each, written atomically. The last two are kept."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from finealign.errors import ModelError
from finealign.runtime.atomic import save_tensors

KEPT = 2
_NAME = re.compile(r"epoch-([0-9]+)(?:-step-([0-9]+))?")


@dataclass(frozen=True)
class Checkpoint:
    """The whole state of a run after ``epoch`` epochs and ``step`` steps of the next one."""

    epoch: int
    tensors: dict[str, Tensor]  # by name
    values: dict[str, Any]  # small values, stored as JSON
    step: int = 0


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into the folder, then delete all but the last two there.

    Its name is like ``epoch-0007.safetensors``, or ``epoch-0007-step-0120.safetensors`` within an epoch. Raises
    OutputError if it cannot be written.
    """
    header = {"finealign": json.dumps({"epoch": checkpoint.epoch, "step": checkpoint.step, **checkpoint.values})}
    name = f"epoch-{checkpoint.epoch:04d}" + (f"-step-{checkpoint.step:04d}" if checkpoint.step else "")
    save_tensors(checkpoint.tensors, folder / f"{name}.safetensors", metadata=header)
    for old in _in_order(folder)[:-KEPT]:
        with suppress(OSError):  # a checkpoint too many does no harm
            old.unlink()


def read_last_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is complete and valid. Returns None if the folder has no checkpoint.

    Raises ModelError if there are checkpoints but none can be read.
    """
    from safetensors import SafetensorError, safe_open

    problems = []
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
            problems.append(f"{path.name}: {error}")
    if problems:
        raise ModelError(
            f"No checkpoint in {folder} can be read ({'; '.join(problems)}). Start afresh with --overwrite."
        )
    return None


def _in_order(folder: Path) -> list[Path]:
    """The paths of the checkpoints in the folder, the oldest first."""
    named = [(name, path) for path in folder.glob("epoch-*.safetensors") if (name := _NAME.fullmatch(path.stem))]
    return [path for *_, path in sorted((int(name[1]), int(name[2] or 0), path) for name, path in named)]
