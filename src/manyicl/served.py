"""What a task server answers, as plain data: tasks, versions, predictions, jobs; unknown keys are ignored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from manyicl.errors import MachineError, UserError

RecordT = TypeVar("RecordT")


@dataclass(eq=False, repr=False)
class RefusedRequestError(UserError):
    """A request that the server refused, with what its problem document says.

    Attributes:
        status: Status of the response, from 400 to 499.
        request_id: Name of the request in the log of the server.
        errors: All mistakes, where there are several, as one for each bad row.
    """

    status: int = 400
    request_id: str | None = None
    errors: tuple[UserError, ...] = ()


def error_of(problem: Mapping[str, Any]) -> UserError:
    """Make an error of a problem document, or of the problem of one row.

    Examples:
        >>> print(error_of({"code": "empty_query", "detail": "Query 3: it is empty.", "row": 3}))
        Query 3: it is empty.
        >>> print(error_of({"code": "empty_answer", "detail": "Demonstration 3: it is empty.", "row": 3}))
        demonstrations:3: it is empty.
    """
    sentence = next(
        (str(problem[key]) for key in ("detail", "sentence", "what", "title") if problem.get(key)), "refused"
    )
    row = problem.get("row")
    # The sentence of a `UserError` begins with the row, and a server says of a demonstration that it is one.
    what = sentence.removeprefix(f"Query {row}: ")
    file = "demonstrations" if what.startswith(demonstration := f"Demonstration {row}: ") else None
    what = what.removeprefix(demonstration)
    return UserError(str(problem.get("code", "refused")), what, file=file, row=row, field=problem.get("field"))


def refusal_of(status: int, problem: Mapping[str, Any]) -> RefusedRequestError:
    """Make the error of a request of its problem document."""
    error = error_of(problem)
    return RefusedRequestError(
        error.code,
        error.what,
        file=error.file,
        row=error.row,
        field=error.field,
        status=status,
        request_id=problem.get("request_id"),
        errors=tuple(map(error_of, problem.get("errors") or ())),
    )


def record_of(kind: type[RecordT], content: Any) -> RecordT:
    """Make a record of an object of JSON.

    Raises:
        MachineError: If it is none, or lacks a key.
    """
    try:
        known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
        return kind(**{name: value for name, value in content.items() if name in known})
    except (AttributeError, TypeError) as error:
        raise MachineError(f"The server answered with no {kind.__name__}: {error}.") from error


@dataclass(frozen=True)
class TaskInfo:
    """A task of a server, as it was when it was read.

    Attributes:
        id: Its id, which never changes.
        name: Its name, unique among the tasks of an owner.
        revision: Rises with every change; what ``if_revision`` is compared with.
        version: Its newest version.
        state: State of that version: ``compiling``, ``ready`` or ``failed``.
        ready_version: Its newest version that can answer; None where there is none.
        task: Keys of its task file: family, templates, labels.
        settings: Its settings: pinned, abstain_below, blend, num_shots, num_retrieved.
        labels: Closed label set; None for free answers and row options.
        num_demonstrations: Its demonstrations.
        num_shots: Demonstrations in the prefix; None before it is compiled, and so are those below.
        num_dropped: Demonstrations that did not fit the context.
        num_tokens: Tokens of the prefix.
        curve: Accuracy by demonstrations before the answer, as compiling yields it.
        majority: Accuracy of always giving the most frequent answer.
        model: Identity of the model that compiled it, a hash.
        problem: Why compiling failed, or why it is done again.
        prefix: Where the prefix is: resident, bytes, pinned, and whether it was rebuilt.
        created_at: When it was made, as text.
        updated_at: When it was last changed, as text.
    """

    id: str
    name: str
    revision: int
    version: int
    state: str
    ready_version: int | None = None
    task: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    labels: list[str] | None = None
    num_demonstrations: int = 0
    num_shots: int | None = None
    num_dropped: int | None = None
    num_tokens: int | None = None
    curve: list[Mapping[str, Any]] | None = None
    majority: float | None = None
    model: str | None = None
    problem: Mapping[str, Any] | None = None
    prefix: Mapping[str, Any] | None = None
    created_at: str | None = None
    updated_at: str | None = None


@dataclass(frozen=True)
class VersionInfo:
    """A version of a task.

    Attributes:
        version: Its number, from 1.
        change: What made it: ``created``, ``added``, ``corrected``, ``removed`` or ``restored``.
        state: ``compiling``, ``ready`` or ``failed``.
        num_demonstrations: Its demonstrations.
        labels: Closed label set; None for free answers and row options.
        num_shots: Demonstrations in its prefix; None before it is compiled, and so are those below.
        num_dropped: Demonstrations that did not fit the context.
        num_tokens: Tokens of its prefix.
        model: Identity of the model that compiled it.
        problem: Why compiling failed, or why it is done again.
        created_at: When it was written, as text.
    """

    version: int
    change: str
    state: str
    num_demonstrations: int = 0
    labels: list[str] | None = None
    num_shots: int | None = None
    num_dropped: int | None = None
    num_tokens: int | None = None
    model: str | None = None
    problem: Mapping[str, Any] | None = None
    created_at: str | None = None


@dataclass(frozen=True)
class Change:
    """Result of a write to the demonstrations of a task.

    Attributes:
        task: The task as it is now.
        version: The version that the write made.
        numbers: First and last number of the demonstrations that were added, corrected, removed or brought back; None
            where there are none.
        replayed: Whether the server had carried out the same request, by its idempotency key, before.
    """

    task: TaskInfo
    version: VersionInfo
    numbers: tuple[int, int] | None = None
    replayed: bool = False


@dataclass(frozen=True)
class ServedPrediction:
    """An answer to one query.

    Attributes:
        answer: The best label or choice, or the generated text; None where it abstained or there is a problem.
        log_probability: Log-probability of the answer, in nats; None where there is a problem.
        scores: Log-probability of every label or choice in nats, where all were wanted.
        probabilities: Probability of each among them.
        probability: That of the answer, or of the guess.
        second: The second best label or choice, where it was wanted.
        second_probability: Its probability, where all scores were wanted.
        margin: Log-probability of the answer less that of the second best, in nats.
        stopped: False if a generated answer was cut at the limit.
        abstained: True if the answer's probability among the labels was below the threshold.
        guess: What it would have answered, where it abstained.
        num_shots: Demonstrations before the query that all queries share.
        blended: True if the scores are combined with those of a linear classifier.
        similar: Demonstrations that are most like the query, where they were wanted.
        problem: Why there is no answer, where bad rows are reported.
    """

    answer: str | None = None
    log_probability: float | None = None
    scores: Mapping[str, float] | None = None
    probabilities: Mapping[str, float] | None = None
    probability: float | None = None
    second: str | None = None
    second_probability: float | None = None
    margin: float | None = None
    stopped: bool | None = True
    abstained: bool | None = False
    guess: str | None = None
    num_shots: int | None = 0
    blended: bool | None = False
    similar: list[Mapping[str, Any]] | None = None
    problem: UserError | None = None


class Predictions(list[ServedPrediction]):
    """The answers to one request, in order of its rows.

    Attributes:
        task: Id of the task.
        version: Version of the task that answered.
        model: Identity of the model.
    """

    def __init__(self, predictions: Iterable[ServedPrediction], task: str, version: int, model: str | None) -> None:
        """Take the predictions and who made them."""
        super().__init__(predictions)
        self.task, self.version, self.model = task, version, model


@dataclass(frozen=True)
class JobInfo:
    """Long work on many rows, as it was when it was read.

    Attributes:
        id: Its id.
        kind: ``predict`` or ``evaluate``.
        task: Id of the task.
        version: Version of the task that does it.
        state: ``waiting``, ``running``, ``done``, ``failed`` or ``cancelled``.
        num_rows: Rows in all.
        num_done: Rows with a result.
        num_problems: Rows that could not be answered, among them.
        summary: What came out of all rows together, of an evaluation that is done.
        problem: Why it failed.
        created_at: When it was made, as text.
        finished_at: When it ended, as text; None before.
    """

    id: str
    kind: str
    task: str
    version: int
    state: str
    num_rows: int = 0
    num_done: int = 0
    num_problems: int = 0
    summary: Mapping[str, Any] | None = None
    problem: Mapping[str, Any] | None = None
    created_at: str | None = None
    finished_at: str | None = None


def prediction_of(content: Any) -> ServedPrediction:
    """Make a prediction of what the server answers to one row; a problem becomes an error.

    Examples:
        >>> prediction_of({"answer": "billing", "log_probability": -0.1}).answer
        'billing'
        >>> prediction_of({"problem": {"code": "empty_query", "detail": "it is empty"}}).problem.code
        'empty_query'
    """
    problem = content.get("problem") if isinstance(content, Mapping) else None
    if problem is None:
        return record_of(ServedPrediction, content)
    written = problem if isinstance(problem, Mapping) else {"detail": problem}
    return record_of(ServedPrediction, {**content, "problem": error_of(written)})


def parsed(text: str) -> Any:
    """Parse JSON that the server answered.

    Raises:
        MachineError: If it is none.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise MachineError(f"The server answered with broken JSON: {error}.") from error
