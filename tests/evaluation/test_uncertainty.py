"""Standard errors that hold when seeds share queries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from manyicl.evaluation.uncertainty import (
    Estimate,
    bootstrap_standard_error,
    estimate_over_tasks,
    mean_of_seed_means,
    mean_over_families,
    mean_over_queries,
    mean_over_seeds_and_queries,
    paired_bootstrap,
    paired_difference,
)


def crossed_table(rng: np.random.Generator, seeds: int, queries: int, by_seed: float, by_query: float) -> np.ndarray:
    """Scores with a part of the seed, a part of the query, and a rest of one."""
    return (
        rng.normal(0, by_seed, (seeds, 1)) + rng.normal(0, by_query, (1, queries)) + rng.normal(0, 1, (seeds, queries))
    )


def test_one_seed_gives_the_ordinary_standard_error() -> None:
    scores = [0, 1, 1, 0, 1, 1, 0]
    estimate = mean_over_queries(scores)
    assert estimate.mean == pytest.approx(4 / 7)
    assert estimate.standard_error == pytest.approx(np.std(scores, ddof=1) / math.sqrt(7))


def test_seeds_that_score_alike_add_no_certainty() -> None:
    scores = [0, 1, 1, 0, 1]
    assert mean_over_seeds_and_queries([scores] * 3).standard_error == pytest.approx(
        mean_over_queries(scores).standard_error
    )


def test_a_single_score_has_no_spread() -> None:
    assert mean_over_queries([1.0]).standard_error == 0.0


@pytest.mark.parametrize(("by_seed", "by_query"), [(0.0, 0.0), (0.5, 0.0), (0.0, 2.0), (0.5, 2.0)])
def test_the_standard_error_is_the_spread_of_the_mean_over_repetitions(by_seed: float, by_query: float) -> None:
    rng = np.random.default_rng(0)
    estimates = [mean_over_seeds_and_queries(crossed_table(rng, 5, 31, by_seed, by_query)) for _ in range(3000)]
    spread = np.std([one.mean for one in estimates])
    claimed = math.sqrt(np.mean([one.standard_error**2 for one in estimates]))
    # Components that come out negative are taken as zero, so where there are none the claim is a little wide.
    assert 0.95 * spread <= claimed <= 1.25 * spread


def test_treating_all_cells_as_independent_would_claim_too_much() -> None:
    table = crossed_table(np.random.default_rng(1), 5, 31, 0.0, 2.0)
    naive = float(np.std(table, ddof=1)) / math.sqrt(table.size)
    assert mean_over_seeds_and_queries(table).standard_error > 1.5 * naive


def test_seed_means_alone_give_no_narrower_error_than_the_table() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        table = crossed_table(rng, 3, 47, 0.3, 1.0)
        rows = [mean_over_queries(row) for row in table]
        from_means = mean_of_seed_means([r.mean for r in rows], [r.standard_error for r in rows], table.size)
        whole = mean_over_seeds_and_queries(table)
        assert from_means.mean == pytest.approx(whole.mean)
        assert from_means.standard_error >= whole.standard_error - 1e-12


def test_the_bootstrap_of_a_mean_agrees_with_its_formula() -> None:
    scores = np.random.default_rng(3).random(200)
    drawn = bootstrap_standard_error(lambda rows: float(scores[rows].mean()), 200, num_resamples=2000)
    assert drawn == pytest.approx(mean_over_queries(scores).standard_error, rel=0.1)


def test_pairing_removes_what_queries_share() -> None:
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 1, 100)
    first, second = hard + rng.normal(0, 0.1, 100), hard + 0.5 + rng.normal(0, 0.1, 100)
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(0.5, abs=0.05)
    assert difference.standard_error < 0.2 * mean_over_queries(first).standard_error


def test_the_paired_bootstrap_is_a_function_of_its_seed() -> None:
    rng = np.random.default_rng(5)
    first, second = rng.random((3, 40)), rng.random((3, 40)) + 0.3
    once = paired_bootstrap(first, second, seed=7)
    assert once == paired_bootstrap(first, second, seed=7)
    assert once != paired_bootstrap(first, second, seed=8)
    assert once.low < once.mean < once.high
    assert once.p_value < 0.01


def test_the_paired_bootstrap_agrees_with_the_formula_for_one_seed() -> None:
    rng = np.random.default_rng(6)
    first, second = rng.random(150), rng.random(150)
    drawn, formula = paired_bootstrap(first, second), paired_difference(first, second)
    assert (drawn.low, drawn.high) == pytest.approx(formula.interval, abs=0.01)


def test_equal_scores_show_no_difference() -> None:
    comparison = paired_bootstrap([0.0, 1.0, 1.0], [0.0, 1.0, 1.0])
    assert (comparison.mean, comparison.low, comparison.high, comparison.p_value) == (0, 0, 0, 1)


def test_scores_of_different_queries_are_not_paired() -> None:
    with pytest.raises(ValueError, match="same seeds and queries"):
        paired_difference([1.0, 0.0], [1.0])


def test_a_family_of_many_tasks_does_not_drown_a_family_of_one() -> None:
    tasks = [("qa", Estimate(0.2, 0.1, 10))] * 3 + [("math", Estimate(0.8, 0.1, 10))]
    overall, families = mean_over_families(tasks)
    assert overall.mean == pytest.approx(0.5)
    assert families["qa"].standard_error == pytest.approx(0.1 / math.sqrt(3))
    assert overall.standard_error == pytest.approx(math.hypot(0.1 / math.sqrt(3), 0.1) / 2)


def test_too_few_tasks_cannot_show_how_tasks_differ() -> None:
    assert estimate_over_tasks([("qa", 0.1), ("qa", 0.9)]) is None
    spread = estimate_over_tasks([("qa", 0.1), ("qa", 0.5), ("qa", 0.9)])
    assert spread is not None
    assert spread.standard_error == pytest.approx(0.4 / math.sqrt(3))
