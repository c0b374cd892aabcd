"""Work done ahead of its use: the order, how far ahead, and what happens when either side stops."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from conftest import CLASSES, HANG, tiny_config
from finealign.classifier import FineAlign
from finealign.errors import FinealignError, ImageInputError
from finealign.images import prefetch as prefetching
from finealign.images.prefetch import Prefetcher
from finealign.training.loop import adapt
from finealign.types import SetAside

over_workers = pytest.mark.parametrize("workers", [0, 1, 2])
PATIENCE = HANG


def prefetch(work: Callable[[Any], Any], items: Iterable[Any], *, workers: int = 0) -> Iterator[Any]:
    """What a pool gives that is made for these items alone."""
    with Prefetcher(work, workers=workers) as pool:
        yield from pool.map(asked, items)


def asked(work: Callable[[Any], Any], item: Any) -> Any:
    return work(item)


def rendered(item: int) -> tuple[Tensor, Tensor]:
    """What a process may be asked for: tensors that depend on the item alone, the longer the earlier."""
    time.sleep(0.002 * (item % 3))
    generator = torch.Generator().manual_seed(item)
    return torch.rand(2, 3, generator=generator), torch.full((item,), item, dtype=torch.uint8)


def failing_at(wrong: int, item: int) -> Tensor:
    if item == wrong:
        raise ImageInputError(f"'{item}.png' can no longer be read. Put it back.")
    return torch.tensor(item)


@over_workers
@pytest.mark.parametrize("items", [[], [5], [3, 1, 4, 1, 5, 9, 2, 6], range(12)], ids=str)
def test_ahead__is_map(workers: int, items: list[int]) -> None:
    found = list(prefetch(rendered, items, workers=workers))
    assert len(found) == len(items)
    for (first, second), item in zip(found, items, strict=True):
        wanted = rendered(item)
        assert torch.equal(first, wanted[0])
        assert torch.equal(second, wanted[1])
        assert second.dtype == torch.uint8


def test_ahead__a_thread_may_give_anything() -> None:
    given = [object(), None, "text"]
    assert list(prefetch(lambda item: (item, item), given)) == [(item, item) for item in given]


@over_workers
def test_ahead__draws_nothing_from_the_callers_random_numbers_that_changes_results(workers: int) -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(torch.stack([first for first, _ in prefetch(rendered, range(4), workers=workers)]))
    assert torch.equal(*found)


# --- how far ahead ----------------------------------------------------------------------------------------------------


def test_ahead__by_a_thread_is_one_ahead_and_no_more() -> None:
    finished = [threading.Event() for _ in range(6)]
    started: list[int] = []

    def work(item: int) -> int:
        started.append(item)
        finished[item].set()
        return item

    results = prefetch(work, range(6))
    assert started == []  # nothing before the first is asked for
    for item, result in enumerate(results):
        assert result == item
        following = item + 1
        if following < 6:
            assert finished[following].wait(PATIENCE)  # made while this one is in use
        assert started == list(range(min(item + 2, 6)))


def test_ahead__by_a_thread_is_not_by_the_callers() -> None:
    assert threading.get_ident() not in set(prefetch(lambda item: threading.get_ident(), range(3)))


def test_ahead__by_a_thread_does_one_thing_at_a_time() -> None:
    busy = threading.Lock()

    def work(item: int) -> bool:
        alone = busy.acquire(blocking=False)
        time.sleep(0.002)
        if alone:
            busy.release()
        return alone

    assert all(prefetch(work, range(8)))


# --- when a side stops ------------------------------------------------------------------------------------------------


@over_workers
@pytest.mark.parametrize("wrong", [0, 3, 5])
def test_ahead__an_error_comes_in_its_place(workers: int, wrong: int) -> None:
    results = prefetch(partial(failing_at, wrong), range(6), workers=workers)
    assert [int(next(results)) for _ in range(wrong)] == list(range(wrong))
    with pytest.raises(ImageInputError, match=rf"'{wrong}.png' can no longer be read. Put it back."):
        next(results)


@over_workers
def test_ahead__an_error_of_the_users_says_what_it_said(workers: int) -> None:
    """The command line prints it as it is, so it must hold no traceback."""
    with pytest.raises(ImageInputError) as caught:
        list(prefetch(partial(failing_at, 1), range(3), workers=workers))
    assert str(caught.value) == "'1.png' can no longer be read. Put it back."


def test_ahead__an_error_ahead_of_a_caller_that_stops_is_nobodys(recwarn: pytest.WarningsRecorder) -> None:
    results = prefetch(partial(failing_at, 1), range(3))
    assert int(next(results)) == 0
    results.close()  # type: ignore[attr-defined]
    assert not recwarn


def ending(run: Callable[[], None]) -> None:
    """Run it beside the test, which fails where it does not end."""
    beside = threading.Thread(target=run, daemon=True)
    beside.start()
    beside.join(PATIENCE)
    assert not beside.is_alive()


@pytest.mark.parametrize("how", ["break", "close", "error", "never begun"])
def test_ahead__a_caller_that_stops_leaves_no_thread(how: str) -> None:
    before = set(threading.enumerate())

    def use(results: Iterator[int]) -> None:
        if how == "never begun":
            return
        for result in results:
            if result < 2:
                continue
            if how == "close":
                results.close()  # type: ignore[attr-defined]
            if how == "error":
                raise ZeroDivisionError
            break

    def run() -> None:
        with suppress(ZeroDivisionError):
            use(prefetch(lambda item: item, range(1000)))
        gc.collect()

    ending(run)
    assert set(threading.enumerate()) <= before


def test_ahead__a_caller_that_stops_leaves_no_process() -> None:
    results = prefetch(rendered, range(1000), workers=2)
    for _ in range(3):
        next(results)
    assert len(multiprocessing.active_children()) == 2
    del results
    gc.collect()
    assert multiprocessing.active_children() == []


# --- one pool for many uses -------------------------------------------------------------------------------------------


def process_of(_: object, item: int) -> tuple[int, int]:
    return os.getpid(), item


def shared_with(shared: Any, item: int) -> Any:
    return shared + item


@over_workers
def test_pool__serves_several_iterators_at_once_and_one_after_the_other(workers: int) -> None:
    with Prefetcher(100, workers=workers) as pool:
        first, second = pool.map(shared_with, range(6)), pool.map(shared_with, range(10, 16))
        assert list(zip(first, second, strict=True)) == [(100 + n, 110 + n) for n in range(6)]
        assert list(pool.map(shared_with, [1, 2])) == [101, 102]


def test_pool__its_processes_are_the_same_for_all_and_end_with_it() -> None:
    with Prefetcher(None, workers=2) as pool:
        seen = {pid for _ in range(5) for pid, _ in pool.map(process_of, range(8))}
        assert len(seen) <= 2 and os.getpid() not in seen
        # A caller that stops early leaves it usable.
        list(islice(pool.map(process_of, range(100)), 3))
        assert {pid for pid, _ in pool.map(process_of, range(4))} <= set(map(_pid, multiprocessing.active_children()))
    assert multiprocessing.active_children() == []


def _pid(process: Any) -> int:
    return int(process.pid)


def dying(_: object, item: int) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_pool__a_process_that_dies_is_told_with_what_to_do() -> None:
    with Prefetcher(None, workers=1) as pool, pytest.raises(FinealignError, match=r"data\.workers"):
        list(pool.map(dying, range(8)))
    assert multiprocessing.active_children() == []


PARENT = """
import os, sys
from finealign.images.prefetch import Prefetcher

def pid(_, item):
    return os.getpid()

pool = Prefetcher(None, workers=2)
print(*set(pool.map(pid, range(40))), flush=True)
sys.stdin.read()
"""


def test_pool__its_processes_end_when_their_parent_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin and parent.stdout
    with parent:
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert workers
        parent.kill()
        _, alive = psutil.wait_procs(workers, timeout=HANG)
    assert not alive


class Counting:
    """Makes executors, and counts them."""

    def __init__(self, executor: Any) -> None:
        self.executor, self.made = executor, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.made += 1
        return self.executor(*arguments, **options)


@pytest.mark.parametrize(
    ("workers", "refresh"), [(0, 0), (0, 1), pytest.param(1, 0, marks=pytest.mark.nightly)], ids=str
)
def test_fit__makes_one_pool_for_all_its_steps_and_passes(
    photos: Path, tiny_backbone: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, workers: int, refresh: int
) -> None:
    threads, processes = Counting(ThreadPoolExecutor), Counting(ProcessPoolExecutor)
    config = tiny_config(
        tiny_backbone("transformer"),
        views__refresh_epochs=refresh,
        training__anchor_steps=8 * refresh,
        data__workers=workers,
    )
    model = FineAlign(CLASSES, config=config)
    before = set(threading.enumerate())

    def counted(*arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(prefetching, "ThreadPoolExecutor", threads)
            patch.setattr(prefetching, "ProcessPoolExecutor", processes)
            return adapt(*arguments, **options)

    monkeypatch.setattr("finealign.classifier.adapt", counted)
    model.fit(photos)
    assert len(model.history_) == 3
    assert (threads.made, processes.made) == ((0, 1) if workers else (1, 0))
    assert set(threading.enumerate()) <= before
    assert multiprocessing.active_children() == []


def test_fit__that_fails_leaves_no_worker(
    photos: Path, tiny_backbone: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tiny_backbone("transformer"), data__workers=2)

    def broken(*_: object) -> None:
        assert len(multiprocessing.active_children()) == 2
        raise ZeroDivisionError

    monkeypatch.setattr("finealign.training.loop.step", broken)
    with pytest.raises(ZeroDivisionError):
        FineAlign(CLASSES, config=config).fit(photos)
    assert multiprocessing.active_children() == []


def test_pinned__what_holds_no_tensor_is_as_it_was() -> None:
    result = [3, ("name", None), SetAside("a.png", "empty file")]
    assert prefetching._pinned(result) == result
