"""SIGKILL at any moment leaves every acknowledged write present once, and any other whole or absent."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from manyicl.server.database import Database
from manyicl.server.job_store import JobStore
from manyicl.server.records import TaskSettings
from manyicl.server.task_store import TaskStore
from tests.server.simple_store import SimpleStore, apply, random_operations, state_of
from tests.server.writers import PORTION, killed_at_random, write_results, write_tasks


def kill_and_compare(data: Path, url: str | None, num_kills: int, seed: int) -> int:
    """Kill a writer again and again, compare with the obvious store after each, and return how often one write more
    than was acknowledged was there."""
    simple, operations, num_applied, num_unacknowledged = SimpleStore(), random_operations(seed), 0, 0
    rng = random.Random(seed)
    for _ in range(num_kills):
        last = killed_at_random(write_tasks, (data, url, seed, num_applied), rng)
        while last is not None and num_applied <= last:
            simple.apply(next(operations))
            num_applied += 1
        database = Database.open(data, url)
        store = TaskStore(database)
        interrupted, found = next(operations), state_of(store)
        is_absent = found == simple.state()
        simple.apply(interrupted)
        assert is_absent or found == simple.state()
        # The client got no answer, and sends it again with the same key; what has no key it looks at first.
        if is_absent or interrupted.kind not in ("settings", "delete"):
            written = apply(store, interrupted, f"operation {num_applied}")
            assert written is None or written.replayed is not is_absent
        assert state_of(store) == simple.state()
        num_applied += 1
        num_unacknowledged += not is_absent
        database.close()
    assert num_applied > 3 * num_kills  # otherwise nothing was tested
    return num_unacknowledged


@pytest.mark.server
def test_twenty_kills_lose_nothing(tmp_path: Path, database_url: str | None) -> None:
    kill_and_compare(tmp_path, database_url, 20, seed=0)


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    assert kill_and_compare(tmp_path, None, 200, seed=1) > 0  # kills between a commit and its acknowledgement


def test_kills_leave_no_row_of_a_job_with_two_results_or_none(tmp_path: Path) -> None:
    num_rows, last = 100 * PORTION, 0
    database = Database.open(tmp_path)
    rows = [{"text": f"row {number}"} for number in range(1, num_rows + 1)]
    key = TaskStore(database).create("ann", "tickets", {}, TaskSettings(), rows[:1], None).version.key
    job_id = JobStore(database).create("ann", "predict", key, {}, rows)[0].id
    database.close()
    rng = random.Random(0)
    for _ in range(5):
        last = killed_at_random(write_results, (tmp_path, None, job_id), rng) or last
        database = Database.open(tmp_path)
        store = JobStore(database)
        job, waiting = store.get("ann", job_id), store.waiting_rows(job_id, num_rows)
        assert job.num_done in (last, last + PORTION)
        assert [number for number, _ in waiting] == list(range(job.num_done + 1, num_rows + 1))
        answers = [(number, result["answer"]) for number, result in store.results(job_id, 0, num_rows)]
        assert answers == [(number, f"row {number}") for number in range(1, job.num_done + 1)]
        assert job.num_problems == job.num_done // PORTION
        last = job.num_done
        database.close()
    assert last > 0
