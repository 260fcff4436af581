"""What a comparison will do and cost, found without training and without writing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from manyicl.activity import Activity
from manyicl.errors import UserError, pluralized
from manyicl.evaluation.comparison.budgets import Length, nominal_recipe
from manyicl.evaluation.comparison.cells import Run, Trial, evaluated_tasks, evaluation_of
from manyicl.evaluation.comparison.regimes import made_for_shots
from manyicl.evaluation.comparison.run import PreparedComparison
from manyicl.evaluation.grid import CellReport, CellState, Grid
from manyicl.model.reference import HUB_PREFIX
from manyicl.training.estimate import MOST_PARAMETERS_MEASURED, estimated_cost, measured_cost, num_weights
from manyicl.training.start import starting_point
from manyicl.training.throughput import TrainingFlops
from manyicl.training.train import packed_sequences


@dataclass(frozen=True)
class Speed:
    """How fast this machine is with the model of a comparison.

    Attributes:
        seconds_per_operation: Of training.
        formula: Operations of training by the length of episodes.
        how: How it was measured or estimated.
    """

    seconds_per_operation: float
    formula: TrainingFlops
    how: str

    def hours(self, length: Length, num_steps: float) -> float:
        """Return the time of a training."""
        operations = length.statistics.flops(self.formula) * num_steps * length.sequences_per_step
        return operations * self.seconds_per_operation / 3600

    def forward_hours(self, num_tokens: float) -> float:
        """Return the time of a forward pass over so many tokens, attention aside."""
        return num_tokens * self.formula.forward_per_token * self.seconds_per_operation / 3600


def measured_speed(prepared: PreparedComparison, activity: Activity | None = None) -> Speed | None:
    """Measure for some seconds, once for all regimes; None where nothing is trained.

    A model of the Hub, a quantized one and a large one are estimated from their configuration.

    Raises:
        UserError: If base and recipe do not go together.
    """
    activity = activity or Activity()
    settings = prepared.settings
    regime = next((each for each in reversed(settings.compare.regimes) if each in prepared.lengths), None)
    if regime is None or settings.model.base is None:
        return None
    recipe, length = nominal_recipe(settings, regime), prepared.lengths[regime]
    if settings.model.base.startswith(HUB_PREFIX) or settings.model.quantize is not None:
        raise UserError("hours_unknown", "hours are not estimated for a base of the Hub or in 4 bits")
    activity.begin("timing forward and backward passes")
    tasks = prepared.tasks.dedicated if regime == "dedicated" else prepared.tasks.train
    start = starting_point(recipe, tasks)
    formula = TrainingFlops.of(start.model, recomputes=recipe.training.gradient_checkpointing)
    if num_weights(start.model)[0] > MOST_PARAMETERS_MEASURED:
        cost = estimated_cost(recipe, length.statistics, start.model.config)
    else:
        sequences = packed_sequences(recipe, tasks, start.tokenizer, activity)
        cost = measured_cost(recipe, start, sequences, length.statistics)
    operations = length.statistics.flops(formula) * recipe.num_sequences
    return Speed(cost.hours * 3600 / operations, formula, cost.how)


@dataclass(frozen=True)
class PlannedWork:
    """A cell that is not done, and what it will take.

    Attributes:
        name: Name of the cell.
        num_tokens: Tokens that it is trained on, about.
        num_answers: Test queries that its model answers, once for each point of the curves.
        hours: Time, about; None where it is not known.
    """

    name: str
    num_tokens: float
    num_answers: int
    hours: float | None

    def sentence(self) -> str:
        """Say what it will take."""
        parts = [f"about {self.num_tokens:,.0f} tokens"] if self.num_tokens else []
        parts += [f"{self.num_answers:,} answers"] if self.num_answers else []
        return ", ".join([*parts, *([_time(self.hours)] if self.hours is not None else [])])


class ComparisonPlan:
    """The plan of a comparison: the cells with their states, and what is left to do."""

    def __init__(self, prepared: PreparedComparison, speed: Speed | None, why_unknown: str = "") -> None:
        """Look at the states of all cells.

        Args:
            prepared: The comparison.
            speed: How fast this machine is; None where it is not known.
            why_unknown: Why it is not known.
        """
        self.prepared = prepared
        self.speed = speed
        self.why_unknown = why_unknown
        trials = {trial.name: trial for trial in prepared.trials}
        runs = {run.name: run for run in prepared.runs}
        self.trials = [(report, self._of_trial(trials[report.cell.name])) for report in prepared.rates.reports()]
        self.runs = [(report, self._of_run(runs[report.cell.name])) for report in prepared.models.reports()]

    def _of_trial(self, trial: Trial) -> PlannedWork:
        length = self.prepared.lengths[trial.regime]
        num_steps = length.num_steps if trial.regime == "dedicated" else length.num_trial_steps
        hours = self.speed.hours(length, num_steps) if self.speed else None
        num_tokens = num_steps * length.sequences_per_step * length.statistics.tokens
        return PlannedWork(trial.name, num_tokens, 0, hours)

    def _of_run(self, run: Run) -> PlannedWork:
        length = self.prepared.lengths[run.length] if run.length is not None else None
        hours = self.speed.hours(length, length.num_steps) if self.speed and length else None
        num_answers, num_tokens = self._evaluation(run)
        if self.speed:
            hours = (hours or 0.0) + self.speed.forward_hours(num_tokens)
        return PlannedWork(run.name, length.num_tokens if length else 0, num_answers, hours)

    def _evaluation(self, run: Run) -> tuple[int, float]:
        """Count the answers of an evaluation, and estimate the tokens of its prefixes and queries."""
        settings = self.prepared.settings
        points = evaluation_of(run, settings).points()
        # A query is about as long as a demonstration.
        per_shot = _tokens_per_example(self.prepared.lengths)
        num_answers, num_tokens = 0, 0.0
        for task in evaluated_tasks(run, self.prepared.tasks):
            num_queries = min(settings.compare.num_queries, len(task.test))
            num_answers += num_queries * len(points)
            # Longer prefixes of a draw extend shorter ones, in its own order alone.
            prefixes = sum(max(point.num_shots for point in points if point.seed == seed) for seed in _seeds(points))
            prefixes += sum(point.num_shots for point in points if point.order)
            num_passes = num_queries * (len(task.labels or ("",)) if settings.format.kind == "channel" else 1)
            num_tokens += per_shot * (num_passes * len(points) + prefixes)
        return num_answers, num_tokens

    def lines(self) -> Iterator[str]:
        """Say what is compared, how long each regime trains, how far each cell is, and what is left."""
        yield from self._opening()
        for title, grid, planned in (
            ("Trials of learning rates", self.prepared.rates, self.trials),
            ("Models", self.prepared.models, self.runs),
        ):
            if planned:
                yield from _cells(title, grid, [work for _, work in planned])
        yield from self.prepared.missing_results().values()
        yield self._left()

    def _opening(self) -> Iterator[str]:
        settings, tasks = self.prepared.settings, self.prepared.tasks
        compare = settings.compare
        yield (
            f"Tasks: {len(tasks.train)} to train on, {len(tasks.validation)} to choose learning rates on; evaluated on "
            f"{len(tasks.seen)} seen and {len(tasks.unseen)} unseen ones; {len(tasks.dedicated)} of them get dedicated "
            "models."
        )
        yield f"Base: {settings.model.base}. Output: {settings.output}. Equal {compare.budget} for every regime."
        for name, length in self.prepared.lengths.items():
            yield length.sentence(name)
        if "dedicated" in self.prepared.lengths:
            part = "a whole budget" if compare.dedicated.budget == "each" else "a share of a budget"
            shorter = (
                "shorter where validation tasks say so" if self.trials else "never shorter, since nothing is tried"
            )
            yield f"Dedicated models are at most so long, {part} each, and {shorter}."
        rates = ", ".join(f"{rate:.2g}" for rate in settings.learning_rates)
        if self.trials:
            judged = [
                f"{regime} at {', '.join(map(str, made_for_shots(settings, regime)))}"
                for regime in compare.regimes
                if regime in self.prepared.lengths
            ]
            shots = "; ".join(judged)
            yield f"Learning rates tried: {rates}; judged by the score with so many demonstrations: {shots}."
        else:
            yield f"Learning rate of every regime: {rates}."

    def _left(self) -> str:
        left = self.left()
        trainings = pluralized(sum(work.num_tokens > 0 for work in left), "training")
        tokens, answers = sum(work.num_tokens for work in left), sum(work.num_answers for work in left)
        text = f"Left to do: {trainings} with about {tokens:,.0f} tokens, {answers:,} answers to test queries"
        if self.speed is None:
            return f"{text}. {self.why_unknown}".strip()
        hours = sum(work.hours or 0.0 for work in left)
        return f"{text}, about {_time(hours)} on this machine in one process ({self.speed.how})."

    def left(self) -> list[PlannedWork]:
        """Return what is still to do."""
        return [work for report, work in (*self.trials, *self.runs) if report.state is not CellState.DONE]

    def as_json(self) -> dict[str, Any]:
        """Return the plan as JSON holds it."""
        left = self.left()
        lengths: Mapping[str, Length] = self.prepared.lengths
        return {
            "output": str(self.prepared.folder),
            "lengths": {name: _length_as_json(length) for name, length in lengths.items()},
            "trials": [_as_json(*pair) for pair in self.trials],
            "cells": [_as_json(*pair) for pair in self.runs],
            "num_tokens": round(sum(work.num_tokens for work in left)),
            "num_answers": sum(work.num_answers for work in left),
            "hours": sum(work.hours or 0.0 for work in left) if self.speed else None,
            "measured_by": self.speed.how if self.speed else None,
        }


def planned(prepared: PreparedComparison, activity: Activity | None = None) -> ComparisonPlan:
    """Make the plan; a model that cannot be timed leaves hours out and says why."""
    try:
        return ComparisonPlan(prepared, measured_speed(prepared, activity))
    except UserError as error:
        if error.code != "hours_unknown":
            raise
        return ComparisonPlan(prepared, None, str(error))


def _cells(title: str, grid: Grid, works: Iterable[PlannedWork]) -> Iterator[str]:
    of_cell = {work.name: work for work in works}
    count, *cells = grid.plan(lambda cell: [of_cell[cell.name].sentence()])
    yield f"{title}: {count}"
    yield from (f"  {line}" for line in cells)


def _tokens_per_example(lengths: Mapping[str, Length]) -> float:
    """Estimate the tokens of an example, best from a regime that supervises each; 0 where nothing is trained."""
    for name in ("all_answers", "zero_shot", "dedicated"):
        if name in lengths:
            return lengths[name].statistics.tokens / lengths[name].statistics.answers
    others = [length.statistics for length in lengths.values()]
    # As if every episode were as long as the longest.
    return others[0].tokens / (others[0].episodes * (others[0].most_shots + 1)) if others else 0.0


def _seeds(points: Iterable[Any]) -> set[int]:
    return {point.seed for point in points}


def _as_json(report: CellReport, work: PlannedWork) -> dict[str, Any]:
    return {
        "name": work.name,
        "state": report.state.value,
        "failure": report.reason,
        "num_tokens": round(work.num_tokens),
        "num_answers": work.num_answers,
        "hours": work.hours,
    }


def _length_as_json(length: Length) -> dict[str, Any]:
    return {
        "num_steps": length.num_steps,
        "sequences_per_step": length.sequences_per_step,
        "num_tokens": round(length.num_tokens),
        "num_supervised_answers": round(length.num_answers),
    }


def _time(hours: float) -> str:
    if hours >= 2:
        return f"{hours:,.1f} hours"
    return f"{hours * 60:,.0f} minutes" if hours >= 0.05 else f"{hours * 3600:,.0f} seconds"
