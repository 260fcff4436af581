"""An Excel workbook gives the rows that its values would give in CSV, and nothing in it runs or explodes."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest

from manyicl.errors import UserError
from manyicl.tasks import workbook
from manyicl.tasks.files import load_task
from manyicl.tasks.rows import read_rows
from manyicl.tasks.workbook import workbook_header

openpyxl = pytest.importorskip("openpyxl")
pytest.importorskip("defusedxml")

HEADER = ["text", "team"]


def write(path: Path, sheets: Mapping[str, Sequence[Sequence[Any]]]) -> Path:
    workbook = openpyxl.Workbook()
    workbook.remove(workbook.active)
    for name, rows in sheets.items():
        sheet = workbook.create_sheet(name)
        for row in rows:
            sheet.append(row)
    workbook.save(path)
    return path


def altered(path: Path, part: str, old: str, new: str) -> Path:
    """Replace text in a part of a workbook, as no program of good will would write it."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert old.encode() in parts[part]
    parts[part] = parts[part].replace(old.encode(), new.encode())
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


SHEET = "xl/worksheets/sheet1.xml"


def columns(path: Path, sheet: str | None = None) -> list[dict[str, Any]]:
    return [row.columns for row in read_rows(path, sheet=sheet)]


def test_a_workbook_gives_the_rows_of_the_table(tmp_path: Path) -> None:
    rows = [[f'Größe {i}; "eins"\nzwei', "x" if i % 2 else "y"] for i in range(20)]
    write(tmp_path / "tickets.xlsx", {"Tickets": [HEADER, *rows], "Notes": []})
    task = load_task(f"{tmp_path}/tickets.xlsx:text:team")
    assert (task.name, task.labels, len(task.train), len(task.test)) == ("tickets", ("x", "y"), 16, 4)
    assert task.train[0].origin.startswith("tickets.xlsx:")
    assert {example.query.text for example in (*task.train, *task.test)} == {row[0] for row in rows}


def test_values_are_the_text_that_they_were(tmp_path: Path) -> None:
    values = [
        "007",
        "NA",
        1,
        1.5,
        True,
        None,
        date(2026, 11, 27),
        datetime(2026, 11, 27, 9, 30),
        "a\r\nb",
        "c_x000D_\nd",
    ]
    path = write(
        tmp_path / "rows.xlsx", {"one": [["n", "value"], *([str(n), value] for n, value in enumerate(values))]}
    )
    expected = ["007", "NA", "1", "1.5", True, None, "2026-11-27", "2026-11-27 09:30:00", "a\nb", "c\nd"]
    assert [row["value"] for row in columns(path)] == expected


def test_rows_without_content_are_skipped_and_lines_are_those_of_the_sheet(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.xlsx", {"one": [[], [*HEADER, None], [], ["a", "b"], [None, None], ["c"]]})
    assert [(row.columns, row.line) for row in read_rows(path)] == [
        ({"text": "a", "team": "b"}, 4),
        ({"text": "c", "team": None}, 6),
    ]


def test_a_size_that_the_workbook_misstates_cuts_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.xlsx", {"one": [HEADER, ["a", "b"], ["c", "d"]]})
    assert len(columns(altered(path, SHEET, 'ref="A1:B3"', 'ref="A1:A2"'))) == 2
    assert columns(path)[1] == {"text": "c", "team": "d"}


def test_a_text_longer_than_excel_allows_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.xlsx", {"one": [HEADER, ["a" * 32_767, "b"], ["c", "long"]]})
    assert len(columns(path)[0]["text"]) == 32_767
    with zipfile.ZipFile(path) as archive:
        (part,) = (name for name in archive.namelist() if b"long" in archive.read(name))
    altered(path, part, "long", "_x000D_" * 5_000)
    with pytest.raises(UserError, match=r"rows\.xlsx:3: the text in B3 is longer than Excel allows; .*found 35,000"):
        columns(path)


def test_a_formula_is_the_value_that_was_saved_and_never_evaluated(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.xlsx", {"one": [HEADER, ["a", "=1+1"], ["c", "d"], ["e", "=1+1"]]})
    with pytest.raises(UserError, match=r"rows\.xlsx:2: the formula in B2 was saved without its value") as caught:
        columns(path)
    assert caught.value.code == "formula_without_value"
    altered(path, SHEET, "<f>1+1</f><v></v>", "<f>1+1</f><v>77</v>")
    assert [row["team"] for row in columns(path)] == ["77", "d", "77"]


def test_an_error_in_a_cell_is_null(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.xlsx", {"one": [HEADER, ["a", "#N/A"], ["b", "#DIV/0!"]]})
    assert [row["team"] for row in columns(path)] == [None, None]


def test_of_several_sheets_with_content_one_is_to_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.xlsx", {"Old": [HEADER, ["a", "b"]], "New": [HEADER, ["c", "d"]], "Empty": []})
    with pytest.raises(
        UserError, match=r"several sheets have content; expected one, found the sheets \['Old', 'New'\]"
    ):
        columns(path)
    assert columns(path, "New") == [{"text": "c", "team": "d"}]
    with pytest.raises(UserError, match=r"the workbook has no sheet 'Nwe'.* Did you mean 'New'"):
        columns(path, "Nwe")
    hidden = openpyxl.load_workbook(path)
    hidden["Old"].sheet_state = "hidden"
    hidden.save(path)
    assert columns(path) == [{"text": "c", "team": "d"}]
    assert load_task(f"{path}:text:team,sheet=Old,test_fraction=0").train[0].answer == "b"


def test_a_hidden_sheet_is_read_only_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.xlsx", {"Hidden": [HEADER, ["a", "b"]], "Empty": []})
    workbook = openpyxl.load_workbook(path)
    workbook["Hidden"].sheet_state = "hidden"
    workbook.save(path)
    assert columns(path) == []
    assert workbook_header(path) == []
    assert columns(path, "Hidden") == [{"text": "a", "team": "b"}]
    altered(path, "xl/workbook.xml", 'state="visible"', 'state="hidden"')
    with pytest.raises(UserError, match=r"the workbook has no visible sheet; found the sheets \['Hidden', 'Empty'\]"):
        columns(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([HEADER, ["a", "b", "c"]], r"rows\.xlsx:2: the row does not fit the header; expected 2 columns, found 3"),
        ([["text", None, "team"], ["a", None, "b"]], r"rows\.xlsx:1: a column has no name in the header"),
        ([["text", "text"], ["a", "b"]], r"rows\.xlsx:1: the column 'text' occurs twice"),
    ],
)
def test_a_sheet_that_is_no_table_is_refused(tmp_path: Path, rows: list[list[Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        columns(write(tmp_path / "rows.xlsx", {"one": rows}))


def test_what_is_no_workbook_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.xlsx", {"one": [HEADER, ["a", "b"]]})
    whole = path.read_bytes()
    broken = [b"", b"PK\x03\x04", b"\xd0\xcf\x11\xe0", whole[:-100], whole[:300] + bytes(200) + whole[500:]]
    for content in broken:
        path.write_bytes(content)
        for read in (columns, workbook_header):
            with pytest.raises(UserError, match=r"rows\.xlsx: not a readable Excel workbook") as caught:
                read(path)
            assert caught.value.code == "broken_workbook"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no workbook")
    for read in (columns, workbook_header):
        with pytest.raises(UserError, match=r"rows\.xlsx: not a readable Excel workbook"):
            read(path)


def test_a_workbook_that_explodes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.xlsx", {"one": [HEADER, ["a", "b"]]})
    altered(path, SHEET, "</sheetData>", f"</sheetData>{' ' * 80_000_000}")
    with pytest.raises(UserError, match="it unpacks to more than 67,108,864 bytes") as caught:
        columns(path)
    assert caught.value.code == "unpacks_too_large"


def test_entities_are_never_expanded(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.xlsx", {"one": [HEADER, ["a", "b"]]})
    entity = f'<!DOCTYPE worksheet [<!ENTITY e SYSTEM "file://{tmp_path}/secret">]>'
    (tmp_path / "secret").write_text("secret")
    altered(path, SHEET, "<worksheet ", f"{entity}<worksheet ")
    altered(path, SHEET, "<sheetData>", "<sheetData><row><c t='inlineStr'><is><t>&e;</t></is></c></row>")
    with pytest.raises(UserError, match="not a readable Excel workbook"):
        columns(path)


def test_a_row_with_a_number_beyond_excels_own_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workbook.MOST_ROWS == 1_048_576
    monkeypatch.setattr(workbook, "MOST_ROWS", 1000)  # the library makes each row in between
    path = write(tmp_path / "rows.xlsx", {"one": [HEADER, ["a", "b"]]})
    altered(path, SHEET, '<row r="2">', '<row r="2000000000">')
    with pytest.raises(UserError, match="a row has a number above"):
        columns(path)


def test_without_the_extra_a_workbook_is_refused_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.xlsx", {"one": [HEADER, ["a", "b"]]})
    for missing in ("openpyxl", "defusedxml"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, missing, None)
            with pytest.raises(UserError, match=r"pip install 'manyicl\[excel\]', or use CSV") as caught:
                columns(path)
            assert caught.value.code == "missing_requirement"
