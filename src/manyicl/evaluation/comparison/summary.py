"""Cells and imported answers of a comparison in short: mean scores on seen and unseen tasks, and what is missing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from manyicl.evaluation.comparison.arms import arm_of
from manyicl.evaluation.comparison.records import IMPORTED, CellRecord, ComparisonRecords

Scores = dict[str, dict[int, float]]


def mean_scores(records: ComparisonRecords) -> dict[str, Scores]:
    """Return, by the ``model_name`` of results, their mean score by role of the tasks and number of shots.

    Each task counts once.
    """
    by_task: defaultdict[tuple[str, str, int, str], list[float]] = defaultdict(list)
    for result in records.results:
        if (role := records.roles.get(result.task)) is not None:
            by_task[result.model_name, role.role, result.num_shots, result.task].append(result.score)
    by_cell: defaultdict[tuple[str, str, int], list[float]] = defaultdict(list)
    for (name, role_name, num_shots, _), scores in by_task.items():
        by_cell[name, role_name, num_shots].append(fmean(scores))
    means: dict[str, Scores] = {}
    for (name, role_name, num_shots), scores in sorted(by_cell.items()):
        means.setdefault(name, {}).setdefault(role_name, {})[num_shots] = fmean(scores)
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
    imported = [{"name": name, "scores": scores.get(f"{IMPORTED}{name}", {})} for name in _imported(records)]
    cells = [*done, *others]
    return {
        "output": str(records.settings.output),
        "cells": cells,
        "failed_trials": trials,
        "imported": imported,
    }


def _imported(records: ComparisonRecords) -> tuple[str, ...]:
    """Names of the other systems whose answers were imported."""
    return tuple(records.settings.compare.predictions)


def score_rows(records: ComparisonRecords) -> Iterator[dict[str, str]]:
    """Yield a row for each kind of model (means over training seeds, dedicated models and tasks) and other system."""
    scores = mean_scores(records)
    kinds: defaultdict[str, list[CellRecord]] = defaultdict(list)
    for cell in records.cells:
        kinds[arm_of(cell).label].append(cell)
    columns = [(role, shots) for role in ("seen", "unseen") for shots in records.settings.shots]
    names = {kind: [cell.name for cell in cells] for kind, cells in kinds.items()}
    names |= {f"imported: {name}": [f"{IMPORTED}{name}"] for name in _imported(records)}
    for kind, its_names in names.items():
        row = {"model": kind, "cells": str(len(kinds[kind])) if kind in kinds else ""}
        for role, shots in columns:
            found = [
                known for name in its_names if (known := scores.get(name, {}).get(role, {}).get(shots)) is not None
            ]
            row[f"{role}, {shots} shots"] = f"{fmean(found):.3f}" if found else ""
        yield row
