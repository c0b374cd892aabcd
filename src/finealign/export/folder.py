"""The folder of an export: what may be replaced there, and the new one put in its place whole."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

from finealign.errors import OutputError
from finealign.export.layout import PARITY


def names_in(folder: Path) -> list[str]:
    """What lies in an export, but for what Python leaves when usage.py is imported there."""
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


def check_room(folder: Path, *, overwrite: bool) -> bool:
    """Whether an earlier export lies in the folder. Raises OutputError where it may not be replaced."""
    try:
        there = names_in(folder) if folder.is_dir() else []
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file. Wanted: a folder for the export; choose another with --out.")
    except OSError as error:
        raise OutputError(f"{folder} cannot be used: {error}. Choose another with --out.") from error
    if not there:
        return False
    ours: set[str] = set()
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        ours = set(json.loads((folder / PARITY).read_text(encoding="utf-8"))["files"])
    strangers = [name for name in there if name not in ours]
    if strangers:
        raise OutputError(
            f"{folder} holds {strangers[0]!r}, which is of no export, so nothing in it is touched. Choose another with "
            "--out."
        )
    if not overwrite:
        raise OutputError(f"{folder} already holds an export. Use --overwrite to replace it, or another --out.")
    return True


def put(made: Path, folder: Path, old: bool, aside: Path) -> None:
    """Move the whole export to its place; an older one goes first and comes back if that fails."""
    if old:
        folder.rename(aside / "old")
    elif folder.is_dir():
        folder.rmdir()  # empty, or it would have been refused
    try:
        made.rename(folder)
    except OSError:
        if old:
            (aside / "old").rename(folder)
        raise
    if old:
        shutil.rmtree(aside / "old", ignore_errors=True)
