"""The learning rate of each regime, and the length of dedicated models: what was best on the validation tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter

from manyicl.atomic import write_atomically
from manyicl.errors import NotFiniteError, UserError
from manyicl.evaluation.comparison.cells import Trial
from manyicl.evaluation.grid import CellReport, CellState, parsed

# In the folder of the trials: what was chosen by them.
CHOSEN_FILE = "chosen.json"


@dataclass(frozen=True)
class Choice:
    """A learning rate, and for dedicated models a number of steps.

    Attributes:
        learning_rate: The rate.
        num_steps: Steps of a dedicated model; None for the budget of the regime.
        scores: Mean score on the validation tasks of each rate that could be tried, at its best length.
    """

    learning_rate: float
    num_steps: int | None = None
    scores: Mapping[float, float] = field(default_factory=dict)

    def sentence(self, name: str) -> str:
        """Say what was chosen, and by which scores."""
        scores = ", ".join(f"{rate:.2g} {score:.3f}" for rate, score in self.scores.items())
        steps = f" and {self.num_steps:,} steps" if self.num_steps is not None else ""
        reason = f" (on validation tasks: {scores})" if scores else ""
        return f"{name}: learning rate {self.learning_rate:.2g}{steps}{reason}."


class _Chosen(BaseModel):
    """What `CHOSEN_FILE` holds."""

    rates: tuple[float, ...] = Field(description="Rates that were tried.")
    choices: dict[str, Choice] = Field(description="Name of a choice -> what was chosen.")


def known_choices(file: Path, rates: Sequence[float]) -> dict[str, Choice]:
    """Read what was chosen among these rates; nothing where others were tried, or nothing was chosen yet.

    Raises:
        UserError: If the file is damaged.
    """
    if not file.is_file():
        return {}
    chosen = parsed(TypeAdapter(_Chosen), file)
    return dict(chosen.choices) if chosen.rates == tuple(rates) else {}


def write_choices(file: Path, rates: Sequence[float], choices: Mapping[str, Choice]) -> None:
    """Write what was chosen among these rates."""
    chosen = _Chosen(rates=tuple(rates), choices=dict(choices))
    write_atomically(file, chosen.model_dump_json(indent=2) + "\n")


def choose(trials: Sequence[Trial], reports: Sequence[CellReport]) -> dict[str, Choice | UserError]:
    """Choose by the trials of each rate.

    A rate at which training diverges is out. Nothing is chosen without a trial that failed otherwise, such as for want
    of memory: the rate would depend on what else the machine did.

    Args:
        trials: All trials.
        reports: What is known of each of them.

    Returns:
        Name of a choice -> what was chosen, or why nothing could be.
    """
    of_choice: defaultdict[str, list[tuple[Trial, CellReport]]] = defaultdict(list)
    for trial, report in zip(trials, reports, strict=True):
        of_choice[trial.choice].append((trial, report))
    return {name: _chosen(name, pairs) for name, pairs in of_choice.items()}


def _chosen(name: str, pairs: Sequence[tuple[Trial, CellReport]]) -> Choice | UserError:
    """Choose the rate, and the length, with the best mean score; of equal ones the middle rate and the shortest."""
    rates = sorted({trial.learning_rate for trial, _ in pairs})
    diverged = {trial.learning_rate for trial, report in pairs if _has_diverged(report)}
    failed = [report for _, report in pairs if report.state is not CellState.DONE and not _has_diverged(report)]
    if failed or diverged.issuperset(rates):
        reason = (failed or [report for _, report in pairs if _has_diverged(report)])[0].sentence()
        what = f"no learning rate can be chosen for {name}: {reason}"
        return UserError("no_rate", what, remedy="Remove the cause, then run again with --retry-failed.")
    scores: dict[tuple[float, int], float] = {}
    for rate in (rate for rate in rates if rate not in diverged):
        results = [report.result for trial, report in pairs if trial.learning_rate == rate]
        scores |= {(rate, step): score for step, score in _mean_scores(results).items()}
    middle = (len(rates) - 1) / 2
    rate, step = max(scores, key=lambda each: (scores[each], -abs(rates.index(each[0]) - middle), -each[1]))
    best = {one: max(score for (other, _), score in scores.items() if other == one) for one, _ in scores}
    is_dedicated = pairs[0][0].num_examples is not None
    return Choice(rate, step if is_dedicated else None, best)


def _has_diverged(report: CellReport) -> bool:
    return report.failure is not None and report.failure.get("kind") == NotFiniteError.__name__


def _mean_scores(results: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    """Return the mean over tasks after each number of steps."""
    scores = [{int(step): float(score) for step, score in result["scores"].items()} for result in results]
    return {step: fmean(each[step] for each in scores) for step in sorted(scores[0])}
