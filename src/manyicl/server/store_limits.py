"""How much the database keeps of each owner and task. A write that exceeds it is refused, or drops old versions."""

from __future__ import annotations

from sqlalchemy import Connection, and_, delete, exists, func, not_, select

from manyicl.errors import UserError, pluralized
from manyicl.server.records import StoreLimits, VersionKey
from manyicl.server.tables import demonstrations, idempotency_keys, is_number, jobs, tasks, versions


def drop_old_versions(connection: Connection, newest: VersionKey, most: int | None) -> None:
    """Delete the versions of a task before the newest ones, and the demonstrations that no kept version has.

    The version that answers is kept, however old, and so is one that has jobs, which would go with it.
    """
    if most is None or newest.version <= most:
        return
    columns = versions.c
    compiled = versions.alias()
    of_task = compiled.c.task_id == newest.task_id, compiled.c.model.is_not(None)
    answering = select(func.coalesce(func.max(compiled.c.version), 0)).where(*of_task).scalar_subquery()
    has_jobs = exists().where(jobs.c.task_id == newest.task_id, jobs.c.version == columns.version)
    is_old = columns.version <= newest.version - most
    dropping = delete(versions).where(columns.task_id == newest.task_id, is_old, columns.version != answering)
    if connection.execute(dropping.where(not_(has_jobs))).rowcount:
        _delete_unused_demonstrations(connection, newest.task_id)


def _delete_unused_demonstrations(connection: Connection, task_id: str) -> None:
    columns = demonstrations.c
    is_in = and_(versions.c.version >= columns.from_version, versions.c.version < columns.until_version)
    is_used = exists().where(versions.c.task_id == task_id, is_in)
    has_ended = columns.until_version.is_not(None)
    connection.execute(delete(demonstrations).where(columns.task_id == task_id, has_ended, not_(is_used)))


def unknown_version(connection: Connection, key: VersionKey) -> UserError:
    """Make the error for a version that is not there, which says whether it was."""
    newest = connection.execute(select(tasks.c.newest).where(tasks.c.id == key.task_id)).scalar_one_or_none()
    if newest is None or not 0 < key.version <= newest:
        return UserError("unknown_version", f"the task has no version {key.version}", field="version")
    what = f"version {key.version} of the task is no longer kept"
    remedy = "The list of its versions names those that are; take one of them."
    return UserError("unknown_version", what, remedy=remedy, field="version")


def require_version(connection: Connection, key: VersionKey) -> None:
    """Refuse a version that is not there.

    Raises:
        UserError: If it never was, or is no longer kept.
    """
    query = select(versions.c.version).where(versions.c.task_id == key.task_id, versions.c.version == key.version)
    if not is_number(key.version) or connection.execute(query).first() is None:
        raise unknown_version(connection, key)


def require_few_tasks(connection: Connection, owner: str, most: int | None) -> None:
    """Refuse another task where an owner has as many as are kept.

    Raises:
        UserError: If so.
    """
    if most is None:
        return
    number = connection.execute(select(func.count()).where(tasks.c.owner == owner)).scalar_one()
    if number >= most:
        what = f"you have {pluralized(number, 'task')}, and no more are kept"
        raise UserError("too_many_tasks", what, expected=f"at most {most:,}", remedy="Delete one first.")


def require_few_pinned(connection: Connection, owner: str, most: int | None) -> None:
    """Refuse the pinned tasks of an owner with the one that was just written, where they are too many for the memory.

    Raises:
        UserError: If so; the transaction is to be given up.
    """
    if most is None:
        return
    settings = connection.execute(select(tasks.c.settings).where(tasks.c.owner == owner)).scalars()
    if sum(one["pinned"] for one in settings) > most:
        what, remedy = f"more than {pluralized(most, 'task')} would be pinned", "Unpin one first."
        raise UserError("too_many_pinned_tasks", what, expected=f"at most {most:,}", remedy=remedy)


def require_few_jobs(connection: Connection, owner: str, limits: StoreLimits) -> None:
    """Refuse the jobs of an owner with the one that was just written, where they are more than are kept.

    Raises:
        UserError: If so; the transaction is to be given up.
    """
    if limits.jobs is None and limits.job_rows is None:
        return
    counting = select(func.count(), func.coalesce(func.sum(jobs.c.num_rows), 0)).where(jobs.c.owner == owner)
    num_jobs, num_rows = connection.execute(counting).one()
    for number, most, things in ((num_jobs, limits.jobs, "jobs"), (num_rows, limits.job_rows, "rows of jobs")):
        if most is not None and number > most:
            what, remedy = f"more than {most:,} {things} would be kept", "Delete jobs that have ended first."
            raise UserError("too_many_kept_jobs", what, expected=f"at most {most:,}", remedy=remedy)


def require_few_idempotency_keys(connection: Connection, owner: str, most: int | None) -> None:
    """Refuse the requests of an owner with the one that was just written, where they are more than are remembered.

    Raises:
        UserError: If so; the transaction is to be given up.
    """
    if most is None:
        return
    number = connection.execute(select(func.count()).where(idempotency_keys.c.owner == owner)).scalar_one()
    if number > most:
        what = f"more than {most:,} requests with an Idempotency-Key would be remembered"
        remedy = "Each is for 24 hours: wait, or write more in one request."
        raise UserError("too_many_idempotency_keys", what, expected=f"at most {most:,}", remedy=remedy)
