"""Inference: coined verbs stand for liking, hating or neither; which verb means what is hidden."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from manyicl.tasks.nanoworld.rule import Binding, Columns, dealt
from manyicl.tasks.nanoworld.words import COINED, KINDS
from manyicl.tasks.task import Family

ATTITUDES = ("likes", "hates")
NEITHER = "neither"


@dataclass(frozen=True)
class VerbRule:
    """``karl vafem dog ; hates ?`` -> the task's word for entailment, if ``vafem`` means hating.

    The premise says what karl does to the dog, the hypothesis asks whether he likes or hates it. It is a
    contradiction under the other attitude, and neutral for verbs that mean neither.
    """

    meaning_of: dict[str, str]
    entailment: str
    contradiction: str
    neutral: str
    family: ClassVar[Family] = "nli"
    query_template: ClassVar[str] = "{{ premise }} ; {{ hypothesis }} ?"

    @classmethod
    def draw(cls, rng: random.Random) -> VerbRule:
        """Draw three labels and 6 or 9 verbs, a third of them for each meaning."""
        words = rng.sample(COINED, 3 + rng.choice([6, 9]))
        return cls(dealt(words[3:], [*ATTITUDES, NEITHER]), *words[:3])

    @property
    def labels(self) -> tuple[str, ...]:
        """The three words that stand for the relations."""
        return (self.entailment, self.contradiction, self.neutral)

    @property
    def bindings(self) -> frozenset[Binding]:
        """Verb and meaning."""
        return frozenset(self.meaning_of.items())

    def draw_row(self, rng: random.Random) -> Columns:
        """Draw a premise with a coined verb and a hypothesis with an attitude."""
        name, thing = rng.choice(KINDS["name"]), rng.choice(KINDS["food"] + KINDS["animal"])
        return {"premise": f"{name} {rng.choice(list(self.meaning_of))} {thing}", "hypothesis": rng.choice(ATTITUDES)}

    def answer(self, row: Columns) -> str:
        """Compare the meaning of the premise's verb with the hypothesis."""
        meaning = self.meaning_of[row["premise"].split()[1]]
        if meaning == NEITHER:
            return self.neutral
        return self.entailment if meaning == row["hypothesis"] else self.contradiction
