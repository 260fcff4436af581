"""The two kinds of errors that end a command, and helpers to word their messages."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

# What a shell reports for a command that Ctrl-C ended: 128 and the number of SIGINT.
INTERRUPTED_EXIT_CODE = 130


@dataclasses.dataclass(eq=False, repr=False)
class UserError(Exception):
    """A mistake of the user: what is wrong, what was expected, what was found, what to do. Ends a command with 2.

    The sentence is made from the fields, so that a server can return the fields and a command print the sentence.

    Attributes:
        code: Kind of mistake, such as ``unknown_key``; stable, for programs and tests.
        what: What is wrong, as the beginning of a sentence without its full stop.
        expected: What would have been right.
        found: What was there instead, as it is written in the sentence; see `quoted`.
        remedy: What to do, as a sentence of its own.
        file: File or key path in which the mistake is.
        row: Row or line of that file, or number of the query, from 1.
        field: Column or key in which the mistake is.

    Examples:
        >>> what = "num_shots is too large"
        >>> print(UserError("too_many_shots", what, expected="at most 12", found="40", file="a.yaml"))
        a.yaml: num_shots is too large; expected at most 12, found 40.
    """

    code: str
    what: str
    _: dataclasses.KW_ONLY
    expected: str | None = None
    found: str | None = None
    remedy: str | None = None
    file: str | Path | None = None
    row: int | None = None
    field: str | None = None

    def __post_init__(self) -> None:
        """Give the exception the arguments with which it is made again in another process."""
        super().__init__(self.code, self.what)
        self.remedy = (self.remedy or "").strip() or None

    def at(self, *, file: str | Path | None = None, row: int | None = None, field: str | None = None) -> Self:
        """Fill in where the mistake is, as far as that is not known yet, and return the error to be raised again."""
        for name, value in (("file", file), ("row", row), ("field", field)):
            if getattr(self, name) is None:
                setattr(self, name, value)
        return self

    def fields(self) -> dict[str, str | int]:
        """Return the fields that are known, as JSON holds them, the sentence among them."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(self)}
        known = {name: value for name, value in values.items() if value is not None}
        return {name: value if name == "row" else str(value) for name, value in known.items()} | {"sentence": str(self)}

    def __str__(self) -> str:
        place = "" if self.file is None else f"{self.file}"
        if self.row is not None:
            place = f"{place}:{self.row}" if place else f"Query {self.row}"
        sentence = f"{place}: {self.what}" if place else self.what
        contrast = [f"{name} {value}" for name, value in (("expected", self.expected), ("found", self.found)) if value]
        if contrast:
            sentence += f"; {', '.join(contrast)}"
        if not sentence.endswith((".", "?", "…")):
            sentence += "."
        # A path or a library's message may hold line breaks; a sentence never does.
        return " ".join((f"{sentence} {self.remedy}" if self.remedy else sentence).splitlines())


@contextmanager
def located(*, file: str | Path | None = None, row: int | None = None, field: str | None = None) -> Iterator[None]:
    """Fill in where a mistake is, as far as a `UserError` raised inside does not say."""
    try:
        yield
    except UserError as error:
        raise error.at(file=file, row=row, field=field)  # noqa: B904


class MachineError(Exception):
    """A failure of the machine (disk, memory, a loss that is not a number). Ends a command with 1."""


class NotFiniteError(MachineError):
    """A loss, gradient, weight or score is not a finite number; the same work would end so again."""


# Names with which one that is unknown is compared, and the longest of them.
MOST_NAMES, _LONGEST_NAME = 1000, 100


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'trec'?"`` for the nearest known name, or an empty string.

    Case counts only where several names are near: ``FAMILY`` is ``family``, and ``Good`` is ``Good`` before ``good``.

    Examples:
        >>> did_you_mean("trecc", ["trec", "cola"])
        " Did you mean 'trec'?"
        >>> did_you_mean("trec", ["trec", "trecs"])
        ''
    """
    names = list(known)
    # Comparing takes time with the square of the lengths, and both may come from outside.
    if name in names or len(name) > _LONGEST_NAME:
        return ""
    names = [known_name for known_name in names[:MOST_NAMES] if len(known_name) <= _LONGEST_NAME]
    nearest = difflib.get_close_matches(name, names, n=1)
    if not nearest:
        written = {known_name.casefold(): known_name for known_name in names}
        nearest = [written[folded] for folded in difflib.get_close_matches(name.casefold(), written, n=1)]
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def differing_parts(first: str, second: str) -> tuple[str, str]:
    """Return what two texts hold between the beginning and the end that they share.

    Examples:
        >>> differing_parts("a red box", "a green box")
        ('red', 'green')
    """
    start = len(os.path.commonprefix([first, second]))  # noqa: RUF071  # characters are what is compared
    end = len(os.path.commonprefix([first[start:][::-1], second[start:][::-1]]))  # noqa: RUF071
    return first[start : len(first) - end], second[start : len(second) - end]


def pluralized(number: int, noun: str) -> str:
    """Write a number and what it counts, as in ``1 test row`` and ``1,000 test rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shortened(text: str, most: int = 200) -> str:
    """Cut a text down to what a sentence can hold."""
    return text if len(text) <= most else text[: most - 1] + "…"


def quoted(value: object) -> str:
    """Write a value that was found in a file; an empty one as nothing."""
    return "nothing" if value is None else shortened(repr(value))
