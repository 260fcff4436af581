"""A thread that answers the rows of jobs, portion by portion, beside the requests that wait for an answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from manyicl.engine.queries import AnswerOptions
from manyicl.errors import MachineError, UserError
from manyicl.server.evaluation import evaluated, rows_with_answers, summary
from manyicl.server.logging import place_of
from manyicl.server.prediction_json import error_json, prediction_json
from manyicl.server.records import JobRecord, VersionKey
from manyicl.server.row_input import ROWS
from manyicl.tasks.rows import LocatedRow
from manyicl.tasks.task import Query, Task

if TYPE_CHECKING:
    from manyicl.engine.prediction import Prediction
    from manyicl.engine.queries import StreamedRow

# A job's rows are answered and stored so many at a time; jobs take turns after each.
ROWS_PER_PORTION = 256
RESULTS_PER_PAGE = 1_000
# How long to wait where the queue of the worker is full, or the database failed.
BUSY_SECONDS = 0.5
# A job that was made by another process, such as a restored backup, is found after so long.
IDLE_SECONDS = 5.0
# How often jobs are looked for that ended long ago.
FORGET_SECONDS = 3600.0
# Codes of errors that say "not now": the job waits.
_NOT_NOW = frozenset({"queue_full", "not_ready", "stopping"})
_logger = logging.getLogger(__name__)


class Jobs(Protocol):
    """What the runner needs from the store of jobs."""

    def unfinished(self) -> list[JobRecord]:
        """Return jobs that are neither done nor failed nor cancelled, the oldest first."""

    def start(self, job_id: str) -> object:
        """Note that a job runs."""

    def waiting_rows(self, job_id: str, limit: int) -> list[tuple[int, Mapping[str, Any]]]:
        """Return the first rows without a result, with their numbers."""

    def put_results(self, job_id: str, results: Sequence[tuple[int, Mapping[str, Any]]], num_problems: int) -> object:
        """Store results together, or none of them."""

    def forget_older_than(self, days: float) -> object:
        """Delete jobs that ended so many days ago."""

    def results(self, job_id: str, after: int, limit: int) -> list[tuple[int, Mapping[str, Any]]]:
        """Return results of rows with higher numbers."""

    def finish(
        self,
        job_id: str,
        state: Literal["done", "failed"],
        problem: Mapping[str, Any] | None = None,
        summary: Mapping[str, Any] | None = None,
    ) -> object:
        """End a job."""


class Ticket(Protocol):
    """Rows that wait for their answers."""

    @property
    def future(self) -> Future[list[Prediction]]:
        """Becomes the predictions."""

    def cancel(self) -> None:
        """Take the rows out of the queue."""


class Predicts(Protocol):
    """What the runner needs from the thread that owns the engine."""

    def predict(
        self,
        key: VersionKey,
        rows: Sequence[StreamedRow],
        options: AnswerOptions,
        num_retrieved: int = 0,
        *,
        first_number: int = 1,
    ) -> Ticket:
        """Answer rows; raises `UserError` ``queue_full`` at once where there is no room."""


@dataclass(frozen=True)
class JobPlan:
    """How the rows of a job are answered.

    Attributes:
        task: The task without its examples.
        options: Options of the predictions; bad rows are reported.
        num_retrieved: Demonstrations to retrieve for each query.
    """

    task: Task
    options: AnswerOptions
    num_retrieved: int = 0


Columns = Mapping[str, Any]
# Renders rows to queries; one that cannot be answered becomes its error.
Render = Callable[[Task, Iterable[LocatedRow | UserError]], list[Query | UserError]]


# --- Rows of a job in the database


def stored_row(row: LocatedRow | UserError) -> dict[str, Any]:
    """Return a row of a job, or why it is none, as the database keeps it."""
    return {"problem": row.fields()} if isinstance(row, UserError) else {"columns": row.columns}


def row_of(stored: Columns, number: int) -> LocatedRow | UserError:
    """Return the row that `stored_row` was given, or its error; both name the row of the job."""
    if "problem" not in stored:
        return LocatedRow(dict(stored["columns"]), ROWS, number)
    fields = {name: value for name, value in stored["problem"].items() if name not in ("sentence", "file", "row")}
    return UserError(fields.pop("code"), fields.pop("what"), row=number, **fields)


class JobRunner:
    """Works on all unfinished jobs, those of an earlier process among them, portion by portion: owners take turns.

    The results of a portion are stored together, so after a kill a row has its result or is answered again, and none
    has two. A full queue, and a database that fails, are waited out; an error of the task ends its job.
    """

    def __init__(
        self,
        jobs: Jobs,
        worker: Predicts,
        plan: Callable[[JobRecord], JobPlan],
        render: Render,
        *,
        kept_days: float,
        rows_per_portion: int = ROWS_PER_PORTION,
        busy_seconds: float = BUSY_SECONDS,
    ) -> None:
        """Take what it works with; `start` begins.

        Args:
            jobs: Store of jobs.
            worker: Answers rows.
            plan: Says how the rows of a job are answered; its `UserError` fails the job.
            render: Renders rows; its `UserError` fails the job.
            kept_days: How long a job is kept after its end.
            rows_per_portion: Rows that are answered and stored together.
            busy_seconds: How long to wait where there is no room now.
        """
        self._jobs, self._worker, self._plan_of, self._render = jobs, worker, plan, render
        self._kept_days, self._forgotten_at = kept_days, float("-inf")
        self._rows_per_portion, self._busy_seconds = rows_per_portion, busy_seconds
        self._plans: dict[str, JobPlan] = {}
        self._last_turns: dict[str, int] = {}
        self._num_turns = 0
        self._news, self._stopping = threading.Event(), threading.Event()
        self._current: tuple[str, Ticket] | None = None
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin with the jobs that there are; without effect where it runs."""
        if self._thread is None:
            self._stopping.clear()
            self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
            self._thread.start()

    def stop(self, seconds: float | None = None) -> None:
        """End after the portion that is being stored; the others are answered after the next start."""
        self._stopping.set()
        self._news.set()
        with self._lock:
            if self._current is not None:
                self._current[1].cancel()
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None

    def wake(self) -> None:
        """Look for a new job now."""
        self._news.set()

    def cancelled(self, job_id: str) -> None:
        """Take the rows of a job that was cancelled out of the worker's queue."""
        with self._lock:
            if self._current is not None and self._current[0] == job_id:
                self._current[1].cancel()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                has_worked = self._work_once()
            except Exception as error:  # such as a full disk: the jobs stay as they are
                _logger.error("jobs wait because of %s", _as_logged(error))
                self._stopping.wait(self._busy_seconds)
                continue
            if not has_worked:
                self._news.wait(IDLE_SECONDS)
                self._news.clear()

    def _work_once(self) -> bool:
        """Work on one portion of a job of each owner; tell whether there was any."""
        self._forget()
        unfinished = self._jobs.unfinished()
        ids = {job.id for job in unfinished}
        self._plans = {job_id: plan for job_id, plan in self._plans.items() if job_id in ids}
        self._last_turns = {job_id: turn for job_id, turn in self._last_turns.items() if job_id in ids}
        for job in self._in_turn(unfinished):
            if self._stopping.is_set():
                break
            self._num_turns += 1
            self._last_turns[job.id] = self._num_turns
            self._work_on(job)
        return bool(unfinished)

    def _in_turn(self, unfinished: Sequence[JobRecord]) -> list[JobRecord]:
        """Return a job of each owner, the one that waited longest; many jobs of one take no time of the others."""
        chosen: dict[str, JobRecord] = {}
        for job in sorted(unfinished, key=lambda job: self._last_turns.get(job.id, 0)):
            chosen.setdefault(job.owner, job)
        return list(chosen.values())

    def _forget(self) -> None:
        """Delete jobs that ended long ago, once in a while."""
        if time.monotonic() - self._forgotten_at > FORGET_SECONDS:
            self._jobs.forget_older_than(self._kept_days)
            self._forgotten_at = time.monotonic()

    def _work_on(self, job: JobRecord) -> None:
        """Answer the next rows of a job, or end it; what can be waited out leaves it as it is.

        Raises:
            MachineError: If the database fails.
        """
        try:
            self._answer_portion(job)
        except MachineError:
            raise
        except UserError as error:
            if error.code in _NOT_NOW:
                self._stopping.wait(self._busy_seconds)
            elif not self._stopping.is_set():
                self._jobs.finish(job.id, "failed", _problem(error))
        except Exception as error:  # a mistake of ours, which would come again
            _logger.error("%s failed with %s", job.id, _as_logged(error))
            self._jobs.finish(job.id, "failed", _problem(UserError("server_error", "the server failed")))

    def _answer_portion(self, job: JobRecord) -> None:
        portion = self._jobs.waiting_rows(job.id, self._rows_per_portion)
        plan = self._plans.get(job.id)
        if plan is None:
            plan = self._plans[job.id] = self._plan_of(job)
            self._jobs.start(job.id)
        if not portion:
            found = summary(plan.task, self._all_results(job.id)) if job.kind == "evaluate" else None
            self._jobs.finish(job.id, "done", None, found)
            return
        results = self._answered(job, plan, portion)
        if results is None:
            self._stopping.wait(self._busy_seconds)
            return
        num_problems = sum(result.get("problem") is not None for _, result in results)
        self._jobs.put_results(job.id, results, num_problems)

    def _answered(
        self, job: JobRecord, plan: JobPlan, portion: Sequence[tuple[int, Mapping[str, Any]]]
    ) -> list[tuple[int, dict[str, Any]]] | None:
        """Answer rows of a job.

        Returns:
            Their results; None where the job was cancelled, or the server stops.

        Raises:
            UserError: If none can be answered.
        """
        numbers = [number for number, _ in portion]
        rows = [row_of(stored, number) for number, stored in portion]
        if job.kind == "evaluate":
            rows, expected = rows_with_answers(plan.task, rows)
        queries = self._render(plan.task, rows)
        predictions = self._predictions(job, plan, queries, numbers[0])
        if predictions is None:
            return None
        if job.kind == "evaluate":
            found = [evaluated(one, answers) for one, answers in zip(predictions, expected, strict=True)]
        else:
            found = [prediction_json(prediction) for prediction in predictions]
        return [(number, _numbered(result, number)) for number, result in zip(numbers, found, strict=True)]

    def _predictions(
        self, job: JobRecord, plan: JobPlan, queries: Sequence[Query | UserError], first_number: int
    ) -> list[Prediction] | None:
        """Wait for the answers; None where they will not come, as the job was cancelled or the server stops."""
        options: AnswerOptions = {**plan.options, "bad_rows": "report"}
        ticket = self._worker.predict(job.key, queries, options, plan.num_retrieved, first_number=first_number)
        with self._lock:
            self._current = job.id, ticket
        try:
            while not self._stopping.is_set():
                if wait((ticket.future,), timeout=self._busy_seconds).done:
                    return ticket.future.result()
            ticket.cancel()
            return None
        except CancelledError:
            return None
        except UserError:
            raise
        except Exception as error:
            sentence = str(error) if isinstance(error, MachineError) else "an unexpected error; the log names its kind"
            _logger.error("a portion of %s failed with %s", job.id, _as_logged(error))
            raise UserError("machine_failed", f"the rows could not be answered: {sentence}") from error
        finally:
            with self._lock:
                self._current = None

    def _all_results(self, job_id: str) -> Iterator[tuple[int, dict[str, Any]]]:
        after = 0
        while page := self._jobs.results(job_id, after, RESULTS_PER_PAGE):
            for number, result in page:
                yield number, dict(result)
            after = page[-1][0]


def _as_logged(error: Exception) -> str:
    """Say where an error was raised; a failure of the machine holds no text of a row, others may."""
    return f"{place_of(error)}: {error}" if isinstance(error, MachineError) else place_of(error)


def _numbered(result: dict[str, Any], number: int) -> dict[str, Any]:
    """Name the row of the job in a problem, where the worker named that of the portion."""
    if result.get("problem") is not None:
        result["problem"] = {**result["problem"], "row": number}
    return result


def _problem(error: UserError) -> dict[str, Any]:
    """Return why a job failed, without the number of a row in a portion."""
    error.row = None
    return error_json(error)
