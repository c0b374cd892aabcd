"""A review under way: which image each window is asked about, and the answers, written down as they come."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from finealign.errors import FinealignError
from finealign.model.known_labels import CANNOT_TELL
from finealign.model.refusal import NONE_OF_THESE
from finealign.review.figures import Measured, measure
from finealign.review.labels import LabelFile
from finealign.review.plan import Item, Plan

KEPT_FOR = 600.0  # seconds for which an image waits for the window that it was given to


class AnswerError(FinealignError):
    """An answer that cannot be taken; ``kind`` is a word for programs."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Progress:
    """How far a review is."""

    labelled: int  # images with a label that count towards the target
    target: int
    cannot_tell: int  # images that the person could not name
    learned: int  # images labelled of those chosen for learning
    to_learn: int
    held: int  # images that other windows have

    @property
    def done(self) -> bool:
        """Whether nothing is left to be asked."""
        return self.labelled >= self.target and self.learned >= self.to_learn


@dataclass
class _Window:
    item: int | None = None  # number of the image that it shows
    until: float = 0.0
    answered: list[int] = field(default_factory=list)  # numbers of the images it answered, the last one last


class Session:
    """One process's review. An image is never given to two windows at once, and never asked about again.

    ``target`` is how many images are to be labelled for the figures.
    """

    def __init__(
        self, plan: Plan, labels: LabelFile, *, target: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.plan, self.labels = plan, labels
        self.target = min(target, len(plan.measuring))
        self.items = (*plan.measuring, *plan.learning)
        self._clock = clock
        self._windows: dict[str, _Window] = {}

    def item(self, number: int) -> Item:
        """The image of this number. Raises AnswerError."""
        if not 0 <= number < len(self.items):
            raise AnswerError("unknown", f"There is no image of number {number}.")
        return self.items[number]

    def take(self, window: str) -> int | None:
        """The number of the image that this window asks about next; None if there is none for it now.

        A window that asks again before it has answered gets the same one.
        """
        mine = self._windows.setdefault(window, _Window())
        if mine.item is None or self.items[mine.item].path in self.labels.rows:
            mine.item = self._next({one.item for one in self._others(window)})
        mine.until = self._clock() + KEPT_FOR
        return mine.item

    def _next(self, held: set[int | None]) -> int | None:
        """The first image that may be asked about now."""
        first = 0 if self.progress().labelled < self.target else len(self.plan.measuring)
        for number in range(first, len(self.items)):
            if number not in held and self.items[number].path not in self.labels.rows:
                return number
        return None

    def _others(self, window: str) -> list[_Window]:
        """The other windows that were heard of lately."""
        now = self._clock()
        return [other for name, other in self._windows.items() if name != window and other.until > now]

    def leave(self, window: str) -> None:
        """Let other windows have the image of this one."""
        if window in self._windows:
            self._windows[window].item = None

    def answer(self, window: str, number: int, label: str) -> Item:
        """Write down the answer for an image, and return the image. Raises AnswerError and OutputError."""
        item = self.item(number)
        if label not in (*self.plan.classes, NONE_OF_THESE, CANNOT_TELL):
            raise AnswerError("label", f"{label!r:.100} is none of the classes or answers.")
        if item.path in self.labels.rows:
            raise AnswerError("answered", "This image has its label already, from another window. It was not changed.")
        self.labels.add(item.path, label, item.why)
        mine = self._windows.setdefault(window, _Window())
        mine.answered.append(number)
        mine.item = None
        return item

    def undo(self, window: str) -> tuple[int, str]:
        """Take back this window's last answer: the number of the image, which it is asked about again, and the label.

        Raises AnswerError if there is none, and OutputError.
        """
        mine = self._windows.setdefault(window, _Window())
        while mine.answered and self.items[mine.answered[-1]].path not in self.labels.rows:
            mine.answered.pop()
        if not mine.answered:
            raise AnswerError("nothing", "There is nothing to take back in this window.")
        number = mine.answered[-1]
        label = self.labels.rows[self.items[number].path][0]
        self.labels.take_back(self.items[number].path)
        mine.answered.pop()
        mine.item, mine.until = number, self._clock() + KEPT_FOR
        return number, label

    def can_undo(self, window: str) -> bool:
        """Whether this window has an answer to take back."""
        return window in self._windows and bool(self._windows[window].answered)

    def progress(self, window: str = "") -> Progress:
        """How far the review is, for this window."""
        rows = self.labels.rows
        answers = [rows[item.path][0] for item in self.plan.measuring if item.path in rows]
        skipped = answers.count(CANNOT_TELL)
        return Progress(
            labelled=len(answers) - skipped,
            target=min(self.target, len(self.plan.measuring) - skipped),
            cannot_tell=skipped,
            learned=sum(item.path in rows for item in self.plan.learning),
            to_learn=len(self.plan.learning),
            held=sum(one.item is not None and self.items[one.item].path not in rows for one in self._others(window)),
        )

    def figures(self) -> Measured:
        """What the labels so far say."""
        return measure(self.plan, _labels(self.labels.rows))


def _labels(rows: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    return {path: label for path, (label, _) in rows.items()}
