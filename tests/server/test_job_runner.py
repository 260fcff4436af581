"""Jobs are answered portion by portion: no row is lost or stored twice, whatever happens in between."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest

from manyicl.engine.prediction import Prediction
from manyicl.engine.queries import AnswerOptions, checked_query
from manyicl.errors import MachineError, UserError
from manyicl.server.job_runner import JobPlan, JobRunner, row_of, stored_row
from manyicl.server.records import JobKind, JobRecord, JobState, VersionKey
from manyicl.tasks.rows import LocatedRow
from manyicl.tasks.task import Query, Task, TaskSpec

TASK = Task(
    TaskSpec(
        name="mood",
        family="classification",
        query_template="{{ text }}",
        answer_template="{{ label }}",
        labels=("bad", "good"),
    ),
    (),
)


def rendered(task: Task, rows: Iterable[LocatedRow | UserError]) -> list[Query | UserError]:
    found: list[Query | UserError] = []
    for row in rows:
        try:
            found.append(row if isinstance(row, UserError) else checked_query(row.columns, task))
        except UserError as error:
            found.append(error)
    return found


class JobsInMemory:
    """What a database does with jobs; a result can be stored once."""

    def __init__(self) -> None:
        self.records: dict[str, JobRecord] = {}
        self.rows: dict[str, list[Mapping[str, Any]]] = {}
        self.stored: dict[str, dict[int, Mapping[str, Any]]] = {}
        self.num_failures = 0
        self.kept_days: float | None = None

    def add(
        self,
        job_id: str,
        rows: Sequence[Mapping[str, Any] | UserError],
        kind: JobKind = "predict",
        owner: str = "local",
    ) -> None:
        key, now = VersionKey(f"tsk_of_{job_id}", 1), datetime.now(UTC)
        self.records[job_id] = JobRecord(job_id, owner, kind, key, {}, "waiting", len(rows), now)
        located = [row if isinstance(row, UserError) else LocatedRow(dict(row), "rows", 1) for row in rows]
        self.rows[job_id], self.stored[job_id] = [stored_row(row) for row in located], {}

    def unfinished(self) -> list[JobRecord]:
        return [job for job in self.records.values() if job.state in ("waiting", "running")]

    def start(self, job_id: str) -> None:
        self.records[job_id] = replace(self.records[job_id], state="running")

    def waiting_rows(self, job_id: str, limit: int) -> list[tuple[int, Mapping[str, Any]]]:
        waiting = [(n, row) for n, row in enumerate(self.rows[job_id], start=1) if n not in self.stored[job_id]]
        return waiting[:limit]

    def put_results(self, job_id: str, results: Sequence[tuple[int, Mapping[str, Any]]], num_problems: int) -> None:
        if self.num_failures:
            self.num_failures -= 1
            raise MachineError("The disk is full.")
        job = self.records[job_id]
        if job.state not in ("waiting", "running"):
            return
        for number, result in results:
            assert number not in self.stored[job_id], f"row {number} is stored twice"
            self.stored[job_id][number] = result
        done, problems = len(self.stored[job_id]), job.num_problems + num_problems
        self.records[job_id] = replace(job, state="running", num_done=done, num_problems=problems)

    def results(self, job_id: str, after: int, limit: int) -> list[tuple[int, Mapping[str, Any]]]:
        return sorted((n, one) for n, one in self.stored[job_id].items() if n > after)[:limit]

    def finish(
        self,
        job_id: str,
        state: JobState,
        problem: Mapping[str, Any] | None = None,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        self.records[job_id] = replace(self.records[job_id], state=state, problem=problem, summary=summary)

    def forget_older_than(self, days: float) -> None:
        self.kept_days = days

    def cancel(self, job_id: str) -> None:
        self.finish(job_id, "cancelled")


@dataclass
class Waiting:
    """A ticket of the worker below."""

    future: Future[list[Prediction]] = field(default_factory=Future)

    def cancel(self) -> None:
        self.future.cancel()


class Echo:
    """A worker that answers every row with its text, or does what a test wants."""

    def __init__(self) -> None:
        self.passes: list[tuple[VersionKey, list[str | None], AnswerOptions]] = []
        self.first_numbers: list[int] = []
        self.behaviour: Callable[[Waiting], bool] = lambda ticket: False
        self.tickets: list[Waiting] = []

    def predict(
        self,
        key: VersionKey,
        rows: Sequence[Any],
        options: AnswerOptions,
        num_retrieved: int = 0,
        *,
        first_number: int = 1,
    ) -> Waiting:
        texts = [None if isinstance(row, UserError) else row.text for row in rows]
        self.passes.append((key, texts, options))
        self.first_numbers.append(first_number)
        ticket = Waiting()
        self.tickets.append(ticket)
        if not self.behaviour(ticket):
            ticket.future.set_result([self._answer(row) for row in rows])
        return ticket

    @staticmethod
    def _answer(row: Query | UserError) -> Prediction:
        if isinstance(row, UserError):
            return Prediction("", float("nan"), problem=row)
        return Prediction(row.text, -0.5, num_shots=3)


def plan(job: JobRecord) -> JobPlan:
    return JobPlan(TASK, {"scores": "best"})


@contextmanager
def running(jobs: JobsInMemory, worker: Echo, how: Callable[[JobRecord], JobPlan] = plan) -> Iterator[JobRunner]:
    runner = JobRunner(jobs, worker, how, rendered, kept_days=30, rows_per_portion=4, busy_seconds=0.01)
    runner.start()
    runner.start()  # of no effect
    (thread,) = (one for one in threading.enumerate() if one.name == "jobs")
    try:
        yield runner
    finally:
        runner.stop(60)
        assert not thread.is_alive()


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def is_over(jobs: JobsInMemory, job_id: str) -> Callable[[], bool]:
    return lambda: jobs.records[job_id].state not in ("waiting", "running")


def texts(number: int) -> list[Mapping[str, Any]]:
    return [{"text": f"row {n}"} for n in range(1, number + 1)]


def test_every_row_has_its_result_and_bad_rows_their_problem() -> None:
    jobs, worker = JobsInMemory(), Echo()
    bad = UserError("broken_json", "broken JSON", found="'{'", file="rows", row=90)
    jobs.add("a", [*texts(5), bad, {"text": "last"}])
    with running(jobs, worker):
        wait_until(is_over(jobs, "a"))
    job, results = jobs.records["a"], jobs.stored["a"]
    assert (job.state, job.num_done, job.num_problems) == ("done", 7, 1)
    assert [results[n]["answer"] for n in range(1, 8)] == [*(f"row {n}" for n in range(1, 6)), None, "last"]
    assert results[6]["problem"] == {
        "row": 6,
        "code": "broken_json",
        "detail": "Query 6: broken JSON; found '{'.",
    }


def test_a_job_that_comes_while_another_runs_takes_turns_with_it() -> None:
    jobs, worker = JobsInMemory(), Echo()
    jobs.add("long", texts(40))
    jobs.add("short", texts(2))
    with running(jobs, worker):
        wait_until(is_over(jobs, "long"))
    order = [key.task_id for key, _, _ in worker.passes]
    assert order[:3] == ["tsk_of_long", "tsk_of_short", "tsk_of_long"]


def test_an_owner_with_many_jobs_takes_no_more_turns_than_one_with_a_single_job() -> None:
    jobs, worker = JobsInMemory(), Echo()
    for number in range(3):
        jobs.add(f"many{number}", texts(8), owner="ann")
    jobs.add("one", texts(12), owner="bob")
    with running(jobs, worker):
        wait_until(is_over(jobs, "many2"))
    order = [key.task_id.removeprefix("tsk_of_") for key, _, _ in worker.passes]
    assert order == ["many0", "one", "many1", "one", "many2", "one", "many0", "many1", "many2"]


def test_a_new_job_is_begun_when_the_runner_is_told() -> None:
    jobs, worker = JobsInMemory(), Echo()
    with running(jobs, worker) as runner:
        time.sleep(0.05)
        jobs.add("a", texts(1))
        runner.wake()
        wait_until(is_over(jobs, "a"))


def test_the_next_process_resumes_where_the_last_one_ended() -> None:
    jobs, worker = JobsInMemory(), Echo()
    jobs.add("a", texts(10))
    reached = threading.Event()

    def hang_in_the_second_portion(ticket: Waiting) -> bool:
        if len(worker.passes) == 2:
            reached.set()
        return len(worker.passes) >= 2

    worker.behaviour = hang_in_the_second_portion
    with running(jobs, worker):
        assert reached.wait(60)
    assert worker.tickets[1].future.cancelled()
    assert sorted(jobs.stored["a"]) == [1, 2, 3, 4]
    second = Echo()
    with running(jobs, second):
        wait_until(is_over(jobs, "a"))
    assert is_over(jobs, "a")()
    assert [text for _, rows, _ in second.passes for text in rows] == [f"row {n}" for n in range(5, 11)]
    assert jobs.records["a"].state == "done"


def test_a_full_queue_and_a_full_disk_are_waited_out() -> None:
    jobs, worker = JobsInMemory(), Echo()
    jobs.add("a", texts(6))
    jobs.num_failures = 2
    num_refused = 0

    def refuse_twice(ticket: Waiting) -> bool:
        nonlocal num_refused
        num_refused += 1
        if num_refused <= 2:
            raise UserError("queue_full", "the queue is full")
        return False

    worker.behaviour = refuse_twice
    with running(jobs, worker):
        wait_until(is_over(jobs, "a"))
    assert (jobs.records["a"].state, len(jobs.stored["a"])) == ("done", 6)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("version_failed", "a label is empty", file="/secret/path", row=3), "version_failed"),
        (MachineError("The memory is full."), "machine_failed"),
        (RuntimeError("text of a row"), "machine_failed"),
    ],
)
def test_an_error_of_a_pass_fails_the_job_with_its_reason_and_no_other(error: Exception, code: str) -> None:
    jobs, worker = JobsInMemory(), Echo()
    jobs.add("bad", texts(2))
    jobs.add("good", texts(2))

    def fail_first(ticket: Waiting) -> bool:
        if worker.passes[-1][0].task_id == "tsk_of_bad":
            ticket.future.set_exception(error)
            return True
        return False

    worker.behaviour = fail_first
    with running(jobs, worker):
        wait_until(is_over(jobs, "good"))
        wait_until(is_over(jobs, "bad"))
    problem = jobs.records["bad"].problem
    assert problem is not None
    assert (jobs.records["bad"].state, problem["code"]) == ("failed", code)
    assert "/secret" not in str(problem)
    assert "text of a row" not in str(problem)
    assert jobs.records["good"].state == "done"


def test_a_mistake_of_the_server_fails_its_job_once_and_no_other() -> None:
    jobs, worker = JobsInMemory(), Echo()
    jobs.add("bad", texts(2), owner="ann")
    jobs.add("good", texts(2), owner="bob")
    planned: list[str] = []

    def broken_plan(job: JobRecord) -> JobPlan:
        planned.append(job.id)
        if job.id == "bad":
            raise KeyError("text of a row")
        return plan(job)

    with running(jobs, worker, broken_plan):
        wait_until(is_over(jobs, "good"))
        wait_until(is_over(jobs, "bad"))
    assert jobs.records["bad"].problem == {"code": "server_error", "detail": "the server failed."}
    assert jobs.records["good"].state == "done"
    assert planned.count("bad") == 1


def test_a_version_that_cannot_be_planned_for_fails_the_job() -> None:
    jobs, worker = JobsInMemory(), Echo()
    jobs.add("a", texts(2))

    def no_plan(job: JobRecord) -> JobPlan:
        raise UserError("unknown_version", "there is no such version")

    with running(jobs, worker, no_plan):
        wait_until(is_over(jobs, "a"))
    assert (jobs.records["a"].state, worker.passes) == ("failed", [])


def test_the_rows_of_a_cancelled_job_leave_the_queue_and_no_more_are_answered() -> None:
    jobs, worker = JobsInMemory(), Echo()
    jobs.add("a", texts(12))
    worker.behaviour = lambda ticket: len(worker.passes) >= 2
    with running(jobs, worker) as runner:
        wait_until(lambda: len(worker.passes) == 2)
        jobs.cancel("a")
        runner.cancelled("a")
        wait_until(worker.tickets[1].future.cancelled)
        time.sleep(0.05)
    assert (jobs.records["a"].state, sorted(jobs.stored["a"]), len(worker.passes)) == ("cancelled", [1, 2, 3, 4], 2)


def test_an_evaluation_ends_with_its_summary_over_all_portions() -> None:
    jobs, worker = JobsInMemory(), Echo()
    rows: list[Mapping[str, Any]] = [{"text": "good", "label": ("good", "bad")[n % 2]} for n in range(10)]
    jobs.add("a", [*rows, {"text": "good"}], "evaluate")
    with running(jobs, worker):
        wait_until(is_over(jobs, "a"))
    found = jobs.records["a"].summary
    assert found is not None
    assert (found["accuracy"], found["num_scored"], found["num_problems"], found["num_errors"]) == (0.5, 10, 1, 5)
    assert jobs.stored["a"][2]["right"] is False
    assert jobs.stored["a"][11]["problem"]["row"] == 11
    assert worker.passes[-1][1] == ["good", "good", None]


def test_portions_say_where_they_begin_so_that_sampled_answers_do_not_depend_on_them() -> None:
    jobs, worker = JobsInMemory(), Echo()
    jobs.add("a", texts(9))
    with running(jobs, worker):
        wait_until(is_over(jobs, "a"))
    assert worker.first_numbers == [1, 5, 9]


def test_jobs_that_ended_long_ago_are_deleted_at_the_start() -> None:
    jobs, worker = JobsInMemory(), Echo()
    with running(jobs, worker):
        wait_until(lambda: jobs.kept_days is not None)
    assert jobs.kept_days == 30


def test_a_row_that_is_none_is_stored_with_its_reason() -> None:
    error = UserError("broken_json", "broken JSON", expected="one object", remedy="Fix it.", file="rows", row=12)
    stored = stored_row(error)
    again = row_of(stored, 3)
    assert isinstance(again, UserError)
    assert (again.code, again.what, again.expected, again.remedy, again.row) == (
        "broken_json",
        "broken JSON",
        "one object",
        "Fix it.",
        3,
    )
    row = LocatedRow({"problem": "a column of this name"}, "rows", 4)
    assert row_of(stored_row(row), 4) == row
