"""Standard errors, paired comparisons, and means over tasks and families.

Every seed asks the same queries after other demonstrations, so the scores of a task form a table of seeds and
queries, (S, Q), with two sources of chance beside the rest: some draws of demonstrations are luckier, and some
queries harder. Treating its S x Q cells as independent would understate the error of their mean.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

# 95 % of a normal distribution. With three seeds a t distribution would be wider for one task alone; over the
# tasks of a report, whose errors are independent, the difference vanishes.
_NORMAL_95 = 1.959964
_FEWEST_TASKS = 3


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its standard error and the number of scores behind it."""

    mean: float
    standard_error: float
    num_scores: int

    @property
    def interval(self) -> tuple[float, float]:
        """Normal interval of 95 % around the mean; not clipped, so that differences may use it too."""
        margin = _NORMAL_95 * self.standard_error
        return self.mean - margin, self.mean + margin


def mean_over_queries(scores: ArrayLike) -> Estimate:
    """Mean of one seed's scores, (Q,), with the error that comes from the choice of queries.

    What another draw of demonstrations would change is not in it: one seed cannot show that.
    """
    return mean_over_seeds_and_queries([scores])


def mean_over_seeds_and_queries(scores: ArrayLike | Sequence[ArrayLike]) -> Estimate:
    """Mean of a table of scores, (S, Q), whose rows are seeds and whose columns are the same queries.

    The variance of the mean under ``score = mean + seed + query + rest`` is, from the mean squares of a two-way
    analysis, ``(seeds + queries - rest) / (S Q)``; a negative component is taken as zero. One seed gives the
    ordinary standard error over queries; seeds that all score alike add nothing, as they should.

    Source: Searle, Casella, McCulloch 1992, Variance Components, the crossed random model.
    """
    table = np.atleast_2d(np.asarray(scores, dtype=float))
    num_seeds, num_queries = table.shape
    mean = float(table.mean())
    by_seed = table.mean(axis=1, keepdims=True)
    by_query = table.mean(axis=0, keepdims=True)
    seeds = _mean_square(by_seed - mean, num_seeds - 1) * num_queries
    queries = _mean_square(by_query - mean, num_queries - 1) * num_seeds
    rest = _mean_square(table - by_seed - by_query + mean, (num_seeds - 1) * (num_queries - 1))
    # Each component at least zero: without a seed component the queries' mean square is left, and conversely.
    variance = max(seeds + queries - rest, seeds, queries) / (num_seeds * num_queries)
    return Estimate(mean, math.sqrt(variance), table.size)


def _mean_square(deviations: NDArray[np.float64], degrees_of_freedom: int) -> float:
    return float((deviations**2).sum()) / degrees_of_freedom if degrees_of_freedom > 0 else 0.0


def mean_of_seed_means(means: Sequence[float], standard_errors: Sequence[float], num_scores: int) -> Estimate:
    """Mean over seeds where only each seed's mean and standard error are known, as with macro-F1.

    Seeds share their queries, so the queries' part does not shrink with the number of seeds: the variance is
    that of the seed means over S plus the mean squared standard error. It errs on the wide side.
    """
    between = float(np.var(means, ddof=1)) / len(means) if len(means) > 1 else 0.0
    within = float(np.mean(np.square(standard_errors)))
    return Estimate(float(np.mean(means)), math.sqrt(between + within), num_scores)


def bootstrap_standard_error(
    statistic: Callable[[NDArray[np.intp]], float], num_queries: int, seed: int = 0, num_resamples: int = 100
) -> float:
    """Standard error, by resampling queries, of a score that only a whole set has.

    Args:
        statistic: From positions of queries, (Q,), to the score of that resample.
        num_queries: Queries to draw from, with replacement.
        seed: Of the resamples.
        num_resamples: 100 give the error to about 7 % of itself.
    """
    rng = np.random.default_rng(seed)
    draws = [statistic(rng.integers(num_queries, size=num_queries)) for _ in range(num_resamples)]
    return float(np.std(draws, ddof=1))


def paired_difference(first: ArrayLike, second: ArrayLike) -> Estimate:
    """Mean of ``second - first`` over the same seeds and queries, (S, Q) or (Q,) each.

    Raises:
        ValueError: If the two tables differ in shape.
    """
    return mean_over_seeds_and_queries(_differences(first, second))


@dataclass(frozen=True, slots=True)
class BootstrapDifference:
    """A paired comparison: mean of second minus first, its 95 % interval and the two-sided p-value."""

    mean: float
    low: float
    high: float
    p_value: float
    num_resamples: int


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, *, seed: int = 0, num_resamples: int = 10_000
) -> BootstrapDifference:
    """Compare two sets of scores of the same seeds and queries, (S, Q) or (Q,) each.

    Seeds and queries are both drawn anew in each resample, so that shared demonstrations are not counted as
    independent evidence. Somewhat wide, never narrow.

    Raises:
        ValueError: If the two tables differ in shape.

    Source: Owen 2007, arXiv:0711.1029, the pigeonhole bootstrap; Koehn 2004 for the paired form.
    """
    table = _differences(first, second)
    num_seeds, num_queries = table.shape
    rng = np.random.default_rng(seed)
    # A resample's mean is its seed counts times the table times its query counts.
    seed_counts = rng.multinomial(num_seeds, [1 / num_seeds] * num_seeds, size=num_resamples)
    query_counts = rng.multinomial(num_queries, [1 / num_queries] * num_queries, size=num_resamples)
    means = np.einsum("rs,sq,rq->r", seed_counts, table, query_counts, optimize=True) / table.size
    low, high = np.quantile(means, [0.025, 0.975])
    at_most, at_least = (int((means <= 0).sum()) + 1, int((means >= 0).sum()) + 1)
    p_value = min(1.0, 2 * min(at_most, at_least) / (num_resamples + 1))
    return BootstrapDifference(float(table.mean()), float(low), float(high), p_value, num_resamples)


def _differences(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    a, b = (np.atleast_2d(np.asarray(scores, dtype=float)) for scores in (first, second))
    if a.shape != b.shape:
        raise ValueError(f"paired scores need the same seeds and queries; found {a.shape} and {b.shape}")
    differences: NDArray[np.float64] = np.subtract(b, a)
    return differences


def mean_of_independent(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of estimates whose errors are independent: variances add, then divide by the count squared."""
    count = len(estimates)
    variance = math.fsum(one.standard_error**2 for one in estimates) / count**2
    mean = math.fsum(one.mean for one in estimates) / count
    return Estimate(mean, math.sqrt(variance), sum(one.num_scores for one in estimates))


def mean_over_families(tasks: Sequence[tuple[str, Estimate]]) -> tuple[Estimate, dict[str, Estimate]]:
    """Average tasks within their family, then families, so that a family of many tasks does not drown others.

    The standard error answers "how well do we know the mean of *these* tasks"; how tasks differ among each
    other is not in it, and ``estimate_over_tasks`` answers that.

    Args:
        tasks: Family and estimate of each task.

    Returns:
        The mean over families, and each family's mean in order of first mention.
    """
    members: defaultdict[str, list[Estimate]] = defaultdict(list)
    for family, estimate in tasks:
        members[family].append(estimate)
    families = {family: mean_of_independent(estimates) for family, estimates in members.items()}
    return mean_of_independent(list(families.values())), families


def estimate_over_tasks(tasks: Sequence[tuple[str, float]]) -> Estimate | None:
    """Mean over families with the error of having chosen these tasks and not others of the same families.

    A family's variance is that of its task means over their number, which holds the error of measuring them
    too. The families stay as they are.

    Args:
        tasks: Family and mean score of each task.

    Returns:
        None where a family has fewer than three tasks and so cannot show how its tasks differ.
    """
    members: defaultdict[str, list[float]] = defaultdict(list)
    for family, score in tasks:
        members[family].append(score)
    if not members or min(map(len, members.values())) < _FEWEST_TASKS:
        return None
    families = [
        Estimate(float(np.mean(scores)), float(np.std(scores, ddof=1)) / math.sqrt(len(scores)), len(scores))
        for scores in members.values()
    ]
    return mean_of_independent(families)
