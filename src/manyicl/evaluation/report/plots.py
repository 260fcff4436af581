"""Records -> shot curves: score against demonstrations in context, base and fine-tuned on one plot."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D

from manyicl.atomic import write_atomically
from manyicl.errors import UserError
from manyicl.evaluation.calibration import Calibration
from manyicl.evaluation.report.lines import BASELINES, Part, Section, sections
from manyicl.evaluation.report.message import group_of, metric_of
from manyicl.evaluation.result import Result
from manyicl.evaluation.summary import Summary, summarise
from manyicl.outputs import require_ending
from manyicl.printing import printable

# Distinct for colour-blind readers, and of middle lightness so that they are visible on white and on near-black.
MODEL_COLOURS = ("#8b93a1", "#2f7de1", "#d1495b", "#9b5de5", "#00a37a", "#c77d0a")
TFIDF_COLOUR = "#d98324"

PICTURE_ENDINGS = (".svg", ".png", ".pdf")
SMALL_PANEL = (3.9, 2.9)  # inches
# Names at the ends of curves: their distance in score, and their length.
LEAST_DISTANCE_OF_LABELS, MOST_LABEL_CHARACTERS = 0.065, 24
# What a picture says of who made it.
_AUTHOR = "manyicl report"

# In a page the ink follows the reader's theme: these are its placeholders until the SVG is written.
_INK, _FAINT = "#010203", "#040506"


def _style(salt: str) -> Any:
    """Return our settings of matplotlib; the salt makes the hashed names in an SVG reproducible."""
    text = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    axes = {"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8}
    return {**text, **axes, "svg.hashsalt": salt}


@contextmanager
def _no_font_warnings() -> Iterator[None]:
    """Ignore letters that no font here has: an SVG keeps them as text, for the fonts of its reader."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        yield


def shot_position(shots: int, smallest: int = 1) -> float:
    """Place a shot count on a logarithmic axis; 0 is one doubling left of the smallest other count."""
    return math.log2(shots) if shots > 0 else math.log2(max(smallest, 1)) - 1


def family_title(group: str) -> str:
    """Write a family as a heading."""
    return group.upper() if group in ("nli", "qa") else group.capitalize()


def model_colours(summary: Summary) -> dict[str, str]:
    """Give each model its colour; the first, usually the base, is grey."""
    order = MODEL_COLOURS if len(summary.models) > 1 else MODEL_COLOURS[1:]
    return {model: order[i % len(order)] for i, model in enumerate(summary.models)}


def is_picture(path: Path) -> bool:
    """Tell whether a file is a picture that `plot_shot_curves` wrote."""
    return path.is_file() and _AUTHOR.encode() in path.read_bytes()


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
    with rc_context(_style("manyicl")), _no_font_warnings():
        figure = Figure(figsize=(3.7 * columns, 2.9 * num_rows + 0.7), layout="constrained")
        axes = list(figure.subplots(num_rows, columns, squeeze=False).flat)
        for ax, (summary, section, heading) in zip(axes, panels, strict=False):
            draw_panel(ax, summary, section, ink="#20242b", faint="#d9dde3")
            ax.set_title(heading, color="#20242b", loc="left", fontweight="bold", fontsize=11)
        for ax in axes[len(panels) :]:
            ax.set_visible(False)
        # Not `get_legend_handles_labels`, which leaves out a model whose name begins with an underscore.
        curves = {str(curve.get_label()): curve for ax in axes for curve in ax.get_lines()}
        drawable = _as_text if ending == ".svg" else _with_escapes
        labels = [drawable(label) for label in curves]
        figure.legend(curves.values(), labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)
        if title:
            figure.suptitle(drawable(title))
        metadata: Any = {"Software" if ending == ".png" else "Creator": _AUTHOR}
        metadata |= {"Date": None} if ending == ".svg" else {}
        write_atomically(path, lambda aside: figure.savefig(aside, dpi=160, metadata=metadata, facecolor="white"))


def _as_text(name: str) -> str:
    """Return a name that matplotlib draws as it is: no formula between dollars, no line of a hidden curve."""
    plain = printable(name).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def _with_escapes(name: str) -> str:
    r"""Return a name for a picture of pixels or outlines: what its font cannot draw is an escape, as ``\u6a21``."""
    known = get_font(findfont(FontProperties(family=["sans-serif"]))).get_charmap()
    return _as_text("".join(c if ord(c) in known else c.encode("unicode_escape").decode("ascii") for c in name))


def inline_panel(summary: Summary, section: Section, *, wide: bool = False) -> str:
    """Draw one panel as SVG for a page: no XML head, no fixed size, ink in the page's own colours."""
    spoken = f"Shot curves, {section.group}; the tables on this page have their numbers."
    size = (10.6, 4.2) if wide else SMALL_PANEL
    return _inline(
        lambda ax: draw_panel(ax, summary, section, ink=_INK, faint=_FAINT, labelled=wide), section.group, spoken, size
    )


def reliability_panel(found: Calibration, salt: str) -> str:
    """Draw how often answers are right against how sure the model was of them; see `inline_panel`."""

    def draw(ax: Axes) -> None:
        ax.plot([0, 1], [0, 1], color=_INK, alpha=0.55, lw=1.1, ls=(0, (5, 3)))
        most = max(one.num_answers for one in found.bins)
        x, y = [one.confidence for one in found.bins], [one.accuracy for one in found.bins]
        ax.plot(x, y, color=MODEL_COLOURS[1], lw=2)
        ax.scatter(x, y, s=[12 + 70 * one.num_answers / most for one in found.bins], color=MODEL_COLOURS[1], zorder=3)
        ax.set_xlim(0, 1.02)
        _finish_axes(ax, "probability of the answer", "share that is right", _INK, _FAINT)

    spoken = "Reliability: share of right answers against their mean probability; larger dots hold more answers."
    return _inline(draw, f"reliability {salt}", spoken, SMALL_PANEL)


def coverage_panel(found: Calibration, salt: str) -> str:
    """Draw how many of the surest answers are right against how many are kept; see `inline_panel`."""

    def draw(ax: Axes) -> None:
        x, y = [one.share for one in found.coverage], [one.accuracy for one in found.coverage]
        ax.plot(x, y, color=MODEL_COLOURS[1], marker="o", ms=3.6, lw=2)
        ax.set_xlim(0, 1.02)
        _finish_axes(ax, "share of answers kept, the surest first", "share that is right", _INK, _FAINT)

    spoken = "Accuracy against coverage: share of right answers among the surest; the table has its numbers."
    return _inline(draw, f"coverage {salt}", spoken, SMALL_PANEL)


def _inline(draw: Callable[[Axes], None], salt: str, spoken: str, size: tuple[float, float]) -> str:
    """Draw one panel as SVG for a page: no XML head, no fixed size, ink in the page's own colours."""
    with rc_context(_style(f"manyicl {salt}")), _no_font_warnings():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), spoken)


def _for_page(svg: str, spoken: str) -> str:
    """Make matplotlib's SVG file a part of an HTML page, with a text for readers who do not see it."""
    _, _, body = svg.partition("<svg ")
    attributes, _, content = body.partition(">")
    view_box = re.search(r'viewBox="[^"]*"', attributes)
    assert view_box is not None, "matplotlib states a viewBox"
    content = re.sub(r"<metadata>.*?</metadata>", "", content, flags=re.DOTALL)
    # Numbered group names repeat from figure to figure; only hashed ones are referred to.
    content = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", content)
    content = content.replace(_INK, "currentColor").replace(_FAINT, "var(--line)")
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} {view_box.group()} role="img" aria-label="{html.escape(spoken)}">{content}'


def _label_ends(ax: Axes) -> None:
    """Write the name of each curve at its right end, in its colour, apart from each other."""
    place: Any = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    curves: list[tuple[float, float, Line2D]] = []
    for curve in ax.get_lines():
        x, y = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
        if len(x):
            curves.append((float(y[-1]), float(x[-1]), curve))
    height = -1.0
    for end, position, curve in sorted(curves, key=lambda one: one[:2]):
        height = max(end, height + LEAST_DISTANCE_OF_LABELS)
        name = _as_text(str(curve.get_label()))
        # The end of a name says how a line differs from another one of the same model.
        half = MOST_LABEL_CHARACTERS // 2
        label = name if len(name) <= MOST_LABEL_CHARACTERS else f"{name[: half - 1]}…{name[-half:]}"
        ax.annotate(label, (position, height), color=curve.get_color(), fontsize=9, **place)


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
    if labelled:
        _label_ends(ax)
    ax.set_xticks(positions, [str(shots) for shots in summary.shots])
    metric = metric_of(summary, group_of(summary, section))
    _finish_axes(ax, "demonstrations in context", metric, ink, faint)


def _finish_axes(ax: Axes, x_label: str, y_label: str, ink: str, faint: str) -> None:
    """Give an axis of scores its range, grid and names."""
    ax.set_ylim(0, 1.02)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    ax.grid(axis="y", color=faint, lw=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=ink, length=3)
    ax.set_xlabel(x_label, color=ink)
    ax.set_ylabel(y_label, color=ink)
    for spine in ax.spines.values():
        spine.set_color(faint)
