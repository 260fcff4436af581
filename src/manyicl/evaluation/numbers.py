"""Numbers as people write them: 1,000 = 1000 = 1000.0, 3/4 = 0.75, -$5, 32 %, 1.234,56, ١٢٫٥.

Digits of any script are read, and the thousands marks of other countries where they leave no doubt. One that can be
read in two ways, as ``3,14``, is no guess: it equals what is written the same way, and nothing else.
"""

from __future__ import annotations

import unicodedata
from fractions import Fraction
from functools import lru_cache

import regex  # type: ignore[import-untyped]

from manyicl.tasks.words import without_invisible

# What a number means, or, where that is not clear, how it is written.
Number = Fraction | str

# Digits are ASCII's here, since a text is made plain first.
# Between digits alone: points, commas, apostrophes, and the spaces that do not break before exactly three digits.
_RUN = r"[0-9]+(?:[.,'\u2019][0-9]+|[\u00a0\u2009\u202f][0-9]{3}(?![0-9]))*"
_DECIMAL = rf"(?:{_RUN}|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}(?![0-9]))?"
_NUMBER = regex.compile(
    r"(?P<sign>^\s*-\s*|(?<![\w)\]}%.])-)?"
    r"\p{Sc}?\s?"
    r"(?<![\p{Latin}\p{Greek}\p{Cyrillic}0-9_^/√])"
    rf"(?:\\[dt]?frac\{{(?P<top>[0-9]+)\}}\{{(?P<bottom>[0-9]+)\}}"
    r"|(?P<whole>[0-9]+)\s+(?P<top>[0-9]+)\s*/\s*(?P<bottom>[0-9]+)"
    rf"|(?P<top>{_DECIMAL})(?:\s*/\s*(?P<bottom>{_DECIMAL}))?)"
)
_PLAIN = regex.compile(r"[0-9]*\.?[0-9]+")
_SPACES = "\u00a0\u2009\u202f'\u2019"
# Forms of digits in groups, and the marks between the groups of each.
_GROUPED = {
    regex.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?"): ",",  # 1,234,567.89
    regex.compile(r"[1-9][0-9]?(?:,[0-9]{2})+,[0-9]{3}(?:\.[0-9]+)?"): ",",  # 12,34,567.89, as in India
    regex.compile(rf"[1-9][0-9]{{0,2}}(?P<mark>[{_SPACES}])[0-9]{{3}}(?:(?P=mark)[0-9]{{3}})*(?:[.,][0-9]+)?"): _SPACES,
    regex.compile(r"[1-9][0-9]{0,2}(?:(?:\.[0-9]{3})+,[0-9]+|(?:\.[0-9]{3}){2,})"): ".",  # 1.234.567,89
}
_RESULT_FOLLOWS = regex.compile(r"####|=|\banswer\s*(?:is\b|:)", regex.IGNORECASE)

# Signs of other scripts and keyboards, and the ASCII sign that each is in a number.
_SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2212\ufe63\uff0d", "-"),
        **dict.fromkeys("\u066b\uff0e", "."),  # the Arabic decimal mark
        **dict.fromkeys("\u066c\u060c\uff0c", ","),  # the Arabic thousands mark
        **dict.fromkeys("\u2044\u2215\uff0f", "/"),
        "\uff1d": "=",
        "\uff05": "%",
        "\uff0b": "+",
    }
)
# A hyphen or an en dash is a minus only before a number and after nothing; otherwise it is a dash.
_DASH_AS_MINUS = regex.compile(r"(?<![^\s(\[{=])[\u2010\u2011\u2013](?=[0-9.\p{Sc}])")
_CURRENCY = regex.compile(r"\p{Sc}")
# Python refuses to read integers of more than 4,300 digits; a looping model writes them.
_MAX_NUMBER_CHARACTERS = 300
_RELATIVE_TOLERANCE = Fraction(1, 10**6)


def last_number(text: str) -> Number | None:
    """Return the last number of a text, which is where a worked solution states its result; None without one.

    A comma groups digits only before exactly three of them, or as in India; one between other digits without a
    space is not clear. A percent sign, a currency and any other unit are passed over: ``50%`` is 50, not 0.5. A minus
    counts as a sign unless something before it could be subtracted from.
    """
    found = _numbers(text)
    return found[-1] if found else None


def only_number(text: str) -> Number | None:
    """Return the number a reference means, or None where it means something else.

    A reference with one number means it; with several, the part after its last ``####``, ``=`` or "answer is"
    must have one. ``628, 372`` and ``2^11 - 1`` mean no single number.
    """
    found = _numbers(text)
    if len(found) > 1:
        found = _numbers(_RESULT_FOLLOWS.split(_plain(text))[-1])
    return found[0] if len(found) == 1 else None


def same_number(a: Number, b: Number) -> bool:
    """Tell whether two numbers are equal: whole ones exactly, others to one part in a million, unclear as written."""
    if isinstance(a, str) or isinstance(b, str):
        return a == b
    if a == b or (a.denominator == 1 and b.denominator == 1):
        return a == b
    return abs(a - b) <= _RELATIVE_TOLERANCE * max(abs(a), abs(b))


def _plain(text: str) -> str:
    """Write digits, signs and fractions of any script as ASCII does."""
    if text.isascii():
        return text
    plain = "".join(map(_plain_character, without_invisible(text).translate(_SIGNS)))
    return str(_DASH_AS_MINUS.sub("-", plain))


@lru_cache(maxsize=10_000)
def _plain_character(character: str) -> str:
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if unicodedata.decomposition(character).startswith("<fraction>"):
        # With a space before it, so that 1½ is one and a half, not 11/2.
        return " " + unicodedata.normalize("NFKC", character).translate(_SIGNS)
    return character


def _numbers(text: str) -> list[Number]:
    """Return all numbers of a text in order."""
    values = (_value(match) for match in _NUMBER.finditer(_plain(text)))
    return [value for value in values if value is not None]


def _value(match: regex.Match[str]) -> Number | None:
    """Read one match of ``_NUMBER``; None for a division by zero and for numbers of absurd length."""
    if len(match.group()) > _MAX_NUMBER_CHARACTERS:
        return None
    part = {name: _read(text) for name, text in match.groupdict().items() if text and name != "sign"}
    clear = {name: value for name, value in part.items() if value is not None}
    if len(clear) < len(part):
        return "".join(_CURRENCY.sub("", match.group()).split())
    if clear.get("bottom") == 0:
        return None
    value = clear.get("whole", 0) + clear["top"] / clear.get("bottom", 1)
    return -value if match["sign"] else value


def _read(written: str) -> Fraction | None:
    """Read digits with marks between them; None where they can be read in two ways."""
    digits, exponent, power = written.lower().partition("e")
    if not _PLAIN.fullmatch(digits):
        marks = next((marks for form, marks in _GROUPED.items() if form.fullmatch(digits)), None)
        if marks is None:
            return None
        # What groups is taken out, what is left parts off the decimals.
        digits = "".join(character for character in digits if character not in marks).replace(",", ".")
    return Fraction(digits + exponent + power)
