"""Work done ahead of its use: the order, how far ahead, and what happens when either side stops."""

import gc
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import Tensor

from conftest import HANG
from finealign.errors import ImageInputError
from finealign.images.prefetch import prefetch

over_workers = pytest.mark.parametrize("workers", [0, 1, 2])
PATIENCE = HANG


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
