"""Predictions on a closed label set -> where a model is wrong: per label, by pair, and every wrong answer."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from manyicl.evaluation.metrics import accuracy
from manyicl.evaluation.result import PredictedAnswer, Result

# More labels than these are not shown one by one.
MOST_LABELS = 40
ERROR_COLUMNS = ("task", "model", "shots", "seed", "origin", "query", "expected", "answer", "confidence")


class LabelScore(NamedTuple):
    """How well one label is recognised.

    Attributes:
        label: Name of the label.
        precision: Share of the answers with this label that are right.
        recall: Share of the queries with this label that are answered so.
        f1: Harmonic mean of both.
        num_queries: Queries with this label.
    """

    label: str
    precision: float
    recall: float
    f1: float
    num_queries: int


class Confusion(NamedTuple):
    """Two labels of which the first was answered as the second, and how often."""

    expected: str
    answer: str
    num_answers: int


def label_scores(predictions: Sequence[PredictedAnswer]) -> list[LabelScore]:
    """Return precision, recall and F1 of every label that is expected or answered, the most frequent first.

    Through ``sklearn.metrics.precision_recall_fscore_support``; a share of nothing is 0.
    """
    from sklearn.metrics import precision_recall_fscore_support

    expected = [_expected(line) for line in predictions]
    answers = [line.answer.strip() for line in predictions]
    counts = Counter(expected)
    labels = sorted(counts.keys() | set(answers), key=lambda label: (-counts[label], label))
    columns = precision_recall_fscore_support(expected, answers, labels=labels, zero_division=0)
    return [
        LabelScore(label, float(precision), float(recall), float(f1), int(support))
        for label, precision, recall, f1, support in zip(labels, *columns, strict=True)
    ]


def confusions(predictions: Iterable[PredictedAnswer]) -> list[Confusion]:
    """Return the pairs of an expected and another answered label, the most frequent first."""
    pairs = Counter((_expected(line), line.answer.strip()) for line in predictions if not is_right(line))
    ordered = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
    return [Confusion(expected, answer, num_answers) for (expected, answer), num_answers in ordered]


def wrong_answers(predictions: Iterable[PredictedAnswer]) -> list[PredictedAnswer]:
    """Return the wrong answers, the one that the model was surest of first."""
    return sorted((line for line in predictions if not is_right(line)), key=lambda line: -_certainty(line))


def errors_as_csv(answered: Iterable[tuple[Result, Sequence[PredictedAnswer]]]) -> str:
    """Write every wrong answer as a row of CSV, to be corrected and added to a task's rows."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(ERROR_COLUMNS)
    for result, predictions in answered:
        for line in wrong_answers(predictions):
            confidence = "" if line.confidence is None else f"{line.confidence:.4f}"
            place = (result.task, result.line, result.num_shots, result.seed, line.origin)
            table.writerow([*place, line.query, _expected(line), line.answer, confidence])
    return text.getvalue()


def is_right(line: PredictedAnswer) -> bool:
    """Tell whether an answer is one of those that are accepted, as the metric accuracy does."""
    return bool(accuracy(line.answer, line.references))


def _expected(line: PredictedAnswer) -> str:
    return line.references[0].strip()


def _certainty(line: PredictedAnswer) -> float:
    """Return what wrong answers are ordered by: the probability among the labels, or else that of the text."""
    if line.confidence is not None:
        return line.confidence
    return 0.0 if line.log_probability is None else math.exp(min(line.log_probability, 0.0))
