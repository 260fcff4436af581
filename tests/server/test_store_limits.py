"""What the database keeps is bounded: old versions go, with the texts that only they have; other writes are refused."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from manyicl.errors import UserError
from manyicl.server import tables
from manyicl.server.database import Database
from manyicl.server.job_store import JobStore
from manyicl.server.records import Idempotency, StoreLimits, TaskSettings, VersionKey
from manyicl.server.settings import ServerSettings
from manyicl.server.task_store import TaskStore
from manyicl.server.work import Compiled
from tests.server.fakes import MODEL, client_of, echo_task, fake_services, fake_worker, mood_task
from tests.server.simple_store import Operation, SimpleStore, apply

READY: dict[str, Any] = {"num_tokens": 40, "num_shots": 2, "num_dropped": 0, "answers": (), "model": MODEL}


def rows_of(*texts: str) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts]


def task_of(database: Database, **limits: int) -> tuple[TaskStore, str]:
    store = TaskStore(database, limits=StoreLimits(**limits))
    return store, store.create("ann", "tickets", {}, TaskSettings(), rows_of("one", "two"), None).task.id


def numbers_of(store: TaskStore, task_id: str) -> list[int]:
    return [version.key.version for version in store.versions("ann", task_id, 1000)[0]]


def refused(error: pytest.ExceptionInfo[UserError]) -> str:
    return error.value.code


# --- Versions


@pytest.mark.parametrize("seed", [0, 1])
def test_after_random_writes_the_versions_that_are_kept_are_those_of_the_obvious_store(
    database: Database, seed: int
) -> None:
    rng, most = random.Random(seed), 4
    store, jobs, simple = TaskStore(database, limits=StoreLimits(versions=most)), JobStore(database), SimpleStore()
    kept, ready, with_jobs = set[int](), 0, dict[int, str]()
    task_id, versions = "", list[Any]()
    for step in range(60):
        numbers = [row[0] for row in versions[-1]] if versions else []
        kind = rng.choice(["add", "correct", "remove", "restore", "correct"]) if versions else "create"
        kind = "add" if kind in ("correct", "remove") and not numbers else kind
        number = rng.choice(sorted(kept)) if kind == "restore" else rng.choice(numbers or [0])
        operation = Operation(
            kind, "ann", "tickets", number, rows_of(*(f"{step} {n}" for n in range(rng.randint(1, 3))))
        )
        written = apply(store, operation)
        simple.apply(operation)
        assert written is not None
        task_id, newest = written.task.id, written.version.key.version
        kept = {one for one in kept | {newest} if one > newest - most or one == ready or one in with_jobs}
        _, versions = simple.tasks["ann", "tickets"]
        assert numbers_of(store, task_id) == sorted(kept)
        for version in kept:
            found = store.demonstrations(VersionKey(task_id, version))
            assert [(row.number, row.added_in, row.place, row.columns) for row in found] == versions[version - 1]
        if rng.random() < 0.2:
            ready = max(kept)
            assert store.set_ready(VersionKey(task_id, ready), **READY)
        if rng.random() < 0.2:
            version = rng.choice(sorted(kept - with_jobs.keys() or {newest}))
            with_jobs[version] = jobs.create("ann", "predict", VersionKey(task_id, version), {}, rows_of("x"))[0].id
        if with_jobs and rng.random() < 0.3:
            version = rng.choice(sorted(with_jobs))
            jobs.delete("ann", with_jobs.pop(version))
        assert store.get("ann", task_id).ready == (ready or None)
    with database.reading() as connection:
        columns = tables.demonstrations.c
        for start, end in connection.execute(select(columns.from_version, columns.until_version)):
            assert end is None or any(start <= version < end for version in kept | with_jobs.keys())


def test_a_version_that_is_no_longer_kept_says_so_and_one_that_never_was_does_not(database: Database) -> None:
    store, task_id = task_of(database, versions=2)
    for text in ("three", "four", "five"):
        store.correct("ann", task_id, 1, {"text": text}, None)
    assert numbers_of(store, task_id) == [3, 4]
    for use in (
        lambda number: store.version(VersionKey(task_id, number)),
        lambda number: store.demonstrations(VersionKey(task_id, number)),
        lambda number: store.source(VersionKey(task_id, number)),
        lambda number: store.restore("ann", task_id, number, None),
        lambda number: JobStore(database).create("ann", "predict", VersionKey(task_id, number), {}, []),
    ):
        for number, words in ((2, "version 2 of the task is no longer kept"), (5, "the task has no version 5")):
            with pytest.raises(UserError, match=words) as error:
                use(number)
            assert refused(error) == "unknown_version"
            assert (error.value.remedy is not None) is (number == 2)


def test_texts_of_dropped_versions_are_no_longer_in_the_database(tmp_path: Path) -> None:
    mark, database = "marmalade", Database.open(tmp_path)
    store, task_id = task_of(database, versions=2)
    store.correct("ann", task_id, 1, {"text": f"{mark} " * 500}, None)
    store.remove("ann", task_id, [1], None)
    store.add("ann", task_id, rows_of("three"), None)
    store.add("ann", task_id, rows_of("four"), None)
    with database.reading() as connection:
        found = connection.execute(select(tables.demonstrations.c.columns)).scalars().all()
    assert [row["text"] for row in found] == ["two", "three", "four"]
    database.close()  # writes what is in the log to the file
    assert not any(mark.encode() in file.read_bytes() for file in tmp_path.iterdir() if file.is_file())


def test_a_lower_limit_takes_effect_with_the_next_write(database: Database) -> None:
    store, task_id = task_of(database)
    for number in range(8):
        store.correct("ann", task_id, 1, {"text": str(number)}, None)
    assert numbers_of(store, task_id) == list(range(1, 10))
    TaskStore(database, limits=StoreLimits(versions=3)).correct("ann", task_id, 1, {"text": "last"}, None)
    assert numbers_of(store, task_id) == [8, 9, 10]


def test_what_a_request_made_that_is_sent_again_after_its_version_was_dropped_is_not_made_again(
    database: Database,
) -> None:
    store, task_id = task_of(database, versions=2)
    store.add("ann", task_id, rows_of("three"), None, None, Idempotency("one", "a request"))
    for text in ("four", "five"):
        store.correct("ann", task_id, 1, {"text": text}, None)
    with pytest.raises(UserError, match="version 2 of the task is no longer kept"):
        store.add("ann", task_id, rows_of("three"), None, None, Idempotency("one", "a request"))
    assert store.get("ann", task_id).newest.num_demonstrations == 3


def test_a_version_that_is_dropped_while_it_is_compiled_is_not_taken_for_a_deleted_task(tmp_path: Path) -> None:
    with fake_services(tmp_path / "data", max_versions=2) as services, client_of(services) as client:
        fake_worker(services).compiles.clear()
        key = VersionKey(client.post("/v1/tasks", json=mood_task()).json()["id"], 1)
        for text in ("a", "b", "c"):
            client.patch("/v1/tasks/mood/demonstrations/1", json={"text": text, "label": "good"})
        answer = client.get("/v1/tasks/mood/demonstrations", params={"version": 1})
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_version")
        services.service.on_ready(key, Compiled(40, 2, 0, (), MODEL))
        assert fake_worker(services).forgotten == []
        client.delete("/v1/tasks/mood")
        fake_worker(services).forgotten.clear()
        services.service.on_ready(key, Compiled(40, 2, 0, (), MODEL))
        assert fake_worker(services).forgotten == [key.task_id]


# --- Tasks, jobs, keys of requests


def test_an_owner_has_so_many_tasks_and_another_owner_as_many(database: Database) -> None:
    store, task_id = task_of(database, tasks=2)
    store.create("ann", "second", {}, TaskSettings(), rows_of("x"), None)
    with pytest.raises(UserError) as error:
        store.create("ann", "third", {}, TaskSettings(), rows_of("x"), None)
    assert refused(error) == "too_many_tasks"
    store.create("bob", "third", {}, TaskSettings(), rows_of("x"), None)
    store.delete("ann", task_id)
    store.create("ann", "third", {}, TaskSettings(), rows_of("x"), None)


def test_an_owner_has_so_many_pinned_tasks(database: Database) -> None:
    store, task_id = task_of(database, pinned=1)
    pinned = TaskSettings(pinned=True)
    for _ in range(2):  # to pin it again changes nothing
        store.update("ann", task_id, settings=pinned)
    store.create("ann", "second", {}, TaskSettings(), rows_of("x"), None)
    for write in (
        lambda: store.create("ann", "third", {}, pinned, rows_of("x"), None),
        lambda: store.update("ann", "second", settings=pinned),
    ):
        with pytest.raises(UserError) as error:
            write()
        assert refused(error) == "too_many_pinned_tasks"
    assert [(task.name, task.settings.pinned) for task in store.page("ann", 10)[0]] == [
        ("tickets", True),
        ("second", False),
    ]
    store.create("bob", "third", {}, pinned, rows_of("x"), None)
    store.update("ann", task_id, settings=TaskSettings())
    store.update("ann", "second", settings=pinned)


def test_an_owner_has_so_many_jobs_and_so_many_rows_of_jobs(database: Database) -> None:
    _, task_id = task_of(database)
    key = VersionKey(task_id, 1)
    for limits in (StoreLimits(jobs=2), StoreLimits(job_rows=5)):
        store = JobStore(database, limits=limits)
        first = store.create("ann", "predict", key, {}, rows_of("a", "b"))[0]
        second = store.create("ann", "predict", key, {}, rows_of("c", "d"))[0]
        store.finish(first.id, "done")
        with pytest.raises(UserError) as error:
            store.create("ann", "predict", key, {}, rows_of("e", "f"), Idempotency("one", "a request"))
        assert refused(error) == "too_many_kept_jobs"
        assert store.page("ann", 10)[0] == [store.get("ann", first.id), second]
        with database.reading() as connection:
            assert len(connection.execute(select(tables.job_rows.c.job_id)).all()) == 4
        store.delete("ann", first.id)
        third, was_there = store.create("ann", "predict", key, {}, rows_of("e", "f"), Idempotency("one", "a request"))
        assert not was_there
        store.delete("ann", second.id)
        store.delete("ann", third.id)
        with database.writing() as connection:
            connection.execute(tables.idempotency_keys.delete())


def test_so_many_requests_are_remembered_and_more_are_not_carried_out(database: Database) -> None:
    now = [datetime(2026, 11, 27, tzinfo=UTC)]
    limits = StoreLimits(idempotency_keys=2)
    store, jobs = TaskStore(database, lambda: now[0], limits), JobStore(database, lambda: now[0], limits)

    def create(owner: str, name: str) -> VersionKey:
        written = store.create(owner, name, {}, TaskSettings(), rows_of("x"), None, Idempotency(name, "a request"))
        return written.version.key

    key = create("ann", "first")
    jobs.create("ann", "predict", key, {}, rows_of("x"), Idempotency("job", "a request"))
    for write in (
        lambda: create("ann", "second"),
        lambda: store.add("ann", "first", rows_of("y"), None, None, Idempotency("add", "a request")),
        lambda: jobs.create("ann", "predict", key, {}, rows_of("y"), Idempotency("another", "a request")),
    ):
        with pytest.raises(UserError) as error:
            write()
        assert refused(error) == "too_many_idempotency_keys"
    assert create("ann", "first") == key  # sent again
    assert len(jobs.page("ann", 10)[0]) == len(store.page("ann", 10)[0]) == store.get("ann", "first").revision == 1
    create("bob", "second")
    now[0] += timedelta(hours=25)
    create("ann", "second")


def test_limits_of_the_settings_reach_the_database_and_are_answered_with_their_status(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_tasks": 1,
        "max_pinned_tasks": 0,
        "max_jobs": 1,
        "max_idempotency_keys": 1,
        "max_versions": 1,
    }
    with fake_services(tmp_path / "data", **settings) as services, client_of(services) as client:
        assert client.post("/v1/tasks", json=echo_task(), headers={"Idempotency-Key": "one"}).status_code == 201
        job = {"kind": "predict", "task": "echo", "rows": [{"query": "a"}]}
        first = client.post("/v1/jobs", json=job)
        assert first.status_code == 202
        row = {"query": "a b", "answer": "AB"}
        for answer, status, code in (
            (client.post("/v1/tasks", json=echo_task("other")), 409, "too_many_tasks"),
            (client.patch("/v1/tasks/echo", json={"pinned": True}), 409, "too_many_pinned_tasks"),
            (client.post("/v1/jobs", json=job), 409, "too_many_kept_jobs"),
            (
                client.patch("/v1/tasks/echo/demonstrations/1", json=row, headers={"Idempotency-Key": "two"}),
                429,
                "too_many_idempotency_keys",
            ),
        ):
            assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
            assert answer.json()["remedy"]


def test_every_limit_of_the_database_has_a_setting() -> None:
    limits = ServerSettings(model="m", data=Path("d")).store_limits
    assert limits == StoreLimits(10_000, 16, 1000, 1000, 2_000_000, 100_000)
