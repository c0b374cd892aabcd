"""List the images that a folder, a list, a table or a shard names, without opening any of them."""

import io
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NoReturn

from finealign.errors import ImageInputError, display_path
from finealign.images.files import ImageReadError, reason_of, stat_of
from finealign.images.formats import HEAD, format_of, is_photo
from finealign.images.left_out import IMAGE_SUFFIXES, LeftOut
from finealign.images.paths import PathList
from finealign.images.shards import SUFFIX, read_shard
from finealign.images.tables import read_list, read_table, with_slashes
from finealign.types import ImagePath

MAX_SHARDS = 100_000  # most that one pattern may stand for

FORMATS = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PPM or HEIC"


class Listing(PathList):
    """The images below a folder or in shards, and what else was there."""

    def __init__(self, paths: Iterable[str | Path | bytes], left_out: LeftOut) -> None:
        super().__init__(paths)  # exhausts ``paths``, which count into ``left_out``
        self.left_out = left_out


def left_out_of(paths: Sequence[ImagePath]) -> str:
    """What ``list_images`` left out where it listed ``paths``, as a sentence; empty where that was nothing."""
    return str(paths.left_out) if isinstance(paths, Listing) else ""


def list_images(source: str | Path | Sequence[str | Path], *, exclude: Sequence[str] = ()) -> Sequence[Path]:
    """List the images that ``source`` names. A listed path may still turn out to be unreadable.

    ``source`` is one of:

    - a folder: every image below it, sorted by path relative to the folder. A file with the ending of an image is
      taken for one and not opened; what another file is, its first bytes tell. Names that start with a dot are skipped,
      and so are folders of runs, thumbnails, bins and those that cannot be opened; ``left_out_of`` names all of these.
      Symbolic links to folders are followed, but no folder is listed twice, so loops end. The list takes about as much
      memory as the names of the files;
    - an image file: the list holds this file alone;
    - a WebDataset shard, which is a ``.tar`` file: the images in it, in the order of the shard, each as the path of the
      shard followed by the image's name in it. Shards in a folder are listed in the same way, and so are those of a
      pattern with braces, such as ``"{000..099}.tar"``;
    - a ``.txt`` file in UTF-8: one path per line; blank lines and lines that start with ``#`` are skipped. The
      backslashes of Windows are slashes where a file is there by that name alone, here and in a table;
    - a ``.csv`` file in UTF-8: the column ``path``; other columns are ignored;
    - a sequence of paths: the paths as given.

    Relative paths in a ``.txt`` or ``.csv`` file are relative to the folder of that file. ``exclude`` are patterns as
    ``*_mask.png`` or ``thumbs``: files and folders are left out whose name matches one, or whose path below ``source``.
    A sequence of paths is not filtered.

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
        return _of_shards(_expand(path), LeftOut(exclude))
    try:
        mode = stat_of(path).st_mode
    except ImageReadError as error:
        raise ImageInputError(
            f"Cannot open {shown}: {error}. Give a folder of images, an image, or a .txt or .csv list of images."
        ) from error

    suffix = path.suffix.lower()
    if stat.S_ISDIR(mode):
        paths = _walk(path, left_out := LeftOut(exclude))
        if not paths:
            told = f" {left_out}" if left_out else ""
            raise ImageInputError(
                f"No image in folder {shown}.{told} Wanted at least one file that is an image ({FORMATS}). "
                "Check the folder."
            )
    elif not stat.S_ISREG(mode):
        raise ImageInputError(f"{shown} is neither a folder nor a regular file. Give a folder, an image or a list.")
    elif suffix in IMAGE_SUFFIXES:
        paths = [path]
    elif suffix == SUFFIX:
        paths = _of_shards([path], LeftOut(exclude))
    elif suffix == ".txt":
        lines = (line.strip() for line in io.StringIO(read_list(path), newline=None))
        named = (with_slashes(line, path.parent) for line in lines if line and not line.startswith("#"))
        kept = not_excluded(named, exclude)
        paths = [path.parent / line for line in kept]
        if not paths:
            raise ImageInputError(f"{shown} lists no images{_but(exclude)}. Write one path a line.")
    elif suffix == ".csv":
        kept = not_excluded((row["path"] for row in read_table(path, ["path"])), exclude)
        paths = [path.parent / name for name in kept]
        if not paths:
            raise ImageInputError(f"{shown} lists no images{_but(exclude)}. Write one row an image below the header.")
    elif is_photo(format_of(_head(os.fsencode(path)))):
        paths = [path]
    else:
        raise ImageInputError(
            f"Cannot tell what {shown} is from its suffix {suffix!r}. Wanted a folder, an image ({FORMATS}), "
            "a .tar of images that is not compressed, or a .txt or .csv list of images. Rename the file, or list it "
            "in a .txt."
        )
    return paths


def _but(exclude: Sequence[str]) -> str:
    return " but excluded ones" if exclude else ""


def not_excluded(names: Iterable[str], exclude: Sequence[str]) -> list[str]:
    """The paths of a list without those of which the whole or any part matches one of the patterns."""
    if not exclude:
        return list(names)
    left_out = LeftOut(exclude)

    def steps(name: str) -> Iterator[bytes]:
        parts = name.encode("utf-8", "surrogatepass").split(b"/")
        return (b"/".join(parts[: number + 1]) for number in range(len(parts)))

    return [name for name in names if not any(left_out.excludes(step) for step in steps(name))]


def _of_shards(shards: Sequence[Path], left_out: LeftOut) -> Listing:
    """The image members of all shards. Raises ImageInputError where there is none."""
    paths = Listing(_with_members((os.fsencode(shard) for shard in shards), left_out), left_out)
    if not paths:
        shown = ", ".join(f"'{display_path(shard)}'" for shard in shards[:3])
        told = f" {left_out}" if left_out else ""
        raise ImageInputError(
            f"No image in {shown}.{told} Wanted at least one file that is an image ({FORMATS}) in a shard."
        )
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


def _walk(root: Path, left_out: LeftOut) -> Listing:
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
                    name = folder + entry.name
                    if _leads_to_folder(entry):
                        if left_out.takes_folder(name, prefix + name):
                            subfolders.append((entry.is_symlink(), name + b"/"))
                    elif _is_shard(entry.name):
                        if not left_out.excludes(name):
                            names.append(name)
                    elif left_out.takes_file(name, partial(_head_of, entry, prefix + name)):
                        names.append(name)
        except OSError as error:
            if not folder:
                refuse(error)
            left_out.folder(folder[:-1], reason_of(error))
        # The last is taken first: real folders before linked ones, so that one reached both ways gets its own name.
        pending += [name for _, name in sorted(subfolders, reverse=True)]
    names.sort()
    return Listing(_with_members((prefix + name for name in names), left_out), left_out)


def _is_shard(name: bytes) -> bool:
    return name.lower().endswith(SUFFIX.encode()) and not name.startswith(b".")


def _head_of(entry: os.DirEntry[bytes], path: bytes) -> bytes:
    """The first bytes of a file in a folder; none where it is no regular file, as opening a pipe can block for ever."""
    try:
        return _head(path) if entry.is_file() else b""
    except OSError:
        return b""


def _head(path: bytes) -> bytes:
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(HEAD) or b""
    except OSError:
        return b""


def _leads_to_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # for example a link that points to itself
        return False


def _with_members(paths: Iterable[bytes], left_out: LeftOut) -> Iterator[bytes | Path]:
    """Replace each shard among the paths by its image members.

    A damaged shard also follows its members, and one that cannot be opened stays, so that reading it reports why.
    """
    for path in paths:
        if not _is_shard(os.path.basename(path)):
            yield path
            continue
        try:
            shard = read_shard(Path(os.fsdecode(path)))
        except OSError:
            yield path
            continue
        name = os.path.basename(path)
        for index, member in zip(shard.order, shard.files(), strict=True):
            if left_out.takes_member(os.fsencode(shard.names[index]), name, partial(shard.head, index, HEAD)):
                yield member
        if shard.damage:
            yield path
