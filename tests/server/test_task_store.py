"""The task store on SQLite and on PostgreSQL."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import pytest

from manyicl.errors import UserError
from manyicl.server.database import Database
from manyicl.server.records import Idempotency, TaskAtStart, TaskSettings, VersionKey, Written
from manyicl.server.task_store import TaskStore
from tests.server.simple_store import SimpleStore, apply, random_operations, state_of

LABELS = ("billing", "login")
KEYS = {"query": "{{ text }}", "family": "classification", "answer": "{{ label }}"}
ROWS: list[dict[str, Any]] = [{"text": "Card declined", "label": "billing"}, {"text": "No code", "label": "login"}]
READY: dict[str, Any] = {"num_tokens": 40, "num_shots": 2, "num_dropped": 0, "answers": ((0, -0.5, 1), (1, -1.25, 0))}


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 27, 12, 0, 0, 250, UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture(name="clock")
def _clock() -> Clock:
    return Clock()


@pytest.fixture(name="store")
def _store(database: Database, clock: Clock) -> TaskStore:
    return TaskStore(database, clock)


def create(store: TaskStore, name: str = "tickets", owner: str = "ann", key: str | None = None) -> Written:
    idempotency = None if key is None else Idempotency(key, "a request")
    return store.create(owner, name, KEYS, TaskSettings(abstain_below=0.5), ROWS, LABELS, idempotency)


def refused(error: pytest.ExceptionInfo[UserError]) -> str:
    return error.value.code


def test_a_name_that_is_nearly_one_of_the_owner_is_told_and_one_of_another_owner_is_not(store: TaskStore) -> None:
    create(store, "tickets", "ann")
    with pytest.raises(UserError, match=r"there is no task 'ticket'\. Did you mean 'tickets'"):
        store.get("ann", "ticket")
    with pytest.raises(UserError, match=r"there is no task 'ticket'\.$"):
        store.get("bob", "ticket")


def test_a_new_task_reads_as_it_was_written(store: TaskStore, clock: Clock) -> None:
    written = create(store)
    task = store.get("ann", "tickets")
    assert task == written.task == store.get("ann", task.id)
    assert list(task.keys) == list(KEYS)  # in their order
    assert task.keys == KEYS
    assert task.settings == TaskSettings(abstain_below=0.5)
    assert (task.revision, task.ready, task.created_at, task.updated_at) == (1, None, clock.now, clock.now)
    assert task.newest == written.version == store.version(VersionKey(task.id, 1))
    assert (written.version.change, written.version.labels, written.numbers) == ("created", LABELS, (1, 2))
    assert [row.columns for row in store.demonstrations(written.version.key)] == ROWS
    assert store.source(written.version.key) == (task, store.demonstrations(written.version.key))


def test_every_value_that_json_holds_and_every_character_is_kept(store: TaskStore) -> None:
    row = {
        "nul": "a\0b",
        "half": "\ud800",
        "faces": "🙂 é",
        "big": 2**70,
        "none": None,
        "list": [1.5, {"a": True}],
        "": "",
    }
    written = store.create("ann", "odd", {}, TaskSettings(), [row], None)
    (kept,) = store.demonstrations(written.version.key)
    assert kept.columns == row
    assert list(kept.columns) == list(row)


@pytest.mark.parametrize("seed", [0, 1])
def test_after_random_writes_all_versions_are_those_of_the_obvious_store(database: Database, seed: int) -> None:
    store, simple = TaskStore(database), SimpleStore()
    for operation in islice(random_operations(seed), 60):
        written = apply(store, operation)
        simple.apply(operation)
        if operation.kind in ("correct", "remove"):
            assert written is not None
            assert written.numbers == (operation.number,)
    assert state_of(store) == simple.state()


def test_another_owner_s_task_does_not_exist(store: TaskStore) -> None:
    task = create(store).task
    before = store.get("ann", task.id)
    for name in (task.id, task.name):
        for use in (
            lambda name: store.get("bob", name),
            lambda name: store.versions("bob", name, 10),
            lambda name: store.add("bob", name, ROWS, LABELS),
            lambda name: store.correct("bob", name, 1, ROWS[0], LABELS),
            lambda name: store.remove("bob", name, [1], LABELS),
            lambda name: store.restore("bob", name, 1, LABELS),
            lambda name: store.update("bob", name, name="mine"),
            lambda name: store.delete("bob", name),
        ):
            with pytest.raises(UserError) as error:
                use(name)
            assert refused(error) == "unknown_task"
    assert store.page("bob", 10) == ([], None)
    assert store.get("ann", task.id) == before
    assert create(store, owner="bob").task.id != task.id


@pytest.mark.parametrize("name", ["", "\0", "\ud800", "no", "tsk_0"])
def test_a_task_that_is_not_there_is_unknown_whatever_its_name(store: TaskStore, name: str) -> None:
    create(store)
    with pytest.raises(UserError) as error:
        store.get("ann", name)
    assert refused(error) == "unknown_task"


def test_an_id_counts_before_a_name(store: TaskStore) -> None:
    first = create(store).task
    other = create(store, name=first.id).task
    assert store.get("ann", first.id).id == first.id
    assert store.get("ann", other.id).name == first.id


def test_a_name_is_taken_once_for_each_owner(store: TaskStore) -> None:
    create(store)
    create(store, "other")
    for write in (lambda: create(store), lambda: store.update("ann", "other", name="tickets")):
        with pytest.raises(UserError) as error:
            write()
        assert refused(error) == "name_taken"
    store.update("ann", "tickets", name="renamed")
    assert create(store).task.name == "tickets"
    for name in ("", "\0", "\ud800"):
        with pytest.raises(UserError) as error:
            create(store, name)
        assert refused(error) == "bad_name"


def test_a_write_for_an_older_revision_changes_nothing(store: TaskStore) -> None:
    create(store)
    store.add("ann", "tickets", ROWS, LABELS, if_revision=1)
    before = store.get("ann", "tickets")
    for write in (
        lambda: store.add("ann", "tickets", ROWS, LABELS, if_revision=1),
        lambda: store.correct("ann", "tickets", 1, ROWS[1], LABELS, if_revision=1),
        lambda: store.remove("ann", "tickets", [1], LABELS, if_revision=3),
        lambda: store.restore("ann", "tickets", 1, LABELS, if_revision=1),
        lambda: store.update("ann", "tickets", name="other", if_revision=1),
        lambda: store.delete("ann", "tickets", if_revision=1),
    ):
        with pytest.raises(UserError) as error:
            write()
        assert refused(error) == "changed_meanwhile"
    assert store.get("ann", "tickets") == before


def test_what_is_not_there_is_neither_corrected_removed_nor_restored(store: TaskStore) -> None:
    key = create(store).version.key
    store.remove("ann", "tickets", [1], LABELS)
    before = store.get("ann", "tickets")
    for write, code in (
        (lambda: store.correct("ann", "tickets", 1, ROWS[0], LABELS), "unknown_demonstration"),
        (lambda: store.correct("ann", "tickets", 3, ROWS[0], LABELS), "unknown_demonstration"),
        (lambda: store.remove("ann", "tickets", [2, 1], LABELS), "unknown_demonstration"),
        (lambda: store.correct("ann", "tickets", 2**31, ROWS[0], LABELS), "unknown_demonstration"),
        (lambda: store.remove("ann", "tickets", [2**70], LABELS), "unknown_demonstration"),
        (lambda: store.remove("ann", "tickets", [0], LABELS), "unknown_demonstration"),
        (lambda: store.restore("ann", "tickets", 3, LABELS), "unknown_version"),
        (lambda: store.restore("ann", "tickets", 2**70, LABELS), "unknown_version"),
        (lambda: store.version(VersionKey(key.task_id, 2**31)), "unknown_version"),
        (lambda: store.version(VersionKey(key.task_id, 3)), "unknown_version"),
        (lambda: store.demonstrations(VersionKey(key.task_id, 0)), "unknown_version"),
        (lambda: store.source(VersionKey("tsk_none", 1)), "unknown_version"),
    ):
        with pytest.raises(UserError) as error:
            write()
        assert refused(error) == code
    assert store.get("ann", "tickets") == before
    assert [row.number for row in store.demonstrations(before.newest.key)] == [2]


def test_an_order_that_does_not_name_each_row_once_is_a_mistake_of_ours(store: TaskStore) -> None:
    for order in ([0], [0, 0], [0, 2], [0, 1, 1]):
        with pytest.raises(ValueError, match="must name each once"):
            store.create("ann", "tickets", KEYS, TaskSettings(), ROWS, LABELS, order=order)
    assert store.page("ann", 10) == ([], None)


def test_the_same_request_sent_again_writes_once(store: TaskStore, clock: Clock) -> None:
    first = create(store, key="one")
    assert not first.replayed
    again = create(store, key="one")
    assert again == Written(first.task, first.version, True, first.numbers)
    add = Idempotency("two", "add")
    added = store.add("ann", "tickets", ROWS, LABELS, if_revision=1, idempotency=add)
    store.set_failed(added.version.key, {"code": "too_long"})
    # The revision was right when the request was first sent; and the answer says how things are now.
    again = store.add("ann", "tickets", ROWS, LABELS, if_revision=1, idempotency=add)
    assert (again.replayed, again.numbers, again.version.state) == (True, (3, 4), "failed")
    assert store.replayed("ann", add) == again
    assert store.get("ann", "tickets").newest.key.version == 2
    clock.now += timedelta(hours=23, minutes=59)
    assert store.replayed("ann", add) is not None
    clock.now += timedelta(minutes=2)
    assert store.replayed("ann", add) is None
    assert store.add("ann", "tickets", ROWS, LABELS, idempotency=add).version.key.version == 3


def test_another_request_with_the_same_key_is_refused_and_another_owner_s_is_not_the_same(store: TaskStore) -> None:
    create(store, key="one")
    for write in (
        lambda: store.create("ann", "b", KEYS, TaskSettings(), ROWS, LABELS, Idempotency("one", "another request")),
        lambda: store.replayed("ann", Idempotency("one", "another request")),
    ):
        with pytest.raises(UserError) as error:
            write()
        assert refused(error) == "idempotency_key_reused"
    assert store.replayed("bob", Idempotency("one", "a request")) is None
    assert not create(store, owner="bob", key="one").replayed


def test_a_request_sent_again_after_its_task_was_deleted_makes_no_second_task(store: TaskStore) -> None:
    create(store, key="one")
    store.delete("ann", "tickets")
    for write in (lambda: create(store, key="one"), lambda: store.replayed("ann", Idempotency("one", "a request"))):
        with pytest.raises(UserError) as error:
            write()
        assert refused(error) == "unknown_task"
    assert store.page("ann", 10) == ([], None)


def test_a_refused_write_leaves_no_idempotency_key(store: TaskStore) -> None:
    create(store)
    with pytest.raises(UserError):
        create(store, key="one")
    assert store.replayed("ann", Idempotency("one", "a request")) is None


def test_settings_and_names_change_without_a_new_version(store: TaskStore, clock: Clock) -> None:
    create(store)
    clock.now += timedelta(seconds=5)
    task = store.update("ann", "tickets", name="other", settings=TaskSettings(pinned=True))
    assert task == store.get("ann", "other")
    assert (task.name, task.settings, task.revision, task.newest.key.version) == (
        "other",
        TaskSettings(pinned=True),
        2,
        1,
    )
    assert task.updated_at == clock.now > task.created_at


def test_a_version_answers_once_it_is_ready_and_until_a_newer_one_is(store: TaskStore) -> None:
    first = create(store).version.key
    assert store.set_ready(first, model="a", **READY)
    second = store.add("ann", "tickets", ROWS, LABELS).version.key
    task = store.get("ann", "tickets")
    assert (task.ready, task.newest.state, task.revision) == (1, "compiling", 2)
    assert store.set_failed(second, {"code": "too_long", "row": 2})
    task = store.get("ann", "tickets")
    assert (task.ready, task.newest.state, task.newest.problem) == (1, "failed", {"code": "too_long", "row": 2})
    assert store.set_ready(second, model="a", **READY)
    task = store.get("ann", "tickets")
    assert (task.ready, task.newest.problem, task.newest.answers) == (2, None, READY["answers"])
    assert (task.newest.model, task.newest.num_tokens, task.newest.num_shots) == ("a", 40, 2)


def test_while_a_version_is_compiled_for_another_model_no_older_one_answers_in_its_place(store: TaskStore) -> None:
    first = create(store).version.key
    store.set_ready(first, model="a", **READY)
    second = store.add("ann", "tickets", ROWS, LABELS).version.key
    store.set_ready(second, model="a", **READY)
    store.set_compiling([second], {"code": "other_model"})
    task = store.get("ann", "tickets")
    assert (task.ready, task.newest.state, task.newest.problem) == (None, "compiling", {"code": "other_model"})
    store.set_failed(second, {"code": "too_long"})
    assert store.get("ann", "tickets").ready is None
    store.set_ready(second, model="b", **READY)
    assert store.get("ann", "tickets").ready == 2


def test_a_deleted_task_is_told_to_the_worker(store: TaskStore) -> None:
    key = create(store).version.key
    assert store.delete("ann", "tickets").id == key.task_id
    assert not store.set_ready(key, model="a", **READY)
    assert not store.set_failed(key, {})
    store.set_compiling([key], {})
    assert not store.is_there(key.task_id)


def test_what_is_known_of_tasks_at_a_start(store: TaskStore) -> None:
    new = create(store, "new").version.key
    pinned = create(store, "pinned", "bob").version.key
    store.set_ready(pinned, model="a", **READY)
    store.update("bob", "pinned", settings=TaskSettings(pinned=True))
    failed = create(store, "failed").version.key
    store.set_failed(failed, {"code": "too_long"})
    both = create(store, "both").version.key
    store.set_ready(both, model="b", **READY)
    added = store.add("ann", "both", ROWS, LABELS).version.key
    again = create(store, "again").version.key
    store.set_ready(again, model="a", **READY)
    store.set_compiling([again], {"code": "other_model"})
    assert store.at_start() == [
        TaskAtStart(new, "compiling", None, None, False),
        TaskAtStart(pinned, "ready", pinned, "a", True),
        TaskAtStart(failed, "failed", None, None, False),
        TaskAtStart(added, "compiling", both, "b", False),
        TaskAtStart(again, "compiling", None, None, False),
    ]


def test_pages_hold_everything_once_while_tasks_come_and_go(store: TaskStore) -> None:
    for number in range(5):
        create(store, f"task{number}")
    first, cursor = store.page("ann", 2)
    assert [task.name for task in first] == ["task0", "task1"]
    store.delete("ann", "task1")
    create(store, "task5")
    second, cursor = store.page("ann", 2, cursor)
    third, end = store.page("ann", 2, cursor)
    assert [task.name for task in (*second, *third)] == ["task2", "task3", "task4", "task5"]
    assert end is None
    for _ in range(2):
        store.add("ann", "task0", ROWS, LABELS)
    versions, cursor = store.versions("ann", "task0", 2)
    rest, end = store.versions("ann", "task0", 2, cursor)
    assert ([one.key.version for one in (*versions, *rest)], end) == ([1, 2, 3], None)
    for wrong in ("", "x", "YWZ0ZXI6LTE", "é", "YWZ0ZXI6OTk5OTk5OTk5OTk5"):
        with pytest.raises(UserError) as error:
            store.page("ann", 2, wrong)
        assert refused(error) == "bad_cursor"


def test_a_clock_set_back_changes_no_order_and_no_task_is_older_than_it_was(store: TaskStore, clock: Clock) -> None:
    create(store, "first", key="one")
    before = clock.now
    clock.now -= timedelta(days=400)
    create(store, "second")
    task = store.add("ann", "first", ROWS, LABELS).task
    assert [task.name for task in store.page("ann", 10)[0]] == ["first", "second"]
    assert task.updated_at == task.newest.created_at == before
    assert store.update("ann", "first", name="renamed").updated_at == before
    assert create(store, "first", key="one").replayed


def test_eight_threads_write_to_one_task_and_every_write_is_there_once(store: TaskStore) -> None:
    task = create(store).task

    def write(thread: int) -> list[Written]:
        return [
            store.add("ann", task.id, [{"text": f"{thread} {number}", "label": "login"}] * 2, LABELS)
            for number in range(6)
        ]

    with ThreadPoolExecutor(8) as threads:
        written = [one for many in threads.map(write, range(8)) for one in many]
    assert sorted(one.version.key.version for one in written) == list(range(2, 50))
    newest = store.get("ann", task.id)
    assert newest.revision == 49
    rows = store.demonstrations(newest.newest.key)
    assert [row.number for row in rows] == list(range(1, 99))
    for one in written:
        assert [rows[number - 1].added_in for number in one.numbers] == [one.version.key.version] * 2
        assert len({rows[number - 1].columns["text"] for number in one.numbers}) == 1


def test_of_eight_threads_that_send_one_request_one_writes(store: TaskStore) -> None:
    start = threading.Barrier(8)

    def write(_: int) -> Written:
        start.wait()
        return create(store, key="one")

    with ThreadPoolExecutor(8) as threads:
        written = list(threads.map(write, range(8)))
    assert sorted(one.replayed for one in written) == [False] + [True] * 7
    assert len({one.task.id for one in written}) == 1


def test_of_eight_threads_that_change_one_revision_one_succeeds(store: TaskStore) -> None:
    create(store)
    start = threading.Barrier(8)

    def write(_: int) -> str:
        start.wait()
        try:
            store.add("ann", "tickets", ROWS, LABELS, if_revision=1)
        except UserError as error:
            return error.code
        return "written"

    with ThreadPoolExecutor(8) as threads:
        assert sorted(threads.map(write, range(8))) == ["changed_meanwhile"] * 7 + ["written"]
