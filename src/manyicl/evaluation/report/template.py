"""Templates -> pages: what every page of a report has in common, and how a page of ours is recognised."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import regex  # type: ignore[import-untyped]
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from manyicl.evaluation.report.drawing import family_title

MAX_SHOWN_CHARACTERS = 700
# How a page of ours is recognised: its generator, or in older pages the end of its title.
PAGE_MARKS = (b'<meta name="generator" content="manyicl">', " · manyicl</title>".encode())


def render(template: str, **values: object) -> str:
    """Fill a template of this folder; texts are escaped, and the style of all pages is in it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"score": as_score, "signed": as_signed, "family": family_title, "shortened": shortened}
    folder = files("manyicl.evaluation.report")
    source, style = (folder.joinpath(name).read_text(encoding="utf-8") for name in (template, "style.css"))
    return environment.from_string(source).render(**values, style=Markup(style))


def is_report(path: Path) -> bool:
    """Tell whether a file is a page of a report."""
    content = path.read_bytes() if path.is_file() else b""
    return any(mark in content for mark in PAGE_MARKS)


def as_score(value: float | None) -> str:
    """Write a score."""
    return "–" if value is None else f"{value:.3f}"


def as_signed(value: float | None) -> str:
    """Write a difference with its sign."""
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def shortened(text: str, limit: int = MAX_SHOWN_CHARACTERS) -> str:
    """Cut a long text for display, never within what a reader sees as one character, and say how much is hidden."""
    if len(text) <= limit:
        return text.translate(_CONTROL_PICTURES)
    ends = (cluster.end() for cluster in regex.finditer(r"\X", text[: limit + 100]))
    kept = max((end for end in ends if end <= limit), default=limit)
    return f"{text[:kept].translate(_CONTROL_PICTURES)} … ({len(text) - kept:,} more characters)"


# Control characters, which no HTML may hold, are shown as the pictures that Unicode has of them: all below a space but
# tab and line feed, and delete.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}
