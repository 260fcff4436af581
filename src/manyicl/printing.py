"""Print foreign text on a terminal safely: unchanged, except for control characters and changes of direction."""

from __future__ import annotations

import re

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
