"""The interface by which long stages report progress and learn that they should stop."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from finealign.errors import CautionWarning, StoppedError
from finealign.runtime.distributed import Ranks

IMAGES_BETWEEN = 32  # two checks for a stop, because in each check the ranks have to communicate


class Stage(Protocol):
    """A running stage of the work."""

    def advance(self, images: int) -> None:
        """Report that ``images`` more images are done."""

    def note(self, text: str) -> None:
        """Show a short text beside the progress bar, such as the current loss."""


class Progress:
    """Progress that is not shown and never stops. The command line's subclass draws a bar and handles signals."""

    @property
    def asked_to_stop(self) -> bool:
        """Whether this process was asked to stop."""
        return False

    def stop_if_asked(self, ranks: Ranks | None = None) -> None:
        """Raise StoppedError if any rank was asked to stop. All ranks must call this at the same point of the work."""
        if (ranks or Ranks()).any(self.asked_to_stop):
            raise StoppedError("Stopped, as asked.")

    def between(self, stage: Stage, ranks: Ranks | None = None) -> Callable[[int], None]:
        """Return a function to be called with the number of images that were just done.

        It advances ``stage`` and calls ``stop_if_asked`` once every ``IMAGES_BETWEEN`` images.
        """
        unchecked = 0

        def advance(images: int) -> None:
            nonlocal unchecked
            stage.advance(images)
            unchecked += images
            if unchecked >= IMAGES_BETWEEN:
                unchecked = 0
                self.stop_if_asked(ranks)

        return advance

    def caution(self, message: str) -> None:
        """Tell the user what speaks against the run; here as a ``CautionWarning``."""
        warnings.warn(message, CautionWarning, stacklevel=2)

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """A context for a stage of ``total`` images (None: unknown) called ``name``."""
        yield _Unheard()


class _Unheard:
    def advance(self, images: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
