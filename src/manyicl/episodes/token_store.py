"""Tokenized demonstrations on the disk, one memory-mapped file a task: encoded once, read where they are drawn.

A file is named by the hash of all that decides its tokens: rows, templates and labels of the task, tokenizer and text
format. It holds what an episode is joined from, and nothing else, so a sequence that is read from it equals one that is
encoded from the rows. It is written only after the checks of the task have passed, which then need not be repeated.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import numpy
import pyarrow
from filelock import FileLock

from manyicl import __version__
from manyicl.atomic import is_leftover, write_atomically
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import EncodedShot
from manyicl.episodes.sampling import plain_words
from manyicl.episodes.task_shots import ShotsInMemory, TaskShots
from manyicl.episodes.text_format import Preceding
from manyicl.errors import MachineError
from manyicl.library_errors import reason
from manyicl.paths import CACHE_VARIABLE, cache_folder, sha256_of_file
from manyicl.tasks.files import OnProgress
from manyicl.tasks.task import Example, Task
from manyicl.tasks.task_cache import ExamplesInFiles

# Raise it when other tokens, or tokens in another form, are written for the same task, tokenizer and format.
FORMAT_VERSION = 1
# Columns of a file: the two parts of a demonstration, the first one also as it opens a sequence. In the channel form
# these are its answer and its query.
GIVEN, FIRST, TARGET = "query_ids", "first_query_ids", "answer_ids"
FOLDER = "tokens"
# Each open file is a mapping of memory, of which a process may have some ten thousand.
MOST_FILES_OPEN = 256
EXAMPLES_A_BATCH = 10_000
SECONDS_KEPT = 30 * 24 * 3600

_LOG = logging.getLogger(__name__)
Check = Callable[[Task], None]
Say = Callable[[str], object]


class _Entry(NamedTuple):
    """What is known of a file without opening it, from a small record beside it.

    The record also holds the words of the task that may replace labels, which are read only where labels are renamed.

    Attributes:
        num_bytes: Size of the file.
        sha256: Hash of its content.
        fewest_tokens: Tokens of the shortest episode of one shot.
    """

    num_bytes: int
    sha256: str
    fewest_tokens: int


class TokenStore:
    """The tokenized tasks of one tokenizer and text format. Pickles as its place; processes may share it.

    Attributes:
        folder: Where the files are; it may be removed at any time.
        folders: It, and a temporary folder once something could not be written there.
    """

    def __init__(
        self, encoder: Encoder, *, identity: str = "", check: Check | None = None, say: Say | None = None
    ) -> None:
        """Name the folder of a tokenizer and format.

        Args:
            encoder: Encodes what is not in the folder.
            identity: All else that the checks depend on.
            check: Refuses a task with a `UserError`, after the encoder's own checks.
            say: Called with a sentence where the folder cannot be written; by default it is logged.
        """
        self.encoder = encoder
        self._check = check
        self._say = say or _LOG.warning
        versions = [str(FORMAT_VERSION), __version__, version("tokenizers")]
        parts = [*versions, encoder.text_hash, str(encoder.tokenizer.unk_token_id), identity]
        self.folder = cache_folder() / FOLDER / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        self.folders: tuple[Path, ...] = (self.folder,)
        self._open: OrderedDict[str, _File] = OrderedDict()
        self._verified: set[Path] = set()

    def __getstate__(self) -> dict[str, Any]:
        # Files are open in this process alone, which also removes what is temporary, and checks are done.
        return {**self.__dict__, "_open": OrderedDict(), "_verified": set(), "_check": None, "_say": _LOG.warning}

    def shots_of(self, tasks: Iterable[Task], on_progress: OnProgress | None = None) -> list[TaskShots]:
        """Return the demonstrations of tasks; those of tasks whose rows are in files are written first where they lack.

        One process writes at a time, others wait for it and find what it wrote. Where the folder cannot be written,
        each writes to a temporary folder of its own.

        Raises:
            UserError: If a task cannot be encoded.
            MachineError: If the tokens cannot be written there either.
        """
        tasks = tuple(tasks)
        shots: list[TaskShots | None] = [
            self._known(task, *self.folders) if _is_in_files(task) else self._unstored(task) for task in tasks
        ]
        missing = [number for number, known in enumerate(shots) if known is None]
        if missing:
            self._clean_up()
        for done, number in enumerate(missing):
            if on_progress:
                on_progress(done, len(missing))
            shots[number] = self._written(tasks[number])
        with suppress(OSError):
            os.utime(self.folder)  # a folder that is not used for long is removed
        return [each for each in shots if each is not None]

    def _unstored(self, task: Task) -> TaskShots:
        """Return the shots of a task whose rows are in memory."""
        if self._check:
            self._check(task)
        return ShotsInMemory(task, self.encoder)

    def _known(self, task: Task, *folders: Path) -> StoredShots | None:
        """Return the shots of a task whose file is in a folder, as far as that shows without reading it."""
        name = _name_of(task)
        for folder in folders:
            with suppress(OSError, ValueError, TypeError, KeyError):
                record = json.loads((folder / f"{name}.json").read_bytes())
                entry = _Entry(*(record[field] for field in _Entry._fields))
                if os.stat(folder / f"{name}.arrow").st_size == entry.num_bytes:  # noqa: PTH116
                    return StoredShots(task, self, folder, name, entry)
        return None

    def _written(self, task: Task) -> StoredShots:
        """Return the shots of a task, encoded and written unless another process has done so meanwhile."""
        folder = self.folders[-1]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                known = self._known(task, folder)
                return known or self._write(task, folder)
        except (OSError, pyarrow.ArrowException) as error:
            if folder == self.folder:
                self._use_temporary_folder(error)
                return self._written(task)
            raise MachineError(
                f"The tokens of task {task.name!r} could be written neither to {str(self.folder)!r} nor to "
                f"{str(folder)!r}: {reason(error)}. Free some space, or name another folder with {CACHE_VARIABLE}."
            ) from error

    def _use_temporary_folder(self, error: Exception) -> None:
        """Write to a temporary folder from now on, which is removed with this store, and say so.

        Raises:
            MachineError: If there is none.
        """
        remedy = f"Free some space, or name another folder with {CACHE_VARIABLE}."
        why = f"The tokens of tasks cannot be written to {str(self.folder)!r}: {reason(error)}"
        try:
            temporary = Path(mkdtemp(prefix="manyicl-tokens-"))
        except OSError:
            raise MachineError(f"{why}. {remedy}") from error
        weakref.finalize(self, _remove, temporary, os.getpid())
        self.folders = (self.folder, temporary)
        self._say(
            f"{why}. Until this run ends they are kept in the temporary folder {str(temporary)!r}, and the next run "
            f"makes them again. {remedy}"
        )

    def _write(self, task: Task, folder: Path) -> StoredShots:
        if self._check:
            self._check(task)
        self.encoder.require_encodable(task)
        name = _name_of(task)
        path, described = folder / f"{name}.arrow", folder / f"{name}.json"
        if described.exists():
            _LOG.warning("The tokens of task %r in %s are damaged; they are made again.", task.name, folder)
        table, fewest_tokens = _table_of(task, self.encoder)
        words = table.schema.metadata[b"plain_words"].decode()

        def write(aside: Path) -> None:
            with pyarrow.ipc.new_file(str(aside), table.schema) as file:
                file.write_table(table, max_chunksize=max(len(table), 1))

        write_atomically(path, write, sync=False)
        entry = _Entry(path.stat().st_size, sha256_of_file(path), fewest_tokens)
        # Last, so that a file which it describes is there.
        write_atomically(described, _record_of(entry, words), sync=False)
        return StoredShots(task, self, folder, name, entry)

    def file_of(self, shots: StoredShots) -> _File:
        """Open the file of a task; of those that were opened, the ones used last stay open.

        One that is damaged or gone is written again from the rows.

        Raises:
            UserError: If the rows have changed since the tasks were loaded.
            MachineError: If the tokens cannot be written.
        """
        if (file := self._open.get(shots.name)) is not None:
            self._open.move_to_end(shots.name)
            return file
        path = shots.path
        # Hashed once in a process, even if it is closed and opened again.
        if not path.is_file() or (path not in self._verified and not self._is_whole(shots)):
            again = self._written(shots.task)
            shots.folder, shots.entry = again.folder, again.entry
            path = shots.path
        self._verified.add(path)
        file = self._open[shots.name] = _File(path)
        if len(self._open) > MOST_FILES_OPEN:
            self._open.popitem(last=False)
        return file

    def plain_words_of(self, shots: StoredShots) -> str:
        """Read the words of a task that may replace labels; its file is opened only where the record has none.

        Earlier versions wrote records without them: these are completed, where that is possible.

        Raises:
            UserError: As for `file_of`.
            MachineError: As for `file_of`.
        """
        path = shots.path.with_suffix(".json")
        with suppress(OSError, ValueError, TypeError, KeyError):
            record = json.loads(path.read_bytes())
            words: str = record["plain_words"]
            if record["plain_words_sha256"] == _hash_of_words(shots.entry, words):
                return words
        words = self.file_of(shots).plain_words
        with suppress(OSError), FileLock(shots.folder / ".lock"):
            known = self._known(shots.task, shots.folder)
            if known is not None and known.entry == shots.entry:
                write_atomically(path, _record_of(shots.entry, words), sync=False)
        return words

    def _is_whole(self, shots: StoredShots) -> bool:
        """Tell whether a file is as it was written; a damaged one is removed while no other process writes it."""
        if sha256_of_file(shots.path) == shots.entry.sha256:
            return True
        with suppress(OSError), FileLock(shots.folder / ".lock"):
            # Another process may have written it anew meanwhile.
            known = self._known(shots.task, shots.folder)
            if known is not None and sha256_of_file(known.path) == known.entry.sha256:
                shots.entry = known.entry
                return True
            shots.path.unlink(missing_ok=True)
        return False

    def _clean_up(self) -> None:
        """Remove the tokens of tokenizers and formats that were not used for long, and what killed processes left."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self.folder)
            for other in self.folder.parent.iterdir():
                if other != self.folder and time.time() - other.stat().st_mtime > SECONDS_KEPT:
                    shutil.rmtree(other, ignore_errors=True)
            with FileLock(self.folder / ".lock"):
                for leftover in filter(is_leftover, self.folder.iterdir()):
                    leftover.unlink(missing_ok=True)


class StoredShots(TaskShots):
    """Demonstrations of one task, read from its file when they are drawn.

    Attributes:
        task: The task; its rows are read only where the file does not hold what is needed.
        folder: Folder of the file.
        name: Name of the file, without its ending.
        entry: What is known of the file.
    """

    def __init__(self, task: Task, store: TokenStore, folder: Path, name: str, entry: _Entry) -> None:
        """Name the file of a task in a store."""
        self.task = task
        self.folder = folder
        self.name = name
        self.entry = entry
        self._store = store

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{self.name}.arrow"

    @property
    def _file(self) -> _File:
        return self._store.file_of(self)

    def instruction(self) -> str:
        """Read the rendered instruction."""
        return self._file.instruction

    def preamble_ids(self, instruction: str) -> Sequence[int]:
        """Read the tokens before the first query; those of an instruction with other labels are encoded."""
        file = self._file
        if instruction == file.instruction:
            return file.preamble_ids
        return self._store.encoder.preamble_ids(instruction)

    def shot(self, position: int, preceding: Preceding, new_names: Mapping[str, str] | None = None) -> EncodedShot:
        """Read the tokens of a training example; the answer is encoded where labels are renamed."""
        file, encoder = self._file, self._store.encoder
        given_ids: Sequence[int]
        if preceding is Preceding.DEMONSTRATION:
            given_ids = file.given_ids(position)
        elif preceding.name == file.first_preceding:
            given_ids = file.first_given_ids(position)
        else:  # the instruction is omitted, or new label names have emptied or filled it
            given_ids = encoder.encode_shot(self.task.train[position], preceding).given_ids
        shot = EncodedShot(given_ids, file.target_ids(position))
        if new_names is None:
            return shot
        return encoder.with_answer(shot, new_names[file.answers[position].as_py()], preceding)

    def answers(self) -> Sequence[str]:
        """Read the answers of all training examples."""
        return self._file.answer_texts

    def plain_words(self) -> set[str]:
        """Read the words of the first queries that may replace labels."""
        return set(self._store.plain_words_of(self).split())

    def fewest_tokens(self, enough: int) -> int:
        """Return the tokens of the shortest episode of one shot."""
        return self.entry.fewest_tokens


class _Lists:
    """A column of lists of token ids, as views of the mapped file."""

    def __init__(self, column: pyarrow.ChunkedArray) -> None:
        lists = column.chunk(0)
        # Not to_numpy, which imports pandas if that is installed: a third of a second in every process.
        self._offsets = numpy.from_dlpack(lists.offsets)
        self._values = numpy.from_dlpack(lists.values)

    def __getitem__(self, position: int) -> list[int]:
        ids: list[int] = self._values[self._offsets[position] : self._offsets[position + 1]].tolist()
        return ids


class _File:
    """The file of one task, mapped into memory."""

    def __init__(self, path: Path) -> None:
        # Read from the mapped bytes and not through the file, for which pyarrow would wait for threads of its own.
        table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)).read_buffer()).read_all()
        metadata = table.schema.metadata
        self.instruction: str = metadata[b"instruction"].decode()
        self.preamble_ids: list[int] = json.loads(metadata[b"preamble_ids"])
        self.first_preceding: str = metadata[b"first_preceding"].decode()
        self.plain_words: str = metadata[b"plain_words"].decode()
        self.given_ids = _Lists(table[GIVEN]).__getitem__
        self.first_given_ids = _Lists(table[FIRST if FIRST in table.column_names else GIVEN]).__getitem__
        self.target_ids = _Lists(table[TARGET]).__getitem__
        self.answers = table["answer"]

    @cached_property
    def answer_texts(self) -> list[str]:
        texts: list[str] = self.answers.to_pylist()
        return texts


def _remove(temporary: Path, process_id: int) -> None:
    """Remove a temporary folder, in the process that made it and not in one that was forked from it."""
    if os.getpid() == process_id:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_in_files(task: Task) -> bool:
    return isinstance(task.train, ExamplesInFiles)


def _name_of(task: Task) -> str:
    """Name the file of a task by the hash of its rows, of which of them are used, and of its spec."""
    assert isinstance(task.train, ExamplesInFiles)
    parts = (task.train.data_hash, task.train.side, str(task.train.positions), task.spec.model_dump_json())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _record_of(entry: _Entry, words: str) -> str:
    """Write what is known of a file, and the words of its task."""
    record = {**entry._asdict(), "plain_words": words, "plain_words_sha256": _hash_of_words(entry, words)}
    return json.dumps(record)


def _hash_of_words(entry: _Entry, words: str) -> str:
    """Hash the words together with the file that they belong to: damaged ones would draw other sequences."""
    return hashlib.sha256(f"{entry.sha256}\n{words}".encode()).hexdigest()


def _table_of(task: Task, encoder: Encoder) -> tuple[pyarrow.Table, int]:
    """Encode a task: one row for each training example, all else in the metadata.

    Returns:
        The table, and the tokens of the shortest episode of one shot.
    """
    instruction = task.instruction()
    preamble_ids, first = encoder.preamble_ids(instruction), encoder.preceding(instruction, 0)
    # Numbers may be missing in a vocabulary, so that its size does not bound them.
    largest_id = max(encoder.tokenizer.get_vocab().values(), default=0)
    ids = pyarrow.large_list(pyarrow.from_numpy_dtype(numpy.min_scalar_type(largest_id)))
    names = (GIVEN, ids), (FIRST, ids), (TARGET, ids), ("answer", pyarrow.large_string())
    schema = pyarrow.schema(list(names))
    batches = []
    fewest_tokens = sys.maxsize
    for examples in _batches(task.train):
        later = [encoder.encode_shot(each, comes_again=False) for each in examples]
        opening = [
            shot
            if encoder.is_like_later_shot(each.query.text, first)
            else encoder.encode_shot(each, first, comes_again=False)
            for each, shot in zip(examples, later, strict=True)
        ]
        fewest_tokens = min(fewest_tokens, len(preamble_ids) + min(map(encoder.num_tokens_of, opening)))
        given_ids, first_given_ids = ([shot.given_ids for shot in shots] for shots in (later, opening))
        columns = [given_ids, first_given_ids, [shot.target_ids for shot in later], [each.answer for each in examples]]
        batches.append(pyarrow.RecordBatch.from_pydict(dict(zip(schema.names, columns, strict=True)), schema))
    table = pyarrow.Table.from_batches(batches, schema).combine_chunks()
    if table[FIRST].equals(table[GIVEN]):
        table = table.drop_columns([FIRST])
    table = table.set_column(table.column_names.index("answer"), "answer", table["answer"].dictionary_encode())
    metadata = {
        "instruction": instruction,
        "preamble_ids": json.dumps(preamble_ids),
        "first_preceding": first.name,
        "plain_words": " ".join(sorted(plain_words(task))),
    }
    return table.replace_schema_metadata(metadata), fewest_tokens


def _batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    for start in range(0, len(examples), EXAMPLES_A_BATCH):
        yield list(examples[start : start + EXAMPLES_A_BATCH])
