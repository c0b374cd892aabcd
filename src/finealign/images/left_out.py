"""What a listing leaves out: files that are no images, folders that hold no photos of the user; what is excluded."""

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import translate

from finealign.errors import display_path, first_few, printable
from finealign.images.formats import format_of, is_photo

# Endings that are taken for those of images without a look into the file.
_BY_FORMAT = (
    (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"),
    (".png", ".apng"),
    (".webp", ".gif", ".bmp", ".dib"),
    (".tif", ".tiff"),
    (".avif", ".avifs", ".heic", ".heif", ".hif"),
    (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    (".ppm", ".pgm", ".pbm", ".pnm"),
)
IMAGE_SUFFIXES = frozenset(suffix for suffixes in _BY_FORMAT for suffix in suffixes)
ENDINGS_SHOWN, FOLDERS_SHOWN = 6, 5

_RUN = b"run.json"  # the file that marks the folder of a run
_EXAMPLES = b"examples"  # in such a folder: pictures of images that the run was given
_FOREIGN = {  # folders that systems keep beside a user's files, in lower case
    b"@eadir": "thumbnails of a NAS",
    b"#recycle": "a bin",
    b"@recycle": "a bin",
    b"$recycle.bin": "a bin",
    b"recycler": "a bin",
    b"#snapshot": "snapshots",
    b"@recently-snapshot": "snapshots",
    b"lost+found": "what a file system check found",
    b"system volume information": "a system's own",
    b"__macosx": "a system's own",
}


class LeftOut:
    """Decides what a listing leaves out, and keeps count of it."""

    def __init__(self, exclude: Sequence[str] = ()) -> None:
        """``exclude`` are patterns with ``*``, ``?`` and ``[...]`` for names, or for paths below what is listed."""
        self.endings: Counter[str] = Counter()
        self.folders: dict[str, str] = {}  # by path, why
        self.hidden = 0
        self.excluded = 0
        self._patterns = [re.compile(translate(pattern.strip("/"))) for pattern in exclude]

    def __bool__(self) -> bool:
        return bool(self.endings or self.folders or self.hidden or self.excluded)

    def __str__(self) -> str:
        """One sentence that names what was left out; empty where nothing was."""

        def by_count(item: tuple[str, int]) -> tuple[int, str]:
            return -item[1], item[0]

        parts = []
        if self.endings:
            total = self.endings.total()
            kinds = (
                f"{count} {ending or 'without an ending'}"
                for ending, count in sorted(self.endings.items(), key=by_count)
            )
            shown = first_few(kinds, len(self.endings), ENDINGS_SHOWN)
            parts.append(f"{total} file{'s that are no images' if total != 1 else ' that is no image'} ({shown})")
        if self.folders:
            named = (f"{folder} ({why})" for folder, why in sorted(self.folders.items()))
            shown = first_few(named, len(self.folders), FOLDERS_SHOWN)
            parts.append(f"folder{'s' if len(self.folders) > 1 else ''} {shown}")
        if self.hidden:
            parts.append(f"{self.hidden} hidden")
        if self.excluded:
            parts.append(f"{self.excluded} excluded as asked")
        return f"Left out: {'; '.join(parts)}." if parts else ""

    def takes_file(self, name: bytes, head: Callable[[], bytes]) -> bool:
        """Whether a file is listed. ``name`` is relative to what is listed; ``head`` returns its first bytes.

        Files without the ending of an image are looked into.
        """
        base = name.rpartition(b"/")[2]
        ending = os.path.splitext(base)[1].lower()
        known = ending.decode("ascii", "replace") in IMAGE_SUFFIXES
        if base.startswith(b"."):
            self.hidden += known and not base.startswith(b"._")  # the latter are a system's own
            return False
        if self.excludes(name):
            return False
        if known or is_photo(format_of(head())):
            return True
        self.endings[printable(display_path(os.fsdecode(ending)))] += 1
        return False

    def takes_folder(self, name: bytes, path: bytes) -> bool:
        """Whether a folder is listed: ``name`` is relative to what is listed, and ``path`` is where it lies."""
        base = name.rpartition(b"/")[2]
        if base.startswith(b"."):
            self.hidden += 1
            return False
        if self.excludes(name):
            return False
        why = _FOREIGN.get(base.lower()) or ("a run of finealign" if is_run(path) else "")
        if base == _EXAMPLES and is_run(path[: -len(base)]):
            why = "pictures of a run of finealign"
        if why:
            self.folder(name, why)
        return not why

    def takes_member(self, name: bytes, shard: bytes, head: Callable[[], bytes]) -> bool:
        """Whether a file in a shard is listed; one whose name starts with a dot may be."""
        *folders, _ = name.split(b"/")
        foreign = next((number for number, part in enumerate(folders) if part.lower() in _FOREIGN), None)
        if foreign is not None:
            self.folder(b"/".join([shard, *folders[: foreign + 1]]), _FOREIGN[folders[foreign].lower()])
            return False
        if any(self._matches(b"/".join(folders[: number + 1])) for number in range(len(folders))):
            self.excluded += 1
            return False
        return self.takes_file(name.rpartition(b"/")[0] + b"/" + name.rpartition(b"/")[2].lstrip(b"."), head)

    def folder(self, name: bytes, why: str) -> None:
        """Count a folder that is left out."""
        self.folders[printable(display_path(os.fsdecode(name)))] = why

    def excludes(self, name: bytes) -> bool:
        """Whether a file or folder was asked to be left out, and count it if so."""
        found = self._matches(name)
        self.excluded += found
        return found

    def _matches(self, name: bytes) -> bool:
        if not self._patterns:
            return False
        whole = os.fsdecode(name)
        return any(pattern.match(whole) or pattern.match(whole.rpartition("/")[2]) for pattern in self._patterns)


def is_run(folder: bytes) -> bool:
    """Whether a folder is that of a run of ours."""
    try:
        path = os.path.join(folder, _RUN)
        if not os.path.isfile(path):
            return False
        with open(path, "rb") as file:
            start = file.read(100_000)
    except OSError:
        return False
    return start.lstrip().startswith(b"{") and b'"identity"' in start and b'"status"' in start
