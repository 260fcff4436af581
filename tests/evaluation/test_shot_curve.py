"""Task x shots x seed -> records, encoded once, the same queries, skipped when done."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import ValidationError

from manyicl.engine.engine import Engine
from manyicl.engine.label_scores import MOST_LABELS_SCORED
from manyicl.engine.prediction import Prediction
from manyicl.errors import UserError
from manyicl.evaluation.metrics import METRICS
from manyicl.evaluation.result import ResultStore
from manyicl.evaluation.retrieval_prefix import prefill_to_retrieve
from manyicl.evaluation.shot_curve import (
    EvaluationSettings,
    ShotCurves,
    choose_queries,
    keeps_confidence,
    measure_shot_curves,
)
from manyicl.evaluation.uncertainty import spread
from manyicl.model.manifest import Manifest, TrainedTask
from manyicl.tasks.task import Task
from tests.builders import make_example, make_task, tiny_loaded
from tests.evaluation.oracle import OracleEngine, small_world

SETTINGS = EvaluationSettings(shots=(0, 1, 2, 8), num_seeds=2, num_queries=11)


def measure(
    engine: OracleEngine,
    tasks: list[Task],
    output: Path,
    settings: EvaluationSettings = SETTINGS,
    name: str | None = None,
) -> ShotCurves:
    return measure_shot_curves(cast(Engine, engine), tasks, output, settings, model_name=name)


def test_a_curve_has_one_record_per_point_and_one_without_demonstrations(tmp_path: Path) -> None:
    curves = measure(OracleEngine(), [make_task()], tmp_path)
    points = [(result.seed, result.num_shots) for result in curves.results]
    assert points == [(0, 0), (0, 1), (0, 2), (0, 8), (1, 1), (1, 2), (1, 8)]


def test_other_draws_of_demonstrations_leave_queries_and_keys_as_they_are(tmp_path: Path) -> None:
    def keys(**changes: int) -> dict[tuple[int, int], tuple[str, str]]:
        settings = EvaluationSettings(shots=(0, 2), num_seeds=2, num_queries=5, seed=3, **changes)
        results = measure(OracleEngine(), [make_task()], tmp_path / f"{changes}", settings).results
        return {(result.seed, result.num_shots): (result.key, result.queries_hash) for result in results}

    usual, later = keys(), keys(first_draw=4)
    assert sorted(usual) == [(3, 0), (3, 2), (4, 2)]
    assert sorted(later) == [(4, 0), (4, 2), (5, 2)]
    assert usual[4, 2] == later[4, 2]
    assert len({queries for known in (usual, later) for _, queries in known.values()}) == 1


def test_the_prefix_is_encoded_once_per_seed_and_then_extended(tmp_path: Path) -> None:
    engine = OracleEngine()
    measure(engine, [make_task()], tmp_path)
    assert engine.calls == [f"encode {num_shots}" for num_shots in (0, 1, 1, 6, 1, 1, 6)]


def test_a_second_run_measures_nothing_and_returns_the_same(tmp_path: Path) -> None:
    tasks = small_world()
    first = measure(OracleEngine(), tasks, tmp_path)
    engine = OracleEngine()
    second = measure(engine, tasks, tmp_path)
    assert engine.calls == []
    assert second.num_found == len(second.results) == len(first.results)
    assert second.results == first.results


class SlowEngine(OracleEngine):
    """While it answers for the first time, a run beside it measures everything."""

    output: Path

    def predict(self, *arguments: Any, **options: Any) -> Iterator[Prediction]:
        self.calls.append("predict")
        if self.calls.count("predict") == 1:
            measure(OracleEngine(), [make_task()], self.output)
        return super().predict(*arguments, **options)


def test_what_another_run_measures_meanwhile_is_taken_and_is_there_once(tmp_path: Path) -> None:
    engine = SlowEngine()
    engine.output = tmp_path
    curves = measure(engine, [make_task()], tmp_path)
    assert engine.calls == ["encode 0", "predict"]
    assert curves.num_found == 7
    lines = (tmp_path / "toy.results.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 7
    assert curves.results == measure(OracleEngine(), [make_task()], tmp_path).results


def test_an_interrupted_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    curves = measure(OracleEngine(), [make_task()], tmp_path)
    lost = curves.results[2]
    path = tmp_path / "toy.results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if lost.key not in line), encoding="utf-8")
    engine = OracleEngine()
    again = measure(engine, [make_task()], tmp_path)
    assert engine.calls == ["encode 2"]
    assert again.results[2].score == lost.score
    assert again.results[2].prompt_hash == lost.prompt_hash


@pytest.mark.parametrize(
    "change",
    [
        {"settings": SETTINGS.model_copy(update={"seed": 5})},
        {"settings": SETTINGS.model_copy(update={"num_queries": 12})},
        {"settings": SETTINGS.model_copy(update={"sampling": "random"})},
        {"tasks": [make_task(data_hash="1" * 64)]},
        {"tasks": [make_task(metric="macro_f1")]},
        {"tasks": [make_task(instruction="Say it.")]},
        {"engine": OracleEngine(skill=0.1)},
        {"engine": OracleEngine(max_context_tokens=500)},
    ],
)
def test_anything_a_score_depends_on_makes_another_record(change: dict[str, object], tmp_path: Path) -> None:
    arguments = {"engine": OracleEngine(), "tasks": [make_task()], "output": tmp_path}
    measure(**arguments)  # type: ignore[arg-type]
    assert measure(**{**arguments, **change}).num_found == 0  # type: ignore[arg-type]


def test_the_same_weights_by_another_name_are_another_model(tmp_path: Path) -> None:
    first = measure(OracleEngine(), [make_task()], tmp_path)
    engine = OracleEngine()
    for _ in range(2):
        second = measure(engine, [make_task()], tmp_path, name="mine")
        assert second.num_found == 7
        assert {result.model_name for result in second.results} == {"mine"}
    assert engine.calls == []
    store = ResultStore(tmp_path)
    assert sorted(result.model_name for result in store.load()) == ["mine"] * 7 + ["oracle"] * 7
    assert measure(OracleEngine(), [make_task()], tmp_path).results == first.results
    for one, other in zip(first.results, second.results, strict=True):
        assert one.score == other.score
        assert store.predictions(one) == store.predictions(other)
        assert store.context(one) == store.context(other)


def test_every_point_and_model_answers_the_same_queries(tmp_path: Path) -> None:
    results = [
        *measure(OracleEngine(), [make_task()], tmp_path).results,
        *measure(OracleEngine(reference="other"), [make_task()], tmp_path).results,
    ]
    assert len({result.queries_hash for result in results}) == 1
    assert len({result.prompt_hash for result in results}) == 7


def test_fewer_queries_are_the_beginning_of_more(tmp_path: Path) -> None:
    asked = []
    for number in (3, 9):
        settings = EvaluationSettings(shots=(0,), num_queries=number)
        (result,) = measure(OracleEngine(), [make_task()], tmp_path, settings).results
        asked.append([line.query for line in ResultStore(tmp_path).predictions(result)])
    assert asked[0] == asked[1][:3]


def test_the_context_file_holds_the_demonstrations_in_order(tmp_path: Path) -> None:
    task = make_task()
    result = measure(OracleEngine(), [task], tmp_path).results[3]
    shown = [(line.query, line.answer) for line in ResultStore(tmp_path).context(result)]
    assert shown == [(e.query.text, e.answer) for e in task.demonstrations(8, seed=0)]


def test_scores_agree_with_the_predictions_file(tmp_path: Path) -> None:
    for result in measure(OracleEngine(), small_world(), tmp_path).results:
        lines = ResultStore(tmp_path).predictions(result)
        metric = METRICS[result.metric]
        assert result.score == pytest.approx(metric.score([x.answer for x in lines], [x.references for x in lines]))
        assert result.num_queries == len(lines) == 11
        assert result.query_scores == tuple(line.scores[result.metric] for line in lines)


def test_a_task_with_too_few_rows_shows_all_it_has_and_says_so(tmp_path: Path) -> None:
    task = make_task(train=[make_example(f"row {i}", ("good", "bad")[i % 2]) for i in range(5)])
    settings = EvaluationSettings(shots=(4, 64), num_seeds=1, num_queries=3)
    few, many = measure(OracleEngine(), [task], tmp_path, settings).results
    assert (few.num_shots_used, few.num_shots_missing) == (4, 0)
    assert (many.num_shots, many.num_shots_used, many.num_shots_missing) == (64, 5, 59)


def test_a_full_context_drops_demonstrations_and_is_answered_once(tmp_path: Path) -> None:
    engine = OracleEngine(max_context_tokens=150)
    settings = EvaluationSettings(shots=(2, 30, 40), num_seeds=1, num_queries=5)
    fits, full, fuller = measure(engine, [make_task()], tmp_path, settings).results
    assert fits.num_shots_dropped == 0
    assert full.num_shots_used + full.num_shots_dropped == 30
    assert 2 < full.num_shots_used < 30
    assert full.num_context_tokens <= 150
    assert fuller.num_shots_dropped > full.num_shots_dropped
    assert full.seconds == fuller.seconds or full.num_shots_used != fuller.num_shots_used


def test_a_query_longer_than_the_context_is_passed_over_and_counted(tmp_path: Path) -> None:
    rows = [make_example("long " * 200, "good"), *(make_example(f"short {i}", "bad") for i in range(4))]
    engine = OracleEngine(max_context_tokens=120)
    settings = EvaluationSettings(shots=(0,), num_queries=10)
    (result,) = measure(engine, [make_task(test=rows)], tmp_path, settings).results
    assert (result.num_queries, result.num_queries_skipped) == (4, 1)
    with pytest.raises(UserError, match=r"no test row of task .* fits"):
        measure(engine, [make_task(test=rows[:1])], tmp_path, settings)


def test_what_training_never_showed_is_flagged(tmp_path: Path) -> None:
    manifest = Manifest(max_context_tokens=100_000, max_trained_shots=2)
    results = measure(OracleEngine(manifest=manifest), [make_task()], tmp_path).results
    assert [result.beyond_training for result in results[:4]] == [False, False, False, True]
    short = Manifest(max_context_tokens=60)
    assert measure(OracleEngine("short", manifest=short), [make_task()], tmp_path).results[3].beyond_training


def test_a_sibling_of_a_training_task_is_not_unseen(tmp_path: Path) -> None:
    trained = TrainedTask(name="sibling", family="classification", source="reviews", data_hash="1" * 64)
    manifest = Manifest(max_context_tokens=1000, tasks=(trained,))
    engine = OracleEngine(manifest=manifest)
    tasks = [make_task("a", source="reviews"), make_task("b", source="other")]
    settings = EvaluationSettings(shots=(0,))
    assert [r.seen_in_training for r in measure(engine, tasks, tmp_path, settings).results] == [True, False]
    assert measure(OracleEngine("base"), tasks, tmp_path, settings).results[0].seen_in_training is None


def test_macro_f1_has_an_error_and_no_score_per_query(tmp_path: Path) -> None:
    result = measure(OracleEngine(), [make_task(metric="macro_f1")], tmp_path).results[3]
    assert result.query_scores is None
    assert result.resampled_scores is not None
    assert result.standard_error == pytest.approx(max(spread(result.resampled_scores), 1 / 13))
    assert "accuracy" in result.companions


def test_a_wrong_metric_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    engine = OracleEngine()
    with pytest.raises(UserError, match="Did you mean 'accuracy'"):
        measure(engine, [make_task(), make_task("other", metric="acuracy")], tmp_path)
    assert engine.calls == []


def test_negative_shot_counts_are_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        EvaluationSettings(shots=(-1, 4))


def test_a_real_engine_scores_the_same_whether_extended_or_encoded_anew(tmp_path: Path) -> None:
    engine = Engine.local(tiny_loaded())
    task = make_task(max_answer_tokens=4)
    free = task.with_spec(name="free", labels=None, metric="exact_match", family="qa")
    whole = measure_shot_curves(
        engine, [task, free], tmp_path / "a", EvaluationSettings(shots=(0, 2, 6), num_seeds=1, num_queries=5)
    )
    alone = measure_shot_curves(
        engine, [task, free], tmp_path / "b", EvaluationSettings(shots=(6,), num_seeds=1, num_queries=5)
    )
    for one, other in zip(whole.results[2::3], alone.results, strict=True):
        assert one.num_shots_used == 6
        assert one.prompt_hash == other.prompt_hash
        assert one.key == other.key
        extended, anew = (ResultStore(tmp_path / folder).predictions(one) for folder in "ab")
        assert [line.answer for line in extended] == [line.answer for line in anew]
        nats = [line.log_probability for line in anew]
        assert [line.log_probability for line in extended] == pytest.approx(nats, abs=1e-3)


def test_the_confidence_of_an_answer_is_kept_where_wanted_and_changes_no_answer(tmp_path: Path) -> None:
    engine = Engine.local(tiny_loaded())
    task = make_task()
    tasks = [task, task.with_spec(name="free", labels=None, metric="exact_match", family="qa", max_answer_tokens=4)]
    settings = EvaluationSettings(shots=(2,), num_seeds=1, num_queries=5, keep_confidence=False)
    plain = measure_shot_curves(engine, tasks, tmp_path / "plain", settings)
    with_confidence = settings.model_copy(update={"keep_confidence": True})
    kept = measure_shot_curves(engine, tasks, tmp_path / "kept", with_confidence)
    again = measure_shot_curves(engine, tasks, tmp_path / "plain", with_confidence)
    assert again.num_found == 1, "only the free answers have no confidence to add"
    assert all(line.confidence is not None for line in ResultStore(tmp_path / "plain").predictions(again.results[0]))
    assert measure_shot_curves(engine, tasks, tmp_path / "plain", settings).num_found == 2
    by_default = settings.model_copy(update={"keep_confidence": None})
    assert measure_shot_curves(engine, tasks, tmp_path / "plain", by_default).num_found == 2
    many = task.with_spec(labels=tuple(f"label {number}" for number in range(MOST_LABELS_SCORED + 1)))
    assert [keeps_confidence(one, by_default) for one in (*tasks, many)] == [True, False, False]
    for result, kept_result in zip(plain.results, kept.results, strict=True):
        without = ResultStore(tmp_path / "plain").predictions(result)
        with_it = ResultStore(tmp_path / "kept").predictions(kept_result)
        assert [line.answer for line in with_it] == [line.answer for line in without]
        assert all(line.confidence is None for line in without)
    closed, free = (ResultStore(tmp_path / "kept").predictions(result) for result in kept.results)
    prefix = engine.prefill(task, task.demonstrations(2, 0))
    rows = [task.query({"text": line.query}) for line in closed]
    scores = [prediction.scores for prediction in engine.predict(prefix, rows, scores="all")]
    expected = [one.probabilities[line.answer] for one, line in zip(scores, closed, strict=True) if one]
    assert [line.confidence for line in closed] == pytest.approx(expected, abs=1e-4)
    assert all(line.confidence is None for line in free)


RETRIEVING = SETTINGS.model_copy(update={"num_retrieved": 3})


def test_retrieval_adds_a_second_point_to_each_that_answers_the_same_queries(tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    task = make_task()
    plain = measure(OracleEngine(), [task], tmp_path / "plain").results
    curves = measure(OracleEngine(), [task], tmp_path / "both", RETRIEVING)
    points = [(result.seed, result.num_shots, result.num_retrieved) for result in curves.results]
    assert points == [(r.seed, r.num_shots, n) for r in plain for n in (0, 3)]
    without, with_retrieved = curves.results[::2], curves.results[1::2]
    assert [result.key for result in without] == [result.key for result in plain]
    for one, other in zip(without, with_retrieved, strict=True):
        assert one.queries_hash == other.queries_hash
        assert one.key != other.key
        assert one.prompt_hash != other.prompt_hash
        assert (one.num_shots_used, one.mean_num_retrieved) == (other.num_shots_used, 0)
        assert 0 < other.mean_num_retrieved <= 3
        assert (one.line, other.line) == ("oracle", "oracle + 3 retrieved")


def test_points_with_retrieval_are_found_again_and_added_to_those_without(tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    plain = measure(OracleEngine(), [make_task()], tmp_path)
    added = measure(OracleEngine(), [make_task()], tmp_path, RETRIEVING)
    assert added.num_found == len(plain.results)
    assert added.results[::2] == plain.results
    engine = OracleEngine()
    again = measure(engine, [make_task()], tmp_path, RETRIEVING)
    assert (again.results, engine.calls) == (added.results, [])
    other = measure(OracleEngine(), [make_task()], tmp_path, SETTINGS.model_copy(update={"num_retrieved": 2}))
    assert other.num_found == len(plain.results)


def test_no_demonstration_and_no_row_with_the_text_of_the_query_is_retrieved(tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    task = make_task()
    leaking = make_task(train=(*task.train, *task.test))
    engine = OracleEngine()
    demonstrations = leaking.demonstrations(8)
    prefix, retrieve = prefill_to_retrieve(cast(Engine, engine), leaking, demonstrations, 5, None)
    assert retrieve is not None
    assert prefix.demonstrations == demonstrations
    for example in leaking.test:
        found = retrieve(example.query)
        assert found
        assert not {one.query.text for one in found} & {example.query.text, *(one.query.text for one in demonstrations)}


def test_where_no_row_is_left_nothing_is_retrieved(tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    settings = EvaluationSettings(shots=(40,), num_seeds=1, num_queries=5, num_retrieved=3)
    without, with_none = measure(OracleEngine(), [make_task()], tmp_path, settings).results
    assert (with_none.num_retrieved, with_none.mean_num_retrieved) == (3, 0)
    assert with_none.query_scores == without.query_scores


@pytest.mark.parametrize("most", [60, 90, 150, 400])
def test_a_real_engine_answers_as_when_it_retrieves_itself_in_any_context(most: int, tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    engine, task = Engine.local(tiny_loaded(), max_context_tokens=most), make_task()
    settings = EvaluationSettings(shots=(0, 4, 30), num_seeds=1, num_queries=7, num_retrieved=2)
    curves = measure_shot_curves(engine, [task], tmp_path, settings)
    store = ResultStore(tmp_path)
    asked, _ = choose_queries(engine, task, settings)
    for result in curves.results[1::2]:
        expected = list(
            engine.answer(
                task,
                task.demonstrations(result.num_shots),
                [one.query for one in asked.test],
                num_retrieved=2,
                bad_rows="report",
            )
        )
        for one, other in zip(store.predictions(result), expected, strict=True):
            # Where a query does not fit with its rows, fewer are retrieved here, and none is unanswered.
            if other.problem is None and other.num_shots == result.num_shots_used:
                assert one.answer == other.answer
                assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


def test_predictions_of_another_form_are_named_with_their_line(tmp_path: Path) -> None:
    curves = measure(OracleEngine(), [make_task()], tmp_path, EvaluationSettings(shots=(0,), num_queries=5))
    path = next(tmp_path.glob("*.results.jsonl"))
    path.write_text(path.read_text(encoding="utf-8").replace('"origin"', '"place"', 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"results\.jsonl:1: not a complete record"):
        ResultStore(tmp_path).predictions(curves.results[0])


def measure_as(reference: str, folder: Path) -> None:
    measure(OracleEngine(reference), small_world(), folder)


@pytest.mark.slow
def test_two_processes_evaluate_into_one_folder_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    # Two of them measure the same.
    workers = [context.Process(target=measure_as, args=(name, tmp_path)) for name in ("one", "other", "other")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    store = ResultStore(tmp_path)
    records = store.load()
    points = Counter((record.model_name, record.task) for record in records)
    assert points == {(name, task.name): 7 for name in ("one", "other") for task in small_world()}
    assert all(len(store.predictions(record)) == record.num_queries for record in records)
    for name in ("one", "other"):
        engine = OracleEngine(name)
        assert measure(engine, small_world(), tmp_path).num_found == 7 * len(small_world())
        assert engine.calls == []
