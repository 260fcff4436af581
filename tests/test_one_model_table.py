"""The tables of the one model: baselines on the demonstrations of the records, aims, crossings, calibration."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from benchmarks import one_model_table as table
from benchmarks.one_model_table import BASE, BM25, MAJORITY, ONE, TFIDF, VECTORS, Aim, Confidences, Measured

from manyicl.engine.engine import Engine
from manyicl.errors import UserError
from manyicl.evaluation.result import Result, ResultStore
from manyicl.evaluation.shot_curve import EvaluationSettings, measure_shot_curves
from manyicl.evaluation.summary import summarise
from manyicl.evaluation.uncertainty import Estimate
from manyicl.tasks.files import load_task
from manyicl.tasks.task import Task
from tests.builders import make_task
from tests.evaluation.oracle import OracleEngine

SETTINGS = EvaluationSettings(shots=(0, 1, 4, 16, 32), num_seeds=2, num_queries=15)
WORDS = ("amber", "birch", "cedar", "dune", "ember", "fjord")
CLOSED = "family: classification\nlabels: [red, green, blue]\nquery: '{{ text }}'\nanswer: '{{ answer }}'\n"
FREE = "family: math\nmetric: exact_match\nquery: '{{ text }}'\nanswer: '{{ answer }}'\n"


class CountingVectors:
    """Vectors that count some words; stands for wordllama, which need not be installed."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[text.count(word) for word in WORDS] for text in texts], dtype=np.float32)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """Two classification tasks and one with free answers, as tasks of a plan; 300 training rows each."""
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    monkeypatch.setattr(table, "word_vectors", CountingVectors)
    table.vectors.cache_clear()
    files = []
    for name, head in (("colours", CLOSED), ("tones", CLOSED), ("sums", FREE)):
        file = tmp_path / "validation" / name / "task.yaml"
        file.parent.mkdir(parents=True)
        file.write_text(f"{head}data: {{train: {name}.jsonl, test: {name}-test.jsonl}}\n", encoding="utf-8")
        for ending, numbers in (("", range(300)), ("-test", range(300, 340))):
            rows = [
                {
                    "text": f"{name} {WORDS[n % 6]} {WORDS[n // 6 % 6]} number {n}",
                    "answer": ("red", "green", "blue", "red")[n % 4],
                }
                for n in numbers
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}{ending}.jsonl").write_text(text, encoding="utf-8")
        files.append(file)
    return [load_task(file, tmp_path) for file in files]


def score(tasks: list[Task], output: Path, name: str, **engine: Any) -> tuple[Result, ...]:
    oracle = cast(Engine, OracleEngine(reference=name, **engine))
    return measure_shot_curves(oracle, tasks, output, SETTINGS, model_name=name).results


def load(tmp_path: Path) -> list[Measured]:
    return table.load(tmp_path / "records", tmp_path, BASE, ONE)[0]


def test_baselines_answer_the_queries_of_the_records_from_their_demonstrations(
    tasks: list[Task], tmp_path: Path
) -> None:
    records = [*score(tasks, tmp_path / "records", BASE, skill=0.1), *score(tasks, tmp_path / "records", ONE)]
    measured = {one.task.name: one for one in load(tmp_path)}
    for record in records:
        scores, point = measured[record.task].scores, record.num_shots
        row = 0 if point == 0 else record.seed
        system = record.model_name
        assert scores[system, point][row].mean() == pytest.approx(record.score)
        assert scores[MAJORITY, point].mean() == pytest.approx(record.majority)
        if record.tfidf is None:
            assert (TFIDF, point) not in scores
        else:
            assert scores[TFIDF, point][row].mean() == pytest.approx(record.tfidf)
    colours, sums = measured["colours"], measured["sums"]
    assert colours.shots == (0, 1, 4, 16, 32)
    # Linear models go on with further training rows.
    assert {shots for system, shots in colours.scores if system == VECTORS} == {1, 4, 16, 32, 256}
    assert {system for system, _ in sums.scores} == {BASE, ONE, MAJORITY, BM25}
    assert colours.scores[VECTORS, 16].shape == colours.scores[BM25, 16].shape == (2, 15)


def test_differences_are_the_paired_ones_of_a_report(tasks: list[Task], tmp_path: Path) -> None:
    records = [*score(tasks, tmp_path / "records", BASE, skill=0.1), *score(tasks, tmp_path / "records", ONE)]
    summary, measured = summarise(records), load(tmp_path)
    for family in ("classification", "math"):
        gain = table.over_tasks(table.members(measured, family), lambda one: one.gain((BASE, 16), 16))
        assert gain == summary.difference(BASE, ONE, family, 16)


def test_demonstrations_that_did_not_fit_are_given_to_no_baseline(tasks: list[Task], tmp_path: Path) -> None:
    score(tasks[:1], tmp_path / "records", BASE)
    records = score(tasks[:1], tmp_path / "records", ONE, max_context_tokens=900)
    shown = {record.num_shots_used for record in records if record.num_shots == 32}
    assert shown
    assert max(shown) < 32
    store = ResultStore(tmp_path / "records")
    for record in records:
        demonstrations = table.demonstrations_of(record, store.context(record), tasks[0])
        assert len(demonstrations) == record.num_shots_used


def change_points(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the lines of all files of results."""
    for path in (folder / "records").glob("*.results.jsonl"):
        points = [change(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        path.write_text("".join(json.dumps(point) + "\n" for point in points), encoding="utf-8")


def change_context(point: dict[str, Any]) -> dict[str, Any]:
    return {**point, "context": json.loads(json.dumps(point["context"]).replace("number 1", "number 9"))}


def without_confidences(point: dict[str, Any]) -> dict[str, Any]:
    return {**point, "predictions": [{**one, "confidence": None} for one in point["predictions"]]}


def test_a_context_with_other_demonstrations_is_refused(tasks: list[Task], tmp_path: Path) -> None:
    score(tasks, tmp_path / "records", BASE)
    record = score(tasks, tmp_path / "records", ONE)[2]
    change_points(tmp_path, lambda point: change_context(point) if point["record"]["key"] == record.key else point)
    with pytest.raises(UserError) as raised:
        load(tmp_path)
    assert raised.value.code == "demonstrations_changed"


def test_other_data_lost_predictions_and_an_unknown_model_are_refused(tasks: list[Task], tmp_path: Path) -> None:
    score(tasks[:1], tmp_path / "records", BASE)
    with pytest.raises(UserError) as raised:
        load(tmp_path)
    assert raised.value.code == "unknown_model"
    score(tasks[:1], tmp_path / "records", ONE)
    change_points(tmp_path, lambda point: {**point, "predictions": []})
    with pytest.raises(UserError) as raised:
        load(tmp_path)
    assert raised.value.code == "queries_changed"
    rows = (tmp_path / "colours.jsonl").read_text(encoding="utf-8")
    (tmp_path / "colours.jsonl").write_text(rows.replace("birch", "beech"), encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load(tmp_path)
    assert raised.value.code == "data_changed"


def test_all_tables_are_printed_and_every_row_has_the_columns_of_its_head(
    tasks: list[Task], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    score(tasks, tmp_path / "records", BASE, skill=0.1)
    score(tasks[:2], tmp_path / "records", ONE)
    assert table.main([str(tmp_path / "records"), str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.findall("^## (.*)", printed, re.MULTILINE) == [
        "Aims, mean over 2 classification tasks",
        "Means",
        "From how many examples on a linear model is better",
        "Calibration, classification tasks",
        "Tasks",
    ]
    assert "Expected calibration error" in printed
    assert "#### sums (math, exact_match)\n\nNot measured with both models." in printed
    for lines in re.findall(r"(?:^\|.*\n)+", printed, re.MULTILINE):
        assert len({line.count(" | ") for line in lines.splitlines()}) == 1
    assert table.main([str(tmp_path / "records"), str(tmp_path), "--model", "two"]) == 2
    change_points(tmp_path, without_confidences)
    assert table.main([str(tmp_path / "records"), str(tmp_path)]) == 0
    assert "hold no confidences" in capsys.readouterr().out


# --- What is computed of the scores


def measured_of(**scores: dict[int, Any]) -> Measured:
    names = {"base": BASE, "one": ONE, "majority": MAJORITY, "tfidf": TFIDF}
    tables = {
        (names[name], shots): np.atleast_2d(np.asarray(rows, dtype=float))
        for name, by_shots in scores.items()
        for shots, rows in by_shots.items()
    }
    return Measured(make_task(), tables)


def right(num_right: int, num_queries: int = 100) -> list[float]:
    return [1.0] * num_right + [0.0] * (num_queries - num_right)


def test_the_slope_is_the_gain_per_doubling_from_one_shot_on() -> None:
    measured = measured_of(one={0: [right(90)], 1: [right(10)] * 2, 4: [right(20)] * 2, 16: [right(30)] * 2})
    slope = table.slope(measured)
    assert slope is not None
    assert slope.mean == pytest.approx(0.05)
    # As of a difference of scores over all four doublings: never below 2 / (Q + 2).
    assert slope.standard_error is not None
    assert slope.standard_error * 4 == pytest.approx(max(np.std(rise(measured), ddof=1) / 10, 2 / 102))
    assert table.slope(measured_of(one={0: right(9), 1: right(9)})) is None


def rise(measured: Measured) -> np.ndarray:
    """Least squares, the obvious way: one fit per query."""
    x = [0.0, 2.0, 4.0]
    y = np.stack([measured.scores[ONE, shots][0] for shots in (1, 4, 16)])
    return np.asarray(np.polyfit(x, y, 1)[0] * 4)


def test_a_linear_model_is_better_from_where_it_stays_better() -> None:
    one = {1: right(50), 4: right(60), 16: right(70)}
    again = measured_of(one=one, tfidf={1: right(55), 4: right(20), 16: right(75), 256: right(90)})
    assert table.crossing(again, TFIDF) == table.Crossing(16, is_clear=True)
    lost = measured_of(one=one, tfidf={1: right(55), 4: right(65), 16: right(75), 256: right(69)})
    assert table.crossing(lost, TFIDF) == table.Crossing(None)
    assert table.crossing(measured_of(one=one, tfidf={4: right(61), 16: right(71)}), TFIDF) == table.Crossing(4)
    assert table.crossing(lost, VECTORS) is None


def test_the_aims_compare_with_the_base_at_its_best_and_with_the_majority() -> None:
    one = {0: right(20), 4: right(60), 16: right(80)}
    base = {0: right(40), 4: right(10), 16: right(30)}
    aims = table.aims([measured_of(one=one, base=base, majority={shots: right(35) for shots in one})])
    values = {aim.text: aim.estimate.mean for aim in aims if aim.estimate}
    assert [round(value, 6) for value in values.values()] == [0.5, 0.4, 0.4, 0.25, 0.45, 0.1]
    assert "base at 0 shots" in aims[1].text
    assert next(aim.verdict for aim in aims if "at 32 shots" in aim.text) == "not measured"
    aims = table.aims([measured_of(one=one, base=base, majority={shots: right(45) for shots in one})])
    assert "(in the mean: majority)" in aims[1].text


@pytest.mark.parametrize(
    ("mean", "verdict"),
    [
        (0.4, "reached"),
        (0.26, "reached, the interval holds the threshold"),
        (0.24, "missed, the interval holds the threshold"),
        (0.1, "missed"),
    ],
)
def test_a_verdict_says_whether_the_interval_leaves_it_open(mean: float, verdict: str) -> None:
    assert Aim("", Estimate(mean, 0.03, 100, pairing="paired"), 0.25).verdict == verdict


def test_no_gain_is_not_above_zero() -> None:
    assert Aim("", Estimate(0.0, 0.01, 100, pairing="paired")).verdict.startswith("missed")


def test_calibration_of_answers_whose_confidence_is_known() -> None:
    confidence = np.array([[0.95, 0.95, 0.55, 0.55, 1.0]])
    correct = np.array([[1.0, 0.0, 1.0, 0.0, 1.0]])
    # Bins: .9 to 1 holds three of accuracy 2/3 and confidence .9667; .5 to .6 two of 1/2 and .55.
    assert table.calibration_error(confidence, correct) == pytest.approx(0.6 * (0.29 / 0.3 - 2 / 3) + 0.4 * 0.05)
    assert table.covered_accuracy(confidence, correct) == pytest.approx(3 / 4)
    both = table.calibration([Confidences(confidence, correct), Confidences(correct, correct)])
    assert both.num_tasks == 2
    assert both.covered[0] == pytest.approx((3 / 4 + 3 / 4) / 2)
    assert both.accuracy == pytest.approx(0.6)
    assert both.error[1] > 0


def test_word_vectors_come_without_the_network() -> None:
    pytest.importorskip("toml", reason="needs the extra [benchmarks]")
    pytest.importorskip("wordllama", reason="needs the extra [benchmarks]")
    assert table.vectors(("a red hat", "the lamp")).shape == (2, 256)
