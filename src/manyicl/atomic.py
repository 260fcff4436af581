"""Write files and folders atomically: after a kill or a power cut, either the old version or the new one is there."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_ASIDE = ".manyicl-part-"


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object], *, sync: bool = True) -> None:
    """Write a temporary file, wait until it is on the disk, and rename it.

    The temporary file is new for each call, so that two writers do not mix; it is removed if writing fails,
    and remains only after a kill (see `is_leftover`). A link is followed.

    Args:
        path: File to write, in a folder that exists.
        content: Text, written as UTF-8 with the line ends it has; bytes; or a function that writes a file of its own
            to the path it is given, which has the ending of ``path``.
        sync: False does not wait for the disk, which takes up to some ten milliseconds, so that a power cut may leave a
            file cut off: for what is checked when it is read, and can be made again.
    """
    path = path.resolve()
    aside = path.with_name(f"{_ASIDE}{secrets.token_hex(8)}{path.suffix}")
    try:
        aside.touch(exist_ok=False)
        if callable(content):
            content(aside)
        else:
            aside.write_bytes(content.encode() if isinstance(content, str) else content)
        if sync:
            _sync_file(aside)
        replace_file(aside, path)
        if sync:
            sync_folder(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def replace_file(new: Path, path: Path) -> None:
    """Rename a file to ``path``; who may read a file that it replaces may read it, and nobody else."""
    with suppress(FileNotFoundError):
        shutil.copymode(path, new)
    new.replace(path)


@contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """Yield an empty folder next to ``path`` that is renamed to it once its content is on the disk.

    ``path`` must not exist, or be an empty folder; its folder is made. Where filling fails, nothing stays.
    """
    path = path.resolve()
    aside = path.with_name(f"{_ASIDE}{secrets.token_hex(8)}")
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_tree(aside)
        if path.exists():
            path.rmdir()
        aside.rename(path)
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def is_leftover(path: Path) -> bool:
    """Tell whether a file or folder was being written when its process was killed, or still is."""
    return path.name.startswith(_ASIDE)


def sync_tree(folder: Path) -> None:
    """Wait until all files of a folder, and their names, are on the disk."""
    for path in folder.rglob("*"):
        (sync_folder if path.is_dir() else _sync_file)(path)
    sync_folder(folder)


def _sync_file(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
