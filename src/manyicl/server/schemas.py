"""Requests and answers of the API, as the OpenAPI document describes them."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from manyicl.checked import Section
from manyicl.engine.label_scores import MOST_LABELS_SCORED
from manyicl.server.records import Change, JobKind, JobState, VersionState

# PostgreSQL's integer.
MOST_COUNTED = 2**31 - 1
MOST_SHOTS = 100_000
MOST_RETRIEVED = 64
MOST_SIMILAR = 100
# Two names that look alike are one name to its reader; a comma, a colon and an at sign have meanings of their own.
_INVISIBLE = r"\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
NAME_PATTERN = rf"^[^\s/\\,:@{_INVISIBLE}]+$"
NAME_MEANING = "unique among yours; no spaces, invisible characters, '/', '\\', ',', ':' or '@'"
_RESERVED_NAMES = re.compile(r"tsk_.*|\.{1,2}")

Number = Annotated[int, Field(ge=1, le=MOST_COUNTED)]
Probability = Annotated[float, Field(ge=0, le=1)]
# Numbers of a row are kept as the text that is written there.
RowIn = Annotated[dict[str, Any], Field(description="Column -> value.")]
DemonstrationIn = Annotated[dict[str, Any], Field(description="Column -> value; the answer is a column, too.")]


def required_name(name: str) -> str:
    """Return the name of a task.

    Raises:
        ValueError: If it could be taken for an id, or for a step in a path.
    """
    if _RESERVED_NAMES.fullmatch(name):
        raise ValueError("a name is not '.' or '..', and does not begin like an id, with 'tsk_'")
    return name


# --- Requests


class SettingsIn(Section):
    """Settings of a new task besides the keys of a task file."""

    pinned: bool = Field(False, description="Whether its prefix always stays in memory.")
    abstain_below: Probability | None = Field(
        None, description="Least probability among the labels, below which there is no answer; null for none."
    )
    blend: bool = Field(False, description="Whether scores are combined with those of a linear classifier on words.")
    num_shots: int | None = Field(
        None, ge=0, le=MOST_SHOTS, description="Most demonstrations in the prefix; null for as many as fit."
    )
    num_retrieved: int = Field(
        0, ge=0, le=MOST_RETRIEVED, description="Further demonstrations to put before each query, the most similar."
    )


class NewTaskKeys(Section):
    """A task without its demonstrations."""

    name: str = Field(min_length=1, max_length=200, pattern=NAME_PATTERN, description=f"Name, {NAME_MEANING}.")
    task: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of a task file without `name` and `data`: family, query, answer, labels, instruction and so "
        "on. By default the columns are `query` and `answer`, and answers are free unless labels are given.",
    )
    settings: SettingsIn = Field(default_factory=SettingsIn, description="Settings besides these.")

    @field_validator("name")
    @classmethod
    def _fit_name(cls, name: str) -> str:
        return required_name(name)


class NewTask(NewTaskKeys):
    """A task, and its first demonstrations."""

    demonstrations: list[DemonstrationIn] = Field(min_length=1, description="Rows with their answers.")


class TaskOfTable(Section):
    """A task whose demonstrations come as lines: what the body of JSON would say, in the query."""

    name: str | None = Field(
        None, min_length=1, max_length=200, pattern=NAME_PATTERN, description=f"Name, {NAME_MEANING}."
    )
    query: str | None = Field(None, description="Template of the query; by default `{{ query }}`.")
    answer: str | None = Field(None, description="Template of the answer; by default `{{ answer }}`.")
    family: str | None = Field(None, description="Kind of task.")
    instruction: str | None = Field(None, description="Template over `labels`; comes once, before all demonstrations.")
    labels: list[str] | None = Field(None, description="All labels, one each, or `from_train` alone.")


class TaskChanges(Section):
    """Changes of a task besides its demonstrations; what is not given stays."""

    name: str | None = Field(
        None, min_length=1, max_length=200, pattern=NAME_PATTERN, description=f"New name, {NAME_MEANING}."
    )
    pinned: bool | None = Field(None, description="Whether its prefix always stays in memory.")
    abstain_below: Probability | None = Field(None, description="Least probability of an answer; null for none.")
    blend: bool | None = Field(None, description="Whether scores are combined with those of a linear classifier.")

    @field_validator("name")
    @classmethod
    def _fit_name(cls, name: str | None) -> str | None:
        return None if name is None else required_name(name)


class NewDemonstrations(Section):
    """Demonstrations to add."""

    demonstrations: list[DemonstrationIn] = Field(min_length=1, description="Rows with their answers.")


class AnswerOptionsIn(Section):
    """Options of predictions."""

    scores: Literal["best", "best_two", "all"] | None = Field(
        None,
        description="Whether the best label is enough, or the second best with its margin, or all labels with their "
        f"probabilities; by default all of up to {MOST_LABELS_SCORED} labels, and the best two of more.",
    )
    abstain_below: Probability | None = Field(
        None, description="Least probability of an answer; the task's by default."
    )
    blend: bool | None = Field(None, description="Whether to combine with a linear classifier; by default the task's.")
    retrieve: int | None = Field(
        None, ge=0, le=MOST_RETRIEVED, description="Demonstrations retrieved for each query; by default the task's."
    )
    similar: int = Field(0, ge=0, le=MOST_SIMILAR, description="Most similar demonstrations to return with an answer.")
    temperature: float | None = Field(None, ge=0.01, le=100, description="Samples free answers; null for greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Probability that the most probable tokens reach.")
    seed: int | None = Field(None, ge=0, le=MOST_COUNTED, description="Seed of the sampling.")


class AnswerChoices(AnswerOptionsIn):
    """Options of predictions, whatever the rows come in, and which version answers."""

    version: Number | None = Field(None, description="Version that answers; by default the newest ready one.")


class PredictIn(AnswerChoices):
    """Rows to answer, and how."""

    rows: list[RowIn] = Field(min_length=1, description="Queries.")


class EvaluateIn(AnswerChoices):
    """Rows with their answers, and how they are answered."""

    rows: list[DemonstrationIn] = Field(min_length=1, description="Queries with their answers.")


class NewJobKeys(Section):
    """What is done with the rows of a job."""

    kind: JobKind = Field("predict", description="What is done: the rows are answered, or evaluated.")
    task: str = Field(min_length=1, max_length=200, description="Id or name of the task; an id goes first.")
    version: Number | None = Field(None, description="Version that answers; by default the newest ready one.")
    options: AnswerOptionsIn = Field(default_factory=AnswerOptionsIn, description="How they are answered.")


class NewJob(NewJobKeys):
    """Rows to answer in the background, and how."""

    rows: list[RowIn] = Field(min_length=1, description="Queries; to be evaluated, with their answers.")


class JobOfLines(AnswerChoices):
    """What the query says of a job whose rows come as lines, a table or a form; in JSON the body says it."""

    kind: JobKind | None = Field(None, description="What is done: the rows are answered, or evaluated.")
    task: str | None = Field(None, min_length=1, max_length=200, description="Id or name of the task; needed.")


# --- Answers


class Out(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(frozen=True)


class CurvePoint(Out):
    """How well demonstrations were predicted that had so many before them."""

    shots: tuple[int, int] = Field(description="Fewest and most demonstrations before an answer of this point.")
    num_answers: int = Field(description="Number of answers.")
    accuracy: float = Field(description="Share of right answers, chosen token by token.")
    standard_error: float | None = Field(description="Standard error of the accuracy; null for one answer.")
    nats_per_answer: float = Field(description="Mean negative log-probability of an answer.")


class PrefixOut(Out):
    """Where the prefix of the version that answers is."""

    resident: bool = Field(description="Whether it is in memory, so that a prediction starts at once.")
    bytes: int = Field(description="Its size in memory; 0 where it is not there.")
    pinned: bool = Field(description="Whether it always stays there.")
    rebuilt: bool = Field(
        description="Whether it was computed again when it was used last, as it was neither in memory nor whole on the "
        "disk: its file was missing or damaged, or had made room for others."
    )


class SettingsOut(Out):
    """Settings of a task."""

    pinned: bool
    abstain_below: float | None
    blend: bool
    num_shots: int | None
    num_retrieved: int


class VersionOut(Out):
    """A version of a task."""

    version: int = Field(description="Its number, from 1.")
    created_at: datetime
    change: Change = Field(description="What made it.")
    state: VersionState = Field(description="Whether it can answer.")
    num_demonstrations: int
    labels: list[str] | None = Field(description="Its closed label set; null for free answers and row options.")
    num_tokens: int | None = Field(description="Tokens of its prefix; null before it is ready.")
    num_shots: int | None = Field(description="Demonstrations in its prefix; null before it is ready.")
    num_dropped: int = Field(description="Demonstrations that did not fit the context.")
    model: str | None = Field(description="Identity of the model that compiled it; null before it is ready.")
    problem: dict[str, Any] | None = Field(description="Why it failed, or why it is compiled again.")


class TaskOut(Out):
    """A task. `num_shots` and what follows it describe the version that answers, or the newest where there is none."""

    id: str = Field(description="Id; never given to another task.")
    name: str = Field(description="Name, unique among your tasks.")
    revision: int = Field(description="Rises by one with every change; the ETag.")
    version: int = Field(description="Its newest version.")
    ready_version: int | None = Field(description="Version that answers; null while there is none.")
    state: VersionState = Field(description="State of the newest version.")
    task: dict[str, Any] = Field(description="Keys of its task file without `name` and `data`.")
    settings: SettingsOut
    labels: list[str] | None
    num_demonstrations: int = Field(description="Demonstrations of the newest version.")
    num_shots: int | None
    num_dropped: int
    num_tokens: int | None
    curve: list[CurvePoint] | None = Field(description="Accuracy by the number of demonstrations; null in lists.")
    majority: float | None = Field(description="Share of the most frequent answer; null in lists and without labels.")
    model: str | None
    problem: dict[str, Any] | None = Field(description="Why the newest version failed, or is compiled again.")
    prefix: PrefixOut
    created_at: datetime
    updated_at: datetime


class WrittenOut(Out):
    """Result of a change of demonstrations."""

    task: TaskOut
    version: VersionOut = Field(description="The version that the change made.")
    numbers: tuple[int, int] | None = Field(
        description="Numbers of the first and last demonstration that were added, corrected, removed or brought back."
    )


class DemonstrationOut(Out):
    """A demonstration as it was given."""

    number: int = Field(description="Its number, from 1; kept when it is corrected, never given again.")
    added_in: int = Field(description="Version that it was first part of.")
    columns: dict[str, Any] = Field(description="Column -> value; numbers are texts.")


class TaskPage(Out):
    """Some tasks."""

    data: list[TaskOut]
    next_cursor: str | None = Field(description="Cursor of the next page; null on the last one.")


class VersionPage(Out):
    """Some versions."""

    data: list[VersionOut]
    next_cursor: str | None = Field(description="Cursor of the next page; null on the last one.")


class DemonstrationPage(Out):
    """Some demonstrations."""

    data: list[DemonstrationOut]
    next_cursor: str | None = Field(description="Cursor of the next page; null on the last one.")


class CurveOut(Out):
    """The curve of the version that answers."""

    task: str
    version: int | None
    curve: list[CurvePoint]
    majority: float | None


class SimilarOut(Out):
    """A demonstration in the context that is like the query: similar, not a cause of the answer."""

    model_config = ConfigDict(frozen=True, extra="allow")


class PredictionOut(Out):
    """The answer to one row."""

    model_config = ConfigDict(frozen=True, extra="allow")

    answer: str | None = Field(description="The best label or choice, or the text; null where it abstained.")
    log_probability: float | None = Field(None, description="Log-probability of the answer, in nats.")
    stopped: bool | None = Field(None, description="False if a free answer was cut at its limit.")
    abstained: bool | None = Field(None, description="Whether its probability was below the threshold.")
    num_shots: int | None = Field(None, description="Demonstrations before the query.")
    blended: bool | None = Field(None, description="Whether the scores are combined with those of the words.")
    probability: float | None = Field(None, description="Its probability among the labels, where all were scored.")
    second: str | None = Field(None, description="The second best label.")
    second_probability: float | None = Field(None, description="Probability of the second best label.")
    margin: float | None = Field(None, description="Log-probability of the answer less that of the second best.")
    scores: dict[str, float] | None = Field(None, description="Label -> log-probability.")
    probabilities: dict[str, float] | None = Field(None, description="Label -> probability among the labels.")
    similar: list[SimilarOut] | None = Field(None, description="Most similar demonstrations.")
    problem: Any = Field(None, description="Why there is no answer, in lines and jobs.")


class PredictOut(Out):
    """Answers to the rows, in their order."""

    task: str = Field(description="Id of the task.")
    version: int = Field(description="Version that answered.")
    model: str | None = Field(description="Identity of the model.")
    predictions: list[PredictionOut]


class LabelOut(Out):
    """How well one label is recognised."""

    label: str
    precision: float
    recall: float
    f1: float
    num_queries: int = Field(description="Rows with this label.")


class ConfusionOut(Out):
    """Two labels of which the first was answered as the second."""

    expected: str
    answer: str
    num_answers: int


class WrongAnswer(Out):
    """A row that was answered wrongly."""

    row: int = Field(description="Its number, or its line where rows came as lines or a table; a job counts its rows.")
    expected: str
    answer: str
    log_probability: float | None
    probability: float | None = Field(description="Probability among the labels, where all were scored.")


class EvaluationOut(Out):
    """Scores of a task on rows with answers. Each of its metrics, such as `accuracy`, is a key of its own."""

    model_config = ConfigDict(frozen=True, extra="allow")

    task: str = Field(description="Id of the task.")
    version: int = Field(description="Version that answered.")
    model: str | None = Field(description="Identity of the model.")
    metric: str = Field(description="The task's metric; its score is the key of that name.")
    standard_error: float | None = Field(description="Standard error of that score; null where it has none.")
    num_rows: int
    num_scored: int = Field(description="Rows that are in the scores.")
    num_problems: int = Field(description="Rows that could not be answered, or hold no usable answer.")
    num_abstained: int = Field(description="Rows for which the model abstained; they are in no score.")
    num_guesses_right: int = Field(description="Rows among them where its guess would have been right.")
    labels: list[LabelOut] | None = Field(description="Scores of each label, the most frequent first.")
    confusion: list[ConfusionOut] | None = Field(description="Confused labels, the most frequent first.")
    num_errors: int = Field(description="Wrong answers.")
    errors: list[WrongAnswer] = Field(description="Up to a hundred of them, the surest first.")
    problems: list[RowProblem] = Field(description="Up to a hundred rows that could not be answered.")


class JobOut(Out):
    """Long work on many rows."""

    id: str
    kind: JobKind
    task: str
    version: int
    options: dict[str, Any]
    state: JobState
    num_rows: int
    num_done: int
    num_problems: int
    created_at: datetime
    finished_at: datetime | None
    problem: dict[str, Any] | None = Field(description="Why it failed.")
    summary: dict[str, Any] | None = Field(description="Scores of an evaluation that is done.")


class JobPage(Out):
    """Some jobs."""

    data: list[JobOut]
    next_cursor: str | None


class RowProblem(Out):
    """Why one row of several cannot be used."""

    row: int | None = None
    field: str | None = None
    code: str
    detail: str


class Problem(Out):
    """An error (RFC 9457)."""

    type: str = Field(description="Kind of the error, as a URN.")
    title: str = Field(description="What is wrong.")
    status: int = Field(description="HTTP status.")
    detail: str = Field(description="What is wrong, what was expected and found, and what to do.")
    code: str = Field(description="Kind of the error, for programs.")
    row: int | None = Field(None, description="Row of the request, from 1.")
    field: str | None = Field(None, description="Column or key.")
    expected: str | None = None
    found: str | None = None
    remedy: str | None = None
    errors: list[RowProblem] | None = Field(None, description="All bad rows, up to a hundred.")
    request_id: str | None = None


class Health(Out):
    """Whether the process runs."""

    status: Literal["ok"]


class Readiness(Out):
    """Whether the server can answer, and how far it is with what it compiles again after a change of its model."""

    status: Literal["ready", "compiling", "failed", "stopping"] = Field(
        description="`compiling` while tasks that could answer before are compiled again, `failed` where the model or "
        "the database cannot be used."
    )
    model: str
    num_versions_to_compile: int = Field(description="Versions that were to be compiled again at the start.")
    num_versions_compiled: int = Field(description="Those of them that are done.")
