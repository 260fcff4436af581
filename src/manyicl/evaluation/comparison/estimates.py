"""Means, differences and shares of a gap, with errors that hold training seeds, draws of demonstrations and queries.

The scores of a task form a table whose rows are training seeds, each with demonstrations drawn for it alone, and whose
columns are the queries, (S, Q). A mean over tasks has three sources of error: a lucky training lifts all tasks at
once, a lucky draw lifts one task, and some queries are harder. Tasks are therefore averaged within each training seed
first, and the spread of those averages holds the first two sources, whatever tasks have in common. With weights ``w``
of tasks::

    variance = spread of the S averages / S  +  sum of w^2 queries  -  sum of w^2 rest

where queries and rest are the parts of a two-way analysis of each task's table, queries no less than the smallest that
they can show; the rest is in both other terms and is taken off once. For one task this is
``mean_over_seeds_and_queries``. One training seed shows nothing of the first two sources: such an estimate covers
queries alone, and `Measured.interval` is None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from manyicl.evaluation.result import Result
from manyicl.evaluation.uncertainty import Estimate, Pairing, satterthwaite, smallest_error

Numbers = NDArray[np.float64]

# Where the search for an end of an interval gives up, in gaps.
_WIDEST_SHARE = 1e4


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one kind of model on one task at one shot count.

    Attributes:
        rows: Training seeds, (S,); None for what no seed changes, as a model that was not trained, without
            demonstrations: one row then stands for every seed.
        means: Score of each row, (S,).
        columns: Scores of the queries, (S, Q); of a metric that only a whole set has, those of resamples, (S, R).
        is_resampled: Whether the columns are resamples.
        num_queries: Q.
        queries_hash: What two tables have in common if they may be paired.
        draws: Draws of demonstrations of each row, (S,); zeros without demonstrations.
    """

    rows: tuple[int, ...] | None
    means: Numbers
    columns: Numbers
    is_resampled: bool
    num_queries: int
    queries_hash: str
    draws: Numbers

    def at(self, rows: Sequence[int]) -> ScoreTable:
        """Return the table of these training seeds alone."""
        chosen = [0] * len(rows) if self.rows is None else [self.rows.index(row) for row in rows]
        means, columns, draws = self.means[chosen], self.columns[chosen], self.draws[chosen]
        return replace(self, rows=tuple(rows), means=means, columns=columns, draws=draws)

    def times(self, factor: float) -> ScoreTable:
        """Return the table of scores times a factor."""
        return replace(self, means=factor * self.means, columns=factor * self.columns)

    def plus(self, other: ScoreTable) -> ScoreTable:
        """Add the scores of a table with the same training seeds and queries.

        Raises:
            ValueError: If it has others.
        """
        mine, its = ((one.rows, one.columns.shape, one.is_resampled, one.queries_hash) for one in (self, other))
        if mine != its:
            raise ValueError(f"paired scores need the same seeds and queries; found {mine} and {its}")
        means, columns = self.means + other.means, self.columns + other.columns
        return replace(self, means=means, columns=columns, draws=np.maximum(self.draws, other.draws))

    @property
    def query_variance(self) -> float:
        """Part of the variance of the table's mean that other queries would show, the rest included."""
        spread = _variance(self.columns.mean(axis=0))
        return spread if self.is_resampled else spread / self.num_queries

    @property
    def rest_variance(self) -> float:
        """Part of that variance that is neither the row's nor the query's: in the spread of the rows as well."""
        num_rows = len(self.means)
        if num_rows < 2:
            return 0.0
        if self.is_resampled:
            of_rows = float(np.mean([_variance(row) for row in self.columns]))
            return max(of_rows - self.query_variance, 0.0) / (num_rows - 1)
        rest = self.columns - self.columns.mean(axis=1, keepdims=True) - self.columns.mean(axis=0) + self.columns.mean()
        freedom = (num_rows - 1) * (self.num_queries - 1)
        return float((rest**2).sum()) / freedom / self.columns.size if freedom else 0.0


def score_table(draws: Mapping[int, Sequence[Result]], *, is_constant: bool = False) -> ScoreTable | None:
    """Make the table of one kind of model on one task at one shot count.

    Args:
        draws: Training seed -> results, one per draw of demonstrations and order of it; those of a seed are averaged.
        is_constant: Whether no seed changes anything, so that the first row stands for all.

    Returns:
        None where the results answered different queries, or keep no scores of queries or resamples.
    """
    results = [result for row in draws.values() for result in row]
    hashes = {(result.queries_hash, result.metric, result.data_hash) for result in results}
    if len(hashes) != 1:
        return None
    is_resampled = any(result.query_scores is None for result in results)
    each: dict[int, list[tuple[float, ...]]] = {}
    for seed, row in sorted(draws.items()):
        scores = [result.resampled_scores if is_resampled else result.query_scores for result in row]
        each[seed] = [one for one in scores if one]
        if len(each[seed]) < len(scores):
            return None
    seeds = tuple(each)[:1] if is_constant else tuple(each)
    return ScoreTable(
        rows=None if is_constant else seeds,
        means=np.array([np.mean([result.score for result in draws[seed]]) for seed in seeds]),
        columns=np.array([np.mean(each[seed], axis=0) for seed in seeds]),
        is_resampled=is_resampled,
        num_queries=results[0].num_queries,
        queries_hash=" ".join(hashes.pop()),
        draws=np.array([_num_draws(draws[seed]) for seed in seeds], dtype=float),
    )


def _num_draws(results: Sequence[Result]) -> int:
    """Count the draws of demonstrations, whatever the number of their orders."""
    return len({result.seed for result in results if result.num_shots})


@dataclass(frozen=True)
class Measured:
    """A mean over tasks, or a difference of two such means, with the numbers that it rests on.

    Attributes:
        estimate: Mean and standard error over the training seeds and queries.
        num_trainings: Training seeds; 0 where none was trained and no demonstration was drawn, so that there is no
            such error.
        num_draws: Draws of demonstrations of a task.
        num_queries: Queries of all tasks.
        num_tasks: Tasks.
    """

    estimate: Estimate
    num_trainings: int
    num_draws: int
    num_queries: int
    num_tasks: int

    @property
    def mean(self) -> float:
        """The mean."""
        return self.estimate.mean

    @property
    def standard_error(self) -> float | None:
        """Standard error over trainings, draws and queries; None where one training seed shows none."""
        return None if self.num_trainings == 1 else self.estimate.standard_error

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of 95 % over trainings, draws and queries; None where one training seed shows none."""
        return None if self.num_trainings == 1 else self.interval_of_queries

    @property
    def interval_of_queries(self) -> tuple[float, float] | None:
        """Interval of 95 %, which with one training seed covers the choice of queries alone."""
        return self.estimate.interval

    @property
    def is_distinct(self) -> bool | None:
        """Whether the interval of a difference excludes zero; None without an interval."""
        if self.interval is None:
            return None
        low, high = self.interval
        return not low <= 0 <= high


# The tables of tasks, and the weight of each in the mean.
Weighted = Sequence[tuple[float, ScoreTable]]


def family_weights(families: Mapping[str, str]) -> dict[str, float]:
    """Weigh tasks alike within their family, and families alike.

    Args:
        families: Task -> family.

    Returns:
        Task -> weight; they add up to 1.
    """
    members = list(families.values())
    return {task: 1 / len(set(members)) / members.count(family) for task, family in families.items()}


def mean_of(tables: Weighted) -> Measured | None:
    """Estimate a mean over tasks at the training seeds that all of them have; None where they have none in common."""
    return _measured(tables, None)


def difference_of(first: Weighted, second: Weighted) -> Measured | None:
    """Estimate second minus first over the same tasks, training seeds, draws and queries.

    None where they have no training seed in common.
    """
    return _combined([(-1.0, first), (1.0, second)])


def levels_of(first: Weighted, second: Weighted) -> tuple[float, float] | None:
    """Return both means at the training seeds that the two have in common, so that they go with their difference."""
    rows = _common_rows([table for _, table in (*first, *second)])
    if rows is None:
        return None
    one, other = (
        sum(weight * float(table.at(rows).means.mean()) for weight, table in tables) for tables in (first, second)
    )
    return one, other


@dataclass(frozen=True)
class ShareOfGap:
    """How much of the gap between two models a third one closes: 0 as the lower, 1 as the upper.

    Attributes:
        gap: Upper minus lower.
        share: The share; None where the gap is not above the noise, so that a share of it means nothing.
        interval: Interval of 95 %; an end is None where the data do not bound it.
    """

    gap: Measured
    share: float | None
    interval: tuple[float | None, float | None] | None


def share_of_gap(lower: Weighted, model: Weighted, upper: Weighted) -> ShareOfGap | None:
    """Estimate the share of the gap between two models that a third one closes.

    The interval holds every share for which ``model - lower - share * (upper - lower)`` is not distinguishable from
    zero: so numerator and denominator are paired, and a ratio is never treated as if it were normal.

    Returns:
        None where the three have no training seed in common.

    Source: Fieller 1954, Some Problems in Interval Estimation.
    """
    # The third model has a part in the gap, too: all three sums are over the same training seeds.
    gap = _combined([(-1.0, lower), (0.0, model), (1.0, upper)])
    gained = _combined([(-1.0, lower), (1.0, model), (0.0, upper)])
    if gap is None or gained is None:
        return None
    if gap.interval is None or gap.interval[0] <= 0:
        return ShareOfGap(gap, None, None)
    share = gained.mean / gap.mean

    def excess(other: float) -> float:
        """Distance from zero beyond the margin, at another share."""
        one = _combined([(other - 1.0, lower), (1.0, model), (-other, upper)])
        assert one is not None
        assert one.interval is not None
        return abs(one.mean) - (one.interval[1] - one.interval[0]) / 2

    return ShareOfGap(gap, share, (_end(excess, share, -1), _end(excess, share, 1)))


def _end(excess: Callable[[float], float], share: float, direction: int) -> float | None:
    """Find where an interval ends on one side."""
    step = 0.25
    while excess(share + direction * step) <= 0:
        step *= 2
        if step > _WIDEST_SHARE:
            return None
    return float(brentq(excess, share, share + direction * step, xtol=1e-4))


def _combined(parts: Sequence[tuple[float, Weighted]]) -> Measured | None:
    """Estimate a weighted sum of models over the same tasks."""
    rows = _common_rows([table for _, tables in parts for _, table in tables])
    if rows is None:
        return None
    combined = []
    for tasks in zip(*(tables for _, tables in parts), strict=True):
        aligned = [table.at(rows).times(factor) for (factor, _), (_, table) in zip(parts, tasks, strict=True)]
        combined.append((tasks[0][0], reduce(ScoreTable.plus, aligned)))
    return _measured(combined, "paired", is_constant=all(t.rows is None for _, tables in parts for _, t in tables))


def _common_rows(tables: Sequence[ScoreTable]) -> tuple[int, ...] | None:
    """Return the training seeds that all tables have; None if there is none, one of any name if no table has seeds."""
    seeds = [set(table.rows) for table in tables if table.rows is not None]
    if not seeds:
        return (0,) if tables else None
    return tuple(sorted(set.intersection(*seeds))) or None


def _measured(weighted: Weighted, pairing: Pairing | None, *, is_constant: bool | None = None) -> Measured | None:
    rows = _common_rows([table for _, table in weighted])
    if rows is None:
        return None
    if is_constant is None:
        is_constant = all(table.rows is None for _, table in weighted)
    tables = [(weight, table.at(rows)) for weight, table in weighted]
    return Measured(
        estimate=weighted_mean(tables, pairing),
        num_trainings=0 if is_constant else len(rows),
        num_draws=max(int(table.draws.sum()) for _, table in tables),
        num_queries=sum(table.num_queries for _, table in tables),
        num_tasks=len(tables),
    )


def weighted_mean(tables: Weighted, pairing: Pairing | None = None) -> Estimate:
    """Estimate a weighted mean of tables that have the same training seeds, (S, Q) each; see the head of this file.

    Degrees of freedom are Satterthwaite's: with two or three trainings that differ much, they are few and the interval
    is wide.

    Source: Searle, Casella, McCulloch 1992, Variance Components, the crossed random model.
    """
    rows = np.sum([weight * table.means for weight, table in tables], axis=0)
    mean, num_scores = float(rows.mean()), sum(len(rows) * table.num_queries for _, table in tables)
    floors = [smallest_error(table.num_queries, pairing) for _, table in tables]
    if any(floor is None for floor in floors):
        return Estimate(mean, None, num_scores, pairing=pairing)
    of_rows = _variance(rows) / len(rows)
    of_queries = [
        weight**2 * max(table.query_variance, (floor or 0.0) ** 2)
        for (weight, table), floor in zip(tables, floors, strict=True)
    ]
    rest = math.fsum(weight**2 * table.rest_variance for weight, table in tables)
    queries = math.fsum(of_queries)
    variance = max(of_rows + queries - rest, of_rows, queries)
    parts = [(part, table.num_queries - 1) for part, (_, table) in zip(of_queries, tables, strict=True)]
    freedom = satterthwaite(variance, [(of_rows, len(rows) - 1), *parts])
    return Estimate(mean, math.sqrt(variance), num_scores, freedom, pairing)


def _variance(values: Numbers) -> float:
    return float(np.var(values, ddof=1)) if len(values) > 1 else 0.0
