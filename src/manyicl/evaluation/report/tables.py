"""Records -> text tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from manyicl.evaluation.metrics import METRICS
from manyicl.evaluation.result import Result
from manyicl.evaluation.summary import OVERALL, Summary, summarise
from manyicl.evaluation.uncertainty import Estimate
from manyicl.printing import printable


def print_table(records: Iterable[Result], console: Console | None = None, *, per_task: bool = False) -> Summary:
    """Print the mean over families and each family, and each task if asked, at every shot count.

    Returns:
        What was printed, as numbers.
    """
    console = console or Console()
    summary = summarise(records)
    for group in (OVERALL, *summary.groups) if summary.compared else ():
        console.print(_group_table(summary, group))
    if per_task or not summary.compared:
        for task in summary.families:
            console.print(_task_table(summary, task))
    for note in notes(summary):
        console.print(Text(printable(note), style="dim"))
    return summary


def _group_table(summary: Summary, group: str) -> Table:
    num_tasks = len(summary.members(group))
    table = _empty(f"{group} ({num_tasks} {'task' if num_tasks == 1 else 'tasks'})", summary.shots)
    for model in summary.models:
        table.add_row(_safe(model), *(shown(summary.score(model, group, shots)) for shots in summary.shots))
    for other in summary.models[1:]:
        base = summary.models[0]
        differences = [summary.difference(base, other, group, shots) for shots in summary.shots]
        table.add_row(_safe(f"{other} − {base}"), *(shown(one, signed=True) for one in differences), style="bold")
    for name, label in (("majority", "majority answer"), ("tfidf", "TF-IDF + log. reg.")):
        levels = [summary.level(name, group, shots) for shots in summary.shots]
        if any(level is not None for level in levels):
            table.add_row(label, *map(shown_level, levels), style="dim")
    return table


def _task_table(summary: Summary, task: str) -> Table:
    metric = next(record.metric for record in summary.records if record.task == task)
    table = _empty(f"{task} ({summary.families[task]}, {metric})", summary.shots)
    for model in summary.models:
        table.add_row(_safe(model), *(shown(summary.tasks.get((model, task, shots))) for shots in summary.shots))
    for name, label in (("majority", "majority answer"), ("tfidf", "TF-IDF + log. reg.")):
        levels = [summary.task_level(name, task, shots) for shots in summary.shots]
        if any(level is not None for level in levels):
            table.add_row(label, *map(shown_level, levels), style="dim")
    return table


def _safe(text: str) -> str:
    """Return a name as rich prints it: no markup, nothing that would steer the terminal."""
    return escape(printable(text))


def _empty(title: str, shots: Iterable[int]) -> Table:
    table = Table(title=_safe(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("shots", min_width=14, overflow="fold")
    for count in shots:
        table.add_column(str(count), justify="right", no_wrap=True)
    return table


def shown(estimate: Estimate | None, *, signed: bool = False) -> str:
    """Write a mean and, on a second line, its standard error: ``.612`` over ``±.012``."""
    if estimate is None:
        return "–"
    sign = "+" if signed and estimate.mean >= 0 else ""
    return f"{sign}{_short(estimate.mean)}\n±{_short(estimate.standard_error)}"


def shown_level(level: float | None) -> str:
    """Write a level, which has no error of its own here."""
    return "–" if level is None else _short(level)


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 0.9995 else f"{value:.2f}"


def notes(summary: Summary) -> list[str]:
    """Say in sentences what a reader of the numbers must know: errors, flags, and what was left out."""
    records = summary.records
    seeds = len({record.seed for record in records})
    lines = [
        "Each cell is a mean and its standard error, over queries and "
        + (f"{seeds} draws of demonstrations." if seeds > 1 else "one draw of demonstrations, which hides its luck.")
        + " Tasks are averaged within their family, then families; every task counts in its own metric."
        + " The error is that of the mean over these tasks, not over other tasks one might have chosen."
    ]
    counted = (
        ("used more tokens or shots than fine-tuning ever showed", "beyond_training"),
        ("showed fewer demonstrations than asked, because the context was full", "num_shots_left_out"),
        ("showed fewer demonstrations than asked, because the task has no more training rows", "num_shots_missing"),
        ("cut at least one free answer at the token limit", "num_cut_answers"),
        ("passed over test rows that do not fit the context even alone", "num_queries_left_out"),
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
        lines.append(f"{summary.num_superseded} older results asked the same tasks otherwise and are not shown.")
    return lines
