"""The results of a demo, and the names of its methods and files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finealign.evaluate.metrics import Interval

METHODS = {  # in the order they are run and shown, with what each is in a few words
    "zero-shot": "class names in templates",
    "cupl": "mean of class descriptions",
    "wca": "weighted crops and descriptions",
    "self-training": "learns from the start's labels",
    "fair": "learns, relabelling by crops",
}
TRAINED = ("self-training", "fair")
START = "cupl"  # the start of both methods that train, so gains are measured against it
ADAPTED = "fair"

WORLD, PICTURE, RESULT, REPORT = "world", "demo.png", "demo.json", "report.md"
CONTENTS = (WORLD, *TRAINED, PICTURE, RESULT, REPORT)
SYNTHETIC = (
    "The world is synthetic: a program draws the birds and their names are invented. "
    "The figures compare the methods here and say nothing about photos."
)


@dataclass(frozen=True)
class MethodResult:
    """The result of one method on the test images, by its default score."""

    method: str
    top1: Interval  # a fraction in [0, 1], with its 95 % interval
    gain: Interval | None  # the paired difference to START on the same images; None for START itself
    seconds: float  # adapting and scoring the test images, without loading, drawing the world and measuring epochs
    images_per_second: float  # speed of scoring the test images
    curve: tuple[float, ...]  # top-1 after epoch 0 (nothing learned), 1, ...; empty for methods that do not train
    run: Path | None  # the run folder of a method that trains


@dataclass(frozen=True)
class DemoResult:
    """The results of a demo, and where its files are."""

    folder: Path
    methods: tuple[MethodResult, ...]
    chance: float  # the accuracy of guessing: one over the number of classes
    seconds: float  # of the whole demo
    seed: int
    quick: bool
    unlabelled: int  # number of images adapted to
    test: int  # number of images measured on

    @property
    def picture(self) -> Path:
        """The path of ``demo.png``."""
        return self.folder / PICTURE

    @property
    def report(self) -> Path:
        """The path of ``report.md``."""
        return self.folder / REPORT

    def as_json(self) -> dict[str, Any]:
        """The results as JSON values, without intervals, gains and curves."""
        return {
            "results": [
                {
                    "method": result.method,
                    "top1": result.top1.mean,
                    "seconds": round(result.seconds, 3),
                    "images_per_second": round(result.images_per_second, 1),
                }
                for result in self.methods
            ],
            "chance": self.chance,
            "out": str(self.folder),
            "picture": str(self.picture),
            "report": str(self.report),
            "seconds": round(self.seconds, 2),
            "seed": self.seed,
            "quick": self.quick,
            "images": {"unlabelled": self.unlabelled, "test": self.test},
        }


def points(difference: Interval) -> str:
    """The text of a difference between two accuracies (fractions) and its interval, in points."""
    return f"{100 * difference.mean:+.1f} ({100 * difference.low:+.1f} to {100 * difference.high:+.1f})"
