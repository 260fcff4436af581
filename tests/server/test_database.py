"""The database itself: settings, migrations, one state for readers, and what fails."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event, text

from manyicl.errors import MachineError, UserError
from manyicl.server import database as module
from manyicl.server.database import (
    FILE_NAME,
    HMAC_FILE_NAME,
    LOCK_NAME,
    PRAGMAS,
    Database,
    data_folder,
    sqlite_connection,
)
from manyicl.server.records import TaskSettings
from manyicl.server.tables import metadata
from manyicl.server.task_store import TaskStore

FULL = r"full|I/O"
ROWS = [{"text": "Card declined", "label": "billing"}]


def create(database: Database, name: str = "tickets") -> None:
    TaskStore(database).create("ann", name, {}, TaskSettings(), ROWS, None)


def test_the_migrations_make_the_tables_that_the_program_uses(database: Database) -> None:
    with database.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_opening_again_changes_nothing_and_keeps_what_was_written(tmp_path: Path, database_url: str | None) -> None:
    for _ in range(2):
        database = Database.open(tmp_path, database_url)
        store = TaskStore(database)
        if not store.page("ann", 10)[0]:
            create(database)
        assert store.get("ann", "tickets").revision == 1
        database.close()


def test_every_connection_to_sqlite_has_the_settings_on_which_durability_rests(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    with database.reading() as first, database.reading() as second:
        for connection in (first, second):
            found = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one() for name in PRAGMAS}
            assert found == {name: expected for name, (_, expected) in PRAGMAS.items()}
    database.close()


def test_a_setting_that_does_not_take_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.PRAGMAS, "no_such_setting", ("on", 1))
    with pytest.raises(MachineError, match="no_such_setting"):
        Database.open(tmp_path)


def test_a_reader_sees_one_state_while_others_write(database: Database) -> None:
    count = text("SELECT count(*) FROM tasks")
    with database.reading() as connection:
        assert connection.execute(count).scalar_one() == 0
        create(database)
        assert connection.execute(count).scalar_one() == 0
    with database.reading() as connection:
        assert connection.execute(count).scalar_one() == 1


def test_a_write_that_an_error_interrupts_leaves_nothing(database: Database) -> None:
    def fail_half_way() -> None:
        with database.writing() as connection:
            connection.execute(text("DELETE FROM tasks"))
            raise UserError("code", "no")

    create(database)
    with pytest.raises(UserError):
        fail_half_way()
    assert len(TaskStore(database).page("ann", 10)[0]) == 1


def test_a_folder_serves_one_server(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with data_folder(data):
        assert stat.S_IMODE(data.stat().st_mode) == 0o700
        program = "import sys, pathlib; from manyicl.server.database import data_folder\n"
        program += "with data_folder(pathlib.Path(sys.argv[1])): pass"
        second = subprocess.run([sys.executable, "-c", program, data], capture_output=True, text=True, check=False)
        assert "data_in_use" in second.stderr
        with pytest.raises(UserError) as error, data_folder(data):
            pass
        assert error.value.code == "data_in_use"
    with data_folder(data):
        pass


def test_a_database_serves_one_server(tmp_path: Path, database: Database, database_url: str | None) -> None:
    if database_url is None:
        with database.serving():
            create(database)
        return
    second = Database.open(tmp_path, database_url)
    with database.serving():
        create(database)
        create(second, "by another command")
        with pytest.raises(UserError) as error, second.serving():
            pass
        assert error.value.code == "data_in_use"
    with second.serving():
        pass
    second.close()


def test_a_file_in_the_place_of_the_data_folder_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error, data_folder(tmp_path / "file"):
        pass
    assert error.value.code == "data_not_writable"


def test_files_of_the_database_are_readable_by_its_user_alone(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    create(database)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob(f"{FILE_NAME}*")}
    assert modes == {FILE_NAME: 0o600, f"{FILE_NAME}-wal": 0o600, f"{FILE_NAME}-shm": 0o600}
    database.close()


@pytest.mark.parametrize("is_replaced", [False, True])
def test_nothing_is_written_to_a_database_file_that_is_gone(tmp_path: Path, *, is_replaced: bool) -> None:
    database = Database.open(tmp_path)
    create(database)
    (tmp_path / FILE_NAME).rename(tmp_path / "elsewhere")
    if is_replaced:
        (tmp_path / FILE_NAME).touch()
    with pytest.raises(MachineError, match="is gone or was replaced"):
        create(database, "other")
    with pytest.raises(MachineError, match="is gone or was replaced"):
        TaskStore(database).get("ann", "tickets")
    database.close()


def test_nothing_is_written_to_a_database_file_that_was_cut_off(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    create(database)
    file = tmp_path / FILE_NAME
    num_bytes = file.stat().st_size
    os.truncate(file, num_bytes // 2)
    for _ in range(2):
        with pytest.raises(MachineError, match="cut off"):
            create(database, "other")
    os.truncate(file, num_bytes)  # what was cut off is empty, which nothing here reads
    database.close()


@pytest.mark.parametrize("content", [b"x" * 5_000, b"SQLite format 3\0" + b"x" * 5_000])
def test_a_damaged_database_is_refused_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(UserError, match="manyicl restore") as error:
        Database.open(tmp_path)
    assert error.value.code == "database_unavailable"


def test_a_full_disk_fails_a_write_whole_and_later_ones_succeed(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    create(database)
    with database.reading() as connection:
        num_pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    database._engine.dispose()
    # The connections that follow may not let the file grow, which SQLite reports as a full disk.
    event.listen(database._engine, "connect", lambda connection, _: limit(connection, num_pages))
    rows = [{"text": "x" * 100_000}]
    with pytest.raises(MachineError, match="full"):
        TaskStore(database).create("ann", "large", {}, TaskSettings(), rows, None)
    database.close()
    database = Database.open(tmp_path)
    assert [task.name for task in TaskStore(database).page("ann", 10)[0]] == ["tickets"]
    TaskStore(database).create("ann", "large", {}, TaskSettings(), rows, None)
    database.close()


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_on_a_disk_that_is_really_full_what_was_acknowledged_is_kept(small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(500_000))
    database = Database.open(small_disk / "data")
    store = TaskStore(database)
    rows = [{"text": "x" * 30_000}]
    number = number_until_full(store, rows)
    for _ in range(3):
        with pytest.raises(MachineError, match=FULL):
            store.create("ann", "no", {}, TaskSettings(), rows * 20, None)
    assert len(store.page("ann", 100)[0]) == number > 5
    (small_disk / "other").unlink()
    store.create("ann", f"task{number}", {}, TaskSettings(), rows, None)
    database.close()
    database = Database.open(small_disk / "data")
    kept = TaskStore(database).page("ann", 100)[0]
    assert [task.name for task in kept] == [f"task{one}" for one in range(number + 1)]
    assert [TaskStore(database).demonstrations(task.newest.key)[0].columns for task in kept] == rows * (number + 1)
    database.close()


def number_until_full(store: TaskStore, rows: list[dict[str, str]]) -> int:
    """Make tasks until one fails, and return how many were acknowledged."""
    for number in range(1_000):
        try:
            store.create("ann", f"task{number}", {}, TaskSettings(), rows, None)
        except MachineError:
            return number
    raise AssertionError("the disk is never full")


def limit(connection: sqlite3.Connection, num_pages: int) -> None:
    connection.execute(f"PRAGMA max_page_count = {num_pages}")


def test_a_message_of_the_database_holds_no_text_of_a_row(tmp_path: Path) -> None:
    database = Database.open(tmp_path)
    with database.writing() as connection:
        connection.exec_driver_sql("DROP TABLE demonstrations")
    with pytest.raises(MachineError) as error:
        create(database)
    assert "declined" not in str(error.value)
    assert "declined" not in str(error.value.__cause__)
    database.close()


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"x" * 5_000])
def test_a_damaged_file_is_not_taken_for_a_database(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(UserError) as error:
        Database.open(tmp_path)
    assert error.value.code == "database_unavailable"
    assert (tmp_path / FILE_NAME).read_bytes() == content


@pytest.mark.parametrize("left", [HMAC_FILE_NAME, f"{FILE_NAME}-wal"])
def test_a_lost_database_is_not_replaced_by_an_empty_one(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_bytes(b"x")
    with pytest.raises(UserError) as error:
        Database.open(tmp_path)
    assert error.value.code == "database_missing"
    assert not (tmp_path / FILE_NAME).exists()


def test_a_database_that_must_exist_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Database.open(tmp_path / "none", must_exist=True)
    assert error.value.code == "database_missing"
    assert not (tmp_path / "none").exists()


def test_a_database_of_a_later_version_is_refused(tmp_path: Path) -> None:
    Database.open(tmp_path).close()
    connection = sqlite_connection(tmp_path / FILE_NAME)
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(UserError) as error:
        Database.open(tmp_path)
    assert error.value.code == "database_version"


@pytest.mark.parametrize(
    "url", ["", "no url", "mysql://host/name", "sqlite:///file", "postgresql://u:secret@host:x/name"]
)
def test_a_url_that_is_none_of_postgresql_is_refused_without_its_password(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError) as error:
        Database.open(tmp_path, url)
    assert error.value.code == "wrong_database_url"
    assert "secret" not in str(error.value)


def test_a_postgresql_server_that_is_not_there_is_named_without_a_password(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Database.open(tmp_path, f"postgresql://ann:secret@/name?host={tmp_path}")
    assert error.value.code == "database_unavailable"
    assert "secret" not in str(error.value)


def test_a_folder_with_characters_that_urls_use_is_no_problem(tmp_path: Path) -> None:
    folder = tmp_path / "50% of #1? é"
    database = Database.open(folder)
    create(database)
    database.close()
    assert (folder / FILE_NAME).is_file()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_database_that_is_closed_is_neither_read_nor_written(tmp_path: Path) -> None:
    with data_folder(tmp_path) as data:
        database = Database.open(data)
        database.close()
    with pytest.raises(MachineError, match="is closed"), database.writing():
        pass
    with pytest.raises(MachineError, match="is closed"), database.reading():
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK_NAME, FILE_NAME]
