"""Backups of a running server, and data folders made of them."""

from __future__ import annotations

import errno
import io
import random
import stat
import tarfile
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from manyicl.errors import MachineError, UserError
from manyicl.server.backup import backup, restore
from manyicl.server.database import FILE_NAME, HMAC_FILE_NAME, LOCK_NAME, Database, data_folder, sqlite_connection
from manyicl.server.keys import KeyStore
from manyicl.server.task_store import TaskStore
from tests.server.simple_store import SimpleStore, apply, random_operations, state_of


@pytest.fixture(name="data")
def _data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def filled(data: Path, num_operations: int = 30) -> SimpleStore:
    """Make a data folder with tasks; return what is in it."""
    database, simple = Database.open(data), SimpleStore()
    for operation in islice(random_operations(3), num_operations):
        apply(TaskStore(database), operation)
        simple.apply(operation)
    database.close()
    return simple


def test_a_restored_backup_holds_all_tasks_and_opens_to_the_same_keys(tmp_path: Path, data: Path) -> None:
    simple = filled(data)
    database = Database.open(data)
    key, _ = KeyStore(database, data).create("ann", "laptop")
    num_tasks = backup(data, None, tmp_path / "b.tar.gz")  # while the database is open
    database.close()
    assert restore(tmp_path / "b.tar.gz", tmp_path / "restored") == num_tasks == len(simple.tasks)
    restored = Database.open(tmp_path / "restored")
    assert state_of(TaskStore(restored)) == simple.state()
    caller = KeyStore(restored, tmp_path / "restored").caller_of(key)
    assert caller is not None
    assert caller.owner == "ann"
    restored.close()
    assert sorted(path.name for path in (tmp_path / "restored").iterdir()) == [LOCK_NAME, HMAC_FILE_NAME, FILE_NAME]


def test_a_backup_taken_during_writes_is_of_one_moment(tmp_path: Path, data: Path) -> None:
    database, simple = Database.open(data), SimpleStore()
    operations = list(islice(random_operations(4), 80))
    thread = threading.Thread(target=lambda: [apply(TaskStore(database), operation) for operation in operations])
    thread.start()
    archives: list[Path] = []
    while thread.is_alive() and len(archives) < 4:
        archives.append(tmp_path / f"{len(archives)}.tar.gz")
        backup(data, None, archives[-1])
    thread.join()
    database.close()
    moments = [simple.state()]
    for operation in operations:
        simple.apply(operation)
        moments.append(simple.state())
    assert archives
    for archive in archives:
        restore(archive, folder := archive.with_suffix(".data"))
        restored = Database.open(folder)
        assert state_of(TaskStore(restored)) in moments
        restored.close()


def test_files_of_a_backup_are_readable_by_their_user_alone_and_nothing_is_left_beside(
    tmp_path: Path, data: Path
) -> None:
    filled(data, 3)
    archive = tmp_path / "b.tar.gz"
    backup(data, None, archive)
    restore(archive, tmp_path / "restored")
    files = [archive, tmp_path / "restored" / FILE_NAME]
    assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600, 0o600]
    assert stat.S_IMODE((tmp_path / "restored").stat().st_mode) == 0o700
    assert sorted(tmp_path.iterdir()) == sorted([archive, data, tmp_path / "restored"])


def test_a_backup_replaces_no_file(tmp_path: Path, data: Path) -> None:
    filled(data, 1)
    (tmp_path / "mine").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError) as error:
        backup(data, None, tmp_path / "mine")
    assert error.value.code == "output_exists"


def test_what_cannot_be_backed_up_is_said(tmp_path: Path, data: Path) -> None:
    with pytest.raises(UserError) as error:
        backup(data, None, tmp_path / "b.tar.gz")
    assert error.value.code == "database_missing"
    with pytest.raises(UserError) as error:
        backup(data, "postgresql://host/name", tmp_path / "b.tar.gz")
    assert error.value.code == "backup_of_postgresql"
    assert "pg_dump" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_damaged_database_makes_no_backup(tmp_path: Path, data: Path) -> None:
    filled(data)
    content = bytearray((data / FILE_NAME).read_bytes())
    rng = random.Random(0)
    for _ in range(400):
        content[rng.randrange(8_192, len(content))] ^= 255
    (data / FILE_NAME).write_bytes(content)
    with pytest.raises(MachineError):
        backup(data, None, tmp_path / "b.tar.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("is_running", [False, True])
def test_a_backup_is_restored_over_no_database(tmp_path: Path, data: Path, *, is_running: bool) -> None:
    simple = filled(data)
    backup(data, None, tmp_path / "b.tar.gz")
    if is_running:
        with data_folder(data), pytest.raises(UserError) as error:
            restore(tmp_path / "b.tar.gz", data)
        assert error.value.code == "data_in_use"
    else:
        with pytest.raises(UserError) as error:
            restore(tmp_path / "b.tar.gz", data)
        assert error.value.code == "data_not_empty"
    database = Database.open(data)
    assert state_of(TaskStore(database)) == simple.state()
    database.close()


def test_a_log_of_another_database_is_not_read_into_a_restored_one(tmp_path: Path, data: Path) -> None:
    filled(data, 3)
    backup(data, None, tmp_path / "b.tar.gz")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / f"{FILE_NAME}-wal").write_bytes(b"of another database")
    with pytest.raises(UserError) as error:
        restore(tmp_path / "b.tar.gz", tmp_path / "other")
    assert error.value.code == "data_not_empty"


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "other", "folder", "link", "damaged"])
def test_what_is_no_backup_is_refused_and_leaves_nothing(tmp_path: Path, data: Path, kind: str) -> None:
    archive = tmp_path / "b.tar.gz"
    filled(data)
    backup(data, None, archive)
    if kind in ("text", "empty"):
        archive.write_text("no archive" if kind == "text" else "", encoding="utf-8")
    elif kind == "cut":
        archive.write_bytes(archive.read_bytes()[:-2_000])
    else:
        with tarfile.open(archive, "w:gz") as tar:
            member = tarfile.TarInfo("../outside" if kind == "other" else FILE_NAME)
            content = b"" if kind in ("folder", "link") else b"x" * 5_000
            types = {"folder": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}
            member.size, member.type, member.linkname = len(content), types.get(kind, tarfile.REGTYPE), "/etc/passwd"
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError) as error:
        restore(archive, tmp_path / "restored")
    assert error.value.code == "no_backup"
    assert [path.name for path in (tmp_path / "restored").iterdir()] == [LOCK_NAME]
    assert not (tmp_path / "outside").exists()


def test_a_full_disk_says_nothing_of_the_backup(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(data)
    backup(data, None, tmp_path / "b.tar.gz")
    opened = Path.open

    def full(path: Path, mode: str = "r", *options: Any, **named: Any) -> Any:
        if mode == "ab":
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, mode, *options, **named)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(MachineError, match="restored cannot be written: no space left on device"):
        restore(tmp_path / "b.tar.gz", tmp_path / "restored")


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        restore(tmp_path / "none", tmp_path / "restored")
    assert error.value.code == "file_missing"


def test_a_backup_of_a_later_version_is_refused(tmp_path: Path, data: Path) -> None:
    filled(data, 1)
    connection = sqlite_connection(data / FILE_NAME)
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    backup(data, None, tmp_path / "b.tar.gz")
    with pytest.raises(UserError) as error:
        restore(tmp_path / "b.tar.gz", tmp_path / "restored")
    assert error.value.code == "database_version"
