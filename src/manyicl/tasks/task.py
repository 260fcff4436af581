"""Task: a TaskSpec with training and test examples, plain data without tokenizer or tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from manyicl.checked import validated
from manyicl.errors import UserError, pluralized, quoted
from manyicl.paths import required_path
from manyicl.tasks.demonstrations import ShotSampling, demonstrations_in_order
from manyicl.tasks.example import Example, Query
from manyicl.tasks.spec import FAMILIES, Columns, Family, TaskSpec

__all__ = ["FAMILIES", "Columns", "Example", "Family", "Query", "Task", "TaskSpec", "hash_content"]

Pairs = Iterable[tuple[str, str] | Example]  # queries with their answers


@dataclass(frozen=True)
class Task:
    """Training and test examples of one task, with the spec that says how they become queries.

    Attributes:
        spec: Everything about the task except its examples.
        train: Examples that may become demonstrations or training targets; any sequence, even a lazy one.
        test: Examples that are used only as test queries. Disjoint from ``train`` in content.
        data_hash: Hash of the rendered instruction, the labels and the examples of both sides.
        dropped: Reason -> number of rows dropped when the task was read.
        dropped_rows: Reason -> origins of the first of these rows; not stored with a task.

    Examples:
        >>> task = Task.from_examples("mood", [("what a film", "good"), ("so dull", "bad")], labels=("good", "bad"))
        >>> task.query("not again").text
        'not again'
        >>> [example.answer for example in task.demonstrations(2, seed=1)]
        ['good', 'bad']
    """

    spec: TaskSpec
    train: Sequence[Example]
    test: Sequence[Example] = ()
    data_hash: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)
    dropped_rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)

    @classmethod
    def from_examples(
        cls,
        name: str,
        examples: Pairs,
        *,
        labels: Iterable[str] | Literal["from_train"] | None = None,
        test: Pairs = (),
        instruction: str | None = None,
        family: Family | None = None,
        metric: str | None = None,
        source: str | None = None,
        max_answer_tokens: int | None = None,
    ) -> Task:
        """Make a task from queries and answers; the same rules apply as to rows of a file.

        Args:
            name: Name of the task.
            examples: Training examples, as (query, answer) pairs.
            labels: Closed answer set, or ``from_train`` for the answers that occur; None for free answers.
            test: Test examples, as pairs; training examples with one of their queries are dropped and counted.
            instruction: Template of the instruction, with ``labels`` in scope.
            family: Kind of task, any name where a metric is given; by default classification with labels, generation
                without.
            metric: Name of the metric; by default the usual one of the family.
            source: Origin of the data; by default the task's name.
            max_answer_tokens: Limit for free answers, in tokens.

        Raises:
            UserError: If there are no examples, an answer is empty or not a label, or a name or template is wrong.
        """
        from manyicl.tasks.building import task_of_examples

        family = family or ("generation" if labels is None else "classification")
        keys = {"family": family, "instruction": instruction, "metric": metric, "source": source}
        return task_of_examples(name, examples, test, labels, {**keys, "max_answer_tokens": max_answer_tokens})

    @classmethod
    def open(cls, folder: str | Path) -> Task:
        """Open a task that `store` wrote; its examples stay on disk and are read when they are used.

        Raises:
            UserError: If the folder holds no stored task, a damaged one, or one of another version.
        """
        from manyicl.tasks.stored import open_task

        return open_task(required_path(folder, "folder"))

    def store(self, folder: str | Path) -> Task:
        """Write the task to a new folder, and return it with its examples memory-mapped from there.

        The returned task pickles as its spec and its location, whatever its size.

        Raises:
            UserError: If the folder exists already, or cannot be made, or a text holds half a character.
        """
        from manyicl.tasks.stored import store_task

        return store_task(self, required_path(folder, "folder"))

    @property
    def name(self) -> str:
        """Name of the task, unique within a run."""
        return self.spec.name

    @property
    def family(self) -> Family:
        """Kind of task, such as classification or qa."""
        return self.spec.family

    @property
    def metric(self) -> str:
        """Name of a metric of ``manyicl.evaluation.metrics``."""
        return self.spec.metric

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Closed answer set in a fixed order; None for free answers and per-row options."""
        return self.spec.labels

    @property
    def is_closed(self) -> bool:
        """Whether every answer is one of the task's labels or of the row's own options."""
        return self.spec.is_closed

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the query template names."""
        return self.spec.columns

    @property
    def choices_column(self) -> str | None:
        """Column that holds a row's options, if the task is multiple choice."""
        return self.spec.choices_column

    @property
    def source(self) -> str:
        """Origin of the data; tasks of the same source never count as unseen to each other."""
        return self.spec.source

    @property
    def max_answer_tokens(self) -> int | None:
        """Limit for free answers in tokens, if the task states one."""
        return self.spec.max_answer_tokens

    def instruction(self, labels: tuple[str, ...] | None = None) -> str:
        """Render the instruction, with ``labels`` instead of the task's own if they were renamed."""
        return self.spec.instruction(labels)

    def query(self, row: Columns | str) -> Query:
        """Render a row as a query; a plain string is enough if the template has one column.

        Raises:
            UserError: If a column is missing, or a string is given to a template with several columns.
        """
        return self.spec.query(row)

    def with_spec(self, **changes: Any) -> Task:
        """Return the task with other fields in its spec, examples unchanged, as in ``with_spec(metric="accuracy")``.

        Raises:
            UserError: If the spec has no such field, or the field no such value.
        """
        spec = validated(TaskSpec, {**self.spec.model_dump(), **changes}, None)
        return replace(self, spec=spec)

    def demonstrations(self, num_shots: int, seed: int = 0, sampling: ShotSampling = "balanced") -> tuple[Example, ...]:
        """Choose demonstrations from the training examples; with one seed, the first 32 of 64 are the same 32.

        Raises:
            UserError: If ``num_shots`` is negative or more than the number of training examples, or there is no such
                sampling.
        """
        if not 0 <= num_shots <= len(self.train):
            what = f"Task {self.name!r} has {pluralized(len(self.train), 'training example')}"
            expected, found = f"num_shots from 0 to {len(self.train)}", str(num_shots)
            remedy = "Use fewer shots or add rows." if num_shots > 0 else None
            raise UserError("num_shots_out_of_range", what, expected=expected, found=found, remedy=remedy)
        if sampling not in (known := get_args(ShotSampling)):
            expected, found = " or ".join(map(repr, known)), quoted(sampling)
            raise UserError("unknown_sampling", "there is no such sampling", expected=expected, found=found)
        order = demonstrations_in_order([example.answer for example in self.train], seed, sampling)
        return tuple(self.train[position] for position in islice(order, num_shots))


def hash_content(task: Task) -> str:
    """Hash the rendered instruction, the labels and the examples of both sides: all that a model may be shown.

    Returns:
        SHA-256 in hex.

    Raises:
        UserError: If the instruction fails on the labels.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps((task.instruction(), task.labels)).encode())
    digest.update(b"\n")
    for side in (task.train, task.test):
        for example in side:
            fields = (example.query.text, example.query.choices, example.answer, example.references)
            digest.update(json.dumps(fields, ensure_ascii=False).encode())
            digest.update(b"\n")
        digest.update(b"--\n")
    return digest.hexdigest()
