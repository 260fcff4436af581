"""What defines a nano task: a hidden rule that draws rows and answers them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from manyicl.tasks.task import Family

Split = Literal["base", "train", "unseen"]
Columns = dict[str, str]
# What a word stands for in one task, such as (`dorik`, `saduk`): this is all that demonstrations can teach.
Binding = tuple[str, str]


@dataclass(frozen=True)
class Rule:
    """A rule that only demonstrations reveal.

    Attributes:
        family: Family of the tasks made of it.
        query_template: Template over the columns of a row.
        draw_row: Draws the columns of a query.
        answer: Applies the rule to these columns.
        labels: The closed answer set, or None for free answers.
        bindings: What its words stand for; a task is unseen if no training task shares any of it.
    """

    family: Family
    query_template: str
    draw_row: Callable[[random.Random], Columns]
    answer: Callable[[Columns], str]
    labels: tuple[str, ...] | None = None
    bindings: frozenset[Binding] = frozenset()


def dealt(keys: Sequence[str], values: Sequence[str]) -> dict[str, str]:
    """Give each key a value, in turn, so that all values are used alike."""
    return {key: values[position % len(values)] for position, key in enumerate(keys)}


def shuffled(words: Sequence[str], rng: random.Random) -> list[str]:
    """Return the words in random order."""
    return rng.sample(words, len(words))
