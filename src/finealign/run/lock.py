"""One process at a time writes a run folder or a file of labels: its lock names it, and is void when it has ended."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from finealign.errors import OutputError
from finealign.run.contract import LOCK

SAME_START = 60.0  # seconds by which two readings of when a process began may differ, as where clocks are set
PATIENCE = 10.0  # seconds after which taking over is itself taken for broken off
TRIES = 100
_held_here: set[Path] = set()  # by this process


def refuse_held(folder: Path) -> None:
    """Raise OutputError, which names the holder, if another process writes this run folder. Nothing is written."""
    if (holder := _holder(folder / LOCK)) is not None:
        raise OutputError(_in_use(folder / LOCK, folder, holder))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within the context this process alone writes the run folder, which is made if it is not there.

    The lock of a process that has ended is taken over. Raises OutputError if another process holds it, or if the folder
    cannot be written; a folder that was made for nothing is removed.
    """
    with _held(folder / LOCK, folder):
        yield


@contextmanager
def held_file(path: Path) -> Iterator[None]:
    """Within the context this process alone writes the file, whose lock lies beside it; otherwise as ``held``."""
    with _held(path.with_name(f"{path.name}.lock"), path):
        yield


@contextmanager
def _held(path: Path, what: Path) -> Iterator[None]:
    """Hold the lock ``path`` of a folder or a file, ``what``."""
    folder = path.parent
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(path, what)
    except OSError as error:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise OutputError(f"{path} cannot be written: {error}. Choose {_other(path, what)}.") from error
    _held_here.add(path.absolute())
    try:
        yield
    finally:
        _held_here.discard(path.absolute())
        with suppress(OSError):  # the folder may be gone, or closed
            path.unlink()
        if made:
            with suppress(OSError):  # it holds something, as it should
                folder.rmdir()


def _take(path: Path, what: Path) -> None:
    """Create the lock file, which fails for all processes but one. Raises OutputError, or OSError."""
    for _ in range(TRIES):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            if (holder := _holder(path)) is not None:
                raise OutputError(_in_use(path, what, holder)) from None
            _remove_void(path)
            continue
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(_own(), file)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return
    raise OutputError(f"{what} is being taken over by other processes at once. Try again.")


def _remove_void(path: Path) -> None:
    """Remove the lock of a process that has ended. One process at a time, or one would remove the lock of the next."""
    turn = path.with_name(f"{path.name}.part")
    try:
        os.close(os.open(turn, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        with suppress(OSError):
            if time.time() - turn.stat().st_mtime > PATIENCE:
                turn.unlink()
        time.sleep(0.05)
        return
    try:
        if _holder(path) is None:
            path.unlink(missing_ok=True)
    finally:
        turn.unlink(missing_ok=True)


def _own() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "began": psutil.Process().create_time()}


def _holder(path: Path) -> dict[str, Any] | None:
    """What the lock says of its process; None if there is no lock or the process has ended.

    A process on another machine is taken to be running. A lock of this process is void if it could not be removed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        age = time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return None
    try:
        found = json.loads(text)
        holder: dict[str, Any] = {"pid": int(found["pid"]), "host": str(found["host"]), "began": float(found["began"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        # Just created and not written yet; or left by a process that was killed in between.
        return {"pid": 0, "host": "", "began": 0.0} if age < PATIENCE else None
    if holder["host"] != socket.gethostname():
        return holder
    if holder["pid"] == os.getpid() and path.absolute() not in _held_here:
        return None
    try:
        began = psutil.Process(holder["pid"]).create_time()
    except psutil.NoSuchProcess:
        return None
    except psutil.Error:  # it is there, and somebody else's
        return holder
    return holder if abs(began - holder["began"]) < SAME_START else None  # else another process has its number now


def _in_use(path: Path, what: Path, holder: dict[str, Any]) -> str:
    other = _other(path, what)
    if not holder["pid"]:
        return f"{what} is being written by another process that has just begun. Choose {other}."
    where = "" if holder["host"] == socket.gethostname() else f" on {holder['host']}"
    told = f"{what} is being written by process {holder['pid']}{where}. Wait until it has ended, or choose {other}."
    return f"{told} If that process is gone, delete {path}." if where else told


def _other(path: Path, what: Path) -> str:
    return "another folder with --out" if path.parent == what else "another file with --out"
