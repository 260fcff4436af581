"""Queries are read as the task's own rows are, unless the command says otherwise."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from manyicl.cli.queries import open_queries
from manyicl.errors import UserError

QUERIES = "number;body\n1;Rechnung für März\n"
ROWS = "body;team\n" + "".join(f"Größe {i};{'x' if i % 2 else 'y'}\n" for i in range(20))
TASK = """\
name: tickets
family: classification
query: "{{ body }}"
answer: "{{ team }}"
data: {file: rows.csv, encoding: cp1252, delimiter: ";"}
"""


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.csv").write_text(ROWS, encoding="cp1252")
    (tmp_path / "task.yaml").write_text(TASK)
    return tmp_path


def columns(path: Path, task: str | None, delimiter: str | None = None, encoding: str | None = None) -> list[object]:
    return [row.columns for row in open_queries(path, task, delimiter, encoding, "refuse").rows]


@pytest.mark.parametrize("reference", ["{}/task.yaml", "{}/rows.csv:body:team,encoding=cp1252,delimiter=;"])
@pytest.mark.parametrize("name", ["new.csv", "new.csv.gz"])
def test_queries_are_in_the_encoding_of_the_tasks_rows(folder: Path, reference: str, name: str) -> None:
    content = QUERIES.encode("cp1252")
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    queries = open_queries(folder / name, reference.format(folder), None, None, "refuse")
    assert [row.columns for row in queries.rows] == [{"number": "1", "body": "Rechnung für März"}]
    assert list(queries.header()) == ["number", "body"]


def test_the_command_may_name_another_encoding(folder: Path) -> None:
    (folder / "new.csv").write_text(QUERIES, encoding="utf-16")
    (row,) = columns(folder / "new.csv", f"{folder}/task.yaml", encoding="utf-16")
    assert row == {"number": "1", "body": "Rechnung für März"}
    (folder / "new.csv").write_text(QUERIES, encoding="utf-8")
    with pytest.raises(UserError, match=r"new\.csv: the file is UTF-8, not cp1252\. Name the encoding utf-8, or none"):
        columns(folder / "new.csv", f"{folder}/task.yaml")
    assert columns(folder / "new.csv", f"{folder}/task.yaml", encoding="utf-8") == [row]


def test_queries_of_another_kind_than_the_tasks_rows_are_read_by_themselves(folder: Path) -> None:
    (folder / "new.jsonl").write_text('{"body": "für"}\n', encoding="utf-8")
    assert columns(folder / "new.jsonl", f"{folder}/task.yaml") == [{"body": "für"}]


@pytest.mark.parametrize(
    ("name", "delimiter", "encoding", "code"),
    [
        ("new.csv", None, "cp1225", "bad_encoding"),
        ("new.parquet", None, "cp1252", "useless_option"),
        ("-", None, "cp1252", "useless_option"),
        ("new.jsonl", ";", None, "useless_option"),
        ("new.csv", ";;", None, "bad_delimiter"),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    folder: Path, name: str, delimiter: str | None, encoding: str | None, code: str
) -> None:
    with pytest.raises(UserError) as caught:
        columns(Path(name), None, delimiter, encoding)
    assert caught.value.code == code


def test_queries_are_read_from_a_workbook(folder: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    pytest.importorskip("defusedxml")
    workbook = openpyxl.Workbook()
    for row in (["number", "body"], [1, "Rechnung für März"]):
        workbook.active.append(row)
    workbook.save(folder / "new.xlsx")
    assert columns(folder / "new.xlsx", f"{folder}/task.yaml") == [{"number": "1", "body": "Rechnung für März"}]
