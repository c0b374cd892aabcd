"""Decode the images of a training set. On each machine one rank decodes them for all ranks of the run."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from platformdirs import user_cache_dir

from finealign.config import DataSettings
from finealign.errors import FinealignError, StoppedError, display_path
from finealign.images.pixel_cache import StoredPixels, store_pixels
from finealign.runtime.distributed import Ranks
from finealign.runtime.progress import Progress
from finealign.types import ImagePath, SetAside


def decode_training_set(
    paths: Sequence[ImagePath], settings: DataSettings, *, progress: Progress, ranks: Ranks
) -> tuple[StoredPixels, list[SetAside]]:
    """Decode the images at ``paths`` to the form that models are given. Return them and the images that are set aside.

    ``settings`` is the resolved ``data`` section. Raises ImageInputError where no image can be read, StoppedError when
    a stop was requested, and FinealignError where the ranks can read different images.
    """
    if settings.working_size == "auto":
        raise ValueError("the configuration is not resolved")
    with progress.stage("reading images", len(paths)) as stage:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            stage.advance(count - done)
            done = count
            progress.stop_if_asked()

        failure: FinealignError | None = None
        with ranks.first_of_each_machine():  # every rank has to leave this block, even after an error on one
            try:
                stored, set_aside = store_pixels(
                    paths,
                    shorter_side=settings.working_size,
                    max_pixels=settings.max_pixels,
                    white_value=settings.white_value,
                    folder=_cache_folder(settings.cache),
                    max_bytes=int(settings.cache_gb * 1e9),
                    on_progress=advance,
                )
            except FinealignError as error:
                failure = error
    if ranks.any(failure is not None):
        raise failure or StoppedError("Stopped, as another process of the run was.")
    ranks.refuse_different("the images that can be read", [len(stored.paths), _digest(stored.paths)])
    return stored, set_aside


def _cache_folder(cache: str) -> Path | None:
    """The folder that keeps decoded images between runs; None where none are kept."""
    if cache == "temporary":
        return None
    if cache == "auto":
        try:
            return Path(user_cache_dir("finealign", appauthor=False)) / "pixels"
        except RuntimeError:  # no home folder is known, so that nothing can be kept for another run
            return None
    return Path(cache).expanduser()


def _digest(paths: Iterable[ImagePath]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(display_path(path).encode() + b"\n")
    return digest.hexdigest()
