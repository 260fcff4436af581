"""What is printed on a terminal: foreign text, unchanged but for characters that would steer it, and times."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# Control characters but for tabs and line breaks, separators that break a line unasked, marks that turn the direction
# of what follows, and half characters. Joiners stay: emoji and Persian need them.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Return a text for a terminal, characters that would steer it written as escapes.

    >>> printable("price \u202e001")
    'price \\u202e001'
    """
    return _STEERING.sub(lambda found: found.group().encode("unicode_escape").decode("ascii"), text)


def new_console(**options: Any) -> Console:
    """Make a console of rich that leaves text as it is: ``rows.csv:100: late`` names no emoji.

    Args:
        **options: Those of `rich.console.Console`.
    """
    from rich.console import Console

    return Console(**options, emoji=False)


def say(console: Console, text: str) -> None:
    """Print a line as it is, but for characters that would steer the terminal."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Write a time: ``12 s``, ``3 min 20 s``, ``2 h 5 min``.

    Examples:
        >>> duration(12.4), duration(200), duration(7500)
        ('12 s', '3 min 20 s', '2 h 5 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
