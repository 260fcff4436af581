"""Tasks as the routes use them: rules checked before a write, versions compiled after it, questions prepared.

The only place that knows both the database and the thread that owns the engine.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from manyicl.checked import validated
from manyicl.engine.queries import checked_query
from manyicl.errors import UserError, pluralized
from manyicl.server.answer_options import HowToAnswer, how_to_answer, require_settings
from manyicl.server.bad_rows import require_all
from manyicl.server.conditions import require_matching
from manyicl.server.logging import log, place_of
from manyicl.server.recent import Recent
from manyicl.server.records import (
    DemonstrationRecord,
    Idempotency,
    TaskRecord,
    TaskSettings,
    VersionKey,
    VersionRecord,
    Written,
)
from manyicl.server.row_input import DEMONSTRATIONS, InputRow
from manyicl.server.schemas import AnswerChoices, NewTaskKeys, SettingsIn, TaskChanges
from manyicl.server.turns import Turns
from manyicl.server.work import Compiled, TaskSource
from manyicl.tasks.building import TaskBuilder
from manyicl.tasks.demonstrations import demonstrations_in_order
from manyicl.tasks.rows import LocatedRow
from manyicl.tasks.schema import TaskFile, TwoFiles
from manyicl.tasks.task import Example, Query, Task, TaskSpec

if TYPE_CHECKING:
    from manyicl.server.interfaces import Worker
    from manyicl.server.settings import ServerSettings
    from manyicl.server.task_store import TaskStore

# How often a write is tried that another write went before, each time with what that one left. Writes of one task take
# turns here, so that only a write past this service can go before.
MOST_TRIES = 5
MOST_CACHED = 1024
# How long the answer to a deletion waits until the worker, between two chunks of its work, has deleted the prefixes.
FORGET_SECONDS = 10
_BOUNDED_TEXTS = ("query", "answer", "instruction", "description", "source")
_NOT_OVER_HTTP = ("name", "data", "bad_rows", "on_both_sides")


@dataclass(frozen=True)
class Question:
    """Rows to answer, and what answers them.

    Attributes:
        task: The task.
        version: The version that answers; perhaps not ready yet.
        rows: Rendered queries, or why a row cannot be answered.
        numbers: Number of each row, or its line in the body.
        how: How they are answered.
    """

    task: TaskRecord
    version: VersionRecord
    rows: list[Query | UserError]
    numbers: list[int]
    how: HowToAnswer


class Deadline:
    """Bounds the time that templates of one request take all together."""

    def __init__(self, seconds: float) -> None:
        """Start now."""
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def require_time(self) -> None:
        """Refuse to go on after the end.

        Raises:
            UserError: If it is over.
        """
        if time.monotonic() > self._end:
            what = f"the templates take more than {self._seconds:g} seconds on these rows"
            raise UserError("templates_too_slow", what, remedy="Send fewer rows at once, or simplify the templates.")


class TaskService:
    """Creates, changes and reads tasks, and prepares questions to them."""

    def __init__(self, tasks: TaskStore, settings: ServerSettings, model: str) -> None:
        """Take the database.

        Args:
            tasks: Tasks in the database.
            settings: Settings of the server.
            model: Identity of the model, a hash.
        """
        self.tasks = tasks
        self.model = model
        self._settings = settings
        self._worker: Worker | None = None
        self._to_rebuild: set[VersionKey] = set()
        self._rebuilt: set[VersionKey] = set()
        self._majorities: Recent[VersionKey, float] = Recent(MOST_CACHED)
        self._lock = threading.Lock()
        self._turns = Turns()

    @property
    def worker(self) -> Worker:
        """The thread that owns the engine."""
        assert self._worker is not None, "start comes first"
        return self._worker

    def start(self, worker: Worker) -> None:
        """Compile what has to be compiled: versions that are not ready, and those of another model, again.

        Args:
            worker: The thread that owns the engine.
        """
        self._worker = worker
        found = self.tasks.at_start()
        other_model = [task.ready for task in found if task.ready is not None and task.ready_model != self.model]
        if other_model:
            problem = {"code": "other_model", "sentence": "Another model compiled it; it is compiled again."}
            self.tasks.set_compiling(other_model, problem)
        self._to_rebuild.update(other_model)
        for task in found:
            if task.ready in self._to_rebuild:
                worker.compile(task.ready)
            if task.newest_state != "ready":
                worker.compile(task.newest)
        for task in found:
            if task.is_pinned and task.ready is not None and task.ready not in self._to_rebuild:
                worker.compile(task.ready)  # from the disk into memory

    @property
    def rebuilt(self) -> tuple[int, int]:
        """How many of the versions of another model are compiled again, and how many there were."""
        return len(self._rebuilt), len(self._to_rebuild)

    # --- Changes

    def create(
        self, owner: str, new: NewTaskKeys, rows: Sequence[InputRow], idempotency: Idempotency | None
    ) -> Written:
        """Make a task.

        Raises:
            UserError: If a key, a template or a row breaks a rule, or the name is taken.
        """
        if (replayed := self._replayed(owner, idempotency)) is not None:
            return replayed
        keys = self.checked_keys(new.task)
        settings = settings_of(new.settings)
        task = self._built(new.name, keys, rows)
        require_settings(settings, task)
        columns, order = _columns(rows), _context_order(task.train)
        written = self.tasks.create(owner, new.name, keys, settings, columns, task.labels, idempotency, order=order)
        self._remember_majority(written.version.key, task.train)
        return self._after(written)

    def add(
        self,
        owner: str,
        task: str,
        rows: Sequence[InputRow],
        revisions: frozenset[int] | None,
        idempotency: Idempotency | None,
    ) -> Written:
        """Add demonstrations.

        Raises:
            UserError: If a row breaks a rule of the task, there are too many, or the task was changed meanwhile.
        """

        def write(record: TaskRecord) -> Written:
            known = self.tasks.demonstrations(record.newest.key)
            together = [*map(_located, known), *rows]
            built = self._built(record.name, record.keys, together)
            columns, order = _columns(rows), _context_order(built.train[len(known) :])
            return self.tasks.add(owner, record.id, columns, built.labels, record.revision, idempotency, order=order)

        return self._write(owner, task, revisions, idempotency, write)

    def correct(
        self,
        owner: str,
        task: str,
        number: int,
        columns: Mapping[str, Any],
        revisions: frozenset[int] | None,
        idempotency: Idempotency | None,
    ) -> Written:
        """Replace a demonstration.

        Raises:
            UserError: If there is none of that number, or the row breaks a rule of the task.
        """

        def write(record: TaskRecord) -> Written:
            known = self.tasks.demonstrations(record.newest.key)
            _require_numbers(known, [number])
            together = [_located(row if row.number != number else replace(row, columns=columns)) for row in known]
            labels = self._built(record.name, record.keys, together).labels
            return self.tasks.correct(owner, record.id, number, columns, labels, record.revision, idempotency)

        return self._write(owner, task, revisions, idempotency, write)

    def remove(
        self,
        owner: str,
        task: str,
        numbers: Sequence[int],
        revisions: frozenset[int] | None,
        idempotency: Idempotency | None,
    ) -> Written:
        """Remove demonstrations.

        Raises:
            UserError: If there is none of a number, or the others do not make a task.
        """

        def write(record: TaskRecord) -> Written:
            known = self.tasks.demonstrations(record.newest.key)
            _require_numbers(known, numbers)
            others = [_located(row) for row in known if row.number not in numbers]
            if not others:
                remedy = "Delete the task, or correct the demonstration."
                raise UserError("last_demonstration", "a task keeps at least one demonstration", remedy=remedy)
            labels = self._built(record.name, record.keys, others).labels
            return self.tasks.remove(owner, record.id, numbers, labels, record.revision, idempotency)

        return self._write(owner, task, revisions, idempotency, write)

    def restore(
        self,
        owner: str,
        task: str,
        version: int,
        revisions: frozenset[int] | None,
        idempotency: Idempotency | None,
    ) -> Written:
        """Make a new version with the demonstrations of an earlier one.

        Raises:
            UserError: If there is no such version.
        """

        def write(record: TaskRecord) -> Written:
            labels = self.tasks.version(VersionKey(record.id, version)).labels
            return self.tasks.restore(owner, record.id, version, labels, record.revision, idempotency)

        return self._write(owner, task, revisions, idempotency, write)

    def update(self, owner: str, task: str, changes: TaskChanges, revisions: frozenset[int] | None) -> TaskRecord:
        """Change the name or settings of a task.

        Raises:
            UserError: If the name is taken, a setting does not suit the task, or it was changed meanwhile.
        """
        with self._turns.of(self.tasks.get(owner, task).id):
            return self._update(owner, task, changes, revisions)

    def _update(self, owner: str, task: str, changes: TaskChanges, revisions: frozenset[int] | None) -> TaskRecord:
        record = self.tasks.get(owner, task)
        require_matching(record, revisions)
        given = changes.model_dump(exclude_unset=True)
        name = given.pop("name", None)
        settings = replace(
            record.settings,
            **{key: value for key, value in given.items() if value is not None or key == "abstain_below"},
        )
        if settings == record.settings and name in (None, record.name):
            return record
        require_settings(settings, task_without_rows(record, record.newest))
        record = self.tasks.update(
            owner, record.id, name=name, settings=settings, if_revision=record.revision if revisions else None
        )
        if "pinned" in given:
            self.worker.set_pinned(record.id, settings.pinned)
        return record

    def delete(self, owner: str, task: str, revisions: frozenset[int] | None) -> TaskRecord:
        """Delete a task with all its texts.

        Raises:
            UserError: If there is none, or it was changed meanwhile.
        """
        record = self.tasks.get(owner, task)
        require_matching(record, revisions)
        record = self.tasks.delete(owner, record.id, record.revision if revisions else None)
        forgotten = self.worker.forget(record.id)
        try:
            forgotten.result(FORGET_SECONDS)  # so that its keys and values are gone from the disk, too
        except Exception as error:  # the task is gone all the same; the next start deletes what is left of it
            log.warning("prefixes_not_deleted", task=record.id, error=place_of(error))
        with self._lock:
            self._majorities.discard(lambda key: key.task_id == record.id)
        return record

    def _write(
        self,
        owner: str,
        task: str,
        revisions: frozenset[int] | None,
        idempotency: Idempotency | None,
        write: Callable[[TaskRecord], Written],
    ) -> Written:
        """Read the task, check, and write if it is still what was read; otherwise try again.

        Writes of one task wait for each other, as a check may take longer than the time until the next write.

        Args:
            owner: Whose task.
            task: Its id or name.
            revisions: Revisions that the caller allows; None for any.
            idempotency: Idempotency key of the request.
            write: Checks and writes, given the task.

        Raises:
            UserError: As ``write`` does; or if others wrote in between every time, or once where the caller named
                revisions.
        """
        if (replayed := self._replayed(owner, idempotency)) is not None:
            return replayed
        with self._turns.of(self.tasks.get(owner, task).id):
            return self._write_in_turn(owner, task, revisions, idempotency, write)

    def _write_in_turn(
        self,
        owner: str,
        task: str,
        revisions: frozenset[int] | None,
        idempotency: Idempotency | None,
        write: Callable[[TaskRecord], Written],
    ) -> Written:
        """Do what `_write` says, when no other write of the task is being checked."""
        # The same request, sent again meanwhile, may have gone before.
        if (replayed := self._replayed(owner, idempotency)) is not None:
            return replayed
        for attempt in range(1, MOST_TRIES + 1):
            record = self.tasks.get(owner, task)
            require_matching(record, revisions)
            try:
                written = write(record)
            except UserError as error:
                if error.code != "changed_meanwhile" or revisions is not None or attempt == MOST_TRIES:
                    raise
                continue
            return self._after(written)
        raise AssertionError("the last try returns or raises")

    def _replayed(self, owner: str, idempotency: Idempotency | None) -> Written | None:
        return self.tasks.replayed(owner, idempotency) if idempotency is not None else None

    def _after(self, written: Written) -> Written:
        """Let the version be compiled that a write made; also after a replay, as a kill may have come in between."""
        if written.version.state == "compiling":
            self.worker.compile(written.version.key)
        return written

    # --- Rules

    def checked_keys(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of a new task, with those that are usual.

        Raises:
            UserError: If one is unknown here, has a wrong value, or a text is too long.
        """
        for key in _NOT_OVER_HTTP:
            if key in keys:
                remedy = "Leave it out." if key != "name" else "Give the name beside `task`."
                raise UserError("unknown_key", f"unknown key {key!r}", remedy=remedy, field=f"task.{key}")
        known = {key: _with_texts(value) for key, value in keys.items() if value is not None}
        for key in _BOUNDED_TEXTS:
            if isinstance(known.get(key), str) and len(known[key]) > self._settings.max_template_characters:
                what, expected = (
                    f"{key}: the text is too long",
                    f"at most {self._settings.max_template_characters:,}",
                )
                found = pluralized(len(known[key]), "character")
                raise UserError("text_too_long", what, expected=expected, found=found, field=f"task.{key}")
        is_closed = known.get("labels") is not None or known.get("choices") is not None
        usual = {"query": "{{ query }}", "answer": "{{ answer }}"}
        known = {"family": "classification" if is_closed else "generation", **usual, **known}
        TaskBuilder(_task_file(known), None, "task")  # compiles the templates
        return known

    def _built(self, name: str, keys: Mapping[str, Any], rows: Sequence[InputRow]) -> Task:
        """Make the whole task, so that all its rules hold.

        Args:
            name: Its name.
            keys: Keys of its task file.
            rows: All its rows.

        Raises:
            UserError: If a rule is broken; it names all bad rows.
        """
        if len(rows) > self._settings.max_demonstrations:
            expected, found = f"at most {self._settings.max_demonstrations:,}", f"{len(rows):,}"
            raise UserError("too_many_demonstrations", "too many demonstrations", expected=expected, found=found)
        num_characters, most = sum(map(_num_characters, rows)), self._settings.max_task_characters
        if num_characters > most:
            what, found = "the demonstrations of the task are too long together", f"{num_characters:,}"
            raise UserError("task_too_large", what, expected=f"at most {most:,} characters", found=found)
        builder, deadline = TaskBuilder(_task_file(keys), None, name), Deadline(self._settings.render_seconds)
        examples, errors = [], []
        for number, row in enumerate(rows, start=1):
            deadline.require_time()
            try:
                if isinstance(row, UserError):
                    raise row
                examples.append(builder.example(row))
            except UserError as error:
                errors.append(error.at(file=DEMONSTRATIONS, row=_number(row) or number))
        require_all(errors, len(rows))
        return builder.task_of(examples)

    # --- What the worker needs

    def source(self, key: VersionKey) -> TaskSource:
        """Return what a version is compiled from.

        Raises:
            UserError: If the task is gone.
        """
        record, rows = self.tasks.source(key)
        version = self.tasks.version(key)
        builder = TaskBuilder(_task_file(record.keys), None, record.name)
        in_order = sorted(rows, key=lambda row: row.place)
        task = builder.task_of([builder.example(_located(row)) for row in in_order])
        self._remember_majority(key, task.train)
        settings = record.settings
        num_shots, num_retrieved = settings.num_shots, settings.num_retrieved
        answers = version.answers if version.model == self.model else None
        earlier = None if record.ready in (None, key.version) else VersionKey(record.id, record.ready)
        return TaskSource(key, task, num_shots, num_retrieved, answers, settings.pinned, earlier)

    def on_ready(self, key: VersionKey, compiled_version: Compiled) -> None:
        """Note that a version can answer; called by the worker."""
        found = compiled_version
        is_known = self.tasks.set_ready(
            key,
            num_tokens=found.num_tokens,
            num_shots=found.num_shots,
            num_dropped=found.num_dropped,
            answers=found.answers,
            model=found.model,
        )
        if not is_known and not self.tasks.is_there(key.task_id):
            self.worker.forget(key.task_id)
        self._count_rebuilt(key)

    def on_failed(self, key: VersionKey, error: UserError) -> None:
        """Note why a version cannot be compiled; called by the worker."""
        self.tasks.set_failed(key, error.fields())
        self._count_rebuilt(key)

    def _count_rebuilt(self, key: VersionKey) -> None:
        with self._lock:
            self._rebuilt |= self._to_rebuild & {key}

    # --- Questions

    def version_that_answers(self, owner: str, task: str, version: int | None) -> tuple[TaskRecord, VersionRecord]:
        """Return a task, and the version of it that answers; see `answering_version`.

        Raises:
            UserError: If there is none.
        """
        record = self.tasks.get(owner, task)
        return record, self.answering_version(record, version)

    def answering_version(self, record: TaskRecord, version: int | None = None) -> VersionRecord:
        """Return the version of a task that answers: the one that is named, the newest ready one, or the newest.

        Raises:
            UserError: If the one that is named does not exist.
        """
        number = version or record.ready or record.newest.key.version
        if number == record.newest.key.version:
            return record.newest
        return self.tasks.version(VersionKey(record.id, number))

    def question(self, owner: str, task: str, choices: AnswerChoices, rows: Sequence[InputRow]) -> Question:
        """Find the version that answers, and render the rows.

        Raises:
            UserError: If there is no such task or version, or the options do not suit it.
        """
        record, version = self.version_that_answers(owner, task, choices.version)
        without_rows = task_without_rows(record, version)
        how = how_to_answer(choices, record.settings, without_rows)
        numbers = [_number(row) or number for number, row in enumerate(rows, start=1)]
        return Question(record, version, self.rendered(without_rows, rows), numbers, how)

    def rendered(self, task: Task, rows: Iterable[InputRow]) -> list[Query | UserError]:
        """Render rows to queries here and not where the model waits; one that cannot be answered becomes its error.

        Raises:
            UserError: If the templates take too long.
        """
        deadline, found = Deadline(self._settings.render_seconds), list[Query | UserError]()
        for number, row in enumerate(rows, start=1):
            deadline.require_time()
            try:
                if isinstance(row, UserError):
                    raise row
                found.append(checked_query(row.columns, task))
            except UserError as error:
                found.append(error.at(row=_number(row) or number))
        return found

    def require_ready_or_compiling(self, key: VersionKey) -> VersionRecord:
        """Return a version as it is now.

        Raises:
            UserError: If it failed, or is gone.
        """
        try:
            version = self.tasks.version(key)
        except UserError as error:
            if self.tasks.is_there(key.task_id):
                raise
            raise UserError("unknown_task", "the task was deleted meanwhile", field="task") from error
        if version.state == "failed":
            why = (version.problem or {}).get("sentence", "")
            what = f"version {key.version} of the task could not be compiled"
            raise UserError("version_failed", what, remedy=str(why))
        return version

    # --- What is known of a task besides its record

    def majority(self, record: TaskRecord, version: VersionRecord) -> float | None:
        """Return the share of the most frequent answer among the demonstrations; None without labels."""
        if version.labels is None:
            return None
        with self._lock:
            known = self._majorities.get(version.key)
        if known is not None:
            return known
        builder = TaskBuilder(_task_file(record.keys), None, record.name)
        examples = [builder.example(_located(row)) for row in self.tasks.demonstrations(version.key)]
        return self._remember_majority(version.key, examples)

    def _remember_majority(self, key: VersionKey, examples: Iterable[Example]) -> float:
        counts = Counter(example.answer for example in examples)
        majority = max(counts.values(), default=0) / max(1, counts.total())
        with self._lock:
            self._majorities[key] = majority
        return majority


def settings_of(given: SettingsIn) -> TaskSettings:
    """Return settings as the database keeps them."""
    return TaskSettings(**given.model_dump())


def task_without_rows(record: TaskRecord, version: VersionRecord) -> Task:
    """Return the task of a version without its rows: what is needed to render queries."""
    return _task_without_rows(record.name, json.dumps(dict(record.keys), sort_keys=True), version.labels)


@lru_cache(MOST_CACHED)
def _task_without_rows(name: str, keys: str, labels: tuple[str, ...] | None) -> Task:
    spec = TaskBuilder(_task_file(json.loads(keys)), None, name).spec
    # As the builder does once it knows the labels: the usual metric depends on them.
    return Task(TaskSpec(**{**spec.model_dump(exclude_unset=True), "labels": labels}), ())


def _task_file(keys: Mapping[str, Any]) -> TaskFile:
    return validated(TaskFile, {**keys, "data": TwoFiles(train=(DEMONSTRATIONS,))}, None, "task")


def _located(row: DemonstrationRecord) -> LocatedRow:
    """Return a demonstration as a row, whose line is its number in the task."""
    return LocatedRow(dict(row.columns), DEMONSTRATIONS, row.number)


def _number(row: InputRow) -> int | None:
    """Return the number of a row, or its line."""
    return row.row if isinstance(row, UserError) else row.line


def _num_characters(row: InputRow) -> int:
    return 0 if isinstance(row, UserError) else sum(len(str(value)) for value in row.columns.values())


def _columns(rows: Iterable[InputRow]) -> list[Mapping[str, Any]]:
    return [row.columns for row in rows if isinstance(row, LocatedRow)]


def _require_numbers(known: Iterable[DemonstrationRecord], numbers: Sequence[int]) -> None:
    missing = set(numbers) - {row.number for row in known}
    if missing:
        raise UserError("unknown_demonstration", f"the task has no demonstration {min(missing)} now")


def _with_texts(value: Any) -> Any:
    """Write numbers as texts, as a task file has them: a label is what the user wrote."""
    if isinstance(value, dict):
        return {str(key): _with_texts(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_texts(part) for part in value]
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _context_order(examples: Sequence[Example]) -> list[int]:
    """Return the positions of new demonstrations in the order of the context, so that a sorted upload is mixed."""
    return list(demonstrations_in_order([example.answer for example in examples], seed=0, sampling="balanced"))
