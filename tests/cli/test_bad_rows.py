"""One bad row costs its own answer alone, is said and counted; the others get what they get without it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from itertools import islice
from pathlib import Path

import pytest

from manyicl.engine.engine import Engine
from manyicl.errors import UserError
from tests.builders import make_task, tiny_loaded
from tests.cli.test_answers import predict
from tests.cli.test_predict import EARLIER, run
from tests.engine.parts import refused
from tests.engine.test_backend import free

Cells = dict[str, str | None]
GOOD: list[Cells] = [{"text": f"film {i} " + "was fine " * (i % 7)} for i in range(40)]
BAD: list[Cells] = [
    {"text": ""},
    {"text": " \n"},
    {"text": None},
    {"txt": "film"},
    {"text": "film " * 3000},
    {"text": "a \ud83d"},
]
CODES = ["empty_query", "empty_query", "empty_query", "missing_column", "query_too_long", "half_a_character"]


def mixed(good: list[Cells], every: int = 3) -> list[Cells]:
    """Good rows with bad ones among them."""
    rows = [BAD[0]]
    for number, row in enumerate(good):
        rows += [row] if number % every else [row, BAD[number % len(BAD)]]
    return rows


def test_good_rows_get_the_same_numbers_with_and_without_bad_rows_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyicl.engine.engine.FITTED_QUERIES", 16)
    monkeypatch.setattr("manyicl.engine.engine.READ_AHEAD_QUERIES", 8)
    engine = Engine.local(tiny_loaded(), max_context_tokens=200)
    for task in (make_task(), free()):
        alone = list(engine.answer(task, task.train, GOOD))
        together = list(engine.answer(task, task.train, mixed(GOOD), bad_rows="report"))
        assert len(together) == len(mixed(GOOD))
        assert [one for one in together if one.problem is None] == alone
        prefix = engine.prefill(task, task.train[:3])
        alone = list(engine.predict(prefix, GOOD))
        assert [one for one in engine.predict(prefix, mixed(GOOD), bad_rows="report") if not one.problem] == alone


def test_the_problem_of_every_kind_of_row_is_named_in_its_place() -> None:
    engine, task = Engine.local(tiny_loaded(), max_context_tokens=200), make_task()
    predictions = list(engine.answer(task, task.train, [GOOD[0], *BAD, GOOD[1]], bad_rows="report"))
    assert [one.problem and one.problem.code for one in predictions] == [None, *CODES, None]
    assert predictions[1].as_json()["answer"] is None
    assert predictions[1].as_json()["problem"] == "it is empty; expected a text to answer."
    for row, code in zip(BAD, CODES, strict=True):
        with refused(code, row=2):
            list(engine.answer(task, task.train, [GOOD[0], row]))


def test_a_row_too_long_with_its_retrieved_examples_takes_no_demonstration_from_the_others() -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    engine, task = Engine.local(tiny_loaded(), max_context_tokens=200), make_task()
    length = next(n for n in range(1, 200) if engine.num_reserved_tokens(task, ["film " * n]) > 185)
    rows = ["film", "film " * (length - 1), "play"]
    predictions = list(engine.answer(task, task.train, rows, num_retrieved=4, bad_rows="report"))
    assert [one.problem and one.problem.code for one in predictions] == [None, "query_too_long", None]
    assert predictions[0] == next(engine.answer(task, task.train, ["film", "play"], num_retrieved=4))
    assert predictions[0].num_shots > 0


def test_a_stream_of_bad_rows_alone_is_reported_as_it_comes() -> None:
    engine, task = Engine.local(tiny_loaded(), max_context_tokens=200), make_task()
    num_read = 0

    def rows() -> object:
        nonlocal num_read
        while True:
            num_read += 1
            yield {"text": ""}

    predictions = engine.answer(task, task.train, rows(), bad_rows="report")  # type: ignore[arg-type]
    assert all(one.problem for one in islice(predictions, 10_000))
    assert num_read < 20_000


def test_an_error_of_the_stream_itself_is_raised_after_the_rows_before_it() -> None:
    engine, task = Engine.local(tiny_loaded(), max_context_tokens=200), make_task()

    def rows() -> object:
        yield from [GOOD[0], BAD[0]]
        raise UserError("broken_json", "it is broken")

    predictions = engine.answer(task, task.train, rows(), bad_rows="report")  # type: ignore[arg-type]
    assert [bool(one.problem) for one in islice(predictions, 2)] == [False, True]
    with refused("broken_json"):
        next(predictions)


def test_bad_rows_of_a_file_get_an_empty_answer_and_a_problem_and_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    queries, output = tmp_path / "new.csv", tmp_path / "answers.csv"
    queries.write_text('id,text\n1,film\n2,\n3,"  "\n4,' + "film " * 3000 + "\n5,play\n", encoding="utf-8")
    assert predict(monkeypatch, model_folder, table, queries, output) == 3
    assert "3 of 5 rows could not be answered; the column `problem` says why." in capsys.readouterr().err
    rows = list(csv.DictReader(io.StringIO(output.read_text(encoding="utf-8"))))
    assert [row["id"] for row in rows] == list("12345")
    assert [bool(row["answer"]) for row in rows] == [True, False, False, False, True]
    assert [row["problem"][:11] for row in rows] == ["", "it is empty", "it is empty", rows[3]["problem"][:11], ""]
    assert "tokens are needed" in rows[3]["problem"]
    assert {row["log_probability"] for row in rows if row["problem"]} == {""}
    before = output.read_bytes()
    arguments = ["predict", "-m", model_folder, "-t", f"{table}:text:label", "--shots", 2, "--input", queries]
    assert run(monkeypatch, *arguments, "--output", output, "--bad-rows", "refuse") == 2
    assert "new.csv:3: it is empty" in capsys.readouterr().err
    assert output.read_bytes() == before
    queries.write_text("id,text,problem\n1,film,mine\n", encoding="utf-8")
    assert run(monkeypatch, *arguments, "--output", output, "--bad-rows", "refuse") == 0
    assert "problem" in output.read_text(encoding="utf-8").splitlines()[0].split(",")
    assert predict(monkeypatch, model_folder, table, queries, output) == 0
    (row,) = csv.DictReader(io.StringIO(output.read_text(encoding="utf-8")))
    assert (row["input_problem"], row["problem"]) == ("mine", "")


def test_bad_lines_of_a_stream_are_reported_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "film"}\n{"txt": "film"}\n{"text": "play"}\n'))
    arguments = ["predict", "-m", model_folder, "-t", f"{table}:text:label", "--shots", 2, "--input", "-"]
    assert run(monkeypatch, *arguments) == 3
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert "1 of 3 rows" in printed.err
    assert [row["answer"] is None for row in rows] == [False, True, False]
    assert "names the column 'text', which is missing" in rows[1]["problem"]
    assert rows[1]["txt"] == "film"


@pytest.mark.parametrize("name", ["new.csv", "new.tsv", "new.csv.gz", "new.parquet", "new.xlsx"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_header_without_rows_gives_one_without_rows(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path, name: str, ending: str
) -> None:
    queries, output = tmp_path / name, tmp_path / f"answers.{ending}"
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"answer": [], "text": []}), queries)
    elif name.endswith(".xlsx"):
        openpyxl = pytest.importorskip("openpyxl", reason="needs the extra [excel]")
        workbook = openpyxl.Workbook()
        workbook.active.append(["answer", "text"])
        workbook.save(queries)
    else:
        header = "answer\ttext\n" if name.endswith("tsv") else "answer,text\n"
        queries.write_bytes(gzip.compress(header.encode()) if name.endswith("gz") else header.encode())
    if ending == "jsonl":
        output.write_text(EARLIER, encoding="utf-8")
    assert predict(monkeypatch, model_folder, table, queries, output) == 0
    header = "input_answer,text,answer,probability,second,second_probability,log_probability,stopped,problem\r\n"
    assert output.read_bytes().decode() == (header if ending == "csv" else "")
    prefix = tmp_path / "t.prefix"
    assert run(monkeypatch, "compile", "-m", model_folder, "-t", f"{table}:text:label", "-o", prefix, "--shots", 2) == 0
    arguments = ["predict", "-m", model_folder, "--prefix", prefix, "--input", queries, "--output", output]
    assert run(monkeypatch, *arguments) == 0
    assert output.read_bytes().decode() == (header if ending == "csv" else "")


@pytest.mark.parametrize(("content", "sentence"), [("", "no row to answer"), ("txt\n", "names the column 'text'")])
def test_an_empty_file_and_a_header_without_the_column_are_refused_and_leave_earlier_answers(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    tmp_path: Path,
    content: str,
    sentence: str,
) -> None:
    queries, output = tmp_path / "new.csv", tmp_path / "answers.jsonl"
    output.write_text(EARLIER, encoding="utf-8")
    for rows in ("", "a\nb\n") if content else ("",):
        queries.write_text(content + rows, encoding="utf-8")
        assert predict(monkeypatch, model_folder, table, queries, output) == 2
        assert sentence in capsys.readouterr().err
        assert output.read_text(encoding="utf-8") == EARLIER
    assert not list(tmp_path.glob("*.part*"))


def test_a_blank_line_in_a_file_of_one_column_is_a_row_with_a_problem(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    queries, output = tmp_path / "new.csv", tmp_path / "answers.csv"
    queries.write_text("text\nfilm\n\nplay\n\n", encoding="utf-8")
    arguments = ["predict", "-m", model_folder, "-t", f"{table}:text:label", "--shots", 2]
    assert run(monkeypatch, *arguments, "--input", queries, "--output", output) == 3
    rows = list(csv.DictReader(io.StringIO(output.read_text(encoding="utf-8"))))
    assert [(row["text"], bool(row["problem"])) for row in rows] == [("film", False), ("", True), ("play", False)]
