"""What the worker is given and what it gives back, as plain data and tickets; nothing here loads the network."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from manyicl.errors import UserError
from manyicl.server.records import VersionKey
from manyicl.tasks.task import Task

if TYPE_CHECKING:
    from manyicl.engine.prediction import AnswerPart, Prediction
    from manyicl.engine.queries import StreamedRow

# For each shot: demonstrations before it, log-probability in nats, 1 if the answer was right, else 0.
ShotAnswers = tuple[tuple[int, float, int], ...]


@dataclass(frozen=True)
class TaskSource:
    """What a version of a task is compiled from.

    Attributes:
        key: Which version.
        task: The task; its training examples are the demonstrations, in the order of the context.
        num_shots: Most demonstrations in the prefix; None for as many as fit.
        num_retrieved: Demonstrations to put before each query, for which tokens are reserved.
        answers: What an earlier compilation by this very model recorded; None where there is none.
        pinned: Whether its prefix always stays in memory.
        earlier: Another version of the task that this model compiled and that begins with the same demonstrations as
            far as possible, for its records; None for the version before.
    """

    key: VersionKey
    task: Task
    num_shots: int | None = None
    num_retrieved: int = 0
    answers: ShotAnswers | None = None
    pinned: bool = False
    earlier: VersionKey | None = None


@dataclass(frozen=True, slots=True)
class Compiled:
    """Result of compiling a version.

    Attributes:
        num_tokens: Tokens of the prefix.
        num_shots: Demonstrations in it.
        num_dropped: Demonstrations that did not fit the context.
        answers: How well each demonstration was predicted, given those before it.
        model: Identity of the model, a hash.
        seconds: How long it took, without what went first meanwhile.
    """

    num_tokens: int
    num_shots: int
    num_dropped: int
    answers: ShotAnswers
    model: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What the worker does now, and what it has done since it started.

    Attributes:
        is_alive: Whether its thread runs.
        is_stopping: Whether it takes no further work.
        num_waiting_rows: Rows that no pass has started on.
        num_waiting_compiles: Versions to compile, without those in progress.
        compiling: Versions that are compiled now, with tokens done and in all; the first was started first.
        num_resident: Prefixes in memory.
        memory_bytes: Their keys and values.
        seconds_per_row: How long a row takes lately, in the passes of many rows; 0 before the first.
        num_rows_answered: Rows with an answer, or with a problem of their own.
        num_rows_failed: Rows whose pass failed.
        num_tickets_cancelled: Tickets that were cancelled before they were answered.
        num_passes: Passes.
        pass_seconds: Their time.
        num_compiled: Versions whose prefix was computed, or read back from the disk.
        num_compile_failures: Versions that could not be compiled.
        num_compiled_again: Those among them that had been ready before, and were not in memory.
        compile_seconds: Time of compiling.
    """

    is_alive: bool = True
    is_stopping: bool = False
    num_waiting_rows: int = 0
    num_waiting_compiles: int = 0
    compiling: tuple[tuple[VersionKey, int, int], ...] = ()
    num_resident: int = 0
    memory_bytes: int = 0
    seconds_per_row: float = 0.0
    num_rows_answered: int = 0
    num_rows_failed: int = 0
    num_tickets_cancelled: int = 0
    num_passes: int = 0
    pass_seconds: float = 0.0
    num_compiled: int = 0
    num_compile_failures: int = 0
    num_compiled_again: int = 0
    compile_seconds: float = 0.0


@dataclass(eq=False)
class Ticket:
    """Rows that wait for their answers.

    Attributes:
        rows: The rows; an error in place of one that cannot be answered.
        reports_bad_rows: Whether a row that cannot be answered gets a prediction with a ``problem``; otherwise its
            error, with its number, is that of the whole ticket.
        first_number: Number of the first row in what the user sent, which fixes what is drawn for it.
        future: Their predictions in order, or why there are none.
    """

    rows: Sequence[StreamedRow]
    reports_bad_rows: bool = False
    first_number: int = 1
    future: Future[list[Prediction]] = field(default_factory=Future)

    def __post_init__(self) -> None:
        """Make place for the predictions."""
        self._predictions: list[Prediction | None] = [None] * len(self.rows)
        self._num_missing = len(self.rows)

    def cancel(self) -> None:
        """Give up the rows: those that no pass has started on leave the queue, answers to others are dropped."""
        self.future.cancel()

    @property
    def is_open(self) -> bool:
        """Whether the answers are still wanted."""
        return not self.future.done()

    @property
    def has_parts(self) -> bool:
        """Whether text of an answer was handed out that cannot be taken back."""
        return False

    def put(self, position: int, prediction: Prediction) -> None:
        """Hand in the prediction of one row, counted from 0; with the last one missing, the future is done."""
        if self._predictions[position] is None:
            self._num_missing -= 1
        self._predictions[position] = prediction
        if self._num_missing == 0:
            self._finish([one for one in self._predictions if one is not None])

    def put_part(self, part: AnswerPart) -> None:
        """Take notice of the next text of an answer; a ticket that is not streamed has no use for it."""

    def fail(self, error: Exception) -> None:
        """Say why there are no answers."""
        # Cancelled, or failed before.
        with suppress(InvalidStateError):
            self.future.set_exception(error)

    def _finish(self, predictions: list[Prediction]) -> None:
        if not self.reports_bad_rows:
            for number, prediction in enumerate(predictions, start=self.first_number):
                if (problem := prediction.problem) is not None:
                    self.fail(problem if problem.file else problem.at(row=number))
                    return
        with suppress(InvalidStateError):
            self.future.set_result(predictions)


class StreamTicket(Ticket):
    """One row whose free answer comes in parts: iterate over it, in any thread or in a coroutine.

    The last part has the prediction. If the answer cannot be given, iterating raises why: a `UserError`, or
    `concurrent.futures.CancelledError` after `cancel`.
    """

    def __post_init__(self) -> None:
        """Begin without parts."""
        super().__post_init__()
        self._parts: list[AnswerPart] = []
        self._changed = threading.Condition()
        self._wakers: list[Callable[[], None]] = []
        self.future.add_done_callback(lambda _: self._wake())

    @property
    def has_parts(self) -> bool:
        """Whether there is text already."""
        return bool(self._parts)

    def put_part(self, part: AnswerPart) -> None:
        """Hand in the next text of the answer."""
        with self._changed:
            self._parts.append(part)
        self._wake()

    def __iter__(self) -> Iterator[AnswerPart]:
        """Wait for the parts, and yield them."""
        num_given = 0
        while True:
            with self._changed:
                while num_given == len(self._parts) and not self.future.done():
                    self._changed.wait()
            new, is_last = self._news(num_given)
            num_given += len(new)
            yield from new
            if is_last:
                break
        self.future.result()

    async def __aiter__(self) -> AsyncIterator[AnswerPart]:
        """Wait for the parts without blocking the event loop, and yield them."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(changed.set)

        with self._changed:
            self._wakers.append(wake)
        try:
            num_given = 0
            while True:
                changed.clear()
                new, is_last = self._news(num_given)
                num_given += len(new)
                for part in new:
                    yield part
                if is_last:
                    break
                if not new:
                    await changed.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)
        self.future.result()

    def _news(self, num_given: int) -> tuple[list[AnswerPart], bool]:
        """Return the parts after the first ones, and whether no others will follow."""
        # In this order: once the future is done, all parts are here.
        is_last = self.future.done()
        with self._changed:
            return self._parts[num_given:], is_last

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
            wakers = list(self._wakers)
        for wake in wakers:
            wake()


def queue_full(num_waiting: int, most: int) -> UserError:
    """Make the error for rows that come while too many others wait."""
    what, remedy = "too many rows wait for their answers", "Send them again later."
    return UserError("queue_full", what, expected=f"at most {most:,}", found=f"{num_waiting:,}", remedy=remedy)


def stopping() -> UserError:
    """Make the error for rows that come or still wait when the server ends; they may be sent to the next one."""
    return UserError("stopping", "the server is stopping", remedy="Send the rows again later.")
