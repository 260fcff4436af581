"""Find queries that occur on both sides of a task: a test example never becomes a demonstration."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from manyicl.tasks.example import Example

ON_BOTH_SIDES = "training row whose query is in test too"


def normalised(query_text: str) -> str:
    """Return what makes two queries the same: letters composed, case folded, white space collapsed.

    Composed and decomposed letters (NFC, NFD) are the same text by Unicode's own rule, and look it. Compatibility
    folding (NFKC) would go on to make ``x²`` the same as ``x2``, and would change which rows of a Chinese task a split
    puts on which side, for the order of these texts decides that.
    """
    return " ".join(unicodedata.normalize("NFC", query_text).casefold().split())


def leaked(train: Iterable[Example], test: Iterable[Example]) -> list[tuple[Example, Example]]:
    """Pair each training example whose query is a test query with the first such test example."""
    first_of: dict[str, Example] = {}
    for example in test:
        first_of.setdefault(normalised(example.query.text), example)
    pairs = ((example, first_of.get(normalised(example.query.text))) for example in train)
    return [(example, twin) for example, twin in pairs if twin is not None]
