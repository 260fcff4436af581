"""The one error for several bad rows of a request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from manyicl.errors import UserError, pluralized

# A table of which every row is bad says so with its first rows.
MOST_ROWS_NAMED = 100


class BadRowsError(UserError):
    """Several rows of a request cannot be used, each with its reason; nothing was done with the others.

    Attributes:
        errors: Why, in the order of the rows; each names its row.
    """

    errors: tuple[UserError, ...]

    def __init__(self, errors: Sequence[UserError], num_rows: int) -> None:
        """Take the errors, at least one.

        Args:
            errors: Why rows cannot be used, each with its ``row``.
            num_rows: Rows of the request.
        """
        first = str(replace(errors[0], file=None, row=None)).removesuffix(".")
        counts = f"{pluralized(len(errors), 'row')} of {num_rows:,} cannot be used"
        what = f"{counts}; the first is row {errors[0].row}: {first}"
        super().__init__("bad_rows", what, row=None, field=None)
        self.errors = tuple(errors[:MOST_ROWS_NAMED])


def require_all(errors: Sequence[UserError], num_rows: int) -> None:
    """Refuse a request if any of its rows is bad.

    Raises:
        UserError: The error itself where there is one, else all together.
    """
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise BadRowsError(errors, num_rows)
