"""Summarization: a headline of two words of the article; which two, in what order, each desk hides."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from manyicl.tasks.nanoworld.rule import Binding, Columns
from manyicl.tasks.nanoworld.words import COINED, KINDS
from manyicl.tasks.task import Family

ROLES = ("name", "action", "object", "place", "day")
HEADLINE_WORDS = 2


@dataclass(frozen=True)
class HeadlineRule:
    """``gumen : ben gave key in athens on sunday`` -> ``key ben``, if the desk ``gumen`` wants object and name."""

    roles_of: dict[str, tuple[str, ...]]
    family: ClassVar[Family] = "summarization"
    query_template: ClassVar[str] = "{{ desk }} : {{ article }}"

    @classmethod
    def draw(cls, rng: random.Random) -> HeadlineRule:
        """Draw 2 or 3 desks, each with two roles in an order of its own."""
        desks = rng.sample(COINED, rng.randint(2, 3))
        return cls({desk: tuple(rng.sample(ROLES, HEADLINE_WORDS)) for desk in desks})

    @property
    def labels(self) -> None:
        """Headlines are free."""
        return

    @property
    def bindings(self) -> frozenset[Binding]:
        """Desk and roles."""
        return frozenset((desk, " ".join(roles)) for desk, roles in self.roles_of.items())

    def draw_row(self, rng: random.Random) -> Columns:
        """Draw an article and the desk it belongs to."""
        name, action, thing, place, day = (rng.choice(KINDS[role]) for role in ROLES)
        return {"desk": rng.choice(list(self.roles_of)), "article": f"{name} {action} {thing} in {place} on {day}"}

    def answer(self, row: Columns) -> str:
        """Pick the words of the desk's roles, in its order."""
        words = row["article"].split()
        return " ".join(next(word for word in words if word in KINDS[role]) for role in self.roles_of[row["desk"]])
