"""Imported answers are scored like those of a model, and refused where they are not answers to the same queries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manyicl.errors import UserError
from manyicl.evaluation.imported import export_queries, import_predictions, query_hash
from manyicl.evaluation.report.tables import print_table
from manyicl.evaluation.result import ResultStore
from manyicl.evaluation.shot_curve import EvaluationSettings, choose_queries, measure_shot_curves
from manyicl.tasks.task import Task
from tests.builders import make_example, make_task
from tests.evaluation.oracle import OracleEngine

FREE = make_task("free", test=[make_example("two", "2"), make_example("three", "3")], labels=None, metric="exact_match")
TASKS = (make_task("toy"), FREE)


def answers_file(folder: Path, tasks: tuple[Task, ...] = TASKS) -> Path:
    """Answer all exported queries right."""
    queries = export_queries(tasks, folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    right = {query_hash(task, one.query): one.answer for task in tasks for one in task.test}
    lines = [
        {"query_hash": key, "answer": right[key], "seconds": 1}
        for key in (json.loads(q)["query_hash"] for q in queries)
    ]
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_exported_queries_say_all_that_another_system_needs(tmp_path: Path) -> None:
    path = export_queries(TASKS, tmp_path / "new" / "queries.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == len({line["query_hash"] for line in lines}) == sum(len(task.test) for task in TASKS)
    assert lines[0] == {
        "query_hash": query_hash(TASKS[0], TASKS[0].test[0].query),
        "task": "toy",
        "instruction": "",
        "query": TASKS[0].test[0].query.text,
        "options": ["good", "bad"],
    }
    assert lines[-1]["options"] == []
    assert query_hash(TASKS[0], TASKS[0].test[0].query) != query_hash(FREE, TASKS[0].test[0].query)


def test_answers_are_scored_in_the_metric_of_each_task(tmp_path: Path) -> None:
    path = answers_file(tmp_path)
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[-1] = json.dumps({**json.loads(lines[-1]), "answer": "4"})
    path.write_text("\n".join(lines), encoding="utf-8")
    toy, free = import_predictions(path, "peer", TASKS, tmp_path / "results")
    assert (toy.score, free.score) == (1.0, 0.5)
    assert free.query_scores == (1.0, 0.0)
    assert (toy.model_name, toy.num_shots, toy.num_queries) == ("peer", 0, len(TASKS[0].test))
    assert toy.majority is not None
    store = ResultStore(tmp_path / "results")
    assert {one.key for one in store.load()} == {toy.key, free.key}
    assert [one.answer for one in store.predictions(free)] == ["2", "4"]


def test_they_are_paired_with_the_results_of_a_model_on_the_same_queries(tmp_path: Path) -> None:
    task = make_task("toy")
    settings = EvaluationSettings(shots=(0, 4), num_seeds=1, num_queries=len(task.test))
    engine: Any = OracleEngine()
    chosen, _ = choose_queries(engine, task, settings)
    measured = measure_shot_curves(engine, [task], tmp_path / "model", settings).results[0]
    (again,) = import_predictions(answers_file(tmp_path, (chosen,)), "peer", [chosen], tmp_path / "results", settings)
    assert again.queries_hash == measured.queries_hash
    assert print_table([again, measured]).models == (measured.model_name, "peer")


def test_the_same_file_is_added_once(tmp_path: Path) -> None:
    path = answers_file(tmp_path)
    first = import_predictions(path, "peer", TASKS, tmp_path / "results")
    assert import_predictions(path, "peer", TASKS, tmp_path / "results") == first
    assert import_predictions(path, "other", TASKS, tmp_path / "results")[0].key != first[0].key
    assert len(ResultStore(tmp_path / "results").load()) == 4


def test_an_answer_to_a_foreign_query_is_refused_with_its_hash_and_line(tmp_path: Path) -> None:
    path = answers_file(tmp_path)
    with pytest.raises(UserError) as error:
        import_predictions(path, "peer", TASKS[:1], tmp_path / "results")
    foreign = query_hash(FREE, FREE.test[0].query)
    assert (error.value.code, error.value.row) == ("foreign_query", len(TASKS[0].test) + 1)
    assert foreign in str(error.value)
    assert "2 such answers" in str(error.value)
    assert not (tmp_path / "results").exists()


def test_a_query_without_an_answer_is_refused_with_its_hash_and_text(tmp_path: Path) -> None:
    path = answers_file(tmp_path)
    path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    with pytest.raises(UserError) as error:
        import_predictions(path, "peer", TASKS, tmp_path / "results")
    assert (error.value.code, error.value.file) == ("missing_answer", path)
    assert query_hash(FREE, FREE.test[1].query) in str(error.value)
    assert "'three'" in str(error.value)


@pytest.mark.parametrize(
    "line", ["x", "[]", '{"answer": "a"}', '{"query_hash": "a"}', '{"query_hash": "a", "answer": 1}']
)
def test_a_line_without_an_answer_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        import_predictions(path, "peer", TASKS, tmp_path / "results")
    assert (error.value.code, error.value.row) == ("no_answer", 2)


def test_half_a_character_in_an_answer_is_named(tmp_path: Path) -> None:
    path = answers_file(tmp_path)
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[1] = json.dumps({**json.loads(lines[1]), "answer": "\ud83d"})
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError) as error:
        import_predictions(path, "peer", TASKS, tmp_path / "results")
    assert (error.value.code, error.value.file, error.value.row) == ("half_a_character", path, 2)


def test_two_answers_to_one_query_are_refused_with_both_lines(tmp_path: Path) -> None:
    path = answers_file(tmp_path)
    content = path.read_text(encoding="utf-8")
    path.write_text(content + content.splitlines()[2] + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 3") as error:
        import_predictions(path, "peer", TASKS, tmp_path / "results")
    assert (error.value.code, error.value.row) == ("answered_twice", len(content.splitlines()) + 1)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        import_predictions(tmp_path / "none.jsonl", "peer", TASKS, tmp_path / "results")
    assert error.value.code == "missing_file"
