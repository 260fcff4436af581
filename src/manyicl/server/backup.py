"""Back up the data folder of a server while it runs, and make a data folder of a backup.

A backup holds the database and the secret of the API keys. Prefixes are not in it: they are made again when missing.
"""

from __future__ import annotations

import sqlite3
import tarfile
import tempfile
import zlib
from contextlib import closing
from pathlib import Path

from manyicl.atomic import sync_tree, write_atomically
from manyicl.errors import MachineError, UserError
from manyicl.library_errors import reason
from manyicl.outputs import require_output_file
from manyicl.server.database import (
    FILE_NAME,
    HMAC_FILE_NAME,
    Database,
    data_folder,
    give_to_owner_of_folder,
    sqlite_connection,
)

# What is damaged may be no text, in the messages of SQLite, too.
_UNREADABLE = (sqlite3.Error, UnicodeDecodeError)


def backup(data: Path, url: str | None, archive: Path) -> int:
    """Write a state of the database, whole and of one moment, to a new archive that its user alone can read.

    Args:
        data: Data folder; a server may be running on it.
        url: URL of PostgreSQL, which is refused: it has tools of its own.
        archive: File to write, such as ``monday.tar.gz``.

    Returns:
        Number of tasks in it.

    Raises:
        UserError: If there is no database, it is in PostgreSQL, or the archive would replace a file.
        MachineError: If the database is damaged.
    """
    if url is not None:
        remedy = f"Use `pg_dump --format=custom`, and keep a copy of {data / HMAC_FILE_NAME} with the dump."
        raise UserError("backup_of_postgresql", "PostgreSQL is backed up by its own tools", remedy=remedy)
    require_output_file(archive)
    if not (data / FILE_NAME).is_file():
        what = "there is no database"
        raise UserError("database_missing", what, remedy="Check the data folder.", file=data / FILE_NAME)
    with tempfile.TemporaryDirectory(prefix=".manyicl-backup-", dir=archive.absolute().parent) as folder:
        copy = Path(folder) / FILE_NAME
        num_tasks = _copy_database(data / FILE_NAME, copy)
        files = [path for path in (copy, data / HMAC_FILE_NAME) if path.is_file()]
        write_atomically(archive, lambda path: _write_archive(path, files))
    return num_tasks


def restore(archive: Path, data: Path) -> int:
    """Make a data folder of a backup, and bring its tables to this version of the program.

    Args:
        archive: What `backup` wrote.
        data: Folder without a database; it is made.

    Returns:
        Number of tasks in it.

    Raises:
        UserError: If the archive is no backup, is damaged or of a newer version, or the folder holds a database or is
            in use.
    """
    with data_folder(data), tempfile.TemporaryDirectory(prefix=".manyicl-restore-", dir=data) as folder:
        _require_empty(data)
        _read_archive(archive, Path(folder))
        num_tasks = _num_tasks_in(Path(folder) / FILE_NAME, archive)
        Database.open(Path(folder)).close()
        sync_tree(Path(folder))
        # The database last: a folder without one is restored into again after a kill.
        for name in (HMAC_FILE_NAME, FILE_NAME):
            if (Path(folder) / name).exists():
                (Path(folder) / name).rename(data / name)
                give_to_owner_of_folder(data / name)
        sync_tree(data)
    return num_tasks


def has_keys_without_secret(data: Path) -> bool:
    """Tell whether a data folder has API keys, and not the file without which none of them is valid."""
    if (data / HMAC_FILE_NAME).exists():
        return False
    with closing(sqlite_connection(data / FILE_NAME)) as connection:
        (num_keys,) = connection.execute("SELECT count(*) FROM api_keys").fetchone()
    return int(num_keys) > 0


def _copy_database(source: Path, target: Path) -> int:
    try:
        target.touch(mode=0o600)
        with closing(sqlite_connection(source)) as reader, closing(sqlite_connection(target)) as writer:
            reader.backup(writer)
            return _checked(writer, source)
    except _UNREADABLE as error:
        raise MachineError(f"The database {source} cannot be backed up: {reason(error)}.") from error


def _checked(connection: sqlite3.Connection, file: Path) -> int:
    """Return the number of tasks of a database that is whole.

    Raises:
        MachineError: If it is damaged.
    """
    for check in ("integrity_check", "foreign_key_check"):
        found = [row for row in connection.execute(f"PRAGMA {check}") if row != ("ok",)]
        if found:
            raise MachineError(f"The database in {file} is damaged ({check}: {len(found)} problems).")
    (num_tasks,) = connection.execute("SELECT count(*) FROM tasks").fetchone()
    return int(num_tasks)


def _num_tasks_in(database: Path, archive: Path) -> int:
    try:
        with closing(sqlite_connection(database)) as connection:
            return _checked(connection, archive)
    except _UNREADABLE as error:
        what = f"this is no backup: its database cannot be read ({reason(error)})"
        raise UserError("no_backup", what, file=archive) from error


def _write_archive(path: Path, files: list[Path]) -> None:
    path.chmod(0o600)
    with tarfile.open(path, "w:gz") as archive:
        for file in files:
            archive.add(file, file.name)


def _require_empty(data: Path) -> None:
    found = sorted(path.name for path in data.glob(f"{FILE_NAME}*"))
    if found:
        remedy = "Restore into a new folder, and start the server with that one."
        raise UserError("data_not_empty", f"the data folder holds {found[0]}", remedy=remedy, file=data)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write one file of an archive.

    Raises:
        MachineError: If it cannot be written, which says nothing of the archive.
    """
    content = tar.extractfile(member)
    assert content is not None, "a regular file has one"
    path.unlink(missing_ok=True)
    while block := content.read(2**20):
        try:
            path.touch(mode=0o600)
            with path.open("ab") as file:
                file.write(block)
        except OSError as error:
            raise MachineError(f"{path.parent.parent} cannot be written: {reason(error)}.") from error


def _read_archive(archive: Path, folder: Path) -> None:
    """Extract the two files of a backup, whatever else an archive may hold.

    Raises:
        UserError: If it is no backup.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for name in (FILE_NAME, HMAC_FILE_NAME):
                for member in tar.getmembers():
                    if member.name == name and member.isreg():
                        _extract(tar, member, folder / name)
    except FileNotFoundError:
        raise UserError("file_missing", "there is no such file", file=archive) from None
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError("no_backup", f"this is no whole backup: {reason(error)}", file=archive) from error
    if not (folder / FILE_NAME).is_file():
        raise UserError("no_backup", "this is no backup: it holds no database", file=archive)
