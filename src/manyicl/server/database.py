"""The database of a server: SQLite in its data folder, or PostgreSQL by URL. What is committed survives a kill."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import filelock
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, QueuePool, create_engine, event, func, make_url, select
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from manyicl.errors import MachineError, UserError, shortened
from manyicl.library_errors import reason

FILE_NAME = "manyicl.sqlite"
LOCK_NAME = ".lock"
# The secret of the HMACs of API keys; see `keys`.
HMAC_FILE_NAME = "hmac.key"
# How long a statement waits for another process that writes, such as `manyicl keys`.
WAIT_SECONDS = 30
# How long the write-ahead log waits for readers before deleted texts are taken out of it with the next write.
TRUNCATE_WAIT_SECONDS = 1.0
MOST_CONNECTIONS = 32
# What every connection to SQLite sets, and how it reads afterwards.
PRAGMAS = {
    "journal_mode": ("wal", "wal"),
    "synchronous": ("full", 2),  # a commit is on the disk when it returns
    "foreign_keys": ("on", 1),
    "secure_delete": ("on", 1),  # overwrites what is deleted
    "temp_store": ("memory", 2),  # no texts in temporary files
    "busy_timeout": (WAIT_SECONDS * 1000, WAIT_SECONDS * 1000),
    "journal_size_limit": (64 * 2**20, 64 * 2**20),
}
# Any number, the same in all versions of this program: writes to PostgreSQL take this lock, one at a time as in SQLite.
_ADVISORY_LOCK = 0x6D616E79
_SERVER_LOCK = _ADVISORY_LOCK + 1
_POSTGRESQL_SETTINGS = ("synchronous_commit = on", f"lock_timeout = '{WAIT_SECONDS}s'", "timezone = 'UTC'")
_logger = logging.getLogger(__name__)
_MIGRATIONS = Path(__file__).parent / "migrations"


@contextmanager
def data_folder(data: Path) -> Iterator[Path]:
    """Make the data folder of a server, readable by its user alone, and keep it from a second server.

    Raises:
        UserError: If another process serves it, or it cannot be made.
    """
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = filelock.FileLock(data / LOCK_NAME, timeout=0, mode=0o600)
        lock.acquire()
    except filelock.Timeout:
        remedy = "Stop it first, or take another folder."
        raise UserError("data_in_use", "another process uses this data folder", remedy=remedy, file=data) from None
    except OSError as error:
        raise UserError("data_not_writable", f"the data folder cannot be used: {reason(error)}", file=data) from None
    try:
        yield data
    finally:
        lock.release()


class Database:
    """Connections to the tables, in transactions that read one state, or write one after another."""

    def __init__(self, engine: Engine, file: Path | None) -> None:
        """Wrap an engine; see `open`.

        Args:
            engine: Engine whose connections are set up.
            file: File of SQLite; None for PostgreSQL.
        """
        self._engine = engine
        self._file = file
        self._file_number, self._num_bytes = _number_and_bytes(file)
        # SQLite lets waiting writers poll, so that one may wait long while others pass; in a process they queue here.
        self._writer = threading.Lock()
        self._holds_deleted = False
        self._is_closed = False

    @classmethod
    def open(cls, data: Path, url: str | None = None, *, must_exist: bool = False) -> Database:
        """Open the database, make it where there is none, and bring its tables to this version of the program.

        Args:
            data: Data folder, which holds the database file of SQLite.
            url: ``postgresql://user@host/name`` for PostgreSQL instead.
            must_exist: Refuses a data folder without a database file.

        Raises:
            UserError: If the URL is wrong, the database cannot be reached, is lost or newer than this program.
            MachineError: If SQLite does not take the settings on which durability rests.
        """
        if url is not None:
            database = cls(_postgresql_engine(url), None)
        else:
            file = data / FILE_NAME
            _make_file(file, must_exist=must_exist)
            database = cls(_sqlite_engine(file), file)
        try:
            database._migrate()
            database.take_out_deleted()
        except BaseException:
            database._engine.dispose()
            raise
        return database

    @property
    def is_sqlite(self) -> bool:
        """Whether it is a file."""
        return self._file is not None

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection that sees one state of the database throughout, and does not wait for writers.

        Raises:
            MachineError: If the database fails.
        """
        options: dict[str, Any] = {}
        if not self.is_sqlite:
            options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with _failures_named():
            self._require_open()
            self._require_file()
            with self._engine.connect() as connection:
                connection = connection.execution_options(**options)
                with connection.begin():
                    yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """Yield a connection that alone writes; what it wrote is on the disk afterwards, or nothing after an error.

        Raises:
            MachineError: If the database fails, or its file is gone: writes to a deleted file would be lost.
        """
        with _failures_named(), self._writer:
            self._require_open()
            self._require_file()
            with self._engine.connect() as connection:
                connection = connection.execution_options(is_writing=True)
                with connection.begin():
                    if not self.is_sqlite:
                        connection.execute(select(func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
                    yield connection
            self._require_file()
            if self._holds_deleted:
                self._truncate_log()

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Keep a database of PostgreSQL from a second server; a file is kept from it by `data_folder`.

        Raises:
            UserError: If another server uses the database.
        """
        if self.is_sqlite:
            yield
            return
        with _failures_named(), self._engine.connect() as connection:
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            # Held by this connection until it ends, with the process at the latest.
            if not connection.execute(select(func.pg_try_advisory_lock(_SERVER_LOCK))).scalar_one():
                what, remedy = "another server uses this database", "Stop it first, or take another database."
                raise UserError("data_in_use", what, remedy=remedy)
            try:
                yield
            finally:
                connection.invalidate()

    def take_out_deleted(self) -> None:
        """Take texts that were deleted out of the write-ahead log of SQLite.

        Where a reader needs the log for longer than a second, this is done after the next write, or at the next start.
        """
        if self.is_sqlite:
            with self._writer:
                self._require_open()
                self._truncate_log()

    def close(self) -> None:
        """Close all connections, the last of which empties the write-ahead log; nothing is read or written afterwards.

        A request may still be at work when a server has no more time for it; another server may use the database then.
        """
        with self._writer:
            self._is_closed = True
            self._engine.dispose()

    def _require_open(self) -> None:
        if self._is_closed:
            raise MachineError("The database is closed, as the server has stopped.")

    def _truncate_log(self) -> None:
        """Empty the write-ahead log; what was written before is durable, whether that succeeds or not."""
        try:
            with self._engine.connect() as connection:
                cursor = connection.connection.cursor()
                cursor.execute(f"PRAGMA busy_timeout = {round(TRUNCATE_WAIT_SECONDS * 1000)}")
                try:
                    is_busy = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
                finally:
                    # The connection goes back to those that others use.
                    cursor.execute(f"PRAGMA busy_timeout = {WAIT_SECONDS * 1000}")
                    cursor.close()
        except (DBAPIError, PoolTimeoutError, sqlite3.Error) as error:
            _logger.warning("The write-ahead log was not emptied, and may hold deleted texts: %s", reason(error))
            is_busy = True
        self._holds_deleted = bool(is_busy)

    def _require_file(self) -> None:
        """Refuse to go on where the file was deleted, replaced or cut off: SQLite would write on, and all be lost."""
        if self._file is None:
            return
        known_bytes = self._num_bytes  # read first, as another thread may see the file grow meanwhile; it never shrinks
        number, num_bytes = _number_and_bytes(self._file)
        if number != self._file_number or num_bytes < known_bytes:
            sentence = "is gone or was replaced or cut off. Stop the server, restore a backup (`manyicl restore`)"
            raise MachineError(f"The database file {self._file} {sentence} and start it.")
        self._num_bytes = num_bytes

    def _migrate(self) -> None:
        """Run the migrations in one transaction that excludes other writers."""
        config = Config(attributes={})
        config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
        config.set_main_option("path_separator", "os")
        with _failures_named(is_start=True), self._engine.connect() as connection:
            connection = connection.execution_options(is_writing=True)
            if self.is_sqlite:
                # A migration that makes a table anew drops the old one, which would delete what refers to its rows.
                # This connection is not used again.
                connection.detach()
                connection.connection.cursor().execute("PRAGMA foreign_keys = off")
            with connection.begin():
                if not self.is_sqlite:
                    connection.execute(select(func.pg_advisory_xact_lock(_ADVISORY_LOCK)))
                config.attributes["connection"] = connection
                is_changed = _upgrade(config, connection, self._file)
                if is_changed and self.is_sqlite and connection.exec_driver_sql("PRAGMA foreign_key_check").first():
                    raise MachineError(f"The new tables of {self._file} do not fit together; nothing was changed.")


def _upgrade(config: Config, connection: Connection, file: Path | None) -> bool:
    """Run the migrations that the database has not seen, and tell whether there were any."""
    newest = ScriptDirectory.from_config(config).get_current_head()
    if MigrationContext.configure(connection).get_current_revision() == newest:
        return False
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        what = f"the database is of another version of this program: {reason(error)}"
        remedy = "Install the newest version of manyicl that has served it."
        raise UserError("database_version", what, remedy=remedy, file=file) from error
    return True


# A full disk, and one that fails: nothing that the user wrote is wrong.
_MACHINE_CODES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM)


@contextmanager
def _failures_named(*, is_start: bool = False) -> Iterator[None]:
    """Turn a failure of the database into a sentence without the texts of rows; mistakes of ours stay what they are."""
    try:
        yield
    except (IntegrityError, ProgrammingError):
        raise
    except DBAPIError as error:
        sentence = shortened(" ".join(str(error.orig).split()))
        if is_start and getattr(error.orig, "sqlite_errorcode", None) not in _MACHINE_CODES:
            is_damaged = type(error.orig) is sqlite3.DatabaseError
            remedy = "Restore a backup into a new data folder with `manyicl restore`." if is_damaged else None
            what = f"the database cannot be used: {sentence}"
            raise UserError("database_unavailable", what, remedy=remedy) from error
        raise MachineError(f"The database failed: {sentence}") from error
    except PoolTimeoutError as error:
        raise MachineError("All connections to the database were busy for too long.") from error


def _make_file(file: Path, *, must_exist: bool) -> None:
    """Make an empty database file that its user alone can read; the files that SQLite puts beside it are like it.

    Raises:
        UserError: If a database was there and is lost, or there must be one and is none.
    """
    if file.is_file():
        return
    if file.with_name(HMAC_FILE_NAME).exists() or file.with_name(f"{file.name}-wal").exists():
        what = "the database file is missing, though this folder had one"
        remedy = "Restore a backup into a new folder (`manyicl restore`), or pass the URL of the database."
        raise UserError("database_missing", what, remedy=remedy, file=file)
    if must_exist:
        raise UserError("database_missing", "there is no database", remedy="Check the data folder.", file=file)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))
        give_to_owner_of_folder(file)
    except OSError as error:
        what = f"the database file cannot be made: {reason(error)}"
        raise UserError("data_not_writable", what, file=file) from None


def give_to_owner_of_folder(file: Path) -> None:
    """Let the user of the server read what root makes in its data folder, as with ``sudo manyicl keys create``."""
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        owner = file.parent.stat()
        os.chown(file, owner.st_uid, owner.st_gid)


def _number_and_bytes(file: Path | None) -> tuple[tuple[int, int] | None, int]:
    if file is None:
        return None, 0
    try:
        status = file.stat()
    except OSError:
        return None, 0
    return (status.st_dev, status.st_ino), status.st_size


def sqlite_connection(file: Path) -> sqlite3.Connection:
    """Connect to a database file that exists, without setting anything."""
    name = f"file:{quote(str(file.absolute()))}?mode=rw"  # never makes an empty database in the place of a lost one
    return sqlite3.connect(name, uri=True, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)


def _sqlite_engine(file: Path) -> Engine:
    engine = create_engine(
        "sqlite+pysqlite:///",
        creator=lambda: sqlite_connection(file),
        hide_parameters=True,
        poolclass=QueuePool,
        pool_size=8,
        max_overflow=MOST_CONNECTIONS - 8,
        pool_timeout=WAIT_SECONDS,
    )
    event.listen(engine, "connect", _set_pragmas)
    event.listen(engine, "begin", _begin)
    return engine


def _set_pragmas(connection: Any, _record: object) -> None:
    """Set the pragmas and check that they took: an unknown one, or one without effect here, is no error of SQLite."""
    cursor = connection.cursor()
    for name, (value, expected) in PRAGMAS.items():
        cursor.execute(f"PRAGMA {name} = {value}")
        found = cursor.execute(f"PRAGMA {name}").fetchone()
        if found is None or found[0] != expected:
            connection.close()
            raise MachineError(f"SQLite does not take {name} = {value} here, but {found and found[0]}.")
    cursor.close()


def _begin(connection: Connection) -> None:
    """Begin a transaction; one that will write takes the lock first, as a reader that turns writer fails at once."""
    is_writing = connection.get_execution_options().get("is_writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")


def _postgresql_engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise _wrong_url() from None
    if parsed.get_backend_name() not in ("postgresql", "postgres"):
        raise _wrong_url(parsed)
    try:
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            hide_parameters=True,
            pool_pre_ping=True,
            pool_size=8,
            max_overflow=MOST_CONNECTIONS - 8,
            pool_timeout=WAIT_SECONDS,
            connect_args={"connect_timeout": 10},
        )
    except ImportError as error:
        remedy = 'Run `pip install "manyicl[postgresql]"`.'
        raise UserError("missing_library", "PostgreSQL needs psycopg", remedy=remedy) from error
    event.listen(engine, "connect", _set_up_postgresql)
    return engine


def _set_up_postgresql(connection: Any, _record: object) -> None:
    with connection.cursor() as cursor:
        for setting in _POSTGRESQL_SETTINGS:
            cursor.execute(f"SET {setting}")
    connection.commit()


def _wrong_url(url: URL | None = None) -> UserError:
    found = None if url is None else repr(url.render_as_string(hide_password=True))
    expected = "one such as postgresql://user@host/name"
    return UserError("wrong_database_url", "this is no URL of a PostgreSQL database", expected=expected, found=found)
