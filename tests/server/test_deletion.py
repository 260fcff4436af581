"""A deleted task leaves no text in the files of SQLite."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyicl.server import database as module
from manyicl.server.database import Database
from manyicl.server.job_store import JobStore
from manyicl.server.records import Idempotency, TaskSettings
from manyicl.server.task_store import TaskStore

MARK = "zebra"


def files_with(data: Path, text: str) -> list[str]:
    return sorted(path.name for path in data.rglob("*") if path.is_file() and text.encode() in path.read_bytes())


def make_task(database: Database, name: str, mark: str) -> None:
    """Make a task that has its mark in every text, in pages of all kinds: short and long rows, versions, a job."""
    tasks, jobs = TaskStore(database), JobStore(database)
    rows = [{"text": f"{mark} {number} " * (1 + number % 7 * 200), "label": f"{mark} label"} for number in range(30)]
    labels = (f"{mark} label", "other")
    keys = {"query": f"{mark} {{{{ text }}}}"}
    idempotency = Idempotency(f"key {len(tasks.page('ann', 10)[0])}", "hash")
    key = tasks.create("ann", name, keys, TaskSettings(), rows, labels, idempotency).version.key
    tasks.correct("ann", name, 3, {"text": f"{mark} corrected", "label": f"{mark} label"}, labels)
    tasks.remove("ann", name, [5, 6, 7], labels)
    tasks.add("ann", name, rows, labels)
    tasks.restore("ann", name, 1, labels)
    tasks.set_failed(key, {"code": "too_long", "what": f"{mark} is too long"})
    job_id = jobs.create("ann", "predict", key, {"note": mark}, rows)[0].id
    jobs.put_results(job_id, [(number, {"answer": f"{mark} answer"}) for number in range(1, 10)], 0)


def test_no_text_of_a_deleted_task_is_left_in_the_data_folder(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    tasks = TaskStore(database)
    for number in range(6):  # between each other, so that pages hold texts of several
        make_task(database, f"{MARK if number % 2 else 'kept'} {number}", MARK if number % 2 else "horse")
    assert files_with(tmp_path, MARK)
    for number in (1, 3, 5):
        tasks.delete("ann", f"{MARK} {number}")
    assert files_with(tmp_path, MARK) == []
    assert files_with(tmp_path, "horse") == [module.FILE_NAME]
    database.close()
    assert files_with(tmp_path, MARK) == []


def test_no_text_of_a_deleted_job_is_left(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    jobs = JobStore(database)
    key = TaskStore(database).create("ann", "tickets", {}, TaskSettings(), [{"text": "x"}], None).version.key
    job_id = jobs.create("ann", "predict", key, {}, [{"text": f"{MARK} {number}"} for number in range(50)])[0].id
    assert files_with(tmp_path, MARK)
    jobs.delete("ann", job_id)
    assert files_with(tmp_path, MARK) == []
    database.close()


@pytest.mark.parametrize("is_killed", [False, True])
def test_where_a_reader_is_in_the_way_texts_go_with_the_next_write_or_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_killed: bool
) -> None:
    monkeypatch.setattr(module, "TRUNCATE_WAIT_SECONDS", 0.05)
    database = Database.open(tmp_path)
    tasks = TaskStore(database)
    make_task(database, MARK, MARK)
    with database.reading() as reader:
        reader.exec_driver_sql("SELECT count(*) FROM tasks")
        tasks.delete("ann", MARK)
        assert files_with(tmp_path, MARK)  # the reader still sees them
    if is_killed:
        database = Database.open(tmp_path)
    else:
        tasks.create("ann", "next", {}, TaskSettings(), [{"text": "x"}], None)
    assert files_with(tmp_path, MARK) == []
    database.close()
