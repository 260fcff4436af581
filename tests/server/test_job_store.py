"""The job store on SQLite and on PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from manyicl.errors import UserError
from manyicl.server.database import Database
from manyicl.server.job_store import ROWS_AT_ONCE, JobStore
from manyicl.server.records import Idempotency, TaskSettings, VersionKey
from manyicl.server.task_store import TaskStore

ROWS: list[dict[str, Any]] = [{"text": f"row {number}"} for number in range(1, 6)]


@pytest.fixture(name="key")
def _key(database: Database) -> VersionKey:
    return TaskStore(database).create("ann", "tickets", {}, TaskSettings(), ROWS, None).version.key


@pytest.fixture(name="store")
def _store(database: Database) -> JobStore:
    return JobStore(database)


def results(*numbers: int) -> list[tuple[int, dict[str, Any]]]:
    return [(number, {"answer": f"answer {number}"}) for number in numbers]


def test_a_job_reads_as_it_was_written(store: JobStore, key: VersionKey) -> None:
    job, was_there = store.create("ann", "predict", key, {"scores": "all"}, iter(ROWS))
    assert not was_there
    assert store.get("ann", job.id) == job
    assert (job.key, job.kind, job.options, job.state) == (key, "predict", {"scores": "all"}, "waiting")
    assert (job.num_rows, job.num_done, job.num_problems, job.finished_at) == (5, 0, 0, None)
    assert store.waiting_rows(job.id, 10) == list(enumerate(ROWS, 1))
    assert store.unfinished() == [job]


def test_a_job_is_done_in_portions_and_resumes_with_the_next_row(store: JobStore, key: VersionKey) -> None:
    job_id = store.create("ann", "predict", key, {}, ROWS)[0].id
    assert store.start(job_id)
    assert store.put_results(job_id, results(1, 2), 1)
    job = store.get("ann", job_id)
    assert (job.state, job.num_done, job.num_problems) == ("running", 2, 1)
    assert [number for number, _ in store.waiting_rows(job_id, 2)] == [3, 4]
    assert store.put_results(job_id, results(4), 0)
    # Row 3 has no result yet: who reads on after row 4 would miss it.
    assert store.results(job_id, 0, 10) == results(1, 2)
    assert store.results(job_id, 1, 1) == results(2)
    assert store.results(job_id, 2**31, 1) == store.results(job_id, 2**70, 1) == []
    assert store.put_results(job_id, results(3, 5), 0)
    assert store.results(job_id, 2, 10) == results(3, 4, 5)
    assert store.finish(job_id, "done")
    job = store.get("ann", job_id)
    assert (job.state, job.num_done, job.finished_at is not None) == ("done", 5, True)
    assert store.unfinished() == []
    assert not store.finish(job_id, "failed")
    assert not store.start(job_id)


@pytest.mark.parametrize("numbers", [(3, 1), (3, 9), (3, 3)])
def test_no_row_gets_a_second_result(store: JobStore, key: VersionKey, numbers: tuple[int, ...]) -> None:
    job_id = store.create("ann", "predict", key, {}, ROWS)[0].id
    store.put_results(job_id, results(1, 2), 0)
    with pytest.raises(ValueError, match="has a result already, or does not exist"):
        store.put_results(job_id, results(*numbers), 0)
    assert store.get("ann", job_id).num_done == 2
    assert [number for number, _ in store.waiting_rows(job_id, 10)] == [3, 4, 5]


def test_a_cancelled_job_takes_no_results(store: JobStore, key: VersionKey) -> None:
    job_id = store.create("ann", "predict", key, {}, ROWS)[0].id
    store.put_results(job_id, results(1), 0)
    cancelled = store.cancel("ann", job_id)
    assert cancelled.state == "cancelled"
    assert not store.put_results(job_id, results(2), 0)
    assert not store.finish(job_id, "done")
    assert store.cancel("ann", job_id) == cancelled
    assert store.results(job_id, 0, 10) == results(1)


def test_a_failed_job_says_why(store: JobStore, key: VersionKey) -> None:
    job_id = store.create("ann", "evaluate", key, {}, ROWS)[0].id
    assert store.finish(job_id, "failed", {"code": "version_failed"})
    job = store.get("ann", job_id)
    assert (job.problem, job.summary) == ({"code": "version_failed"}, None)


def test_an_evaluation_keeps_its_scores(store: JobStore, key: VersionKey) -> None:
    job_id = store.create("ann", "evaluate", key, {}, ROWS)[0].id
    assert store.finish(job_id, "done", None, {"accuracy": 0.5})
    job = store.get("ann", job_id)
    assert (job.problem, job.summary) == (None, {"accuracy": 0.5})


def test_another_owner_s_job_does_not_exist(store: JobStore, key: VersionKey) -> None:
    job_id = store.create("ann", "predict", key, {}, ROWS)[0].id
    for use in (store.get, store.cancel, store.delete):
        for owner, name in (("bob", job_id), ("ann", "\0"), ("ann", "\ud800"), ("ann", "job_none")):
            with pytest.raises(UserError) as error:
                use(owner, name)
            assert error.value.code == "unknown_job"
    assert store.page("bob", 10) == ([], None)
    assert store.get("ann", job_id).state == "waiting"


def test_the_same_request_sent_again_makes_one_job(store: JobStore, key: VersionKey, database: Database) -> None:
    idempotency = Idempotency("one", "a request")
    job, _ = store.create("ann", "predict", key, {}, ROWS, idempotency)
    assert store.create("ann", "predict", key, {}, ROWS, idempotency) == (job, True)
    assert store.replayed("ann", idempotency) == job
    assert store.replayed("bob", idempotency) is None
    with pytest.raises(UserError) as error:
        store.create("ann", "predict", key, {}, ROWS, Idempotency("one", "another"))
    assert error.value.code == "idempotency_key_reused"
    with pytest.raises(UserError) as error:  # a task is not made in the place of a job
        TaskStore(database).create("ann", "b", {}, TaskSettings(), ROWS, None, idempotency)
    assert error.value.code == "idempotency_key_reused"
    store.delete("ann", job.id)
    with pytest.raises(UserError) as error:
        store.create("ann", "predict", key, {}, ROWS, idempotency)
    assert error.value.code == "unknown_job"


def test_a_job_of_a_version_that_is_not_there_is_refused(store: JobStore, key: VersionKey) -> None:
    for version in (0, 2, 2**31, 2**70):
        with pytest.raises(UserError) as error:
            store.create("ann", "predict", VersionKey(key.task_id, version), {}, ROWS)
        assert error.value.code == "unknown_version"


def test_rows_that_cannot_be_read_to_the_end_make_no_job(store: JobStore, key: VersionKey) -> None:
    def broken() -> Any:
        yield from [{"text": "x"}] * (ROWS_AT_ONCE + 1)
        raise UserError("broken", "line 1,002 is broken")

    with pytest.raises(UserError):
        store.create("ann", "predict", key, {}, broken())
    assert store.page("ann", 10) == ([], None)


def test_a_long_job_keeps_every_row(store: JobStore, key: VersionKey) -> None:
    rows = ({"text": str(number)} for number in range(2 * ROWS_AT_ONCE + 3))
    job, _ = store.create("ann", "predict", key, {}, rows)
    assert job.num_rows == 2 * ROWS_AT_ONCE + 3
    assert len(store.waiting_rows(job.id, 10_000)) == job.num_rows


def test_jobs_go_with_their_task(store: JobStore, key: VersionKey, database: Database) -> None:
    job_id = store.create("ann", "predict", key, {}, ROWS)[0].id
    TaskStore(database).delete("ann", "tickets")
    assert store.unfinished() == []
    assert store.waiting_rows(job_id, 10) == []
    assert not store.put_results(job_id, results(1), 0)
    assert not store.finish(job_id, "done")


def test_old_jobs_are_forgotten_once_they_ended(database: Database, key: VersionKey) -> None:
    now = datetime(2026, 11, 27, tzinfo=UTC)
    store = JobStore(database, lambda: now)
    ended = store.create("ann", "predict", key, {}, ROWS)[0].id
    store.finish(ended, "done")
    unfinished = store.create("ann", "predict", key, {}, ROWS)[0].id
    now += timedelta(days=6)
    assert store.forget_older_than(7) == 0
    now += timedelta(days=2)
    assert store.forget_older_than(7) == 1
    page, cursor = store.page("ann", 10)
    assert ([job.id for job in page], cursor) == ([unfinished], None)
    assert store.waiting_rows(ended, 10) == []
