"""Numbers of a comparison -> its tables, as a page and a Markdown file both show them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from manyicl.errors import pluralized
from manyicl.evaluation.comparison.arms import ALL_ANSWERS, DEDICATED, Arm, Point
from manyicl.evaluation.comparison.estimates import Measured
from manyicl.evaluation.comparison.side_measures import Cost, Forgotten
from manyicl.evaluation.comparison.statistics import BASELINE_LABELS, ROLES, ComparedRole, Difference, Row, Statistics
from manyicl.evaluation.report.comparison_message import interval, percent, signed
from manyicl.evaluation.report.comparison_plots import look_of
from manyicl.evaluation.report.drawing import family_title
from manyicl.evaluation.summary import OVERALL
from manyicl.evaluation.uncertainty import Estimate
from manyicl.printing import duration

NONE = "–"
_READINGS = {
    "higher": "higher",
    "lower": "lower",
    "not distinguishable": "not distinguishable",
    "one training": "one training: not claimed",
}


@dataclass(frozen=True)
class Cell:
    """A cell: what it says, and on a second line what that rests on."""

    text: str
    detail: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a table.

    Attributes:
        heading: What it is about.
        cells: One for each column but the first.
        colour: Colour of the arm in plots.
        kind: ``strong`` for what the comparison is about, ``soft`` for a trivial baseline.
    """

    heading: str
    cells: tuple[Cell, ...]
    colour: str | None = None
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: What it shows, a sentence without its full stop.
        columns: Headings; the first is that of the lines.
        lines: Its lines.
    """

    caption: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


def mean_cell(one: Measured | None) -> Cell:
    """Write a mean score in percent and its interval."""
    return Cell(NONE) if one is None else Cell(f"{100 * one.mean:.1f}", interval(one))


def headline(rows: Sequence[Row], role: ComparedRole) -> Table | None:
    """Regimes by families, each at the shots that it was made for."""
    if not rows:
        return None
    groups = list(rows[0].cells)
    several = len(groups) > 1
    columns = ["mean over families" if several else "mean", *(family_title(g) for g in groups if g != OVERALL)]
    lines, num_tasks = [], 0
    for row in rows:
        overall = row.overall
        assert overall is not None
        num_tasks = overall.num_tasks
        is_trained = row.point.arm.regime not in ("base", "import")
        counts = [overall.num_trainings if is_trained else NONE, overall.num_draws or NONE, f"{overall.num_queries:,}"]
        cells = [mean_cell(row.cells[group]) for group in groups]
        cells += [Cell(NONE if row.worst is None else f"{100 * row.worst:.1f}")]
        cells += [Cell(str(count)) for count in counts]
        lines.append(_line(row.point.label, row.point.arm, cells))
    return Table(
        f"Score in percent with its 95% interval, {pluralized(num_tasks, f'{role} task')}",
        ("regime", *columns, "worst draw", "trainings", "draws", "queries"),
        tuple(lines),
    )


def _line(heading: str, arm: Arm, cells: Sequence[Cell]) -> Line:
    kind = "strong" if arm == ALL_ANSWERS else ""
    return Line(heading, tuple(cells), look_of(arm).colour, kind)


def differences(found: Sequence[Difference], role: ComparedRole) -> Table | None:
    """What a sentence may claim of two regimes."""
    if not found:
        return None
    lines = []
    for one in found:
        is_main = one.second.arm == ALL_ANSWERS
        heading = f"against {one.first.label}" if is_main else f"{one.second.arm.label}, against {one.first.arm.label}"
        cells = (
            _difference_cell(one),
            Cell(_READINGS[one.reading]),
            Cell(str(one.measured.num_trainings or NONE)),
            Cell(str(one.measured.num_tasks)),
        )
        lines.append(Line(heading, cells, look_of(one.first.arm if is_main else one.second.arm).colour))
    caption = f"Many-shot with all answers, unless it says otherwise: paired differences in points, {role} tasks"
    return Table(caption, ("difference", "points", "reading", "trainings", "tasks"), tuple(lines))


def _difference_cell(one: Difference) -> Cell:
    measured = one.measured
    text = signed(100 * measured.mean)
    if measured.interval is not None:
        return Cell(text, interval(measured, is_signed=True))
    if measured.interval_of_queries is not None:
        low, high = measured.interval_of_queries
        return Cell(text, f"queries alone: {signed(100 * low)} to {signed(100 * high)}")
    return Cell(text)


def in_weights(numbers: Statistics, role: ComparedRole) -> Table | None:
    """Examples in context against examples in weights."""
    found = numbers.in_weights(role)
    if found is None:
        return None
    lines = []
    for key, cells in found.lines.items():
        measured = tuple(mean_cell(cell) for cell in cells)
        if not isinstance(key, Arm):
            lines.append(Line(BASELINE_LABELS[key], measured, kind="soft"))
        elif key.imported is not None:
            lines.append(Line(key.label, measured, look_of(key).colour, "soft"))
        else:
            where = "in weights" if key == DEDICATED else "in context"
            lines.append(_line(f"{where}: {key.label}", key, measured))
    compared = [Cell(NONE) if one is None else _difference_cell(one) for one in found.differences]
    lines.append(Line("in context − in weights", tuple(compared)))
    readings = [Cell(NONE if one is None else _READINGS[one.reading]) for one in found.differences]
    lines.append(Line("reading", tuple(readings), kind="soft"))
    return Table(
        f"Score in percent on {pluralized(len(found.tasks), f'{role} task')} by number of labelled examples",
        ("examples", *(str(count) for count in found.num_examples)),
        tuple(lines),
    )


def shares(numbers: Statistics, role: ComparedRole) -> Table | None:
    """How much of the gap between the base and dedicated models many-shot closes."""
    found = numbers.shares(role)
    lines = []
    for point, one in found.items():
        low, high = one.interval or (None, None)
        bounded = low is not None and high is not None
        text = NONE if one.share is None else f"{one.share:.0%}"
        detail = f"{low:.0%} to {high:.0%}" if bounded else "not bounded" if one.share is not None else ""
        reason = "" if one.share is not None else "the gap is not above the noise"
        if one.gap.interval is None:
            reason = "one training"
        gap = Cell(signed(100 * one.gap.mean), interval(one.gap, is_signed=True))
        lines.append(_line(f"from {point.label}", point.arm, (Cell(text, detail or reason), gap)))
    if not lines:
        return None
    assert numbers.in_weights_and_context is not None
    upper, model = numbers.in_weights_and_context
    caption = (
        f"Share of the gap between the base and models trained on {pluralized(upper.arm.num_examples or 0, 'example')} "
        f"of each task that many-shot with all answers closes after {pluralized(model.shots, 'example')}"
    )
    return Table(caption, ("gap", "share closed", "gap in points"), tuple(lines))


def tasks(numbers: Statistics, role: ComparedRole) -> Table | None:
    """Every task of a role at the points of the headline, those in no mean as well."""
    names = numbers.tasks_of(role)
    points = [point for arm in numbers.arms if not arm.variant for point in numbers.points(arm)]
    lines = []
    for task in names:
        scores = [numbers.score(point, (task,)) for point in points]
        if any(score is not None for score in scores):
            is_compared = numbers.why_not_compared(role, task) is None
            lines.append(Line(task, tuple(map(mean_cell, scores)), kind="" if is_compared else "soft"))
    if not lines:
        return None
    caption = f"Every {role} task: score in percent with its 95% interval"
    return Table(caption, ("task", *map(_short, points)), tuple(lines))


def _short(point: Point) -> str:
    """Name a point where there is little room: the shots, and of dedicated models the examples, are a number."""
    name = look_of(point.arm).short
    if point.arm.imported is not None:
        return name
    return f"{name}, {point.shots if point.arm.num_examples is None else point.arm.num_examples}"


def forgetting(numbers: Statistics) -> Table | None:
    """What each arm lost elsewhere."""
    found = numbers.forgotten()
    if not found:
        return None
    lines = tuple(_line(arm.label, arm, _forgotten_cells(one)) for arm, one in found.items())
    columns = ("regime", "perplexity before", "after", "rise in nats per token", "probe tasks before", "after")
    return Table("Loss on general text and score on probe tasks, before and after training", columns, lines)


def _forgotten_cells(one: Forgotten) -> tuple[Cell, ...]:
    before, after = one.probes or (None, None)
    return (
        *(Cell(NONE if nats is None else f"{math.exp(nats):.2f}") for nats in (one.before, one.after)),
        _rise_cell(one.rise),
        *(Cell(NONE if score is None else percent(score)) for score in (before, after)),
    )


def _rise_cell(rise: Estimate | None) -> Cell:
    if rise is None:
        return Cell(NONE)
    ends = rise.interval
    return Cell(signed(rise.mean, 3), f"{signed(ends[0], 3)} to {signed(ends[1], 3)}" if ends else "")


def costs(numbers: Statistics) -> Table | None:
    """What each arm costs to train."""
    found = numbers.costs()
    if not found:
        return None
    columns = (
        "regime",
        "models",
        "trainings",
        "learning rates",
        "steps",
        "tokens",
        "supervised answers",
        "time",
        "peak memory",
    )
    lines = tuple(_line(arm.label, arm, _cost_cells(one)) for arm, one in found.items())
    return Table("Cost of one training seed; of dedicated models, all of them together", columns, lines)


def _cost_cells(one: Cost) -> tuple[Cell, ...]:
    if not one.num_tokens and not one.num_steps:
        return (Cell(str(one.num_models)), *(Cell(NONE) for _ in range(7)))
    rates = [f"{rate:.2g}" for rate in one.learning_rates]
    texts = (
        str(one.num_models),
        str(one.num_trainings),
        (", ".join(rates) if len(rates) <= 3 else f"{rates[0]} to {rates[-1]}") or NONE,
        f"{one.num_steps:,.0f}",
        f"{one.num_tokens:,.0f}",
        f"{one.num_answers:,.0f}",
        duration(one.seconds),
        NONE if one.peak_memory_gib is None else f"{one.peak_memory_gib:.2f} GiB",
    )
    return tuple(map(Cell, texts))


def ablations(numbers: Statistics) -> Table | None:
    """Each ablation of all answers, on unseen tasks."""
    found = numbers.ablations()
    if not found:
        return None
    forgotten = numbers.forgotten()
    lines = []
    for row, difference in found:
        arm = row.point.arm
        lost = forgotten.get(arm)
        cells = (
            Cell(numbers.plan.variants.get(arm.variant or "", NONE)),
            mean_cell(row.overall),
            Cell(NONE) if difference is None else _difference_cell(difference),
            Cell(NONE) if difference is None else Cell(_within_queries(difference)),
            _rise_cell(lost.rise if lost else None),
        )
        lines.append(_line(arm.variant or "", arm, cells))
    columns = ("ablation", "what it changes", "score", "difference", "reading", "rise in nats per token")
    return Table(
        "All answers with something changed, unseen tasks, against all answers of the same seed", columns, tuple(lines)
    )


def _within_queries(difference: Difference) -> str:
    """Read a difference; with one training each, say at least whether other queries could undo it."""
    measured = difference.measured
    if difference.reading != "one training" or measured.interval_of_queries is None:
        return _READINGS[difference.reading]
    low, high = measured.interval_of_queries
    if low <= 0 <= high:
        return "not distinguishable, even over queries alone"
    return "one training: not claimed"


def all_tables(numbers: Statistics) -> list[Table]:
    """Return every table of a Markdown file, in its order."""
    found: list[Table | None] = []
    for role in ROLES:
        found += [
            headline(numbers.headline(role), role),
            headline(numbers.beside_dedicated(role), role),
            differences(numbers.differences(role), role),
            in_weights(numbers, role),
            shares(numbers, role),
        ]
    found += [forgetting(numbers), costs(numbers), ablations(numbers)]
    return [table for table in found if table is not None]
