"""Numbers as people write them: 1,000 = 1000 = 1000.0, 3/4 = 0.75, -$5, 32 %."""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}}(?!\d))?"
_NUMBER = re.compile(
    r"(?P<sign>^\s*-\s*|(?<![\w)\]}%.])-)?"
    r"[$€£¥₹]?\s?"
    r"(?<![A-Za-z\d_^/√])"
    rf"(?:\\[dt]?frac\{{(?P<upper>\d+)\}}\{{(?P<lower>\d+)\}}"
    r"|(?P<whole>\d+)\s+(?P<part>\d+)\s*/\s*(?P<parts>\d+)"
    rf"|(?P<top>{_DECIMAL})(?:\s*/\s*(?P<bottom>{_DECIMAL}))?)"
)
_RESULT_FOLLOWS = re.compile(r"####|=|\banswer\s*(?:is\b|:)", re.IGNORECASE)

# Python refuses to read integers of more than 4,300 digits; a looping model writes them.
_MAX_NUMBER_CHARACTERS = 300
_RELATIVE_TOLERANCE = Fraction(1, 10**6)


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text, which is where a worked solution states its result; None without one.

    A comma groups digits only before exactly three of them; elsewhere it parts numbers. A percent sign, a
    currency and any other unit are passed over: ``50%`` is 50, not 0.5. A minus counts as a sign where nothing
    that could be subtracted from stands before it.
    """
    found = _numbers(text)
    return found[-1] if found else None


def only_number(text: str) -> Fraction | None:
    """Return the number a reference means, or None where it means something else.

    A reference with one number means it; with several, the part behind its last ``####``, ``=`` or "answer is"
    must have one. ``628, 372`` and ``2^11 - 1`` mean no single number.
    """
    found = _numbers(text)
    if len(found) > 1:
        found = _numbers(_RESULT_FOLLOWS.split(text)[-1])
    return found[0] if len(found) == 1 else None


def same_number(a: Fraction, b: Fraction) -> bool:
    """Tell whether two numbers are equal: whole numbers exactly, others to one part in a million."""
    if a == b or (a.denominator == 1 and b.denominator == 1):
        return a == b
    return abs(a - b) <= _RELATIVE_TOLERANCE * max(abs(a), abs(b))


def _numbers(text: str) -> list[Fraction]:
    """Return all numbers of a text in order."""
    plain = text.replace("\N{MINUS SIGN}", "-")
    values = (_value(match) for match in _NUMBER.finditer(plain))
    return [value for value in values if value is not None]


def _value(match: re.Match[str]) -> Fraction | None:
    """Read one match of ``_NUMBER``; None for a division by zero and for numbers of absurd length."""
    if len(match.group()) > _MAX_NUMBER_CHARACTERS:
        return None
    part = {name: Fraction(text.replace(",", "")) for name, text in match.groupdict().items() if _digits(text)}
    try:
        if "upper" in part:
            value = part["upper"] / part["lower"]
        elif "whole" in part:
            value = part["whole"] + part["part"] / part["parts"]
        else:
            value = part["top"] / part.get("bottom", Fraction(1))
    except ZeroDivisionError:
        return None
    return -value if match["sign"] else value


def _digits(text: str | None) -> bool:
    return text is not None and any(character.isdigit() for character in text)
