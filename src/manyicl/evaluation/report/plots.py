"""Records -> shot curves: score against demonstrations in context, base and fine-tuned on one plot."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from manyicl.atomic import write_atomically
from manyicl.errors import UserError
from manyicl.evaluation.calibration import Calibration
from manyicl.evaluation.report.drawing import (
    AUTHOR,
    FAINT,
    FILE_FAINT,
    FILE_INK,
    INK,
    SMALL_PANEL,
    WIDE_PANEL,
    as_text,
    family_title,
    finish_axes,
    inline,
    label_ends,
    no_font_warnings,
    shot_position,
    style,
    with_escapes,
)
from manyicl.evaluation.report.lines import BASELINES, Part, Section, sections
from manyicl.evaluation.report.message import group_of, metric_of
from manyicl.evaluation.result import Result
from manyicl.evaluation.summary import Summary, summarise
from manyicl.outputs import require_ending

# Distinct for colour-blind readers, and of middle lightness so that they are visible on white and on near-black.
MODEL_COLOURS = ("#8b93a1", "#2f7de1", "#d1495b", "#9b5de5", "#00a37a", "#c77d0a")
TFIDF_COLOUR, NEAREST_COLOUR = "#d98324", "#5f8f2f"

PICTURE_ENDINGS = (".svg", ".png", ".pdf")


def model_colours(summary: Summary) -> dict[str, str]:
    """Give each model its colour; the first, usually the base, is grey."""
    order = MODEL_COLOURS if len(summary.models) > 1 else MODEL_COLOURS[1:]
    return {model: order[i % len(order)] for i, model in enumerate(summary.models)}


def plot_shot_curves(records: Iterable[Result], path: str | Path, *, title: str | None = None) -> None:
    """Write one picture, the mean over families and a panel for each family, as SVG, PNG or PDF.

    Raises:
        UserError: If no task was measured at all shot counts of all models, or the ending is unknown.
    """
    summary = summarise(records)
    panels = [(summary, section, family_title(section.group)) for section in sections(summary) if section.lines]
    _plot(panels, Path(path), title)


def plot_parts(parts: Iterable[Part], path: str | Path) -> None:
    """Write one picture of several comparisons: a panel for each task, or for the mean over families.

    Raises:
        UserError: If there is no curve to show, or the ending is unknown.
    """
    panels = [
        (part.summary, section, family_title(section.group) if part.by_task else part.title)
        for part in parts
        for section in part.curves()
    ]
    _plot(panels, Path(path))


def _plot(panels: Sequence[tuple[Summary, Section, str]], path: Path, title: str | None = None) -> None:
    """Write panels with a legend above them."""
    require_ending(path, PICTURE_ENDINGS)
    ending = path.suffix.lower()
    if not panels:
        what = "no task was measured at every shot count of every model, so there is no curve to compare"
        raise UserError("no_common_task", what, remedy="Evaluate the models with the same tasks and shots.")
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    num_rows = math.ceil(len(panels) / columns)
    with rc_context(style("manyicl")), no_font_warnings():
        figure = Figure(figsize=(3.7 * columns, 2.9 * num_rows + 0.7), layout="constrained")
        axes = list(figure.subplots(num_rows, columns, squeeze=False).flat)
        for ax, (summary, section, heading) in zip(axes, panels, strict=False):
            draw_panel(ax, summary, section, ink=FILE_INK, faint=FILE_FAINT)
            ax.set_title(heading, color=FILE_INK, loc="left", fontweight="bold", fontsize=11)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        # Not `get_legend_handles_labels`, which leaves out a model whose name begins with an underscore.
        curves = {str(curve.get_label()): curve for ax in axes for curve in ax.get_lines()}
        drawable = as_text if ending == ".svg" else with_escapes
        labels = [drawable(label) for label in curves]
        figure.legend(curves.values(), labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)
        if title:
            figure.suptitle(drawable(title))
        metadata: Any = {"Software" if ending == ".png" else "Creator": AUTHOR}
        metadata |= {"Date": None} if ending == ".svg" else {}
        write_atomically(path, lambda aside: figure.savefig(aside, dpi=160, metadata=metadata, facecolor="white"))


def inline_panel(summary: Summary, section: Section, *, wide: bool = False) -> str:
    """Draw one panel as SVG for a page: no XML head, no fixed size, ink in the page's own colours."""
    spoken = f"Shot curves, {section.group}; the tables on this page have their numbers."
    size = WIDE_PANEL if wide else SMALL_PANEL
    return inline(
        lambda ax: draw_panel(ax, summary, section, ink=INK, faint=FAINT, labelled=wide), section.group, spoken, size
    )


def reliability_panel(found: Calibration, salt: str) -> str:
    """Draw how often answers are right against how sure the model was of them; see `inline_panel`."""

    def draw(ax: Axes) -> None:
        ax.plot([0, 1], [0, 1], color=INK, alpha=0.55, lw=1.1, ls=(0, (5, 3)))
        most = max(one.num_answers for one in found.bins)
        x, y = [one.confidence for one in found.bins], [one.accuracy for one in found.bins]
        ax.plot(x, y, color=MODEL_COLOURS[1], lw=2)
        ax.scatter(x, y, s=[12 + 70 * one.num_answers / most for one in found.bins], color=MODEL_COLOURS[1], zorder=3)
        ax.set_xlim(0, 1.02)
        finish_axes(ax, "probability of the answer", "share that is right", INK, FAINT)

    spoken = "Reliability: share of right answers against their mean probability; larger dots hold more answers."
    return inline(draw, f"reliability {salt}", spoken, SMALL_PANEL)


def coverage_panel(found: Calibration, salt: str) -> str:
    """Draw how many of the surest answers are right against how many are kept; see `inline_panel`."""

    def draw(ax: Axes) -> None:
        x, y = [one.share for one in found.coverage], [one.accuracy for one in found.coverage]
        ax.plot(x, y, color=MODEL_COLOURS[1], marker="o", ms=3.6, lw=2)
        ax.set_xlim(0, 1.02)
        finish_axes(ax, "share of answers kept, the surest first", "share that is right", INK, FAINT)

    spoken = "Accuracy against coverage: share of right answers among the surest; the table has its numbers."
    return inline(draw, f"coverage {salt}", spoken, SMALL_PANEL)


def draw_panel(ax: Axes, summary: Summary, section: Section, *, ink: str, faint: str, labelled: bool = False) -> None:
    """Draw the curves of one family, or of the mean over families, 95 % bands and trivial baselines."""
    smallest = min((shots for shots in summary.shots if shots > 0), default=1)
    positions = [shot_position(shots, smallest) for shots in summary.shots]
    colours = model_colours(summary)
    for line in section.lines:
        points = [(x, cell) for x, cell in zip(positions, line.cells, strict=True) if cell is not None]
        x, y = [x for x, _ in points], [cell.mean for _, cell in points]
        if line.kind == "model":
            colour = colours[line.label]
            ax.plot(x, y, color=colour, marker="o", ms=3.6, lw=2, label=line.label, zorder=3)
            if bands := [(x, *cell.interval) for x, cell in points if cell.interval is not None]:
                x, low, high = (list(column) for column in zip(*bands, strict=True))
                ax.fill_between(x, low, high, color=colour, alpha=0.18, lw=0, zorder=2)
        elif line.label == BASELINES["majority"]:
            ax.plot(
                [positions[0], positions[-1]],
                [y[0]] * 2,
                color=ink,
                alpha=0.55,
                lw=1.1,
                ls=(0, (5, 3)),
                label=line.label,
                zorder=1,
            )
        elif line.label == BASELINES["tfidf"]:
            ax.plot(x, y, color=TFIDF_COLOUR, lw=1.5, ls=(0, (1, 1.6)), marker="s", ms=2.6, label=line.label)
        elif line.label == BASELINES["nearest"]:
            ax.plot(x, y, color=NEAREST_COLOUR, lw=1.5, ls=(0, (1, 1.6)), marker="^", ms=2.6, label=line.label)
    if labelled:
        label_ends(ax)
    ax.set_xticks(positions, [str(shots) for shots in summary.shots])
    metric = metric_of(summary, group_of(summary, section))
    finish_axes(ax, "demonstrations in context", metric, ink, faint)
