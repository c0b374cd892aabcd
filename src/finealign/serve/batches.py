"""Requests that wait for the one model: a bounded number of them, decoded by a few threads, encoded together by one."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from finealign.classifier import FineAlign
from finealign.images import Pixels, decode_image
from finealign.types import Explanation, Score

BATCH = 8  # images encoded together
DECODERS = 2  # threads
HELD_PIXELS = 128_000_000  # decoded and not yet encoded, beyond which no decoder begins another image


class FullError(Exception):
    """As many requests as there are places are being worked on already."""


@dataclass(eq=False)
class _Job:
    file: BinaryIO  # the upload, closed once it is decoded or dropped
    score: Score
    future: Future[Explanation]
    pixels: Pixels | None = None


class Batches:
    """The model and what waits for it. Results do not depend, up to rounding, on what is encoded together.

    A request first takes a place, then submits its upload. A future that is cancelled before its image is encoded is
    work that is not done.
    """

    def __init__(self, model: FineAlign, *, capacity: int, max_pixels: int) -> None:
        self.capacity = capacity
        self._model = model
        self._max_pixels = max_pixels
        self._changed = threading.Condition()
        self._taken = 0  # places
        self._raw: deque[_Job] = deque()
        self._decoded: deque[_Job] = deque()
        self._held = 0  # pixels decoded and not yet encoded
        self._decoding = 0  # threads that are at it
        self._closing = False
        self._threads = [
            threading.Thread(target=self._decode, name=f"decode-{n}", daemon=True) for n in range(DECODERS)
        ]
        self._threads.append(threading.Thread(target=self._encode, name="encode", daemon=True))

    @property
    def waiting(self) -> int:
        """Requests that have a place."""
        return self._taken

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places, for as long as a request is being read and answered. Raises FullError."""
        with self._changed:
            if self._taken >= self.capacity:
                raise FullError
            self._taken += 1
        try:
            yield
        finally:
            with self._changed:
                self._taken -= 1

    def submit(self, file: BinaryIO, score: Score) -> Future[Explanation]:
        """What the model makes of an upload, whose file is closed here; ImageReadError is the future's exception."""
        job = _Job(file, score, Future())
        job.future.add_done_callback(lambda _: self._forget(job))
        with self._changed:
            self._raw.append(job)
            self._changed.notify_all()
        return job.future

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Finish what was submitted, then end the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _forget(self, job: _Job) -> None:
        with self._changed:
            if job not in self._raw:  # a decoder has it, or had it
                return
            self._raw.remove(job)
        job.file.close()

    def _decode(self) -> None:
        while (job := self._next_upload()) is not None:
            try:
                with job.file:
                    job.pixels = np.array(decode_image(job.file, max_pixels=self._max_pixels))
            except Exception as error:  # of one upload, told to the one who sent it
                _fail(job, error)
            with self._changed:
                self._decoding -= 1
                if job.pixels is not None:
                    self._held += _count(job.pixels)
                    self._decoded.append(job)
                self._changed.notify_all()

    def _next_upload(self) -> _Job | None:
        """The upload that has waited longest, once there is room to decode it; None when there will be no other."""
        with self._changed:
            self._changed.wait_for(
                lambda: (self._raw and self._held < HELD_PIXELS) or (self._closing and not self._raw)
            )
            if not self._raw:
                return None
            self._decoding += 1
            return self._raw.popleft()

    def _encode(self) -> None:
        while jobs := self._next_batch():
            ready = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            self._explain(ready)
            with self._changed:
                for job in jobs:
                    self._held -= 0 if job.pixels is None else _count(job.pixels)
                    job.pixels = None  # a large thing, which would else wait for the garbage collector with its job
                self._changed.notify_all()

    def _next_batch(self) -> list[_Job]:
        """At most BATCH decoded images of one score, the longest waiting first; none when there will be no other."""
        with self._changed:
            self._changed.wait_for(lambda: self._decoded or (self._closing and not self._raw and not self._decoding))
            score = self._decoded[0].score if self._decoded else None
            jobs = [job for job in self._decoded if job.score == score][:BATCH]
            for job in jobs:
                self._decoded.remove(job)
            return jobs

    def _explain(self, jobs: Sequence[_Job]) -> None:
        pixels = [job.pixels for job in jobs if job.pixels is not None]
        if not pixels:
            return
        try:
            found = self._model.explain_pixels(pixels, score=jobs[0].score, with_start=True)
        except Exception as error:
            if len(jobs) == 1:
                _fail(jobs[0], error)
                return
            for job in jobs:  # so that the one it is about fails alone
                self._explain([job])
            return
        for job, one in zip(jobs, found, strict=True):
            job.future.set_result(one)


def _count(pixels: Pixels) -> int:
    height, width = pixels.shape[:2]
    return int(height * width)


def _fail(job: _Job, error: Exception) -> None:
    with suppress(InvalidStateError):  # nobody waits for it any more
        job.future.set_exception(error)
