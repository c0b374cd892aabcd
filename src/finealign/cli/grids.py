"""What commands share that run a grid of methods and data sets."""

from typing import TYPE_CHECKING

from rich.console import Console

from finealign.errors import FinealignError

if TYPE_CHECKING:  # it imports torch, which is slow
    from finealign.benchmark.grid import Cell


def names_in(text: str, flag: str) -> tuple[str, ...]:
    """The names in ``text``, with commas between, each once. Raises FinealignError where there is none."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise FinealignError(f"{flag} names nothing. Wanted: at least one name, several with commas between.")
    return names


def seeds_in(text: str) -> tuple[int, ...]:
    """The seeds in ``text``, with commas between, each once. Raises FinealignError where there is none."""
    try:
        return tuple(dict.fromkeys(int(seed) for seed in names_in(text, "--seeds")))
    except ValueError:
        raise FinealignError(f"--seeds {text!r} are not numbers. Wanted: as 0,1,2.") from None


def tell_cell(notes: Console, cell: "Cell") -> None:
    """Print the accuracy of a cell that has just been run, what it gained over the start, and how long it took."""
    gained = 100 * (cell.top1[cell.score] - cell.top1["start"])
    notes.print(
        f"{cell.dataset} {cell.method} seed {cell.seed}: {100 * cell.top1[cell.score]:.1f} ({gained:+.1f}) "
        f"in {cell.seconds['fit']:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
