"""Standard errors that hold when seeds share queries."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, t

from manyicl.evaluation.uncertainty import (
    Estimate,
    estimate_over_tasks,
    independent_difference,
    mean_of_independent,
    mean_of_seed_means,
    mean_over_families,
    mean_over_queries,
    mean_over_seeds_and_queries,
    paired_difference,
    resampled_scores,
    satterthwaite,
    smallest_error,
    spread,
)


def error_of(estimate: Estimate) -> float:
    assert estimate.standard_error is not None
    return estimate.standard_error


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
        error_of(mean_over_queries(scores))
    )


def test_a_single_query_shows_no_error() -> None:
    for estimate in (mean_over_queries([1.0]), mean_over_seeds_and_queries([[1.0], [0.0]])):
        assert estimate.standard_error is None
        assert estimate.interval is None
    one_pair = paired_difference([0.0], [1.0])
    assert one_pair.standard_error is None
    assert one_pair.interval is None
    assert mean_of_independent([mean_over_queries([1.0]), mean_over_queries([0.0, 1.0])]).interval is None


def test_twenty_right_out_of_twenty_are_not_certain() -> None:
    estimate = mean_over_seeds_and_queries([[1.0] * 20] * 3)
    assert estimate.standard_error == pytest.approx(1 / 22)
    # Wilson's interval for 20 of 20 with the quantile of 19 degrees of freedom, whatever the number of seeds.
    lowest = 20 / (20 + t.ppf(0.975, 19) ** 2)
    assert estimate.interval == pytest.approx((lowest, 1.0))
    assert mean_over_queries([0.0] * 20).interval == pytest.approx((0.0, 1 - lowest))
    assert estimate_over_tasks([("qa", 1.0)] * 3).interval[0] < 0.5  # type: ignore[union-attr, index]


def test_queries_that_all_score_alike_add_to_what_seeds_show() -> None:
    estimate = mean_over_seeds_and_queries([[1.0] * 20, [0.0] * 20])
    # Two seeds at 1 and 0: their variance of 1/2 over 2, and the least of 20 queries.
    assert estimate.standard_error == pytest.approx(math.sqrt(1 / 4 + (smallest_error(20) or 0) ** 2))


@pytest.mark.parametrize("num_queries", [2, 5, 20, 100])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95, 0.99])
def test_intervals_of_right_and_wrong_answers_cover_the_truth(num_queries: int, share: float) -> None:
    covered = 0.0
    for right in range(num_queries + 1):
        interval = mean_over_queries([1.0] * right + [0.0] * (num_queries - right)).interval
        assert interval is not None
        covered += (interval[0] <= share <= interval[1]) * binom.pmf(right, num_queries, share)
    # Wilson's interval dips below 95 % for some shares; Wald's falls to 2 % here.
    assert covered > 0.9


@pytest.mark.parametrize("num_queries", [2, 3, 4])
def test_a_few_pairs_never_exclude_no_difference(num_queries: int) -> None:
    low, high = paired_difference([0.0] * num_queries, [1.0] * num_queries).interval or (1, 1)
    assert low < 0 < high
    same = paired_difference([1.0] * num_queries, [1.0] * num_queries).interval or (0, 0)
    assert same[0] < 0 < same[1]


def test_many_tasks_with_every_answer_right_tighten_the_interval() -> None:
    task = mean_over_queries([1.0] * 20)
    low, high = mean_of_independent([task] * 30).interval or (0, 0)
    assert 0.96 < low < high == pytest.approx(1.0)


@pytest.mark.parametrize(("by_seed", "by_query"), [(0.0, 0.0), (0.5, 0.0), (0.0, 2.0), (0.5, 2.0)])
def test_the_standard_error_is_the_spread_of_the_mean_over_repetitions(by_seed: float, by_query: float) -> None:
    rng = np.random.default_rng(0)
    estimates = [mean_over_seeds_and_queries(crossed_table(rng, 5, 31, by_seed, by_query)) for _ in range(3000)]
    spread = np.std([one.mean for one in estimates])
    claimed = math.sqrt(np.mean([error_of(one) ** 2 for one in estimates]))
    # Components that come out negative are taken as zero, so where there are none the claim is a little wide.
    assert 0.95 * spread <= claimed <= 1.25 * spread


@pytest.mark.parametrize(("seeds", "by_seed"), [(2, 0.0), (2, 0.5), (3, 0.0), (3, 0.25), (3, 1.0), (5, 0.5)])
@pytest.mark.parametrize("way", ["score", "difference", "seed means"])
def test_intervals_over_few_seeds_cover_the_truth(seeds: int, by_seed: float, way: str) -> None:
    """With the queries' degrees of freedom alone, 8 to 18 % lay outside where seeds differ."""
    rng = np.random.default_rng(seeds)
    outside, widths = 0, []
    for _ in range(1000):
        # As wide as right and wrong answers, so that the smallest error that queries can show plays no part.
        table = 0.5 + 0.35 * crossed_table(rng, seeds, 60, by_seed, 1.0)
        if way == "seed means":
            rows = [mean_over_queries(row) for row in table - 0.5]
            estimate = mean_of_seed_means([r.mean for r in rows], [error_of(r) for r in rows], 60, "paired")
        else:
            estimate = mean_over_seeds_and_queries(
                table - 0.5 * (way != "score"), pairing=None if way == "score" else "paired"
            )
        low, high = estimate.interval or (0, 0)
        widths.append(high - low)
        outside += not low <= (0.5 if way == "score" else 0) <= high
    # 5 % and what 1,000 repetitions leave open; two seeds that differ about as much as queries know less than t allows.
    assert outside <= (100 if seeds == 2 else 70)
    # Most are less than twice as wide as if the spread were known.
    true_error = 0.35 * math.sqrt(by_seed**2 / seeds + 1 / 60 + 1 / (60 * seeds))
    assert np.median(widths) < 2 * (2 * 1.96 * true_error)


def test_an_error_is_known_no_worse_than_the_worst_of_its_parts() -> None:
    # Seeds and queries differ as much as the rest, which is taken off.
    assert mean_over_seeds_and_queries([[1, 0], [0, 0]], pairing="paired").degrees_of_freedom == 1
    assert satterthwaite(1.0, [(1.0, 1), (1.0, 9)]) == 1
    assert satterthwaite(2.0, [(1.0, 1), (1.0, 1)]) == pytest.approx(2)
    assert satterthwaite(0.0, [(0.0, 1)]) == math.inf


def test_treating_all_cells_as_independent_would_claim_too_much() -> None:
    table = crossed_table(np.random.default_rng(1), 5, 31, 0.0, 2.0)
    naive = float(np.std(table, ddof=1)) / math.sqrt(table.size)
    assert error_of(mean_over_seeds_and_queries(table)) > 1.5 * naive


def test_seed_means_alone_give_no_narrower_error_than_the_table() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        table = crossed_table(rng, 3, 47, 0.3, 1.0)
        rows = [mean_over_queries(row) for row in table]
        from_means = mean_of_seed_means([r.mean for r in rows], [error_of(r) for r in rows], 47)
        whole = mean_over_seeds_and_queries(table)
        assert from_means.mean == pytest.approx(whole.mean)
        assert error_of(from_means) >= error_of(whole) - 1e-12
        assert from_means.num_scores == whole.num_scores


def test_the_bootstrap_of_a_mean_agrees_with_its_formula() -> None:
    scores = np.random.default_rng(3).random(200)
    drawn = resampled_scores(lambda rows: float(scores[rows].mean()), 200, num_resamples=2000)
    assert spread(drawn) == pytest.approx(error_of(mean_over_queries(scores)), rel=0.1)


def test_pairing_removes_what_queries_share() -> None:
    rng = np.random.default_rng(4)
    hard = rng.normal(0, 1, 100)
    first, second = hard + rng.normal(0, 0.1, 100), hard + 0.5 + rng.normal(0, 0.1, 100)
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(0.5, abs=0.05)
    assert error_of(difference) < 0.2 * error_of(mean_over_queries(first))


def test_the_paired_bootstrap_agrees_with_the_formula() -> None:
    rng = np.random.default_rng(6)
    first, second = rng.random(150), rng.random(150)
    before = resampled_scores(lambda rows: float(first[rows].mean()), 150, num_resamples=2000)
    after = resampled_scores(lambda rows: float(second[rows].mean()), 150, num_resamples=2000)
    assert spread(np.subtract(after, before)) == pytest.approx(paired_difference(first, second).standard_error, rel=0.1)


def test_differences_say_whether_they_are_paired() -> None:
    paired = paired_difference([0.0, 1.0], [1.0, 1.0])
    independent = independent_difference(mean_over_queries([0.0, 1.0]), mean_over_queries([1.0, 1.0, 1.0]))
    assert (paired.pairing, independent.pairing) == ("paired", "independent")
    assert mean_of_independent([paired, paired]).pairing == "paired"
    assert mean_of_independent([paired, independent]).pairing == "independent"
    assert mean_over_queries([0.0, 1.0]).pairing is None


def test_an_independent_difference_has_the_errors_of_both() -> None:
    first, second = Estimate(0.2, 0.03, 10, 9), Estimate(0.5, 0.04, 10, 9)
    difference = independent_difference(first, second)
    assert difference.mean == pytest.approx(0.3)
    assert difference.standard_error == pytest.approx(0.05)
    # Welch's degrees of freedom.
    assert difference.degrees_of_freedom == pytest.approx(0.0025**2 / (0.0009**2 / 9 + 0.0016**2 / 9))


def test_scores_of_different_queries_are_not_paired() -> None:
    with pytest.raises(ValueError, match="same seeds and queries"):
        paired_difference([1.0, 0.0], [1.0])


def test_a_family_of_many_tasks_does_not_drown_a_family_of_one() -> None:
    tasks = [("qa", Estimate(0.2, 0.1, 10))] * 3 + [("math", Estimate(0.8, 0.1, 10))]
    overall = mean_over_families(tasks)
    assert overall.mean == pytest.approx(0.5)
    assert overall.standard_error == pytest.approx(math.hypot(0.1 / math.sqrt(3), 0.1) / 2)
    assert overall.num_scores == 40


def test_too_few_tasks_cannot_show_how_tasks_differ() -> None:
    assert estimate_over_tasks([("qa", 0.1), ("qa", 0.9)]) is None
    spread = estimate_over_tasks([("qa", 0.1), ("qa", 0.5), ("qa", 0.9)])
    assert spread is not None
    assert spread.standard_error == pytest.approx(0.4 / math.sqrt(3))
