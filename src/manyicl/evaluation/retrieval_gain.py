"""Measure what rows retrieved for each query add to a prefix, on training rows that are not in it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from manyicl.errors import UserError
from manyicl.evaluation.advice import FEWEST_ROWS, Retrieval
from manyicl.tasks.demonstrations import evenly_chosen
from manyicl.tasks.retrieval import Retriever
from manyicl.tasks.task import Example, Query, Task

if TYPE_CHECKING:
    from manyicl.engine.engine import Engine
    from manyicl.engine.prediction import Prediction
    from manyicl.engine.task_prefix import TaskPrefix

MOST_ROWS = 40


def measure_retrieval(engine: Engine, prefix: TaskPrefix, task: Task, num_retrieved: int) -> Retrieval | None:
    """Answer up to 40 training rows that are not in the prefix, with the rows most like each and without.

    A row is never retrieved for itself, nor one with the same text. Costs two answers for each of these rows.

    Args:
        engine: Engine that made the prefix.
        prefix: Some of the task's training rows.
        task: Task with all its training rows.
        num_retrieved: Most rows to retrieve for each.

    Returns:
        None where nothing can be measured: too few rows are left, answers are free, or bm25s is not installed.
    """
    in_prefix = {example.query.text for example in prefix.demonstrations}
    left = [example for example in task.train if example.query.text not in in_prefix]
    if not task.is_closed or len(left) < FEWEST_ROWS:
        return None
    most_alike = max(Counter(example.query.text for example in left).values())
    try:
        retriever = Retriever(left, num_retrieved + most_alike)
    except UserError as error:
        if error.code != "missing_requirement":
            raise
        return None

    def others(query: Query) -> Sequence[Example]:
        return [example for example in retriever(query) if example.query.text != query.text][-num_retrieved:]

    started = time.perf_counter()
    rows = evenly_chosen(left, (), MOST_ROWS)
    queries = [row.query for row in rows]
    without = list(engine.predict(prefix, queries, bad_rows="report"))
    with_others = list(engine.predict(prefix, queries, retrieve=others, bad_rows="report"))
    # A row may not fit after the prefix: it is then left aside on both sides.
    answered = [
        (row, one, other)
        for row, one, other in zip(rows, without, with_others, strict=True)
        if one.problem is None and other.problem is None
    ]
    return Retrieval(
        num_retrieved,
        [_is_right(one, row) for row, one, _ in answered],
        [_is_right(other, row) for row, _, other in answered],
        time.perf_counter() - started,
        num_too_long=len(rows) - len(answered),
    )


def _is_right(prediction: Prediction, row: Example) -> float:
    return float(prediction.answer in row.references)
