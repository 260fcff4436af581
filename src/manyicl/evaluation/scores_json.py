"""Records -> what `--json` of `manyicl evaluate` and `manyicl report` prints: scores, and where answers are wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from manyicl.evaluation.calibration import Calibration, calibration
from manyicl.evaluation.mistakes import confusions, is_right, label_scores, pair_counts
from manyicl.evaluation.result import Result, ResultStore
from manyicl.evaluation.summary import BASELINE_FIELDS, Point, Summary


def scores_as_json(summary: Summary, store: ResultStore) -> list[dict[str, Any]]:
    """Return one object for each model, task and shot count, over all draws of demonstrations.

    Args:
        summary: Scores of the records.
        store: Folder of the records, which holds their answers.
    """
    return [{**_score(summary, point), **_mistakes(summary.by_point[point], store)} for point in summary.tasks]


def _score(summary: Summary, point: Point) -> dict[str, Any]:
    """Return the score of a point, its interval and the trivial baselines."""
    model, task, shots = point
    score, record = summary.tasks[point], summary.by_point[point][0]
    baselines = {name: summary.baseline(name, (task,), shots, (model,)) for name in BASELINE_FIELDS}
    return {
        "model": model,
        "task": task,
        "metric": record.metric,
        "shots": shots,
        "retrieved": record.num_retrieved,
        "score": score.mean,
        "standard_error": score.standard_error,
        "interval": score.interval,
        "worst": worst.mean if (worst := summary.worst(model, (task,), shots)) else None,
        **{name: one.mean if one else None for name, one in baselines.items()},
    }


def _mistakes(records: Sequence[Result], store: ResultStore) -> dict[str, Any]:
    """Say where the answers of a point are wrong; null for a task without labels, and where no answer was kept."""
    has_labels = records[0].num_labels is not None
    answers = [line for record in records for line in store.predictions(record)] if has_labels else []
    if not answers:
        return dict.fromkeys(("num_answers", "num_wrong", "labels", "confusions", "calibration"))
    pairs, found = pair_counts(answers), calibration(answers)
    return {
        "num_answers": len(answers),
        "num_wrong": sum(not is_right(line) for line in answers),
        "labels": [one._asdict() for one in label_scores(pairs)],
        "confusions": [one._asdict() for one in confusions(pairs)],
        "calibration": _calibration(found) if found else None,
    }


def _calibration(found: Calibration) -> dict[str, Any]:
    coverage = [{**one._asdict(), "abstain_below": float(one.abstain_below)} for one in found.coverage]
    return {
        "num_answers": found.num_answers,
        "expected_calibration_error": found.error,
        "confidence": found.confidence,
        "accuracy": found.accuracy,
        "bins": [one._asdict() for one in found.bins],
        "coverage": coverage,
    }
