"""The files of a run folder: which may be replaced, and what must be unchanged for a run to be resumed.

``contract.py`` lists the files.
"""

import hashlib
import json
import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finealign.errors import ImageInputError, OutputError, display_path
from finealign.images.files import fingerprint
from finealign.images.tables import read_table
from finealign.method.registry import origin_of
from finealign.model.folder import model_folder
from finealign.model.known_labels import digest_of
from finealign.model.prepare import Prepared
from finealign.run.contract import CONTENTS, LEARNED_FROM, LOCK, PREDICTIONS, RUN, TAKING_OVER
from finealign.runtime.atomic import require_folder, save_text
from finealign.runtime.replace import require_replaceable
from finealign.training.state import EpochRecord
from finealign.types import ImagePath


def versions(method: str = "") -> dict[str, str]:
    """The versions that a result depends on: of Python, and of each package by its name.

    Also where the method is from, if it is not ours.
    """
    packages = ("finealign", "torch", "torchvision", "open_clip_torch", "timm", "accelerate", "pillow", "numpy")
    found = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    origin = origin_of(method) if method else ""
    return found | ({"method": origin} if origin else {})


def identity_of(prepared: Prepared) -> dict[str, str]:
    """Checksums of what must be unchanged for a run to be resumed: settings, texts, images, weights and labels.

    Settings that do not affect the result are left out: device, pixel cache, workers and time between checkpoints.
    """
    unimportant: Any = {"device": True, "data": {"cache", "cache_gb", "workers"}, "training": {"checkpoint_minutes"}}
    settings = prepared.config.model_dump(exclude=unimportant)
    images = hashlib.sha256()  # updated path by path: there may be millions
    for path in prepared.paths:
        images.update(f"{json.dumps([display_path(path), fingerprint(path)])}\n".encode())
    identity = {
        "settings": _digest(settings),
        "texts": _digest(asdict(prepared.texts)),
        "images": images.hexdigest(),
        "weights": prepared.backbone.checksum,
    }
    if prepared.labels:
        identity["labels"] = _digest({display_path(path): known for path, known in prepared.labels.classes.items()})
    return identity


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def check_room(folder: Path, identity: Mapping[str, str] | None, *, resume: bool, overwrite: bool) -> list[Path]:
    """Check that a run may begin in ``folder`` and return the paths to remove first; none when resuming.

    ``identity`` is None as long as it is not known. Raises OutputError where the run may not begin: the folder holds
    something other than a run, it holds a run and neither ``resume`` nor ``overwrite`` is given, or the run to resume
    is missing or differs in ``identity``.
    """

    def foreign(names: set[str]) -> str:
        if RUN in names:
            return ""
        return f"holds {len(names)} things and is not a run folder ({RUN} is missing)"

    names = require_replaceable(
        folder,
        kind="run",
        foreign=foreign,
        overwrite=overwrite or resume,
        # The first is left by a run killed while it wrote its first file.
        ignored=[Path(RUN).with_suffix(".part").name, LOCK, TAKING_OVER],
        choices="Use --resume to continue it, --overwrite to replace it, or another --out.",
    )
    if resume:
        if not names:
            raise OutputError(f"Nothing to resume: {folder} holds no run. Leave --resume out to start one.")
        if identity is not None:
            _refuse_another_run(folder, identity)
        return []
    # run.json is not removed but overwritten, so that a folder left by a killed run is still recognised as a run's.
    return [folder / name for name in CONTENTS if name in names and name != RUN]


def _refuse_another_run(folder: Path, identity: Mapping[str, str]) -> None:
    """Raise OutputError where the run to resume had other images, texts, settings or weights."""
    before = read_identity(folder / RUN)
    compared = [*identity, *({"labels"} & before.keys() - identity.keys())]
    differing = [name for name in compared if before.get(name) != identity.get(name)]
    if differing:
        raise OutputError(
            f"The run in {folder} had other {' and '.join(differing)}, so it cannot be resumed with these. "
            "Give the same ones, or choose another folder with --out."
        )


def read_identity(path: Path) -> dict[str, Any]:
    """The checksums of ``identity_of`` that a ``run.json`` records; empty if they are not a JSON object.

    Raises OutputError when the file cannot be read or records none.
    """
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise OutputError(f"{path} cannot be read ({error}), so the run cannot be resumed. Use --overwrite.") from error
    return identity if isinstance(identity, dict) else {}


def count_adapted_to(model: Path, images: Iterable[ImagePath]) -> int | None:
    """How many of the images a run was adapted to, by the paths in its ``predictions.csv``.

    ``model`` is a run folder or its ``model/``. Relative paths on either side are taken from the current folder, so
    those of a run that was started elsewhere are not recognised. None where the paths are not known: the model lies
    outside its run, or the list cannot be read.
    """
    adapted_to = _listed(model, PREDICTIONS)
    if adapted_to is None:
        return None
    return sum(os.path.realpath(display_path(path)) in adapted_to for path in images)


def labelled_in(model: Path, images: Sequence[Path], learned_from: Collection[str]) -> list[Path]:
    """Those of the images whose labels the model was given.

    They are told by their bytes, of which ``learned_from`` has the checksums, and by the paths in its run's
    ``learned_from.csv``, where ``model``, a run folder or its ``model/``, has one.
    """
    if not learned_from:
        return []
    paths = _listed(model, LEARNED_FROM) or set()
    return [path for path in images if os.path.realpath(display_path(path)) in paths or digest_of(path) in learned_from]


def _listed(model: Path, table: str) -> set[str] | None:
    """The real paths in a table of the model's run; None where there is none, or it cannot be read."""
    run = model_folder(model).parent
    if not (run / RUN).is_file():
        return None
    try:
        return {os.path.realpath(row["path"]) for row in read_table(run / table, ["path"])}
    except (ImageInputError, ValueError):  # ValueError: no such path can be
        return None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object by an atomic write. Raises OutputError."""
    save_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", path)


class Metrics:
    """``metrics.jsonl``: one JSON object per line, one line per epoch.

    When a resumed run repeats an epoch, the lines of that epoch and of later ones are dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, record: EpochRecord) -> None:
        """Append the record of an epoch. Raises OutputError, also where the run folder has been removed."""
        require_folder(self.path.parent)
        earlier = [row for row in self.records() if row["epoch"] < record.epoch]
        save_text("".join(f"{json.dumps(row)}\n" for row in [*earlier, asdict(record)]), self.path)

    def records(self) -> list[dict[str, Any]]:
        """The records written so far, as ``read_metrics`` returns them."""
        return read_metrics(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl``, one per epoch; an empty list where the file does not exist.

    Reading stops at a line that is incomplete, as an interruption may leave it: the checkpoint of that epoch was not
    written either.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict) or type(record.get("epoch")) is not int:
            break
        records.append(record)
    return records
