"""The cache of converted models on this machine: one folder each, written atomically, usable offline."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from manyicl.atomic import folder_written_atomically, is_leftover
from manyicl.errors import MachineError
from manyicl.library_errors import reason
from manyicl.paths import CACHE_VARIABLE, cache_folder

MB = 1_000_000


def cached_folder(name: str, num_bytes: int, fill: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, filled first where it is not there.

    One process fills at a time and others wait for it. What a killed one left is removed.

    Args:
        name: Name of the folder.
        num_bytes: Most bytes that it takes while it is filled.
        fill: Writes the content into the empty folder that it is given.

    Raises:
        MachineError: If the disk has no space for it, or writing fails; then nothing is kept.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / ".lock"):
            for leftover in filter(is_leftover, folder.parent.iterdir()):
                shutil.rmtree(leftover)
            if not folder.is_dir():
                _require_space(folder.parent, num_bytes)
                with folder_written_atomically(folder) as aside:
                    fill(aside)
    except (OSError, SafetensorError) as error:
        raise MachineError(
            f"The model could not be written to {str(folder.parent)!r}: {reason(error)}. Nothing of it was kept; "
            f"{CACHE_VARIABLE} names another folder."
        ) from error
    return folder


def _require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise MachineError(
            f"The disk of {str(folder)!r} has {free / MB:,.0f} MB free; the model needs {num_bytes / MB:,.0f} MB. "
            f"Nothing was written; {CACHE_VARIABLE} names another folder."
        )
