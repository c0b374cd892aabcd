"""The plan of a review: which images a person is asked about, in which order, and what is kept of the two models."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finealign.errors import ConfigError, ImageInputError, display_path, unknown_name
from finealign.model.known_labels import CANNOT_TELL
from finealign.model.refusal import NONE_OF_THESE
from finealign.review.sampling import AIMS, Aim, Floats, Ints, draw
from finealign.types import Prediction

CHOICES = 9  # classes that are offered by a key
MOST_PLANNED = 5000  # images that a plan lists at most; a folder may hold millions
FORMAT = 1

Why = Literal["measuring", "learning"]


@dataclass(frozen=True)
class Item:
    """One image to ask about. Classes are indices."""

    path: str  # absolute
    stratum: int  # -1 for an image that was chosen for learning
    adapted: int  # what the adapted model labels it
    start: int  # what the model before adaptation does
    choices: tuple[int, ...]  # the likeliest classes by both models together, in the order of the classes

    @property
    def why(self) -> Why:
        """What the image was chosen for."""
        return "learning" if self.stratum < 0 else "measuring"


@dataclass(frozen=True)
class Plan:
    """The images to ask about: those to measure by, in the order in which they count, and then those to learn from."""

    classes: tuple[str, ...]
    images: int  # images that are measured
    learned_from: int  # images left out, as the model learned from their labels
    aim: Aim
    budget: int  # labels planned for
    seed: int
    sizes: tuple[int, ...]  # images of each stratum
    unchanged: tuple[bool, ...]  # strata in which no label changed
    expected: tuple[float, ...]  # mean confidence of each stratum
    measuring: tuple[Item, ...]
    learning: tuple[Item, ...]

    def as_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """The plan that ``as_json`` told of. Raises KeyError, TypeError or ValueError for anything else."""
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']!r}, and this release reads {FORMAT}")
        kept = {name: values[name] for name in cls.__dataclass_fields__}
        for name in ("classes", "sizes", "unchanged", "expected"):
            kept[name] = tuple(kept[name])
        for name in ("measuring", "learning"):
            kept[name] = tuple(Item(**{**item, "choices": tuple(item["choices"])}) for item in kept[name])
        return cls(**kept)


@dataclass(frozen=True, eq=False)
class Population:
    """The images of which a review is made, as both models see them: n images."""

    paths: list[str]  # absolute
    adapted: Ints  # (n,) class index by the adapted model
    start: Ints  # (n,)
    confidence: Floats  # (n,) calibrated, of the adapted model in its label
    choices: Ints  # (n, at most CHOICES)


def absolute(path: str | os.PathLike[str]) -> str:
    """The path by which an image is known in plans and in files of labels."""
    return os.path.normpath(Path(display_path(path)).absolute())


def look_at(predictions: Iterable[Prediction], *, classes: int) -> Population:
    """Keep what a plan needs of predictions that the adapted model made ``with_start``.

    Raises ImageInputError if there are none.
    """
    paths, labels, starts, confidence, choices = list[str](), list[int](), list[int](), list[float](), list[Ints]()
    for prediction in predictions:
        start = prediction.start_probabilities
        if start is None:
            raise ValueError("the predictions are not made with_start")
        own = prediction.probabilities
        paths.append(absolute(prediction.path))
        labels.append(int(own.argmax()))
        starts.append(int(start.argmax()))
        confidence.append(float(own.max()))
        wanted = own + start
        wanted[[labels[-1], starts[-1]]] += 2  # what a model says is always offered
        choices.append(np.sort(np.argsort(-wanted, kind="stable")[: min(CHOICES, classes)]).astype(np.int32))
    if not paths:
        raise ImageInputError("None of the images could be read, so there is nothing to review.")
    return Population(paths, np.array(labels), np.array(starts), np.array(confidence), np.stack(choices))


def make_plan(
    population: Population,
    classes: Sequence[str],
    *,
    aim: Aim = "both",
    budget: int = 60,
    learning: int = 0,
    seed: int = 0,
    learned_from: Iterable[str] = (),
) -> Plan:
    """Choose the images to ask about.

    ``learning`` is how many to choose for learning, apart from the ``budget`` to measure by: one of each predicted
    class in turn, drawn at random within it, as with few labels typical images teach more than odd ones (Hacohen et
    al., ICML 2022). ``learned_from`` are paths whose labels the model has learned from; none of them is measured.

    Raises ConfigError for another ``aim``, a number below its least, or a class that bears the name of an answer, and
    ImageInputError if the model learned from all images.
    """
    if aim not in AIMS:
        raise ConfigError(unknown_name("aim", str(aim), AIMS))
    if budget < 1 or learning < 0:
        raise ConfigError(f"Found {budget} labels to measure by and {learning} to learn from; at least 1 and 0.")
    for name in classes:
        if name.strip().casefold() in (NONE_OF_THESE, CANNOT_TELL):
            raise ConfigError(f"A class is called {name!r}, which is also an answer. Adapt with another name for it.")
    taught = {os.path.realpath(path) for path in learned_from}
    kept = np.array(
        [i for i, path in enumerate(population.paths) if not taught or os.path.realpath(path) not in taught]
    )
    if not len(kept):
        raise ImageInputError("The model learned from the labels of all these images. Review others by --images.")
    changed = population.adapted[kept] != population.start[kept]
    predicted = population.adapted[kept]
    design = draw(population.confidence[kept], changed, predicted, aim=aim, budget=budget, seed=seed)
    order = kept[design.order]
    apart = order[min(budget, len(order)) :]

    def item(place: int, stratum: int) -> Item:
        return Item(
            path=population.paths[place],
            stratum=stratum,
            adapted=int(population.adapted[place]),
            start=int(population.start[place]),
            choices=tuple(population.choices[place].tolist()),
        )

    strata = design.stratum[design.order].tolist()
    listed = zip(order.tolist()[:MOST_PLANNED], strata, strict=False)
    return Plan(
        classes=tuple(classes),
        images=len(kept),
        learned_from=len(population.paths) - len(kept),
        aim=aim,
        budget=budget,
        seed=seed,
        sizes=tuple(design.sizes.tolist()),
        unchanged=tuple(design.unchanged.tolist()),
        expected=tuple(design.expected.round(6).tolist()),
        measuring=tuple(item(place, stratum) for place, stratum in listed),
        learning=tuple(item(place, -1) for place in _of_each_class(apart, population.adapted, learning, seed)),
    )


def _of_each_class(places: Ints, predicted: Ints, count: int, seed: int) -> Iterator[int]:
    """``count`` of the places: of each predicted class in turn, at random within it."""
    rng = np.random.default_rng((seed, 1))
    shuffled = rng.permutation(places)
    turn = np.zeros(len(shuffled), dtype=np.int64)
    for label in np.unique(predicted[shuffled]):
        there = predicted[shuffled] == label
        turn[there] = np.arange(there.sum())
    yield from shuffled[np.argsort(turn, kind="stable")][:count].tolist()
