"""`manyicl report`: a folder of records in, a table and a page out."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from manyicl.cli.report import report_command
from manyicl.errors import UserError
from manyicl.evaluation.result import PredictedAnswer, ResultStore
from tests.evaluation.test_summary import RECORDS, scored


def test_it_prints_a_table_and_writes_page_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, record in enumerate(RECORDS):
        ResultStore(tmp_path).save(record.model_copy(update={"key": f"{number:016}"}), [], [])
    report_command(tmp_path, plot=tmp_path / "curves.svg")
    printed = capsys.readouterr().out
    assert "mean over families" in printed
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "curves.svg").is_file()


def test_wrong_answers_are_those_of_the_results_that_are_shown(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results")
    answers = [
        PredictedAnswer(origin=f"t:{n}", query="q", answer="x", references=("y",), scores={}, log_probability=-1.0)
        for n in range(2)
    ]
    shown = [
        scored(
            "m",
            "a",
            4,
            (0.0, 0.0),
            num_labels=2,
            key=f"{fingerprint}{order}",
            model_fingerprint=fingerprint,
            order=order,
        )
        for fingerprint in ("11", "22")
        for order in (0, 1)
    ]
    hidden = scored("m", "a", 16, (0.0,), num_labels=2, key="fewer", model_fingerprint="11", queries_hash="fewer")
    for record in (*shown, hidden):
        store.save(record, answers[: record.num_queries], [])
    report_command(store.folder, errors=tmp_path / "wrong.csv", quiet=True)
    rows = csv.DictReader(io.StringIO((tmp_path / "wrong.csv").read_text(encoding="utf-8")))
    places = [(row["model"], row["shots"], row["order"], row["origin"]) for row in rows]
    assert sorted(places) == [
        (f"m ({m})", "4", order, f"t:{n}") for m in ("11", "22") for order in "01" for n in (0, 1)
    ]
    report_command(store.folder, errors=tmp_path / "wrong.csv", quiet=True)  # replaces its own
    (tmp_path / "wrong.csv").write_text("task,model,shots,seed,origin,query,expected,answer,confidence\n")
    report_command(store.folder, errors=tmp_path / "wrong.csv", quiet=True)  # and that of an earlier version


def test_a_folder_without_records_is_a_persons_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no result"):
        report_command(tmp_path)


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.result.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"x\.result\.json"):
        report_command(tmp_path)


def test_json_is_all_that_is_printed_and_quiet_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, record in enumerate(RECORDS):
        ResultStore(tmp_path).save(record.model_copy(update={"key": f"{number:016}"}), [], [])
    report_command(tmp_path, as_json=True)
    printed = capsys.readouterr()
    scores = json.loads(printed.out)
    assert {(one["model"], one["task"], one["shots"]) for one in scores} == {
        (one.model_name, one.task, one.num_shots) for one in RECORDS
    }
    assert all(one["interval"] is None or one["interval"][0] <= one["score"] <= one["interval"][1] for one in scores)
    assert (tmp_path / "report.html").is_file()
    report_command(tmp_path, quiet=True)
    assert capsys.readouterr() == ("", "")
