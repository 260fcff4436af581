"""Which training examples become demonstrations; sets are nested, so that more shots extend fewer."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

ShotSampling = Literal["random", "balanced"]
T = TypeVar("T")


def demonstrations_in_order(answers: Sequence[str], seed: int, sampling: ShotSampling) -> Iterator[int]:
    """Yield the positions of examples, given by their answers, in the order in which they become demonstrations.

    ``balanced`` goes through the answers in rounds: every answer once, in shuffled order, before any answer
    twice, so that each beginning of the order is as balanced by answer as it can be.
    """
    rng = random.Random(f"demonstrations {seed}")
    order = list(range(len(answers)))
    rng.shuffle(order)
    if sampling == "random":
        yield from order
        return
    by_answer: defaultdict[str, list[int]] = defaultdict(list)
    for position in order:
        by_answer[answers[position]].append(position)
    piles = [pile[::-1] for pile in by_answer.values()]
    while piles:
        rng.shuffle(piles)
        for pile in piles:
            yield pile.pop()
        piles = [pile for pile in piles if pile]


def in_another_order(demonstrations: Sequence[T], seed: int, order: int) -> tuple[T, ...]:
    """Return the demonstrations of a draw in another order; 0 is the one in which they were drawn."""
    others = list(demonstrations)
    if order:
        random.Random(f"order {order} of demonstrations {seed}").shuffle(others)
    return tuple(others)


def evenly_chosen(train: Sequence[T], test: Sequence[T], most: int) -> list[T]:
    """Choose examples at even distances from both sides, so that all of a sorted file is seen; no other is read."""
    num_examples = len(train) + len(test)
    positions = range(num_examples) if num_examples <= most else [n * num_examples // most for n in range(most)]
    return [train[position] if position < len(train) else test[position - len(train)] for position in positions]
