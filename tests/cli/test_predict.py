"""Queries in, answers out, in order; and one sentence for what cannot be asked."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from manyicl.cli.main import main

EARLIER = '{"text": "film", "answer": "good", "log_probability": -0.5, "stopped": true}\n'


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command as a shell would, and return its exit code."""
    monkeypatch.setattr("sys.argv", ["manyicl", *map(str, arguments)])
    try:
        main()
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


def test_answers_stand_beside_their_queries_in_order(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    queries = tmp_path / "new.csv"
    queries.write_text("id,text,answer\n" + "".join(f"00{i},play {i},old\n" for i in range(40)), encoding="utf-8")
    output = tmp_path / "answers.csv"
    arguments = ["predict", "--model", model_folder, "--task", f"{table}:text:label", "--shots", 4]
    assert run(monkeypatch, *arguments, "--input", queries, "--output", output) == 0
    rows = list(csv.DictReader(io.StringIO(output.read_text(encoding="utf-8"))))
    assert [row["id"] for row in rows] == [f"00{i}" for i in range(40)]
    assert {row["answer"] for row in rows} <= {"good", "bad"}
    assert {row["input_answer"] for row in rows} == {"old"}
    assert all(float(row["log_probability"]) < 0 for row in rows)


def test_standard_input_is_answered_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "film"}\n\n{"text": "play"}\n'))
    arguments = ["predict", "--model", model_folder, "--task", f"{table}:text:label", "--shots", 2, "--scores"]
    assert run(monkeypatch, *arguments, "--input", "-") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == ["film", "play"]
    assert set(rows[0]["scores"]) == {"good", "bad"}
    assert max(rows[0]["scores"], key=rows[0]["scores"].get) == rows[0]["answer"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--model": "runs/nowhere"}, "does not exist"),
        ({"--input": "nowhere.csv"}, "nowhere.csv"),
        ({"--output": "answers.txt"}, ".jsonl or .csv"),
        ({"--output": "nowhere/answers.csv"}, "folder"),
        ({"--shots": 4000}, "4000"),
        ({"--shots": -3}, "greater than or equal to 0"),
        ({"--task": "nowhere.csv:text:label"}, "nowhere.csv"),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    changes: dict[str, object],
    sentence: str,
) -> None:
    arguments = {"--model": model_folder, "--task": f"{table}:text:label", "--input": table, "--output": "-"}
    flat = [part for pair in {**arguments, **changes}.items() for part in pair]
    assert run(monkeypatch, "predict", *flat) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert "Traceback" not in printed


def test_a_broken_line_of_standard_input_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "film"}\n{"text": \n'))
    arguments = ["predict", "--model", model_folder, "--task", f"{table}:text:label", "--shots", 2, "--input", "-"]
    assert run(monkeypatch, *arguments) == 2
    assert "standard input:2" in capsys.readouterr().err


def test_an_input_is_never_written_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path
) -> None:
    before = table.read_bytes()
    arguments = ["predict", "--model", model_folder, "--task", f"{table}:text:label", "--input", table]
    assert run(monkeypatch, *arguments, "--output", table) == 2
    assert "same file" in capsys.readouterr().err
    assert table.read_bytes() == before


def test_an_error_half_way_leaves_an_earlier_output_as_it_was(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text(EARLIER, encoding="utf-8")
    lines = "".join(f'{{"text": "film {i}"}}\n' for i in range(300))
    monkeypatch.setattr("sys.stdin", io.StringIO(lines + "broken\n"))
    arguments = ["predict", "--model", model_folder, "--task", f"{table}:text:label", "--shots", 2, "--input", "-"]
    assert run(monkeypatch, *arguments, "--output", output) == 2
    assert output.read_text(encoding="utf-8") == EARLIER
    assert (tmp_path / "answers.jsonl.part").read_text(encoding="utf-8").count("\n") == 300


def test_queries_longer_than_any_test_row_still_fit_behind_all_demonstrations(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    queries = tmp_path / "long.jsonl"
    queries.write_text(json.dumps({"text": "film " * 60}) + "\n", encoding="utf-8")
    output = tmp_path / "answers.jsonl"
    arguments = ["predict", "--model", model_folder, "--task", f"{table}:text:label,test_fraction=0"]
    context = ["--max-context-tokens", 300]
    assert run(monkeypatch, *arguments, *context, "--input", queries, "--output", output) == 0
    assert len(output.read_text(encoding="utf-8").splitlines()) == 1


def test_earlier_answers_are_replaced_and_rows_of_a_person_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    prefix, mine = tmp_path / "t.prefix", tmp_path / "other.csv"
    assert run(monkeypatch, "compile", "-m", model_folder, "-t", f"{table}:text:label", "-o", prefix, "--shots", 4) == 0
    queries = tmp_path / "new.jsonl"
    queries.write_text('{"text": "film"}\n', encoding="utf-8")
    arguments = ["predict", "--model", model_folder, "--prefix", prefix, "--input", queries, "--output"]
    for name in ("answers.jsonl", "answers.csv"):
        for _ in range(2):
            assert run(monkeypatch, *arguments, tmp_path / name) == 0
    mine.write_bytes(table.read_bytes())
    for path in (table, mine):
        before = path.read_bytes()
        assert run(monkeypatch, *arguments, path) == 2
        assert "not written by this command" in capsys.readouterr().err
        assert path.read_bytes() == before
    table.write_text("text,label,answer,log_probability\nfilm,good,good,-1\n", encoding="utf-8")
    assert run(monkeypatch, *arguments, table) == 2
    assert "rows of task 'tickets'" in capsys.readouterr().err


def test_no_answers_are_promised_where_there_are_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.csv"
    arguments = ["predict", "--model", model_folder, "--task", f"{table}:text:label", "--shots", 2, "--input", "-"]
    monkeypatch.setattr("sys.stdin", io.StringIO("broken\n"))
    assert run(monkeypatch, *arguments, "--output", output) == 2
    assert ".part" not in capsys.readouterr().err
    assert not list(tmp_path.glob("answers.csv*"))


def test_queries_are_read_as_the_rows_of_the_task_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    (folder / "task.yaml").write_text(
        "family: classification\nquery: '{{ text }}'\nanswer: '{{ label }}'\n"
        "data: {train: rows.csv, delimiter: ';', quotes: none}\n",
        encoding="utf-8",
    )
    (folder / "rows.csv").write_text('text;label\na "film;good\na play;bad\n', encoding="utf-8")
    queries, table = tmp_path / "new.csv", tmp_path / "new.tsv"
    queries.write_text('id;text\n1;the "film\n', encoding="utf-8")
    table.write_text("id\ttext\n1\tthe film\n", encoding="utf-8")
    arguments = ["predict", "--model", model_folder, "--task", folder, "--input"]
    for path, text in ((queries, 'the "film'), (table, "the film")):
        assert run(monkeypatch, *arguments, path) == 0
        assert json.loads(capsys.readouterr().out)["text"] == text
    queries.write_text("id|text\n1|the film\n", encoding="utf-8")
    assert run(monkeypatch, *arguments, queries, "--delimiter", "|") == 0
    assert json.loads(capsys.readouterr().out)["text"] == "the film"


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
def test_streams_are_utf_8_whatever_the_locale_says(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, encoding: str
) -> None:
    sent = '\ufeff{"text": "é 差"}\n{"text": "è"}\n'.encode()
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(sent), encoding=encoding))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding=encoding, write_through=True))
    arguments = ["predict", "--model", model_folder, "--task", f"{table}:text:label", "--shots", 2, "--input", "-"]
    assert run(monkeypatch, *arguments) == 0
    rows = [json.loads(line) for line in written.getvalue().decode("utf-8").splitlines()]
    assert [row["text"] for row in rows] == ["é 差", "è"]


def test_a_line_of_standard_input_that_is_not_utf_8_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path
) -> None:
    sent = '{"text": "é"}\n'.encode() * 3 + '{"text": "é"}\n'.encode("latin-1")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(sent)))
    arguments = ["predict", "--model", model_folder, "--task", f"{table}:text:label", "--shots", 2, "--input", "-"]
    assert run(monkeypatch, *arguments) == 2
    assert "standard input:4: not text in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stream", "says"), [("stdin", "standard input is closed"), ("stdout", "standard output is closed")]
)
def test_a_closed_stream_is_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    stream: str,
    says: str,
) -> None:
    monkeypatch.setattr(f"sys.{stream}", None)
    arguments = ["predict", "--model", model_folder, "--task", f"{table}:text:label", "--shots", 2, "--input", "-"]
    assert run(monkeypatch, *arguments) == 2
    assert says in capsys.readouterr().err
