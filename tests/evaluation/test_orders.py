"""The same demonstrations in several orders: measured, averaged within their draw, and the worst of them shown."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console
from typer.testing import CliRunner

from manyicl.cli.main import app
from manyicl.engine.engine import Engine
from manyicl.errors import UserError
from manyicl.evaluation.comparison.estimates import score_table
from manyicl.evaluation.report import print_table
from manyicl.evaluation.report.lines import notes, sections
from manyicl.evaluation.result import Result, ResultStore
from manyicl.evaluation.scores_json import scores_as_json
from manyicl.evaluation.shot_curve import EvaluationSettings, measure_shot_curves
from manyicl.evaluation.summary import OVERALL, summarise
from manyicl.evaluation.uncertainty import mean_over_seeds_and_queries, paired_difference
from manyicl.tasks.demonstrations import in_another_order
from tests.builders import make_task, tiny_loaded
from tests.evaluation.test_summary import scored

SETTINGS = EvaluationSettings(shots=(0, 1, 6), num_seeds=2, num_queries=5, num_orders=3)


def test_an_order_is_a_permutation_fixed_by_seed_and_number() -> None:
    drawn = tuple(range(9))
    assert in_another_order(drawn, 4, 0) == drawn
    orders = {in_another_order(drawn, seed, order) for seed in (0, 1) for order in (1, 2)}
    assert len(orders) == 4
    assert all(sorted(order) == list(drawn) != list(order) for order in orders)
    assert in_another_order(drawn, 1, 2) == in_another_order(drawn, 1, 2)


def test_each_draw_is_measured_in_every_order_of_the_same_demonstrations(tmp_path: Path) -> None:
    engine = Engine.local(tiny_loaded())
    curves = measure_shot_curves(engine, [make_task()], tmp_path, SETTINGS)
    measured = [(result.num_shots, result.seed, result.order) for result in curves.results]
    # Without demonstrations, or with one, there is a single order.
    expected = [(0, 0, 0), (1, 0, 0), (1, 1, 0), *((6, seed, order) for seed in (0, 1) for order in range(3))]
    assert sorted(measured) == sorted(expected)
    store = ResultStore(tmp_path)
    contexts = {
        (result.seed, result.order): [(one.query, one.answer) for one in store.context(result)]
        for result in store.load()
        if result.num_shots == 6
    }
    for seed in (0, 1):
        assert len({tuple(contexts[seed, order]) for order in range(3)}) == 3
        assert len({frozenset(Counter(contexts[seed, order]).items()) for order in range(3)}) == 1
    assert measure_shot_curves(engine, [make_task()], tmp_path, SETTINGS).num_found == len(expected)


def test_demonstrations_that_do_not_fit_are_the_same_ones_in_every_order(tmp_path: Path) -> None:
    engine = Engine.local(tiny_loaded(), max_context_tokens=100)
    settings = EvaluationSettings(shots=(20,), num_seeds=1, num_queries=3, num_orders=4)
    results = measure_shot_curves(engine, [make_task()], tmp_path, settings).results
    store = ResultStore(tmp_path)
    assert {result.num_shots_dropped for result in results} != {0}
    shown = [sorted((one.query, one.answer) for one in store.context(result)) for result in results]
    assert len(shown) == 4
    assert all(one == shown[0] for one in shown)


def test_one_order_leaves_records_and_their_keys_as_they_were(tmp_path: Path) -> None:
    engine = Engine.local(tiny_loaded())
    one = SETTINGS.model_copy(update={"num_orders": 1})
    before = measure_shot_curves(engine, [make_task()], tmp_path, one).results
    after = measure_shot_curves(engine, [make_task()], tmp_path, SETTINGS)
    assert after.num_found == len(before)
    assert {result.key for result in before} < {result.key for result in after.results}


def test_orders_are_averaged_within_their_draw_and_do_not_count_as_draws(tmp_path: Path) -> None:
    results: list[Result] = []
    for seed in (0, 1):
        engine = Engine.local(tiny_loaded(seed=seed))
        name = f"model {seed}"
        results += measure_shot_curves(engine, [make_task()], tmp_path, SETTINGS, model_name=name).results
    summary = summarise(results)
    tables = []
    for model in summary.models:
        records = summary.by_point[model, "toy", 6]
        of_seeds = [[r.query_scores or () for r in records if r.seed == seed] for seed in (0, 1)]
        table = [np.mean(scores, axis=0) for scores in of_seeds]
        assert summary.tasks[model, "toy", 6] == mean_over_seeds_and_queries(table)
        assert summary.tasks[model, "toy", 6].mean == pytest.approx(fmean(record.score for record in records))
        worst = summary.worst(model, OVERALL, 6)
        assert worst is not None
        assert (worst.mean, worst.standard_error) == (min(record.score for record in records), None)
        assert summary.worst(model, OVERALL, 0) is None
        tables.append(table)
    first, second = summary.models
    assert summary.difference(first, second, OVERALL, 6) == paired_difference(*tables)
    compared = score_table({0: summary.by_point[summary.models[0], "toy", 6]})
    assert compared is not None
    assert compared.draws.tolist() == [2]
    assert compared.columns == pytest.approx(np.mean(tables[0], axis=0)[None])
    scores = [one["worst"] for one in scores_as_json(summary, ResultStore(tmp_path)) if one["shots"] == 6]
    assert scores == [min(r.score for r in summary.by_point[model, "toy", 6]) for model in summary.models]
    console = Console(file=io.StringIO(), width=200)
    print_table(results, console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert printed.count("worst draw and order") == 2
    assert "measured in 3 orders" in printed


def test_orders_of_a_score_that_only_a_whole_set_has_are_averaged_too(tmp_path: Path) -> None:
    task = make_task(metric="macro_f1")
    settings = SETTINGS.model_copy(update={"shots": (6,), "num_seeds": 1, "num_orders": 2})
    results = measure_shot_curves(Engine.local(tiny_loaded()), [task], tmp_path, settings).results
    summary = summarise(results)
    records = summary.by_point["tiny-llama", "toy", 6]
    assert len(records) == 2
    assert summary.tasks["tiny-llama", "toy", 6].mean == pytest.approx(fmean(record.score for record in records))


@pytest.mark.parametrize(("num_seeds", "is_shown"), [(4, False), (5, True)])
def test_the_worst_of_many_draws_is_shown(num_seeds: int, is_shown: bool) -> None:
    scores = [(float(seed > 0), 1.0) for seed in range(num_seeds)]
    summary = summarise(scored("m", "a", 4, each, seed=seed) for seed, each in enumerate(scores))
    (section,) = sections(summary)
    assert [cell and cell.mean for line in section.lines if line.label == "m, worst draw" for cell in line.cells] == (
        [0.5] if is_shown else []
    )
    assert any("“Worst draw”: the lowest" in note for note in notes(summary)) == is_shown


def test_orders_and_retrieved_rows_are_not_measured_together() -> None:
    with pytest.raises(ValidationError, match="num_orders"):
        EvaluationSettings(num_orders=2, num_retrieved=4)


def test_the_command_refuses_orders_of_what_differs_from_query_to_query(tmp_path: Path) -> None:
    words = ["evaluate", "-m", "builtin:nano", "-t", "t", "-o", str(tmp_path / "r"), "--orders", "2", "--retrieve", "1"]
    result = CliRunner().invoke(app, words)
    assert isinstance(result.exception, UserError)
    assert (result.exception.code, result.exception.field) == ("conflicting_options", "--orders")
