"""Tasks, their versions and demonstrations, as the database keeps them. A write that has returned is durable.

A version is never changed: demonstrations are added, ended and written anew with the number of the version that did it
(see `tables.demonstrations`). Writes follow one another; each makes one version, and one record of its idempotency key,
in one transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    ScalarSelect,
    Update,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    update,
)

from manyicl.errors import MOST_NAMES, UserError, did_you_mean, quoted
from manyicl.server.database import Database
from manyicl.server.idempotency import Made, key_of_another_request, made_before, remember
from manyicl.server.pages import page_of, position_of
from manyicl.server.records import (
    NO_LIMITS,
    Change,
    DemonstrationRecord,
    Idempotency,
    StoreLimits,
    TaskAtStart,
    TaskRecord,
    TaskSettings,
    VersionKey,
    VersionRecord,
    Written,
)
from manyicl.server.store_limits import drop_old_versions, require_few_pinned, require_few_tasks, unknown_version
from manyicl.server.tables import demonstrations, is_number, is_storable, new_id, tasks, utc_now, versions

_Rows = Sequence[Mapping[str, Any]]
_Labels = tuple[str, ...] | None


def _of_ready_version(column: str) -> ScalarSelect[Any]:
    """Select a column of the version of a task that answers.

    That is the newest version that was ever compiled, unless it is compiled again: an older one, which may be of
    another model, does not take its place.
    """
    compiled = versions.alias()
    return (
        select(case((compiled.c.state == "ready", compiled.c[column])))
        .where(compiled.c.task_id == tasks.c.id, compiled.c.model.is_not(None))
        .order_by(compiled.c.version.desc())
        .limit(1)
        .correlate(tasks)
        .scalar_subquery()
    )


# Statements are made once: to make one takes longer than to run it.
_IS_NEWEST = and_(versions.c.task_id == tasks.c.id, versions.c.version == tasks.c.newest)
_READY = _of_ready_version("version").label("ready")
# Tasks with their newest version and the number of the one that answers.
_TASKS = select(tasks, versions, _READY).join(versions, _IS_NEWEST)
_AT_START = (
    select(tasks.c.id, tasks.c.settings, tasks.c.newest, versions.c.state, _READY, _of_ready_version("model"))
    .join(versions, _IS_NEWEST)
    .order_by(tasks.c.position)
)
_TASK = _TASKS.where(
    tasks.c.owner == bindparam("owner"), or_(tasks.c.id == bindparam("task"), tasks.c.name == bindparam("task"))
)
_VERSION = select(versions).where(
    versions.c.task_id == bindparam("task_id"), versions.c.version == bindparam("version")
)


class TaskStore:
    """Reads and writes tasks. Another owner's task is unknown, just as one that does not exist."""

    def __init__(
        self, database: Database, clock: Callable[[], datetime] = utc_now, limits: StoreLimits = NO_LIMITS
    ) -> None:
        """Take the database, and a clock, of which no order depends.

        Args:
            database: Open database.
            clock: Gives the time in UTC.
            limits: How much is kept.
        """
        self._database = database
        self._clock = clock
        self._limits = limits

    def create(
        self,
        owner: str,
        name: str,
        keys: Mapping[str, Any],
        settings: TaskSettings,
        rows: _Rows,
        labels: _Labels,
        idempotency: Idempotency | None = None,
        *,
        order: Sequence[int] | None = None,
    ) -> Written:
        """Make a task, and its version 1.

        Args:
            owner: Whose it is.
            name: Name, which no other task of the owner has.
            keys: Keys of a task file without ``data`` and ``name``.
            settings: Settings.
            rows: Its demonstrations, column -> value.
            labels: Closed label set of the version; None for free answers and row options.
            idempotency: Key of the request, and what it was.
            order: Positions of ``rows`` in the order in which they are shown; None for the order they are in.

        Raises:
            UserError: If the name is taken, the owner has too many tasks, or too many pinned ones, or another request
                had the idempotency key.
        """
        with self._database.writing() as connection:
            now = self._clock()
            if made := made_before(connection, owner, idempotency, now):
                return _written(connection, owner, made, is_replayed=True)
            _require_free(connection, owner, name)
            require_few_tasks(connection, owner, self._limits.tasks)
            key = VersionKey(new_id("tsk"), 1)
            values = {"id": key.task_id, "owner": owner, "name": name, "keys": dict(keys), "settings": asdict(settings)}
            counts = {"revision": 0, "newest": 0, "num_numbers": 0, "created_at": now, "updated_at": now}
            connection.execute(insert(tasks).values(**values, **counts))
            if settings.pinned:
                require_few_pinned(connection, owner, self._limits.pinned)
            _insert_rows(connection, key, 0, rows, order)
            return self._finish(connection, owner, key, "created", labels, now, idempotency)

    def add(
        self,
        owner: str,
        task: str,
        rows: _Rows,
        labels: _Labels,
        if_revision: int | None = None,
        idempotency: Idempotency | None = None,
        *,
        order: Sequence[int] | None = None,
    ) -> Written:
        """Add demonstrations after those that are there.

        Args:
            owner: Whose task it is.
            task: Its id or name.
            rows: Demonstrations to add.
            labels: Label set of the new version.
            if_revision: Revision the task must still have; None for any.
            idempotency: Key of the request, and what it was.
            order: As for `create`.

        Raises:
            UserError: If the task is unknown, was changed meanwhile, or another request had the idempotency key.
        """

        def write(connection: Connection, key: VersionKey, num_numbers: int) -> None:
            _insert_rows(connection, key, num_numbers, rows, order)

        return self._change(owner, task, "added", labels, if_revision, idempotency, write)

    def correct(
        self,
        owner: str,
        task: str,
        number: int,
        columns: Mapping[str, Any],
        labels: _Labels,
        if_revision: int | None = None,
        idempotency: Idempotency | None = None,
    ) -> Written:
        """Replace the content of one demonstration, which keeps its number and place.

        Raises:
            UserError: As `add`, and if the newest version has no such demonstration.
        """

        def write(connection: Connection, key: VersionKey, _num_numbers: int) -> None:
            _end(connection, key, [number])
            ended = and_(demonstrations.c.number == number, demonstrations.c.until_version == key.version)
            _copy(connection, key, ended, dict(columns))

        return self._change(owner, task, "corrected", labels, if_revision, idempotency, write)

    def remove(
        self,
        owner: str,
        task: str,
        numbers: Sequence[int],
        labels: _Labels,
        if_revision: int | None = None,
        idempotency: Idempotency | None = None,
    ) -> Written:
        """Remove demonstrations; earlier versions keep them.

        Raises:
            UserError: As `add`, and if the newest version lacks one of them.
        """

        def write(connection: Connection, key: VersionKey, _num_numbers: int) -> None:
            _end(connection, key, numbers)

        return self._change(owner, task, "removed", labels, if_revision, idempotency, write)

    def restore(
        self,
        owner: str,
        task: str,
        version: int,
        labels: _Labels,
        if_revision: int | None = None,
        idempotency: Idempotency | None = None,
    ) -> Written:
        """Make a new version with the demonstrations of an earlier one.

        Raises:
            UserError: As `add`, and if the task has no such version.
        """

        def write(connection: Connection, key: VersionKey, _num_numbers: int) -> None:
            _version(connection, VersionKey(key.task_id, version))
            columns = demonstrations.c
            is_newer = and_(columns.task_id == key.task_id, columns.from_version > version)
            ending = update(demonstrations).where(is_newer, columns.until_version.is_(None))
            connection.execute(ending.values(until_version=key.version))
            # What the earlier version had and the newest has not; all else that it had was never ended.
            _copy(connection, key, and_(columns.from_version <= version, columns.until_version > version))

        return self._change(owner, task, "restored", labels, if_revision, idempotency, write)

    def update(
        self,
        owner: str,
        task: str,
        *,
        name: str | None = None,
        settings: TaskSettings | None = None,
        if_revision: int | None = None,
    ) -> TaskRecord:
        """Change the name or the settings of a task; its demonstrations and version stay.

        Raises:
            UserError: If the task is unknown or was changed meanwhile, the name is taken, or too many tasks are pinned.
        """
        with self._database.writing() as connection:
            found = _find(connection, owner, task)
            _require_revision(found, if_revision)
            values: dict[str, Any] = {
                "revision": found.revision + 1,
                "updated_at": max(self._clock(), found.updated_at),
            }
            if name is not None and name != found.name:
                _require_free(connection, owner, name)
                values["name"] = name
            if settings is not None:
                values["settings"] = asdict(settings)
            connection.execute(update(tasks).where(tasks.c.id == found.id).values(**values))
            if settings is not None and settings.pinned and not found.settings.pinned:
                require_few_pinned(connection, owner, self._limits.pinned)
            return _find(connection, owner, found.id)

    def delete(self, owner: str, task: str, if_revision: int | None = None) -> TaskRecord:
        """Delete a task with its versions, demonstrations and jobs, and return what it was.

        With SQLite no text of it is left in the files of the database; PostgreSQL overwrites them when it sees fit.

        Raises:
            UserError: If the task is unknown or was changed meanwhile.
        """
        with self._database.writing() as connection:
            found = _find(connection, owner, task)
            _require_revision(found, if_revision)
            connection.execute(delete(tasks).where(tasks.c.id == found.id))
        self._database.take_out_deleted()
        return found

    def get(self, owner: str, task: str) -> TaskRecord:
        """Return a task by its id or name; if one task has as name what another has as id, the id counts.

        Raises:
            UserError: If the task is unknown.
        """
        with self._database.reading() as connection:
            return _find(connection, owner, task)

    def page(self, owner: str, limit: int, after: str | None = None) -> tuple[list[TaskRecord], str | None]:
        """Return some tasks of an owner, oldest first, and the cursor of the next page; None after the last one.

        Raises:
            UserError: If the cursor is wrong.
        """
        query = _TASKS.where(tasks.c.owner == owner, tasks.c.position > position_of(after))
        with self._database.reading() as connection:
            found = connection.execute(query.order_by(tasks.c.position).limit(limit + 1)).mappings().all()
        page, cursor = page_of(found, limit, lambda row: int(row[tasks.c.position]))
        return [_task_record(row) for row in page], cursor

    def at_start(self) -> list[TaskAtStart]:
        """Return what a server that starts needs to know of all tasks of all owners, oldest first."""
        with self._database.reading() as connection:
            return [
                TaskAtStart(
                    newest=VersionKey(task_id, newest),
                    newest_state=state,
                    ready=None if ready is None else VersionKey(task_id, ready),
                    ready_model=model,
                    is_pinned=settings["pinned"],
                )
                for task_id, settings, newest, state, ready, model in connection.execute(_AT_START)
            ]

    def versions(
        self, owner: str, task: str, limit: int, after: str | None = None
    ) -> tuple[list[VersionRecord], str | None]:
        """Return some versions of a task, oldest first, and the cursor of the next page; None after the last one.

        Raises:
            UserError: If the task is unknown, or the cursor wrong.
        """
        start = position_of(after)
        with self._database.reading() as connection:
            task_id = _find(connection, owner, task).id
            query = select(versions).where(versions.c.task_id == task_id, versions.c.version > start)
            found = connection.execute(query.order_by(versions.c.version).limit(limit + 1)).mappings().all()
        page, cursor = page_of(found, limit, lambda row: int(row[versions.c.version]))
        return [_version_record(row) for row in page], cursor

    def version(self, key: VersionKey) -> VersionRecord:
        """Return one version.

        Raises:
            UserError: If there is no such version.
        """
        with self._database.reading() as connection:
            return _version(connection, key)

    def demonstrations(self, key: VersionKey, after: int = 0, limit: int | None = None) -> list[DemonstrationRecord]:
        """Return the demonstrations of a version, by number.

        Args:
            key: The version.
            after: Only those with higher numbers.
            limit: Only the first so many of them.

        Raises:
            UserError: If there is no such version.
        """
        if not is_number(after + 1):
            return []
        with self._database.reading() as connection:
            _version(connection, key)
            return _demonstrations(connection, key, after, limit)

    def is_there(self, task_id: str) -> bool:
        """Tell whether there is a task, of any owner."""
        with self._database.reading() as connection:
            return connection.execute(select(tasks.c.id).where(tasks.c.id == task_id)).first() is not None

    def source(self, key: VersionKey) -> tuple[TaskRecord, list[DemonstrationRecord]]:
        """Return a task of any owner and the demonstrations of a version, by number, to be compiled.

        Raises:
            UserError: If there is no such version.
        """
        with self._database.reading() as connection:
            _version(connection, key)
            row = connection.execute(_TASKS.where(tasks.c.id == key.task_id)).mappings().one()
            return _task_record(row), _demonstrations(connection, key)

    def replayed(self, owner: str, idempotency: Idempotency) -> Written | None:
        """Return what the same request made before; None where it is new.

        Raises:
            UserError: If another request had the key, or the task was deleted meanwhile.
        """
        with self._database.reading() as connection:
            made = made_before(connection, owner, idempotency, self._clock())
            return None if made is None else _written(connection, owner, made, is_replayed=True)

    def set_ready(
        self,
        key: VersionKey,
        *,
        num_tokens: int,
        num_shots: int,
        num_dropped: int,
        answers: Sequence[tuple[int, float, int]] | None,
        model: str,
    ) -> bool:
        """Note that a version was compiled; see `VersionRecord`. False where the task is gone."""
        values = {"num_tokens": num_tokens, "num_shots": num_shots, "num_dropped": num_dropped, "model": model}
        return self._set(key, state="ready", problem=None, answers=answers, **values)

    def set_failed(self, key: VersionKey, problem: Mapping[str, Any]) -> bool:
        """Note that a version cannot be compiled, and why. False where the task is gone."""
        return self._set(key, state="failed", problem=dict(problem))

    def set_compiling(self, keys: Iterable[VersionKey], problem: Mapping[str, Any]) -> None:
        """Note that versions are compiled again, and why, all together."""
        with self._database.writing() as connection:
            for key in keys:
                connection.execute(_changed(key).values(state="compiling", problem=dict(problem)))

    def _set(self, key: VersionKey, **values: Any) -> bool:
        with self._database.writing() as connection:
            return connection.execute(_changed(key).values(**values)).rowcount > 0

    def _change(
        self,
        owner: str,
        task: str,
        change: Change,
        labels: _Labels,
        if_revision: int | None,
        idempotency: Idempotency | None,
        write: Callable[[Connection, VersionKey, int], None],
    ) -> Written:
        """Make a new version of a task, whose demonstrations ``write`` changes, unless the request did so before."""
        with self._database.writing() as connection:
            now = self._clock()
            if made := made_before(connection, owner, idempotency, now):
                return _written(connection, owner, made, is_replayed=True)
            found = _find(connection, owner, task)
            _require_revision(found, if_revision)
            key = VersionKey(found.id, found.newest.key.version + 1)
            num_numbers = connection.execute(select(tasks.c.num_numbers).where(tasks.c.id == found.id)).scalar_one()
            write(connection, key, num_numbers)
            return self._finish(connection, owner, key, change, labels, max(now, found.updated_at), idempotency)

    def _finish(
        self,
        connection: Connection,
        owner: str,
        key: VersionKey,
        change: Change,
        labels: _Labels,
        now: datetime,
        idempotency: Idempotency | None,
    ) -> Written:
        """Write the record of a new version, whose demonstrations were written, and what the request made."""
        is_here = and_(demonstrations.c.task_id == key.task_id, _is_in(key.version))
        count = connection.execute(select(func.count()).select_from(demonstrations).where(is_here)).scalar_one()
        values = {"change": change, "labels": labels, "num_demonstrations": count, "created_at": now}
        connection.execute(insert(versions).values(**key._asdict(), state="compiling", num_dropped=0, **values))
        changing = update(tasks).where(tasks.c.id == key.task_id)
        connection.execute(changing.values(newest=key.version, revision=tasks.c.revision + 1, updated_at=now))
        made = Made(*key)
        remember(connection, owner, idempotency, made, now, self._limits.idempotency_keys)
        written = _written(connection, owner, made)
        drop_old_versions(connection, key, self._limits.versions)
        return written


def _changed(key: VersionKey) -> Update:
    return update(versions).where(versions.c.task_id == key.task_id, versions.c.version == key.version)


def _insert_rows(
    connection: Connection, key: VersionKey, num_numbers: int, rows: _Rows, order: Sequence[int] | None
) -> None:
    """Write new demonstrations, numbered after the ``num_numbers`` that the task ever had."""
    order = range(len(rows)) if order is None else order
    if sorted(order) != list(range(len(rows))):
        raise ValueError(f"order names {len(order)} positions of {len(rows)} rows; it must name each once.")
    ranks = {position: rank for rank, position in enumerate(order)}
    values = [
        {
            "task_id": key.task_id,
            "number": num_numbers + 1 + position,
            "from_version": key.version,
            "added_in": key.version,
            "place": num_numbers + 1 + ranks[position],
            "columns": dict(columns),
        }
        for position, columns in enumerate(rows)
    ]
    if values:
        connection.execute(insert(demonstrations), values)
        total = num_numbers + len(values)
        connection.execute(update(tasks).where(tasks.c.id == key.task_id).values(num_numbers=total))


def _end(connection: Connection, key: VersionKey, numbers: Sequence[int]) -> None:
    """End demonstrations of the newest version, which the new version ``key`` no longer has."""
    for number in sorted(set(numbers)):
        one = and_(demonstrations.c.task_id == key.task_id, demonstrations.c.number == number)
        ending = update(demonstrations).where(one, demonstrations.c.until_version.is_(None))
        if not is_number(number) or not connection.execute(ending.values(until_version=key.version)).rowcount:
            what = f"the newest version of the task has no demonstration {number}"
            raise UserError("unknown_demonstration", what, field="number")


def _copy(
    connection: Connection, key: VersionKey, which: ColumnElement[bool], columns: Mapping[str, Any] | None = None
) -> None:
    """Write demonstrations that ended again, for the new version ``key``, with other content if it is given."""
    values = {
        "task_id": demonstrations.c.task_id,
        "number": demonstrations.c.number,
        "from_version": literal(key.version),
        "until_version": null(),
        "added_in": demonstrations.c.added_in,
        "place": demonstrations.c.place,
        "columns": demonstrations.c.columns if columns is None else literal(columns, demonstrations.c.columns.type),
    }
    query = select(*values.values()).where(demonstrations.c.task_id == key.task_id, which)
    connection.execute(insert(demonstrations).from_select(list(values), query))


def _written(connection: Connection, owner: str, made: Made, *, is_replayed: bool = False) -> Written:
    if made.task_id is None or made.version is None:
        raise key_of_another_request()
    key = VersionKey(made.task_id, made.version)
    task = _find(connection, owner, key.task_id)
    columns = demonstrations.c
    touched = or_(columns.from_version == key.version, columns.until_version == key.version)
    numbers = select(columns.number).where(columns.task_id == key.task_id, touched).distinct().order_by(columns.number)
    return Written(task, _version(connection, key), is_replayed, tuple(connection.execute(numbers).scalars()))


def _is_in(version: int) -> ColumnElement[bool]:
    """Tell whether a demonstration is part of a version."""
    columns = demonstrations.c
    return and_(columns.from_version <= version, or_(columns.until_version.is_(None), columns.until_version > version))


def _find(connection: Connection, owner: str, task: str) -> TaskRecord:
    """Return a task by id or name.

    Raises:
        UserError: If the owner has none.
    """
    found: Sequence[RowMapping] = ()
    if is_storable(task):
        found = connection.execute(_TASK, {"owner": owner, "task": task}).mappings().all()
    if not found:
        names = connection.execute(select(tasks.c.name).where(tasks.c.owner == owner).limit(MOST_NAMES)).scalars()
        remedy = did_you_mean(task, names).strip() or None
        raise UserError("unknown_task", f"there is no task {quoted(task)}", remedy=remedy, field="task")
    return _task_record(max(found, key=lambda row: bool(row[tasks.c.id] == task)))


def _require_free(connection: Connection, owner: str, name: str) -> None:
    if not name or not is_storable(name):
        raise UserError("bad_name", "a name is a text without NUL or halves of characters", field="name")
    if connection.execute(select(tasks.c.id).where(tasks.c.owner == owner, tasks.c.name == name)).first():
        what = f"there is a task {quoted(name)} already"
        raise UserError("name_taken", what, remedy="Take another name, or add to that task.", field="name")


def _require_revision(task: TaskRecord, revision: int | None) -> None:
    if revision is not None and revision != task.revision:
        raise UserError(
            "changed_meanwhile",
            f"task {quoted(task.name)} was changed meanwhile",
            expected=f"revision {revision}",
            found=str(task.revision),
            remedy="Read it again, and decide again.",
        )


def _version(connection: Connection, key: VersionKey) -> VersionRecord:
    row = connection.execute(_VERSION, key._asdict()).mappings().one_or_none() if is_number(key.version) else None
    if row is None:
        raise unknown_version(connection, key)
    return _version_record(row)


def _demonstrations(
    connection: Connection, key: VersionKey, after: int = 0, limit: int | None = None
) -> list[DemonstrationRecord]:
    columns = demonstrations.c
    query = select(columns.number, columns.added_in, columns.columns, columns.place).order_by(columns.number)
    is_meant = and_(columns.task_id == key.task_id, columns.number > after, _is_in(key.version))
    rows = connection.execute(query.where(is_meant).limit(limit))
    return [DemonstrationRecord(*row) for row in rows]


def _version_record(row: RowMapping) -> VersionRecord:
    columns = versions.c
    labels, answers = row[columns.labels], row[columns.answers]
    return VersionRecord(
        key=VersionKey(row[columns.task_id], row[columns.version]),
        created_at=row[columns.created_at],
        change=row[columns.change],
        num_demonstrations=row[columns.num_demonstrations],
        state=row[columns.state],
        labels=None if labels is None else tuple(labels),
        num_tokens=row[columns.num_tokens],
        num_shots=row[columns.num_shots],
        num_dropped=row[columns.num_dropped],
        answers=None if answers is None else tuple((shot, nats, correct) for shot, nats, correct in answers),
        model=row[columns.model],
        problem=row[columns.problem],
    )


def _task_record(row: RowMapping) -> TaskRecord:
    columns = tasks.c
    return TaskRecord(
        id=row[columns.id],
        owner=row[columns.owner],
        name=row[columns.name],
        revision=row[columns.revision],
        keys=row[columns["keys"]],
        settings=TaskSettings(**row[columns.settings]),
        created_at=row[columns.created_at],
        updated_at=row[columns.updated_at],
        newest=_version_record(row),
        ready=row["ready"],
    )
