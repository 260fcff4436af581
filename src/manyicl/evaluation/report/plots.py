"""Records -> shot curves: score against demonstrations in context, base and fine-tuned on one plot."""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from manyicl.atomic import write_atomically
from manyicl.errors import UserError
from manyicl.evaluation.report.lines import BASELINES
from manyicl.evaluation.result import Result
from manyicl.evaluation.summary import OVERALL, Summary, summarise
from manyicl.printing import printable

# Distinct for colour-blind readers, and of middle lightness so that they are visible on white and on near-black.
MODEL_COLOURS = ("#8b93a1", "#2f7de1", "#d1495b", "#9b5de5", "#00a37a", "#c77d0a")
TFIDF_COLOUR = "#d98324"

PICTURE_ENDINGS = (".svg", ".png", ".pdf")
# What a picture says of who made it.
_AUTHOR = "manyicl report"

# In a page the ink follows the reader's theme: these are its placeholders until the SVG is written.
_INK, _FAINT = "#010203", "#040506"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
}


def _style(salt: str) -> Any:
    """Return a context with our settings; the salt makes the hashed names in an SVG reproducible."""
    settings: Any = {**_STYLE, "svg.hashsalt": salt}
    return rc_context(settings)


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


def plot_shot_curves(
    records: Iterable[Result], path: str | Path, *, title: str | None = None, columns: int = 3
) -> None:
    """Write one picture, the mean over families and a panel for each family, as SVG, PNG or PDF.

    Raises:
        UserError: If no task was measured at all shot counts of all models, or the ending is unknown.
    """
    path = Path(path)
    if path.suffix.lower() not in PICTURE_ENDINGS:
        raise UserError("wrong_ending", "wrong file name", expected=" or ".join(PICTURE_ENDINGS), found=repr(str(path)))
    summary = summarise(records)
    groups = _panels(summary)
    columns = min(columns, len(groups))
    num_rows = math.ceil(len(groups) / columns)
    with _style("manyicl"):
        figure = Figure(figsize=(3.7 * columns, 2.9 * num_rows + 0.7), layout="constrained")
        axes = list(figure.subplots(num_rows, columns, squeeze=False).flat)
        for ax, group in zip(axes, groups, strict=False):
            draw_panel(ax, summary, group, ink="#20242b", faint="#d9dde3")
        for ax in axes[len(groups) :]:
            ax.set_visible(False)
        handles, labels = _legend_entries(axes[: len(groups)])
        drawable = _as_text if path.suffix.lower() == ".svg" else _with_escapes
        labels = [drawable(label) for label in labels]
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)
        if title:
            figure.suptitle(drawable(title))
        ending = path.suffix.lower()
        metadata: dict[str, Any] = {"Software" if ending == ".png" else "Creator": _AUTHOR}
        if ending == ".svg":
            metadata["Date"] = None
        settings: Any = {"dpi": 160, "metadata": metadata, "facecolor": "white"}
        with _without_glyph_warnings():
            write_atomically(path, lambda aside: figure.savefig(aside, **settings))


@contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """Silence warnings of letters that no font here has: an SVG keeps them as text, for the fonts of its reader."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from font", UserWarning)
        warnings.filterwarnings("ignore", "Matplotlib currently does not support", UserWarning)
        yield


def _as_text(name: str) -> str:
    """Return a name that matplotlib draws as it is: no formula between dollars, no line of a hidden curve."""
    plain = printable(name).replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain


def _with_escapes(name: str) -> str:
    r"""Return a name for a picture of pixels or outlines: what its font cannot draw is an escape, as ``\u6a21``."""
    font = get_font(findfont(FontProperties(family=["sans-serif"])))
    known = font.get_charmap()
    return _as_text("".join(c if ord(c) in known else c.encode("unicode_escape").decode("ascii") for c in name))


def inline_panel(summary: Summary, group: str, *, wide: bool = False) -> str:
    """Draw one panel as SVG for a page: no XML head, no fixed size, ink in the page's own colours."""
    with _style(f"manyicl {group}"):
        figure = Figure(figsize=(10.6, 4.2) if wide else (3.9, 2.9), layout="constrained")
        ax = figure.subplots()
        draw_panel(ax, summary, group, ink=_INK, faint=_FAINT, titled=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), _spoken(summary, group))


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


def draw_panel(ax: Axes, summary: Summary, group: str, *, ink: str, faint: str, titled: bool = True) -> None:
    """Draw the curves of one family, or of the mean over families, 95 % bands and trivial baselines."""
    smallest = min((shots for shots in summary.shots if shots > 0), default=1)
    for model, colour in model_colours(summary).items():
        points = [
            (shot_position(shots, smallest), score)
            for shots in summary.shots
            if (score := summary.score(model, group, shots)) is not None
        ]
        x = [position for position, _ in points]
        ax.plot(x, [s.mean for _, s in points], color=colour, marker="o", ms=3.6, lw=2, label=model, zorder=3)
        bands = [(position, *score.interval) for position, score in points if score.interval is not None]
        if bands:
            x, low, high = (list(column) for column in zip(*bands, strict=True))
            ax.fill_between(x, low, high, color=colour, alpha=0.18, lw=0, zorder=2)
    _draw_baselines(ax, summary, group, smallest, ink)
    ax.set_xticks([shot_position(shots, smallest) for shots in summary.shots], [str(s) for s in summary.shots])
    ax.set_ylim(0, 1.02)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    ax.grid(axis="y", color=faint, lw=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=ink, length=3)
    ax.set_xlabel("demonstrations in context", color=ink)
    for spine in ax.spines.values():
        spine.set_color(faint)
    if titled:
        ax.set_title(family_title(group), color=ink, loc="left", fontweight="bold", fontsize=11)


def _draw_baselines(ax: Axes, summary: Summary, group: str, smallest: int, ink: str) -> None:
    majority = summary.level("majority", group)
    if majority is not None:
        ax.axhline(majority, color=ink, alpha=0.55, lw=1.1, ls=(0, (5, 3)), label=BASELINES["majority"], zorder=1)
    points = [
        (shot_position(shots, smallest), level)
        for shots in summary.shots
        if (level := summary.level("tfidf", group, shots)) is not None
    ]
    if points:
        x, y = zip(*points, strict=True)
        ax.plot(x, y, color=TFIDF_COLOUR, lw=1.5, ls=(0, (1, 1.6)), marker="s", ms=2.6, label=BASELINES["tfidf"])


def _panels(summary: Summary) -> tuple[str, ...]:
    if not summary.compared:
        raise UserError(
            "no_common_task",
            "no task was measured at every shot count of every model, so there is no curve to compare",
            remedy="Evaluate the models with the same tasks and shots.",
        )
    return (OVERALL, *summary.groups) if len(summary.groups) > 1 else summary.groups


def _legend_entries(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    entries: dict[str, Any] = {}
    for ax in axes:
        # Not `get_legend_handles_labels`, which leaves out a model whose name begins with an underscore.
        for line in ax.get_lines():
            entries.setdefault(str(line.get_label()), line)
    return list(entries.values()), list(entries)


def _spoken(summary: Summary, group: str) -> str:
    """Say the panel in words, for readers who do not see it."""
    parts = [f"Shot curve, {group}."]
    for model in summary.models:
        scores = [(s, summary.score(model, group, s)) for s in summary.shots]
        parts.append(f"{model}: " + ", ".join(f"{e.mean:.2f} at {s}" for s, e in scores if e is not None) + ".")
    return " ".join(parts)
