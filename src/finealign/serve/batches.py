"""Requests that wait for the one model: a bounded number of them, decoded by a few threads, encoded together by one."""

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

import numpy as np

from finealign.classifier import FineAlign
from finealign.images import ImageReadError, Pixels, decode_image
from finealign.serve.guard import LOG
from finealign.types import Explanation, Score

BATCH = 8  # images encoded together
DECODERS = 2  # threads
HELD_PIXELS = 128_000_000  # being decoded, or decoded and not yet encoded; an image of more is held alone
HELD_BYTES = 1_000_000_000  # of all uploads that have a place; one of more has to be alone


class FullError(Exception):
    """No more work is taken for now; the message is the reason, without a full stop."""


@dataclass(eq=False)
class Place:
    """Room for one upload of at most ``size`` bytes, which its request and then its job make use of."""

    size: int
    users: int = 1


@dataclass(eq=False)
class _Job:
    place: Place
    file: BinaryIO  # the upload, closed once it is decoded or dropped
    score: Score
    future: Future[Explanation]
    held: int = 0  # pixels
    pixels: Pixels | None = None


class Batches:
    """The model and what waits for it. Results do not depend, up to rounding, on what is encoded together.

    A request first takes a place, then submits its upload. A future that is cancelled before its image is encoded is
    work that is not done. A place is free again when neither its request nor a thread is at work on it.
    """

    def __init__(self, model: FineAlign, *, capacity: int, max_pixels: int) -> None:
        self.capacity = capacity
        self._model = model
        self._max_pixels = max_pixels
        self._changed = threading.Condition()
        self._taken = 0  # places
        self._bytes = 0  # of their uploads
        self._raw: deque[_Job] = deque()
        self._decoded: deque[_Job] = deque()
        self._held = 0  # pixels being decoded, or decoded and not yet encoded
        self._decoding = 0  # threads that are at it
        self._closing = False
        work = {**{f"decode-{n}": self._decode for n in range(DECODERS)}, "encode": self._encode}
        self._threads = [
            threading.Thread(target=self._run, args=[one], name=name, daemon=True) for name, one in work.items()
        ]

    @property
    def waiting(self) -> int:
        """Places that are taken."""
        return self._taken

    @property
    def alive(self) -> bool:
        """Whether every thread is there to work."""
        return all(thread.is_alive() for thread in self._threads)

    @contextmanager
    def place(self, size: int) -> Iterator[Place]:
        """A place for an upload of at most ``size`` bytes, for as long as a request is being read and answered.

        Raises FullError: there is none. RuntimeError: no thread is there to answer it.
        """
        if not self.alive:
            raise RuntimeError("a thread of the server has ended")
        with self._changed:
            if self._taken >= self.capacity:
                raise FullError(f"All {self.capacity} places are taken")
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
        """What the model makes of an upload, whose file is closed here; ImageReadError is the future's exception."""
        job = _Job(place, file, score, Future())
        job.future.add_done_callback(lambda _: self._forget(job))
        with self._changed:
            place.users += 1
            self._raw.append(job)
            self._changed.notify_all()
        return job.future

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    async def close(self, seconds: float) -> None:
        """Finish what was submitted and end the threads; after ``seconds`` they are left behind, as daemons."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        end = time.monotonic() + seconds
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < end:
            await asyncio.sleep(0.02)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # nothing more will be answered, which has to be seen
            name = threading.current_thread().name
            logging.getLogger(LOG).critical("thread %s has ended, restart the server", name, exc_info=error)
            with self._changed:
                left = [*self._raw, *self._decoded]
            for job in left:
                _settle(job, RuntimeError(f"thread {name} has ended"))

    def _leave(self, place: Place) -> None:
        place.users -= 1
        if not place.users:
            self._taken -= 1
            self._bytes -= place.size

    def _forget(self, job: _Job) -> None:
        """Drop a job that is done or cancelled, unless a thread has it, which then does."""
        with self._changed:
            for line in (self._raw, self._decoded):
                if job in line:
                    line.remove(job)
                    self._drop(job)
            self._changed.notify_all()

    def _drop(self, job: _Job) -> None:
        self._held -= job.held
        job.held, job.pixels = 0, None  # large, and would else wait for the garbage collector with its job
        self._leave(job.place)
        with suppress(OSError):  # a temporary file whose disk is full
            job.file.close()

    def _decode(self) -> None:
        while (job := self._next_upload()) is not None:
            failed: Exception | None = None
            try:
                with job.file:
                    pixels = decode_image(job.file, max_pixels=self._max_pixels, before=partial(self._hold, job))
                    decoded = np.array(pixels)
                job.pixels = decoded
            except Exception as error:  # of one upload, told to the one who sent it
                failed = error
            with self._changed:
                self._decoding -= 1
                if failed or job.future.done():
                    self._drop(job)
                else:
                    self._decoded.append(job)
                self._changed.notify_all()
            if failed:
                _settle(job, failed)

    def _hold(self, job: _Job, pixels: int) -> None:
        """Wait until there is room for so many pixels. Raises ImageReadError: nobody waits for them any more."""
        with self._changed:
            self._changed.wait_for(lambda: job.future.done() or not self._held or self._held + pixels <= HELD_PIXELS)
            if job.future.done():
                raise ImageReadError("nobody waits for it")
            job.held = pixels
            self._held += pixels

    def _next_upload(self) -> _Job | None:
        """The upload that has waited longest; None when there will be no other."""
        with self._changed:
            self._changed.wait_for(lambda: self._raw or self._closing)
            if not self._raw:
                return None
            self._decoding += 1
            return self._raw.popleft()

    def _encode(self) -> None:
        while jobs := self._next_batch():
            ready = [job for job in jobs if not job.future.done() and job.future.set_running_or_notify_cancel()]
            found: Sequence[Explanation | Exception] = [RuntimeError("the encoder has ended")] * len(ready)
            try:
                found = self._explain(ready)
            finally:
                with self._changed:
                    for job in jobs:
                        self._drop(job)
                    self._changed.notify_all()
                for job, one in zip(ready, found, strict=True):
                    _settle(job, one)

    def _next_batch(self) -> list[_Job]:
        """At most BATCH decoded images of one score, the longest waiting first; none when there will be no other."""
        with self._changed:
            self._changed.wait_for(lambda: self._decoded or (self._closing and not self._raw and not self._decoding))
            score = self._decoded[0].score if self._decoded else None
            jobs = [job for job in self._decoded if job.score == score][:BATCH]
            for job in jobs:
                self._decoded.remove(job)
            return jobs

    def _explain(self, jobs: Sequence[_Job]) -> list[Explanation | Exception]:
        """What the model makes of each, or why it fails on it."""
        pixels = [job.pixels for job in jobs if job.pixels is not None]
        if not pixels:
            return []
        try:
            found = self._model.explain_pixels(pixels, score=jobs[0].score, with_start=True)
            return [one for _, one in zip(jobs, found, strict=True)]
        except Exception as error:
            if len(jobs) == 1:
                return [error]
            return [one for job in jobs for one in self._explain([job])]  # so that the one it is about fails alone


def _settle(job: _Job, one: Explanation | Exception) -> None:
    with suppress(InvalidStateError):  # nobody waits for it any more
        if isinstance(one, Exception):
            job.future.set_exception(one)
        else:
            job.future.set_result(one)
