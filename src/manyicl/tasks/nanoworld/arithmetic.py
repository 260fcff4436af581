"""Math: coined operators stand for operations on two digits; which for which is hidden."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from manyicl.tasks.nanoworld.rule import Binding, Columns, dealt
from manyicl.tasks.nanoworld.words import COINED, DIGITS
from manyicl.tasks.task import Family

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "sum": lambda a, b: (a + b) % 10,  # of which the last digit counts
    "difference": lambda a, b: abs(a - b),
    "larger": max,
    "smaller": min,
    "first": lambda a, b: a,
    "second": lambda a, b: b,
}


@dataclass(frozen=True)
class OperatorRule:
    """``3 gizel 7`` -> ``7``, if ``gizel`` asks for the larger."""

    operation_of: dict[str, str]
    family: ClassVar[Family] = "math"
    query_template: ClassVar[str] = "{{ problem }}"

    @classmethod
    def draw(cls, rng: random.Random) -> OperatorRule:
        """Draw 3 or 4 operators."""
        return cls(dealt(rng.sample(COINED, rng.randint(3, 4)), rng.sample(list(OPERATIONS), len(OPERATIONS))))

    @property
    def labels(self) -> None:
        """Answers are numbers."""
        return

    @property
    def bindings(self) -> frozenset[Binding]:
        """Operator and operation."""
        return frozenset(self.operation_of.items())

    def draw_row(self, rng: random.Random) -> Columns:
        """Draw two digits and an operator."""
        return {"problem": f"{rng.choice(DIGITS)} {rng.choice(list(self.operation_of))} {rng.choice(DIGITS)}"}

    def answer(self, row: Columns) -> str:
        """Compute."""
        first, operator, second = row["problem"].split()
        return str(OPERATIONS[self.operation_of[operator]](int(first), int(second)))
