"""What all commands share: errors as sentences, signals, launchers, JSON output."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from finealign.errors import FinealignError, StoppedError

if TYPE_CHECKING:  # it imports torch, which is slow
    from finealign.cli.bars import Bars


@contextmanager
def working(as_json: bool) -> Iterator[None]:
    """For commands that encode images or texts: as ``guarded``, and the process keeps the memory that it frees."""
    with guarded(as_json):
        from finealign.runtime.devices import keep_freed_memory

        keep_freed_memory()
        yield


@contextmanager
def guarded(as_json: bool) -> Iterator[None]:
    """Within the context, a FinealignError ends the command with its message and exit code 1, without a traceback.

    With ``as_json`` the message is printed as a JSON object.
    """
    try:
        yield
    except FinealignError as error:
        rank = os.environ.get("RANK", "0")
        if rank != "0":  # usually the same error as that of the first rank
            typer.echo(f"process {rank}: {error}", err=True)
        elif as_json:
            print_json({"error": str(error), "kind": type(error).__name__})
        else:
            Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise typer.Exit(1) from None


@contextmanager
def stoppable(progress: "Bars", *, go_on: Callable[[], str]) -> Iterator["Bars"]:
    """Within the context, SIGTERM and Ctrl-C end the work at its next check, and then the command.

    The exit code is 128 plus the number of the signal, as in a shell. ``go_on`` returns a sentence on how to continue.
    """
    try:
        with progress.listening():
            yield progress
    except (StoppedError, KeyboardInterrupt) as error:
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"{error if isinstance(error, StoppedError) else 'Interrupted.'} {go_on()}", err=True)
        raise typer.Exit(128 + (progress.stopped_by or signal.SIGINT)) from None


def require(extra: str, *packages: str) -> None:
    """Raises FinealignError when one of the packages is missing, which pip installs with the extra."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise FinealignError(f"This needs {', '.join(missing)}: pip install 'finealign[{extra}]'.")


def refuse_launcher() -> None:
    """Raises FinealignError when a launcher has started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise FinealignError(
            "This verb is not shared among the processes of a launcher. Start it without one; several "
            "`finealign benchmark` with the same --out share its cells."
        )


def how_to_resume() -> str:
    """The command that resumes what this one began, as a sentence for the user."""
    words = [word for word in sys.argv[1:] if word not in ("--overwrite", "--resume")]
    program = ["python", "-m", "finealign"] if Path(sys.argv[0]).name == "__main__.py" else ["finealign"]
    launcher = " by the same launcher" if "LOCAL_RANK" in os.environ else ""
    return f"Go on{launcher} with:\n{shlex.join([*program, *words, '--resume'])}"


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object as one line of UTF-8. Raises ValueError for NaN and infinity."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    typer.echo(text.encode("utf-8", "backslashreplace"))  # a path may hold bytes that are not UTF-8


def tell_set_aside(rows: list[dict[str, str]], screen: Console) -> None:
    """Print how many images could not be read, and the first of them with the reason; nothing if there are none."""
    if not rows:
        return
    from finealign.errors import printable

    first = rows[0]
    screen.print(
        f"[yellow]{len(rows)} images could not be read[/]; "
        f"the first: {escape(printable(first['path']))} ({escape(first['reason'])}).",
        soft_wrap=True,
        highlight=False,
    )


def tell_left_out(figures: Mapping[str, Any], screen: Console) -> None:
    """Print which labelled images were not measured, as no class has their name; nothing if there are none."""
    from finealign.errors import printable
    from finealign.evaluate.truth import left_out_line

    if line := left_out_line(figures["left_out"]):
        screen.print(f"[yellow]{escape(printable(line))}[/]", soft_wrap=True, highlight=False)
