"""Answers among labels -> where a model is wrong: per label, by pair, and every wrong answer."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from manyicl.errors import pluralized
from manyicl.evaluation.metrics import accuracy, expected_and_answered
from manyicl.evaluation.result import PredictedAnswer, Result

# More labels than these are not shown one by one, and more than these make no matrix that can be read.
MOST_LABELS, MOST_LABELS_OF_A_MATRIX = 40, 12
# Results that a sentence names.
MOST_NAMED = 5
ERROR_COLUMNS = ("task", "model", "shots", "seed", "order", "origin", "query", "expected", "answer", "confidence")

# Expected label and answered one -> number of such answers; all that the scores of labels depend on.
PairCounts = Mapping[tuple[str, str], int]


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


def pair_counts(predictions: Iterable[PredictedAnswer]) -> PairCounts:
    """Count the pairs of an expected and an answered label."""
    return Counter(_pair(line) for line in predictions)


def labels_in(pairs: PairCounts) -> list[str]:
    """List every label that is expected or answered, the one most often expected first."""
    counts: Counter[str] = Counter()
    for (expected, answer), number in pairs.items():
        counts[expected] += number
        counts[answer] += 0
    return sorted(counts, key=lambda label: (-counts[label], label))


def label_scores(pairs: PairCounts) -> list[LabelScore]:
    """Return precision, recall and F1 of every label that is expected or answered, the most frequent first.

    Through ``sklearn.metrics.precision_recall_fscore_support``; a share of nothing is 0.
    """
    from sklearn.metrics import precision_recall_fscore_support

    expected, answers = zip(*pairs, strict=True)
    labels, weights = labels_in(pairs), list(pairs.values())
    columns = precision_recall_fscore_support(expected, answers, labels=labels, sample_weight=weights, zero_division=0)
    return [
        LabelScore(label, float(precision), float(recall), float(f1), round(float(support)))
        for label, precision, recall, f1, support in zip(labels, *columns, strict=True)
    ]


def confusion_matrix(pairs: PairCounts) -> tuple[list[str], list[list[int]]]:
    """Return the labels and, for each expected one, how often each was answered; (L,) and (L, L)."""
    labels = labels_in(pairs)
    return labels, [[pairs.get((expected, answer), 0) for answer in labels] for expected in labels]


def confusions(pairs: PairCounts) -> list[Confusion]:
    """Return the pairs of an expected and another answered label, the most frequent first."""
    wrong = [Confusion(expected, answer, number) for (expected, answer), number in pairs.items() if expected != answer]
    return sorted(wrong, key=lambda pair: (-pair.num_answers, pair))


def wrong_answers(predictions: Iterable[PredictedAnswer]) -> list[PredictedAnswer]:
    """Return the wrong answers, the one that the model was surest of first."""
    return sorted((line for line in predictions if not is_right(line)), key=lambda line: -_certainty(line))


def errors_as_csv(
    answered: Iterable[tuple[Result, Sequence[PredictedAnswer]]], names: Mapping[tuple[str, str], str] | None = None
) -> str:
    """Write every wrong answer as a row of CSV, the surest first, to be corrected and added to a task's rows.

    Args:
        answered: Results with their answers.
        names: Line and fingerprint of a model -> what a report calls it; None for the line.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(ERROR_COLUMNS)
    wrong = [(result, line) for result, predictions in answered for line in wrong_answers(predictions)]
    for result, line in sorted(wrong, key=lambda one: -_certainty(one[1])):
        confidence = "" if line.confidence is None else f"{line.confidence:.4f}"
        model = (names or {}).get((result.line, result.model_fingerprint), result.line)
        place = (result.task, model, result.num_shots, result.seed, result.order, line.origin)
        table.writerow([*place, line.query, _pair(line)[0], line.answer, confidence])
    return text.getvalue()


def without_answers(answered: Iterable[tuple[Result, Sequence[PredictedAnswer]]]) -> str | None:
    """Say in one sentence of which results there are no answers; None where all have them."""
    missing = [result for result, predictions in answered if not predictions]
    if not missing:
        return None
    names = [
        f"{one.task}, {one.line}, {pluralized(one.num_shots, 'shot')}, seed {one.seed}" for one in missing[:MOST_NAMED]
    ]
    names += [f"and {len(missing) - MOST_NAMED:,} more"] if len(missing) > MOST_NAMED else []
    return f"No answers, and so no errors, are known of {pluralized(len(missing), 'result')}: {'; '.join(names)}."


def is_right(line: PredictedAnswer) -> bool:
    """Tell whether an answer is one of those that are accepted, as the metric accuracy does."""
    return bool(accuracy(line.answer, line.references))


def _pair(line: PredictedAnswer) -> tuple[str, str]:
    return expected_and_answered(line.answer, line.references)


def _certainty(line: PredictedAnswer) -> float:
    """Return what wrong answers are ordered by: the probability among the labels, or else that of the text."""
    if line.confidence is not None:
        return line.confidence
    return 0.0 if line.log_probability is None else math.exp(min(line.log_probability, 0.0))
