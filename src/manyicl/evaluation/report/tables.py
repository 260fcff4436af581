"""Records -> text tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from manyicl.errors import pluralized
from manyicl.evaluation.report.lines import Line, Part, notes, sections
from manyicl.evaluation.report.message import message
from manyicl.evaluation.result import Result
from manyicl.evaluation.summary import Summary
from manyicl.evaluation.uncertainty import Estimate
from manyicl.printing import new_console, printable

_STYLES = {"model": "", "worst": "", "difference": "bold", "baseline": "dim"}


def print_table(records: Iterable[Result], console: Console | None = None, *, per_task: bool = False) -> Summary:
    """Print the mean over families and each family, and optionally each task, at every shot count.

    Returns:
        What was printed, as numbers.
    """
    console = console or new_console()
    part = Part("", tuple(records))
    summary = part.summary
    for name, sentences in message(part).items():
        console.print(Text(printable(f"{name}: {sentences}")))
    metrics = {task: ", ".join(summary.metrics(task)) for task in summary.families}
    for section in sections(summary):
        if section.lines:
            title = f"{section.group} ({pluralized(section.num_tasks, 'task')})"
            console.print(_table(title, summary.shots, section.lines))
        if per_task or not summary.compared:
            for task, lines in section.tasks.items():
                title = f"{task} ({summary.families[task]}, {metrics[task]})"
                console.print(_table(title, summary.shots, lines))
    for note in notes(summary):
        console.print(Text(printable(note), style="dim"))
    return summary


def print_parts(parts: Sequence[Part], console: Console) -> None:
    """Print several comparisons as one table, at the shot counts that all of them have, with intervals of 95 %."""
    common = sorted(set.intersection(*(set(part.summary.shots) for part in parts)))
    table = _empty_table(None, common)
    for part in parts:
        places = [part.summary.shots.index(count) for count in common]
        for section in part.curves():
            heading = section.group if part.by_task else f"{part.title}, {section.group}"
            table.add_row(_safe(", ".join([heading, *part.summary.metrics(section.group)])), style="bold")
            for line in section.lines:
                cells = [with_interval(line.cells[place], signed=line.kind == "difference") for place in places]
                table.add_row(_safe(line.label), *cells, style=_STYLES[line.kind])
            table.add_section()
    console.print(table)
    console.print(Text("Each cell is a mean and, where it has an error, its interval of 95 %.", style="dim"))
    # The first note is about the cells of tables with standard errors.
    for note in dict.fromkeys(note for part in parts for note in notes(part.summary)[1:]):
        console.print(Text(printable(note), style="dim"))


def with_interval(estimate: Estimate | None, *, signed: bool = False) -> str:
    """Write a mean and, on a second line, its interval: ``.55`` over ``.34–.74``."""
    if estimate is None:
        return "–"
    low, high = estimate.interval or (None, None)
    numbers = [f"{value:{'+' if signed else ''}.2f}" for value in (estimate.mean, low, high) if value is not None]
    mean, *interval = (number.replace("0.", ".", 1) for number in numbers)
    return "\n".join([mean, (" to " if signed else "–").join(interval)][: 2 if interval else 1])


def _empty_table(title: str | None, shots: Iterable[int]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("shots", min_width=14, overflow="fold")
    for count in shots:
        table.add_column(str(count), justify="right", no_wrap=True)
    return table


def _table(title: str, shots: Iterable[int], lines: Sequence[Line]) -> Table:
    table = _empty_table(_safe(title), shots)
    for line in lines:
        cells = (written(cell, signed=line.kind == "difference") for cell in line.cells)
        table.add_row(_safe(line.label), *cells, style=_STYLES[line.kind])
    return table


def _safe(text: str) -> str:
    """Return a name as rich prints it: no markup, nothing that would steer the terminal."""
    return escape(printable(text))


def written(estimate: Estimate | None, *, signed: bool = False) -> str:
    """Write a mean and, on a second line, its standard error: ``.612`` over ``±.012``."""
    if estimate is None:
        return "–"
    mean = ("+" if signed and estimate.mean >= 0 else "") + _short(estimate.mean)
    return mean if estimate.standard_error is None else f"{mean}\n±{_short(estimate.standard_error)}"


def _short(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 0.9995 else f"{value:.2f}"
