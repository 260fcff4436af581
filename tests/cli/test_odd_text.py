"""Commands take and give text of any script unharmed, and let none of it steer a terminal."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.table import Table

from manyicl.printing import new_console, printable
from tests.cli.test_predict import run
from tests.odd_text import TEXTS


@pytest.fixture(name="odd_table")
def _odd_table(tmp_path: Path) -> Path:
    path = tmp_path / "odd.jsonl"
    labels = ("хорошо", "差", "\u05d8\u05d5\u05d1\u200f", "\U0001f44d\U0001f3fd", "go\u202eod", "[bold]red[/nope]")
    rows = [{"text": f"{text} {i}", "label": labels[i % 6]} for i, text in enumerate([*TEXTS.values()] * 2)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_queries_of_every_script_come_back_beside_their_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, odd_table: Path
) -> None:
    task = f"{odd_table}:text:label"
    arguments = ["predict", "--model", model_folder, "--task", task, "--shots", 2, "--input"]
    queries = odd_table.with_name("queries.jsonl")
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS.values()]
    queries.write_text("\n".join(lines), encoding="utf-8")
    labels = {json.loads(line)["label"] for line in odd_table.read_text(encoding="utf-8").rstrip("\n").split("\n")}
    for name in ("answers.jsonl", "answers.csv"):
        output = odd_table.with_name(name)
        assert run(monkeypatch, *arguments, queries, "--output", output) == 0
        written = output.read_bytes().decode("utf-8")
        if name.endswith(".csv"):
            rows = list(csv.DictReader(io.StringIO(written, newline="")))
        else:
            rows = [json.loads(line) for line in written.rstrip("\n").split("\n")]
        assert [row["text"] for row in rows] == list(TEXTS.values())
        assert {row["answer"] for row in rows} <= labels
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert run(monkeypatch, *arguments, "-") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.rstrip("\n").split("\n")]
    assert [row["text"] for row in rows] == list(TEXTS.values())


@pytest.mark.parametrize("with_model", [False, True])
def test_a_task_of_every_script_is_checked_and_shown_without_steering_the_terminal(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    odd_table: Path,
    with_model: bool,
) -> None:
    model = ["--model", model_folder] if with_model else []
    for command in (["check"], ["show", "--shots", 40]):
        assert run(monkeypatch, "tasks", *command, f"{odd_table}:text:label", *model) == 0
        shown = capsys.readouterr().out
        assert not set(shown) & {"\x1b", "\x07", "\x01", "\u202e", "\u2028"}
        for label in ("хорошо", "差", "\U0001f44d\U0001f3fd", "go\\u202eod", "[bold]red[/nope]"):
            assert label in shown
    assert run(monkeypatch, "tasks", "check", f"{odd_table}:text:label", *model) == 0
    assert "The label 'go\\u202eod' holds invisible characters: U+202E." in capsys.readouterr().out.replace("\n", " ")


def test_the_balance_of_ten_thousand_labels_is_a_short_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    rows = [{"text": f"q{i}", "label": f"label {i % 10_000}"} for i in range(12_000)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "task.yaml").write_text(
        "family: classification\nquery: '{{ text }}'\nanswer: '{{ label }}'\n"
        "data: {file: rows.jsonl, test_fraction: 0}\n",
        encoding="utf-8",
    )
    assert run(monkeypatch, "tasks", "check", folder) == 0
    shown = capsys.readouterr().out
    assert "9,900 other labels" in shown
    assert len(shown.splitlines()) < 150


def test_only_what_would_steer_a_terminal_is_written_as_an_escape() -> None:
    assert printable("a\x1b[2Jb\r\u202ec\u2028\x9b") == "a\\x1b[2Jb\\r\\u202ec\\u2028\\x9b"
    unharmed = "tab\there\nline \u200d\u200c \U0001f468\u200d\U0001f469 שלום e\u0301 \u00a0"
    assert printable(unharmed) == unharmed


@pytest.mark.parametrize("printed", ["rows.csv:100: late", ":warning:"])
def test_a_name_between_colons_is_no_emoji(printed: str) -> None:
    stream = io.StringIO()
    console = new_console(file=stream, width=80)
    console.print(printed)
    table = Table()
    table.add_column(printed)
    table.add_row(printed)
    console.print(table)
    assert stream.getvalue().count(printed) == 3
