"""The two ways a command ends badly, and the sentence that offers the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What a shell reports for a command that Ctrl-C ended: 128 and the number of SIGINT.
INTERRUPTED_EXIT_CODE = 130


class UserError(Exception):
    """The person's mistake: says what was expected, what was found, what to do. Ends a command with 2."""


class MachineError(Exception):
    """A failure of the machine (disk, memory, a loss that is not a number). Ends a command with 1."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'trec'?"`` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
