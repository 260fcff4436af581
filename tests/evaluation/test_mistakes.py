"""Where a model is wrong, counted by hand."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

from manyicl.cli.evaluate import _print_results
from manyicl.cli.report import report_command
from manyicl.errors import UserError
from manyicl.evaluation.mistakes import (
    Confusion,
    confusion_matrix,
    confusions,
    errors_as_csv,
    label_scores,
    pair_counts,
    without_answers,
    wrong_answers,
)
from manyicl.evaluation.report.task_mistakes import tasks_with_mistakes
from manyicl.evaluation.result import PredictedAnswer, ResultStore
from manyicl.evaluation.shot_curve import ShotCurves
from manyicl.evaluation.summary import summarise
from tests.evaluation.test_report import WellFormed
from tests.evaluation.test_summary import scored

# Expected, answered, confidence.
ANSWERS = (("a", "a", 0.9), ("a", "b", 0.6), ("a", "b", 0.8), ("b", "b", 0.7), ("b", "c", None), ("c", " c", 0.5))


def lines() -> list[PredictedAnswer]:
    return [
        PredictedAnswer(
            origin=f"test.jsonl:{row}",
            query=f"text, {row}",
            answer=answer,
            references=(expected,),
            scores={},
            log_probability=-0.1,
            confidence=confidence,
        )
        for row, (expected, answer, confidence) in enumerate(ANSWERS, start=1)
    ]


def test_every_label_has_its_scores() -> None:
    scores = {one.label: one for one in label_scores(pair_counts(lines()))}
    assert list(scores) == ["a", "b", "c"], "the most frequent first"
    assert scores["a"][1:] == pytest.approx((1.0, 1 / 3, 0.5, 3))
    assert scores["b"][1:] == pytest.approx((1 / 3, 1 / 2, 0.4, 2))
    assert scores["c"][1:] == pytest.approx((1 / 2, 1.0, 2 / 3, 1))


def test_the_matrix_counts_every_pair() -> None:
    labels, counts = confusion_matrix(pair_counts(lines()))
    assert labels == ["a", "b", "c"]
    assert counts == [[1, 2, 0], [0, 1, 1], [0, 0, 1]]


def test_the_matrix_of_a_single_label_is_a_number() -> None:
    assert confusion_matrix({("a", "a"): 3}) == (["a"], [[3]])


def test_another_accepted_answer_is_right_and_no_confusion() -> None:
    (line, *_) = lines()
    other = line.model_copy(update={"answer": "b", "references": ("a", "b")})
    assert pair_counts([other]) == {("b", "b"): 1}
    assert wrong_answers([other]) == []


def test_pairs_are_counted_and_wrong_answers_ordered_by_confidence() -> None:
    assert confusions(pair_counts(lines())) == [Confusion("a", "b", 2), Confusion("b", "c", 1)]
    # Without a confidence it is the probability of the text: exp(-0.1) is 0.90.
    assert [line.origin for line in wrong_answers(lines())] == ["test.jsonl:5", "test.jsonl:3", "test.jsonl:2"]


def test_every_wrong_answer_is_a_row() -> None:
    rows = list(csv.DictReader(io.StringIO(errors_as_csv([(scored("m", "t", 4, (1.0,)), lines())]))))
    assert [(row["expected"], row["answer"], row["confidence"]) for row in rows] == [
        ("b", "c", ""),
        ("a", "b", "0.8000"),
        ("a", "b", "0.6000"),
    ]
    other = scored("other", "u", 4, (1.0,))
    rows_of_both = csv.DictReader(
        io.StringIO(errors_as_csv([(scored("m", "t", 4, (1.0,)), lines()), (other, lines())]))
    )
    assert [(row["model"], row["confidence"]) for row in rows_of_both] == [
        (model, confidence) for confidence in ("", "0.8000", "0.6000") for model in ("m", "other")
    ], "the surest first, whatever the task"
    assert rows[0] | {} == {
        **rows[0],
        "task": "t",
        "model": "m",
        "shots": "4",
        "seed": "0",
        "order": "0",
        "query": "text, 5",
    }
    named = errors_as_csv([(other, lines())], {(other.line, other.model_fingerprint): "other (1234)"})
    assert {row["model"] for row in csv.DictReader(io.StringIO(named))} == {"other (1234)"}


def test_each_task_is_shown_by_the_last_model_that_was_measured_on_it(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    measured = (("t", 4, 0), ("t", 8, 0), ("u", 8, 0), ("t", 4, 2))
    records = [
        scored(
            "m", task, shots, (1.0, 0.0) * 3, num_labels=3, num_retrieved=retrieved, key=f"{task} {shots} {retrieved}"
        )
        for task, shots, retrieved in measured
    ]
    for record in records:
        store.save(record, lines(), [])
    found = tasks_with_mistakes(summarise(records), store)
    assert [(one.result.task, one.result.line, one.result.num_shots) for one in found] == [
        ("t", "m + 2 retrieved", 4),
        ("u", "m", 8),
    ]


def test_the_command_writes_them_and_the_page_shows_them(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results")
    store.save(scored("m", "t", 4, (1.0, 0.0) * 3).model_copy(update={"num_labels": 3}), lines(), [])
    errors = tmp_path / "wrong.csv"
    report_command(store.folder, errors=errors)
    assert len(errors.read_text(encoding="utf-8").splitlines()) == 4
    page = (store.folder / "report.html").read_text(encoding="utf-8")
    assert "3 of 6 wrong" in page
    matrix = page[page.index('<table class="matrix">') :].partition("</table>")[0]
    assert [int(count) for count in re.findall(r">(\d+)</td>", matrix)] == [1, 2, 0, 0, 1, 1, 0, 0, 1]
    assert "70 % sure on average and 60 % right" in page
    assert page.count("Accuracy against coverage") == 2
    parser = WellFormed()
    parser.feed(page)
    assert not parser.open
    drawn = re.findall(r' id="([pm][0-9a-f]{10})"', page[page.index('id="mistakes"') : page.index('id="provenance"')])
    assert len(drawn) == len(set(drawn)) > 0
    report_command(store.folder, errors=errors, examples=False)
    assert "text, 5" not in (store.folder / "report.html").read_text(encoding="utf-8")
    errors.write_text("mine\n", encoding="utf-8")
    with pytest.raises(UserError, match="was not written by this command"):
        report_command(store.folder, errors=errors)


def test_json_says_where_answers_are_wrong_at_every_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ResultStore(tmp_path / "results")
    for seed in (0, 1):
        key, scores = f"labelled {seed}", (1.0, 0.0) * 3
        store.save(scored("m", "t", 4, scores, num_labels=3, key=key, seed=seed), lines(), [])
    store.save(scored("m", "t", 8, (1.0, 0.0) * 3, num_labels=3, key="later"), lines()[:1], [])
    store.save(scored("m", "free", 4, (1.0, 0.0) * 3, key="free"), lines(), [])
    report_command(store.folder, as_json=True, quiet=True)
    points = {(one["task"], one["shots"]): one for one in json.loads(capsys.readouterr().out)}
    assert len(points) == 3
    first, later, free = (points[point] for point in (("t", 4), ("t", 8), ("free", 4)))
    assert (first["num_answers"], first["num_wrong"]) == (12, 6), "of both draws"
    assert [one["label"] for one in first["labels"]] == ["a", "b", "c"]
    assert first["labels"][0] == {"label": "a", "precision": 1, "recall": 1 / 3, "f1": 0.5, "num_queries": 6}
    assert first["confusions"] == [
        {"expected": "a", "answer": "b", "num_answers": 4},
        {"expected": "b", "answer": "c", "num_answers": 2},
    ]
    found = first["calibration"]
    assert (found["num_answers"], found["confidence"], found["accuracy"]) == (10, pytest.approx(0.7), 0.6)
    # Bins of 0.5 to 0.6, …: 0.9 and 0.7 and 0.5 are right, 0.6 and 0.8 are wrong.
    assert found["expected_calibration_error"] == pytest.approx((0.1 + 0.3 + 0.5 + 0.6 + 0.8) / 5)
    (surest,) = (one for one in found["coverage"] if one["least_share"] == 0.8)
    # The least sure of them, 0.5, was right.
    assert surest == {"least_share": 0.8, "share": 0.8, "threshold": 0.6, "accuracy": 0.5, "abstain_below": 0.6}
    assert sum(one["num_answers"] for one in found["bins"]) == 10
    assert (later["num_answers"], later["confusions"], later["calibration"]["accuracy"]) == (1, [], 1)
    for name in ("num_answers", "num_wrong", "labels", "confusions", "calibration"):
        assert free[name] is None


def test_results_without_answers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ResultStore(tmp_path / "results")
    labelled = scored("m", "t", 4, (1.0, 0.0) * 3).model_copy(update={"num_labels": 3})
    store.save(labelled, lines(), [])
    # As earlier versions wrote it, without the file of its answers.
    old = labelled.model_copy(update={"key": "old", "seed": 7})
    (store.folder / f"{old.stem}.result.json").write_text(old.model_dump_json(), encoding="utf-8")
    sentence = "No answers, and so no errors, are known of 1 result: t, m, 4 shots, seed 7."
    report_command(store.folder, errors=tmp_path / "wrong.csv", quiet=True)
    assert capsys.readouterr() == ("", f"{sentence}\n")
    assert sentence in (store.folder / "report.html").read_text(encoding="utf-8")
    _print_results(ShotCurves((labelled, old), 2), store.folder)
    assert capsys.readouterr().err == f"{sentence}\n"
    report_command(store.folder, examples=False)
    assert sentence not in (store.folder / "report.html").read_text(encoding="utf-8")


def test_many_results_without_answers_are_counted() -> None:
    results = [scored("m", "t", 4, (1.0,), seed=seed) for seed in range(1_007)]
    sentence = without_answers([(results[0], lines()), *((result, []) for result in results[1:])])
    assert sentence is not None
    assert "of 1,006 results: t, m, 4 shots, seed 1; " in sentence
    assert sentence.endswith("seed 5; and 1,001 more.")
    assert without_answers([(results[0], lines())]) is None


def test_a_folder_without_labels_has_no_errors_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ResultStore(tmp_path / "results")
    store.save(scored("m", "t", 4, (1.0, 0.0) * 3), lines(), [])
    errors = tmp_path / "wrong.csv"
    report_command(store.folder, errors=errors)
    assert capsys.readouterr().err == f"No task has labels, so {errors} has no rows.\n"
    assert len(errors.read_text(encoding="utf-8").splitlines()) == 1
