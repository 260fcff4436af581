"""What a long command is doing, on standard error: a bar on a terminal, elsewhere a plain line every ten seconds."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from manyicl.printing import SECONDS_BETWEEN_LINES, duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Activity:
    """Shows what is being done, how much of it is done, and how long the rest will take.

    A command that ends within ten seconds prints nothing. The lines come from a thread of their own, so that they
    appear while a library loads or computes.
    """

    def __init__(self, console: Console, *, quiet: bool = False, seconds: float = SECONDS_BETWEEN_LINES) -> None:
        """Prepare.

        Args:
            console: Where it is shown; standard error.
            quiet: True to show nothing.
            seconds: Time between plain lines.
        """
        self._console = console
        self._bar: Progress | None = None
        if console.is_terminal and not quiet:
            self._bar = _bar(console)
        self._seconds = None if quiet or self._bar else seconds
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._begin("starting", None)

    def _begin(self, what: str, total: int | None) -> None:
        self._what, self._total, self._done, self._detail = what, total, 0, ""
        self._started = time.monotonic()

    def begin(self, what: str, total: int | None = None) -> None:
        """Begin the next part of the work, of ``total`` steps if that is known."""
        self._begin(what, total)
        if self._bar is not None:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(what, total=total, detail="")

    def advance(self, steps: int = 1, detail: str = "") -> None:
        """Count steps that are done; ``detail`` says what is done now."""
        self._done += steps
        self._detail = detail
        if self._bar is not None and self._bar.task_ids:
            self._bar.update(self._bar.task_ids[-1], advance=steps, detail=detail)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        if self._seconds is not None:
            self._thread = threading.Thread(target=self._write_lines, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.stop()

    def _write_lines(self) -> None:
        while not self._ended.wait(self._seconds):
            self._console.print(self.line(), markup=False, highlight=False, soft_wrap=True)

    def line(self) -> str:
        """Say in one line what is being done, for how long, and how much of it is left."""
        elapsed = time.monotonic() - self._started
        text = self._what
        if self._total:
            text += f": {self._done:,} of {self._total:,}"
        elif self._done:
            text += f": {self._done:,}"
        if self._detail:
            text += f", {self._detail}"
        text += f"; {duration(elapsed)} so far"
        if self._total and 0 < self._done < self._total:
            text += f", about {duration(elapsed * (self._total - self._done) / self._done)} left"
        return text


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    return Progress(*columns, console=console, transient=True)
