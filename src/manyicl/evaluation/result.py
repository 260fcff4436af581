"""The record on disk: one typed JSON file per result, with its predictions and its context next to it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from manyicl.atomic import write_atomically
from manyicl.errors import UserError
from manyicl.library_errors import reason
from manyicl.paths import files_below
from manyicl.tasks.task import Family

RECORD_ENDING = ".result.json"
PREDICTIONS_ENDING = ".predictions.jsonl"
CONTEXT_ENDING = ".context.jsonl"


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
    seed: int = Field(description="Seed of the draw of demonstrations.")
    sampling: str = Field(description="How demonstrations are chosen: balanced by answer, or random.")

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

    chance: float | None = Field(None, description="Expected accuracy of guessing evenly.")
    majority: float | None = Field(None, description="Score of always giving the most frequent training answer.")
    tfidf: float | None = Field(None, description="TF-IDF with logistic regression on the same demonstrations.")
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
        return {_RENAMED.get(name, name): value for name, value in fields.items()} | {"record_version": 2}

    @property
    def stem(self) -> str:
        """Return the name that the record, its predictions and its context share."""
        return file_stem(self.task, self.num_shots, self.seed, self.key)


class PredictedAnswer(_Record):
    """One line of a predictions file."""

    origin: str = Field(description="File and line of the test row.")
    query: str
    answer: str
    references: tuple[str, ...]
    scores: dict[str, float] = Field(description="Score of this answer in each metric that scores single answers.")
    log_probability: float | None = Field(description="Log-probability of the answer and its end text, in nats.")
    confidence: float | None = Field(None, description="Probability among the labels or options, if all were scored.")
    stopped: bool = Field(True, description="False if the answer was cut at the token limit.")


class ContextExample(_Record):
    """One line of a context file: a demonstration, in the order of the context."""

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


def file_stem(task: str, num_shots: int, seed: int, key: str) -> str:
    """Return a readable file name that the key makes unique."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", task).strip("-.")[:60] or "task"
    return f"{readable}-{num_shots}shots-seed{seed}-{key}"


RecordT = TypeVar("RecordT", bound=_Record)


class ResultStore:
    """A folder of results."""

    def __init__(self, folder: str | Path) -> None:
        """Name the folder; it is made when the first result is saved."""
        self.folder = Path(folder)
        self._folders: dict[str, Path] = {}

    def find(self, task: str, num_shots: int, seed: int, key: str) -> Result | None:
        """Return the result of this measurement, None if there is none.

        Raises:
            UserError: If the record is broken.
        """
        path = self.folder / f"{file_stem(task, num_shots, seed, key)}{RECORD_ENDING}"
        return _parsed(Result, path.read_bytes(), path) if path.is_file() else None

    def save(self, result: Result, predictions: Iterable[PredictedAnswer], context: Iterable[ContextExample]) -> Path:
        """Write predictions and context, then the record, so that a record exists only if the rest is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(result, PREDICTIONS_ENDING), _lines(predictions))
        write_atomically(self._path(result, CONTEXT_ENDING), _lines(context))
        path = self._path(result, RECORD_ENDING)
        write_atomically(path, result.model_dump_json(indent=1) + "\n")
        return path

    def load(self) -> list[Result]:
        """Read all records of the folder and of the folders in it, links included, in the order of their creation.

        Raises:
            UserError: If the folder is missing or holds no record, or a record is broken.
        """
        if not self.folder.is_dir():
            raise UserError("not_a_folder", "not a folder of results", file=self.folder)
        records = []
        for path in files_below(self.folder):
            if not path.name.endswith(RECORD_ENDING):
                continue
            records.append(_parsed(Result, path.read_bytes(), path))
            self._folders[records[-1].stem] = path.parent
        if not records:
            remedy = f"Run `manyicl evaluate --output {self.folder}` first."
            raise UserError("no_results", "the folder holds no result", remedy=remedy, file=self.folder)
        return sorted(records, key=lambda record: (record.created, record.stem))

    def predictions(self, result: Result) -> list[PredictedAnswer]:
        """Read the predictions of a result; empty if their file is missing."""
        return self._lines_of(result, PREDICTIONS_ENDING, PredictedAnswer)

    def context(self, result: Result) -> list[ContextExample]:
        """Read the demonstrations of a result in order; empty if their file is missing."""
        return self._lines_of(result, CONTEXT_ENDING, ContextExample)

    def _path(self, result: Result, ending: str) -> Path:
        return self._folders.get(result.stem, self.folder) / f"{result.stem}{ending}"

    def _lines_of(self, result: Result, ending: str, kind: type[RecordT]) -> list[RecordT]:
        path = self._path(result, ending)
        # Not splitlines: answers may contain line separators that JSON leaves as they are.
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n") if path.is_file() and path.stat().st_size else []
        return [_parsed(kind, line, path, row) for row, line in enumerate(lines, start=1)]


def _parsed(kind: type[RecordT], content: bytes, path: Path, row: int | None = None) -> RecordT:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        what = f"not a complete record of this version, {reason(error)}"
        remedy = "Delete the result and evaluate again."
        raise UserError("broken_record", what, remedy=remedy, file=path, row=row) from error


def _lines(records: Iterable[_Record]) -> str:
    return "".join(record.model_dump_json() + "\n" for record in records)
