"""Cells and imported answers of a comparison in short: mean scores on seen and unseen tasks, and what is missing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from manyicl.evaluation.comparison.arms import Point
from manyicl.evaluation.comparison.estimates import family_weights
from manyicl.evaluation.comparison.records import IMPORTED, ComparisonRecords
from manyicl.evaluation.comparison.statistics import ROLES, statistics_of

Scores = dict[str, dict[int, float]]


def mean_scores(records: ComparisonRecords) -> dict[str, Scores]:
    """Return, by the ``model_name`` of results, their mean score by role of the tasks and number of shots.

    Tasks weigh alike within their family, and families alike, as in the report; it leaves tasks out that some regime
    did not answer, which one cell cannot know.
    """
    by_task: defaultdict[tuple[str, str, int], defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in records.results:
        if (role := records.roles.get(result.task)) is not None:
            by_task[result.model_name, role.role, result.num_shots][result.task].append(result.score)
    means: dict[str, Scores] = {}
    for (name, role_name, num_shots), scores in sorted(by_task.items()):
        weights = family_weights({task: records.roles[task].family for task in scores})
        mean = sum(weights[task] * fmean(its_scores) for task, its_scores in scores.items())
        means.setdefault(name, {}).setdefault(role_name, {})[num_shots] = mean
    return means


def as_json(records: ComparisonRecords) -> dict[str, Any]:
    """Return cells with their states and mean scores, failed trials, and imported answers, as JSON holds them."""
    scores = mean_scores(records)
    done = [
        {**cell.model_dump(mode="json"), "state": "done", "failure": None, "scores": scores.get(cell.name, {})}
        for cell in records.cells
    ]
    others = [
        {
            "name": report.cell.name,
            "state": report.state.value,
            "failure": report.reason,
        }
        for report in records.failures
    ]
    trials = [{"name": report.cell.name, "failure": report.reason} for report in records.failed_trials]
    names = tuple(records.settings.compare.predictions)
    imported = [{"name": name, "scores": scores.get(f"{IMPORTED}{name}", {})} for name in names]
    cells = [*done, *others]
    return {
        "output": str(records.settings.output),
        "cells": cells,
        "failed_trials": trials,
        "imported": imported,
    }


def score_rows(records: ComparisonRecords) -> Iterator[dict[str, str]]:
    """Yield a row for each kind of model and other system: the means of the report, at every shot count.

    Those of dedicated models are over the tasks that have one.
    """
    numbers = statistics_of(records)
    for arm in numbers.arms:
        row = {"model": arm.label, "cells": str(len(numbers.cells[arm])) if arm in numbers.cells else ""}
        for role in reversed(ROLES):
            tasks = numbers.dedicated_tasks(role) if arm.regime == "dedicated" else numbers.compared(role)
            for shots in records.settings.shots:
                score = numbers.score(Point(arm, shots), tasks)
                row[f"{role}, {shots} shots"] = f"{score.mean:.3f}" if score is not None else ""
        yield row
