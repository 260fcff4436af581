"""Prefill demonstrations so that the rows retrieved for every test query fit after them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from manyicl.errors import UserError
from manyicl.tasks.retrieval import Retriever
from manyicl.tasks.task import Example, Query, Task

if TYPE_CHECKING:
    from manyicl.engine.engine import Engine
    from manyicl.engine.queries import Retrieve
    from manyicl.engine.task_prefix import TaskPrefix


def prefill_to_retrieve(
    engine: Engine, task: Task, demonstrations: Sequence[Example], num_retrieved: int, reuse: TaskPrefix | None
) -> tuple[TaskPrefix, Retrieve | None]:
    """Encode the demonstrations that fit with every test query and the rows retrieved for it.

    Rows are retrieved from the training rows that are no demonstrations. Which ones are left is known once
    demonstrations are chosen, and how many of these fit depends on the retrieved rows: so it is tried until both fit.

    Args:
        engine: Engine of the model.
        task: Task whose test rows are the queries.
        demonstrations: Demonstrations, in order.
        num_retrieved: Most rows to retrieve for each query; 0 for none.
        reuse: Another prefix of this engine, whose first tokens are shared.

    Returns:
        The prefix, and what retrieves rows for a query; None where nothing is retrieved or no row is left.

    Raises:
        UserError: As for `Engine.prefill`, or if bm25s is not installed.
    """
    chosen = tuple(demonstrations)
    while True:
        retrieve = _retriever_that_fits(engine, task, num_retrieved, chosen) if num_retrieved else None
        reuse = prefix = engine.prefill(task, chosen, retrieve=retrieve, reuse=reuse)
        if retrieve is None or prefix.num_shots == len(chosen):
            return prefix, retrieve
        chosen = prefix.demonstrations


def _retriever_that_fits(
    engine: Engine, task: Task, num_retrieved: int, demonstrations: Sequence[Example]
) -> Retrieve | None:
    """Retrieve the most similar rows that the context holds with a query alone, so that every query can be answered.

    No row with the text of the query is retrieved, in case the task's sides share one.
    """
    try:
        retriever = Retriever(task.train, num_retrieved, exclude=demonstrations)
    except UserError as error:
        if error.code != "no_example_left":
            raise
        return None
    most = engine.max_context_tokens - engine.encoder.num_preamble_tokens(task.instruction())

    @cache
    def retrieve(query: Query) -> tuple[Example, ...]:
        room = most - engine.num_reserved_tokens(task, [query])
        fitting: list[Example] = []
        for example in reversed(retriever(query)):
            room -= engine.encoder.num_shot_tokens(example)
            if room < 0:
                break
            if example.query.text != query.text:
                fitting.append(example)
        return tuple(reversed(fitting))

    return retrieve
