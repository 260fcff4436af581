"""Prepare queries for a backend: render them, encode them, and refuse those that cannot be answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, TypedDict, TypeVar, cast, get_args

from manyicl.engine.backend import Sampling, ScoreScope, out_of_range
from manyicl.engine.label_scores import MOST_LABELS_SCORED
from manyicl.episodes.text_format import Preceding
from manyicl.errors import UserError, did_you_mean, pluralized
from manyicl.tasks.task import Columns, Example, Query, Task

ItemT = TypeVar("ItemT")
BadRows = Literal["refuse", "report"]
# A batch may hold so many items for each that counts, so that a stream of bad rows alone takes no memory.
MOST_ITEMS_PER_COUNTED = 4


@dataclass(frozen=True, slots=True)
class EncodedQuery:
    """A query of a task, rendered and encoded once; `Engine.prefill` and `Engine.predict` take it in place of a row.

    Attributes:
        query: The rendered query.
        preceding: What it comes after: a demonstration, the instruction or nothing.
        token_ids: Its tokens up to where the answer begins, (Q,); in the channel form, to the end of the example.
        option_ids: Tokens of each label or choice with the end-of-answer text; empty for free answers. In the channel
            form, up to where the query begins.
        own_ids: Tokens of the examples that were retrieved for it, which come before all of these.
    """

    query: Query
    preceding: Preceding
    token_ids: tuple[int, ...]
    option_ids: tuple[tuple[int, ...], ...]
    own_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Number of its tokens, without those of its options."""
        return len(self.own_ids) + len(self.token_ids)


Row = Columns | str | Query | EncodedQuery
# A row of a stream, or why it cannot be answered, where that is known before.
StreamedRow = Row | UserError
# A query with its number in the stream, from 1, or why the row of that number cannot be answered.
Numbered = tuple[int, EncodedQuery | UserError]
# Finds the examples that come between a prefix and a query.
Retrieve = Callable[[Query], Sequence[Example]]


def is_query(item: Numbered) -> bool:
    """Tell whether a row of a stream can be answered, as far as is known."""
    return isinstance(item[1], EncodedQuery)


def queries_of(batch: Iterable[Numbered]) -> list[EncodedQuery]:
    """Return the queries of a batch, without the rows that cannot be answered."""
    return [query for _, query in batch if isinstance(query, EncodedQuery)]


def numbered_rows(rows: Iterable[StreamedRow], numbers: Iterable[int] | None) -> Iterator[tuple[int, StreamedRow]]:
    """Yield each row with its number, from 1 where none are given.

    Raises:
        UserError: If there are more of one than of the other, once the fewer are used up.
    """
    if numbers is None:
        yield from enumerate(rows, start=1)
        return
    missing = object()
    for num_pairs, (number, row) in enumerate(zip_longest(numbers, rows, fillvalue=missing)):
        if number is missing or row is missing:
            found = f"more {'rows' if number is missing else 'numbers'} than {num_pairs}"
            raise UserError("other_count_of_numbers", "numbers and rows differ in count", found=found)
        yield cast(int, number), cast(StreamedRow, row)


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
        what = f"it holds {error.object[error.start]!r}, half of a character"
        raise UserError("half_a_character", what, remedy="Save the text as UTF-8.") from error
    if bool(query.choices) != bool(task.choices_column):
        what = f"it does not suit task {task.name!r}"
        expected = "options of its own" if task.choices_column else "no options of its own"
        raise UserError("choices_mismatch", what, expected=expected, found=repr(query.choices))
    return query


class AnswerOptions(TypedDict, total=False):
    """Arguments of `Engine.predict` that say how queries are answered; they are explained there."""

    scores: ScoreScope
    abstain_below: float | None
    blend: bool
    sampling: Sampling | None
    bad_rows: BadRows
    num_answered: int
    num_similar: int


def has_few_labels(task: Task) -> bool:
    """Tell whether a task has labels or options, few enough for all of them to be scored by default."""
    return task.is_closed and len(task.labels or ()) <= MOST_LABELS_SCORED


def can_blend(task: Task) -> bool:
    """Tell whether a task has a closed label set, small enough to blend its scores with those of the words."""
    return task.labels is not None and len(task.labels) <= MOST_LABELS_SCORED


def require_blendable(task: Task) -> None:
    """Refuse a task whose answers cannot be blended.

    Raises:
        UserError: If so.
    """
    if not can_blend(task):
        without_labels = "options of each row" if task.choices_column else "free answers"
        found = pluralized(len(task.labels), "label") if task.labels else without_labels
        what = f"the answers of task {task.name!r} cannot be blended with those of a linear classifier"
        expected = f"a closed set of at most {MOST_LABELS_SCORED} labels"
        raise UserError("not_blendable", what, expected=expected, found=found, field="blend")


def require_options(task: Task, rows: object, options: AnswerOptions, *, retrieves: bool = False) -> None:
    """Refuse options of `Engine.predict` that are unknown or contradict each other or the task, and one row for a list.

    Args:
        task: Task of the queries.
        rows: Their rows.
        options: What `Engine.predict` was given.
        retrieves: Whether each query gets additional examples.

    Raises:
        UserError: If there are any.
    """
    if isinstance(rows, str | Mapping | Query | EncodedQuery) or not isinstance(rows, Iterable):
        found, remedy = f"one {type(rows).__name__}", "Put the row in a list."
        raise UserError("not_a_list", "predict answers a list of rows", found=found, remedy=remedy)
    if unknown := sorted(options.keys() - AnswerOptions.__annotations__.keys()):
        remedy = did_you_mean(unknown[0], AnswerOptions.__annotations__)
        raise UserError("unknown_option", f"there is no option {unknown[0]!r}", remedy=remedy, field=unknown[0])
    scores, abstain_below = options.get("scores", "best"), options.get("abstain_below")
    if scores not in get_args(ScoreScope):
        what, expected = "scores has no such value", "'best', 'best_two' or 'all'"
        raise UserError("unknown_value", what, expected=expected, found=repr(scores), field="scores")
    if (bad_rows := options.get("bad_rows", "refuse")) not in ("refuse", "report"):
        what = "bad_rows has no such value"
        raise UserError("unknown_value", what, expected="'refuse' or 'report'", found=repr(bad_rows), field="bad_rows")
    if (num_answered := options.get("num_answered", 0)) < 0:
        raise out_of_range("num_answered", num_answered, "at least 0")
    if (num_similar := options.get("num_similar", 0)) < 0:
        raise out_of_range("num_similar", num_similar, "at least 0")
    if abstain_below is not None and not 0 <= abstain_below <= 1:
        raise out_of_range("abstain_below", abstain_below, "a probability among all labels, from 0 to 1")
    if blend := options.get("blend", False):
        require_blendable(task)
    conflicts = {
        "abstain_below": (abstain_below is not None and scores != "all", "abstain_below needs scores='all'"),
        "blend": (blend and (scores != "all" or retrieves), _why_no_blend(retrieves)),
        "scores": (scores != "best" and not task.is_closed, f"scores={scores!r} needs labels, not free answers"),
        "sampling": (options.get("sampling") and task.is_closed, "sampling draws free answers, and labels are scored"),
    }
    for field, (is_conflict, what) in conflicts.items():
        if is_conflict:
            raise UserError("conflicting_options", f"Task {task.name!r}: {what}", field=field)


def _why_no_blend(retrieves: bool) -> str:
    if retrieves:
        return "weights of a blend are fitted without additional examples for each query"
    return "blend needs scores='all'"


def in_batches(
    items: Iterable[ItemT], most: int, counts: Callable[[ItemT], bool] = lambda _: True
) -> Iterator[list[ItemT]]:
    """Yield lists of up to ``most`` items; where the iterable raises, those before come first, then the error.

    Args:
        items: The items.
        most: Most items of a list that count.
        counts: Tells whether an item counts. Others come along, so that which of those that count are together does
            not depend on them, up to ``MOST_ITEMS_PER_COUNTED`` times as many items.
    """
    batch: list[ItemT] = []
    num_counted = 0
    try:
        # Not list.extend: nobody promises that it keeps the items of an iterator that raises.
        for item in items:
            batch.append(item)
            num_counted += counts(item)
            if num_counted == most or len(batch) == MOST_ITEMS_PER_COUNTED * most:
                yield batch
                batch, num_counted = [], 0
    except UserError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch
