"""Tasks whose rows stay in their files: what is known of each is kept on this machine, found by sizes and times.

Loading a task parses, renders and hashes all of its rows. A record of it says what came of that: spec, hash, number of
examples on each side. As long as the files have the sizes and modification times of the record, nothing is read until
an example is needed, and only the rows of the tasks used last are held in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Literal, overload

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from manyicl import __version__
from manyicl.atomic import write_atomically
from manyicl.errors import UserError
from manyicl.paths import cache_folder, expanded
from manyicl.tasks.example import Example
from manyicl.tasks.files import TABLE, load_place, source_files
from manyicl.tasks.spec import TaskSpec
from manyicl.tasks.task import Task

# Raise it when the same files become other examples or another spec.
RULES_VERSION = 5
# Examples of so many rows take about 200 MB.
MOST_EXAMPLES_HELD = 200_000

FileStats = dict[str, tuple[int, int] | None]


class _Record(BaseModel):
    """What loading a task gave, all but the examples.

    Attributes:
        version: Version of manyicl, and of the rules that make examples of rows.
        place: Task file or table, as an absolute path.
        data_root: Second folder of data files.
        files: Path -> size and modification time, in nanoseconds; None for one that was missing.
        spec: Everything about the task except its examples.
        data_hash: Hash of the instruction, the labels and the examples of both sides.
        dropped: Reason -> number of rows dropped when the task was read.
        num_train: Examples of the training side.
        num_test: Examples of the test side.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: tuple[str, int]
    place: str
    data_root: str | None
    files: FileStats
    spec: TaskSpec
    data_hash: str
    dropped: dict[str, int]
    num_train: int
    num_test: int


@dataclass(frozen=True)
class ExamplesInFiles(Sequence[Example]):
    """One side of a task whose rows stay in their files; loaded when an example is needed. Pickles as its location.

    Attributes:
        place: Task file or table, as an absolute path.
        data_root: Second folder of data files.
        data_hash: Hash of the task; the files must still give it.
        side: Which examples.
        positions: Examples of the side that are seen here.
    """

    place: str | Path
    data_root: Path | None
    data_hash: str
    side: Literal["train", "test"]
    positions: range

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, position: int) -> Example: ...
    @overload
    def __getitem__(self, position: slice) -> ExamplesInFiles: ...
    def __getitem__(self, position: int | slice) -> Example | ExamplesInFiles:
        if isinstance(position, slice):
            return replace(self, positions=self.positions[position])
        return self._examples()[self.positions[position]]

    def __iter__(self) -> Iterator[Example]:
        examples = self._examples()
        return (examples[position] for position in self.positions)

    def _examples(self) -> Sequence[Example]:
        task = _HELD.task(self.place, self.data_root, self.data_hash)
        return task.train if self.side == "train" else task.test


class _HeldTasks:
    """The tasks of which rows were used last, up to a number of rows; at least one. Threads may share it."""

    def __init__(self) -> None:
        self._tasks: OrderedDict[tuple[str | Path, Path | None, str], Task] = OrderedDict()
        self._num_examples = 0
        self._lock = Lock()

    def task(self, place: str | Path, data_root: Path | None, data_hash: str) -> Task:
        """Return the task with its rows in memory.

        Raises:
            UserError: If the files give other rows by now.
        """
        key = (place, data_root, data_hash)
        with self._lock:
            if key in self._tasks:
                self._tasks.move_to_end(key)
                return self._tasks[key]
        task = load_place(place, data_root)
        if task.data_hash != data_hash:
            what = f"the rows of task {task.name!r} are no longer those that this run began with"
            remedy = "Start again, with --rehash if the files have the same sizes and times as before."
            raise UserError("rows_changed", what, remedy=remedy, file=str(place))
        self.hold(place, data_root, task)
        return task

    def hold(self, place: str | Path, data_root: Path | None, task: Task) -> None:
        """Keep a task that was loaded."""
        key = (place, data_root, task.data_hash)
        with self._lock:
            if key not in self._tasks:
                self._tasks[key] = task
                self._num_examples += _num_examples(task)
            while self._num_examples > MOST_EXAMPLES_HELD and len(self._tasks) > 1:
                self._num_examples -= _num_examples(self._tasks.popitem(last=False)[1])


_HELD = _HeldTasks()


def _num_examples(task: Task) -> int:
    return len(task.train) + len(task.test)


def load_known(place: str | Path, data_root: Path | None, *, rehash: bool = False) -> Task:
    """Load the task of a place with its rows left in their files, from its record if there is one that still holds.

    One process loads a task that is not known, and others wait for its record. Where the cache folder cannot be
    written, and of a dataset of the Hub, the task has its rows in memory.

    Args:
        place: A task file or a table, as `task_places` returns it.
        data_root: Second folder in which to look for data files.
        rehash: Read the rows even if sizes and times are those of the record.

    Raises:
        UserError: If the task is wrong.
        MachineError: If the rows are on the Hub and the Hub cannot be reached.
    """
    # Rows are read from the place as it was written, so that a mistake names it as the user does.
    written = (place, data_root)
    place, data_root = _absolute(place), data_root and Path(os.path.abspath(expanded(data_root)))  # noqa: PTH100
    path = _record_path(place, data_root)
    if not rehash and (record := _read(path, place, data_root)):
        return _task_of(record, place, data_root)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            if not rehash and (record := _read(path, place, data_root)):
                return _task_of(record, place, data_root)
            return _load_and_record(written, place, data_root, path)
    except (OSError, NotImplementedError):  # nothing is lost: the task is loaded as if there were no cache
        return load_place(*written)


def _load_and_record(
    written: tuple[str | Path, Path | None], place: str | Path, data_root: Path | None, path: Path
) -> Task:
    files = source_files(place, data_root)
    if files is None:
        return load_place(*written)
    # Looked at before the rows are read: a file that changes meanwhile differs from the record.
    stats = {str(file): _stat(str(file)) for file in files}
    task = load_place(*written)
    record = _Record(
        version=(__version__, RULES_VERSION),
        place=str(place),
        data_root=data_root and str(data_root),
        files=stats,
        spec=task.spec,
        data_hash=task.data_hash,
        dropped=dict(task.dropped),
        num_train=len(task.train),
        num_test=len(task.test),
    )
    write_atomically(path, record.model_dump_json(), sync=False)
    _HELD.hold(place, data_root, task)
    return _task_of(record, place, data_root)


def _read(path: Path, place: str | Path, data_root: Path | None) -> _Record | None:
    """Read the record of a place; None where there is none, it is damaged or of another version, or files changed."""
    try:
        record = _Record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    known = (record.version, record.place, record.data_root)
    if known != ((__version__, RULES_VERSION), str(place), data_root and str(data_root)):
        return None
    return record if all(_stat(file) == stat for file, stat in record.files.items()) else None


def _task_of(record: _Record, place: str | Path, data_root: Path | None) -> Task:
    train = ExamplesInFiles(place, data_root, record.data_hash, "train", range(record.num_train))
    test = ExamplesInFiles(place, data_root, record.data_hash, "test", range(record.num_test))
    return Task(record.spec, train, test, record.data_hash, record.dropped)


def _record_path(place: str | Path, data_root: Path | None) -> Path:
    name = hashlib.sha256(f"{place}\n{data_root}".encode()).hexdigest()[:32]
    return cache_folder() / "tasks" / f"{name}.json"


def _stat(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _absolute(place: str | Path) -> str | Path:
    """Name a place so that it is found from any folder."""
    if isinstance(place, Path):
        return Path(os.path.abspath(place))  # noqa: PTH100
    path, columns = TABLE.findall(place)[0]
    return f"{os.path.abspath(expanded(path))}:{columns}"  # noqa: PTH100
