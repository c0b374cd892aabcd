"""Prefetch: compute the next results in the background while the current one is in use, in the given order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, Generic, Self, TypeVar

import torch

from finealign.errors import FinealignError, display_path
from finealign.images.files import ImageReadError
from finealign.runtime.cores import usable_cores
from finealign.types import SetAside

_Path = TypeVar("_Path", bound=os.PathLike[str])
_T = TypeVar("_T")


def in_order(
    read: Callable[[_Path], _T], paths: Iterable[_Path], *, threads: int | None = None, held: int | None = None
) -> Generator[tuple[_Path, _T | SetAside], None, None]:
    """Yield each path with the result of ``read``, or with a SetAside where it raised ImageReadError, in order.

    ``read`` runs ahead on ``threads`` threads (default: one per usable core, at most 8), and at most ``held`` results
    are pending (default: two per thread). A caller that stops early must close the generator, or the threads go on.

    Raises:
        Exception: whatever ``read`` raises other than ImageReadError.
    """

    def attempt(path: _Path) -> _T | SetAside:
        try:
            return read(path)
        except ImageReadError as error:
            return SetAside(display_path(path), str(error))

    threads = min(8, usable_cores()) if threads is None else threads
    held = 2 * threads if held is None else held
    pending: deque[tuple[_Path, Future[_T | SetAside]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for path in paths:
                pending.append((path, pool.submit(attempt, path)))
                if len(pending) >= held:
                    oldest, future = pending.popleft()
                    yield oldest, future.result()
            while pending:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        finally:  # the caller may stop early
            for _, future in pending:
                future.cancel()


AHEAD = 2  # results that each worker process has in hand
Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Prefetcher(Generic[Shared]):
    """One pool for a whole run that computes results in the background, in the order in which they are used.

    What all work needs, as the images, is ``shared``: worker processes are given it once, when they start, and then
    only what is to be done. The pool is started by the first result that is wanted, and ends with ``close``, which a
    ``with`` block calls.
    """

    def __init__(self, shared: Shared, *, workers: int = 0, device: torch.device | None = None) -> None:
        """With ``workers`` 0 one thread computes the results, otherwise that many processes do.

        Where ``device`` is a GPU, tensors of results are in pinned memory, so that copies to it can be asynchronous.
        """
        self._shared, self._workers, self._device = shared, workers, device
        self._thread: ThreadPoolExecutor | None = None
        self._processes: ProcessPoolExecutor | None = None
        self._pinning: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(self, work: Callable[[Shared, Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
        """Yield ``work(shared, item)`` for each item, with the next result, or two per worker process, under way.

        Several such iterators may be in use at once. Processes need a ``work`` that can be pickled, and give tensors
        back without copying them. A caller that stops early should close the iterator, or what is under way is computed
        for nothing. Raises what ``work`` raises, and FinealignError where a process has died.
        """
        ahead = AHEAD * self._workers or 1
        pending: deque[tuple[Future[Result], ...]] = deque()  # of each: what computes it, and what pins it
        try:
            for item in items:
                pending.append(self._submit(work, item))
                if len(pending) > ahead:
                    yield pending.popleft()[-1].result()
            while pending:
                yield pending.popleft()[-1].result()
        except BrokenProcessPool as error:
            raise FinealignError(
                "A process that makes views has died: the system may have ended it for lack of memory, or /dev/shm is "
                "full (finealign doctor tells what is needed). Lower data.workers; 0 makes views in a thread."
            ) from error
        finally:  # the caller may stop early
            for futures in pending:
                for future in futures:
                    future.cancel()

    def close(self) -> None:
        """End the pool, after what it has in hand. The next result that is wanted would start another."""
        pools = (self._thread, self._processes, self._pinning)
        self._thread = self._processes = self._pinning = None
        for pool in pools:
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def _submit(self, work: Callable[[Shared, Item], Result], item: Item) -> tuple[Future[Result], ...]:
        if self._workers:
            if self._processes is None:
                self._processes = ProcessPoolExecutor(self._workers, initializer=_begin, initargs=(self._shared,))
            computed = self._processes.submit(_work_in_process, work, item)
        else:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1)
            computed = self._thread.submit(work, self._shared, item)
        if self._device is None or self._device.type != "cuda":
            return (computed,)
        if self._pinning is None:
            self._pinning = ThreadPoolExecutor(1, initializer=_use, initargs=(self._device,))
        return computed, self._pinning.submit(lambda: _pinned(computed.result()))


def _use(device: torch.device) -> None:
    """Make the device this thread's own; otherwise pinning would wake the first one."""
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)


def _pinned(result: Any) -> Any:
    """The result with every tensor in it, or in its lists and tuples, in pinned memory."""
    if isinstance(result, torch.Tensor):
        return result.pin_memory()
    if isinstance(result, list | tuple):
        return type(result)(map(_pinned, result))
    return result


_shared: Any = None  # in a worker process, which belongs to one Prefetcher: what that shares


def _begin(shared: Any) -> None:
    """Prepare a worker process."""
    global _shared
    _shared = shared
    # Signals are sent to the whole process group: the parent saves first, then ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)  # there is a process for each core already
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent has ended without closing the pool, as when it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _work_in_process(work: Callable[[Any, Item], Result], item: Item) -> Result:
    return work(_shared, item)
