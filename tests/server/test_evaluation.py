"""Rows that hold their answers are scored as `manyicl evaluate` scores them."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.metrics import f1_score

from manyicl.engine.label_scores import LabelScores
from manyicl.engine.prediction import Prediction
from manyicl.errors import UserError
from manyicl.server.evaluation import MOST_ERRORS_NAMED, evaluated, rows_with_answers, summary
from manyicl.tasks.rows import LocatedRow
from manyicl.tasks.task import Task, TaskSpec

LABELS = ("bad", "good")


def task_of(**changes: Any) -> Task:
    fields = {"name": "mood", "family": "classification", "query_template": "{{ text }}", "labels": LABELS}
    return Task(TaskSpec(**{**fields, "answer_template": "{{ label }}", **changes}), ())


def located(*rows: dict[str, Any]) -> list[LocatedRow | UserError]:
    return [LocatedRow(row, "rows", number) for number, row in enumerate(rows, start=1)]


def prediction(answer: str, probability: float = 0.5, **changes: Any) -> Prediction:
    return Prediction(answer, -probability, **changes)


def test_rows_without_a_usable_answer_get_an_error_in_their_place() -> None:
    broken = UserError("broken_json", "broken JSON", row=5)
    rows = [
        *located({"text": "a", "label": "good"}, {"text": "b"}, {"text": "c", "label": " "}),
        *located({"text": "d", "label": "goood"}),
        broken,
    ]
    found = rows_with_answers(task_of(), rows)
    assert [row.code if isinstance(row, UserError) else row.columns["text"] for row in found.rows] == [
        "a",
        "missing_column",
        "empty_answer",
        "unknown_label",
        "broken_json",
    ]
    assert found.expected == [("good",), None, None, None, None]
    error = found.rows[3]
    assert isinstance(error, UserError)
    assert "'good'" in str(error.remedy)


def test_an_answer_that_is_none_of_the_options_of_its_row_is_an_error() -> None:
    task = task_of(labels=None, choices_column="options", family="qa", metric="accuracy")
    rows = [{"text": "a", "label": one, "options": ["x", "y"]} for one in ("x", "z")]
    found = rows_with_answers(task, located(*rows))
    assert found.expected == [("x",), None]
    assert isinstance(found.rows[1], UserError)
    assert found.rows[1].code == "not_an_option"


def test_scores_are_those_of_the_metrics_and_abstentions_and_problems_are_in_none() -> None:
    expected = ["good", "good", "bad", "bad", "good", "good"]
    answers = ["good", "bad", "bad", "good", "good", "good"]
    results = [evaluated(prediction(answer), (right,)) for answer, right in zip(answers, expected, strict=True)]
    results.append(evaluated(prediction("bad", abstained=True), ("bad",)))
    problem = UserError("missing_column", "no column", field="text")
    results.append(evaluated(Prediction("", float("nan"), problem=problem), None))
    found = summary(task_of(), enumerate(results, start=1))
    assert found["metric"] == "accuracy"
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["macro_f1"] == pytest.approx(f1_score(expected, answers, average="macro"))
    assert 0 < found["standard_error"] < 0.5
    counts = {name: found[name] for name in found if name.startswith("num_")}
    assert counts == {
        "num_rows": 8,
        "num_scored": 6,
        "num_problems": 1,
        "num_abstained": 1,
        "num_guesses_right": 1,
        "num_errors": 2,
    }
    assert [one["label"] for one in found["labels"]] == ["good", "bad"]
    assert {(one["expected"], one["answer"]) for one in found["confusion"]} == {("good", "bad"), ("bad", "good")}
    assert [(one["row"], one["code"]) for one in found["problems"]] == [(8, "missing_column")]


def test_errors_come_with_the_surest_first() -> None:
    def scored(answer: str, other: float) -> Prediction:
        names = [answer, *(label for label in LABELS if label != answer)]
        scores = LabelScores(dict(zip(names, (-0.1, other), strict=True)), dict.fromkeys(names, 1))
        return Prediction(answer, -0.1, scores)

    results = [evaluated(scored("good", other), ("bad",)) for other in (-1.0, -5.0, -2.0)]
    found = summary(task_of(), enumerate(results, start=1))
    assert [one["row"] for one in found["errors"]] == [2, 3, 1]
    assert found["errors"][0]["probability"] > 0.99
    assert found["errors"][0]["expected"] == "bad"


def test_of_many_errors_the_first_are_named_and_all_are_counted() -> None:
    results = [evaluated(prediction("good", number / 1000), ("bad",)) for number in range(MOST_ERRORS_NAMED + 5)]
    found = summary(task_of(), enumerate(results, start=1))
    assert (len(found["errors"]), found["num_errors"]) == (MOST_ERRORS_NAMED, MOST_ERRORS_NAMED + 5)
    assert [one["row"] for one in found["errors"][:2]] == [1, 2]


def test_without_a_scored_row_there_is_no_score() -> None:
    found = summary(task_of(), [])
    assert (found["accuracy"], found["macro_f1"], found["standard_error"]) == (None, None, None)
    assert (found["num_rows"], found["labels"], found["errors"]) == (0, None, [])


def test_free_answers_are_scored_by_the_metric_of_the_task_against_all_accepted_answers() -> None:
    task = task_of(labels=None, family="qa", metric="exact_match", references_column="all")
    rows = rows_with_answers(task, located({"text": "where", "label": "the park", "all": ["park", "a garden"]}))
    (expected,) = rows.expected
    results = [evaluated(prediction(answer), expected) for answer in ("A garden.", "a lake")]
    found = summary(task, enumerate(results, start=1))
    assert (found["metric"], found["exact_match"], found["labels"]) == ("exact_match", 0.5, None)
    assert [one["row"] for one in found["errors"]] == [2]
