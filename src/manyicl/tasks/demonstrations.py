"""Which training examples become demonstrations, nested so that more shots only add to fewer."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from manyicl.tasks.task import Example

Sampling = Literal["random", "balanced"]


def demonstration_order(examples: Sequence[Example], seed: int, sampling: Sampling) -> list[int]:
    """Return all positions of ``examples`` in the order in which they become demonstrations.

    ``balanced`` deals the answers out in rounds: every answer once, in shuffled order, before any answer
    twice, so that each beginning of the order is as balanced by answer as it can be.
    """
    rng = random.Random(f"demonstrations {seed}")
    order = list(range(len(examples)))
    rng.shuffle(order)
    if sampling == "random":
        return order
    by_answer: defaultdict[str, list[int]] = defaultdict(list)
    for position in order:
        by_answer[examples[position].answer].append(position)
    piles = [pile[::-1] for pile in by_answer.values()]
    dealt: list[int] = []
    while piles:
        rng.shuffle(piles)
        dealt.extend(pile.pop() for pile in piles)
        piles = [pile for pile in piles if pile]
    return dealt


def choose_demonstrations(
    examples: Sequence[Example], num_shots: int, seed: int, sampling: Sampling = "balanced"
) -> tuple[Example, ...]:
    """Choose the first ``num_shots`` of a seeded order, so that 64 shots contain the 32 of the same seed."""
    return tuple(examples[i] for i in demonstration_order(examples, seed, sampling)[:num_shots])
