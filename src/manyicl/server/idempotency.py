"""What a request with an ``Idempotency-Key`` made, so that sending it again makes it no second time."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import Connection, delete, insert, select

from manyicl.errors import UserError
from manyicl.server.records import Idempotency
from manyicl.server.store_limits import require_few_idempotency_keys
from manyicl.server.tables import idempotency_keys

KEPT = timedelta(hours=24)


class Made(NamedTuple):
    """What a request made: a version of a task, or a job."""

    task_id: str | None = None
    version: int | None = None
    job_id: str | None = None


def made_before(connection: Connection, owner: str, idempotency: Idempotency | None, now: datetime) -> Made | None:
    """Return what the same request made before; None where it is new.

    Raises:
        UserError: If another request had the same key.
    """
    if idempotency is None:
        return None
    keys = idempotency_keys.c
    query = select(idempotency_keys).where(
        keys.owner == owner, keys.key == idempotency.key, keys.created_at > now - KEPT
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    if row.request != idempotency.request:
        raise key_of_another_request()
    return Made(row.task_id, row.version, row.job_id)


def key_of_another_request() -> UserError:
    """Make the error for a key that came with another request before, or with one that made something else."""
    what, remedy = "another request had this Idempotency-Key", "Take a new key for each new request."
    return UserError("idempotency_key_reused", what, remedy=remedy)


def remember(
    connection: Connection,
    owner: str,
    idempotency: Idempotency | None,
    made: Made,
    now: datetime,
    most: int | None = None,
) -> None:
    """Keep what a request made, in the transaction that makes it, and forget what is older than a day.

    Raises:
        UserError: If the owner has more than ``most`` such requests.
    """
    if idempotency is None:
        return
    connection.execute(delete(idempotency_keys).where(idempotency_keys.c.created_at <= now - KEPT))
    values = {"owner": owner, "key": idempotency.key, "request": idempotency.request, "created_at": now}
    connection.execute(insert(idempotency_keys).values(**values, **made._asdict()))
    require_few_idempotency_keys(connection, owner, most)
