"""The three starter tables: their rows were fixed before a model saw them, and stay."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manyicl.cli.main import app
from manyicl.errors import UserError
from manyicl.tasks.files import load_task
from manyicl.tasks.starter_tables import STARTER_TABLES, write_starter_tables
from tests.engine.parts import refused

# A changed row needs a new hash here, and new figures wherever these tables are quoted.
DATA_HASHES = {
    "tickets": "ab033c834df688ab42deb52417b8f9b46b87638cad823f1ea9ef9a659e3a7f8e",
    "urgency": "f5430165144f2e3b8ed03aac3c1077463b6db0e5f96a19a1e3f7801d4fe6977a",
    "titles": "7af850eb3e040c4daa2b0fe0459bfbb142ace522e1f35e2697add681ee072b22",
}


def noted(task: str, side: str) -> list[str]:
    with (STARTER_TABLES / task / f"{side}.csv").open(encoding="utf-8", newline="") as file:
        return [row["note"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("task", DATA_HASHES)
def test_the_rows_are_those_that_were_fixed_before_any_model_saw_them(task: str) -> None:
    loaded = load_task(STARTER_TABLES / task)
    assert loaded.data_hash == DATA_HASHES[task]
    assert (len(loaded.train), len(loaded.test)) == (68, 22)


@pytest.mark.parametrize("task", DATA_HASHES)
def test_some_rows_are_noted_as_ambiguous_and_some_answers_as_doubtful(task: str) -> None:
    kinds = {note.partition(":")[0] for note in (*noted(task, "train"), *noted(task, "test"))}
    assert kinds == {"", "ambiguous", "doubtful"}


@pytest.mark.parametrize("task", DATA_HASHES)
def test_no_model_sees_the_notes(task: str) -> None:
    loaded = load_task(STARTER_TABLES / task)
    texts = " ".join(f"{one.query.text} {one.answer}" for one in (*loaded.train, *loaded.test))
    assert not [note for note in noted(task, "train") + noted(task, "test") if note and note in texts]


def test_copies_are_tasks_and_an_edited_copy_is_not_overwritten(tmp_path: Path) -> None:
    places = write_starter_tables(tmp_path / "tables")
    assert [load_task(place).data_hash for place in places] == [DATA_HASHES[place.name] for place in places]
    assert write_starter_tables(tmp_path / "tables") == places
    (places[0] / "train.csv").write_text("text,team,note\nmine,app,\n", encoding="utf-8")
    with pytest.raises(UserError) as raised:
        write_starter_tables(tmp_path / "tables")
    assert raised.value.code == "output_exists"
    assert "mine" in (places[0] / "train.csv").read_text(encoding="utf-8")


def test_a_place_that_takes_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "new.csv").touch()
    for place, code in ((tmp_path / "new.csv", "output_is_file"), (Path("/proc/foo"), "output_not_writable")):
        with refused(code):
            write_starter_tables(place)


def test_the_command_copies_tables_that_are_tasks_by_their_columns(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["tasks", "starter", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.output.split() == [str(tmp_path / name) for name in sorted(DATA_HASHES)]
    task = load_task(f"{tmp_path}/tickets/train.csv:text:team")
    assert task.labels == ("advice", "app", "billing", "delivery", "repairs")
