"""Tables on the terminal: of rows of text, and a console that does not squeeze them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from manyicl.printing import new_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH_WITHOUT_TERMINAL = 160
_TEXT_HEADINGS = frozenset({"task", "family", "metric", "source", "Hub", "description", "label", "model"})


def table_of(rows: Iterable[dict[str, str]], **options: Any) -> Table:
    """Make a table of rows that all have the same headings; numbers are aligned to the right."""
    from rich.table import Table

    table = Table(**options)
    for row in rows:
        if not table.columns:
            for heading in row:
                is_text = heading in _TEXT_HEADINGS or heading.startswith("in ")
                table.add_column(heading, justify="left" if is_text else "right")
        table.add_row(*row.values())
    return table


def plain_console() -> Console:
    """Make a console of plain texts that does not squeeze tables into 80 columns where there is no terminal."""
    console = new_console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH_WITHOUT_TERMINAL)
    return console
