"""Errors of means over tasks hold training seeds, draws and queries: checked against resampling and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from manyicl.evaluation.comparison.estimates import (
    Measured,
    ScoreTable,
    Weighted,
    difference_of,
    family_weights,
    mean_of,
    score_table,
    share_of_gap,
    weighted_mean,
)
from manyicl.evaluation.result import Result
from manyicl.evaluation.uncertainty import mean_over_seeds_and_queries, paired_difference
from tests.evaluation.test_result import make_result
from tests.reference.resampled_comparison import Scores, mean_over_families, resampled, simulated

FAMILIES = {"a": "x", "b": "x", "c": "x", "d": "y", "e": "y"}


def table(scores: object, rows: tuple[int, ...] | None = None, queries: str = "q") -> ScoreTable:
    columns = np.atleast_2d(np.asarray(scores, dtype=float))
    rows = tuple(range(len(columns))) if rows is None else rows
    return ScoreTable(rows, columns.mean(axis=1), columns, False, columns.shape[1], queries, np.ones(len(columns)))


def weighted(scores: Scores) -> Weighted:
    weights = family_weights({task: FAMILIES[task] for task in scores})
    return [(weights[task], table(one, queries=task)) for task, one in scores.items()]


def known(measured: Measured | None) -> Measured:
    assert measured is not None
    return measured


def error_of(measured: Measured | None) -> float:
    error = known(measured).standard_error
    assert error is not None
    return error


def test_of_one_task_it_is_the_error_over_seeds_and_queries() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random((3, 20)) < 0.4
    for of_one, expected in (
        (weighted_mean([(1.0, table(scores))]), mean_over_seeds_and_queries(scores)),
        (weighted_mean([(1.0, table([[1.0] * 20] * 3))]), mean_over_seeds_and_queries([[1.0] * 20] * 3)),
        (
            weighted_mean([(1.0, table([[1.0] * 20, [0.0] * 20]))]),
            mean_over_seeds_and_queries([[1.0] * 20, [0.0] * 20]),
        ),
    ):
        assert of_one.mean == pytest.approx(expected.mean)
        assert of_one.standard_error == pytest.approx(expected.standard_error)
    other = rng.random((3, 20)) < 0.7
    paired = difference_of([(1.0, table(scores))], [(1.0, table(other))])
    assert error_of(paired) == pytest.approx(paired_difference(scores, other).standard_error)


def test_a_task_with_every_answer_right_keeps_its_own_doubt_beside_one_that_varies() -> None:
    scores = np.random.default_rng(0).random((1, 20)) < 0.4
    perfect = np.ones((1, 20))
    both = weighted_mean([(0.5, table(scores)), (0.5, table(perfect))])
    errors = [weighted_mean([(1.0, table(one))]).standard_error or 0.0 for one in (scores, perfect)]
    assert both.standard_error == pytest.approx(math.hypot(*errors) / 2)


def test_families_weigh_alike() -> None:
    weights = family_weights(FAMILIES)
    assert weights == pytest.approx({"a": 1 / 6, "b": 1 / 6, "c": 1 / 6, "d": 1 / 4, "e": 1 / 4})
    scores = simulated(np.random.default_rng(0), FAMILIES, 0.5, (3, 10), (0.1, 0.1, 0.3, 0.3))
    assert known(mean_of(weighted(scores))).mean == pytest.approx(mean_over_families(scores, FAMILIES))


@pytest.mark.parametrize("spreads", [(0.1, 0.05, 0.3, 0.2), (0.0, 0.1, 0.4, 0.2), (0.05, 0.0, 0.2, 0.2)])
def test_the_error_of_a_mean_is_that_of_resampling(spreads: tuple[float, float, float, float]) -> None:
    scores = simulated(np.random.default_rng(3), FAMILIES, 0.5, (12, 60), spreads)
    slow = resampled([scores], lambda models: mean_over_families(models[0], FAMILIES), 600)
    assert error_of(mean_of(weighted(scores))) == pytest.approx(slow.std(), rel=0.2)


def test_the_error_of_a_difference_is_that_of_resampling_and_leaves_out_what_both_share() -> None:
    rng = np.random.default_rng(5)
    queries = {task: rng.normal(0, 0.5, 60) for task in FAMILIES}
    first, second = (simulated(rng, FAMILIES, m, (12, 60), (0.05, 0.05, 0.0, 0.2), queries) for m in (0.4, 0.5))
    slow = resampled(
        [first, second], lambda two: mean_over_families(two[1], FAMILIES) - mean_over_families(two[0], FAMILIES), 1500
    )
    difference = known(difference_of(weighted(first), weighted(second)))
    assert error_of(difference) == pytest.approx(slow.std(), rel=0.2)
    assert error_of(difference) < error_of(mean_of(weighted(first)))
    assert difference.mean == pytest.approx(mean_over_families(second, FAMILIES) - mean_over_families(first, FAMILIES))


@pytest.mark.parametrize("num_trainings", [2, 3, 5])
@pytest.mark.parametrize("of_training", [0.0, 0.05, 0.2])
def test_intervals_of_differences_cover_the_truth_where_trainings_are_few(
    num_trainings: int, of_training: float
) -> None:
    rng = np.random.default_rng(num_trainings)
    num_worlds, num_covered = 100, 0
    for _ in range(num_worlds):
        first, second = (
            simulated(rng, FAMILIES, mean, (num_trainings, 40), (of_training, 0.05, 0.3, 0.3)) for mean in (0.4, 0.6)
        )
        interval = known(difference_of(weighted(first), weighted(second))).interval
        assert interval is not None
        num_covered += interval[0] <= 0.2 <= interval[1]
    # Two trainings that happen to agree hide what a third would show; more hide less.
    assert num_covered / num_worlds > {2: 0.86, 3: 0.88, 5: 0.9}[num_trainings]


def test_an_error_over_tasks_that_share_trainings_is_larger_than_one_of_independent_tasks() -> None:
    shared = simulated(np.random.default_rng(1), FAMILIES, 0.5, (4, 200), (0.2, 0.0, 0.1, 0.1))
    alone = [error_of(mean_of([(1.0, table(one))])) for one in shared.values()]
    weights = family_weights(FAMILIES).values()
    as_if_independent = float(np.sqrt(sum((w * error) ** 2 for w, error in zip(weights, alone, strict=True))))
    assert error_of(mean_of(weighted(shared))) > 1.6 * as_if_independent


def test_one_training_has_no_interval_but_one_over_queries_alone() -> None:
    measured = known(mean_of([(1.0, table([[0.0, 1.0, 1.0, 0.0, 1.0]]))]))
    assert (measured.num_trainings, measured.interval, measured.standard_error) == (1, None, None)
    assert measured.interval_of_queries is not None
    assert known(mean_of([(1.0, table([[1.0], [0.0]]))])).interval_of_queries is None
    # What no seed changes has nothing but queries to vary.
    constant = ScoreTable(None, np.array([0.5]), np.array([[0.0, 1.0] * 10]), False, 20, "q", np.zeros(1))
    assert known(mean_of([(1.0, constant)])).interval is not None


def test_a_mean_within_0_and_1_keeps_an_interval_within_0_and_1() -> None:
    low, high = known(mean_of([(1.0, table([[1.0] * 20, [1.0] * 19 + [0.0]]))])).interval or (0.0, 0.0)
    assert 0.5 < low < 0.95
    assert high <= 1
    # Two trainings that differ much show that they are two.
    two = known(mean_of([(1.0, table([[1.0] * 100, [0.0] * 50 + [1.0] * 50]))])).interval
    five = known(mean_of([(1.0, table([[1.0] * 100, [0.0] * 50 + [1.0] * 50] * 5))])).interval
    assert two is not None
    assert five is not None
    assert two[1] - two[0] > 2 * (five[1] - five[0])


def test_only_training_seeds_that_both_have_are_compared() -> None:
    first, second = table([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], (0, 1, 2)), table([[1.0, 1.0], [1.0, 1.0]], (1, 4))
    difference = known(difference_of([(1.0, first)], [(1.0, second)]))
    assert (difference.num_trainings, difference.mean) == (1, 0.0)
    assert difference_of([(1.0, first)], [(1.0, table([[1.0, 1.0]], (7,)))]) is None
    constant = ScoreTable(None, np.array([0.5]), np.array([[0.0, 1.0]]), False, 2, "q", np.zeros(1))
    assert known(difference_of([(1.0, constant)], [(1.0, first)])).num_trainings == 3


def test_other_queries_are_never_paired() -> None:
    with pytest.raises(ValueError, match="same seeds and queries"):
        difference_of([(1.0, table([[0.0, 1.0]]))], [(1.0, table([[0.0, 1.0]], queries="other"))])


def test_the_interval_of_a_share_is_that_of_resampling() -> None:
    rng = np.random.default_rng(2)
    queries = {task: rng.normal(0, 0.3, 80) for task in FAMILIES}
    spreads = (0.02, 0.02, 0.0, 0.3)
    models = [simulated(rng, FAMILIES, mean, (12, 80), spreads, queries) for mean in (0.3, 0.5, 0.6)]

    def share(three: object) -> float:
        lower, model, upper = (mean_over_families(one, FAMILIES) for one in three)  # type: ignore[attr-defined]
        return (model - lower) / (upper - lower)

    slow = np.quantile(resampled(models, share, 600), [0.025, 0.975])
    found = share_of_gap(*(weighted(one) for one in models))
    assert found is not None
    assert found.share == pytest.approx(share(models))
    assert found.interval is not None
    assert found.interval == pytest.approx(tuple(slow), abs=0.05)


def test_a_share_of_a_gap_within_the_noise_is_refused() -> None:
    rng = np.random.default_rng(4)
    models = [simulated(rng, FAMILIES, mean, (3, 20), (0.1, 0.1, 0.3, 0.3)) for mean in (0.50, 0.52, 0.51)]
    found = share_of_gap(*(weighted(one) for one in models))
    assert found is not None
    assert (found.share, found.interval) == (None, None)
    # Nor is there a share where the dedicated models are worse than the base.
    better, model, worse = (simulated(rng, FAMILIES, m, (3, 50), (0.01, 0.01, 0.1, 0.1)) for m in (0.8, 0.5, 0.2))
    backwards = share_of_gap(weighted(better), weighted(model), weighted(worse))
    assert backwards is not None
    assert backwards.share is None


def test_gap_and_share_are_over_the_trainings_that_all_three_have() -> None:
    lower, upper = (table([[score] * 200 for score in scores]) for scores in ((0.2, 0.2, 0.2), (0.9, 0.9, 0.8)))
    model = table([[0.5] * 200, [0.6] * 200])
    found = share_of_gap([(1.0, lower)], [(1.0, model)], [(1.0, upper)])
    assert found is not None
    assert found.gap.mean == pytest.approx(0.7)
    assert found.share == pytest.approx(0.35 / 0.7)
    single = share_of_gap([(1.0, lower)], [(1.0, model.at([0]))], [(1.0, upper)])
    assert single is not None
    assert (single.share, single.gap.interval) == (None, None)


def test_the_interval_of_a_share_covers_the_truth() -> None:
    rng = np.random.default_rng(6)
    num_worlds, num_covered = 60, 0
    for _ in range(num_worlds):
        queries = {task: rng.normal(0, 0.3, 40) for task in FAMILIES}
        models = [simulated(rng, FAMILIES, m, (3, 40), (0.03, 0.03, 0.0, 0.3), queries) for m in (0.3, 0.5, 0.7)]
        found = share_of_gap(*(weighted(one) for one in models))
        assert found is not None
        if found.interval is None:
            continue
        low, high = found.interval
        num_covered += (low is None or low <= 0.5) and (high is None or high >= 0.5)
    assert num_covered / num_worlds > 0.88


def test_draws_of_a_training_are_averaged_before_trainings_are_compared() -> None:
    def result(seed: int, *scores: float) -> Result:
        return make_result(query_scores=scores, score=sum(scores) / len(scores), num_queries=2, seed=seed)

    draws = {0: [result(0, 1.0, 0.0), result(1, 1.0, 1.0)], 3: [result(2, 0.0, 0.0)]}
    made = score_table(draws)
    assert made is not None
    assert made.rows == (0, 3)
    assert made.columns.tolist() == [[1.0, 0.5], [0.0, 0.0]]
    assert made.means.tolist() == [0.75, 0.0]
    assert made.draws.tolist() == [2, 1]
    other = result(0, 0.0, 1.0).model_copy(update={"queries_hash": "other"})
    assert score_table({0: [result(0, 0.0, 1.0), other]}) is None
    assert score_table({0: [make_result(query_scores=None)]}) is None


def test_a_metric_of_whole_sets_has_the_error_of_its_resamples() -> None:
    rng = np.random.default_rng(8)
    scores = (rng.normal(0, 1, (8, 1)) * 0.4 + rng.normal(0, 1, (1, 60)) + rng.normal(0, 1, (8, 60))) > 0
    chosen = np.random.default_rng(0).integers(60, size=(1000, 60))
    resamples = scores[:, chosen].mean(axis=2)
    of_sets = ScoreTable(tuple(range(8)), scores.mean(axis=1), resamples, True, 60, "q", np.ones(8))
    expected = error_of(mean_of([(1.0, table(scores))]))
    assert error_of(mean_of([(1.0, of_sets)])) == pytest.approx(expected, rel=0.1)
    # The same resamples of both models are subtracted from each other.
    better = ScoreTable(tuple(range(8)), scores.mean(axis=1) + 0.1, resamples + 0.1, True, 60, "q", np.ones(8))
    difference = known(difference_of([(1.0, of_sets)], [(1.0, better)]))
    assert difference.mean == pytest.approx(0.1)
    assert difference.standard_error == pytest.approx(2 / 62)
