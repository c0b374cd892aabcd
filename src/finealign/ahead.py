"""Results made while the one before is in use, so that the model never waits for its input. Order stays."""

import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def ahead(
    work: Callable[[Item], Result], items: Sequence[Item], *, workers: int = 0, pinned: bool = False
) -> Iterator[Result]:
    """``map(work, items)`` with the next result, or two a worker, made in the background.

    By one thread with ``workers`` 0, else by that many processes: then ``work`` must be picklable and return tensors.
    ``pinned`` tensors travel to a GPU without anyone waiting for them.
    """
    if workers and len(items) > 1:  # a single one is not worth starting any
        return _by_processes(work, items, workers, pinned)
    return _by_a_thread(work, items)


def _by_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, pinned: bool
) -> Iterator[Result]:
    from torch.utils.data import DataLoader

    dataset: Any = _Work(work, items)
    # batch_size=None: an item is a batch already.
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, pin_memory=pinned, worker_init_fn=_leave_signals_to_the_parent
    )
    for result in loader:
        if isinstance(result, Exception):
            raise result
        yield result


def _leave_signals_to_the_parent(worker: int) -> None:
    """A signal to the whole group is the parent's to answer: it ends its workers when it has saved."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Work(Generic[Item, Result]):
    """A map-style dataset whose items are results, or what went wrong: an error of a user's keeps its own words."""

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
        waiting = None
        for item in items:
            coming = pool.submit(work, item)
            if waiting is not None:
                yield waiting.result()
            waiting = coming
        if waiting is not None:
            yield waiting.result()
