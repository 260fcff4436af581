"""The worker: one thread that owns the engine. It answers the rows that wait in packed passes, and compiles in between.

::

    requests ── predict, stream ──> rows that wait, in groups ──┐
             ── compile ──────────> versions to compile ────────┤   one thread, turn after turn:
             ── forget, pin ──────> orders ─────────────────────┘   orders, a pass for every group that waits,
                                                                    some tokens of answers being written,
                                                                    the next compilation

A compilation stops between its chunks for a round of all that goes first; a chunk takes about as long as one row. A
version whose prefix is not in memory is compiled for the rows that wait for it, if need be in the middle of another
compilation, unless rows wait for that one: they came first. Rows are never answered together with rows of another
version or with other options, and what is answered together does not change the answers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from manyicl.engine.engine import Engine
from manyicl.engine.prediction import AnswerPart
from manyicl.engine.queries import AnswerOptions, Retrieve, StreamedRow
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.errors import MachineError, UserError
from manyicl.server.logging import place_of
from manyicl.server.prefix_making import Load, NotStoredError, Prefixes, compiled_of, make_prefix, model_hash
from manyicl.server.recent import Recent
from manyicl.server.records import VersionKey
from manyicl.server.waiting import Group, Portion, WaitingRows
from manyicl.server.work import Compiled, StreamTicket, TaskSource, Ticket, WorkerState, queue_full, stopping
from manyicl.tasks.retrieval import Retriever

if TYPE_CHECKING:
    from manyicl.engine.blend import BlendWeights

__all__ = ["Compiled", "EngineWorker", "StreamTicket", "TaskSource", "Ticket", "WorkerState", "model_hash"]

_LOG = logging.getLogger(__name__)
# A pass has as many rows as take about so long, so that others need not wait for many rows of one request; or as many
# as requests wait for the task, if nothing is compiled meanwhile: answering those together is faster for all of them.
PASS_SECONDS = 0.25
FEWEST_ROWS_OF_A_PASS, MOST_REQUESTS_OF_A_PASS = 8, 64
# Share of the time of a pass in which the clients it answered may come back to be in the next one.
SHARE_TO_COME_BACK = 0.1
# Rows whose free answers are written together, and for how long at a time before it is another's turn.
ROWS_WRITTEN_TOGETHER = 32
WRITING_SECONDS = 0.05
# Passes that write free answers at the same time; each has keys and values of its own rows.
MOST_PASSES_WRITING = 4
# Chunks of a compilation take as long as one row did lately, between these bounds.
LEAST_CHUNK_SECONDS, MOST_CHUNK_SECONDS = 0.02, 0.25
# A chunk may take its usual time once no row has come for so long.
QUIET_SECONDS = 5.0
# Compilations in progress at the same time: one in the background, and others that were started between its chunks.
MOST_NESTED = 3
# After a failure to read or to report a version, that is no mistake of a user, it is tried again.
RETRY_SECONDS = 5.0
# Versions of a task that wait to be compiled though a newer one waits, too; others are compiled with their first row.
MOST_OLD_TO_COMPILE = 100
# Versions of which things are remembered that are made again at small cost.
REMEMBERED_VERSIONS = 64
REMEMBERED_REBUILT = 10_000


class _AbandonedError(Exception):
    """Ends a compilation whose task was deleted, or that the end of the server interrupts."""


@dataclass
class _Due:
    """A version to compile: when at the earliest, and whether a newer one of its task came after it."""

    not_before: float = 0.0
    is_old: bool = False


@dataclass
class _Compilation:
    """A compilation in progress, or a fit of the blend after it: how far it is, and whether it is to end."""

    key: VersionKey
    is_of_blend: bool = False
    num_done: int = 0
    num_tokens: int = 0
    is_abandoned: bool = False
    # Versions that rows wait for, and that are compiled after this one.
    postponed: set[VersionKey] = field(default_factory=set)


@dataclass(eq=False)
class _Writing:
    """A pass that writes free answers: its rows, where they come from, and what keeps its prefix in memory."""

    group: Group
    portions: Sequence[Portion[Ticket]]
    parts: Iterator[AnswerPart]
    holding: ExitStack
    rows: list[tuple[Ticket, int]]
    seconds: float = 0.0


@dataclass
class _Counters:
    """Sums since the start; `WorkerState` explains them."""

    num_rows_answered: int = 0
    num_rows_failed: int = 0
    num_tickets_cancelled: int = 0
    num_passes: int = 0
    pass_seconds: float = 0.0
    num_compiled: int = 0
    num_compile_failures: int = 0
    num_compiled_again: int = 0
    compile_seconds: float = 0.0


@dataclass
class _Lately:
    """Times that passes took lately, in seconds: moving averages."""

    per_row: float = 0.0
    single_row: float = 0.0
    of_version: Recent[VersionKey, float] = field(default_factory=lambda: Recent(REMEMBERED_VERSIONS))

    def learn(self, version: VersionKey, num_rows: int, seconds: float, is_closed: bool) -> None:
        """Take in the time of a pass."""
        self.per_row = _moved(self.per_row, seconds / num_rows)
        if num_rows == 1 and is_closed:
            self.single_row = _moved(self.single_row, seconds)
        self.of_version[version] = _moved(self.of_version.get(version, 0.0), seconds / num_rows)

    def rows_in(self, version: VersionKey, seconds: float, most: int) -> int:
        """Return how many rows of a version a pass of so many seconds can answer."""
        per_row = self.of_version.get(version, 0.0) or self.per_row
        return min(most, max(FEWEST_ROWS_OF_A_PASS, int(seconds / per_row) if per_row else most))


@dataclass
class _Round:
    """The passes in which all groups that waited at one time were answered.

    Attributes:
        num_requests: Requests that were answered.
        clients_return_until: Until when it is worth waiting for the next rows of their clients.
    """

    num_requests: int = 0
    clients_return_until: float = float("-inf")

    def add(self, num_requests: int, seconds: float) -> None:
        """Take in a pass that ended now."""
        self.num_requests += num_requests
        self.clients_return_until = time.monotonic() + SHARE_TO_COME_BACK * seconds


class EngineWorker:
    """Owns an engine in one thread, and takes rows to answer and versions to compile from any other.

    Every method returns at once, except `stop`.
    """

    def __init__(
        self,
        engine: Engine,
        prefixes: Prefixes,
        load: Load,
        on_ready: Callable[[VersionKey, Compiled], object],
        on_failed: Callable[[VersionKey, UserError], object],
        *,
        max_waiting_rows: int = 4096,
        fill_seconds: float = 0.003,
        rows_per_pass: int = 256,
    ) -> None:
        """Take the engine; `start` begins to use it.

        Args:
            engine: Nothing else may use it from then on.
            prefixes: Keeps the prefixes.
            load: Reads a version and the demonstrations it is compiled from; called in the worker's thread.
            on_ready: Called in the worker's thread with a version that can answer from now on.
            on_failed: Called in the worker's thread with a version that cannot be compiled, and why.
            max_waiting_rows: Most rows that may wait at a time.
            fill_seconds: How long the first rows that come wait for others, to be answered together with them.
            rows_per_pass: Most rows of a pass.
        """
        self.model = model_hash(engine)
        self._engine, self._prefixes, self._load = engine, prefixes, load
        self._on_ready, self._on_failed = on_ready, on_failed
        self._max_waiting_rows, self._fill_seconds, self._rows_per_pass = max_waiting_rows, fill_seconds, rows_per_pass
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Guards all that other threads touch: the three kinds of work, and what follows.
        self._changed = threading.Condition()
        self._waiting: WaitingRows[Ticket] = WaitingRows()
        self._to_compile: dict[VersionKey, _Due] = {}
        self._orders: deque[Callable[[], None]] = deque()
        self._stop_at: float | None = None
        self._is_over = False
        # Only the worker's thread touches these, except to look.
        self._compiling: dict[VersionKey, _Compilation] = {}
        self._writing: list[_Writing] = []
        self._counters, self._lately, self._last_round = _Counters(), _Lately(), _Round()
        self._last_row = float("-inf")
        # Task -> whether it is pinned, of those that were compiled here.
        self._pinned: dict[str, bool] = {}
        self._retrievers: Recent[tuple[VersionKey, int], Retriever] = Recent(REMEMBERED_VERSIONS)
        self._blends: Recent[VersionKey, BlendWeights] = Recent(REMEMBERED_VERSIONS)
        self._rebuilt: Recent[VersionKey, bool] = Recent(REMEMBERED_REBUILT)

    # --- Called from any thread

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self, drain_seconds: float) -> None:
        """Take no further work, answer what waits for up to so long, fail the rest, and end the thread.

        Compilations that no row waits for are abandoned: the database says that they are to be done.
        """
        with self._changed:
            self._stop_at = time.monotonic() + drain_seconds
            self._changed.notify_all()
        if self._thread.ident is None:
            self._end()
        else:
            self._thread.join()

    def compile(self, key: VersionKey) -> None:
        """Compile a version when its turn comes, and report it; nothing changes if it waits already."""
        with self._changed:
            due = self._to_compile.setdefault(key, _Due())
            for other, its in self._to_compile.items():
                if other.task_id == key.task_id:
                    its.is_old |= other.version < key.version
                    due.is_old |= other.version > key.version
            self._drop_old(key.task_id)
            self._changed.notify_all()

    def _drop_old(self, task_id: str) -> None:
        """Keep the queue of a task short that is written faster than it is compiled."""
        old = sorted(key for key, its in self._to_compile.items() if key.task_id == task_id and its.is_old)
        for key in old[:-MOST_OLD_TO_COMPILE]:
            del self._to_compile[key]

    def predict(
        self,
        key: VersionKey,
        rows: Sequence[StreamedRow],
        options: AnswerOptions,
        num_retrieved: int = 0,
        *,
        first_number: int = 1,
    ) -> Ticket:
        """Let rows wait for their answers.

        Args:
            key: Version that answers; compiled first if need be.
            rows: As for `Engine.predict`; an error in place of a row that cannot be answered.
            options: As for `Engine.predict`. With ``bad_rows="report"`` each bad row has a prediction with its problem;
                otherwise the first one fails the ticket. ``num_answered`` has no meaning here.
            num_retrieved: Demonstrations to put before each query, of those that are not in the prefix.
            first_number: Number of the first row in what the user sent, which fixes what is drawn for the rows.

        Raises:
            UserError: ``too_many_rows`` if they are more than may ever wait, ``queue_full`` if others wait now,
                ``stopping`` if the worker has ended or is about to.
        """
        ticket = Ticket(rows, options.get("bad_rows") == "report", first_number)
        self._enqueue(ticket, key, options, num_retrieved)
        return ticket

    def stream(self, key: VersionKey, row: StreamedRow, options: AnswerOptions, num_retrieved: int = 0) -> StreamTicket:
        """Let one row wait for its answer, which comes in parts, or whole where it is no free answer; as `predict`."""
        ticket = StreamTicket([row], options.get("bad_rows") == "report")
        self._enqueue(ticket, key, options, num_retrieved)
        return ticket

    def forget(self, task_id: str) -> Future[None]:
        """Fail what waits for a task, end its compilations and delete its prefixes; the result says when that is done.

        The task must be gone from where versions are read before.
        """
        return self._order(lambda: self._forget(task_id))

    def set_pinned(self, task_id: str, pinned: bool) -> Future[None]:
        """Say whether the prefixes of a task always stay in memory."""
        return self._order(lambda: self._pin(task_id, pinned))

    def was_rebuilt(self, key: VersionKey) -> bool:
        """Tell whether a version that was ready had to be computed again, as its prefix was not on the disk whole."""
        with self._changed:
            return self._rebuilt.get(key, False)

    def state(self) -> WorkerState:
        """Return what the worker does, and what it has done."""
        usage = self._prefixes.usage()
        with self._changed:
            in_progress = [one for one in list(self._compiling.values()) if not one.is_of_blend]
            compiling = tuple((one.key, one.num_done, one.num_tokens) for one in in_progress)
            return WorkerState(
                is_alive=self._thread.is_alive(),
                is_stopping=self._stop_at is not None,
                num_waiting_rows=self._waiting.num_rows,
                num_waiting_compiles=len(self._to_compile),
                compiling=compiling,
                num_resident=usage.num_resident,
                memory_bytes=usage.memory_bytes,
                seconds_per_row=self._lately.per_row,
                **vars(self._counters),
            )

    def _enqueue(self, ticket: Ticket, key: VersionKey, options: AnswerOptions, num_retrieved: int) -> None:
        meant = {name: value for name, value in options.items() if name not in ("bad_rows", "num_answered")}
        group = Group(key, tuple(sorted(meant.items())), num_retrieved)
        num_rows, most = len(ticket.rows), self._max_waiting_rows
        if num_rows > most:
            what, remedy = "there are more rows than are taken at a time", "Send them in parts, or as a job."
            raise UserError("too_many_rows", what, expected=f"at most {most:,}", found=f"{num_rows:,}", remedy=remedy)
        with self._changed:
            self._require_open()
            if self._waiting.num_rows + num_rows > most:
                raise queue_full(self._waiting.num_rows, most)
            if num_rows:
                self._waiting.add(group, ticket, num_rows, time.monotonic())
                self._changed.notify_all()
        if not num_rows:
            ticket.future.set_result([])
        ticket.future.add_done_callback(lambda _: self._withdraw(ticket))

    def _require_open(self) -> None:
        if self._is_over or self._stop_at is not None:
            raise stopping()

    def _withdraw(self, ticket: Ticket) -> None:
        """Take a ticket out of the queue once it is done, answered or not."""
        with self._changed:
            self._waiting.remove(ticket)
            self._counters.num_tickets_cancelled += ticket.future.cancelled()

    def _order(self, act: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()

        def carry_out() -> None:
            try:
                act()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._changed:
            if not self._is_over:
                self._orders.append(carry_out)
                self._changed.notify_all()
                return done
        carry_out()
        return done

    # --- The worker's thread

    def _run(self) -> None:
        try:
            while self._has_work():
                try:
                    self._turn()
                except Exception as error:
                    # A defect here must not end the thread; what waits may be what causes it.
                    _log_failure("A turn of the worker failed", error)
                    self._fail(self._waiting_tickets(), error)
        finally:
            self._end()

    def _has_work(self) -> bool:
        """Wait for something to do; False when it is time to end."""
        with self._changed:
            while True:
                now = time.monotonic()
                is_busy = bool(self._waiting.num_rows or self._writing)
                if self._stop_at is not None and (now >= self._stop_at or not (is_busy or self._orders)):
                    return False
                due = min((one.not_before for one in self._to_compile.values()), default=float("inf"))
                if is_busy or self._orders or due <= now:
                    return True
                self._changed.wait(None if due == float("inf") else due - now)

    def _turn(self) -> None:
        self._carry_out_orders()
        self._let_rows_come()
        self._answer_round()
        if (key := self._next_to_compile()) is not None:
            self._compile(key)

    def _carry_out_orders(self) -> None:
        while True:
            with self._changed:
                if not self._orders:
                    return
                carry_out = self._orders.popleft()
            carry_out()

    def _let_rows_come(self) -> None:
        """Wait a moment for rows to answer together with the first ones, if there is nothing else to do."""
        with self._changed:
            oldest = self._waiting.oldest()
            if oldest is None or self._writing or self._fill_seconds <= 0:
                return
            while self._waiting.num_rows < self._rows_per_pass and self._stop_at is None:
                end = oldest + self._fill_seconds
                if self._waiting.num_tickets() < self._last_round.num_requests:
                    end = max(end, self._last_round.clients_return_until)
                if (left := end - time.monotonic()) <= 0:
                    return
                self._changed.wait(left)

    def _answer_round(self) -> None:
        """Give each group whose rows wait now a pass, and each answer that is being written some tokens."""
        with self._changed:
            groups = self._waiting.groups(time.monotonic())
        if groups:
            self._last_round = _Round()
        for group in groups:
            self._answer_group(group)
        for writing in list(self._writing):
            self._write(writing)

    def _answer_group(self, group: Group) -> None:
        version, is_blended = group.version, dict(group.options).get("blend")
        in_progress = self._compiling.get(version)
        if in_progress is not None and (is_blended or not in_progress.is_of_blend):
            return
        prefix = self._prefixes.get(version)
        if prefix is None:
            # While a blend is fitted, its prefix may leave memory, and comes back with the blend.
            if in_progress is not None or len(self._compiling) >= MOST_NESTED or self._is_postponed(version):
                return
            prefix = self._make(version, may_compute=self._may_compile_now())
        if prefix is not None and is_blended and prefix.blend is None:
            prefix = self._fit_blend(version, prefix)
        if prefix is None:
            return
        with ExitStack() as holding:
            holding.enter_context(self._prefixes.using(version))
            if prefix.task.is_closed:
                self._answer(group, prefix, self._take(group, *self._most_rows(group)))
            elif len(self._writing) < MOST_PASSES_WRITING:
                most = min(ROWS_WRITTEN_TOGETHER, self._rows_per_pass)
                portions = self._take(group, most, most)
                self._begin_writing(group, prefix, portions, holding.pop_all())

    def _is_postponed(self, version: VersionKey) -> bool:
        return any(version in compilation.postponed for compilation in self._compiling.values())

    def _may_compile_now(self) -> bool:
        """Tell whether no rows wait for what is compiled now: they came first, and would wait for twice as much."""
        innermost = next(reversed(self._compiling), None)
        with self._changed:
            return innermost is None or not self._waiting.tickets(innermost)

    def _take(self, group: Group, most_rows: int, most_of_one: int) -> list[Portion[Ticket]]:
        self._last_row = time.monotonic()
        with self._changed:
            return self._waiting.take(group, most_rows, most_of_one)

    def _most_rows(self, group: Group) -> tuple[int, int]:
        """Return how many rows of a group a pass may have, and how many of one request."""
        usual = self._lately.rows_in(group.version, PASS_SECONDS, self._rows_per_pass)
        if self._compiling:
            return usual, usual
        with self._changed:
            num_requests = self._waiting.num_tickets(group)
        return max(usual, min(num_requests, MOST_REQUESTS_OF_A_PASS, self._rows_per_pass)), usual

    def _answer(self, group: Group, prefix: TaskPrefix, portions: Sequence[Portion[Ticket]]) -> None:
        """Answer rows of closed answers in one pass; if it fails, each ticket alone, so that only the cause fails."""
        if not portions:
            return
        started = time.perf_counter()
        rows = _rows_of(portions)
        try:
            predictions = list(
                self._engine.predict(
                    prefix,
                    [ticket.rows[position] for ticket, position in rows],
                    retrieve=self._retrieve(group, prefix),
                    numbers=[ticket.first_number + position for ticket, position in rows],
                    **self._options(group),
                )
            )
        except Exception as error:
            self._failed_pass(portions, error, lambda portion: self._answer(group, prefix, [portion]))
            return
        seconds = time.perf_counter() - started
        self._last_round.add(len(portions), seconds)
        self._count_pass(group.version, len(rows), seconds, is_closed=True)
        for (ticket, position), prediction in zip(rows, predictions, strict=True):
            _hand_in(ticket, position, AnswerPart(1, prediction.answer, prediction))
        self._give_back(portions)

    def _failed_pass(
        self, portions: Sequence[Portion[Ticket]], error: Exception, alone: Callable[[Portion[Ticket]], None]
    ) -> None:
        """Answer the tickets of a pass that failed one by one, or fail the only one."""
        _log_failure("A pass failed", error)
        if len(portions) > 1:
            for portion in portions:
                alone(portion)
            return
        self._counters.num_rows_failed += sum(portion.end - portion.start for portion in portions)
        self._fail([portion.ticket for portion in portions], error)

    def _begin_writing(
        self, group: Group, prefix: TaskPrefix, portions: Sequence[Portion[Ticket]], holding: ExitStack
    ) -> None:
        """Begin to write free answers, of which `_write` writes the tokens."""
        if not portions:
            holding.close()
            return
        rows = _rows_of(portions)
        try:
            parts = self._engine.stream(
                prefix,
                [ticket.rows[position] for ticket, position in rows],
                retrieve=self._retrieve(group, prefix),
                numbers=[ticket.first_number + position for ticket, position in rows],
                **self._options(group),
            )
        except Exception as error:
            holding.close()
            self._failed_pass(portions, error, lambda portion: self._write_alone(group, portion))
            return
        self._writing.append(_Writing(group, portions, parts, holding, rows))

    def _write(self, writing: _Writing) -> None:
        """Write free answers for a moment."""
        if writing not in self._writing:
            return
        started = time.perf_counter()
        try:
            while True:
                if not any(portion.ticket.is_open for portion in writing.portions):
                    self._end_writing(writing)
                    return
                part = next(writing.parts, None)
                if part is None:
                    self._end_writing(writing)
                    seconds = writing.seconds + time.perf_counter() - started
                    self._count_pass(writing.group.version, len(writing.rows), seconds, is_closed=False)
                    self._give_back(writing.portions)
                    return
                _hand_in(*writing.rows[part.row - 1], part)
                if time.perf_counter() - started >= WRITING_SECONDS:
                    return
        except Exception as error:
            self._end_writing(writing)
            self._failed_pass(writing.portions, error, lambda portion: self._write_alone(writing.group, portion))
        finally:
            writing.seconds += time.perf_counter() - started

    def _write_alone(self, group: Group, portion: Portion[Ticket]) -> None:
        """Begin again with one ticket of a pass that failed; text that was handed out cannot be taken back."""
        prefix = self._prefixes.get(group.version)
        if prefix is None or portion.ticket.has_parts:
            self._counters.num_rows_failed += portion.end - portion.start
            self._fail([portion.ticket], MachineError("The answer could not be written to its end."))
            return
        holding = ExitStack()
        holding.enter_context(self._prefixes.using(group.version))
        self._begin_writing(group, prefix, [portion], holding)

    def _end_writing(self, writing: _Writing) -> None:
        self._writing.remove(writing)
        if isinstance(writing.parts, Generator):
            writing.parts.close()
        writing.holding.close()

    def _give_back(self, portions: Sequence[Portion[Ticket]]) -> None:
        with self._changed:
            for portion in portions:
                self._waiting.give_back(portion.ticket, time.monotonic())

    def _count_pass(self, version: VersionKey, num_rows: int, seconds: float, *, is_closed: bool) -> None:
        with self._changed:
            self._counters.num_passes += 1
            self._counters.pass_seconds += seconds
            self._counters.num_rows_answered += num_rows
            self._lately.learn(version, num_rows, seconds, is_closed)

    def _options(self, group: Group) -> AnswerOptions:
        options: AnswerOptions = dict(group.options)  # type: ignore[assignment]  # they came from AnswerOptions
        return {**options, "bad_rows": "report"}

    def _retrieve(self, group: Group, prefix: TaskPrefix) -> Retrieve | None:
        """Return what retrieves demonstrations for each query; None where all of them are in the prefix."""
        if not group.num_retrieved or not prefix.rows:
            return None
        key = group.version, group.num_retrieved
        if key not in self._retrievers:
            self._retrievers[key] = Retriever(prefix.rows, group.num_retrieved)
        return self._retrievers[key]

    def _fit_blend(self, version: VersionKey, prefix: TaskPrefix) -> TaskPrefix | None:
        """Fit the weights of a blend at its first use, with what goes first in between; None if that is abandoned."""
        if version in self._blends:
            blended = replace(prefix, blend=self._blends[version])
        else:
            fit = _Compilation(version, is_of_blend=True)
            self._compiling[version] = fit
            try:
                with self._prefixes.using(version):
                    blended = self._engine.with_blend(prefix, between_chunks=partial(self._between_chunks, fit))
            except _AbandonedError:
                return None
            except Exception:
                # The pass fails with it, and says so to each ticket.
                return prefix
            finally:
                del self._compiling[version]
            if blended.blend is not None:
                self._blends[version] = blended.blend
        self._keep(version, blended)
        return blended

    def _keep(self, version: VersionKey, prefix: TaskPrefix) -> None:
        try:
            self._prefixes.put(version, prefix, pinned=self._pinned.get(version.task_id, False))
        except Exception as error:
            # It answers what waits now, and is made again for what comes.
            _log_failure("A prefix could not be kept", error)

    # --- Compiling

    def _next_to_compile(self) -> VersionKey | None:
        """Return the version to compile next, in the order in which they came; those with a newer one come last."""
        with self._changed:
            if self._stop_at is not None:
                return None
            now = time.monotonic()
            due = [key for key, its in self._to_compile.items() if its.not_before <= now]
            return next((key for key in due if not self._to_compile[key].is_old), due[0] if due else None)

    def _compile(self, key: VersionKey) -> None:
        prefix = self._prefixes.get(key)
        if prefix is None:
            self._make(key)
            return
        with self._changed:
            self._to_compile.pop(key, None)
        self._report(key, lambda: self._on_ready(key, compiled_of(prefix, self.model)))

    def _make(self, key: VersionKey, *, may_compute: bool = True) -> TaskPrefix | None:
        """Compile a version or take its prefix from the disk, and report it if it was to be compiled; None if it fails.

        What waits for a version that cannot be compiled fails with it. If the network may not run, and would have to,
        the version is postponed until the compilation in progress is done.
        """
        with self._changed:
            is_requested = is_due = self._to_compile.pop(key, None) is not None
        compilation = _Compilation(key)
        self._compiling[key] = compilation
        others, started = self._counters.pass_seconds + self._counters.compile_seconds, time.perf_counter()
        try:
            source = self._load(key)
        except Exception as error:
            del self._compiling[key]
            self._not_loaded(key, error, is_due)
            return None
        is_due |= source.answers is None
        self._pinned[key.task_id] = source.pinned
        try:
            between_chunks = partial(self._between_chunks, compilation)
            prefix = make_prefix(
                self._engine, self._prefixes, source, self._load, between_chunks, may_compute=may_compute
            )
            self._carry_out_orders()
            if compilation.is_abandoned:
                raise _AbandonedError
        except _AbandonedError:
            return None
        except NotStoredError:
            self._postpone(key, is_requested)
            return None
        except Exception as error:
            self._cannot_compile(key, error, is_due)
            return None
        finally:
            del self._compiling[key]
        # What went first between the chunks is counted where it was done.
        meanwhile = self._counters.pass_seconds + self._counters.compile_seconds - others
        seconds = max(0.0, time.perf_counter() - started - meanwhile)
        with self._changed:
            self._counters.num_compiled += 1
            self._counters.num_compiled_again += not is_due
            self._counters.compile_seconds += seconds
            if not is_due:
                self._rebuilt[key] = prefix.num_reused_tokens < prefix.num_tokens
        self._keep(key, prefix)
        if is_due:
            self._report(key, lambda: self._on_ready(key, compiled_of(prefix, self.model, seconds)))
        return prefix

    def _postpone(self, key: VersionKey, is_requested: bool) -> None:
        """Leave a version until the compilation is done in whose middle it was tried."""
        outer = [compilation for other, compilation in self._compiling.items() if other != key]
        outer[-1].postponed.add(key)
        if is_requested:
            self.compile(key)

    def _between_chunks(self, compilation: _Compilation, num_done: int, num_tokens: int) -> float | None:
        """Do all that goes first, and say how long the next chunk may take."""
        compilation.num_done, compilation.num_tokens = num_done, num_tokens
        self._carry_out_orders()
        if compilation.is_abandoned or self._is_time_to_abandon(compilation.key):
            raise _AbandonedError
        self._answer_round()
        if compilation.is_abandoned:
            raise _AbandonedError
        if time.monotonic() - self._last_row > QUIET_SECONDS:
            return None
        return min(MOST_CHUNK_SECONDS, max(LEAST_CHUNK_SECONDS, self._lately.single_row or self._lately.per_row))

    def _is_time_to_abandon(self, key: VersionKey) -> bool:
        """Tell whether the worker is about to end, and no row waits for this version, or it has no more time."""
        with self._changed:
            if self._stop_at is None:
                return False
            return time.monotonic() >= self._stop_at or not self._waiting.tickets(key)

    def _not_loaded(self, key: VersionKey, error: Exception, is_due: bool) -> None:
        """Fail what waits for a version that cannot be read; a failure of the machine may be over later."""
        if is_due and isinstance(error, UserError):
            # First, as who waits reads the state of the version when its rows have failed.
            self._report(key, lambda: self._on_failed(key, error))
        elif is_due:
            _log_failure("A version could not be read", error)
            with self._changed:
                self._to_compile.setdefault(key, _Due(time.monotonic() + RETRY_SECONDS))
        self._fail(self._waiting_tickets(key), error)

    def _cannot_compile(self, key: VersionKey, error: Exception, is_due: bool) -> None:
        if not isinstance(error, UserError):
            _log_failure("A version could not be compiled", error)
            what = f"the machine failed to compile the task ({type(error).__name__})"
            error = UserError("compile_failed", what, remedy="The server's log says more.")
        with self._changed:
            self._counters.num_compile_failures += 1
        failure = error
        if is_due:
            self._report(key, lambda: self._on_failed(key, failure))
        self._fail(self._waiting_tickets(key), failure)

    def _report(self, key: VersionKey, report: Callable[[], object]) -> None:
        """Report a version; where that fails, it is compiled, found in memory, and reported again later."""
        try:
            report()
        except Exception as error:
            _log_failure("A version could not be reported", error)
            with self._changed:
                self._to_compile.setdefault(key, _Due(time.monotonic() + RETRY_SECONDS))

    # --- Orders, and the end

    def _forget(self, task_id: str) -> None:
        unknown = UserError("unknown_task", "the task was deleted")
        with self._changed:
            for key in [key for key in self._to_compile if key.task_id == task_id]:
                del self._to_compile[key]
            tickets = self._waiting.tickets(task_id=task_id)
        self._fail(tickets, unknown)
        for writing in [one for one in self._writing if one.group.version.task_id == task_id]:
            self._end_writing(writing)
            self._fail([portion.ticket for portion in writing.portions], unknown)
        for compilation in self._compiling.values():
            compilation.is_abandoned |= compilation.key.task_id == task_id
        self._retrievers.discard(lambda key: key[0].task_id == task_id)
        self._blends.discard(lambda key: key.task_id == task_id)
        with self._changed:
            self._rebuilt.discard(lambda key: key.task_id == task_id)
        self._pinned.pop(task_id, None)
        self._prefixes.forget(task_id)

    def _pin(self, task_id: str, pinned: bool) -> None:
        if task_id in self._pinned:
            self._pinned[task_id] = pinned
        self._prefixes.set_pinned(task_id, pinned)

    def _waiting_tickets(self, version: VersionKey | None = None) -> list[Ticket]:
        with self._changed:
            return self._waiting.tickets(version)

    def _fail(self, tickets: Sequence[Ticket], error: Exception) -> None:
        """Fail tickets, outside the lock, because those who wait for them may be called at once."""
        if not isinstance(error, UserError | MachineError):
            error = MachineError(f"The answers could not be computed ({type(error).__name__}).")
        for ticket in tickets:
            # Each its own, as who gets it fills in where in a request the mistake is.
            ticket.fail(copy(error))

    def _end(self) -> None:
        with self._changed:
            self._is_over = True
        self._carry_out_orders()
        for writing in list(self._writing):
            self._end_writing(writing)
            self._fail([portion.ticket for portion in writing.portions], stopping())
        self._fail(self._waiting_tickets(), stopping())


def _rows_of(portions: Sequence[Portion[Ticket]]) -> list[tuple[Ticket, int]]:
    """Return the ticket and the position in it of each row of a pass."""
    return [(portion.ticket, position) for portion in portions for position in range(portion.start, portion.end)]


def _hand_in(ticket: Ticket, position: int, part: AnswerPart) -> None:
    """Hand in the next text of a row's answer, and the answer once it is complete."""
    if part.prediction is None or part.prediction.problem is None or ticket.reports_bad_rows:
        ticket.put_part(part)
    if part.prediction is not None:
        ticket.put(position, part.prediction)


def _moved(average: float, value: float) -> float:
    """Move an average towards a new value; the first value is taken as it is."""
    return 0.8 * average + 0.2 * value if average else value


def _log_failure(what: str, error: Exception) -> None:
    """Log where something failed, without the message of the error, which may hold texts."""
    _LOG.error("%s: %s", what, place_of(error))
