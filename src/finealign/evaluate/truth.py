"""Reading ground truth: the only module that does so."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from finealign.errors import ImageInputError, display_path, first_few
from finealign.evaluate.metrics import check_classes
from finealign.images.listing import left_out_of, list_images, not_excluded
from finealign.images.tables import read_table
from finealign.texts.names import Matcher
from finealign.types import Truth

UNKNOWN_SHOWN = 10
VALID_SHOWN = 20
_SLASHES = re.compile(r"[/\\:\u2044\u2215\uff0f]")  # a slash, and what file systems have in its place


# --- reading the truth ------------------------------------------------------------------------------------------------


def read_truth(
    source: str | Path, classes: Sequence[str], *, strict: bool = False, exclude: Sequence[str] = ()
) -> Truth:
    """The true class of each image, from a folder of class folders or from a CSV with columns ``path,label``.

    A folder holds ``<class>/**/<image>``; paths in a CSV are relative to the folder of the CSV. A name is first matched
    to the class names exactly, then ignoring case, Unicode form and the difference between ``_``, ``-`` and white
    space. Class names that differ in these alone have to be written exactly. The folder of a class with a slash in its
    name has another character for it, or is two folders. Classes without images are allowed. Images of names that match
    no class are left out, which ``Truth.unknown`` and a warning tell, or refused if ``strict``. ``exclude`` leaves
    images out as in ``list_images``.

    Raises:
        ImageInputError: ``source`` is missing or holds no images, an image lies outside the class folders, no name
            matches a class (or one does not, if ``strict``), a name matches several, a CSV lists an image twice or
            only images that do not exist.
        ValueError: a name occurs twice in ``classes``.
    """
    check_classes(classes)
    source, matcher = Path(source), Matcher(classes)
    if os.path.isdir(source):
        labelled, left_out = _read_folders(source, matcher, classes, exclude)
    elif os.path.exists(source):
        labelled, left_out = _read_csv(source, exclude), ""
    else:
        raise ImageInputError(
            f"No ground truth at {_shown(source)}. "
            "Give a folder with one sub-folder a class, or a CSV with columns path,label."
        )
    matches = _also_without_slashes(matcher, classes)
    index = {name: matches(name) for name in {name for _, name in labelled}}
    unknown = Counter(name for _, name in labelled if len(index[name]) != 1)
    known = [(path, index[name][0]) for path, name in labelled if name not in unknown]
    if unknown and (strict or not known or any(index[name] for name in unknown)):
        hint = "" if known else _class_folders_deeper(source, labelled, matches)
        raise ImageInputError(_unknown_classes(source, unknown, index, classes) + hint)
    if unknown:
        warnings.warn(unknown_line(unknown), stacklevel=2)
    return Truth(
        paths=tuple(path for path, _ in known),
        labels=tuple(label for _, label in known),
        left_out=left_out,
        unknown=dict(unknown),
    )


def without(truth: Truth, learned: Collection[Path]) -> Truth:
    """The truth without images whose labels the model was given. Raises ImageInputError if no other is left."""
    learned = set(learned)
    kept = [(path, label) for path, label in zip(truth.paths, truth.labels, strict=True) if path not in learned]
    if not kept:
        raise ImageInputError(
            f"The model was given the labels of all {_images(len(truth.paths))} measured here, so they say nothing of "
            "others. Give other labelled images, or --count-learned to measure these all the same."
        )
    return replace(truth, paths=tuple(path for path, _ in kept), labels=tuple(label for _, label in kept))


def learned_line(learned: Mapping[str, Any] | None) -> str:
    """Say that images are not measured as the model was given their labels, or that they count all the same."""
    if not learned:
        return ""
    if learned["counted"]:
        return f"The model was given the labels of {_images(learned['images'])} measured here, which flatters it."
    return (
        f"Left out, as the model was given the labels: {_images(learned['images'])}. --count-learned measures such "
        "images as well."
    )


def unknown_line(unknown: Mapping[str, int]) -> str:
    """Say which names match no class, so that their images are not measured; empty if there are none."""
    if not unknown:
        return ""
    listed = (f"{name!r:.100} ({_images(unknown[name])})" for name in sorted(unknown))
    names = first_few(listed, len(unknown), UNKNOWN_SHOWN)
    return f"Left out, as no class of the model is called so: {names}."


def _read_folders(
    root: Path, matcher: Matcher, classes: Sequence[str], exclude: Sequence[str]
) -> tuple[list[tuple[Path, str]], str]:
    images = list_images(root, exclude=exclude)
    stray = [path for path in images if path.parent == root]
    if stray:
        folders = "no class folders" if len(stray) == len(images) else "class folders"
        raise ImageInputError(
            f"{_shown(root)} holds {folders} and {_images(len(stray))} directly in it, such as "
            f"{_shown(stray[0].name)}, whose class is not told. "
            "Put each image in a sub-folder named after its class, or give a CSV with columns path,label."
        )
    deepest = max(name.count("/") for name in classes)
    named = cache(lambda folders: _class_of_folders(folders, matcher, classes))
    labelled = [(path, named(path.relative_to(root).parts[:-1][: deepest + 1])) for path in images]
    return labelled, left_out_of(images)


def _class_of_folders(folders: tuple[str, ...], matcher: Matcher, classes: Sequence[str]) -> str:
    """The class name that folders within one another spell, as ``AC`` and ``DC`` do "AC/DC"; else the first folder."""
    for depth in range(len(folders), 1, -1):
        name = "/".join(folders[:depth])
        if len(found := matcher(name)) == 1 and "/" in classes[found[0]]:
            return classes[found[0]]
    return folders[0]


def _class_folders_deeper(root: Path, labelled: Sequence[tuple[Path, str]], matches: Callable[[str], list[int]]) -> str:
    """A sentence that names a folder whose folders are called as classes, as of data sets with a split; or nothing."""
    for path, _ in labelled:
        if not path.is_relative_to(root):
            return ""
        folders = path.relative_to(root).parts[:-1]
        if len(folders) > 1 and len(matches(folders[1])) == 1:
            return f" The folders in {_shown(root / folders[0])} are called as classes: give that one."
    return ""


def _also_without_slashes(matcher: Matcher, classes: Sequence[str]) -> Callable[[str], list[int]]:
    """As ``matcher``; a name without a match may have another character for a slash, which no folder can hold."""
    replaced = Matcher([_SLASHES.sub(" ", name) for name in classes])
    return lambda name: matcher(name) or replaced(_SLASHES.sub(" ", name))


def _read_csv(table: Path, exclude: Sequence[str]) -> list[tuple[Path, str]]:
    rows = read_table(table, ("path", "label"))
    kept = set(not_excluded((row["path"] for row in rows), exclude))
    labelled = [(table.parent / row["path"], row["label"]) for row in rows if row["path"] in kept]
    if not labelled:
        raise ImageInputError(
            f"{_shown(table)} lists no images. Give one row an image: its path, and its class as the label."
        )
    repeated = [path for path, times in Counter(os.path.abspath(path) for path, _ in labelled).items() if times > 1]
    if repeated:
        raise ImageInputError(
            f"{_shown(table)} lists {_images(len(repeated))} more than once, such as {_shown(repeated[0])}. "
            "Keep one row an image."
        )
    if not any(os.path.exists(path) for path, _ in labelled):
        raise ImageInputError(
            f"None of the {_images(len(labelled))} in {_shown(table)} exists; "
            f"the first was looked for at {_shown(labelled[0][0])}. "
            f"Write paths relative to {_shown(table.parent)}, the folder of the CSV."
        )
    return labelled


def _unknown_classes(
    source: Path, unknown: Counter[str], index: Mapping[str, Sequence[int]], classes: Sequence[str]
) -> str:
    def described(name: str) -> str:
        candidates = " or ".join(f"{classes[place]!r:.100}" for place in index[name])
        hint = f"; could be {candidates}, write one exactly" if candidates else ""
        return f"{name!r:.100} ({_images(unknown[name])}{hint})"

    kind = "folder" if os.path.isdir(source) else "label"
    names = f"{kind} name matches" if len(unknown) == 1 else f"{kind} names match"
    listed = first_few((described(name) for name in sorted(unknown)), len(unknown), UNKNOWN_SHOWN)
    valid = first_few((f"{name!r:.100}" for name in classes), len(classes), VALID_SHOWN)
    return (
        f"{len(unknown)} {names} no class in {_shown(source)}, with {_images(unknown.total())}: {listed}. "
        f"Rename or remove them. Valid class names: {valid}."
    )


def _shown(path: str | Path) -> str:
    return f"'{display_path(path)}'"


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"
