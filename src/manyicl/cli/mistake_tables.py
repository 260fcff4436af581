"""Where answers are wrong, on a terminal: scores of labels, confusions, the surest errors, and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from manyicl.cli.tables import table_of
from manyicl.errors import pluralized, shortened
from manyicl.printing import printable, say

if TYPE_CHECKING:
    from rich.console import Console

    from manyicl.evaluation.mistakes import PairCounts
    from manyicl.evaluation.report.task_mistakes import TaskMistakes

MOST_PAIRS_PRINTED = 8
# With more tasks, each has one line; with more than these, only the first have one.
MOST_TASKS_IN_FULL, MOST_TASKS_PRINTED = 3, 10
SHOWN_ERRORS = 3


def print_mistakes(pairs: PairCounts, console: Console) -> None:
    """Print precision, recall and F1 of each label, where there are not too many, and the most confused pairs."""
    from rich.markup import escape

    from manyicl.evaluation.mistakes import MOST_LABELS, confusions, label_scores

    scores = label_scores(pairs)
    if len(scores) <= MOST_LABELS:
        rows = (
            {
                "label": escape(printable(one.label)),
                "precision": f"{one.precision:.2f}",
                "recall": f"{one.recall:.2f}",
                "F1": f"{one.f1:.2f}",
                "rows": f"{one.num_queries:,}",
            }
            for one in scores
        )
        console.print(table_of(rows, box=None, pad_edge=False))
    wrong = confusions(pairs)
    named = ", ".join(f"{one.expected} → {one.answer} ({one.num_answers:,})" for one in wrong[:MOST_PAIRS_PRINTED])
    if wrong:
        say(console, f"Most often confused, expected → answered: {named}.")


def print_task_mistakes(tasks: Sequence[TaskMistakes], console: Console) -> None:
    """Print where a model is wrong on each task with labels, and how far its confidence can be relied on."""
    from manyicl.evaluation.calibration import sentence

    for one in tasks[:MOST_TASKS_PRINTED]:
        after = f"{one.result.task} after {pluralized(one.result.num_shots, 'example')}, {one.result.line}"
        calibrated = f" {sentence(one.calibration)}" if one.calibration else ""
        say(console, f"{after}: {len(one.wrong):,} of {pluralized(one.num_answers, 'answer')} wrong.{calibrated}")
        if len(tasks) <= MOST_TASKS_IN_FULL:
            print_mistakes(one.pairs, console)
            if one.matrix:
                _print_matrix(*one.matrix, console)
            for line in one.surest_wrong[:SHOWN_ERRORS]:
                sure = "" if line.confidence is None else f"{line.confidence:.2f} sure: "
                answers = f"{line.answer!r} instead of {line.references[0]!r}"
                say(console, f"  {sure}{answers}, {line.origin}: {shortened(' '.join(line.query.split()))}")
    if len(tasks) > MOST_TASKS_PRINTED:
        say(console, f"{len(tasks) - MOST_TASKS_PRINTED:,} more tasks with labels are in the report.")


def _print_matrix(labels: Sequence[str], counts: Sequence[Sequence[int]], console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("expected ↓ answered →", overflow="fold")
    names = [escape(printable(label)) for label in labels]
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for name, row in zip(names, counts, strict=True):
        table.add_row(name, *map(str, row))
    console.print(table)
