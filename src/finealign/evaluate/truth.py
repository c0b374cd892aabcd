"""Reading ground truth: the only module that does so."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from finealign.errors import ImageInputError, display_path, first_few
from finealign.evaluate.metrics import check_classes
from finealign.images.listing import list_images
from finealign.images.tables import read_table
from finealign.texts.names import Matcher
from finealign.types import Truth

UNKNOWN_SHOWN = 10
VALID_SHOWN = 20


# --- reading the truth ------------------------------------------------------------------------------------------------


def read_truth(source: str | Path, classes: Sequence[str]) -> Truth:
    """The true class of each image, from a folder of class folders or from a CSV with columns ``path,label``.

    A folder holds ``<class>/**/<image>``; paths in a CSV are relative to the folder of the CSV. A name is first matched
    to the class names exactly, then ignoring case, Unicode form and the difference between ``_``, ``-`` and white
    space. Class names that differ in these alone have to be written exactly. Classes without images are allowed.

    Raises:
        ImageInputError: ``source`` is missing or holds no images, an image lies outside the class folders, a name
            matches no class or several, a CSV lists an image twice or only images that do not exist.
        ValueError: a name occurs twice in ``classes``.
    """
    check_classes(classes)
    source = Path(source)
    if os.path.isdir(source):
        labelled = _read_folders(source)
    elif os.path.exists(source):
        labelled = _read_csv(source)
    else:
        raise ImageInputError(
            f"No ground truth at {_shown(source)}. "
            "Give a folder with one sub-folder a class, or a CSV with columns path,label."
        )
    matches = Matcher(classes)
    index = {name: matches(name) for name in {name for _, name in labelled}}
    unknown = Counter(name for _, name in labelled if len(index[name]) != 1)
    if unknown:
        raise ImageInputError(_unknown_classes(source, unknown, matches, classes))
    return Truth(
        paths=tuple(path for path, _ in labelled),
        labels=tuple(index[name][0] for _, name in labelled),
    )


def _read_folders(root: Path) -> list[tuple[Path, str]]:
    images = list_images(root)
    stray = [path for path in images if path.parent == root]
    if stray:
        folders = "no class folders" if len(stray) == len(images) else "class folders"
        raise ImageInputError(
            f"{_shown(root)} holds {folders} and {_images(len(stray))} directly in it, such as "
            f"{_shown(stray[0].name)}, whose class is not told. "
            "Put each image in a sub-folder named after its class, or give a CSV with columns path,label."
        )
    return [(path, path.relative_to(root).parts[0]) for path in images]


def _read_csv(table: Path) -> list[tuple[Path, str]]:
    labelled = [(table.parent / row["path"], row["label"]) for row in read_table(table, ("path", "label"))]
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
    source: Path, unknown: Counter[str], matches: Callable[[str], list[int]], classes: Sequence[str]
) -> str:
    def described(name: str) -> str:
        candidates = " or ".join(f"{classes[index]!r:.100}" for index in matches(name))
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
