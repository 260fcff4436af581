"""The record on disk: one typed JSON file per result, its predictions and its context beside it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manyicl.atomic import write_atomically
from manyicl.errors import UserError, shown
from manyicl.tasks.task import Family

RECORD_ENDING = ".result.json"
PREDICTIONS_ENDING = ".predictions.jsonl"
CONTEXT_ENDING = ".context.jsonl"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class Result(_Record):
    """One model on one task after one draw of demonstrations: the score and everything it depends on."""

    record_version: Literal[1] = 1
    key: str = Field(description="Hash of model, task and arguments; equal keys mean the same measurement.")

    task: str
    family: Family
    source: str = Field(description="What the task was drawn from.")
    data_hash: str = Field(description="Hash of the task's rendered examples.")
    num_labels: int | None = Field(None, description="Size of the closed label set; None for other answers.")

    num_shots_asked: int = Field(ge=0, description="Demonstrations that were asked for.")
    num_shots_shown: int = Field(ge=0, description="Demonstrations that fitted and stood in the context.")
    num_shots_missing: int = Field(0, ge=0, description="Asked for beyond the task's training rows.")
    num_shots_left_out: int = Field(0, ge=0, description="Left out because the context was full.")
    seed: int = Field(description="Of the demonstrations.")
    sampling: str = Field(description="How demonstrations are chosen: balanced by answer, or random.")

    query_seed: int = Field(description="Of the order of test rows; the first num_queries are asked.")
    num_queries: int = Field(ge=1)
    num_queries_left_out: int = Field(0, ge=0, description="Too long for the context even without demonstrations.")
    queries_hash: str = Field(description="Hash of the queries in order; equal hashes may be paired.")

    metric: str
    score: float = Field(ge=0, le=1)
    standard_error: float = Field(ge=0, description="Over queries; one draw of demonstrations cannot show more.")
    companions: dict[str, float] = Field(description="The task's other metrics.")
    query_scores: tuple[float, ...] | None = Field(None, description="One per query; None for macro-F1.")
    num_cut_answers: int = Field(0, ge=0, description="Free answers that were cut at the token limit.")

    chance: float | None = Field(None, description="Expected accuracy of guessing evenly.")
    majority: float | None = Field(None, description="Score of always giving the most frequent training answer.")
    tfidf: float | None = Field(None, description="TF-IDF with logistic regression on the same demonstrations.")
    level_notes: dict[str, str] = Field(default_factory=dict, description="Why a level is missing or special.")

    model: str = Field(description="The model as it was named on the command line.")
    model_name: str = Field(description="The model as reports call it.")
    model_fingerprint: str = Field(description="Hash of the weights.")
    text_format: dict[str, Any] = Field(description="How examples became text.")
    prompt_hash: str = Field(description="Hash of the tokens of the context and of every query.")
    num_context_tokens: int = Field(ge=0, description="Tokens of instruction and demonstrations.")
    max_context_tokens: int = Field(description="Most tokens that prefix, query and answer could take.")
    trained_context_tokens: int | None = Field(None, description="Longest row in fine-tuning, if known.")
    trained_shots: int | None = Field(None, description="Most demonstrations before an answer in fine-tuning.")
    beyond_training: bool = Field(False, description="More tokens or shots than fine-tuning ever showed.")
    seen_in_training: bool | None = Field(
        None, description="Fine-tuning used this task or a sibling of its source; None where no manifest says."
    )

    versions: dict[str, str]
    created: datetime
    seconds: float = Field(ge=0, description="Encoding the context and answering all queries.")

    @property
    def stem(self) -> str:
        """Return the name that the record, its predictions and its context share."""
        return file_stem(self.task, self.num_shots_asked, self.seed, self.key)


class PredictedAnswer(_Record):
    """One line of a predictions file."""

    origin: str = Field(description="Where the test row stands.")
    query: str
    answer: str
    references: tuple[str, ...]
    scores: dict[str, float] = Field(description="Of this answer, one per metric that scores single answers.")
    log_probability: float | None = Field(description="Of the answer with its terminator, in nats.")
    stopped: bool = Field(True, description="False if the answer was cut at the token limit.")


class ShownExample(_Record):
    """One line of a context file: a demonstration, in the order in which it stood before the queries."""

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
    """Return a file name that a person can read and that the key makes unique."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", task).strip("-.")[:60] or "task"
    return f"{readable}-{num_shots}shots-seed{seed}-{key}"


RecordT = TypeVar("RecordT", bound=_Record)


class ResultStore:
    """A folder of results."""

    def __init__(self, folder: str | Path) -> None:
        """Name the folder; it is made when the first result is saved."""
        self.folder = Path(folder)

    def find(self, stem: str) -> Result | None:
        """Return the result of this name if it is there and whole.

        Raises:
            UserError: If the record is broken.
        """
        path = self.folder / f"{stem}{RECORD_ENDING}"
        return read_record(path) if path.is_file() else None

    def save(self, result: Result, predictions: Iterable[PredictedAnswer], context: Iterable[ShownExample]) -> Path:
        """Write predictions and context, then the record: where a record stands, the rest is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(result, PREDICTIONS_ENDING), _lines(predictions))
        write_atomically(self._path(result, CONTEXT_ENDING), _lines(context))
        path = self._path(result, RECORD_ENDING)
        write_atomically(path, result.model_dump_json(indent=1) + "\n")
        return path

    def rename_model(self, result: Result, model_name: str) -> Result:
        """Let reports call the model of a kept result by another name."""
        renamed = result.model_copy(update={"model_name": model_name})
        write_atomically(self._path(result, RECORD_ENDING), renamed.model_dump_json(indent=1) + "\n")
        return renamed

    def load(self) -> list[Result]:
        """Read all records of the folder and of the folders in it, in the order in which they were made.

        Raises:
            UserError: If the folder is missing or holds no record, or a record is broken.
        """
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder; expected one that `manyicl evaluate` wrote.")
        records = [read_record(path) for path in sorted(self.folder.rglob(f"*{RECORD_ENDING}"))]
        if not records:
            raise UserError(
                f"{self.folder} holds no result (*{RECORD_ENDING}). "
                f"Run `manyicl evaluate --output {self.folder}` first."
            )
        return sorted(records, key=lambda record: (record.created, record.stem))

    def predictions(self, result: Result) -> list[PredictedAnswer]:
        """Read the predictions of a result; empty where their file was not kept."""
        return self._kept(result, PREDICTIONS_ENDING, PredictedAnswer)

    def context(self, result: Result) -> list[ShownExample]:
        """Read the demonstrations of a result in order; empty where their file was not kept."""
        return self._kept(result, CONTEXT_ENDING, ShownExample)

    def _path(self, result: Result, ending: str) -> Path:
        return self.folder / f"{result.stem}{ending}"

    def _kept(self, result: Result, ending: str, kind: type[RecordT]) -> list[RecordT]:
        path = next(iter(self.folder.rglob(_literal(f"{result.stem}{ending}"))), None)
        if path is None or not path.stat().st_size:
            return []
        records = []
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8. Delete the result and evaluate again.") from error
        # Not splitlines: answers may contain line separators that JSON leaves as they are.
        for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
            try:
                records.append(kind.model_validate_json(line))
            except ValidationError as error:
                raise UserError(
                    f"{path}:{number} is not a whole record ({error.errors()[0]['msg']}). Delete the result and "
                    "evaluate again."
                ) from error
        return records


def read_record(path: Path) -> Result:
    """Read one record.

    Raises:
        UserError: If the file is not a whole record of this version.
    """
    try:
        return Result.model_validate_json(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        problem = str(error)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        problem = f"{place}: {first['msg']}, found {shown(first['input'])}" if place else first["msg"]
    raise UserError(f"{path} is not a whole result record of this version ({problem}). Delete it and evaluate again.")


def _lines(records: Iterable[_Record]) -> str:
    return "".join(record.model_dump_json() + "\n" for record in records)


def _literal(name: str) -> str:
    return re.sub(r"([\[\]?*])", r"[\1]", name)
