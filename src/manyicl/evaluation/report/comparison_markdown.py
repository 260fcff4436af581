"""Tables of a comparison -> Markdown for a paper."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from manyicl.evaluation.report.comparison_message import Message
from manyicl.evaluation.report.comparison_tables import Cell, Table
from manyicl.printing import printable

# How a file of ours is recognised.
MARK = "<!-- written by manyicl report -->"
_SPECIAL = re.compile(r"[&<>|`*\[\]\\~$]|(?<![^\W_])_|_(?![^\W_])")


def escaped(text: str) -> str:
    """Return a text that Markdown shows as it is, on one line; underscores within a word need nothing."""
    line = " ".join(printable(text).split())
    return _SPECIAL.sub(lambda found: f"&#{ord(found.group())};", line)


def as_markdown(
    title: str, messages: Iterable[Message], tables: Iterable[Table], lists: Iterable[tuple[str, Sequence[str]]]
) -> str:
    """Write sentences, tables and lists of sentences as one Markdown file.

    Args:
        title: Head of the file.
        messages: What to read first.
        tables: Tables, with their captions.
        lists: Headings with the sentences below them.
    """
    parts = [MARK, f"# {escaped(title)}"]
    parts += [f"**{escaped(one.heading)}.** {escaped(one.answer)} {escaped(one.others)}".strip() for one in messages]
    parts += [_table(table) for table in tables]
    for heading, sentences in lists:
        if sentences:
            parts += [f"## {escaped(heading)}", "\n".join(f"- {escaped(sentence)}" for sentence in sentences)]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    header = _row(map(escaped, table.columns))
    rule = _row(["---", *("---:" for _ in table.columns[1:])])
    rows = [_row([_strong(escaped(line.heading), line.kind), *map(_cell, line.cells)]) for line in table.lines]
    return "\n".join([f"{escaped(table.caption)}:", "", header, rule, *rows])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _strong(text: str, kind: str) -> str:
    return f"**{text}**" if kind == "strong" else text


def _cell(cell: Cell) -> str:
    return f"{escaped(cell.text)} ({escaped(cell.detail)})" if cell.detail else escaped(cell.text)
