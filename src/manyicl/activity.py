"""What a long command is doing, on standard error: a bar on a terminal, elsewhere a plain line every ten seconds.

Every part of the package that may take long is given an `Activity`, and says there what it begins and how far it is.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from manyicl.printing import duration, say

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# Where there is no bar, a long command says this often how far it is.
SECONDS_BETWEEN_LINES = 10.0

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class _Work:
    """A part of the work, and how far it is; replaced as a whole, because a thread reads it.

    Attributes:
        what: What is done, such as ``answering``.
        total: Number of its steps; None if that is not known.
        done: Steps that are done.
        found: Those among them that were done before, or at no cost: they say nothing of the time that the rest takes.
        place: What is done now.
        part: How far that is.
        started: When it began, in seconds of a clock.
    """

    what: str
    total: int | None = None
    done: int = 0
    found: int = 0
    place: str = ""
    part: str = ""
    started: float = field(default_factory=time.monotonic)

    def time_left(self) -> str:
        """Say how long the rest will take, if the steps so far allow to say so."""
        measured = self.done - self.found
        if not self.total or measured <= 0 or self.done >= self.total:
            return ""
        return f"about {duration((time.monotonic() - self.started) / measured * (self.total - self.done))} left"

    def details(self) -> str:
        """Say what is done now, and how far that is."""
        return ", ".join(filter(None, (self.place, self.part)))

    def line(self) -> str:
        """Say in one line what is done, for how long, and how much of it is left."""
        text = self.what
        if self.total:
            text += f": {self.done:,} of {self.total:,}"
        elif self.done:
            text += f": {self.done:,}"
        elapsed = f"{duration(time.monotonic() - self.started)} so far"
        is_done, time_it_takes = (text, self.details()), (elapsed, self.time_left())
        return f"{', '.join(filter(None, is_done))}; {', '.join(filter(None, time_it_takes))}"


class Activity:
    """Shows what is being done, how much of it is done, and how long the rest will take.

    A command that ends within ten seconds prints nothing. The lines come from a thread of their own, so that they
    appear while a library loads or computes.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False, seconds: float | None = None) -> None:
        """Prepare.

        Args:
            console: Where it is shown, such as standard error; None to show nothing.
            quiet: True to show nothing.
            seconds: Time between plain lines; None for ten.
        """
        self._console = None if quiet else console
        self._bar = _bar(self._console) if self._console is not None and self._console.is_terminal else None
        self._seconds = max(SECONDS_BETWEEN_LINES if seconds is None else seconds, 0.01)
        self._made_at = self._said_at = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._work = _Work("starting")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        elif self._console is not None:
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

    @property
    def has_bar(self) -> bool:
        """Whether a bar shows how far the work is, so that no line has to."""
        return self._bar is not None

    @property
    def seconds(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._made_at

    def begin(self, what: str, total: int | None = None, *, found: int = 0) -> None:
        """Begin the next part of the work.

        Args:
            what: What is done, such as ``answering``.
            total: Number of its steps; None if that is not known.
            found: Number of them that were done before.
        """
        self._work = _Work(what, total, done=found, found=found)
        if self._bar is not None:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(what, total=total, completed=found, details="")

    def advance(self, steps: int = 1, place: str | None = None, *, found: bool = False) -> None:
        """Count steps that are done; ``place`` says what is done now.

        Args:
            steps: Number of steps.
            place: What is done now; None for what it was.
            found: True if they were done before, or at no cost.
        """
        work = self._work
        num_found = work.found + steps if found else work.found
        self._set(replace(work, done=work.done + steps, found=num_found, place=work.place if place is None else place))

    def show(self, num_done: int, num_all: int) -> None:
        """Say how many steps are done, of how many; see `manyicl.tasks.files.OnProgress`."""
        self._set(replace(self._work, done=num_done, total=num_all))

    def now(self, place: str, part: str = "") -> None:
        """Say what is done now, and how far that is."""
        self._set(replace(self._work, place=place, part=part))

    def restart(self) -> None:
        """Take the time anew: the steps so far say nothing of the time that the rest takes."""
        self._set(replace(self._work, found=self._work.done, part="", started=time.monotonic()))

    def part(self, part: str) -> None:
        """Say how far it is with what is done now."""
        self._set(replace(self._work, part=part))

    def prefill(self, num_done: int, num_all: int) -> None:
        """Say how many tokens of a prefix are encoded."""
        self.part(f"prefix: {num_done:,} of {num_all:,} tokens" if num_done < num_all else "")

    def counting(self, items: Iterable[ItemT]) -> Iterator[ItemT]:
        """Pass items on, and count each once the next one is requested."""
        for item in items:
            yield item
            self.advance()

    def time_left(self) -> str:
        """Say how long the rest of this part of the work will take; empty where that is not known."""
        return self._work.time_left()

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one; the next one about progress is due ten seconds later."""
        if self._console is not None:
            self._said_at = time.monotonic()
            say(self._console, line)

    def line(self) -> str:
        """Say in one line what is being done, for how long, and how much of it is left."""
        return self._work.line()

    def _set(self, work: _Work) -> None:
        self._work = work
        if self._bar is not None and self._bar.task_ids:
            task = self._bar.task_ids[-1]
            self._bar.update(task, completed=work.done, total=work.total, details=work.details())

    def _write_lines(self) -> None:
        while not self._ended.wait(max(self._said_at + self._seconds - time.monotonic(), 0.0)):
            if time.monotonic() >= self._said_at + self._seconds:
                self.say(self.line())


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[details]}", markup=False),
    )
    # What a command prints goes above the bar on a terminal, and nowhere but to its file elsewhere.
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    return Progress(*columns, console=console, transient=True, redirect_stdout=on_terminal)
