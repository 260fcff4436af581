"""Answers in packed files and workbooks are those of the plain forms, and nothing in them becomes a formula."""

from __future__ import annotations

import gzip
import json
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manyicl.cli.answers import has_answers
from manyicl.cli.unfinished import answers_written
from manyicl.errors import UserError
from manyicl.tasks.rows import read_rows
from manyicl.tasks.values import NumberText
from tests.cli.test_unfinished import MADE_OF, ODD_ROWS

WITHOUT_HALVES = [{**row, "text": row["text"].replace("\ud83d", "?")} for row in ODD_ROWS]


def interrupted(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield from rows
    raise KeyboardInterrupt


def write(output: Path, rows: Iterable[dict[str, Any]]) -> Path:
    with answers_written(output, {}) as answers:
        answers.begin(MADE_OF, print)
        answers.write(rows, lambda: ["text", "answer"])
    return output


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_packed_file_holds_the_plain_one(tmp_path: Path, ending: str) -> None:
    plain, packed = (write(tmp_path / f"answers.{name}", ODD_ROWS) for name in (ending, f"{ending}.gz"))
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    assert has_answers(plain)
    assert has_answers(packed)
    write(packed, ODD_ROWS[:1])  # our own answers may be replaced
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([plain.name, packed.name])
    packed.write_bytes(gzip.compress(b"text\n"))
    with pytest.raises(UserError) as caught:
        write(packed, ODD_ROWS)
    assert caught.value.code == "output_exists"


def test_an_interrupted_packed_file_is_continued(tmp_path: Path) -> None:
    output = tmp_path / "answers.csv.gz"
    with pytest.raises(KeyboardInterrupt):
        write(output, interrupted(ODD_ROWS[:2]))
    with answers_written(output, {}) as answers:
        assert len(list(answers.begin(MADE_OF, print))) == 2
        answers.write(ODD_ROWS[2:])
    whole = write(tmp_path / "whole.csv.gz", ODD_ROWS)
    assert gzip.decompress(output.read_bytes()) == gzip.decompress(whole.read_bytes())


@pytest.mark.parametrize("ending", ["csv.gz", "jsonl.gz", "xlsx"])
def test_answers_are_removed_only_once_the_file_made_of_them_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    if ending == "xlsx":
        pytest.importorskip("openpyxl")
        pytest.importorskip("defusedxml")
    output, synced = tmp_path / f"answers.{ending}", set[int]()
    sync, unlink = os.fsync, Path.unlink

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def checked(path: Path, missing_ok: bool = False) -> None:
        if path.name.endswith(".part") and path.exists():
            assert output.stat().st_ino in synced
        unlink(path, missing_ok)

    monkeypatch.setattr("os.fsync", noted)
    monkeypatch.setattr(Path, "unlink", checked)
    write(output, WITHOUT_HALVES)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    before = output.read_bytes()
    monkeypatch.setattr("shutil.copyfileobj", full)
    monkeypatch.setattr("manyicl.cli.answer_files.write_workbook", full)
    with pytest.raises(OSError, match="No space"):
        write(output, WITHOUT_HALVES[:1])
    assert output.read_bytes() == before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {output.name, f"{output.name}.part", f"{output.name}.part.json"}


def test_a_workbook_holds_the_rows(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    pytest.importorskip("defusedxml")
    odd: list[Any] = [
        "=1+1",
        "#N/A",
        "_x000D_",
        "a\x07b",
        "007",
        "",
        "a\r\nb",
        12345678901234567890,
        True,
        1.5,
        ["x", 1],
    ]
    rows: list[dict[str, Any]] = [
        *WITHOUT_HALVES,
        *({"text": value, "answer": "a", "log_probability": -1.5} for value in odd),
        {"more": 1},
    ]
    output = write(tmp_path / "answers.xlsx", rows)
    read = [row.columns for row in read_rows(output)]
    assert list(read[0]) == ["text", "answer", "log_probability", "problem", "more"]
    texts = ["=1+1", "#N/A", "_x000D_", "a\x07b", "007", None, "a\nb", "12345678901234567890", True, "1.5", '["x", 1]']
    assert [row["text"] for row in read[len(WITHOUT_HALVES) : -1]] == texts
    for row, written in zip(read, WITHOUT_HALVES, strict=False):
        assert (row["text"] or "") == written["text"].replace("\r\n", "\n")
        assert row["log_probability"] == "-1.5"
    cells = [cell for line in openpyxl.load_workbook(output).active.iter_rows() for cell in line]
    assert "f" not in {cell.data_type for cell in cells}
    assert has_answers(output)
    write(output, [])
    assert read_rows(output) == []
    assert [path.name for path in tmp_path.iterdir()] == ["answers.xlsx"]


def test_numbers_of_the_input_are_in_a_workbook_as_they_were_written(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    pytest.importorskip("defusedxml")
    texts = ["1.10", "1e400", "7" * 5_000, "-0", "0.30000000000000004", "1E2", "123456789012345678"]
    numbers = ["12", "-0.5", "0.9731", "1e-07"]
    rows = [
        {"n": NumberText(text), "many": [NumberText(text)], "answer": "a", "log_probability": -1.0}
        for text in (*texts, *numbers)
    ]
    output = write(tmp_path / "answers.xlsx", rows)
    cells = [cell.value for cell in openpyxl.load_workbook(output).active["A"]][1:]
    assert cells == [*texts, 12, -0.5, 0.9731, 1e-07]
    assert [row.columns["n"] for row in read_rows(output)] == [*texts, *numbers]
    assert [row.columns["many"] for row in read_rows(output)] == [f"[{row['n']}]" for row in rows]


def test_numbers_of_the_input_survive_an_interruption(tmp_path: Path) -> None:
    rows = [{"n": NumberText(n), "answer": "a", "log_probability": -1.0} for n in ("7" * 5_000, "1e400", "1.10")]
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "answers.jsonl", interrupted(rows))
    with answers_written(tmp_path / "answers.jsonl", {}) as answers:
        assert [row["n"] for row in answers.begin(MADE_OF, print)] == [row["n"] for row in rows]
        answers.write([])
    assert [row.columns["n"] for row in read_rows(tmp_path / "answers.jsonl")] == [row["n"] for row in rows]
    assert has_answers(tmp_path / "answers.jsonl")


def test_a_text_that_no_cell_can_hold_is_refused_by_its_row_and_the_answers_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    pytest.importorskip("defusedxml")
    rows: list[dict[str, Any]] = [
        {"text": "a", "answer": "b", "log_probability": 0.0},
        {"text": "a" * 32_768, "answer": "b"},
    ]
    with pytest.raises(UserError, match=r"The answers before it are in .*answers\.xlsx\.part") as caught:
        write(tmp_path / "answers.xlsx", rows)
    assert (caught.value.code, caught.value.row, caught.value.field) == ("text_too_long", 2, "text")
    assert json.loads((tmp_path / "answers.xlsx.part").read_text()) == rows[0]


@pytest.mark.parametrize(("limit", "code"), [("MOST_ROWS", "too_many_rows"), ("MOST_COLUMNS", "too_many_columns")])
def test_a_table_that_no_sheet_can_hold_is_refused_by_its_row_and_the_answers_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, code: str
) -> None:
    pytest.importorskip("openpyxl")
    pytest.importorskip("defusedxml")
    monkeypatch.setattr(f"manyicl.tasks.workbook.{limit}", 4)
    rows: list[dict[str, Any]] = [{"answer": "a", "log_probability": 0.0, f"column {i // 2}": "x"} for i in range(4)]
    with pytest.raises(KeyboardInterrupt):  # rows and columns before an interruption count
        write(tmp_path / "answers.xlsx", interrupted(rows[:2]))
    rows[2] |= {"more": 1} if limit == "MOST_COLUMNS" else {}
    with pytest.raises(UserError, match=r"at most 4\. Write to \.csv or \.jsonl\. The answers before it") as caught:
        write(tmp_path / "answers.xlsx", rows[2:])
    last = 3 if limit == "MOST_COLUMNS" else 4
    assert (caught.value.code, caught.value.row) == (code, last)
    assert (tmp_path / "answers.xlsx.part").read_text().count("\n") == last - 1


def test_a_workbook_needs_the_extra_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with (
        pytest.raises(UserError, match=r"pip install 'manyicl\[excel\]', or use CSV"),
        answers_written(tmp_path / "answers.xlsx", {}),
    ):
        pytest.fail("it was opened")


def test_a_zip_that_is_no_workbook_is_not_written_over(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    pytest.importorskip("defusedxml")
    with zipfile.ZipFile(tmp_path / "answers.xlsx", "w") as archive:
        archive.writestr("notes.txt", "of a user")
    with pytest.raises(UserError) as caught:
        write(tmp_path / "answers.xlsx", WITHOUT_HALVES)
    assert caught.value.code == "output_exists"


@pytest.mark.parametrize("name", ["answers.gz", "answers.parquet", "answers.tsv.gz", "answers"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as caught, answers_written(tmp_path / name, {}):
        pytest.fail("it was opened")
    assert caught.value.code == "wrong_ending"
