"""Fingerprints of weights that were just read from files are remembered, so that they are not taken at every start.

What is remembered counts only while place, size and times of every file in the model's folder are as they were, and so
are the versions of the libraries and this package's own network code. Of weights in memory nothing is remembered.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from manyicl.atomic import write_atomically
from manyicl.model.passed_checks import key_of, make_room
from manyicl.paths import cache_folder

FOLDER = "fingerprints"
# A file that was written so shortly before it was looked at may be written once more without another time.
SECONDS_UNTIL_SETTLED = 3.0


class _FileState(NamedTuple):
    """What changes when a file is written again, or another one takes its place."""

    name: str
    num_bytes: int
    modified_ns: int
    changed_ns: int
    number: int


@dataclass(frozen=True)
class Origin:
    """All that decides the values of weights that were just read, but for versions.

    Attributes:
        folders: Folders that they were read from, and the files in them as they were before.
        steps: What was done with these files, in order.
        looked_at: Time at which the first file was looked at, in seconds.
    """

    folders: tuple[tuple[Path, tuple[_FileState, ...]], ...]
    steps: tuple[str, ...]
    looked_at: float

    @classmethod
    def of(cls, folder: str | Path, step: str) -> Origin | None:
        """Look at a folder from which weights are about to be read; None where they may come from elsewhere, too."""
        looked_at = time.time()
        files = _files_in(Path(folder))
        return None if files is None else cls(((Path(folder).resolve(), files),), (step,), looked_at)

    def then(self, step: str) -> Origin:
        """Return the origin of these weights after another step."""
        return replace(self, steps=(*self.steps, step))

    def with_adapter(self, adapter: Origin) -> Origin:
        """Return the origin of an adapter over these weights."""
        folders, steps = (*self.folders, *adapter.folders), (*self.steps, *adapter.steps)
        return Origin(folders, steps, min(self.looked_at, adapter.looked_at))

    @property
    def key(self) -> str:
        """Hash of it and of the versions."""
        return key_of({"folders": self.folders, "steps": self.steps})

    def is_unchanged(self) -> bool:
        """Tell whether all files are as they were."""
        return all(_files_in(folder) == files for folder, files in self.folders)

    def is_settled(self) -> bool:
        """Tell whether any later change of a file is sure to change its times."""
        newest = max(max(one.modified_ns, one.changed_ns) for _, files in self.folders for one in files)
        return newest / 1e9 < self.looked_at - SECONDS_UNTIL_SETTLED


def remembered_fingerprint(origin: Origin | None, take: Callable[[], str]) -> str:
    """Return the fingerprint of weights that were just read, from the cache folder if it is known.

    A cache folder that is damaged or cannot be written costs time and nothing else.

    Args:
        origin: Where they come from; None where that is not known, so that nothing is remembered.
        take: Takes it from the weights themselves.
    """
    # A file that was changed while it was read may be in memory in part.
    if origin is None or not origin.is_unchanged():
        return take()
    key = origin.key
    file = cache_folder() / FOLDER / key
    if (known := _read(file, key)) is not None:
        return known
    found = take()
    if origin.is_settled() and origin.is_unchanged():
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            make_room(file.parent)
            write_atomically(file, _written(key, found), sync=False)
    return found


def _read(file: Path, key: str) -> str | None:
    """Read a fingerprint; None where there is none, or not all of it is as it was written."""
    with suppress(OSError):
        content = file.read_bytes()
        found = content.partition(b"\n")[0].decode("ascii", errors="replace")
        return found if content == _written(key, found) else None
    return None


def _written(key: str, fingerprint: str) -> bytes:
    """Return the content of a file: the fingerprint, and a hash of it and of the file's name."""
    return f"{fingerprint}\n{hashlib.sha256(f'{key} {fingerprint}'.encode()).hexdigest()}\n".encode()


def _files_in(folder: Path) -> tuple[_FileState, ...] | None:
    """Look at the files of a model's folder; None where it is none, or names weights that are not right in it."""
    try:
        if not folder.is_dir() or _names_weights_elsewhere(folder):
            return None
        return tuple(_state_of(path) for path in sorted(folder.iterdir()) if path.is_file()) or None
    except (OSError, ValueError, TypeError, AttributeError):
        # Broken files are refused, with their names, where they are read.
        return None


def _state_of(path: Path) -> _FileState:
    # Of a link, what it leads to.
    found = path.stat()
    return _FileState(path.name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def _names_weights_elsewhere(folder: Path) -> bool:
    """Tell whether an index names a file in another folder, or config.json names its weights itself."""
    indices = (json.loads(index.read_bytes()) for index in folder.glob("*.index.json"))
    if any(Path(name).name != name for index in indices for name in index["weight_map"].values()):
        return True
    config = folder / "config.json"
    return config.is_file() and "transformers_weights" in json.loads(config.read_bytes())
