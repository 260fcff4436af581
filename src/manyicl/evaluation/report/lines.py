"""Records -> the lines of every table: models, differences and trivial baselines over shot counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from manyicl.evaluation.metrics import METRICS
from manyicl.evaluation.summary import OVERALL, Summary
from manyicl.evaluation.uncertainty import Estimate

BASELINES = {"majority": "majority answer", "chance": "chance", "tfidf": "TF-IDF + log. reg."}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table: a model, a difference of two, or a baseline, at every shot count."""

    label: str
    cells: tuple[Estimate | None, ...]
    kind: Literal["model", "difference", "baseline"]


@dataclass(frozen=True, slots=True)
class Section:
    """A family, or the mean over families: its lines, and its tasks with theirs."""

    group: str
    num_tasks: int
    lines: list[Line]
    tasks: dict[str, list[Line]]


def sections(summary: Summary) -> list[Section]:
    """Collect the tables of the mean over families, if there are several, and of each family."""
    groups = (OVERALL, *summary.groups) if len(summary.groups) > 1 else summary.groups
    found = [
        Section(
            group,
            len(summary.members(group)),
            _group_lines(summary, group),
            {} if group == OVERALL else {task: _task_lines(summary, task) for task in summary.members(group)},
        )
        for group in groups
    ]
    if summary.not_compared:
        alone = {task: _task_lines(summary, task) for task in summary.not_compared}
        found.append(Section("not measured everywhere", len(alone), [], alone))
    return found


def _group_lines(summary: Summary, group: str) -> list[Line]:
    base, *others = summary.models
    lines = [
        Line(model, tuple(summary.score(model, group, shots) for shots in summary.shots), "model")
        for model in summary.models
    ]
    lines += [
        Line(
            f"{other} − {base}",
            tuple(summary.difference(base, other, group, shots) for shots in summary.shots),
            "difference",
        )
        for other in others
    ]
    return lines + _baselines(
        {name: [summary.level(name, group, shots) for shots in summary.shots] for name in BASELINES}
    )


def _task_lines(summary: Summary, task: str) -> list[Line]:
    lines = [
        Line(model, tuple(summary.tasks.get((model, task, shots)) for shots in summary.shots), "model")
        for model in summary.models
    ]
    return lines + _baselines(
        {name: [summary.task_level(name, task, shots) for shots in summary.shots] for name in BASELINES}
    )


def _baselines(levels: dict[str, list[float | None]]) -> list[Line]:
    return [
        Line(BASELINES[name], tuple(None if v is None else Estimate(v, None, 1) for v in values), "baseline")
        for name, values in levels.items()
        if any(value is not None for value in values)
    ]


def notes(summary: Summary) -> list[str]:
    """Say in sentences what a reader of the numbers must know: errors, flags, and what was dropped."""
    records = summary.records
    seeds = len({record.seed for record in records})
    lines = [
        "Each cell is a mean and its standard error, over queries and "
        + (f"{seeds} draws of demonstrations." if seeds > 1 else "one draw of demonstrations, which hides its luck.")
        + " Tasks are averaged within their family, then families; every task counts in its own metric."
        + " The error is that of the mean over these tasks, not over other tasks one might have chosen;"
        + " of Q queries it is never below 1 / (Q + 2), and of one query there is none."
    ]
    counted = (
        ("used more tokens or shots than any training sequence had", "beyond_training"),
        ("have fewer demonstrations than requested, because the context was full", "num_shots_dropped"),
        ("have fewer demonstrations than requested, because the task has no more training rows", "num_shots_missing"),
        ("cut at least one free answer at the token limit", "num_cut_answers"),
        ("skipped test rows that do not fit the context even without demonstrations", "num_queries_skipped"),
        ("are on tasks whose source the model was fine-tuned on: those are not unseen", "seen_in_training"),
    )
    for what, field in counted:
        flagged = sum(bool(getattr(record, field)) for record in records)
        if flagged:
            lines.append(f"{flagged} of {len(records)} results {what}.")
    # Not every ROUGE is the same: a figure says which one it is.
    named = dict.fromkeys(record.metric for record in records if record.metric in METRICS)
    lines += [f"{name}: {METRICS[name].description}." for name in sorted(named) if name != "accuracy"]
    if summary.not_compared:
        lines.append(f"In no mean, because some model lacks a shot count there: {', '.join(summary.not_compared)}.")
    if summary.num_superseded:
        lines.append(f"{summary.num_superseded} older results on the same tasks are not shown.")
    return lines
