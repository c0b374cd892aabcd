"""The queue in front of the model: a few threads decode the uploads, and one encodes the images in batches."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from finealign.classifier import FineAlign
from finealign.images.decoding import Photo
from finealign.images.files import ImageReadError
from finealign.serve.guard import LOG
from finealign.types import Explanation, Score

BATCH = 8  # images encoded together at most
DECODERS = 2  # threads that decode uploads
# Limit on the pixels being decoded, or decoded and not yet encoded; a larger image waits until there are none.
HELD_PIXELS = 128_000_000
HELD_BYTES = 1_000_000_000  # limit on all uploads that have a place; a larger upload gets one when there are no others


class FullError(Exception):
    """The server takes no more work for now. The message is the reason, without a full stop."""


@dataclass(eq=False)
class Place:
    """A place in the queue for one upload of at most ``size`` bytes.

    ``users`` counts who still needs it: the request, and its job once the upload is submitted.
    """

    size: int
    users: int = 1


@dataclass(eq=False)
class _Job:
    place: Place
    file: BinaryIO  # the upload, closed once it is decoded or dropped
    score: Score
    future: Future[Explanation]
    held: int = 0  # pixels that count towards HELD_PIXELS
    photo: Photo | None = None


class Batches:
    """The model and the queue of requests for it.

    A request first takes a place, then submits its upload. If the future is cancelled before the image is encoded, the
    image is not encoded. A place is free again when neither its request nor a thread uses it. Up to rounding, the
    results do not depend on which images are encoded together.
    """

    def __init__(self, model: FineAlign, *, capacity: int, max_pixels: int) -> None:
        self.capacity = capacity
        self._predictor = model.predictor_
        self._max_pixels = max_pixels
        self._changed = threading.Condition()  # to be held when changing what is listed below
        self._taken = 0  # places in use
        self._bytes = 0  # total size of their uploads
        self._raw: deque[_Job] = deque()  # uploads to decode
        self._decoded: deque[_Job] = deque()  # images to encode
        self._held = 0  # pixels being decoded, or decoded and not yet encoded
        self._decoding = 0  # threads that are decoding an upload
        self._closing = False
        work = {**{f"decode-{number}": self._decode for number in range(DECODERS)}, "encode": self._encode}
        self._threads = [
            threading.Thread(target=self._run, args=[target], name=name, daemon=True) for name, target in work.items()
        ]

    @property
    def waiting(self) -> int:
        """How many places are in use."""
        return self._taken

    @property
    def alive(self) -> bool:
        """Whether all threads are running."""
        return all(thread.is_alive() for thread in self._threads)

    @contextmanager
    def place(self, size: int) -> Iterator[Place]:
        """Hold a place for an upload of at most ``size`` bytes while its request is read and answered.

        Raises FullError when there is no place, and RuntimeError when a thread that would answer it has ended.
        """
        if not self.alive:
            raise RuntimeError("a thread of the server has ended")
        with self._changed:
            if self._taken >= self.capacity:
                raise FullError(f"All {self.capacity} places (--waiting) are taken")
            if self._taken and self._bytes + size > HELD_BYTES:
                raise FullError(f"The uploads that wait are {HELD_BYTES / 1e6:g} MB already")
            self._taken += 1
            self._bytes += size
        place = Place(size)
        try:
            yield place
        finally:
            with self._changed:
                self._leave(place)

    def submit(self, place: Place, file: BinaryIO, score: Score) -> Future[Explanation]:
        """Queue an upload; the future gets the explanation that the model gives for its image.

        The queue closes the file. The future raises ImageReadError for an image that cannot be read.
        """
        job = _Job(place, file, score, Future())
        job.future.add_done_callback(lambda _: self._forget(job))
        with self._changed:
            place.users += 1
            self._raw.append(job)
            self._changed.notify_all()
        return job.future

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    async def close(self, seconds: float) -> None:
        """Finish the submitted work and end the threads. After ``seconds`` they are abandoned; they are daemons."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        end = time.monotonic() + seconds
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < end:
            await asyncio.sleep(0.02)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # without this thread nothing is answered, so its end must not go unnoticed
            name = threading.current_thread().name
            logging.getLogger(LOG).critical("thread %s has ended, restart the server", name, exc_info=error)
            with self._changed:
                jobs = [*self._raw, *self._decoded]
            for job in jobs:
                _settle(job, RuntimeError(f"thread {name} has ended"))

    def _leave(self, place: Place) -> None:
        """Drop one user of a place, and free the place with the last one. The caller holds the lock."""
        place.users -= 1
        if not place.users:
            self._taken -= 1
            self._bytes -= place.size

    def _forget(self, job: _Job) -> None:
        """Drop a job that is done or cancelled from its queue. If a thread has taken it, that thread drops it."""
        with self._changed:
            for queue in (self._raw, self._decoded):
                if job in queue:
                    queue.remove(job)
                    self._drop(job)
            self._changed.notify_all()

    def _drop(self, job: _Job) -> None:
        self._held -= job.held
        # The job and its future refer to each other, so that the pixels would stay until the garbage collector runs.
        job.held, job.photo = 0, None
        self._leave(job.place)
        with suppress(OSError):  # closing a temporary file fails where its disk is full
            job.file.close()

    def _decode(self) -> None:
        while (job := self._next_upload()) is not None:
            failure: Exception | None = None
            try:
                with job.file:
                    photo = self._predictor.decode(
                        job.file, max_pixels=self._max_pixels, before=partial(self._hold, job)
                    )
                job.photo = photo
            except Exception as error:  # due to this upload alone, and reported to its sender
                failure = error
            with self._changed:
                self._decoding -= 1
                if failure or job.future.done():
                    self._drop(job)
                else:
                    self._decoded.append(job)
                self._changed.notify_all()
            if failure:
                _settle(job, failure)

    def _hold(self, job: _Job, pixels: int) -> None:
        """Wait until ``pixels`` more can be held. Raises ImageReadError when nobody waits for the image any more."""
        with self._changed:
            self._changed.wait_for(lambda: job.future.done() or not self._held or self._held + pixels <= HELD_PIXELS)
            if job.future.done():
                raise ImageReadError("nobody waits for it")
            job.held = pixels
            self._held += pixels

    def _next_upload(self) -> _Job | None:
        """The upload that has waited longest; None when the queue is closing and there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._raw or self._closing)
            if not self._raw:
                return None
            self._decoding += 1
            return self._raw.popleft()

    def _encode(self) -> None:
        while jobs := self._next_batch():
            ready = [job for job in jobs if not job.future.done() and job.future.set_running_or_notify_cancel()]
            results: Sequence[Explanation | Exception] = [RuntimeError("the encoder has ended")] * len(ready)
            try:
                results = self._explain(ready)
            finally:
                with self._changed:
                    for job in jobs:
                        self._drop(job)
                    self._changed.notify_all()
                for job, result in zip(ready, results, strict=True):
                    _settle(job, result)

    def _next_batch(self) -> list[_Job]:
        """The next decoded images of one score, at most BATCH, in order; empty when there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._decoded or (self._closing and not self._raw and not self._decoding))
            score = self._decoded[0].score if self._decoded else None
            jobs = [job for job in self._decoded if job.score == score][:BATCH]
            for job in jobs:
                self._decoded.remove(job)
            return jobs

    def _explain(self, jobs: Sequence[_Job]) -> list[Explanation | Exception]:
        """The explanation of each job's image, or the exception that it raises."""
        photos = [job.photo for job in jobs if job.photo is not None]
        if not photos:
            return []
        try:
            return [*self._predictor.explain(photos, score=jobs[0].score, with_start=True)]
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            # One by one, so that only the image that causes the error fails.
            return [result for job in jobs for result in self._explain([job])]


def _settle(job: _Job, result: Explanation | Exception) -> None:
    with suppress(InvalidStateError):  # it is cancelled or settled already
        if isinstance(result, Exception):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)
