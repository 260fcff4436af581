"""Lists in pages: a cursor names the entry after which the next page begins, so that entries in between shift none."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import TypeVar

from manyicl.errors import UserError, quoted

T = TypeVar("T")


def cursor_after(position: int) -> str:
    """Write a position as a cursor, whose meaning is ours to change.

    Examples:
        >>> position_of(cursor_after(12))
        12
    """
    return base64.urlsafe_b64encode(f"after:{position}".encode()).decode().rstrip("=")


def position_of(cursor: str | None) -> int:
    """Read a cursor; none begins before the first entry.

    Raises:
        UserError: If it is not one of ours.
    """
    if cursor is None:
        return 0
    try:
        name, _, position = (
            base64.urlsafe_b64decode(cursor.encode() + b"=" * (-len(cursor) % 4)).decode().partition(":")
        )
        if name == "after" and position.isascii() and position.isdecimal() and int(position) < 2**31:
            return int(position)
    except (binascii.Error, UnicodeError):
        pass
    remedy = "Take `next_cursor` of the page before, or none for the first page."
    raise UserError("bad_cursor", "this is no cursor of a list", found=quoted(cursor), remedy=remedy, field="cursor")


def page_of(found: Sequence[T], limit: int, position: Callable[[T], int]) -> tuple[Sequence[T], str | None]:
    """Split what was found, one more than a page holds, into the page and the cursor of the next one."""
    page = found[:limit]
    return page, cursor_after(position(page[-1])) if len(found) > limit else None
