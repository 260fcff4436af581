"""Where a row keeps a list: in a column, within one, or spread over several."""

from __future__ import annotations

from collections.abc import Mapping

from manyicl.errors import UserError, did_you_mean
from manyicl.tasks.sandbox import as_written


def listed(row: Mapping[str, object], place: str) -> object:
    """Find what stands at ``place``: a column, ``column.key`` within one, or columns, ``first, second``.

    A column whose name is ``place`` as it stands comes first, so that any name can be written.

    >>> listed({"choices": {"text": ["a", "b"]}}, "choices.text")
    ['a', 'b']
    >>> listed({"option1": "a", "option2": "b"}, "option1, option2")
    ['a', 'b']

    Returns:
        What was found, of any type; None where a single column or its key is missing.

    Raises:
        UserError: If one of several columns is missing.
    """
    if place in row:
        return row[place]
    if "," in place:
        return [as_written(_required(row, column.strip())) for column in place.split(",")]
    column, _, key = place.partition(".")
    within = row.get(column)
    return within.get(key) if isinstance(within, Mapping) else None


def columns_in(place: str) -> set[str]:
    """List the names that may be columns in a place that ``listed`` takes.

    >>> sorted(columns_in("choices.text"))
    ['choices', 'choices.text']
    """
    return {place, place.partition(".")[0], *(column.strip() for column in place.split(","))}


def _required(row: Mapping[str, object], column: str) -> object:
    if column not in row:
        known = sorted(map(str, row))
        raise UserError(f"the column {column!r} is missing; the row has {known}.{did_you_mean(column, known)}")
    return row[column]
