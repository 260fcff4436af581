"""Results on disk: one file of JSON lines for each task, each line a result with its predictions and its context.

::

    results/
      tickets.results.jsonl   {"record": {…}, "predictions": […], "context": […]}, one line per model, shots and seed
      .results.lock           held while a line is added

A line is added as a whole, so several processes may evaluate into one folder. What a killed process left of a line
counts as not there, and the next result takes its place. Empty lines and a last line without its end, as editors leave
them, do no harm. The last line of a key counts.

Earlier versions wrote three files for each result (see `_SeparateFiles`); they are read, and no longer written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Self, TypeVar

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from manyicl.atomic import sync_folder
from manyicl.episodes.text_format import format_of_this_version
from manyicl.errors import UserError
from manyicl.library_errors import reason
from manyicl.paths import files_below
from manyicl.tasks.task import Family

RESULTS_ENDING = ".results.jsonl"
LOCK_FILE = ".results.lock"
# Of the three files that earlier versions wrote for each result.
RECORD_ENDING = ".result.json"
PREDICTIONS_ENDING = ".predictions.jsonl"
CONTEXT_ENDING = ".context.jsonl"
BYTES_READ_BACK = 1 << 16


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


# Names of fields in records of version 1.
_RENAMED = {
    "num_shots_asked": "num_shots",
    "num_shots_shown": "num_shots_used",
    "num_shots_left_out": "num_shots_dropped",
    "num_queries_left_out": "num_queries_skipped",
}


class Result(_Record):
    """One model on one task after one draw of demonstrations: the score and everything it depends on."""

    record_version: Literal[2] = 2
    key: str = Field(description="Hash of model, task and arguments; equal keys mean the same measurement.")

    task: str
    family: Family
    source: str = Field(description="What the task was drawn from.")
    data_hash: str = Field(description="Hash of the task's rendered examples.")
    num_labels: int | None = Field(None, description="Size of the closed label set; None for other answers.")

    num_shots: int = Field(ge=0, description="Requested number of demonstrations.")
    num_shots_used: int = Field(ge=0, description="Demonstrations in the context.")
    num_shots_missing: int = Field(0, ge=0, description="Requested beyond the task's training rows.")
    num_shots_dropped: int = Field(0, ge=0, description="Dropped because they did not fit the context.")
    num_retrieved: int = Field(0, ge=0, description="Requested number of training rows retrieved for each query.")
    mean_num_retrieved: float = Field(0, ge=0, description="Rows retrieved for a query, on average.")
    seed: int = Field(description="Seed of the draw of demonstrations.")
    sampling: str = Field(description="How demonstrations are chosen: balanced by answer, or random.")
    order: int = Field(0, ge=0, description="Order of the demonstrations; 0 is the one in which they were drawn.")

    query_seed: int = Field(description="Seed of the order of test rows; the first num_queries are the test queries.")
    num_queries: int = Field(ge=1, description="Number of test queries.")
    num_queries_skipped: int = Field(0, ge=0, description="Test rows too long for the context even without shots.")
    queries_hash: str = Field(description="Hash of the queries in order; equal hashes may be paired.")

    metric: str = Field(description="Name of the task's metric.")
    score: float = Field(ge=0, le=1)
    standard_error: float | None = Field(None, ge=0, description="Over queries alone; None for one query.")
    companions: dict[str, float] = Field(description="The task's other metrics.")
    query_scores: tuple[float, ...] | None = Field(None, description="One per query; None for macro-F1.")
    resampled_scores: tuple[float, ...] | None = Field(None, description="Macro-F1 of resampled queries.")
    num_cut_answers: int = Field(0, ge=0, description="Free answers that were cut at the token limit.")
    max_answer_tokens: int | None = Field(
        None, description="That limit; None of labels, and in records of earlier versions."
    )

    chance: float | None = Field(None, description="Expected accuracy of guessing evenly.")
    majority: float | None = Field(None, description="Score of always giving the most frequent training answer.")
    tfidf: float | None = Field(None, description="TF-IDF with logistic regression on the same demonstrations.")
    nearest: float | None = Field(None, description="Repeating the answer of the demonstration nearest by BM25.")
    level_notes: dict[str, str] = Field(default_factory=dict, description="Why a baseline is missing or special.")

    model: str = Field(description="The model as it was named on the command line.")
    model_name: str = Field(description="The model as reports call it.")
    model_fingerprint: str = Field(description="Hash of the weights.")
    text_format: dict[str, Any] = Field(description="How examples became text.")
    prompt_hash: str = Field(description="Hash of the tokens of the context and of every query.")
    num_context_tokens: int = Field(ge=0, description="Tokens of instruction and demonstrations.")
    max_context_tokens: int = Field(description="Most tokens that prefix, query and answer could take.")
    trained_context_tokens: int | None = Field(None, description="Longest training sequence, if known.")
    trained_shots: int | None = Field(None, description="Most demonstrations before an answer in training, if known.")
    beyond_training: bool = Field(False, description="More tokens or shots than any training sequence had.")
    seen_in_training: bool | None = Field(None, description="Training used it or its source; None if not recorded.")

    versions: dict[str, str]
    created: datetime
    seconds: float = Field(ge=0, description="Time to encode the context and answer all queries.")

    @model_validator(mode="before")
    @classmethod
    def _of_version_1(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("record_version") != 1:
            return fields
        renamed = {_RENAMED.get(name, name): value for name, value in fields.items()} | {"record_version": 2}
        # So that it equals the format of a newer record that was written in the same way.
        text_format = renamed.get("text_format")
        return renamed | ({"text_format": format_of_this_version(text_format)} if isinstance(text_format, dict) else {})

    @model_validator(mode="after")
    def _a_score_for_each_query(self) -> Self:
        if self.query_scores is not None and len(self.query_scores) != self.num_queries:
            raise ValueError(f"{len(self.query_scores)} scores of {self.num_queries} queries")
        return self

    @property
    def line(self) -> str:
        """Return what a table calls the line of this result: the model, its text format, and the rows it retrieves."""
        kind = self.text_format.get("kind")
        name = f"{self.model_name} ({kind})" if kind in ("channel", "chat") else self.model_name
        return f"{name} + {self.num_retrieved} retrieved" if self.num_retrieved else name

    @property
    def stem(self) -> str:
        """Return a readable name of the result, which the three files of earlier versions shared."""
        return file_stem(self.task, self.num_shots, self.seed, self.key)


class PredictedAnswer(_Record):
    """The answer to one query."""

    origin: str = Field(description="File and line of the test row.")
    query: str
    answer: str
    references: tuple[str, ...]
    scores: dict[str, float] = Field(description="Score of this answer in each metric that scores single answers.")
    log_probability: float | None = Field(description="Log-probability of the answer and its end text, in nats.")
    confidence: float | None = Field(None, description="Probability among the labels or options, if all were scored.")
    stopped: bool = Field(True, description="False if the answer was cut at the token limit.")


class ContextExample(_Record):
    """A demonstration, in the order of the context."""

    origin: str
    query: str
    answer: str


def result_key(arguments: Mapping[str, Any]) -> str:
    """Hash everything that a result is a function of, so that a second run finds what a first one did."""
    return hash_of(json.dumps(arguments, sort_keys=True, ensure_ascii=False))


def hash_of(*texts: str) -> str:
    """Return 16 hex digits of the SHA-256 of texts, each ended so that they cannot run into each other."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", errors="surrogatepass") + b"\x00")
    return digest.hexdigest()[:16]


def readable_name(task: str) -> str:
    """Return the name of a task as a file can have it; several tasks may have the same."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", task).strip("-.")[:60] or "task"


def file_stem(task: str, num_shots: int, seed: int, key: str) -> str:
    """Return a readable file name that the key makes unique."""
    return f"{readable_name(task)}-{num_shots}shots-seed{seed}-{key}"


RecordT = TypeVar("RecordT", bound=_Record)


class _Point(_Record):
    """A line of a file of results."""

    record: Result
    predictions: tuple[PredictedAnswer, ...]
    context: tuple[ContextExample, ...]


class _RecordOfLine(BaseModel):
    """The record of a line; the rest of the line is only looked at when it is needed."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    record: Result


class _Line(NamedTuple):
    """A record, and where the line begins and ends that holds it."""

    record: Result
    path: Path
    row: int
    start: int
    end: int

    def point(self) -> _Point:
        """Read the whole line."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return _parsed(_Point, file.read(self.end - self.start), self.path, self.row)


class ResultStore:
    """A folder of results."""

    def __init__(self, folder: str | Path) -> None:
        """Name the folder; it is made when the first result is saved."""
        self.folder = Path(folder)
        self._separate = _SeparateFiles(self.folder)
        self._lines: dict[str, _Line] = {}
        # By key and model name: folders within this one may hold the same measurement under several names.
        self._records: dict[tuple[str, str], Result] = {}
        # How many lines and bytes of a file are in `_lines`.
        self._read: dict[Path, tuple[int, int]] = {}

    def find(self, task: str, num_shots: int, seed: int, key: str) -> Result | None:
        """Return the result of this measurement, None if there is none.

        Raises:
            UserError: If a record of the task is broken, or its file is a folder.
        """
        self._read_new_lines(self._path_to_write(task))
        if (line := self._lines.get(key)) is not None:
            return line.record
        return self._separate.find(task, num_shots, seed, key)

    def save(self, result: Result, predictions: Iterable[PredictedAnswer], context: Iterable[ContextExample]) -> Path:
        """Add a result to the file of its task, and wait until it is on the disk; return that file.

        Raises:
            UserError: If that file is a folder.
        """
        point = _Point(record=result, predictions=tuple(predictions), context=tuple(context))
        path = self._path_to_write(result.task)
        with self._lock():
            self._append(path, point)
        return path

    def add(
        self, result: Result, predictions: Iterable[PredictedAnswer], context: Iterable[ContextExample]
    ) -> tuple[Result, bool]:
        """Save a result unless another process has saved this measurement meanwhile, so that it is there once.

        Returns:
            The result that is in the folder now, and whether it was there before.

        Raises:
            UserError: As for `find` and `save`.
        """
        point = _Point(record=result, predictions=tuple(predictions), context=tuple(context))
        path = self._path_to_write(result.task)
        with self._lock():
            found = self.find(result.task, result.num_shots, result.seed, result.key)
            if found is None:
                self._append(path, point)
        return found or result, found is not None

    def load(self) -> list[Result]:
        """Read all records of the folder and of the folders in it, links included, in the order of their creation.

        Raises:
            UserError: If the folder is missing or holds no record, or a record is broken.
        """
        if not self.folder.is_dir():
            raise UserError("not_a_folder", "not a folder of results", file=self.folder)
        # Anew, for files may have been removed and written again.
        self._lines, self._records, self._read, self._separate = {}, {}, {}, _SeparateFiles(self.folder)
        for path in files_below(self.folder):
            if path.name.endswith(RESULTS_ENDING):
                self._read_new_lines(path)
            elif path.name.endswith(RECORD_ENDING):
                self._separate.read(path)
        records = self._separate.records | self._records
        if not records:
            remedy = f"Run `manyicl evaluate --output {self.folder}` first."
            raise UserError("no_results", "the folder holds no result", remedy=remedy, file=self.folder)
        return sorted(records.values(), key=lambda record: (record.created, record.stem))

    def predictions(self, result: Result) -> list[PredictedAnswer]:
        """Read the predictions of a result that was found, saved or loaded; empty if none were kept."""
        line = self._line_of(result)
        return self._separate.predictions(result) if line is None else list(line.point().predictions)

    def context(self, result: Result) -> list[ContextExample]:
        """Read the demonstrations of a result in order; empty if none were kept."""
        line = self._line_of(result)
        return self._separate.context(result) if line is None else list(line.point().context)

    def _path(self, task: str) -> Path:
        return self.folder / f"{readable_name(task)}{RESULTS_ENDING}"

    def _path_to_write(self, task: str) -> Path:
        path = self._path(task)
        if path.is_dir():
            what, remedy = "the file of a task's results is a folder", "Move it, or use another folder of results."
            raise UserError("results_are_folder", what, expected="a file", remedy=remedy, file=path)
        return path

    def _lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / LOCK_FILE)

    def _append(self, path: Path, point: _Point) -> None:
        """Add a line to a file while the lock is held, and wait until it is on the disk."""
        with path.open("ab+") as file:
            is_new = not file.tell()
            _end_last_line(file)
            file.write(point.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync_folder(self.folder)

    def _line_of(self, result: Result) -> _Line | None:
        if result.key not in self._lines:
            self._read_new_lines(self._path(result.task))
        return self._lines.get(result.key)

    def _read_new_lines(self, path: Path) -> None:
        """Read the records that were added to a file since it was read last."""
        if not path.is_file():
            return
        num_rows, end = self._read.get(path, (0, 0))
        with path.open("rb") as file:
            file.seek(end)
            for content in file:
                is_ended = content.endswith(b"\n")
                if not is_ended and not _is_whole(content):
                    break
                num_rows, start, end = num_rows + 1, end, end + len(content)
                if content.strip():
                    record = _parsed(_RecordOfLine, content, path, num_rows).record
                    self._lines[record.key] = _Line(record, path, num_rows, start, end)
                    self._records[record.key, record.model_name] = record
                # A line that has no end yet is read again with what follows.
                if is_ended:
                    self._read[path] = num_rows, end


class _SeparateFiles:
    """Results of earlier versions: a record, its predictions and its context in a file each, with a common name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # By key and model name, as in `ResultStore`.
        self.records: dict[tuple[str, str], Result] = {}
        self._folders: dict[str, Path] = {}

    def find(self, task: str, num_shots: int, seed: int, key: str) -> Result | None:
        """Return the result of a measurement, None if there is none in the folder itself."""
        path = self.folder / f"{file_stem(task, num_shots, seed, key)}{RECORD_ENDING}"
        return self.read(path) if path.is_file() else None

    def read(self, path: Path) -> Result:
        """Read a record."""
        record = _parsed(Result, path.read_bytes(), path)
        self.records[record.key, record.model_name] = record
        self._folders[record.key] = path.parent
        return record

    def predictions(self, result: Result) -> list[PredictedAnswer]:
        """Read the predictions of a result; empty if their file is missing."""
        return self._lines_of(result, PREDICTIONS_ENDING, PredictedAnswer)

    def context(self, result: Result) -> list[ContextExample]:
        """Read the demonstrations of a result; empty if their file is missing."""
        return self._lines_of(result, CONTEXT_ENDING, ContextExample)

    def _lines_of(self, result: Result, ending: str, kind: type[RecordT]) -> list[RecordT]:
        path = self._folders.get(result.key, self.folder) / f"{result.stem}{ending}"
        # Not splitlines: answers may contain line separators that JSON leaves as they are.
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n") if path.is_file() and path.stat().st_size else []
        return [_parsed(kind, line, path, row) for row, line in enumerate(lines, start=1)]


def _end_last_line(file: IO[bytes]) -> None:
    """End the last line of a file where only its end is missing, and cut off half a line."""
    start = _start_of_rest(file)
    file.seek(start)
    if _is_whole(file.read()):
        file.write(b"\n")
    else:
        file.truncate(start)


def _is_whole(line: bytes) -> bool:
    """Tell whether a line is all there: no beginning of a JSON object is JSON."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _start_of_rest(file: IO[bytes]) -> int:
    """Return where the last line with an end ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(end - BYTES_READ_BACK, 0)
        file.seek(start)
        if (found := file.read(end - start).rfind(b"\n")) >= 0:
            return start + found + 1
        end = start
    return 0


ModelT = TypeVar("ModelT", bound=BaseModel)


def _parsed(kind: type[ModelT], content: bytes, path: Path, row: int | None = None) -> ModelT:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        what = f"not a complete record of this version, {reason(error)}"
        remedy = "Delete the result and evaluate again."
        raise UserError("broken_record", what, remedy=remedy, file=path, row=row) from error
