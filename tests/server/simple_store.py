"""The slow, obvious task store: every version is a list of its own. And random writes, to compare stores after."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from manyicl.server.records import Idempotency, TaskSettings, VersionKey, Written
from manyicl.server.task_store import TaskStore

OWNERS = ("ann", "bob")
LABELS = ("billing", "login")
# Number, version it was added in, place, content.
Row = tuple[int, int, int, dict[str, Any]]
# Owner and name of each task -> its revision and versions.
State = dict[tuple[str, str], tuple[int, list[list[Row]]]]


class Operation(NamedTuple):
    """One write: what is done, to which task, with what."""

    kind: str
    owner: str
    name: str
    number: int
    rows: list[dict[str, Any]]


class SimpleStore:
    """Tasks as lists of versions, each a list of rows."""

    def __init__(self) -> None:
        self.tasks: State = {}
        self.num_numbers: dict[tuple[str, str], int] = {}

    def apply(self, operation: Operation) -> None:
        """Do what the operation says."""
        kind, task = operation.kind, (operation.owner, operation.name)
        if kind == "delete":
            del self.tasks[task]
            return
        if kind == "settings":
            revision, versions = self.tasks[task]
            self.tasks[task] = (revision + 1, versions)
            return
        if kind == "create":
            self.num_numbers[task] = 0
        revision, versions = self.tasks.get(task, (0, []))
        version = len(versions) + 1
        newest = list(versions[-1]) if versions else []
        if kind in ("create", "add"):
            start = self.num_numbers[task] + 1
            # Shown in the reverse of the order in which they come.
            places = range(start + len(operation.rows) - 1, start - 1, -1)
            newest += [
                (start + n, version, place, row)
                for n, (place, row) in enumerate(zip(places, operation.rows, strict=True))
            ]
            self.num_numbers[task] += len(operation.rows)
        elif kind == "correct":
            newest = [(*row[:3], operation.rows[0]) if row[0] == operation.number else row for row in newest]
        elif kind == "remove":
            newest = [row for row in newest if row[0] != operation.number]
        elif kind == "restore":
            newest = list(versions[operation.number - 1])
        self.tasks[task] = (revision + 1, [*versions, newest])

    def state(self) -> State:
        """Return all tasks with all versions."""
        return dict(self.tasks)


def random_operations(seed: int) -> Iterator[Operation]:
    """Yield writes that are valid one after another, without end; most texts are long and hold awkward characters."""
    rng, store = random.Random(seed), SimpleStore()
    number = 0
    while True:
        owner = rng.choice(OWNERS)
        names = [name for whose, name in store.tasks if whose == owner]
        number += 1
        rows = [
            {
                "text": f"operation {number} row {n} " + rng.choice(("é\0\ud800", "x" * 3_000, "")),
                "label": rng.choice(LABELS),
            }
            for n in range(rng.randint(1, 4))
        ]
        kinds = ["add", "add", "correct", "remove", "restore", "settings", "delete"]
        kind = "create" if len(names) < 2 else rng.choice(kinds)
        if kind == "create":
            operation = Operation(kind, owner, f"task{number}", 0, rows)
        else:
            name = rng.choice(names)
            versions = store.tasks[owner, name][1]
            numbers = [row[0] for row in versions[-1]]
            if kind == "restore":
                operation = Operation(kind, owner, name, rng.randint(1, len(versions)), [])
            elif kind in ("correct", "remove") and numbers:
                operation = Operation(kind, owner, name, rng.choice(numbers), rows[:1])
            else:
                operation = Operation("add" if kind in ("correct", "remove") else kind, owner, name, 0, rows)
        store.apply(operation)
        yield operation


def apply(store: TaskStore, operation: Operation, key: str | None = None) -> Written | None:
    """Do to the real store what the operation says, with an idempotency key where there is one."""
    kind, owner, name, number, rows = operation
    idempotency = None if key is None else Idempotency(key, f"hash of {key}")
    order = range(len(rows))[::-1]
    if kind == "create":
        return store.create(owner, name, {"family": "any"}, TaskSettings(), rows, LABELS, idempotency, order=order)
    if kind == "add":
        return store.add(owner, name, rows, LABELS, None, idempotency, order=order)
    if kind == "correct":
        return store.correct(owner, name, number, rows[0], LABELS, None, idempotency)
    if kind == "remove":
        return store.remove(owner, name, [number], LABELS, None, idempotency)
    if kind == "restore":
        return store.restore(owner, name, number, LABELS, None, idempotency)
    if kind == "settings":
        store.update(owner, name, settings=TaskSettings(pinned=True))
    else:
        store.delete(owner, name)
    return None


def state_of(store: TaskStore) -> State:
    """Return all tasks with all versions, by what the store's reads give."""
    found: State = {}
    for owner in OWNERS:
        cursor = None
        while True:
            page, cursor = store.page(owner, 2, cursor)
            for task in page:
                keys = [VersionKey(task.id, version) for version in range(1, task.newest.key.version + 1)]
                versions = [
                    [(row.number, row.added_in, row.place, dict(row.columns)) for row in store.demonstrations(key)]
                    for key in keys
                ]
                assert [store.version(key).num_demonstrations for key in keys] == list(map(len, versions))
                found[owner, task.name] = (task.revision, versions)
            if cursor is None:
                break
    return found
