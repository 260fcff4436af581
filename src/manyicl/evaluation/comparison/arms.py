"""The ways to adapt a model that a comparison holds, as tables and plots name them."""

from __future__ import annotations

from dataclasses import dataclass

from manyicl.errors import pluralized
from manyicl.evaluation.comparison.records import CellRecord

REGIME_LABELS = {
    "base": "base",
    "zero_shot": "zero-shot",
    "few_shot": "few-shot",
    "last_answer": "many-shot, last answer",
    "all_answers": "many-shot, all answers",
    "dedicated": "one model per task",
    "import": "imported",
}


@dataclass(frozen=True)
class Arm:
    """One way to adapt the model.

    Attributes:
        regime: Its regime, or ``import`` for answers that were given as a file.
        replay: Whether general text was replayed.
        variant: Name of an ablation of all answers.
        equal_answers: Whether it has as many supervised answers as the last-answer regime, and so fewer tokens.
        num_examples: Examples that a dedicated model was trained on.
        imported: Name of imported answers.
    """

    regime: str
    replay: bool = False
    variant: str | None = None
    equal_answers: bool = False
    num_examples: int | None = None
    imported: str | None = None

    @property
    def label(self) -> str:
        """What tables and plots call it."""
        if self.imported is not None:
            return f"imported: {self.imported}"
        if self.variant is not None:
            return f"variant {self.variant}"
        name = REGIME_LABELS.get(self.regime, self.regime)
        if self.num_examples is not None:
            name = f"{name}, {pluralized(self.num_examples, 'example')}"
        return name + (", equal answers" if self.equal_answers else "") + (" + replay" if self.replay else "")

    @property
    def is_main(self) -> bool:
        """Whether it is one of the regimes with one model for all tasks, at the common budget, without replay."""
        return self.regime not in ("dedicated", "import") and not (self.replay or self.variant or self.equal_answers)

    @property
    def place(self) -> tuple[object, ...]:
        """Its place among other arms."""
        order = list(REGIME_LABELS).index(self.regime) if self.regime in REGIME_LABELS else len(REGIME_LABELS)
        return (
            (self.variant or "", order, self.replay, self.equal_answers),
            (self.num_examples or 0, self.imported or ""),
        )


BASE, ZERO_SHOT, FEW_SHOT, DEDICATED = Arm("base"), Arm("zero_shot"), Arm("few_shot"), Arm("dedicated")
LAST_ANSWER, ALL_ANSWERS = Arm("last_answer"), Arm("all_answers")
EQUAL_ANSWERS = Arm("all_answers", equal_answers=True)


@dataclass(frozen=True)
class Point:
    """An arm at a shot count."""

    arm: Arm
    shots: int

    @property
    def label(self) -> str:
        """What tables call it: dedicated models are evaluated without demonstrations, as everyone knows."""
        if self.arm.regime in ("dedicated", "import"):
            return self.arm.label
        return f"{self.arm.label}, {pluralized(self.shots, 'shot')}"


def arm_of(cell: CellRecord) -> Arm:
    """Return the arm that a cell is a training of."""
    return Arm(cell.regime, cell.replay, cell.variant, cell.equal == "answers", cell.num_examples)
