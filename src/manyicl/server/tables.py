"""The tables of the database, for SQLite and PostgreSQL alike. What changes here needs a migration, too."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)
from sqlalchemy.types import TypeDecorator

# Names that a migration can refer to.
NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class Json(TypeDecorator[Any]):
    """A value as JSON text: keys keep their order, and every character of a text is kept, NUL and halves of one, too.

    PostgreSQL's own JSON types take neither, and UTF-8 no half of a character, so all but ASCII is escaped.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: D102
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: D102
        return None if value is None else json.loads(value)


class Time(TypeDecorator[datetime]):
    """A time in UTC; SQLite keeps no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: D102
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: D102
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def utc_now() -> datetime:
    """Return the time in UTC."""
    return datetime.now(UTC)


def new_id(kind: str) -> str:
    """Return a new id such as ``tsk_`` and 24 random digits and letters; no two are ever equal."""
    return f"{kind}_{secrets.token_hex(12)}"


def is_storable(text: str) -> bool:
    r"""Tell whether every database can hold a text, or look for it: not with NUL or half of a character.

    Examples:
        >>> is_storable("tickets"), is_storable("a\0b"), is_storable("\ud800")
        (True, False, False)
    """
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def is_number(number: int) -> bool:
    """Tell whether a number may be one of a version, a row or a demonstration, and every database can look for it."""
    return 0 < number < 2**31


metadata = MetaData(naming_convention=NAMING_CONVENTION)

tasks = Table(
    "tasks",
    metadata,
    # Rises with every task ever made, so that a list has an order that no clock changes.
    Column("position", Integer, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("owner", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("keys", Json, nullable=False),
    Column("settings", Json, nullable=False),
    Column("created_at", Time, nullable=False),
    Column("updated_at", Time, nullable=False),
    Column("newest", Integer, nullable=False),
    # Numbers of demonstrations given so far, removed ones included.
    Column("num_numbers", Integer, nullable=False),
    UniqueConstraint("owner", "name"),
    Index(None, "owner", "position"),
    sqlite_autoincrement=True,
)

versions = Table(
    "versions",
    metadata,
    Column("task_id", ForeignKey("tasks.id", ondelete="CASCADE"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("created_at", Time, nullable=False),
    Column("change", Text, nullable=False),
    Column("num_demonstrations", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("labels", Json),
    Column("num_tokens", Integer),
    Column("num_shots", Integer),
    Column("num_dropped", Integer, nullable=False),
    Column("answers", Json),
    # The model that compiled it last; NULL for a version that was never ready.
    Column("model", Text),
    Column("problem", Json),
)

# Content of a demonstration from one version on, until another version, in which it was corrected or removed.
# Version v consists of what was written in versions up to v and not ended by then: nothing is ever overwritten.
demonstrations = Table(
    "demonstrations",
    metadata,
    Column("task_id", ForeignKey("tasks.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("from_version", Integer, primary_key=True, autoincrement=False),
    Column("until_version", Integer),
    Column("added_in", Integer, nullable=False),
    Column("place", Integer, nullable=False),
    Column("columns", Json, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("owner", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("task_id", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("options", Json, nullable=False),
    Column("state", Text, nullable=False),
    Column("num_rows", Integer, nullable=False),
    Column("num_done", Integer, nullable=False),
    Column("num_problems", Integer, nullable=False),
    Column("created_at", Time, nullable=False),
    Column("finished_at", Time),
    Column("problem", Json),
    Column("summary", Json),
    # The rows of a job are texts that were sent to the task: they go with it.
    ForeignKeyConstraint(["task_id", "version"], ["versions.task_id", "versions.version"], ondelete="CASCADE"),
    Index(None, "owner", "position"),
    Index(None, "task_id", "version"),
    sqlite_autoincrement=True,
)

job_rows = Table(
    "job_rows",
    metadata,
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("columns", Json, nullable=False),
    Column("result", Json),
)
# Finds the next rows of a long job without going through those that are done.
_is_waiting = job_rows.c.result.is_(None)
Index(
    "ix_job_rows_waiting",
    job_rows.c.job_id,
    job_rows.c.number,
    sqlite_where=_is_waiting,
    postgresql_where=_is_waiting,
)

# What a request with an Idempotency-Key made; written together with it. It refers to no task, so that a request that
# is sent again after its task was deleted does not make the task again.
idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request", Text, nullable=False),
    Column("created_at", Time, nullable=False, index=True),
    Column("task_id", Text),
    Column("version", Integer),
    Column("job_id", Text),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("owner", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("scopes", Json, nullable=False),
    Column("hmac", Text, nullable=False),
    Column("created_at", Time, nullable=False),
    Column("revoked_at", Time),
    Column("requests_per_minute", Integer),
    Column("rows_per_minute", Integer),
    sqlite_autoincrement=True,
)
