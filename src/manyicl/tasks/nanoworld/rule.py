"""What a nano task is made of: a hidden rule that draws rows and answers them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar, Protocol

from manyicl.tasks.task import Family

Columns = dict[str, str]
# What a word stands for in one task, such as (`dorik`, `saduk`): this is all that demonstrations can teach.
Binding = tuple[str, str]


class Rule(Protocol):
    """A rule that only demonstrations reveal.

    Attributes:
        family: Of the tasks made of it.
        query_template: Template over the columns of a row.
    """

    family: ClassVar[Family]
    query_template: ClassVar[str]

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The closed answer set, or None for free answers."""
        ...

    @property
    def bindings(self) -> frozenset[Binding]:
        """What its words stand for; a task is unseen if no training task shares any of it."""
        ...

    def draw_row(self, rng: random.Random) -> Columns:
        """Draw the columns of a query, without its answer."""
        ...

    def answer(self, row: Columns) -> str:
        """Apply the rule."""
        ...


def dealt(keys: Sequence[str], values: Sequence[str]) -> dict[str, str]:
    """Give each key a value, in turn, so that all values are used alike."""
    return {key: values[position % len(values)] for position, key in enumerate(keys)}


def shuffled(words: Sequence[str], rng: random.Random) -> list[str]:
    """Return the words in random order."""
    return rng.sample(words, len(words))
