"""Draw the demo's world into a folder: unlabelled images, test images, and the truth that only measuring may read."""

import csv
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finealign.demo.painting import paint
from finealign.demo.species import SPECIES, describe
from finealign.progress import Progress
from finealign.storage import save_text

_CHUNK = 50  # images a task of a worker
_WORKERS = 2  # threads: half of the work is done by Pillow and numpy without the interpreter's lock


@dataclass(frozen=True)
class World:
    """Where the world lies, and what is known of its classes without looking at an image."""

    unlabelled: Path  # a flat folder of PNGs whose names mean nothing
    truth: Path  # a CSV path,label of the test images
    hidden: Path  # the same of the unlabelled images: for a probe that shows the ceiling, never for training
    classes: tuple[str, ...]
    descriptions: dict[str, tuple[str, ...]]


def make_world(
    folder: Path, *, seed: int, unlabelled: int = 1200, test: int = 600, progress: Progress | None = None
) -> World:
    """Draw ``unlabelled`` and ``test`` images, every species equally often within one, in an order that tells nothing.

    Each image comes from (seed, its number) alone. ``folder`` is made and must not exist. Raises FileExistsError.
    """
    folder.mkdir(parents=True)
    images = folder / "unlabelled", folder / "test"
    order = np.random.default_rng(seed).permutation(np.arange(unlabelled + test) % len(SPECIES)).tolist()
    paths = [images[number >= unlabelled] / f"{number:05d}.png" for number in range(unlabelled + test)]
    for place in images:
        place.mkdir()
    with (progress or Progress()).stage("drawing birds", len(paths)) as stage, ThreadPoolExecutor(_WORKERS) as pool:
        numbers = list(_chunks(range(len(paths))))
        work = pool.map(
            _draw, [seed] * len(numbers), numbers, [[order[i] for i in chunk] for chunk in numbers],
            [[paths[i] for i in chunk] for chunk in numbers],
        )  # fmt: skip
        for drawn in work:
            stage.advance(drawn)
    hidden, truth = folder / "unlabelled.csv", folder / "test.csv"
    _write_truth(hidden, paths[:unlabelled], order[:unlabelled])
    _write_truth(truth, paths[unlabelled:], order[unlabelled:])
    classes = tuple(name for name, _ in SPECIES)
    descriptions = {name: describe(index) for index, name in enumerate(classes)}
    return World(unlabelled=images[0], truth=truth, hidden=hidden, classes=classes, descriptions=descriptions)


def _draw(seed: int, numbers: Sequence[int], species: Sequence[int], paths: Sequence[Path]) -> int:
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
