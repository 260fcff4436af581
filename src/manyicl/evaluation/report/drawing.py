"""What every plot of a report has in common: its look, the names at the ends of its curves, and its place in a page."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D

from manyicl.printing import printable

SMALL_PANEL, WIDE_PANEL = (3.9, 2.9), (10.6, 4.2)  # inches
# Names at the ends of curves: their distance in score, and their length.
LEAST_DISTANCE_OF_LABELS, MOST_LABEL_CHARACTERS = 0.065, 24
# What a picture says of who made it.
AUTHOR = "manyicl report"

# In a page the ink follows the reader's theme: these are its placeholders until the SVG is written.
INK, FAINT = "#010203", "#040506"
# Of a picture that is a file of its own, on white.
FILE_INK, FILE_FAINT = "#20242b", "#d9dde3"


def style(salt: str) -> Any:
    """Return our settings of matplotlib; the salt makes the hashed names in an SVG reproducible."""
    text = {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    axes = {"axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8}
    return {**text, **axes, "svg.hashsalt": salt}


@contextmanager
def no_font_warnings() -> Iterator[None]:
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


def is_picture(path: Path) -> bool:
    """Tell whether a file is a picture of a report."""
    return path.is_file() and AUTHOR.encode() in path.read_bytes()


def as_text(name: str) -> str:
    """Return a name that matplotlib draws as it is: no formula between dollars, no line of a hidden curve."""
    plain = printable(name).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def with_escapes(name: str) -> str:
    r"""Return a name for a picture of pixels or outlines: what its font cannot draw is an escape, as ``\u6a21``."""
    known = get_font(findfont(FontProperties(family=["sans-serif"]))).get_charmap()
    return as_text("".join(c if ord(c) in known else c.encode("unicode_escape").decode("ascii") for c in name))


def inline(draw: Callable[[Axes], None], salt: str, spoken: str, size: tuple[float, float]) -> str:
    """Draw one panel as SVG for a page: no XML head, no fixed size, ink in the page's own colours."""
    return for_page(drawn(draw, salt, size), spoken)


def drawn(draw: Callable[[Axes], None], salt: str, size: tuple[float, float]) -> str:
    """Draw one panel with the placeholders of the inks, to be made a part of a page or a file."""
    with rc_context(style(f"manyicl {salt}")), no_font_warnings():
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def for_file(svg: str, title: str) -> str:
    """Make what was drawn a picture on white that is a file of its own."""
    head, _, body = svg.partition("<svg ")
    attributes, _, content = body.partition(">")
    content = content.replace(INK, FILE_INK).replace(FAINT, FILE_FAINT)
    said = f"<title>{html.escape(printable(title))}</title><desc>Drawn by {AUTHOR}</desc>"
    return f'{head}<svg style="background: white" {attributes}>{said}{content}'


def for_page(svg: str, spoken: str) -> str:
    """Make matplotlib's SVG file a part of an HTML page, with a text for readers who do not see it."""
    _, _, body = svg.partition("<svg ")
    attributes, _, content = body.partition(">")
    view_box = re.search(r'viewBox="[^"]*"', attributes)
    assert view_box is not None, "matplotlib states a viewBox"
    content = re.sub(r"<metadata>.*?</metadata>", "", content, flags=re.DOTALL)
    # Numbered group names repeat from figure to figure; only hashed ones are referred to.
    content = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", content)
    content = content.replace(INK, "currentColor").replace(FAINT, "var(--line)")
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {namespaces} {view_box.group()} role="img" aria-label="{html.escape(printable(spoken))}">{content}'


def label_ends(ax: Axes, *, is_scored: bool = True) -> None:
    """Write the name of each curve at its right end, in its colour, apart from each other.

    Args:
        ax: Axes with curves.
        is_scored: Whether it is an axis of scores from 0 to 1, where a name may stand above the axis; otherwise names
            are one column within its range, as far as there is room.
    """
    place: Any = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
    curves: list[tuple[float, float, Line2D]] = []
    for curve in ax.get_lines():
        x, y = np.asarray(curve.get_xdata()), np.asarray(curve.get_ydata())
        if len(x):
            curves.append((float(y[-1]), float(x[-1]), curve))
    curves.sort(key=lambda one: one[:2])
    low, high = (0.0, 1.0) if is_scored else ax.get_ylim()
    least = (high - low) * LEAST_DISTANCE_OF_LABELS
    heights: list[float] = []
    for end, _, _ in curves:
        heights.append(max(end, heights[-1] + least) if heights else end)
    right = max((x for _, x, _ in curves), default=0.0)
    if not is_scored:
        heights = [min(one, high - least * (len(curves) - 1 - number)) for number, one in enumerate(heights)]
    for height, (_, position, curve) in zip(heights, curves, strict=True):
        name = as_text(str(curve.get_label()))
        # The end of a name says how a line differs from another one of the same model.
        half = MOST_LABEL_CHARACTERS // 2
        label = name if len(name) <= MOST_LABEL_CHARACTERS else f"{name[: half - 1]}…{name[-half:]}"
        ax.annotate(label, (position if is_scored else right, height), color=curve.get_color(), fontsize=9, **place)


def finish_axes(ax: Axes, x_label: str, y_label: str, ink: str, faint: str) -> None:
    """Give an axis of scores its range, grid and names."""
    ax.set_ylim(0, 1.02)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    finish_look(ax, x_label, y_label, ink, faint)


def finish_look(ax: Axes, x_label: str, y_label: str, ink: str, faint: str) -> None:
    """Give an axis of any range its grid and names."""
    ax.grid(axis="y", color=faint, lw=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=ink, length=3)
    ax.set_xlabel(x_label, color=ink)
    ax.set_ylabel(y_label, color=ink)
    for spine in ax.spines.values():
        spine.set_color(faint)
