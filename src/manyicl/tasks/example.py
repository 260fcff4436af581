"""Query and Example, of which a task consists."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Query:
    """Text that a model answers: everything before the answer and, in multiple choice, the row's options.

    Attributes:
        text: Rendered text of the query.
        choices: Options of this row, one of which is the answer; None unless the task is multiple choice.
    """

    text: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A query and its answer.

    Attributes:
        query: Text to be answered.
        answer: The answer that is used in demonstrations and supervised in training.
        references: Every accepted answer; the first is ``answer``.
        origin: Location of the row, such as ``train.jsonl:12``.
    """

    query: Query
    answer: str
    references: tuple[str, ...]
    origin: str = ""
