"""A home folder and a user name for processes that have none, as in a container that runs under a bare user id."""

import getpass
import os
import tempfile
from pathlib import Path


def ensure_home() -> None:
    """Give this process a home folder and a user name where it has none that it can use, by HOME and USER.

    torch, the hub's client and matplotlib look for both, fail without, or write into a folder called ``~``. The folder
    is one for temporary files that belongs to this user alone; it is the same for all processes of the user.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # which of them depends on the version of Python
        os.environ["USER"] = f"user-{os.getuid()}"
    if not _has_home():
        os.environ["HOME"] = str(_own_folder())


def _has_home() -> bool:
    """Whether there is a home folder that can be written, or made, or has a cache that can at least be read.

    Docker gives a bare user id the home "/", and accounts of services have one that is not there.
    """
    try:
        home = Path.home()
    except RuntimeError:
        return False
    there = next(folder for folder in (home.absolute(), *home.absolute().parents) if folder.exists())
    by_effective = os.access in os.supports_effective_ids
    return os.access(there, os.W_OK | os.X_OK, effective_ids=by_effective) or (home / ".cache").is_dir()


def _own_folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"finealign-home-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(folder)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="finealign-home-"))
    return folder
