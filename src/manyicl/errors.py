"""The two ways a command ends badly, and the words that its sentences share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What a shell reports for a command that Ctrl-C ended: 128 and the number of SIGINT.
INTERRUPTED_EXIT_CODE = 130


class UserError(Exception):
    """The person's mistake: says what was expected, what was found, what to do. Ends a command with 2."""


class QueryError(UserError):
    """A query cannot be asked; says which, so that whoever read it from a file can name the line.

    Attributes:
        number: Of the query among those asked, from 1.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class MachineError(Exception):
    """A failure of the machine (disk, memory, a loss that is not a number). Ends a command with 1."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'trec'?"`` for the nearest known name, or an empty string.

    Case counts only where several names are near: ``FAMILY`` is ``family``, and ``Good`` is ``Good`` before ``good``.
    """
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not nearest:
        written = {known_name.casefold(): known_name for known_name in names}
        folded = difflib.get_close_matches(name.casefold(), written, n=1, cutoff=0.6)
        nearest = [written[known_name] for known_name in folded]
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def counted(number: int, noun: str) -> str:
    """Write a number and what it counts, as in ``1 test row`` and ``1,000 test rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shortened(text: str, most: int = 200) -> str:
    """Cut what a person wrote down to what a sentence can hold."""
    return text if len(text) <= most else text[: most - 1] + "…"


def shown(value: object) -> str:
    """Write a value that was found in a file; an empty one as nothing."""
    return "nothing" if value is None else shortened(repr(value))
