"""What retrieved rows add is measured on rows that are neither in the prefix nor retrieved for themselves."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest

from manyicl.engine.engine import Engine
from manyicl.engine.prediction import Prediction
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.errors import UserError
from manyicl.evaluation.advice import Retrieval, advice
from manyicl.evaluation.retrieval_gain import measure_retrieval
from manyicl.tasks.task import Example, Query, Task
from tests.builders import make_example, make_task

pytest.importorskip("bm25s")


@dataclass
class Prefix:
    demonstrations: Sequence[Example]


@dataclass
class RepeatsTheLast:
    """Answers with the answer of the last row retrieved, else always the same; some queries are too long."""

    too_long: frozenset[str] = frozenset()
    retrieved: dict[str, list[Example]] = field(default_factory=dict)
    num_answers: int = 0

    def predict(
        self,
        prefix: object,
        queries: Sequence[Query],
        *,
        retrieve: Callable[[Query], Sequence[Example]] | None = None,
        **_: object,
    ) -> Iterator[Prediction]:
        for query in queries:
            self.num_answers += 1
            found = list(retrieve(query)) if retrieve else []
            if retrieve:
                self.retrieved[query.text] = found
            if found and query.text in self.too_long:
                yield Prediction("", math.nan, problem=UserError("query_too_long", "it is too long"))
            else:
                yield Prediction(found[-1].answer if found else "good", -1.0)


def measured(engine: RepeatsTheLast, task: Task, num_shots: int) -> Retrieval | None:
    prefix = Prefix(task.train[:num_shots])
    return measure_retrieval(cast(Engine, engine), cast(TaskPrefix, prefix), task, 4)


def rows(number: int) -> list[Example]:
    return [make_example(f"the {'film' if n % 2 else 'play'} {n}", ("good", "bad")[n % 2]) for n in range(number)]


def test_no_row_is_retrieved_for_itself_or_from_the_prefix() -> None:
    # Four rows have each text, two of them with another answer.
    examples = [make_example(f"the {n // 4} film", ("good", "bad")[n % 2]) for n in range(400)]
    engine, task = RepeatsTheLast(), make_task(train=examples)
    found = measured(engine, task, 200)
    assert found is not None
    assert len(found.without) == len(found.with_retrieved) == 40
    assert engine.num_answers == 80
    in_prefix = {example.query.text for example in task.train[:200]}
    for text, retrieved in engine.retrieved.items():
        assert text not in in_prefix
        assert 1 <= len(retrieved) <= 4
        assert not {example.query.text for example in retrieved} & {text, *in_prefix}


def test_both_ways_are_scored_on_the_same_rows() -> None:
    engine = RepeatsTheLast()
    found = measured(engine, make_task(train=rows(80)), 40)
    assert found is not None
    assert sum(found.without) == 20
    assert sum(found.with_retrieved) == 40
    assert found.num_retrieved == 4


def test_a_row_that_does_not_fit_with_its_retrieved_rows_counts_on_neither_side() -> None:
    task = make_task(train=rows(80))
    long = frozenset(example.query.text for example in task.train[40:44])
    found = measured(RepeatsTheLast(long), task, 40)
    assert found is not None
    assert (
        len(found.without)
        == len(found.with_retrieved)
        == 40 - len([one for one in task.train[40:] if one.query.text in long])
    )
    assert found.num_too_long == 40 - len(found.without) > 0
    assert f"the prefix does not hold ({found.num_too_long} more were too long), in " in advice([], [], {}, found)[-1]
    none = measured(RepeatsTheLast(frozenset(example.query.text for example in task.train)), task, 40)
    assert none is not None
    assert (
        "was not measured: 40 of 40 rows did not fit the context after the prefix, with them or without."
        in advice([], [], {}, none)[-1]
    )


def test_nothing_is_measured_where_too_few_rows_are_left_or_answers_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, examples = RepeatsTheLast(), rows(80)
    assert measured(engine, make_task(train=examples), 65) is None
    assert measured(engine, make_task(train=examples, labels=None), 40) is None
    # Rows with the text of a demonstration are not left.
    assert measured(engine, make_task(train=examples[:20] * 4), 20) is None
    monkeypatch.setitem(sys.modules, "bm25s", None)
    assert measured(engine, make_task(train=examples), 40) is None
    assert engine.num_answers == 0
