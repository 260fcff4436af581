"""Values of a row: how they become text, and where a row holds a list."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from manyicl.errors import UserError, did_you_mean, quoted, shortened


class NumberText(str):
    """A number as the text that was in the file, so that ``1.0`` stays that in a query and a number in an output."""

    __slots__ = ()


def as_written(value: object) -> object:
    """Turn JSON's ``true``, ``false`` and ``null`` into the text that a reader expects; null is nothing."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else value


def as_text(value: Any) -> Any:
    """Turn a typed value into what JSON would show: numbers become text; lists, mappings, booleans and null stay.

    No number (NaN), as which pandas writes a missing one, is null. So are bytes within a list or mapping that are no
    text, such as the pictures in datasets that also have texts.

    Raises:
        UnicodeDecodeError: If the value itself is bytes that are not UTF-8.
    """
    if isinstance(value, list | tuple):
        return [_part_as_text(part) for part in value]
    if isinstance(value, dict):
        return {name: _part_as_text(part) for name, part in value.items()}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, int | float):
        return NumberText(value)
    return value.decode() if isinstance(value, bytes) else str(value)


def with_own_digits(value: object, width: str) -> object:
    """Return a number that was kept in 16 or 32 bits with its own digits; whole numbers, and others, as they are.

    >>> with_own_digits(0.10000000149011612, "float32"), with_own_digits(123456792.0, "float32")
    (0.1, 123456792.0)
    """
    import numpy as np

    is_rounded = isinstance(value, float) and not value.is_integer()
    return float(str(np.dtype(width).type(value))) if is_rounded else value


def _part_as_text(value: Any) -> Any:
    try:
        return as_text(value)
    except UnicodeDecodeError:
        return None


def as_option(value: object) -> str:
    r"""Write one of a row's options, without white space around it or blank lines in it.

    A blank line would end it as an answer of most models, and has no meaning in one line of several to choose from.

    >>> as_option(" one\n\ntwo ")
    'one\ntwo'
    """
    return re.sub(r"\n\s*\n", "\n", str(as_written(value)).strip())


def value_at(row: Mapping[str, object], place: str) -> object:
    """Find what is at ``place``: a column, ``column.key`` within one, or several columns, ``first, second``.

    A column whose name is ``place`` itself comes first, so that any name can be written.

    >>> value_at({"choices": {"text": ["a", "b"]}}, "choices.text")
    ['a', 'b']
    >>> value_at({"option1": "a", "option2": "b"}, "option1, option2")
    ['a', 'b']

    Returns:
        What was found, of any type; None where a single column or its key is missing.

    Raises:
        UserError: If one of several columns is missing.
    """
    if place in row:
        return row[place]
    if "," in place:
        columns = [column.strip() for column in place.split(",")]
        for column in columns:
            if column not in row:
                raise missing_column(column, row)
        return [as_written(row[column]) for column in columns]
    column, _, key = place.partition(".")
    within = row.get(column)
    return within.get(key) if isinstance(within, Mapping) else None


def has_place(row: Mapping[str, object], place: str) -> bool:
    """Tell whether a row has the column of a place, as `value_at` reads it, whatever is there."""
    return place in row or place.partition(".")[0] in row


def missing_column(column: str, row: Mapping[str, object], remedy: str = "") -> UserError:
    """Make the error for a column that a row lacks."""
    known = sorted(map(str, row))
    remedy = remedy or did_you_mean(column, known)
    what, found = f"the column {quoted(column)} is missing", f"the columns {shortened(str(known))}"
    return UserError("missing_column", what, found=found, remedy=remedy, field=shortened(column))


def num_characters(value: object) -> int:
    """Count the characters of a value, lists and mappings counted through."""
    if isinstance(value, Mapping):
        return num_characters([*value.keys(), *value.values()])
    return sum(map(num_characters, value)) if isinstance(value, list | tuple) else len(str(value))
