"""Tasks on disk: a spec as JSON and examples as Arrow files that are memory-mapped, not loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal, overload

import pyarrow
from pydantic import BaseModel, ConfigDict, Field

from manyicl.atomic import folder_written_atomically
from manyicl.checked import read_text, validated
from manyicl.errors import MachineError, UserError, quoted
from manyicl.library_errors import reason
from manyicl.tasks.example import Example, Query
from manyicl.tasks.spec import TaskSpec
from manyicl.tasks.task import Task

SPEC_FILE = "task.json"
RESTORE = "Restore the folder, or store the task again with this version."
_EXAMPLES_A_BATCH = 1024
_TEXTS = pyarrow.large_list(pyarrow.large_string())
_SCHEMA = pyarrow.schema(
    [
        pyarrow.field("query", pyarrow.large_string(), nullable=False),
        pyarrow.field("choices", _TEXTS),
        pyarrow.field("answer", pyarrow.large_string(), nullable=False),
        pyarrow.field("references", _TEXTS, nullable=False),
        pyarrow.field("origin", pyarrow.large_string(), nullable=False),
    ]
)


class _StoredTask(BaseModel):
    """The content of ``task.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[2] = 2
    spec: TaskSpec
    data_hash: str = Field(description="Hash of the instruction, the labels and the examples of both sides.")
    dropped: dict[str, int] = Field(description="Reason -> number of rows dropped when the task was read.")


@dataclass(frozen=True)
class StoredExamples(Sequence[Example]):
    """Examples in an Arrow file, read where they are used; pickles as the path of the file.

    A slice is a view of the same file.

    Attributes:
        path: Arrow file that `store_task` wrote.
        positions: Examples of the file that are seen here.
        table: The file, mapped into memory.
    """

    path: Path
    positions: range
    table: pyarrow.Table = field(compare=False, repr=False)

    @classmethod
    def open(cls, path: Path, positions: range | None = None) -> StoredExamples:
        """Map a file into memory.

        Raises:
            UserError: If it is missing or no such file.
        """
        try:
            table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError("not_a_stored_task", "not readable as stored examples", file=path) from error
        if table.schema != _SCHEMA:
            raise UserError("not_a_stored_task", "the columns are not those of stored examples", file=path)
        return cls(path.absolute(), range(table.num_rows) if positions is None else positions, table)

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, position: int) -> Example: ...
    @overload
    def __getitem__(self, position: slice) -> StoredExamples: ...
    def __getitem__(self, position: int | slice) -> Example | StoredExamples:
        if isinstance(position, slice):
            return replace(self, positions=self.positions[position])
        row = self.positions[position]
        return _example(*(column[row].as_py() for column in self.table.columns))

    def __iter__(self) -> Iterator[Example]:
        for start in range(0, len(self), _EXAMPLES_A_BATCH):
            rows = self.table.take(list(self.positions[start : start + _EXAMPLES_A_BATCH]))
            yield from map(_example, *(column.to_pylist() for column in rows.columns))

    def __reduce__(self) -> tuple[Callable[..., StoredExamples], tuple[Path, range]]:
        return StoredExamples.open, (self.path, self.positions)


def _example(query: str, choices: list[str] | None, answer: str, references: list[str], origin: str) -> Example:
    return Example(Query(query, None if choices is None else tuple(choices)), answer, tuple(references), origin)


def store_task(task: Task, folder: Path) -> Task:
    """Write a task to a new folder and open it; see ``Task.store``."""
    if folder.exists():
        what = f"{folder} exists already"
        raise UserError("folder_exists", what, remedy="Name a new folder, or remove that one.")
    if not folder.parent.is_dir():
        raise UserError("no_such_folder", f"The folder {folder.parent} does not exist", remedy="Make it first.")
    try:
        with folder_written_atomically(folder) as aside:
            _write(task, aside)
    except UnicodeEncodeError as error:
        half = quoted(error.object[error.start])
        raise UserError("half_a_character", "a text holds half a character", found=half) from error
    except OSError as error:
        raise MachineError(f"{folder} could not be written: {reason(error)}.") from error
    return open_task(folder)


def _identity(side: str, stored: str, num_train: int, num_test: int) -> dict[bytes, bytes]:
    """Return the metadata of a side's file: what ties it to the content of task.json and to the other side's file."""
    digest = hashlib.sha256(stored.encode()).hexdigest()
    values = {"side": side, "task_hash": digest, "num_train": str(num_train), "num_test": str(num_test)}
    return {key.encode(): value.encode() for key, value in values.items()}


def _write(task: Task, folder: Path) -> None:
    content = _StoredTask(spec=task.spec, data_hash=task.data_hash, dropped=dict(task.dropped))
    stored = content.model_dump_json(indent=2)
    for name, examples in (("train", iter(task.train)), ("test", iter(task.test))):
        schema = _SCHEMA.with_metadata(_identity(name, stored, len(task.train), len(task.test)))
        with pyarrow.ipc.new_file(str(folder / f"{name}.arrow"), schema) as file:
            while batch := list(islice(examples, _EXAMPLES_A_BATCH)):
                rows = [{**asdict(e), "query": e.query.text, "choices": e.query.choices} for e in batch]
                file.write_batch(pyarrow.RecordBatch.from_pylist(rows, schema))
    (folder / SPEC_FILE).write_text(stored, encoding="utf-8")


def open_task(folder: Path) -> Task:
    """Open a stored task; see ``Task.open``."""
    if not (folder / SPEC_FILE).is_file():
        what, expected = f"The folder {folder} holds no stored task", f"{SPEC_FILE}, train.arrow and test.arrow"
        remedy = "Task.store writes one; `load_task` loads a folder with a task.yaml."
        raise UserError("not_a_stored_task", what, expected=expected, remedy=remedy)
    stored = read_text(folder / SPEC_FILE)
    try:
        content = validated(_StoredTask, stored, str(folder / SPEC_FILE))
    except UserError as error:
        error.remedy = error.remedy or RESTORE
        raise
    train, test = (StoredExamples.open(folder / f"{name}.arrow") for name in ("train", "test"))
    for name, side in (("train", train), ("test", test)):
        try:
            side.table.validate(full=True)
        except pyarrow.ArrowException as error:
            raise UserError("not_a_stored_task", "the examples are damaged", remedy=RESTORE, file=side.path) from error
        if side.table.schema.metadata != _identity(name, stored, len(train), len(test)):
            what = f"{SPEC_FILE} and the examples were not stored together as they are now"
            raise UserError("not_a_stored_task", what, remedy=RESTORE, file=folder)
    return Task(content.spec, train, test, content.data_hash, content.dropped)
