"""Many threads change one task through the service: each change is made once, and none is refused without reason."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from manyicl.errors import UserError
from manyicl.server.records import Idempotency, TaskRecord, VersionKey, Written
from manyicl.server.schemas import NewTaskKeys, TaskChanges
from manyicl.server.services import Services
from manyicl.server.task_service import TaskService
from manyicl.server.turns import Places, Turns
from manyicl.tasks.rows import LocatedRow
from tests.server.fakes import fake_services, fake_worker, mood_task

OWNER = "local"
SECONDS = 30


@pytest.fixture(name="services")
def _services(tmp_path: Path) -> Iterator[Services]:
    with fake_services(tmp_path / "data") as services:
        yield services


def created(service: TaskService, name: str = "mood") -> TaskRecord:
    body = mood_task(name)
    rows = [LocatedRow(row, "rows", line) for line, row in enumerate(body.pop("demonstrations"), start=1)]
    return service.create(OWNER, NewTaskKeys(**body), rows, None).task


def add(
    service: TaskService, text: str, task: str = "mood", revisions: frozenset[int] | None = None, key: str | None = None
) -> Written:
    idempotency = None if key is None else Idempotency(key, "a request")
    return service.add(OWNER, task, [LocatedRow({"text": text, "label": "good"}, "rows", 1)], revisions, idempotency)


def texts(services: Services, task: TaskRecord, version: int) -> list[str]:
    return [row.columns["text"] for row in services.tasks.demonstrations(VersionKey(task.id, version))]


def test_all_of_many_that_add_to_one_task_at_once_succeed_each_once(services: Services) -> None:
    task = created(services.service)
    fake_worker(services).compiles.clear()  # it would take as long as the writes
    num_threads, num_each = 16, 10
    at_once = threading.Barrier(num_threads)

    def add_some(thread: int) -> list[int]:
        at_once.wait(SECONDS)
        return [add(services.service, f"{thread}.{number}").version.key.version for number in range(num_each)]

    with ThreadPoolExecutor(num_threads) as threads:
        versions = [version for made in threads.map(add_some, range(num_threads)) for version in made]
    newest = num_threads * num_each + 1
    assert sorted(versions) == list(range(2, newest + 1))
    added = texts(services, task, newest)[3:]
    assert sorted(added) == sorted(f"{thread}.{number}" for thread in range(num_threads) for number in range(num_each))
    assert services.tasks.get(OWNER, task.id).revision == newest


def test_of_many_that_know_the_same_revision_one_writes(services: Services) -> None:
    created(services.service)

    def write(text: str) -> str:
        try:
            add(services.service, text, revisions=frozenset({1}))
        except UserError as error:
            return error.code
        return "written"

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(write, "abcdefgh")) == ["changed_meanwhile"] * 7 + ["written"]


def test_the_same_request_sent_many_times_at_once_is_carried_out_once(services: Services) -> None:
    created(services.service)

    def remove(_: int) -> Written:
        return services.service.remove(OWNER, "mood", [1], None, Idempotency("one", "a request"))

    with ThreadPoolExecutor(8) as threads:
        written = list(threads.map(remove, range(8)))
    assert {one.version.key.version for one in written} == {2}
    assert sorted(one.replayed for one in written) == [False] + [True] * 7


def test_another_task_is_written_while_a_write_is_checked(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    service, task = services.service, created(services.service)
    created(service, "other")
    is_checked, may_go_on = threading.Event(), threading.Event()
    build = service._built

    def slowly_built(name: str, *arguments: Any) -> Any:
        if name == "mood":
            is_checked.set()
            assert may_go_on.wait(SECONDS)
        return build(name, *arguments)

    monkeypatch.setattr(service, "_built", slowly_built)
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(add, service, "slow")
        assert is_checked.wait(SECONDS)
        waits = threads.submit(add, service, "after it", task.id)
        assert add(service, "meanwhile", "other").version.key.version == 2
        assert not slow.done()
        assert not waits.done()
        may_go_on.set()
        assert slow.result(SECONDS).version.key.version == 2
        assert waits.result(SECONDS).version.key.version == 3


def test_two_that_change_different_settings_at_once_both_do(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, task = services.service, created(services.service)
    update, has_read, other_is_done = services.tasks.update, threading.Event(), threading.Event()

    def late_update(*arguments: Any, settings: Any, **named: Any) -> TaskRecord:
        if settings.pinned:
            has_read.set()
            other_is_done.wait(0.3)
        return update(*arguments, settings=settings, **named)

    monkeypatch.setattr(services.tasks, "update", late_update)
    with ThreadPoolExecutor(1) as threads:
        pinning = threads.submit(service.update, OWNER, "mood", TaskChanges(pinned=True), None)
        assert has_read.wait(SECONDS)
        service.update(OWNER, "mood", TaskChanges(abstain_below=0.25), None)
        other_is_done.set()
        pinning.result(SECONDS)
    settings = services.tasks.get(OWNER, task.id).settings
    assert (settings.pinned, settings.abstain_below) == (True, 0.25)


def test_a_turn_leaves_nothing_behind_also_after_an_error() -> None:
    turns, inside = Turns(), 0

    def take(number: int) -> None:
        nonlocal inside
        with turns.of("a"):
            before, inside = inside, inside + 1
            assert before == 0
            inside -= 1
            if number % 3 == 0:
                raise LookupError

    with ThreadPoolExecutor(8) as threads:
        errors = [future.exception() for future in [threads.submit(take, number) for number in range(300)]]
    assert sum(isinstance(error, LookupError) for error in errors) == 100
    assert len(turns) == 0
    with turns.of("a"), turns.of("b"):
        assert len(turns) == 2


def test_each_name_has_so_many_places_and_nothing_is_left_behind_also_after_an_error() -> None:
    places, inside, most = Places(2), {"a": 0, "b": 0}, 0

    async def take(number: int) -> None:
        nonlocal most
        name = "ab"[number % 2]
        async with places.of(name):
            inside[name] += 1
            most = max(most, inside[name])
            await asyncio.sleep(0.001)
            inside[name] -= 1
            if number % 5 == 0:
                raise LookupError

    async def take_all() -> list[BaseException | None]:
        return await asyncio.gather(*(take(number) for number in range(50)), return_exceptions=True)

    errors = asyncio.run(take_all())
    assert sum(isinstance(error, LookupError) for error in errors) == 10
    assert (most, len(places)) == (2, 0)


def test_rows_that_wait_for_a_task_that_is_deleted_hear_that_it_was(services: Services) -> None:
    service, task = services.service, created(services.service)
    with pytest.raises(UserError, match="no version 9"):
        service.require_ready_or_compiling(VersionKey(task.id, 9))
    service.delete(OWNER, task.id, None)
    with pytest.raises(UserError, match="the task was deleted meanwhile") as error:
        service.require_ready_or_compiling(VersionKey(task.id, 1))
    assert error.value.code == "unknown_task"
