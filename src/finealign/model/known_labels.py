"""Known labels of some of the images to adapt to: read, matched to the images, and told.

This is supervised data. It comes from the user alone, and only where it is given: ``evaluate`` reads the truth that a
model is measured by, and nothing here does.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, tensor

from finealign.errors import ConfigError, ImageInputError, display_path, first_few
from finealign.images.files import ImageReadError, checksum
from finealign.images.tables import read_table
from finealign.method.few_labels import STRANGER, UNKNOWN
from finealign.method.registry import find_method, method_names
from finealign.model.refusal import NONE_OF_THESE
from finealign.texts.names import Matcher, fold
from finealign.types import ImagePath

# A CSV with the columns path and label; class names by path; or one class name, or None, for each image.
Labels = str | Path | Mapping[str, str | None] | Mapping[Path, str | None] | Sequence[str | None]

CANNOT_TELL = "cannot tell"  # the label of an image that a person looked at in vain; it counts as unlabelled
SHOWN = 3


@dataclass(frozen=True)
class KnownLabels:
    """The known labels of images to adapt to."""

    classes: Mapping[str, int]  # by path: the class, or ``STRANGER`` for an image said to show none of the classes
    digests: Mapping[str, str] = field(default_factory=dict)  # by path: checksum of the image, where it can be read
    not_used: str = ""  # which labels are of no use, and why, as sentences

    def of(self, paths: Iterable[ImagePath]) -> Tensor | None:
        """Return what is known of each image, as ``method.few_labels`` has it: (n,) int64; None if nothing is."""
        known = tensor([self.classes.get(os.fspath(path), UNKNOWN) for path in paths])
        return known if bool((known != UNKNOWN).any()) else None


@dataclass(frozen=True)
class _Row:
    """A label as it was given: where, for which image, and the class."""

    where: str  # "line 3" or empty
    name: str  # the path as it was given
    places: tuple[str, ...]  # absolute paths that it may mean, the likeliest first
    label: str
    known: int


def read_known_labels(
    labels: Labels, paths: Sequence[ImagePath], classes: Sequence[str], *, folder: Path | None = None
) -> KnownLabels:
    """Read the labels and match them to the images at ``paths``.

    ``labels`` is a CSV with the columns path and label, class names by path, or a class name or None for each image in
    the order of ``paths``. Paths in a CSV are relative to its folder, else to the current folder or to ``folder``, that
    of the images; whichever names one of the images. Names match classes as labels do in ``evaluate``. "none of these"
    says that an image shows none of the classes, and "cannot tell" or None says nothing.

    Raises ImageInputError for a file that cannot be read, a name that is no class or may be several, two labels of one
    image or of copies of it, and where no label is of one of the images.
    """
    rows = list(_rows(labels, paths, classes, folder))
    if not rows:
        raise ImageInputError("There are no labels. Give at least one image its class, or leave the labels out.")
    found = _matched(rows, paths)
    known: dict[str, _Row] = {}
    missing = []
    for row in rows:
        named = next((found[place] for place in row.places if place in found), None)
        if named is None:
            missing.append(row)
            continue
        for path in named:
            before = known.setdefault(path, row)
            if before.known != row.known:
                raise ImageInputError(
                    f"'{display_path(path)}' has two labels: {before.label!r:.100}{before.where}, and "
                    f"{row.label!r:.100}{row.where}. Keep one."
                )
    if not known:
        raise ImageInputError(
            f"None of the {_count(len(rows), 'labelled image')} is among the {_count(len(paths), 'image')} to adapt "
            f"to; the first is '{display_path(rows[0].name)}'. Write paths relative to the folder of the file, or "
            "absolute ones."
        )
    certain = {path: row for path, row in known.items() if row.known != UNKNOWN}
    if not certain:
        raise ImageInputError(f"All labels are {CANNOT_TELL!r}, which says nothing. Give at least one image its class.")
    digests = _digests(certain, paths)
    _refuse_copies_apart(certain, digests)
    return KnownLabels({path: row.known for path, row in certain.items()}, digests, _not_used(missing))


def check_taken(name: str, *, given: bool) -> None:
    """Raise ConfigError where labels are given to a method that takes none, or are not given to one that needs them."""
    wants = find_method(name).known_labels
    if given and wants == "refused":
        valid = [other for other in method_names() if find_method(other).known_labels != "refused"]
        raise ConfigError(
            f"The method {name!r} learns nothing from labels. Leave them out, or take one of {', '.join(valid)}."
        )
    if not given and wants == "needed":
        raise ConfigError(
            f"The method {name!r} learns from labelled images and has none. Give some of the images their classes: "
            "`finealign adapt ... --labels FILE`, a CSV with the columns path and label, or fit(images, labels=...)."
        )


def told_labels(labels: KnownLabels, paths: Iterable[ImagePath], classes: Sequence[str]) -> dict[str, Any]:
    """What was learned from labels as JSON values, of the images at ``paths``, which could be read."""
    known = [labels.classes[name] for path in paths if (name := os.fspath(path)) in labels.classes]
    counts = {name: known.count(index) for index, name in enumerate(classes)}
    return {
        "images": len(known),
        "classes": {name: count for name, count in counts.items() if count},
        "none_of_these": known.count(STRANGER),
        "not_used": labels.not_used,
    }


def labels_in_words(told: Mapping[str, Any], classes: int) -> str:
    """What ``told_labels`` tells, as a clause."""
    text = f"{_count(told['images'], 'image')} with a label, of {len(told['classes'])} of the {classes} classes"
    if strangers := told["none_of_these"]:
        text += f", {strangers} of them {NONE_OF_THESE!r}"
    return text


def digest_of(path: ImagePath) -> str:
    """The checksum of an image's bytes; empty if they cannot be read."""
    try:
        return checksum(path)
    except ImageReadError:
        return ""


def _rows(labels: Labels, paths: Sequence[ImagePath], classes: Sequence[str], folder: Path | None) -> Iterator[_Row]:
    """All labels that were given. Raises ImageInputError."""
    matcher = Matcher(classes)
    if isinstance(labels, str | Path):
        table = Path(labels)
        if table.is_dir():
            raise ImageInputError(
                f"The labels '{display_path(table)}' are a folder. Give a CSV with the columns path and label."
            )
        bases = [base for base in (table.parent, Path(), folder) if base is not None]
        for number, row in enumerate(read_table(table, ("path", "label")), start=1):
            known = _class_of(row["label"], row["path"], classes, matcher)
            yield _Row(f" in row {number}", row["path"], _places(row["path"], bases), row["label"], known)
    elif isinstance(labels, Mapping):
        bases = [base for base in (Path(), folder) if base is not None]
        for path, label in labels.items():
            if label is not None:
                known = _class_of(label, path, classes, matcher)
                yield _Row("", os.fspath(path), _places(path, bases), label, known)
    else:
        if len(labels) != len(paths):
            raise ImageInputError(
                f"{_count(len(labels), 'label')} for {_count(len(paths), 'image')}. Give one for each image, None "
                "where it is not known, or a mapping of paths to class names."
            )
        for image, label in zip(paths, labels, strict=True):
            if label is not None:
                name = os.fspath(image)
                yield _Row("", name, (os.path.abspath(name),), label, _class_of(label, name, classes, matcher))


def _places(name: str | Path, bases: Sequence[Path]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(os.path.abspath(base / name) for base in bases))


def _class_of(label: object, path: str | Path, classes: Sequence[str], matcher: Matcher) -> int:
    """The class that a label names, ``STRANGER`` or ``UNKNOWN``. Raises ImageInputError."""
    found = matcher(label) if isinstance(label, str) else []
    if len(found) == 1:
        return found[0]
    if isinstance(label, str) and not found and fold(label) in (NONE_OF_THESE, CANNOT_TELL):
        return STRANGER if fold(label) == NONE_OF_THESE else UNKNOWN
    problem = "may be several classes; write one exactly" if found else "is no class"
    valid = first_few((f"{name!r:.60}" for name in classes), len(classes), 20)
    raise ImageInputError(
        f"The label {label!r:.100} of '{display_path(path)}' {problem}. Valid: {valid}, or {NONE_OF_THESE!r}, or "
        f"{CANNOT_TELL!r}."
    )


def _matched(rows: Sequence[_Row], paths: Sequence[ImagePath]) -> dict[str, list[str]]:
    """The images that rows may mean, as they are listed, by absolute path. Links are followed where it takes that."""
    wanted = {place for row in rows for place in row.places}
    found: dict[str, list[str]] = {}
    for path in paths:
        if (place := os.path.abspath(path)) in wanted:
            found.setdefault(place, []).append(os.fspath(path))
    real: dict[str, list[str]] = {}  # by real path: what rows without a match may mean
    for row in rows:
        if not any(place in found for place in row.places):
            for place in row.places:
                real.setdefault(os.path.realpath(place), []).append(place)
    for path in paths if real else ():
        for place in real.get(os.path.realpath(path), ()):
            found.setdefault(place, []).append(os.fspath(path))
    return found


def _digests(known: Collection[str], paths: Iterable[ImagePath]) -> dict[str, str]:
    digests = {name: digest_of(path) for path in paths if (name := os.fspath(path)) in known}
    return {path: digest for path, digest in digests.items() if digest}


def _refuse_copies_apart(known: Mapping[str, _Row], digests: Mapping[str, str]) -> None:
    """Raise ImageInputError where copies of one file have different labels."""
    first: dict[str, str] = {}
    for path, digest in digests.items():
        other = first.setdefault(digest, path)
        if known[other].known != known[path].known:
            raise ImageInputError(
                f"'{display_path(other)}' and '{display_path(path)}' are the same image, and their labels differ: "
                f"{known[other].label!r:.100} and {known[path].label!r:.100}. Keep one."
            )


def _not_used(missing: Sequence[_Row]) -> str:
    if not missing:
        return ""
    names = first_few((f"'{display_path(row.name)}'" for row in missing), len(missing), SHOWN)
    verb = "is" if len(missing) == 1 else "are"
    return f"{_count(len(missing), 'label')} {verb} of no image to adapt to, and not used: {names}."


def _count(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number} {what}s"
