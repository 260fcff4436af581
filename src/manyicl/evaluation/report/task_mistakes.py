"""Records -> where a model is wrong on each task with labels, and how far its confidence can be relied on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from manyicl.evaluation.calibration import Calibration, calibration
from manyicl.evaluation.mistakes import (
    MOST_LABELS,
    MOST_LABELS_OF_A_MATRIX,
    Confusion,
    LabelScore,
    PairCounts,
    confusion_matrix,
    confusions,
    label_scores,
    pair_counts,
    without_answers,
    wrong_answers,
)
from manyicl.evaluation.result import PredictedAnswer, Result, ResultStore
from manyicl.evaluation.summary import Summary

SHOWN_CONFUSIONS, SHOWN_MISTAKES = 8, 12


class TaskMistakes(NamedTuple):
    """Where a model is wrong on a task with labels, after the most demonstrations that were measured.

    Attributes:
        result: One of the results; it knows model, task and shots.
        pairs: Expected and answered label -> number of such answers.
        wrong: Wrong answers, the one that the model was surest of first.
        calibration: How confidences and right answers go together; None where no confidence was recorded.
    """

    result: Result
    pairs: PairCounts
    wrong: list[PredictedAnswer]
    calibration: Calibration | None

    @property
    def num_answers(self) -> int:
        """Number of answers, right or wrong."""
        return sum(self.pairs.values())

    @property
    def labels(self) -> list[LabelScore]:
        """Scores of every label; empty where there are too many."""
        scores = label_scores(self.pairs)
        return scores if len(scores) <= MOST_LABELS else []

    @property
    def matrix(self) -> tuple[list[str], list[list[int]]] | None:
        """Labels and how often each was answered for each; None where there are too many."""
        labels, counts = confusion_matrix(self.pairs)
        return (labels, counts) if len(labels) <= MOST_LABELS_OF_A_MATRIX else None

    @property
    def confused(self) -> list[Confusion]:
        """The most frequent confusions."""
        return confusions(self.pairs)[:SHOWN_CONFUSIONS]

    @property
    def surest_wrong(self) -> list[PredictedAnswer]:
        """The wrong answers that the model was surest of."""
        return self.wrong[:SHOWN_MISTAKES]


def tasks_with_mistakes(summary: Summary, store: ResultStore) -> list[TaskMistakes]:
    """Collect mistakes on each task with labels, over all draws of demonstrations.

    They are those of the last model that was measured on the task, with its most demonstrations.
    """
    found = []
    for task in summary.families:
        records = _last_records(summary, task)
        if predictions := [line for record in records for line in store.predictions(record)]:
            counts, wrong = pair_counts(predictions), wrong_answers(predictions)
            found.append(TaskMistakes(records[0], counts, wrong, calibration(predictions)))
    return found


def mistakes_missing(summary: Summary, store: ResultStore) -> str | None:
    """Say in one sentence of which of these results no answers were kept; None where all were."""
    records = [record for task in summary.families for record in _last_records(summary, task)]
    return without_answers((record, store.predictions(record)) for record in records)


def _last_records(summary: Summary, task: str) -> Sequence[Result]:
    """Return the results of the last model on a task after its most demonstrations; none for a task without labels."""
    points = (point for point in summary.by_point if point[1] == task)
    last = max(points, key=lambda point: (summary.models.index(point[0]), point[2]))
    records = summary.by_point[last]
    return records if records[0].num_labels is not None else ()
