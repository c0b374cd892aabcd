"""List the images that a folder, a list, a table or a shard names, without opening any of them."""

import io
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NoReturn

from finealign.errors import ImageInputError, display_path
from finealign.images.files import ImageReadError, reason_of, stat_of
from finealign.images.paths import PathList
from finealign.images.shards import SUFFIX, read_shard
from finealign.images.tables import read_list, read_table

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
MAX_SHARDS = 100_000  # most that one pattern may stand for

_LISTED = frozenset(suffix.encode() for suffix in (*IMAGE_SUFFIXES, SUFFIX))  # suffixes that are looked for in a folder
_SUFFIXES_SHOWN = ", ".join(sorted(IMAGE_SUFFIXES))


def list_images(source: str | Path | Sequence[str | Path]) -> Sequence[Path]:
    """List the images that ``source`` names. None is opened, so a listed path may still turn out to be unreadable.

    ``source`` is one of:

    - a folder: every image file below it, sorted by path relative to the folder. Names that start with a dot are
      skipped. Symbolic links to folders are followed, but no folder is listed twice, so loops end. The list takes about
      as much memory as the names of the files;
    - an image file: the list holds this file alone;
    - a WebDataset shard, which is a ``.tar`` file: the images in it, in the order of the shard, each as the path of the
      shard followed by the image's name in it. Shards in a folder are listed in the same way, and so are those of a
      pattern with braces, such as ``"{000..099}.tar"``;
    - a ``.txt`` file in UTF-8: one path per line; blank lines and lines that start with ``#`` are skipped;
    - a ``.csv`` file in UTF-8: the column ``path``; other columns are ignored;
    - a sequence of paths: the paths as given.

    Relative paths in a ``.txt`` or ``.csv`` file are relative to the folder of that file.

    Raises:
        ImageInputError: ``source`` does not exist, names no image, or is not one of the above.
    """
    paths: Sequence[Path]
    if not isinstance(source, str | Path):
        # A PathList is returned as it is, because a million Path objects take much more memory.
        paths = source if isinstance(source, PathList) else [Path(path) for path in source]
        if not paths:
            raise ImageInputError("The list of images is empty. Give at least one path.")
        return paths

    path, shown = Path(source), f"'{display_path(source)}'"
    if "{" in path.name and path.suffix.lower() == SUFFIX and not path.exists():
        return _of_shards(_expand(path))
    try:
        mode = stat_of(path).st_mode
    except ImageReadError as error:
        raise ImageInputError(
            f"Cannot open {shown}: {error}. Give a folder of images, an image, or a .txt or .csv list of images."
        ) from error

    suffix = path.suffix.lower()
    if stat.S_ISDIR(mode):
        paths = _walk(path)
        if not paths:
            raise ImageInputError(
                f"No image in folder {shown}. Wanted at least one file ending in {_SUFFIXES_SHOWN}. Check the folder."
            )
    elif not stat.S_ISREG(mode):
        raise ImageInputError(f"{shown} is neither a folder nor a regular file. Give a folder, an image or a list.")
    elif suffix in IMAGE_SUFFIXES:
        paths = [path]
    elif suffix == SUFFIX:
        paths = _of_shards([path])
    elif suffix == ".txt":
        lines = (line.strip() for line in io.StringIO(read_list(path), newline=None))
        paths = [path.parent / line for line in lines if line and not line.startswith("#")]
        if not paths:
            raise ImageInputError(f"{shown} lists no images. Write one path a line.")
    elif suffix == ".csv":
        paths = [path.parent / row["path"] for row in read_table(path, ["path"])]
        if not paths:
            raise ImageInputError(f"{shown} lists no images. Write one row an image below the header.")
    else:
        raise ImageInputError(
            f"Cannot tell what {shown} is from its suffix {suffix!r}. Wanted a folder, an image ({_SUFFIXES_SHOWN}), "
            "a .tar of images that is not compressed, or a .txt or .csv list of images. Rename the file, or list it "
            "in a .txt."
        )
    return paths


def _of_shards(shards: Sequence[Path]) -> PathList:
    """The image members of all shards. Raises ImageInputError where there is none."""
    paths = PathList(_with_members(os.fsencode(shard) for shard in shards))
    if not paths:
        shown = ", ".join(f"'{display_path(shard)}'" for shard in shards[:3])
        raise ImageInputError(f"No image in {shown}. Wanted at least one file ending in {_SUFFIXES_SHOWN} in a shard.")
    return paths


def _expand(pattern: Path) -> list[Path]:
    """The shards that a pattern with braces stands for, expanded as a shell does. Raises ImageInputError."""
    from braceexpand import braceexpand

    # braceexpand writes a range out in full before it yields the first name, so the length of each is checked first.
    ranges = re.findall(r"\{(-?\d{1,18})\.\.(-?\d{1,18})", str(pattern))
    try:
        bounded = all(abs(int(last) - int(first)) < MAX_SHARDS for first, last in ranges)
        shards = [Path(name) for name in islice(braceexpand(str(pattern)), MAX_SHARDS + 1)] if bounded else []
    except ValueError as error:  # braceexpand's UnbalancedBracesError
        raise ImageInputError(f"'{display_path(pattern)}': {error}. Wanted: a pattern as '{{000..099}}.tar'.") from None
    if not bounded or len(shards) > MAX_SHARDS:
        raise ImageInputError(
            f"'{display_path(pattern)}' stands for more than {MAX_SHARDS:,} shards. Write a closer one."
        )
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise ImageInputError(
            f"'{display_path(pattern)}' stands for {len(shards)} shards, of which {len(missing)} are not there, the "
            f"first '{display_path(missing[0])}'. Write a closer pattern, or add what is missing."
        )
    return shards


def _walk(root: Path) -> PathList:
    """The images in a folder and below it, those in shards included. Raises ImageInputError."""

    def refuse(error: OSError) -> NoReturn:
        raise ImageInputError(
            f"Cannot list folder '{display_path(os.fsdecode(error.filename))}': {reason_of(error)}. "
            "Make it readable, or move it out of the images."
        ) from error

    prefix = os.fsencode(root / "_")[:-1]  # ends in a separator; empty for the current folder
    names: list[bytes] = []  # relative to ``root``
    visited: set[tuple[int, int]] = set()  # device and inode of each folder
    pending = [b""]
    while pending:
        folder = pending.pop()
        subfolders: list[tuple[bool, bytes]] = []
        try:
            status = os.stat(prefix + folder or b".")
            identity = (status.st_dev, status.st_ino)
            if identity in visited:
                continue
            visited.add(identity)
            with os.scandir(prefix + folder or b".") as entries:
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    if _leads_to_folder(entry):
                        subfolders.append((entry.is_symlink(), folder + entry.name + b"/"))
                    elif os.path.splitext(entry.name)[1].lower() in _LISTED:
                        names.append(folder + entry.name)
        except OSError as error:
            refuse(error)
        # The last is taken first: real folders before linked ones, so that one reached both ways gets its own name.
        pending += [name for _, name in sorted(subfolders, reverse=True)]
    names.sort()
    return PathList(_with_members(prefix + name for name in names))


def _leads_to_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # for example a link that points to itself
        return False


def _with_members(paths: Iterable[bytes]) -> Iterator[bytes | Path]:
    """Replace each shard among the paths by its image members.

    A damaged shard also follows its members, and one that cannot be opened stays, so that reading it reports why.
    """
    for path in paths:
        if not path.lower().endswith(SUFFIX.encode()):
            yield path
            continue
        try:
            shard = read_shard(Path(os.fsdecode(path)))
        except OSError:
            yield path
            continue
        yield from (member for member in shard.files() if member.suffix.lower() in IMAGE_SUFFIXES)
        if shard.damage:
            yield path
