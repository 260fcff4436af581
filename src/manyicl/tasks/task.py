"""What is asked: Query, Example and Task, plain data without tokenizer or tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from manyicl.errors import UserError, counted, shown
from manyicl.tasks.demonstrations import Sampling, demonstration_order
from manyicl.tasks.listed import listed
from manyicl.tasks.template import Template

Family = Literal["classification", "nli", "qa", "summarization", "generation", "math"]
FAMILIES: tuple[str, ...] = get_args(Family)

Columns = Mapping[str, object]


class EmptyOptionError(UserError):
    """A row has no options, or an empty one: the mistake of this row, not of the task."""


@dataclass(frozen=True, slots=True)
class Query:
    """What a model is asked: the text before the answer and, in multiple choice, the row's own options."""

    text: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A query and its answer, as the task holds it.

    Attributes:
        query: What is asked.
        answer: The answer a demonstration shows and training supervises.
        references: Every accepted answer; the first is ``answer``.
        origin: Where the row stands, such as ``train.jsonl:12``.
    """

    query: Query
    answer: str
    references: tuple[str, ...]
    origin: str = ""


@dataclass(frozen=True)
class Task:
    """Examples of one task with the templates that made them.

    Attributes:
        name: Unique among the tasks of a run.
        family: One of ``FAMILIES``.
        metric: Name of a metric in ``manyicl.evaluation.metrics``.
        train: Examples that may become demonstrations or training targets.
        test: Examples that are only ever asked. Disjoint from ``train`` in content.
        labels: The closed answer set, in a fixed order; None for free answers and per-row choices.
        instruction_template: Renders with ``labels`` in scope; None when the task has no instruction.
        query_template: Renders a row's columns to the query text.
        columns: Columns that the query template names, so that a plain string can stand for a row with one.
        choices_column: Where a row holds its options, if the task is multiple choice; see ``listed``.
        source: What the task was drawn from; tasks of one source are siblings and never unseen to each other.
        data_hash: Hash of the rendered instruction, the labels and the examples of both sides.
        dropped: Reason -> number of rows left out when the task was read.
        max_answer_tokens: Limit for free answers, if the task states one.
    """

    name: str
    family: Family
    metric: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...] | None
    instruction_template: Template | None
    query_template: Template
    columns: tuple[str, ...]
    choices_column: str | None
    source: str
    data_hash: str
    dropped: Mapping[str, int]
    max_answer_tokens: int | None = None

    def instruction(self, labels: tuple[str, ...] | None = None) -> str:
        """Render the instruction, with ``labels`` in place of the task's own where they were renamed."""
        if self.instruction_template is None:
            return ""
        return self.instruction_template.render({"labels": list(labels or self.labels or ())})

    def query(self, row: Columns | str) -> Query:
        """Render a row, or a plain string where the template has one column, to a query.

        Raises:
            UserError: If a column is missing, or a string is given to a template with several columns.
        """
        if isinstance(row, str):
            if len(self.columns) != 1 or self.choices_column is not None:
                raise UserError(
                    f"Task {self.name!r} asks with the columns {list(self.columns)}; a plain string fills one. "
                    "Give a mapping with these keys."
                )
            row = {self.columns[0]: row}
        if not isinstance(row, Mapping):
            raise UserError(
                f"Task {self.name!r} is asked with a mapping of the columns {list(self.columns)}; found {shown(row)}."
            )
        choices = None
        if self.choices_column is not None:
            value = listed(row, self.choices_column)
            if not isinstance(value, list | tuple) or not value:
                error = EmptyOptionError if value == [] else UserError
                raise error(
                    f"Task {self.name!r} takes its options from the column {self.choices_column!r}; "
                    f"expected a non-empty list there, found {shown(value)}."
                )
            if any(choice is None or not str(choice).strip() for choice in value):
                raise EmptyOptionError(
                    f"An option in the column {self.choices_column!r} is empty: {shown(list(value))}."
                )
            choices = tuple(str(choice).strip() for choice in value)
        return Query(self.query_template.render(row), choices)

    def demonstrations(self, num_shots: int, seed: int = 0, sampling: Sampling = "balanced") -> tuple[Example, ...]:
        """Choose demonstrations from the training side; 64 of one seed begin with its 32.

        Raises:
            UserError: If the task has fewer training examples than ``num_shots``, or that is negative.
        """
        if num_shots < 0:
            raise UserError(f"num_shots is {num_shots}; expected 0 or more demonstrations of task {self.name!r}.")
        if num_shots > len(self.train):
            raise UserError(
                f"Task {self.name!r} has {counted(len(self.train), 'training example')}; {num_shots} were "
                "asked for. Use fewer shots or add rows."
            )
        order = demonstration_order([example.answer for example in self.train], seed, sampling)
        return tuple(self.train[position] for position in order[:num_shots])
