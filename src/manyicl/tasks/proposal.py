"""Which two columns of a table are likely the query and the answer, for those who name only the table."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from manyicl.tasks.rows import LocatedRow
from manyicl.tasks.values import as_written

NUM_ROWS_EXAMINED = 1_000
MOST_LABELS_INFERRED = 100
_ROWS_A_LABEL = 5


def are_labels(answers: Sequence[str]) -> bool:
    """Tell labels from free answers: 2 to 100 different ones, each in five rows on average, and of one line each."""
    counts = Counter(answers)
    is_closed = 2 <= len(counts) <= MOST_LABELS_INFERRED and len(answers) >= _ROWS_A_LABEL * len(counts)
    return is_closed and not any("\n" in answer for answer in counts)


def proposal(path: Path, rows: Sequence[LocatedRow], encoding: str | None = None) -> str:
    """Write a table with the two columns that seem to be the query and the answer, and why; two examples if none do.

    Args:
        path: The table.
        rows: Its first rows.
        encoding: Encoding that has to be named; None for UTF-8.
    """
    columns = {name: [text for row in rows if (text := _text(row, name))] for name in (rows[0].columns if rows else ())}
    texts = {name: values for name, values in columns.items() if values and not all(map(_is_number, values))}
    labels = {name: len(set(values)) for name, values in columns.items() if are_labels(values)}
    free = {name: fmean(map(len, values)) for name, values in texts.items() if name not in labels}
    if not free or len(columns) < 2:
        names = f"; its columns are {', '.join(map(repr, columns))}" if columns else ""
        return f"{path.name}:text:label for a query column `text` and an answer column `label`{names}."
    query = max(free, key=lambda name: free[name])
    others = [name for name in columns if name != query]
    # What was decided about a row is usually written after it.
    answer = next((name for name in reversed(others) if name in labels), others[-1])
    kind = f"the {labels[answer]} labels of {answer!r}" if answer in labels else f"the texts of {answer!r}"
    more = [name for name in others if name in labels and name != answer]
    note = f" Labels are in {', '.join(map(repr, more))}, too." if more else ""
    option = f",encoding={encoding}" if encoding else ""
    named = shlex.quote(f"{path}:{query}:{answer}{option}")
    return f"{named}, for queries from {query!r}, which has the longest texts, and {kind} as answers.{note}"


def _text(row: LocatedRow, column: str) -> str:
    return str(as_written(row.columns.get(column))).strip()


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True
