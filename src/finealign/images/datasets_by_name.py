"""Hugging Face datasets by name: ``hf:NAME:SPLIT`` for one of the hub, or a folder that one was saved to.

The library ``datasets`` is an extra, and imported when such a name is met.
"""

import os
import re
import stat
from pathlib import Path
from typing import Any

from finealign.errors import ImageInputError, display_path, first_few, sentence

PREFIX = "hf:"
FORM = "hf:NAME:SPLIT, as hf:ethz/food101:validation, or hf:NAME:CONFIGURATION:SPLIT"
_SAVED, _SAVED_SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` has written the folder."""
    return all(_is_file(folder / name) for name in _SAVED) or _is_file(folder / _SAVED_SPLITS)


def is_dataset(source: object) -> bool:
    """Whether a text or path names a dataset rather than a folder, a list or an image."""
    if isinstance(source, str) and source.startswith(PREFIX):
        return True
    return isinstance(source, str | Path) and is_saved_dataset(Path(source))


def open_dataset(source: str | Path) -> tuple[Any, str]:
    """One split of the dataset that ``source`` names, where ``is_dataset`` says so, and the name of the split.

    Raises ImageInputError where the library is missing, there is no such dataset, or it has several splits and none is
    named.
    """
    try:
        import datasets
    except ImportError:
        raise ImageInputError(
            f"'{display_path(source)}' is a Hugging Face dataset, which needs the package datasets: "
            "pip install 'finealign[datasets]'."
        ) from None
    if isinstance(source, str) and source.startswith(PREFIX):
        name, configuration, split = _parts(source)
        # A split is chosen below, so that one that is missing is told with those that are there.
        slicing = split if split and re.search(r"[\[+]", split) else None
        try:
            found = datasets.load_dataset(name, configuration, split=slicing)
        except Exception as error:  # of the hub, the network, the disk, or the dataset's own files
            raise ImageInputError(
                f"The dataset {name!r} cannot be loaded ({type(error).__name__}): {sentence(error)} Wanted: {FORM}; it "
                "is fetched from the hub unless this machine has it. Or give a folder of images."
            ) from error
        if slicing:
            return found, slicing
        return _one_split(found, split, f"{PREFIX}{':'.join(filter(None, (name, configuration)))}:")
    try:
        found = datasets.load_from_disk(os.fspath(source))
    except Exception as error:  # damaged files make it raise nearly anything
        raise ImageInputError(
            f"The dataset saved in '{display_path(source)}' cannot be read ({type(error).__name__}): "
            f"{sentence(error)} Save it again."
        ) from error
    if isinstance(found, dict):
        return _one_split(found, None, f"{display_path(source)}/")
    return found, str(found.split or display_path(Path(source).resolve().name))


def _parts(source: str) -> tuple[str, str | None, str | None]:
    """Name, configuration and split of ``hf:...``. Raises ImageInputError."""
    # A slice of a split, as train[:100], holds a colon as well.
    parts = re.split(r":(?![^\[]*\])", source.removeprefix(PREFIX))
    if len(parts) > 3 or not all(parts):
        raise ImageInputError(f"Found {source!r}, wanted {FORM}.")
    name, *rest = parts
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else None


def _one_split(found: dict[str, Any], wanted: str | None, address: str) -> tuple[Any, str]:
    if wanted is None and len(found) == 1:
        wanted = next(iter(found))
    if wanted not in found:
        names = first_few((f"'{address}{name}'" for name in found), len(found), 10)
        problem = f"has no split {wanted!r}" if wanted else "has several splits"
        raise ImageInputError(f"The dataset {problem}. Valid: {names}.")
    return found[wanted], wanted


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return False
