"""The evidence for blended answers: its list of tasks, and records that a second run finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import blend
from benchmarks.blend import PLAN, RECIPES, main
from benchmarks.one_model_evidence import EVIDENCE, data_set

from manyicl.engine.engine import Engine
from manyicl.tasks.files import load_task

TASK = """
family: classification
query: "{{ text }}"
answer: "{{ answer }}"
labels: [hat, lamp]
data: {train: NAME.train.jsonl, test: NAME.test.jsonl}
"""


def test_no_task_of_the_evidence_is_a_test_task_of_the_one_model_or_was_trained_on() -> None:
    plan = json.loads(PLAN.read_text(encoding="utf-8"))
    of_one_model = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    sets = {role: {one["data_set"] for one in of_one_model[role]} for role in ("train", "test")}
    evidence, development = (
        [data_set(RECIPES / name / "task.yaml") for name in plan[role]["tasks"]] for role in ("evidence", "development")
    )
    assert len(set(evidence)) == 12
    assert not set(evidence) & (sets["train"] | sets["test"] | set(development))
    assert not set(development) & sets["test"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan of two tasks with their data."""
    for name in ("first", "second"):
        folder = tmp_path / "tasks" / name
        folder.mkdir(parents=True)
        (folder / "task.yaml").write_text(TASK.replace("NAME", name), encoding="utf-8")
        rows = [{"text": f"{name} {n} the red {word}", "answer": word} for n in range(16) for word in ("hat", "lamp")]
        for side, some in (("train", rows[:24]), ("test", rows[24:])):
            text = "".join(json.dumps(row) + "\n" for row in some)
            (tmp_path / f"{name}.{side}.jsonl").write_text(text, encoding="utf-8")
    tasks = {"tasks": ["tasks/first", "tasks/second"], "draws": [0, 1], "shots": [4, 16, 20, 99], "num_queries": 4}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"evidence": {**tasks, "max_context_tokens": 400}}), encoding="utf-8")
    monkeypatch.setattr(blend, "PLAN", plan)
    monkeypatch.setattr(blend, "RECIPES", tmp_path)
    return tmp_path


def test_what_is_recorded_is_compared_and_measured_once(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(data), "--model", "builtin:nano", "--output", str(data / "records")]
    assert main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    (data / "records" / "second-1.json").unlink()
    assert main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main([*arguments, "--tables"]) == 0
    printed = capsys.readouterr().out
    assert "| first | 16 |" in printed
    assert "| second | 99 (24 fit) |" in printed
    assert "of 8 compared." in printed


def test_the_tables_hold_what_an_engine_answers(data: Path) -> None:
    """The script fits the blend to recorded scores; `Engine.predict` fits and applies it itself."""
    assert main([str(data), "--model", "builtin:nano", "--output", str(data / "records")]) == 0
    plan = json.loads(blend.PLAN.read_text(encoding="utf-8"))["evidence"]
    points = {(p.task, p.draw, p.shots): p for p in blend.points_of(data, plan, data / "records")}
    engine = Engine.from_pretrained("builtin:nano", max_context_tokens=400)
    task = load_task(data / "tasks" / "second" / "task.yaml", data)
    known = json.loads((data / "records" / "second-1.json").read_text(encoding="utf-8"))
    queries = [next(one.query for one in task.test if one.origin == origin) for origin in known["queries"]]
    for shots in (4, 20):
        point = points["second", 1, shots]
        prefix = engine.with_blend(engine.prefill(task, task.demonstrations(shots, 1)))
        assert prefix.blend is not None
        assert point.weights.model_dump() == pytest.approx(prefix.blend.model_dump(), abs=1e-2)
        for row, one in zip(
            point.log_probabilities["blend"], engine.predict(prefix, queries, scores="all", blend=True), strict=True
        ):
            assert one.scores is not None
            assert list(one.scores.log_probabilities.values()) == pytest.approx(list(row), abs=1e-2)
