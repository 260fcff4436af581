"""What the server knows of tasks, their versions and demonstrations, jobs and callers, as plain data.

The database stores these records, the worker computes with them, the routes return them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

VersionState = Literal["compiling", "ready", "failed"]
Change = Literal["created", "added", "corrected", "removed", "restored"]
JobKind = Literal["predict", "evaluate"]
JobState = Literal["waiting", "running", "done", "failed", "cancelled"]
Scope = Literal["manage", "predict"]

# Owner of all tasks of a server on loopback that was started without keys.
LOCAL_OWNER = "local"


class VersionKey(NamedTuple):
    """Names one version of one task.

    Attributes:
        task_id: Id of the task, unique over all owners.
        version: Its version, from 1.
    """

    task_id: str
    version: int


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request, and what they may do.

    Attributes:
        owner: Whose tasks they see.
        scopes: ``manage`` to create, change and delete tasks, ``predict`` to read and ask them.
        key_id: Id of their key; None on a server without keys.
        requests_per_minute: Limit of this key; None for the server's.
        rows_per_minute: Limit of this key on rows to predict; None for the server's.
    """

    owner: str
    scopes: frozenset[Scope] = frozenset({"manage", "predict"})
    key_id: str | None = None
    requests_per_minute: int | None = None
    rows_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """Settings of a task besides the keys of its task file.

    Attributes:
        pinned: Whether its prefix always stays in memory.
        abstain_below: Least probability among the labels, below which there is no answer; None for none.
        blend: Whether label scores are combined with those of a linear classifier on the words, unless a request says.
        num_shots: Most demonstrations in the prefix; None for as many as fit. Fixed when the task is made.
        num_retrieved: Further demonstrations to put before each query, for which tokens are reserved; fixed, too.
    """

    pinned: bool = False
    abstain_below: float | None = None
    blend: bool = False
    num_shots: int | None = None
    num_retrieved: int = 0


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """One version of a task.

    Attributes:
        key: Which one.
        created_at: When it was written, in UTC.
        change: What made it.
        num_demonstrations: Its demonstrations.
        state: Whether it can answer.
        labels: Its closed label set; None for free answers and row options.
        num_tokens: Tokens of its prefix; None before it is ready, and so are those below.
        num_shots: Demonstrations in its prefix.
        num_dropped: Demonstrations that did not fit the context.
        answers: For each shot: demonstrations before it, log-probability in nats, 1 if the answer was right, else 0.
        model: Identity of the model that compiled it, a hash.
        problem: Why it failed, as `UserError.fields` gives it; or, while compiling, why again.
    """

    key: VersionKey
    created_at: datetime
    change: Change
    num_demonstrations: int
    state: VersionState = "compiling"
    labels: tuple[str, ...] | None = None
    num_tokens: int | None = None
    num_shots: int | None = None
    num_dropped: int = 0
    answers: tuple[tuple[int, float, int], ...] | None = None
    model: str | None = None
    problem: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task of an owner.

    Attributes:
        id: ``tsk_`` and random letters and digits; never given to another task.
        owner: Whose it is.
        name: Unique among the tasks of the owner.
        revision: Rises by one with every change of the task, its settings or its demonstrations; the ETag.
        keys: Keys of a task file without ``data`` and ``name``: family, templates, labels.
        settings: Settings.
        created_at: When it was made, in UTC.
        updated_at: When it was last changed.
        newest: Its newest version.
        ready: Number of its newest version that can answer; None where there is none.
    """

    id: str
    owner: str
    name: str
    revision: int
    keys: Mapping[str, Any]
    settings: TaskSettings
    created_at: datetime
    updated_at: datetime
    newest: VersionRecord
    ready: int | None = None


@dataclass(frozen=True, slots=True)
class TaskAtStart:
    """What a server that starts needs to know of a task.

    Attributes:
        newest: Its newest version.
        newest_state: State of that version.
        ready: Its newest version that can answer; None where there is none.
        ready_model: Identity of the model that compiled that one.
        is_pinned: Whether its prefix always stays in memory.
    """

    newest: VersionKey
    newest_state: str
    ready: VersionKey | None
    ready_model: str | None
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class DemonstrationRecord:
    """A demonstration as the user gave it.

    Attributes:
        number: Its number in the task, from 1, by time; kept when it is corrected, never given again.
        added_in: Version that it was first part of.
        columns: Column -> value of the row.
        place: Where it stands in the context: the demonstrations of a version are shown by rising place. Kept when it
            is corrected; what is added later has a higher one.
    """

    number: int
    added_in: int
    columns: Mapping[str, Any]
    place: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """Result of a write.

    Attributes:
        task: The task as it is now.
        version: The version that the write made.
        replayed: Whether the same request, by its idempotency key, was answered before; nothing was written then.
        numbers: Numbers of the demonstrations that the write added, corrected, removed or brought back, rising.
    """

    task: TaskRecord
    version: VersionRecord
    replayed: bool = False
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Idempotency:
    """The idempotency key of a request, and what the request was.

    Attributes:
        key: Value of the header ``Idempotency-Key``.
        request: Hash of method, path and body; another request with the same key is refused.
    """

    key: str
    request: str


@dataclass(frozen=True, slots=True)
class JobRecord:
    """Long work on many rows.

    Attributes:
        id: ``job_`` and random letters and digits.
        owner: Whose it is.
        kind: What is done with the rows.
        key: Version of the task that does it.
        options: Options of the predictions, with the task's settings where the request says nothing.
        state: How far it is.
        num_rows: Rows in all.
        num_done: Rows with a result.
        num_problems: Rows that could not be answered, among them.
        created_at: When it was requested, in UTC.
        finished_at: When it ended; None before.
        problem: Why it failed: code, sentence, and field as far as that is known.
        summary: Scores of an evaluation that is done; None before, and of predictions.
    """

    id: str
    owner: str
    kind: JobKind
    key: VersionKey
    options: Mapping[str, Any]
    state: JobState
    num_rows: int
    created_at: datetime
    num_done: int = 0
    num_problems: int = 0
    finished_at: datetime | None = None
    problem: Mapping[str, Any] | None = None
    summary: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key without its secret.

    Attributes:
        id: Public part of the key.
        owner: Whose tasks it opens.
        name: What it is for, as its maker called it.
        scopes: What it allows.
        created_at: When it was made, in UTC.
        revoked_at: When it was revoked; None while it is valid.
        requests_per_minute: Limit of this key; None for the server's.
        rows_per_minute: Limit of this key on rows to predict; None for the server's.
    """

    id: str
    owner: str
    name: str
    scopes: frozenset[Scope] = field(default_factory=frozenset)
    created_at: datetime | None = None
    revoked_at: datetime | None = None
    requests_per_minute: int | None = None
    rows_per_minute: int | None = None


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Limits on what is kept; None for no limit.

    Attributes:
        tasks: Most tasks of an owner.
        pinned: Most tasks of an owner whose prefixes always stay in memory.
        versions: Newest versions that are kept of a task.
        jobs: Most jobs of an owner, ended ones included.
        job_rows: Most rows of all those jobs together.
        idempotency_keys: Most requests of an owner that are remembered by their Idempotency-Key.
    """

    tasks: int | None = None
    pinned: int | None = None
    versions: int | None = None
    jobs: int | None = None
    job_rows: int | None = None
    idempotency_keys: int | None = None


NO_LIMITS = StoreLimits()
