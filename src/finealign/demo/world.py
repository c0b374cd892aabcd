"""Draw the demo's world into a folder: unlabelled images, test images, and their true classes for measuring alone."""

import csv
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finealign.demo.painting import paint
from finealign.demo.species import SPECIES, describe
from finealign.runtime.atomic import save_text
from finealign.runtime.progress import Progress

_CHUNK = 50  # images per task of a thread
_WORKERS = 2  # threads; Pillow and numpy do half of the work without holding the interpreter's lock


@dataclass(frozen=True)
class World:
    """The files of a world, and the names and descriptions of its classes."""

    unlabelled: Path  # a flat folder of PNGs whose names say nothing of their classes
    truth: Path  # a CSV path,label of the test images
    hidden: Path  # the same of the unlabelled images: for a linear probe that shows the best accuracy, not for training
    classes: tuple[str, ...]
    descriptions: dict[str, tuple[str, ...]]


def make_world(
    folder: Path, *, seed: int, unlabelled: int = 1200, test: int = 600, progress: Progress | None = None
) -> World:
    """Draw the images and write their true classes; ``unlabelled`` and ``test`` are numbers of images.

    Over all images the species are equally frequent, to within one image, and in random order. An image depends on
    ``seed`` and its number alone. ``folder`` is created. Raises FileExistsError where it exists already, and other
    OSErrors where nothing can be written.
    """
    folder.mkdir(parents=True)
    folders = folder / "unlabelled", folder / "test"
    order = np.random.default_rng(seed).permutation(np.arange(unlabelled + test) % len(SPECIES)).tolist()
    paths = [folders[number >= unlabelled] / f"{number:05d}.png" for number in range(unlabelled + test)]
    for subfolder in folders:
        subfolder.mkdir()
    with (progress or Progress()).stage("drawing birds", len(paths)) as stage, ThreadPoolExecutor(_WORKERS) as pool:
        numbers = list(_chunks(range(len(paths))))
        work = pool.map(
            _draw, [seed] * len(numbers), numbers, [[order[i] for i in chunk] for chunk in numbers],
            [[paths[i] for i in chunk] for chunk in numbers],
        )  # fmt: skip
        for count in work:
            stage.advance(count)
    hidden, truth = folder / "unlabelled.csv", folder / "test.csv"
    _write_truth(hidden, paths[:unlabelled], order[:unlabelled])
    _write_truth(truth, paths[unlabelled:], order[unlabelled:])
    classes = tuple(name for name, _ in SPECIES)
    descriptions = {name: describe(index) for index, name in enumerate(classes)}
    return World(unlabelled=folders[0], truth=truth, hidden=hidden, classes=classes, descriptions=descriptions)


def _draw(seed: int, numbers: Sequence[int], species: Sequence[int], paths: Sequence[Path]) -> int:
    """Draw one image per number, species index and path; returns how many."""
    for number, index, path in zip(numbers, species, paths, strict=True):
        paint(SPECIES[index][1], np.random.default_rng((seed, number))).save(path, compress_level=1)
    return len(numbers)


def _chunks(numbers: range) -> Iterator[list[int]]:
    for start in range(0, len(numbers), _CHUNK):
        yield list(numbers[start : start + _CHUNK])


def _write_truth(table: Path, paths: Sequence[Path], labels: Sequence[int]) -> None:
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(("path", "label"))
    rows.writerows(
        (path.relative_to(table.parent).as_posix(), SPECIES[i][0]) for path, i in zip(paths, labels, strict=True)
    )
    save_text(text.getvalue(), table)
