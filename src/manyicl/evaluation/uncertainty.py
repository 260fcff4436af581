"""Standard errors, intervals, paired differences, and means over tasks and families.

Every seed answers the same queries after other demonstrations, so the scores of a task form a table of seeds and
queries, (S, Q), with two sources of variation besides the residual: some draws of demonstrations are luckier, and some
queries harder. Treating its S x Q cells as independent would understate the error of their mean.

Scores that are all alike, as 20 right out of 20, do not show that another query could not be wrong. The standard error
of Q queries is therefore never below ``1 / (Q + 2)``, which is what one success and one failure more would give
(Laplace); of differences, whose range is twice as wide, never below ``2 / (Q + 2)``.

Two or three seeds know their own spread badly. The wider it is beside the spread of the queries, the fewer degrees of
freedom an error has, and the wider Student's t makes the interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Pairing = Literal["paired", "independent"]
ValueT = TypeVar("ValueT")

_FEWEST_TASKS = 3
NUM_RESAMPLES = 100


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean score in [0, 1], or a mean difference of such scores, with what is known of its error.

    Attributes:
        mean: Mean of the scores.
        standard_error: Standard error of the mean; None where a single query shows none.
        num_scores: Number of scores that were averaged.
        degrees_of_freedom: Degrees of freedom of the standard error; infinite where many independent errors meet.
        pairing: None for a score; for a difference, whether both sides answered the same queries after the same
            seeds, so that what they share cancels out.
    """

    mean: float
    standard_error: float | None
    num_scores: int
    degrees_of_freedom: float = math.inf
    pairing: Pairing | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of 95 %, None without a standard error.

        A difference has Student's. A score has Wilson's for as many independent queries as its standard error is
        worth, with Student's quantile in place of the normal one: it stays within [0, 1] and is one-sided where every
        answer was right.

        Source: Wilson 1927; Brown, Cai, DasGupta 2001, Interval estimation for a binomial proportion.
        """
        if self.standard_error is None:
            return None
        t = float(stdtrit(self.degrees_of_freedom, 0.975))
        if self.pairing is not None:
            margin = t * self.standard_error
            return self.mean - margin, self.mean + margin
        # Of a mean strictly between 0 and 1, and of one at its bound, where the standard error is 1 / (Q + 2).
        worth = max(self.mean * (1 - self.mean) / self.standard_error**2, 1 / self.standard_error - 2)
        total = worth + t**2
        centre = (worth * self.mean + t**2 / 2) / total
        margin = t * math.sqrt(max(worth * self.mean * (1 - self.mean), 0) + t**2 / 4) / total
        return max(centre - margin, 0.0), min(centre + margin, 1.0)

    @property
    def includes_zero(self) -> bool | None:
        """Whether the interval holds zero, so that a difference is not shown; None without an interval."""
        if self.interval is None:
            return None
        low, high = self.interval
        return low <= 0 <= high


def mean_over_queries(scores: ArrayLike) -> Estimate:
    """Mean of one seed's scores, (Q,), with the error that comes from the choice of queries.

    What another draw of demonstrations would change is not in it: one seed cannot show that.
    """
    return mean_over_seeds_and_queries([scores])


def mean_over_seeds_and_queries(scores: ArrayLike | Sequence[ArrayLike], *, pairing: Pairing | None = None) -> Estimate:
    """Mean of a table of scores or differences, (S, Q), whose rows are seeds and whose columns are the same queries.

    The variance of the mean under ``score = mean + seed + query + rest`` is, from the mean squares of a two-way
    analysis, ``(seeds + queries - rest) / (S Q)``; a negative component is taken as zero, and that of the queries as no
    less than the smallest that they can show. One seed gives the ordinary standard error over queries; seeds that all
    score alike add nothing, as they should. In the degrees of freedom ``rest`` is left aside, which makes them a
    little larger.

    Source: Searle, Casella, McCulloch 1992, Variance Components, the crossed random model.
    """
    table = np.atleast_2d(np.asarray(scores, dtype=float))
    num_seeds, num_queries = table.shape
    mean = float(table.mean())
    by_seed = table.mean(axis=1, keepdims=True)
    by_query = table.mean(axis=0, keepdims=True)
    smallest = smallest_error(num_queries, pairing)
    if smallest is None:
        return Estimate(mean, None, table.size, pairing=pairing)
    seeds = _mean_square(by_seed - mean, num_seeds - 1) / num_seeds
    queries = max(_mean_square(by_query - mean, num_queries - 1) / num_queries, smallest**2)
    rest = _mean_square(table - by_seed - by_query + mean, (num_seeds - 1) * (num_queries - 1)) / table.size
    # Each component at least zero: without a seed component the queries' mean square is left, and conversely.
    variance = max(seeds + queries - rest, seeds, queries)
    freedom = satterthwaite(variance, [(seeds, num_seeds - 1), (queries, num_queries - 1)])
    return Estimate(mean, math.sqrt(variance), table.size, freedom, pairing)


def satterthwaite(variance: float, parts: Iterable[tuple[float, float]]) -> float:
    """Return the degrees of freedom of a variance that is made of several, each known with its own.

    They are no fewer than those of the part that is known worst; a variance below the sum of its parts would give that.

    Args:
        variance: The variance.
        parts: Each part of it and the degrees of freedom of that part.

    Source: Satterthwaite 1946, An Approximate Distribution of Estimates of Variance Components.
    """
    known = [(part, freedom) for part, freedom in parts if part]
    if not known:
        return math.inf
    least = min(freedom for _, freedom in known)
    per_freedom = math.fsum(part**2 / freedom for part, freedom in known)
    return max(variance**2 / per_freedom, least) if per_freedom else math.inf


def smallest_error(num_queries: int, pairing: Pairing | None = None) -> float | None:
    """Return the smallest standard error that so many queries can show; None below two queries."""
    return None if num_queries < 2 else (1 if pairing is None else 2) / (num_queries + 2)


def _mean_square(deviations: NDArray[np.float64], degrees_of_freedom: int) -> float:
    return float((deviations**2).sum()) / degrees_of_freedom if degrees_of_freedom > 0 else 0.0


def mean_of_seed_means(
    means: Sequence[float], standard_errors: Sequence[float | None], num_queries: int, pairing: Pairing | None = None
) -> Estimate:
    """Mean over seeds where only each seed's mean and standard error are known, as with macro-F1.

    Seeds share their queries, so the queries' part does not shrink with the number of seeds: the variance is
    that of the seed means over S plus the mean squared standard error. It errs on the wide side.
    """
    mean, num_scores = float(np.mean(means)), len(means) * num_queries
    known = [error for error in standard_errors if error is not None]
    smallest = smallest_error(num_queries, pairing)
    if smallest is None or len(known) < len(means):
        return Estimate(mean, None, num_scores, pairing=pairing)
    between = float(np.var(means, ddof=1)) / len(means) if len(means) > 1 else 0.0
    within = max(float(np.mean(np.square(known))), smallest**2)
    freedom = satterthwaite(between + within, [(between, len(means) - 1), (within, num_queries - 1)])
    return Estimate(mean, math.sqrt(between + within), num_scores, freedom, pairing)


def resampled_scores(
    score: Callable[[NDArray[np.intp]], float], num_queries: int, num_resamples: int = NUM_RESAMPLES
) -> tuple[float, ...]:
    """Score resamples of the queries, for a score that only a whole set has; its spread is its standard error.

    The resamples depend on the number of queries alone. So those of two models on the same queries are the same
    resamples, and the spread of their differences is the standard error of the paired difference.

    Args:
        score: From positions of queries, (Q,), to the score of that resample.
        num_queries: Queries to draw from, with replacement.
        num_resamples: 100 give the standard error to about 7 % of itself.
    """
    rng = np.random.default_rng(0)
    return tuple(score(rng.integers(num_queries, size=num_queries)) for _ in range(num_resamples))


def spread(resampled: ArrayLike) -> float:
    """Return the standard deviation of resampled scores, or of differences between them."""
    return float(np.std(np.asarray(resampled, dtype=float), ddof=1))


def paired_difference(first: ArrayLike, second: ArrayLike) -> Estimate:
    """Mean of ``second - first`` over the same seeds and queries, (S, Q) or (Q,) each.

    Raises:
        ValueError: If the two tables differ in shape.
    """
    a, b = (np.atleast_2d(np.asarray(scores, dtype=float)) for scores in (first, second))
    if a.shape != b.shape:
        raise ValueError(f"paired scores need the same seeds and queries; found {a.shape} and {b.shape}")
    return mean_over_seeds_and_queries(b - a, pairing="paired")


def independent_difference(first: Estimate, second: Estimate) -> Estimate:
    """Mean of ``second - first`` where other queries were answered, or after other seeds: errors add up."""
    combined = mean_of_independent([first, second])
    error = None if combined.standard_error is None else 2 * combined.standard_error
    difference = second.mean - first.mean
    return Estimate(difference, error, combined.num_scores, combined.degrees_of_freedom, "independent")


def mean_of_independent(estimates: Sequence[Estimate]) -> Estimate:
    """Mean of estimates whose errors are independent: variances add, then divide by the count squared.

    Degrees of freedom are Satterthwaite's. A difference is paired if all are.
    """
    count = len(estimates)
    pairings = {one.pairing for one in estimates}
    mean = math.fsum(one.mean for one in estimates) / count
    num_scores = sum(one.num_scores for one in estimates)
    pairing: Pairing | None = "independent" if len(pairings) > 1 else pairings.pop()
    errors = [one.standard_error for one in estimates if one.standard_error is not None]
    if len(errors) < count:
        return Estimate(mean, None, num_scores, pairing=pairing)
    total = math.fsum(error**2 for error in errors)
    parts = [(error**2, one.degrees_of_freedom) for error, one in zip(errors, estimates, strict=True)]
    freedom = satterthwaite(total, parts)
    return Estimate(mean, math.sqrt(total) / count, num_scores, freedom, pairing)


def mean_over_families(tasks: Sequence[tuple[str, Estimate]]) -> Estimate:
    """Average tasks within their family, then families, so that a family of many tasks does not drown others.

    The standard error answers "how well do we know the mean of *these* tasks"; how tasks differ among each
    other is not in it, and ``estimate_over_tasks`` answers that.

    Args:
        tasks: Family and estimate of each task.
    """
    return mean_of_independent([mean_of_independent(estimates) for estimates in _by_family(tasks)])


def estimate_over_tasks(tasks: Sequence[tuple[str, float]]) -> Estimate | None:
    """Mean over families with the error of having chosen these tasks and not others of the same families.

    A family's variance is that of its task means over their number, which holds the error of measuring them
    too. The families stay as they are.

    Args:
        tasks: Family and mean score of each task.

    Returns:
        None where a family has fewer than three tasks and so cannot show how its tasks differ.
    """
    families = _by_family(tasks)
    if not families or min(map(len, families)) < _FEWEST_TASKS:
        return None
    # Tasks are to a family what queries are to a task.
    return mean_of_independent([mean_over_queries(scores) for scores in families])


def _by_family(tasks: Sequence[tuple[str, ValueT]]) -> list[list[ValueT]]:
    return [[value for other, value in tasks if other == family] for family in dict.fromkeys(name for name, _ in tasks)]
