"""Decide whether a result folder may be replaced: only if finealign made its contents and the user asked for it."""

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from finealign.errors import OutputError


def names_in(folder: Path, *, kind: str) -> set[str]:
    """The names of the files and folders in a folder for results; none where it does not exist yet.

    ``kind`` says what the folder is for, as "run". Raises OutputError where it is a file or cannot be listed.
    """
    try:
        return {path.name for path in folder.iterdir()} if folder.exists() else set()
    except NotADirectoryError:
        raise OutputError(f"{folder} is a file. Wanted: a folder for the {kind}; choose another with --out.") from None
    except OSError as error:
        raise OutputError(f"{folder} cannot be used: {error}. Choose another with --out.") from error


def require_replaceable(
    folder: Path,
    *,
    kind: str,
    foreign: Callable[[set[str]], str],
    overwrite: bool,
    ignored: Iterable[str] = (),
    choices: str = "Use --overwrite to replace it, or another --out.",
) -> set[str]:
    """The names in a folder that a new result may replace; none where it is empty or does not exist.

    ``foreign`` is given the names. It returns a text such as "is not a run folder" where finealign did not make them,
    and an empty text otherwise. ``ignored`` are names that are left out. Raises OutputError where ``foreign`` returns a
    text, and where the folder holds a result but ``overwrite`` is false; ``choices`` then tells the user what to do.
    """
    names = names_in(folder, kind=kind) - set(ignored)
    if not names:
        return set()
    if problem := foreign(names):
        raise OutputError(f"{folder} {problem}, so nothing in it is touched. Choose another with --out.")
    if not overwrite:
        article = "an" if kind[0] in "aeiou" else "a"
        raise OutputError(f"{folder} already holds {article} {kind}. {choices}")
    return names


def make_room(folder: Path, replaced: Sequence[Path]) -> None:
    """Remove the files and folders listed in ``replaced`` and create ``folder``. Raises OutputError."""
    try:
        for path in replaced:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be used: {error}. Choose another with --out.") from error
