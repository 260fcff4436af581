"""Numbers of a comparison -> its plots, each with the rows that it draws, for a page, an SVG file and a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from manyicl.evaluation.comparison.arms import ALL_ANSWERS, Arm
from manyicl.evaluation.comparison.estimates import Measured
from manyicl.evaluation.comparison.statistics import BASELINE_LABELS, Difference, InWeights, Statistics
from manyicl.evaluation.report.drawing import (
    FAINT,
    INK,
    SMALL_PANEL,
    WIDE_PANEL,
    as_text,
    drawn,
    finish_look,
    for_file,
    for_page,
    label_ends,
    shot_position,
)
from manyicl.evaluation.uncertainty import Estimate

# Room above and below the curves, in percent, and the gap between the intervals of two curves, as a share of the axis.
_MARGIN, _DODGE = 3.0, 0.007
Dash = str | tuple[int, tuple[float, ...]]


@dataclass(frozen=True)
class Look:
    """How an arm is drawn: colour, dashes and marker each tell it apart, so that print and colour-blind readers can.

    Attributes:
        colour: Its colour.
        dash: Its dashes.
        marker: Its marker.
        short: Its name in a small panel.
    """

    colour: str
    dash: Dash
    marker: str
    short: str


# After Okabe and Ito 2008, Color Universal Design; of middle lightness, to be visible on white and on near-black.
_LOOKS = {
    "base": Look("#8b93a1", (0, (1, 1.4)), "o", "base"),
    "zero_shot": Look("#cc79a7", (0, (5, 2)), "v", "zero-shot"),
    "few_shot": Look("#d99a00", (0, (6, 1.5, 1, 1.5)), "s", "few-shot"),
    "last_answer": Look("#009e73", (0, (3, 1.2)), "^", "last answer"),
    "all_answers": Look("#2f7de1", "-", "o", "all answers"),
    "dedicated": Look("#d55e00", (0, (8, 2)), "D", "per task"),
    "import": Look("#9a7cc0", (0, (2, 2)), "P", "imported"),
}
_BASELINE_LOOKS = {
    "majority": Look("#8b93a1", (0, (5, 3)), "", "majority"),
    "tfidf": Look("#b8860b", (0, (1, 1.6)), "s", "TF-IDF"),
    "nearest": Look("#5f8f2f", (0, (1, 1.6)), "x", "nearest"),
}


def look_of(arm: Arm) -> Look:
    """Return how an arm is drawn; arms that differ from a regime have its colour and other dashes."""
    look = _LOOKS.get(arm.regime, _LOOKS["import"])
    if arm.imported is not None:
        return Look(look.colour, look.dash, look.marker, arm.imported)
    if arm.variant is not None:
        return Look(look.colour, (0, (1, 2)), "x", arm.variant)
    if arm.equal_answers:
        return Look(look.colour, (0, (7, 2)), "d", "equal answers")
    if arm.replay:
        return Look(look.colour, (0, (4, 1, 1, 1)), "*", f"{look.short} + replay")
    return look


@dataclass(frozen=True)
class Curve:
    """A line of a plot: places, scores, and the ends of their intervals where there are any."""

    label: str
    look: Look
    points: tuple[tuple[float, float, tuple[float, float] | None], ...]


@dataclass(frozen=True)
class Plot:
    """A plot with the rows that it draws.

    Attributes:
        name: Name of its files.
        title: Its heading.
        spoken: What it shows, for readers who do not see it.
        draw: Draws it with two inks, wide or small.
        columns: Headings of its rows.
        rows: What it draws.
        curves: Its lines, for a legend.
        is_small: Whether it is one of many, drawn small.
    """

    name: str
    title: str
    spoken: str
    draw: Callable[[Axes, str, str, bool], None]
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    curves: tuple[Curve, ...] = ()
    is_small: bool = False

    def for_page(self, *, is_wide: bool) -> str:
        """Draw it as a part of a page."""
        return for_page(self._wide if is_wide else self._small, self.spoken)

    def as_svg(self) -> str:
        """Draw it as a file of its own, as large as on a page."""
        return for_file(self._small if self.is_small else self._wide, self.title)

    @cached_property
    def _wide(self) -> str:
        return drawn(lambda ax: self.draw(ax, INK, FAINT, True), f"{self.name} wide", WIDE_PANEL)

    @cached_property
    def _small(self) -> str:
        return drawn(lambda ax: self.draw(ax, INK, FAINT, False), f"{self.name} small", SMALL_PANEL)

    def as_csv(self) -> str:
        """Write its rows."""
        return as_csv(self.columns, self.rows)


def as_csv(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write rows under their headings; what is not known is empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    table.writerows(rows)
    return text.getvalue()


MEASURED_COLUMNS = ("mean", "standard_error", "low", "high", "trainings", "draws", "queries", "tasks")


def measured_cells(one: Measured | None) -> tuple[object, ...]:
    """Return the cells of a mean or difference in a CSV file, scores between 0 and 1."""
    if one is None:
        return (None,) * len(MEASURED_COLUMNS)
    low, high = one.interval or (None, None)
    return (
        one.mean,
        one.standard_error,
        low,
        high,
        one.num_trainings,
        one.num_draws,
        one.num_queries,
        one.num_tasks,
    )


# Shot curves


def shot_curves(
    numbers: Statistics, name: str, title: str, tasks: Sequence[str], *, is_small: bool = False
) -> Plot | None:
    """Draw the score of every regime of one model against the demonstrations in the context."""
    scores = {
        arm: curve
        for arm in numbers.arms
        if not arm.variant and arm.regime not in ("dedicated", "import") and (curve := numbers.curve(arm, tasks))
    }
    shots = sorted({count for curve in scores.values() for count in curve})
    curves = tuple(Curve(arm.label, look_of(arm), _points(curve)) for arm, curve in scores.items())
    rows = tuple((arm.label, n, *measured_cells(one)) for arm, curve in scores.items() for n, one in curve.items())
    if not curves:
        return None
    return Plot(
        name=name,
        title=title,
        spoken=f"Score against demonstrations in the context, {title}; the CSV file has its numbers.",
        draw=_lines(curves, shots, "demonstrations in context"),
        columns=("regime", "shots", *MEASURED_COLUMNS),
        rows=rows,
        curves=curves,
        is_small=is_small,
    )


def _points(scores: Mapping[int, Measured]) -> tuple[tuple[float, float, tuple[float, float] | None], ...]:
    return tuple((count, one.mean, one.interval) for count, one in scores.items())


def in_weights_plot(found: InWeights, name: str, title: str) -> Plot:
    """Draw examples in context beside as many examples in weights."""
    curves, rows = [], []
    for key, cells in found.lines.items():
        label, look = (
            (key.label, look_of(key)) if isinstance(key, Arm) else (BASELINE_LABELS[key], _BASELINE_LOOKS[key])
        )
        known = {n: one for n, one in zip(found.num_examples, cells, strict=True) if one is not None}
        curves.append(Curve(label, look, _points(known)))
        rows += [(label, n, *measured_cells(one)) for n, one in known.items()]
    return Plot(
        name=name,
        title=title,
        spoken=f"Examples in context against examples in weights, {title}; the table has its numbers.",
        draw=_lines(curves, found.num_examples, "labelled examples of the task"),
        columns=("what", "examples", *MEASURED_COLUMNS),
        rows=tuple(rows),
        curves=tuple(curves),
    )


def positions_plot(numbers: Statistics) -> Plot | None:
    """Draw accuracy by position within a sequence."""
    found = {arm: means for arm, means in numbers.positions().items() if len(means) > 1}
    if not found:
        return None
    curves = tuple(
        Curve(arm.label, look_of(arm), tuple((one.first, one.accuracy, None) for one in means))
        for arm, means in found.items()
    )
    firsts = sorted({one.first for means in found.values() for one in means})
    return Plot(
        name="positions",
        title="Accuracy by position, unseen tasks",
        spoken="Accuracy of a demonstration against how many come before it; the CSV file has its numbers.",
        draw=_lines(curves, firsts, "demonstrations before the answer, at least", "right, %"),
        columns=("regime", "first", "last", "accuracy", "answers", "tasks"),
        rows=tuple(
            (arm.label, one.first, one.last, one.accuracy, one.num_answers, one.num_tasks)
            for arm, means in found.items()
            for one in means
        ),
        curves=curves,
    )


def _lines(
    curves: Sequence[Curve], ticks: Sequence[int], x_label: str, y_label: str = "score, %"
) -> Callable[[Axes, str, str, bool], None]:
    """Return what draws curves over counts on a logarithmic axis, in percent, names at their ends."""

    def draw(ax: Axes, ink: str, faint: str, is_wide: bool) -> None:
        smallest = min((count for count in ticks if count > 0), default=1)
        low, high = _range([end for curve in curves for _, mean, ends in curve.points for end in (mean, *(ends or ()))])
        width = shot_position(max(ticks), smallest) - shot_position(min(ticks), smallest)
        for number, curve in enumerate(curves):
            look, dodge = curve.look, width * _DODGE * (number - (len(curves) - 1) / 2)
            # Places beside each other, so that no interval hides another one.
            x = [shot_position(int(count), smallest) + dodge for count, _, _ in curve.points]
            is_first = look == _LOOKS["all_answers"]
            ax.plot(
                x,
                [100 * mean for _, mean, _ in curve.points],
                color=look.colour,
                ls=look.dash,
                marker=look.marker,
                ms=4.2,
                lw=2.4 if is_first else 1.6,
                label=look.short,
                zorder=4 if is_first else 3,
            )
            bars = [(at, *ends) for at, (_, _, ends) in zip(x, curve.points, strict=True) if ends is not None]
            if bars:
                lows, highs = ([100 * bar[end] for bar in bars] for end in (1, 2))
                ax.vlines([bar[0] for bar in bars], lows, highs, color=look.colour, lw=1.1, alpha=0.75, zorder=2)
        ax.set_ylim(low, high)
        ax.yaxis.set_major_locator(MaxNLocator(5))
        ax.set_xticks([shot_position(count, smallest) for count in ticks], [str(count) for count in ticks])
        ax.minorticks_off()
        finish_look(ax, x_label, y_label, ink, faint)
        label_ends(ax, is_scored=False)

    return draw


def _range(scores: Sequence[float]) -> tuple[float, float]:
    """Return the range of an axis in percent, so that curves near each other can be told apart."""
    low, high = 100 * min(scores) - _MARGIN, 100 * max(scores) + _MARGIN
    return max(low, -1.0), min(high, 101.0)


# Differences


def differences_plot(differences: Sequence[Difference], name: str, title: str) -> Plot | None:
    """Draw each difference with its interval; one within the noise is hollow."""
    if not differences:
        return None

    def draw(ax: Axes, ink: str, faint: str, is_wide: bool) -> None:
        ax.axvline(0, color=ink, lw=1, alpha=0.6, zorder=1)
        for number, one in enumerate(reversed(differences)):
            colour = look_of(_other(one)).colour
            if one.measured.interval is not None:
                low, high = (100 * end for end in one.measured.interval)
                ax.hlines(number, low, high, color=colour, lw=2, zorder=2)
            face = colour if one.reading in ("higher", "lower") else "none"
            x = [100 * one.measured.mean]
            ax.plot(x, [number], "o", ms=6.5, color=colour, markerfacecolor=face, markeredgewidth=1.6, zorder=3)
        names = [_pair(one, is_wide=is_wide) for one in reversed(differences)]
        ax.set_yticks(range(len(names)), [as_text(one) for one in names])
        ax.set_ylim(-0.6, len(names) - 0.4)
        finish_look(ax, "difference, points", "", ink, faint)
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", color=faint, lw=0.7)

    return Plot(
        name=name,
        title=title,
        spoken=f"Differences with intervals of 95 %, {title}; the table has its numbers.",
        draw=draw,
        columns=("second", "minus_first", *MEASURED_COLUMNS, "reading"),
        rows=tuple((d.second.label, d.first.label, *measured_cells(d.measured), d.reading) for d in differences),
    )


def _other(difference: Difference) -> Arm:
    """Return the arm of a pair that is not many-shot with all answers."""
    return difference.first.arm if difference.second.arm == ALL_ANSWERS else difference.second.arm


def _pair(difference: Difference, *, is_wide: bool) -> str:
    """Name a pair: what all answers are compared with, or both."""
    first, second = difference.first, difference.second
    short = look_of(first.arm).short if first.arm.regime != "base" else f"base, {first.shots}"
    if second.arm != ALL_ANSWERS:
        return f"{look_of(second.arm).short} − {short}"
    return f"against {first.label}" if is_wide else short


# Forgetting


def forgetting_plot(numbers: Statistics) -> Plot | None:
    """Draw what each arm gained on unseen tasks against what it lost on general text."""
    tasks = numbers.compared("unseen")
    base = numbers.point(Arm("base"))
    points: list[tuple[Arm, Estimate, Measured]] = []
    for arm, one in numbers.forgotten().items():
        difference = numbers.difference(base, numbers.point(arm), tasks)
        if one.rise is not None and difference is not None and not arm.variant:
            points.append((arm, one.rise, difference.measured))
    if not points or base is None:
        return None

    def draw(ax: Axes, ink: str, faint: str, is_wide: bool) -> None:
        ax.plot([0], [0], marker="o", ms=6, color=_LOOKS["base"].colour, ls="", label="base")
        for arm, rise, gain in points:
            look = look_of(arm)
            x, y = rise.mean, 100 * gain.mean
            ax.plot([x], [y], marker=look.marker or "o", ms=7, color=look.colour, ls="", label=look.short, zorder=3)
            if rise.interval is not None:
                ax.hlines(y, *rise.interval, color=look.colour, lw=1.1, alpha=0.75)
            if gain.interval is not None:
                low, high = gain.interval
                ax.vlines(x, 100 * low, 100 * high, color=look.colour, lw=1.1, alpha=0.75)
        _name_points(ax)
        ax.axhline(0, color=ink, lw=0.8, alpha=0.4, zorder=1)
        ax.axvline(0, color=ink, lw=0.8, alpha=0.4, zorder=1)
        x_label = "loss elsewhere: rise in nats per token of general text" if is_wide else "rise in nats per token"
        finish_look(ax, x_label, "gain on unseen tasks, points", ink, faint)

    return Plot(
        name="forgetting",
        title="Gain on unseen tasks against loss elsewhere",
        spoken="Gain on unseen tasks against the rise in loss on general text; the table has its numbers.",
        draw=draw,
        columns=("regime", "rise_in_nats_per_token", "rise_low", "rise_high", *(f"gain_{c}" for c in MEASURED_COLUMNS)),
        rows=tuple(
            (arm.label, rise.mean, *(rise.interval or (None, None)), *measured_cells(gain))
            for arm, rise, gain in points
        ),
        curves=tuple(Curve(arm.label, look_of(arm), ()) for arm, _, _ in points),
    )


def _name_points(ax: Axes) -> None:
    """Write the name of each point beside it, none over another one."""
    low, high = ax.get_ylim()
    place: Any = {"xytext": (7, 3), "textcoords": "offset points", "va": "bottom", "annotation_clip": False}
    least, at = (high - low) * 0.065, -math.inf
    dots = [line for line in ax.get_lines() if len(line.get_xdata()) == 1]  # type: ignore[arg-type]
    for line in sorted(dots, key=lambda one: float(one.get_ydata()[0])):  # type: ignore[index, arg-type]
        x, y = float(line.get_xdata()[0]), float(line.get_ydata()[0])  # type: ignore[index, arg-type]
        at = max(y, at + least)
        ax.annotate(as_text(str(line.get_label())), (x, at), color=line.get_color(), fontsize=9, **place)


def forgetting_steps_plot(numbers: Statistics) -> Plot | None:
    """Draw the rise of the loss on general text along training."""
    found = {arm: one.steps for arm, one in numbers.forgotten().items() if not arm.variant and len(one.steps) > 2}
    if not found:
        return None

    def draw(ax: Axes, ink: str, faint: str, is_wide: bool) -> None:
        for arm, steps in found.items():
            look = look_of(arm)
            ax.plot(
                list(steps),
                list(steps.values()),
                color=look.colour,
                ls=look.dash,
                marker=look.marker,
                ms=4,
                lw=2.4 if arm == ALL_ANSWERS else 1.6,
                label=look.short,
            )
        finish_look(ax, "optimizer steps", "rise in nats per token", ink, faint)
        label_ends(ax, is_scored=False)

    return Plot(
        name="forgetting_steps",
        title="Loss on general text along training",
        spoken="Rise of the loss on general text along training; the CSV file has its numbers.",
        draw=draw,
        columns=("regime", "step", "rise_in_nats_per_token"),
        rows=tuple((arm.label, step, rise) for arm, steps in found.items() for step, rise in steps.items()),
        curves=tuple(Curve(arm.label, look_of(arm), ()) for arm in found),
    )
