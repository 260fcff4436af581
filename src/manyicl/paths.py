"""Paths given by a user (home folder, existence, nearest existing name), their content, and the cache folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import platformdirs

from manyicl.errors import UserError, did_you_mean, quoted, shortened
from manyicl.library_errors import reason

CACHE_VARIABLE = "MANYICL_CACHE"


def cache_folder() -> Path:
    """Return where files are kept that can be made again: ``MANYICL_CACHE``, or this system's folder for such files."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("manyicl")


def sha256_of_file(path: Path) -> str:
    """Hash the content of a file, SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def required_path(value: str | Path, what: str) -> Path:
    """Return a path that a caller gave, or refuse what is none, such as None; ``what`` is what it should name."""
    if not isinstance(cast(object, value), str | Path):
        raise UserError("not_a_path", f"this names no {what}", expected="a path", found=quoted(value))
    return Path(value)


def expanded(written: str | Path) -> str:
    """Put the home folder in place of ``~`` at the beginning of a path, which a shell does only outside of quotes."""
    return os.path.expanduser(written)  # noqa: PTH111


def exists(path: Path) -> bool:
    """Tell whether there is something at a path that a user wrote.

    Raises:
        UserError: If it cannot be looked for: its name is too long, or a folder above it may not be entered.
    """
    try:
        return path.exists()
    except OSError as error:
        what = f"cannot be looked for, {reason(error)}"
        raise UserError("bad_path", what, expected="the path of a file", file=shortened(str(path))) from error


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files in a folder and in all folders in it, in order; links are followed, each folder is read once.

    Raises:
        UserError: If one of them cannot be read.
    """

    def refuse(error: OSError) -> None:
        what, remedy = f"the folder cannot be read, {reason(error)}", "Allow it, or move the folder away."
        raise UserError("unreadable_folder", what, remedy=remedy, file=str(error.filename)) from error

    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place, name) for name in sorted(names))


def nearest_path(path: Path) -> str:
    """Return ``" Did you mean '…'?"`` for the first part of a path that does not exist, or an empty string.

    Of a link that leads nowhere, or round in a circle, it returns that.
    """
    existing = path
    missing = path.name
    while not existing.is_dir() and existing != existing.parent:
        missing = existing.name
        existing = existing.parent
    if (existing / missing).is_symlink():
        return f" {existing / missing} is a link that leads nowhere."
    if (existing / missing).exists():
        return ""
    return did_you_mean(missing, sorted(entry.name for entry in existing.iterdir()))
