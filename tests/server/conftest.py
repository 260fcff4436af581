"""Databases for the tests of the server: SQLite in a temporary folder, and PostgreSQL where it is asked for."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from manyicl.server.database import Database
from tests.server.postgresql import running_postgresql


@pytest.fixture(name="postgresql", scope="session")
def _postgresql() -> Iterator[str]:
    """URL of a server, with `{name}` in the place of a database."""
    with running_postgresql() as url:
        yield url


@pytest.fixture(name="database_url", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.server)])
def _database_url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """URL of an empty database; None for SQLite."""
    if request.param == "sqlite":
        yield None
        return
    server: str = request.getfixturevalue("postgresql")
    name = f"test_{secrets.token_hex(6)}"
    engine = create_engine(server.format(name="postgres").replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
        yield server.format(name=name)
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(name="database")
def _database(tmp_path: Path, database_url: str | None) -> Iterator[Database]:
    opened = Database.open(tmp_path / "data", database_url)
    (tmp_path / "data").mkdir(exist_ok=True)
    yield opened
    opened.close()
