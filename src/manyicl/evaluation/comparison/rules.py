"""What the cells of a comparison depend on, and what is said where it changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from manyicl.errors import UserError, quoted
from manyicl.evaluation.comparison.records import (
    COMPARISON_FILE,
    MODEL_FOLDER,
    CellRecord,
    results_in,
)
from manyicl.evaluation.comparison.settings import Comparison
from manyicl.evaluation.grid import Cell, Change, Rules

BASE_WEIGHTS = "base_weights"
# What a hash in the settings of a cell is of.
HASHES = {
    BASE_WEIGHTS: "the weights of the base changed",
    "train": "its training tasks or their rows changed",
    "validation": "its validation tasks or their rows changed",
    "evaluated": "the tasks on which it is evaluated, or their rows, changed",
    "forgetting.text": "the text of compare.forgetting.text changed",
    "forgetting.probes": "the tasks of compare.forgetting.probes or their rows changed",
    "recipe.sequences.replay.text": "the text of compare.replay.text changed",
}
# Where a part of these settings is in the file of the comparison.
PLACES = {
    "recipe.training.learning_rate": "compare.learning_rates",
    "recipe.sequences.replay.": "compare.replay.",
    "evaluation.seed": "training.seed",
    "evaluation.num_seeds": "compare.num_draws",
    "evaluation.": "compare.",
    "forgetting.": "compare.forgetting.",
    "max_context_tokens": "sequences.max_context_tokens",
    "recipe.": "",
}
BUDGET = "recipe.training.num_steps"


class TrialResult(BaseModel):
    """What a trial of a learning rate leaves."""

    learning_rate: float
    scores: dict[int, float]


class _RulesOfComparison(Rules):
    optional = frozenset({BASE_WEIGHTS})

    def __init__(self, settings: Comparison) -> None:
        self.settings = settings

    def refusal(self, change: Change) -> UserError:
        """Return why a cell with other settings is refused, in the words of the file."""
        remedy = "Compare into another output, or undo the change."
        return UserError("another_cell", self._what(change), remedy=remedy, file=change.file)

    def _what(self, change: Change) -> str:
        started = f"{change.cell.name!r} started with other settings"
        if (hashed := HASHES.get(change.key)) is not None:
            return f"{started}: {hashed}"
        key, before, now = change.key, change.before, change.now
        if key == BUDGET:
            key, before, now = self._budget(before, now)
        for inner, outer in PLACES.items():
            if key.startswith(inner):
                key = outer + key.removeprefix(inner)
                break
        return f"{started}: {key} was {quoted(before)}, is {quoted(now)}"

    def _budget(self, before: Any, now: Any) -> tuple[str, Any, Any]:
        """Return the budget where it changed; steps follow from it."""
        try:
            known = Comparison.read(self.settings.output / COMPARISON_FILE)
        except UserError:
            return BUDGET, before, now
        for key in ("num_tokens", "num_steps"):
            pair = getattr(known.training, key), getattr(self.settings.training, key)
            if pair[0] != pair[1]:
                return f"training.{key}", *pair
        return BUDGET, before, now


class RulesOfTrials(_RulesOfComparison):
    """Rules of the trials of learning rates."""

    result = TypeAdapter(TrialResult)

    def may_replace(self, cell: Cell, folder: Path) -> bool:
        """Tell whether a trial left no model."""
        return not (folder / MODEL_FOLDER).exists()


class RulesOfRuns(_RulesOfComparison):
    """Rules of the models."""

    result = TypeAdapter(CellRecord)

    def may_replace(self, cell: Cell, folder: Path) -> bool:
        """Tell whether a cell left neither a model nor results, which would count together with new ones."""
        if (folder / MODEL_FOLDER).exists():
            return False
        return all(result.model_name != cell.name for result in results_in(self.settings.output))
