"""Errors of means over tasks the slow, obvious way: draw trainings and queries anew, compute the whole mean again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

# Task -> scores of trainings and queries, (S, Q).
Scores = Mapping[str, NDArray[np.float64]]


def mean_over_families(scores: Scores, families: Mapping[str, str]) -> float:
    """Average queries and trainings, then tasks within their family, then families."""
    of_family: dict[str, list[float]] = {}
    for task, table in scores.items():
        of_family.setdefault(families[task], []).append(float(table.mean()))
    return float(np.mean([np.mean(means) for means in of_family.values()]))


def resampled(
    models: Sequence[Scores],
    statistic: Callable[[Sequence[Scores]], float],
    num_resamples: int,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Compute a statistic of several models on resamples of the trainings and, task by task, of the queries.

    All models and tasks have the same trainings, and all models the same queries, in every resample. Of S trainings
    S - 1 are drawn with replacement, so that the variance of a mean is that over S without bias.

    Source: Rao and Wu 1988, Resampling Inference with Complex Survey Data; Owen 2007, The Pigeonhole Bootstrap.
    """
    rng = np.random.default_rng(seed)
    num_rows = len(next(iter(models[0].values())))
    found = []
    for _ in range(num_resamples):
        rows = rng.integers(num_rows, size=num_rows - 1)
        queries = {task: rng.integers(table.shape[1], size=table.shape[1]) for task, table in models[0].items()}
        found.append(statistic([{t: table[rows][:, queries[t]] for t, table in one.items()} for one in models]))
    return np.array(found)


def simulated(
    rng: np.random.Generator,
    families: Mapping[str, str],
    mean: float,
    sizes: tuple[int, int],
    spreads: tuple[float, float, float, float],
    queries: Mapping[str, NDArray[np.float64]] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Make scores with a part of the training, one of the draw for a task, one of the query, and a rest.

    Args:
        rng: Source of all parts.
        families: Task -> family.
        mean: Mean of all scores.
        sizes: Trainings and queries.
        spreads: Standard deviation of each part.
        queries: Part of each query where several models answer the same ones.
    """
    num_rows, num_queries = sizes
    of_training, of_draw, of_query, rest = spreads
    training = rng.normal(0, of_training, (num_rows, 1))
    return {
        task: mean
        + training
        + rng.normal(0, of_draw, (num_rows, 1))
        + (rng.normal(0, of_query, num_queries) if queries is None else queries[task])
        + rng.normal(0, rest, (num_rows, num_queries))
        for task in families
    }
