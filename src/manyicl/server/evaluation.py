"""Rows that hold their answers -> scores: what was expected, what was answered, and where they differ."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from manyicl.engine.queries import checked_query
from manyicl.errors import UserError, did_you_mean, quoted, shortened
from manyicl.evaluation.metrics import METRICS, accuracy, expected_and_answered, metrics_of
from manyicl.evaluation.mistakes import confusions, label_scores
from manyicl.server.prediction_json import prediction_json
from manyicl.tasks.accepted_answers import AcceptedAnswers
from manyicl.tasks.rows import LocatedRow
from manyicl.tasks.task import Task

if TYPE_CHECKING:
    from manyicl.engine.prediction import Prediction

# Of more errors, and more rows without a score, the first are named; all are counted.
MOST_ERRORS_NAMED = 100
# What of a result its scores are made of.
_SCORED_BY = ("answer", "expected", "log_probability", "probability")

Result = dict[str, Any]
Columns = Mapping[str, Any]
# Accepted answers of a row; the first one is canonical.
Accepted = tuple[str, ...]


class RowsWithAnswers(NamedTuple):
    """Rows of an evaluation, on their way to be answered.

    Attributes:
        rows: The rows, or why they are in no score.
        expected: Accepted answers of each; None where there is an error.
    """

    rows: list[LocatedRow | UserError]
    expected: list[Accepted | None]


def require_evaluable(task: Task) -> None:
    """Refuse a task whose metric does not suit its answers.

    Raises:
        UserError: If so.
    """
    metrics_of(task)


def rows_with_answers(task: Task, rows: Iterable[LocatedRow | UserError]) -> RowsWithAnswers:
    """Render the answers that rows hold; a row without one gets an error in its place."""
    expected_answers = _answers_of(task)
    kept: list[LocatedRow | UserError] = []
    expected: list[Accepted | None] = []
    for row in rows:
        try:
            if isinstance(row, UserError):
                raise row
            answers = expected_answers(row.columns)
        except UserError as error:
            kept.append(error if isinstance(row, UserError) else error.at(file=row.file, row=row.line))
            expected.append(None)
        else:
            kept.append(row)
            expected.append(answers)
    return RowsWithAnswers(kept, expected)


def _answers_of(task: Task) -> Callable[[Columns], Accepted]:
    """Return what renders the accepted answers of a row, and refuses one that no answer of the model could equal."""
    accepted, labels = AcceptedAnswers(task.spec), frozenset(task.labels or ())

    def answers_of(row: Columns) -> Accepted:
        answers = accepted(row)
        if not answers or not all(answers):
            raise UserError("empty_answer", "its answer is empty", remedy="Leave the row out of the evaluation.")
        options = labels or frozenset(checked_query(row, task).choices or ())
        if options and answers[0] not in options:
            found, remedy = quoted(answers[0]), did_you_mean(shortened(answers[0]), options)
            code = "unknown_label" if labels else "not_an_option"
            expected = f"one of {shortened(', '.join(map(repr, task.labels or sorted(options))))}"
            raise UserError(code, "its answer is none of the task's", expected=expected, found=found, remedy=remedy)
        return answers

    return answers_of


def evaluated(prediction: Prediction, expected: Accepted | None) -> Result:
    """Return one answer as a response holds it, with the answers that were expected; null where there was a problem."""
    found = prediction_json(prediction)
    if prediction.problem is not None:
        return {**found, "expected": expected and list(expected), "right": None}
    answer = None if prediction.abstained else prediction.answer
    return {
        **found,
        "expected": list(expected or ()),
        "right": None if answer is None else bool(accuracy(answer, expected or ())),
    }


def summary(task: Task, results: Iterable[tuple[int, Result]]) -> dict[str, Any]:
    """Score the answers to rows.

    Abstentions are in no score and counted, with how many of their guesses would have been right.

    Args:
        task: The task.
        results: Number of each row, and what `evaluated` returned for it.

    Returns:
        The task's metrics by name, null without a scored row, with the standard error of the first; counts; of tasks
        with labels the scores of each label and the confusions; and the errors, the surest first.
    """
    scored: list[tuple[int, Result]] = []
    problems: list[tuple[int, Result]] = []
    num_rows = num_problems = num_abstained = num_guesses_right = 0
    for number, result in results:
        num_rows += 1
        if result.get("problem") is not None:
            num_problems += 1
            problems += [(number, result)][: MOST_ERRORS_NAMED - len(problems)]
        elif result["answer"] is None:
            num_abstained += 1
            num_guesses_right += round(accuracy(result["guess"], result["expected"]))
        else:
            # There may be hundreds of thousands, each with the scores of all labels.
            scored.append((number, {key: result.get(key) for key in _SCORED_BY}))
    return {
        **_scores(task, [result for _, result in scored]),
        "num_rows": num_rows,
        "num_scored": len(scored),
        "num_problems": num_problems,
        "num_abstained": num_abstained,
        "num_guesses_right": num_guesses_right,
        **_by_label(task, [result for _, result in scored]),
        **_errors(task, scored),
        "problems": [{"row": number, **result["problem"]} for number, result in problems],
    }


def _scores(task: Task, results: list[Result]) -> dict[str, Any]:
    """Score answers by the metrics of the task."""
    names = metrics_of(task)
    found: dict[str, Any] = {"metric": names[0], **dict.fromkeys(names), "standard_error": None}
    if not results:
        return found
    from manyicl.evaluation.uncertainty import mean_over_queries

    answers = [result["answer"] for result in results]
    expected = [result["expected"] for result in results]
    for name in names:
        found[name] = METRICS[name].score(answers, expected)
    if METRICS[names[0]].of_example is not None:
        found["standard_error"] = mean_over_queries(METRICS[names[0]].of_each(answers, expected)).standard_error
    return found


def _by_label(task: Task, results: list[Result]) -> dict[str, Any]:
    """Say how well each label is recognised, and which are taken for which; null without labels."""
    if task.labels is None or not results:
        return {"labels": None, "confusion": None}
    pairs: dict[tuple[str, str], int] = {}
    for result in results:
        pair = expected_and_answered(result["answer"], result["expected"])
        pairs[pair] = pairs.get(pair, 0) + 1
    return {
        "labels": [one._asdict() for one in label_scores(pairs)],
        "confusion": [one._asdict() for one in confusions(pairs)],
    }


def _errors(task: Task, scored: list[tuple[int, Result]]) -> dict[str, Any]:
    """Name the wrong answers, the one that the model was surest of first."""
    of_example = METRICS[metrics_of(task)[0]].of_example or accuracy
    wrong = [one for one in scored if not of_example(one[1]["answer"], one[1]["expected"])]
    named = heapq.nsmallest(MOST_ERRORS_NAMED, wrong, key=lambda one: (-_certainty(one[1]), one[0]))
    return {
        "num_errors": len(wrong),
        "errors": [
            {
                "row": number,
                "expected": result["expected"][0],
                "answer": result["answer"],
                "log_probability": result["log_probability"],
                "probability": result.get("probability"),
            }
            for number, result in named
        ],
    }


def _certainty(result: Result) -> float:
    """Return what errors are ordered by: the probability among the labels, or else the log-probability."""
    if (probability := result.get("probability")) is not None:
        return float(probability)
    return float("-inf") if result["log_probability"] is None else float(result["log_probability"])
