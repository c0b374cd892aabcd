"""How long stages tell their progress, without knowing who listens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Stage(Protocol):
    """One running stage."""

    def advance(self, images: int) -> None:
        """So many more images are done."""

    def note(self, text: str) -> None:
        """A short word beside the bar, such as the current loss."""


class Progress:
    """Tells nobody. The command line's subclass draws a bar."""

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """Announce a stage of ``total`` images (None: unknown)."""
        yield _Unheard()


class _Unheard:
    def advance(self, images: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
