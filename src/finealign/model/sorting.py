"""Images sorted into a folder for each label, as links to them or as copies. No file that is there is replaced."""

import filecmp
import os
import re
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from finealign.errors import OutputError, display_path
from finealign.images.files import ImageReadError, open_regular, reason_of
from finealign.images.formats import HEAD, SUFFIX_OF, format_of
from finealign.images.shards import find_shard
from finealign.model.refusal import NONE_OF_THESE, UNSURE
from finealign.runtime.atomic import make_folder
from finealign.types import HeldImage, ImagePath

LONGEST = 100  # bytes of a folder's name; file systems allow 255
# Names that Windows keeps for devices, whatever their ending.
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)", re.IGNORECASE)
_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')


class Sorter:
    """Puts each image into the folder of its label.

    An image of which there is a file is linked, or with ``copy`` copied; one in a shard, a dataset or memory is always
    written, as its bytes. Where a name is taken by another image, a number is appended to it; where the same image is
    there already, as after the same command, it stays as it is.
    """

    def __init__(self, folder: Path, classes: Sequence[str], *, copy: bool = False) -> None:
        """Nothing is written yet. Raises OutputError where ``folder`` is a file."""
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} is a file. Give another folder to sort the images into.")
        self.folder, self.copy = folder, copy
        self.folders = folder_names(classes)
        self.images = 0  # sorted, those that were there already included
        self.renamed = 0  # of these, under another name than their own
        self.problems: list[str] = []  # which images could not be sorted, and why
        self._made: set[Path] = set()  # what this run has sorted
        self._last: dict[str, int] = {}  # by the path wanted, the number of the last one of that name

    def add(self, image: ImagePath, label: str) -> None:
        """Sort one image. Raises OutputError where nothing can be written there."""
        folder = self.folder / self.folders[label]
        make_folder(folder)
        try:
            name = Path(_file_name(image))
            key = str(folder / name)
            number = self._last.get(key, 0) + 1
            while not self._put(image, folder / (f"{name.stem}-{number}{name.suffix}" if number > 1 else name)):
                number += 1
            self._last[key] = number
        except ImageReadError as error:
            self.problems.append(f"{display_path(image)}: {error}")
            return
        except OSError as error:
            how = "" if self.copy else " Where links are not possible, --copy copies the images instead."
            raise OutputError(f"{folder} cannot be written: {reason_of(error)}.{how}") from error
        self.images += 1
        self.renamed += number > 1

    def told(self) -> str:
        """One sentence on what was sorted, under which names, and what could not be."""
        done = "copied" if self.copy else "linked"
        parts = [f"{self.images} images {done} in {display_path(self.folder)}, in a folder of each label"]
        if self.renamed:
            parts.append(f"{self.renamed} under another name, as theirs was taken")
        if self.problems:
            parts.append(f"{len(self.problems)} could not be, the first {self.problems[0]}")
        return f"{'; '.join(parts)}."

    def as_json(self) -> dict[str, object]:
        """What was sorted as JSON values."""
        return {
            "into": display_path(self.folder),
            "images": self.images,
            "renamed": self.renamed,
            "problems": self.problems,
        }

    def _put(self, image: ImagePath, target: Path) -> bool:
        """Link or write the image to ``target`` unless another one is there. Returns whether it is there now."""
        source = None if isinstance(image, HeldImage) or find_shard(image) else image
        if target in self._made:
            return False
        if os.path.lexists(target):
            if not self._is_same(image, source, target):
                return False
        elif source is not None and not self.copy:
            target.symlink_to(source.absolute())
        else:
            with open_regular(image) as file:
                _write(file, target)
            if source is not None:
                shutil.copystat(source, target)
        self._made.add(target)
        return True

    def _is_same(self, image: ImagePath, source: Path | None, target: Path) -> bool:
        if source is not None and not self.copy:
            return target.is_symlink() and target.readlink() == source.absolute()
        if target.is_symlink() or not target.is_file():
            return False
        if source is not None:
            return filecmp.cmp(source, target, shallow=False)
        with open_regular(image) as file, target.open("rb") as there:
            return file.read() == there.read()


def _write(file: BinaryIO, target: Path) -> None:
    """Write a new file, whole or not at all. Raises OSError."""
    with target.open("xb") as written:
        try:
            shutil.copyfileobj(file, written)
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def folder_names(classes: Sequence[str]) -> dict[str, str]:
    """A folder's name for each class, for "none of these" and for "unsure", which start with an underscore.

    What no system allows in names is replaced by an underscore, and classes that would share a folder get a number.
    """
    names = {NONE_OF_THESE: f"_{NONE_OF_THESE}", UNSURE: f"_{UNSURE}"}
    taken = {name.casefold() for name in names.values()}
    for label in classes:
        wanted = name = _safe(label)
        number = 1
        while name.casefold() in taken:
            number += 1
            name = f"{wanted}-{number}"
        taken.add(name.casefold())
        names[label] = name
    return names


def _safe(label: str) -> str:
    name = _UNSAFE.sub("_", unicodedata.normalize("NFC", label)).strip()
    name = name.encode("utf-8", "replace")[:LONGEST].decode("utf-8", "ignore")
    name = name.rstrip(". ")  # which Windows would leave out
    if not name or name.startswith(".") or _DEVICES.match(name):
        name = f"_{name.lstrip('.')}"
    return name


def _file_name(image: ImagePath) -> str:
    """The name of the image's file; of a held one its name with the ending of its format. Raises ImageReadError."""
    if not isinstance(image, HeldImage):
        return image.name
    with open_regular(image) as file:
        ending = SUFFIX_OF.get(format_of(file.read(HEAD)) or "", "")
    return _UNSAFE.sub("-", str(image)) + ending


def refuse_within(folder: Path, images: str) -> None:
    """Raise OutputError where ``folder`` lies in a folder of images, so that what is sorted would be read with them."""
    if Path(images).is_dir() and folder.resolve().is_relative_to(Path(images).resolve()):
        raise OutputError(
            f"{folder} lies in the folder of the images, {images}, so what is sorted would be read as images the next "
            "time. Give a folder outside it."
        )
