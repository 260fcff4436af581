"""Scoring a model as the plan of the one model says: its queries and seeds, its data, every task for itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import one_model_scores
from benchmarks.one_model_evidence import EVIDENCE, FOLDER
from benchmarks.one_model_scores import main, planned_tasks

from manyicl.errors import UserError
from manyicl.evaluation.result import ResultStore
from manyicl.evaluation.shot_curve import Point
from manyicl.tasks.files import load_task

TASK = """
family: classification
query: "{{ text }}"
answer: "{{ answer }}"
labels: [hat, lamp]
data: {train: NAME.train.jsonl, test: NAME.test.jsonl}
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan of two validation tasks; returns the folder of data and tasks."""
    entries: list[dict[str, Any]] = []
    for name in ("first", "second"):
        folder = tmp_path / "validation" / name
        folder.mkdir(parents=True)
        (folder / "task.yaml").write_text(TASK.replace("NAME", name), encoding="utf-8")
        rows = [{"text": f"{name} {n} the red {word}", "answer": word} for n in range(6) for word in ("hat", "lamp")]
        for side, some in (("train", rows[:8]), ("test", rows[8:])):
            text = "".join(json.dumps(row) + "\n" for row in some)
            (tmp_path / f"{name}.{side}.jsonl").write_text(text, encoding="utf-8")
        entries.append(
            {
                "name": name,
                "data_hash": load_task(folder / "task.yaml", tmp_path).data_hash,
                "num_queries": 3,
                "query_seed": 0,
                "demonstration_seeds": [0, 1],
                "shots": [0, 2],
                "max_context_tokens": 200,
            }
        )
    evidence = tmp_path / "evidence.json"
    evidence.write_text(json.dumps({"validation": entries, "test": []}), encoding="utf-8")
    monkeypatch.setattr(one_model_scores, "FOLDER", tmp_path)
    monkeypatch.setattr(one_model_scores, "EVIDENCE", evidence)
    return tmp_path


def run(plan: Path, *more: str) -> int:
    named = ("--role", "validation", "--model", "builtin:nano", "--name", "nano", "--output", str(plan / "records"))
    return main([str(plan), *named, *more])


def test_it_reads_the_plan_of_the_evidence() -> None:
    assert one_model_scores.EVIDENCE == EVIDENCE
    assert one_model_scores.FOLDER == FOLDER
    for role, num_tasks, shots in (("validation", 10, (0, 4, 16)), ("test", 17, (0, 1, 4, 16, 32, 64, 128))):
        planned = planned_tasks(role)
        assert len(planned) == num_tasks
        assert max((one.settings.shots for one in planned), key=len) == shots
        assert all((FOLDER / role / one.name / "task.yaml").is_file() for one in planned)
    (mrpc,) = planned_tasks("validation", ["mrpc"])
    assert mrpc.settings.points() == [
        Point(seed, num_shots, 0) for seed, num_shots in ((0, 0), (0, 4), (0, 16), (1, 4), (1, 16))
    ]
    assert (mrpc.settings.num_queries, mrpc.max_context_tokens) == (50, 4096)
    with pytest.raises(UserError, match="no validation task is named mrcp"):
        planned_tasks("validation", ["mrcp"])


def test_records_hold_the_points_of_the_plan_and_a_second_run_finds_them(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(plan) == 0
    store = ResultStore(plan / "records")
    records = store.load()
    points = [(one.task, one.seed, one.num_shots) for one in records]
    assert points == [(task, *point) for task in ("first", "second") for point in ((0, 0), (0, 2), (1, 2))]
    assert {(one.num_queries, one.max_context_tokens, one.model_name) for one in records} == {(3, 200, "nano")}
    assert all(0.5 <= (line.confidence or 0) <= 1 for one in records for line in store.predictions(one))
    capsys.readouterr()
    assert run(plan, "--tasks", "second") == 0
    assert "(3 of 3 points found)" in capsys.readouterr().out


def test_a_task_with_other_data_is_not_scored_and_the_next_one_is(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (plan / "first.test.jsonl").read_text(encoding="utf-8")
    (plan / "first.test.jsonl").write_text(rows.replace("red", "blue", 1), encoding="utf-8")
    assert run(plan) == 1
    assert "the data of task 'first' are not those" in capsys.readouterr().out
    assert {one.task for one in ResultStore(plan / "records").load()} == {"second"}


def test_a_failure_of_the_machine_in_one_task_leaves_the_others(
    plan: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    score = one_model_scores.score

    def fail_once(loaded: Any, planned: Any, *others: Any) -> str:
        if planned.name == "first":
            raise RuntimeError("out of memory")
        return score(loaded, planned, *others)

    monkeypatch.setattr(one_model_scores, "score", fail_once)
    assert run(plan) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: out of memory" in printed
    assert "failed: first" in printed
    assert {one.task for one in ResultStore(plan / "records").load()} == {"second"}


def test_test_tasks_are_not_tried_out_on_fewer_queries(plan: Path) -> None:
    assert run(plan, "--role", "test", "--queries", "5") == 2
    assert not (plan / "records").exists()
