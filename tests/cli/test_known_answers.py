"""Queries that have their answers are scored, whole or in two runs, and every other row is counted."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from sklearn.metrics import accuracy_score, f1_score

from tests.cli.test_predict import run
from tests.cli.test_unfinished import interrupted


@pytest.fixture(name="queries")
def _queries(tmp_path: Path) -> Path:
    """60 rows: every tenth without an answer, one with a label that is none, one without a text."""
    rows = [["text", "label"], *([f"play {i} film", ("good", "bad", "good")[i % 3]] for i in range(60))]
    for number in range(10, 61, 10):
        rows[number][1] = ""
    rows[5][1], rows[7][0] = "goood", ""
    path = tmp_path / "new.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def scored_lines(printed: str) -> str:
    return printed[printed.index("Compared with") :] if "Compared with" in printed else ""


def test_rows_with_an_answer_are_scored_and_all_others_counted(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    queries: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "answers.csv"
    common = ["predict", "-m", model_folder, "-t", f"{table}:text:label", "--shots", 4, "--input", queries]
    assert run(monkeypatch, *common, "--output", output) == 3
    printed = scored_lines(capsys.readouterr().err)
    rows = list(csv.DictReader(io.StringIO(output.read_text(encoding="utf-8"))))
    usable = [row for row in rows if row["label"] in ("good", "bad") and row["answer"]]
    truth, answered = [row["label"] for row in usable], [row["answer"] for row in usable]
    assert len(usable) == 60 - 6 - 2
    scores = (
        f"accuracy {accuracy_score(truth, answered):.3f}, macro_f1 {f1_score(truth, answered, average='macro'):.3f}"
    )
    assert printed.startswith(f"Compared with `label`: {scores}, 52 rows.")
    assert "In no score: 6 rows without an answer there; 1 row whose answer there is none of the task's (" in printed
    assert "'goood'" in printed
    assert "; 1 row that could not be answered." in printed
    assert interrupted(monkeypatch, [*common[1:], "--output", tmp_path / "cut.csv"], 25) == 130
    assert run(monkeypatch, *common, "--output", tmp_path / "cut.csv") == 3
    again = capsys.readouterr().err
    assert "Continuing after 25 answers" in again
    assert scored_lines(again).splitlines()[:-1] == printed.replace("answers.csv", "cut.csv").splitlines()[:-1]


def test_abstained_rows_are_in_no_score_also_where_a_run_is_continued(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    queries: Path,
    tmp_path: Path,
) -> None:
    common = ["predict", "-m", model_folder, "-t", f"{table}:text:label", "--shots", 4, "--input", queries]
    for suffix in ("csv", "jsonl"):
        output = tmp_path / f"answers.{suffix}"
        arguments = [*common[1:], "--abstain-below", 1, "--output", output]
        assert run(monkeypatch, "predict", *arguments) == 3
        printed = scored_lines(capsys.readouterr().err)
        assert printed.startswith("Compared with `label`: no score, 0 rows.")
        assert "52 rows for which the model abstained (its guess would have been right for" in printed
        assert interrupted(monkeypatch, arguments, 25) == 130
        capsys.readouterr()
        assert run(monkeypatch, "predict", *arguments) == 3
        assert scored_lines(capsys.readouterr().err) == printed


def test_a_compiled_task_knows_its_answers_and_what_it_has_in_its_context(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    prefix, task = tmp_path / "t.prefix", f"{table}:text:label,test_fraction=0"
    assert run(monkeypatch, "compile", "-m", model_folder, "-t", task, "-o", prefix, "--shots", 8) == 0
    common = ["predict", "-m", model_folder, "--input", table, "--output", tmp_path / "answers.csv"]
    for source in (["--prefix", prefix], ["-t", task, "--shots", 8], ["--prefix", prefix, "-t", task]):
        capsys.readouterr()
        assert run(monkeypatch, *common, *source) == 0
        printed = scored_lines(capsys.readouterr().err)
        assert ", 40 rows." in printed
        assert "8 of the scored rows are among the examples that the model is given" in printed


def test_rows_without_such_a_column_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    queries = tmp_path / "new.jsonl"
    queries.write_text('{"text": "film", "answer": "good"}\n', encoding="utf-8")
    common = ["predict", "-m", model_folder, "-t", f"{table}:text:label", "--shots", 4, "--input", queries]
    assert run(monkeypatch, *common, "--output", tmp_path / "answers.jsonl") == 0
    assert "Compared" not in capsys.readouterr().err
    rows = [{"text": "film", "label": "good"}, {"text": "play"}]
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert run(monkeypatch, *common, "--output", tmp_path / "answers.jsonl") == 0
    printed = scored_lines(capsys.readouterr().err)
    assert ", 1 row." in printed
    assert "In no score: 1 row without an answer there." in printed


def test_an_earlier_output_is_no_truth_to_compare_with(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,answer\n" + "".join(f"film {n},{'good' if n % 2 else 'bad'}\n" for n in range(12)))
    common = ["predict", "-m", model_folder, "-t", f"{rows}:text:answer", "--shots", 4]
    assert run(monkeypatch, *common, "--input", rows, "--output", tmp_path / "first.csv") == 0
    assert "Compared with `answer`: accuracy" in capsys.readouterr().err
    # A link to an output leads to the answers to come, too, and who may read it stays who may.
    (tmp_path / "second.csv").write_bytes((tmp_path / "first.csv").read_bytes())
    (tmp_path / "second.csv").chmod(0o640)
    (tmp_path / "link.csv").symlink_to("second.csv")
    before = (tmp_path / "second.csv").read_bytes()
    assert run(monkeypatch, *common, "--input", tmp_path / "first.csv", "--output", tmp_path / "link.csv") == 0
    assert "Compared with nothing: the column `answer` of the rows holds earlier" in capsys.readouterr().err
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "second.csv").read_bytes() != before
    assert (tmp_path / "second.csv").stat().st_mode & 0o777 == 0o640


def test_rows_that_lack_the_column_are_counted_wherever_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    queries = tmp_path / "new.jsonl"
    rows = [{"text": "play"}, {"text": "film"}, {"text": "film", "label": "good"}, {"text": "fun"}]
    queries.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    arguments = ["predict", "-m", model_folder, "-t", f"{table}:text:label", "--shots", 4, "--input", queries, "--json"]
    assert run(monkeypatch, *arguments, "--output", tmp_path / "answers.jsonl") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert (scores["num_rows"], scores["num_scored"], scores["num_without"]) == (4, 1, 3)


def test_the_count_is_printed_where_no_row_has_an_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    queries = tmp_path / "new.csv"
    queries.write_text("text,label\nfilm,\nplay,\n", encoding="utf-8")
    arguments = ["predict", "-m", model_folder, "-t", f"{table}:text:label", "--shots", 4, "--input", queries]
    assert run(monkeypatch, *arguments, "--output", tmp_path / "answers.csv") == 0
    printed = scored_lines(capsys.readouterr().err)
    assert printed.startswith("Compared with `label`: no score, 0 rows.\nIn no score: 2 rows without an answer there.")
    assert run(monkeypatch, *arguments, "--json", "--output", tmp_path / "again.csv") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert (scores["num_rows"], scores["num_without"], scores["accuracy"]) == (2, 2, None)
