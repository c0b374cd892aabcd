"""How long stages tell their progress and hear that they should stop, without knowing who is at the other end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from finealign.errors import StoppedError
from finealign.ranks import Ranks

IMAGES_BETWEEN = 32  # two looks at whether to stop: ranks have to agree on it


class Stage(Protocol):
    """One running stage."""

    def advance(self, images: int) -> None:
        """So many more images are done."""

    def note(self, text: str) -> None:
        """A short word beside the bar, such as the current loss."""


class Progress:
    """Tells nobody and never stops. The command line's subclass draws a bar and listens for signals."""

    @property
    def asked_to_stop(self) -> bool:
        return False

    def stop_if_asked(self, ranks: Ranks | None = None) -> None:
        """To be called between two pieces of work, by all ranks alike. Raises StoppedError if any was asked to stop."""
        if (ranks or Ranks()).any(self.asked_to_stop):
            raise StoppedError("Stopped, as asked.")

    def between(self, stage: Stage, ranks: Ranks | None = None) -> Callable[[int], None]:
        """What to call when so many more images are done: it tells the stage, and now and then asks whether to stop."""
        since = 0

        def advance(images: int) -> None:
            nonlocal since
            stage.advance(images)
            since += images
            if since >= IMAGES_BETWEEN:
                since = 0
                self.stop_if_asked(ranks)

        return advance

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """Announce a stage of ``total`` images (None: unknown)."""
        yield _Unheard()


class _Unheard:
    def advance(self, images: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
