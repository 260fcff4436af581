"""Checks that a model has passed on this machine are remembered, so that they are not repeated at every start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from manyicl.model.manifest import library_versions
from manyicl.paths import cache_folder

FOLDER = "passed_checks"
# Small files; more than anyone has models.
MOST_REMEMBERED = 2_000


def passed_before(depends_on: Mapping[str, object], check: Callable[[], None]) -> None:
    """Run a check unless it has passed before with everything the same; only what has passed is remembered.

    Versions of the libraries and the source of the package's own network code are always part of what it depends
    on. A cache folder that cannot be written is no error: the check is then run every time.

    Args:
        depends_on: What decides the outcome, as JSON values.
        check: Raises if it fails.
    """
    mark = cache_folder() / FOLDER / key_of(depends_on)
    with suppress(OSError):
        if mark.is_file():
            return
    check()
    with suppress(OSError):
        mark.parent.mkdir(parents=True, exist_ok=True)
        make_room(mark.parent)
        mark.touch()


def key_of(depends_on: Mapping[str, object]) -> str:
    """Hash JSON values together with the versions of the libraries and the source of the package's network code."""
    everything = {**depends_on, "versions": library_versions(), "source": _source_hash()}
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=_as_json).encode()).hexdigest()


def make_room(folder: Path) -> None:
    """Remove the oldest files of a folder until it has room for one more.

    Raises:
        OSError: If one cannot be removed, as where another process has just done so.
    """
    known = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)
    for oldest in known[: max(0, len(known) - MOST_REMEMBERED + 1)]:
        oldest.unlink()


def _as_json(value: object) -> object:
    """Write what JSON has no form for; a set in an order of its own, since Python's changes from process to process."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


@lru_cache(maxsize=1)
def _source_hash() -> str:
    """Hash the modules of this folder, which hold attention and continuation."""
    digest = hashlib.sha256()
    for module in sorted(files("manyicl.model").iterdir(), key=lambda module: module.name):
        if module.name.endswith(".py"):
            digest.update(module.read_bytes())
    return digest.hexdigest()
