"""Classification: trigger words among fillers decide a label; which word belongs to which label is hidden."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from manyicl.tasks.nanoworld.rule import Binding, Columns, dealt, shuffled
from manyicl.tasks.nanoworld.words import COINED, FILLERS
from manyicl.tasks.task import Family


@dataclass(frozen=True)
class TriggerRule:
    """``again near dorik yes`` -> ``saduk``, because ``dorik`` is one of the triggers of ``saduk``.

    With up to 30 triggers, many shots are needed before each has been seen.
    """

    label_of: dict[str, str]
    family: ClassVar[Family] = "classification"
    query_template: ClassVar[str] = "{{ text }}"

    @classmethod
    def draw(cls, rng: random.Random) -> TriggerRule:
        """Draw 3 to 5 labels with 4 to 6 triggers each."""
        num_labels = rng.randint(3, 5)
        words = rng.sample(COINED, num_labels + num_labels * rng.randint(4, 6))
        return cls(dealt(words[num_labels:], words[:num_labels]))

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of their first triggers."""
        return tuple(dict.fromkeys(self.label_of.values()))

    @property
    def bindings(self) -> frozenset[Binding]:
        """Trigger and label."""
        return frozenset(self.label_of.items())

    def draw_row(self, rng: random.Random) -> Columns:
        """Hide one or two triggers of one label among fillers."""
        label = rng.choice(self.labels)
        triggers = [word for word, its_label in self.label_of.items() if its_label == label]
        words = rng.sample(triggers, rng.randint(1, 2)) + rng.sample(FILLERS, rng.randint(3, 4))
        return {"text": " ".join(shuffled(words, rng))}

    def answer(self, row: Columns) -> str:
        """Return the label of the first trigger; all triggers of a row agree."""
        return next(self.label_of[word] for word in row["text"].split() if word in self.label_of)
