"""Answers are complete or not there; what an input row held comes back as it was; two runs never share an output."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from manyicl.cli.unfinished import answers_written
from manyicl.tasks.rows import iter_rows
from manyicl.tasks.task import Task
from tests.cli.test_predict import EARLIER, run
from tests.engine.parts import refused


def predict(monkeypatch: pytest.MonkeyPatch, model: Path, table: Path, queries: Path | str, output: Path) -> int:
    arguments = ["predict", "--model", model, "--task", f"{table}:text:label", "--shots", 2, "--input", queries]
    return run(monkeypatch, *arguments, "--output", output)


def test_half_a_character_in_a_carried_column_is_an_escape_in_both_kinds_of_output(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    queries = tmp_path / "new.jsonl"
    queries.write_text('{"text": "film", "note": "a \\ud83d b"}\n', encoding="utf-8")
    assert predict(monkeypatch, model_folder, table, queries, tmp_path / "answers.csv") == 0
    (row,) = csv.DictReader(io.StringIO((tmp_path / "answers.csv").read_text(encoding="utf-8")))
    assert row["note"] == "a \\ud83d b"
    assert predict(monkeypatch, model_folder, table, queries, tmp_path / "answers.jsonl") == 0
    assert json.loads((tmp_path / "answers.jsonl").read_text(encoding="utf-8"))["note"] == "a \ud83d b"
    assert not list(tmp_path.glob("*.part*"))


def test_numbers_and_truth_values_of_a_row_come_back_as_they_were(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    row = {"id": 3, "share": 0.25, "code": "007", "done": True, "none": None, "ids": [1, "2", {"a": 3.5}]}
    queries = tmp_path / "new.jsonl"
    numbers = '"sum": 1.10, "big": 12345678901234567890123, "tiny": 1E-7, "huge": 1e400, "more": [-0.0, {"a": 2.50}]'
    queries.write_text(json.dumps({"text": "film", **row})[:-1] + f", {numbers}}}\n", encoding="utf-8")
    assert predict(monkeypatch, model_folder, table, queries, tmp_path / "answers.jsonl") == 0
    written = (tmp_path / "answers.jsonl").read_text(encoding="utf-8")
    answer = json.loads(written)
    assert {name: answer[name] for name in row} == row
    assert numbers in written
    assert predict(monkeypatch, model_folder, table, queries, tmp_path / "answers.csv") == 0
    (fields,) = csv.DictReader(io.StringIO((tmp_path / "answers.csv").read_text(encoding="utf-8")))
    assert [fields[name] for name in row] == ["3", "0.25", "007", "true", "", '[1, "2", {"a": 3.5}]']
    assert fields["stopped"] == "true"


def test_numbers_of_parquet_come_back_as_numbers(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"text": ["film"], "id": [3], "share": [0.5], "done": [False]}), tmp_path / "new.parquet"
    )
    assert predict(monkeypatch, model_folder, table, tmp_path / "new.parquet", tmp_path / "answers.jsonl") == 0
    answer = json.loads((tmp_path / "answers.jsonl").read_text(encoding="utf-8"))
    assert (answer["id"], answer["share"], answer["done"]) == (3, 0.5, False)


@pytest.mark.parametrize("sent", ["", "\n \n"])
def test_an_empty_stream_replaces_no_earlier_answers(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    tmp_path: Path,
    sent: str,
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text(EARLIER, encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO(sent))
    assert predict(monkeypatch, model_folder, table, "-", output) == 2
    assert "there is no row to answer" in capsys.readouterr().err
    assert output.read_text(encoding="utf-8") == EARLIER
    assert not list(tmp_path.glob("*.part*"))


def test_the_second_of_two_runs_on_one_output_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    rows: list[dict[str, Any]] = [{"text": "film", "answer": "good", "log_probability": -1.0}]
    with answers_written(output, {}) as answers:
        with refused("output_in_progress", file=str(output)):
            answers_written(output, {}).__enter__()
        answers.begin(None, print)
        assert answers.write(rows) == 1
    assert json.loads(output.read_text(encoding="utf-8")) == rows[0]
    assert not list(tmp_path.glob("*.part*"))


def test_an_ending_in_capitals_is_the_same_format(tmp_path: Path) -> None:
    output = tmp_path / "answers.CSV"
    for log_probability in (-1.0, -2.0):  # the second run replaces the first one's file
        with answers_written(output, {}) as answers:
            answers.begin(None, print)
            answers.write([{"answer": "good", "log_probability": log_probability}])
    assert output.read_text(encoding="utf-8").split() == ["answer,log_probability", "good,-2.0"]


@pytest.mark.parametrize("num_rows", [0, 2])
def test_whatever_ends_a_run_leaves_a_part_only_where_there_are_answers(tmp_path: Path, num_rows: int) -> None:
    def rows() -> Any:
        yield from [{"answer": "good", "log_probability": -1.0}] * num_rows
        raise RuntimeError("not expected")

    def write() -> None:
        with answers_written(tmp_path / "answers.jsonl", {}) as answers:
            answers.begin(None, print)
            answers.write(rows())

    with pytest.raises(RuntimeError):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl.part"][: min(num_rows, 1)]


def test_a_row_of_a_file_is_rendered_once(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    rendered: Counter[str] = Counter()
    render = Task.query

    def count(self: Task, row: Any) -> Any:
        rendered[row["text"]] += 1
        return render(self, row)

    monkeypatch.setattr(Task, "query", count)
    monkeypatch.setattr("manyicl.engine.engine.FITTED_QUERIES", 5)
    queries = tmp_path / "new.jsonl"
    queries.write_text("".join(json.dumps({"text": f"film {i}"}) + "\n" for i in range(12)), encoding="utf-8")
    assert predict(monkeypatch, model_folder, table, queries, tmp_path / "answers.jsonl") == 0
    assert rendered == {f"film {i}": 1 for i in range(12)}
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [answer["text"] for answer in answers] == [f"film {i}" for i in range(12)]


@pytest.mark.parametrize("name", ["new.jsonl", "new.csv", "new.parquet"])
def test_a_file_is_read_no_further_than_its_answers_need(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"film {i}", "id": str(i)} for i in range(5_000)]
    path = tmp_path / name
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n", encoding="utf-8")
    elif name.endswith(".csv"):
        lines = "".join(f"{row['text']},{row['id']}\n" for row in rows)
        path.write_text(f"text,id\n{lines}a,b,c\n", encoding="utf-8")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = iter_rows(path)
    assert [row.columns for row in islice(read, 4_999)] == rows[:4_999]
    if not name.endswith(".parquet"):
        with refused(
            "broken_json" if name.endswith(".jsonl") else "wrong_number_of_fields", row=5_001 + ("csv" in name)
        ):
            list(read)
