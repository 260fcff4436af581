"""Answers against those that their rows have: each count by hand, and the scores of evaluation."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from manyicl.evaluation.known_answers import KnownAnswers
from manyicl.evaluation.metrics import METRICS
from manyicl.evaluation.mistakes import label_scores, pair_counts
from manyicl.tasks.task import Query, Task
from tests.builders import make_task
from tests.engine.parts import refused
from tests.evaluation.test_mistakes import ANSWERS, lines

LABELS = ("a", "b", "c")


def toy(**changes: object) -> Task:
    return make_task(labels=LABELS, train=[], test=[], answer_template="{{ team }}").with_spec(**changes)


def scored(task: Task, *rows: tuple[Mapping[str, object], str | None]) -> KnownAnswers:
    known = KnownAnswers(task)
    for row, answer in rows:
        known.add({"text": "x", **row}, answer, None, has_problem=False)
    return known


def test_scores_are_those_of_evaluation() -> None:
    known = scored(toy(), *(({"team": expected}, answer) for expected, answer, _ in ANSWERS))
    found = known.as_json()
    assert known.pairs == pair_counts(lines())
    assert found["accuracy"] == pytest.approx(3 / 6)
    answers, references = [line.answer for line in lines()], [line.references for line in lines()]
    assert found["macro_f1"] == pytest.approx(METRICS["macro_f1"].score(answers, references))
    assert found["labels"] == [one._asdict() for one in label_scores(pair_counts(lines()))]
    assert found["confusions"] == [
        {"expected": "a", "answer": "b", "num_answers": 2},
        {"expected": "b", "answer": "c", "num_answers": 1},
    ]


def test_every_row_is_in_the_scores_or_in_one_count() -> None:
    known = KnownAnswers(toy(), [Query("seen before")])
    known.add({"text": "x"}, "a", None, has_problem=False)  # no such column
    values: tuple[object, ...] = ("", "  ", None, [], "d", "a, b", ["a", "b"], "d")
    for value in values:
        known.add({"text": "x", "team": value}, "a", None, has_problem=False)
    known.add({"text": "", "team": "a"}, "", None, has_problem=True)
    known.add({"text": "x", "team": "a"}, None, "a", has_problem=False)
    known.add({"text": "x", "team": "a"}, None, "b", has_problem=False)
    known.add({"text": "seen before", "team": " a "}, "a", None, has_problem=False)
    found = known.as_json()
    counts = {name: value for name, value in found.items() if name.startswith("num_")}
    assert counts == {
        "num_rows": 13,
        "num_scored": 1,
        "num_without": 5,
        "num_unusable": 4,
        "num_problems": 1,
        "num_abstained": 2,
        "num_guesses_right": 1,
        "num_demonstrations": 1,
    }
    assert found["accuracy"] == 1
    assert known.unusable[0] == "d"


def test_an_answer_that_is_none_of_the_tasks_is_named_as_it_is_in_the_row() -> None:
    rows: list[object] = [{"name": "a"}, ["a", "b"], "é"]
    known = scored(toy(), *(({"team": value}, "a") for value in rows))
    assert known.unusable == ['{"name": "a"}', '["a", "b"]', "é"]


def test_class_numbers_are_named_as_in_training_rows() -> None:
    task = toy(class_names={"team": {"0": "a", "1": "b"}})
    known = scored(task, ({"team": "1"}, "b"), ({"team": "0"}, "b"), ({"team": "-1"}, "a"), ({"team": "7"}, "a"))
    assert known.pairs == {("b", "b"): 1, ("a", "b"): 1}
    assert (known.num_without, known.num_unusable) == (1, 1)


def test_an_answer_must_be_one_of_the_options_of_its_row() -> None:
    task = toy(choices_column="options", labels=None, metric="accuracy", family="qa")
    rows: list[tuple[dict[str, object], str]] = [
        ({"team": "6", "options": ["6", "8"]}, "6"),
        ({"team": "8", "options": ["6", "8"]}, "6"),
        ({"team": "10", "options": ["6", "8"]}, "6"),
    ]
    known = scored(task, *rows)
    assert (known.num_scored, known.num_right, known.num_unusable) == (2, 1, 1)
    assert known.as_json()["accuracy"] == 0.5
    assert not known.pairs


def test_free_answers_are_scored_in_the_metric_of_the_task() -> None:
    task = toy(family="qa", references_column="more", labels=None, metric="token_f1")
    known = scored(
        task,
        ({"team": "the red dog"}, "red dog"),
        ({"team": "cat", "more": ["the big red dog"]}, "big dog"),
        ({"team": "cat"}, "dog"),
    )
    assert known.as_json()["token_f1"] == pytest.approx((1 + 0.8 + 0) / 3)
    assert known.score_name == "token_f1"


def test_nothing_is_kept_of_answers_but_counts() -> None:
    known = scored(toy(), *(({"team": f"none {number}"}, "a") for number in range(500)))
    assert known.num_unusable == 500
    assert len(known.unusable) <= 3
    assert not known.pairs


def test_a_task_without_an_answer_template_is_refused() -> None:
    with refused("no_answer_template"):
        KnownAnswers(toy(answer_template=None))
