"""Writing that a kill or a power cut cannot leave half done: first whole and on the disk, then named."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file whose name stands for all of the text, or still for what it held before."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def move_whole(source: Path, target: Path, last: str) -> None:
    """Move what stands in one folder into another, on the same disk; the file named ``last`` arrives last.

    Who finds that file there finds the others whole.
    """
    sync_tree(source)
    for path in sorted(source.iterdir(), key=lambda path: (path.name == last, path.name)):
        place = target / path.name
        if place.is_dir():
            shutil.rmtree(place)
        if path.name == last:
            sync_folder(target)
        path.replace(place)
    sync_folder(target)


def sync_tree(folder: Path) -> None:
    """Wait until all files of a folder are on the disk, and their names."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("r+b") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where its file system can be asked for that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
