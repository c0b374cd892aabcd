"""Prefetch: compute the next results in the background while the current one is in use, in the given order."""

import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from finealign.errors import display_path
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
Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    work: Callable[[Item], Result], items: Sequence[Item], *, workers: int = 0, pinned: bool = False
) -> Iterator[Result]:
    """``map(work, items)``, with one result, or two per worker process, prefetched in the background.

    With ``workers`` 0 one thread computes the results. Otherwise that many processes do; then ``work`` must be
    picklable and return tensors, which ``pinned`` puts into pinned memory, so that copies to a GPU can be asynchronous.
    An exception that ``work`` raises is raised here.
    """
    if workers and len(items) > 1:  # starting processes is not worth it for a single item
        return _by_processes(work, items, workers, pinned)
    return _by_a_thread(work, items)


def _by_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, pinned: bool
) -> Iterator[Result]:
    from torch.utils.data import DataLoader

    dataset: Any = _Work(work, items)
    # batch_size=None: each item is a whole batch already.
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=AHEAD,
        pin_memory=pinned,
        worker_init_fn=_leave_signals_to_the_parent,
    )
    for result in loader:
        if isinstance(result, Exception):
            raise result
        yield result


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore signals that are sent to the whole process group: the parent saves first, then ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Work(Generic[Item, Result]):
    """A map-style dataset whose items are the results.

    Exceptions are returned, because DataLoader would raise them with a message of its own.
    """

    def __init__(self, work: Callable[[Item], Result], items: Sequence[Item]) -> None:
        self.work, self.items = work, items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Result | Exception:
        try:
            return self.work(self.items[index])
        except Exception as error:
            return error


def _by_a_thread(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    with ThreadPoolExecutor(max_workers=1) as pool:
        previous = None
        for item in items:
            current = pool.submit(work, item)
            if previous is not None:
                yield previous.result()
            previous = current
        if previous is not None:
            yield previous.result()
