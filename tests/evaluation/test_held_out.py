from __future__ import annotations

from dataclasses import replace

import pytest

from manyicl.errors import UserError
from manyicl.evaluation.held_out import held_out_measure, validation_task
from manyicl.tasks.leakage import normalised
from tests.builders import make_example, make_task, tiny_loaded


def test_a_held_out_task_validated_on_rows_of_its_training_side_that_are_no_demonstrations() -> None:
    repeated = make_example("film 7  WAS play", "bad")
    rows = make_task().train
    task = make_task(train=[*rows, *[repeated] * 3])
    asked = validation_task(task, 10, seed=1)
    assert asked.test == validation_task(task, 10, seed=1).test != validation_task(task, 10, seed=2).test
    assert len(asked.test) == 10
    assert not {normalised(e.query.text) for e in asked.test} & {normalised(e.query.text) for e in asked.train}
    assert {*asked.test, *asked.train} <= {*task.train}
    half = validation_task(make_task(), 1000, seed=1)
    assert len(half.test) == len(half.train) == 20
    with pytest.raises(UserError, match=r"'toy' has too few training rows.* at least 2, found 1"):
        validation_task(make_task(train=rows[:1]), 10, seed=1)
    with pytest.raises(UserError, match=r"training rows of 'toy' have too few different texts.* found 1 text"):
        validation_task(make_task(train=[make_example("A", "good"), make_example("a", "bad")]), 10, seed=1)


def test_no_test_row_picks_the_best_model() -> None:
    tasks = (make_task("a"), make_task("b"))
    settings = {"shots": (0, 2), "num_queries": 5, "seed": 0}
    measure = held_out_measure(tasks, **settings)  # type: ignore[arg-type]
    without_test_rows = held_out_measure([replace(task, test=()) for task in tasks], **settings)  # type: ignore[arg-type]
    loaded = tiny_loaded()
    assert measure(loaded) == without_test_rows(loaded)
    assert set(measure(loaded)) == {"score", "score_at_0_shots", "score_at_2_shots"}


def test_tasks_with_fewer_demonstrations_than_shots_are_counted() -> None:
    tasks = (make_task("a"), make_task("b", train=make_task().train[:12]))
    figures = held_out_measure(tasks, shots=(0, 6, 10), num_queries=5, seed=0)(tiny_loaded())
    assert {name: value for name, value in figures.items() if "below" in name} == {"tasks_below_10_shots": 1}
