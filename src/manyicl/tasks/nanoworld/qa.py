"""Question answering: coined question words ask for a kind of word in the context; which for which is hidden."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from manyicl.tasks.nanoworld.rule import Binding, Columns, dealt, shuffled
from manyicl.tasks.nanoworld.words import COINED, KINDS
from manyicl.tasks.task import Family

ASKABLE = ("name", "colour", "animal", "place", "food")
NUM_KINDS = 4


@dataclass(frozen=True)
class QuestionRule:
    """``hen lima rice jill . bigus ?`` -> ``lima``, if ``bigus`` asks for the place."""

    kind_of: dict[str, str]
    family: ClassVar[Family] = "qa"
    query_template: ClassVar[str] = "{{ context }} . {{ question }} ?"

    @classmethod
    def draw(cls, rng: random.Random) -> QuestionRule:
        """Draw 4 to 6 question words for four kinds."""
        return cls(dealt(rng.sample(COINED, rng.randint(4, 6)), rng.sample(ASKABLE, NUM_KINDS)))

    @property
    def labels(self) -> None:
        """Answers are free."""
        return

    @property
    def bindings(self) -> frozenset[Binding]:
        """Question word and kind."""
        return frozenset(self.kind_of.items())

    def draw_row(self, rng: random.Random) -> Columns:
        """Draw a context with one word of each kind, in any order, and a question."""
        words = [rng.choice(KINDS[kind]) for kind in dict.fromkeys(self.kind_of.values())]
        return {"context": " ".join(shuffled(words, rng)), "question": rng.choice(list(self.kind_of))}

    def answer(self, row: Columns) -> str:
        """Return the word of the requested kind."""
        kind = self.kind_of[row["question"]]
        return next(word for word in row["context"].split() if word in KINDS[kind])
