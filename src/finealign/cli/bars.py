"""Progress bars in a terminal, and the signals that ask a run to stop."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from finealign.runtime.progress import Progress, Stage

SHOWN_AFTER = 2.0  # seconds; a shorter stage draws no bar


class Bars(Progress):
    """One progress bar per stage on standard error, with images per second and the time left.

    Nothing is drawn when standard error is not a terminal.
    """

    def __init__(self, *, drawn: bool = True) -> None:
        """``drawn``: whether to draw at all; False where another rank draws."""
        console = Console(stderr=True)
        self._bars = _LateBars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _ImagesPerSecond(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            transient=True,
            disable=not (drawn and console.is_terminal),
        )
        self._console, self._drawn = console, drawn
        self.stopped_by = 0  # the signal that asked to stop

    @property
    def asked_to_stop(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return self.stopped_by != 0

    def caution(self, message: str) -> None:
        """Print what speaks against the run, above the bars."""
        if self._drawn:
            self._console.print(f"[yellow]Caution:[/] {escape(message)}", soft_wrap=True, highlight=False)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the context, SIGTERM and Ctrl-C ask the run to stop; a second Ctrl-C raises KeyboardInterrupt."""

        def ask(number: int, frame: object) -> None:
            if self.stopped_by and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.stopped_by = number

        handlers = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    @contextmanager
    def stage(self, name: str, total: int | None) -> Iterator[Stage]:
        """Draw a bar for a stage of ``total`` images (None: unknown). Stages can be nested."""
        outermost = not self._bars.tasks
        if outermost:
            self._bars.start()
        task = self._bars.add_task(name, total=total, note="")
        try:
            yield _Bar(self._bars, task)
        finally:
            self._bars.remove_task(task)
            if outermost:
                self._bars.stop()


class _Bar:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, images: int) -> None:
        self._bars.advance(self._task, images)

    def note(self, text: str) -> None:
        self._bars.update(self._task, note=text)


class _LateBars(RichProgress):
    """Draws only the stages that have run for SHOWN_AFTER seconds."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table([task for task in self.tasks if (task.elapsed or 0) >= SHOWN_AFTER])


class _ImagesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.0f} images/s" if task.speed else "", style="cyan")
