"""Prepare queries for a backend: render them, encode them, and refuse those that cannot be answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from manyicl.engine.backend import Sampling, Wanted
from manyicl.episodes.text_format import Preceding
from manyicl.errors import QueryError, UserError
from manyicl.tasks.task import Columns, Query, Task

ItemT = TypeVar("ItemT")


@dataclass(frozen=True, slots=True)
class EncodedQuery:
    """A query of a task, rendered and encoded once; `Engine.prefill` and `Engine.predict` take it in place of a row.

    Attributes:
        query: The rendered query.
        preceding: What it comes after: a demonstration, the instruction or nothing.
        token_ids: Its tokens up to where the answer begins, (Q,).
        option_ids: Tokens of each label or choice with the end-of-answer text; empty for free answers.
    """

    query: Query
    preceding: Preceding
    token_ids: tuple[int, ...]
    option_ids: tuple[tuple[int, ...], ...]


Row = Columns | str | Query | EncodedQuery


@dataclass(frozen=True, slots=True)
class FittingQuery:
    """A query that fits after a prefix: its number, the tokens after the prefix, and its options."""

    number: int
    token_ids: tuple[int, ...]
    options: tuple[str, ...]
    option_ids: tuple[tuple[int, ...], ...]


def checked_query(row: Columns | str | Query, task: Task) -> Query:
    """Render a row, and refuse a query without text, with half a character, or with options where there are none.

    Raises:
        UserError: If so, or if the row lacks a column.
    """
    query = row if isinstance(row, Query) else task.query(row)
    if not query.text.strip():
        raise UserError("empty_query", "it is empty", expected="a text to answer")
    try:
        "".join((query.text, *(query.choices or ()))).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            "half_a_character",
            f"it holds {error.object[error.start]!r}, half of a character",
            remedy="Save the text as UTF-8.",
        ) from error
    if bool(query.choices) != bool(task.choices_column):
        raise UserError(
            "choices_mismatch",
            f"it does not suit task {task.name!r}",
            expected="options of its own" if task.choices_column else "no options of its own",
            found=repr(query.choices),
        )
    return query


def query_error(error: UserError, number: int) -> QueryError:
    """Say which query a mistake is in."""
    same = QueryError(
        error.code, error.what, expected=error.expected, found=error.found, remedy=error.remedy, field=error.field
    )
    return same.at(file=error.file, row=error.row if error.file else number)


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """Options of `Engine.predict` that suit the task and each other."""

    scores: Wanted
    abstain_below: float | None
    sampling: Sampling | None


def checked_options(
    task: Task, rows: object, scores: Wanted, abstain_below: float | None, sampling: Sampling | None
) -> AnswerOptions:
    """Take the options of `Engine.predict`, and refuse those that contradict each other or the task.

    Raises:
        UserError: If they do.
    """
    if isinstance(rows, str | Mapping | Query | EncodedQuery) or not isinstance(rows, Iterable):
        raise UserError(
            "not_a_list",
            "predict answers a list of rows",
            expected="an iterable of rows",
            found=f"one {type(rows).__name__}",
            remedy="Put the row in a list.",
        )
    if scores not in ("best", "all"):
        raise UserError(
            "unknown_value", "scores has no such value", expected="'best' or 'all'", found=repr(scores), field="scores"
        )
    if abstain_below is not None and not 0 <= abstain_below <= 1:
        what, found = "abstain_below is a probability among all labels", str(abstain_below)
        raise UserError("out_of_range", what, expected="from 0 to 1", found=found, field="abstain_below")
    if abstain_below is not None and scores != "all":
        raise _conflict("abstain_below needs scores='all'", "abstain_below", found=f"scores={scores!r}")
    if scores == "all" and not task.is_closed:
        raise _conflict(f"Task {task.name!r} has free answers; scores='all' needs labels to score", "scores")
    if sampling is not None and task.is_closed:
        what = f"Task {task.name!r} has a closed answer set, which is scored; sampling draws none"
        raise _conflict(what, "sampling")
    return AnswerOptions(scores, abstain_below, sampling)


def _conflict(what: str, field: str, found: str | None = None) -> UserError:
    return UserError("conflicting_options", what, found=found, field=field)


def in_batches(items: Iterator[ItemT], most: int) -> Iterator[list[ItemT]]:
    """Yield lists of up to ``most`` items; where the iterator raises, those before come first, then the error."""
    batch: list[ItemT] = []
    while True:
        try:
            # Not list.extend: nobody promises that it keeps the items of an iterator that raises.
            for item in islice(items, most - len(batch)):
                batch.append(item)
        except UserError:
            if batch:
                yield batch
            raise
        if not batch:
            return
        yield batch
        batch = []
