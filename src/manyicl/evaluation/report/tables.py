"""Records -> text tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from manyicl.errors import counted
from manyicl.evaluation.report.lines import Line, notes, sections
from manyicl.evaluation.result import Result
from manyicl.evaluation.summary import Summary, summarise
from manyicl.evaluation.uncertainty import Estimate
from manyicl.printing import printable

_STYLES = {"model": "", "difference": "bold", "baseline": "dim"}


def print_table(records: Iterable[Result], console: Console | None = None, *, per_task: bool = False) -> Summary:
    """Print the mean over families and each family, and optionally each task, at every shot count.

    Returns:
        What was printed, as numbers.
    """
    console = console or Console()
    summary = summarise(records)
    metrics = {record.task: record.metric for record in summary.records}
    for section in sections(summary):
        if section.lines:
            title = f"{section.group} ({counted(section.num_tasks, 'task')})"
            console.print(_table(title, summary.shots, section.lines))
        if per_task or not summary.compared:
            for task, lines in section.tasks.items():
                title = f"{task} ({summary.families[task]}, {metrics[task]})"
                console.print(_table(title, summary.shots, lines))
    for note in notes(summary):
        console.print(Text(printable(note), style="dim"))
    return summary


def _table(title: str, shots: Iterable[int], lines: Sequence[Line]) -> Table:
    table = Table(title=_safe(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("shots", min_width=14, overflow="fold")
    for count in shots:
        table.add_column(str(count), justify="right", no_wrap=True)
    for line in lines:
        cells = (shown(cell, signed=line.kind == "difference") for cell in line.cells)
        table.add_row(_safe(line.label), *cells, style=_STYLES[line.kind])
    return table


def _safe(text: str) -> str:
    """Return a name as rich prints it: no markup, nothing that would steer the terminal."""
    return escape(printable(text))


def shown(estimate: Estimate | None, *, signed: bool = False) -> str:
    """Write a mean and, on a second line, its standard error: ``.612`` over ``±.012``."""
    if estimate is None:
        return "–"
    mean = ("+" if signed and estimate.mean >= 0 else "") + _short(estimate.mean)
    return mean if estimate.standard_error is None else f"{mean}\n±{_short(estimate.standard_error)}"


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 0.9995 else f"{value:.2f}"
