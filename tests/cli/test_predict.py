"""Queries in, answers out, in order; and one sentence for what cannot be asked."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from manyicl.cli.main import main


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
    output.write_text("earlier\n", encoding="utf-8")
    lines = "".join(f'{{"text": "film {i}"}}\n' for i in range(300))
    monkeypatch.setattr("sys.stdin", io.StringIO(lines + "broken\n"))
    arguments = ["predict", "--model", model_folder, "--task", f"{table}:text:label", "--shots", 2, "--input", "-"]
    assert run(monkeypatch, *arguments, "--output", output) == 2
    assert output.read_text(encoding="utf-8") == "earlier\n"
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
