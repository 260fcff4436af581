"""The three starter tables: their rows were fixed before a model saw them, and stay."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import manyicl.tasks
from manyicl.tasks.files import load_task

STARTER = Path(manyicl.tasks.__file__).parent / "starter"
# A changed row needs a new hash here, and new figures wherever these tables are quoted.
DATA_HASHES = {
    "tickets": "ab033c834df688ab42deb52417b8f9b46b87638cad823f1ea9ef9a659e3a7f8e",
    "urgency": "f5430165144f2e3b8ed03aac3c1077463b6db0e5f96a19a1e3f7801d4fe6977a",
    "titles": "7af850eb3e040c4daa2b0fe0459bfbb142ace522e1f35e2697add681ee072b22",
}


def noted(task: str, side: str) -> list[str]:
    with (STARTER / task / f"{side}.csv").open(encoding="utf-8", newline="") as file:
        return [row["note"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("task", DATA_HASHES)
def test_the_rows_are_those_that_were_fixed_before_any_model_saw_them(task: str) -> None:
    loaded = load_task(STARTER / task)
    assert loaded.data_hash == DATA_HASHES[task]
    assert (len(loaded.train), len(loaded.test)) == (68, 22)


@pytest.mark.parametrize("task", DATA_HASHES)
def test_some_rows_are_noted_as_ambiguous_and_some_answers_as_doubtful(task: str) -> None:
    kinds = {note.partition(":")[0] for note in (*noted(task, "train"), *noted(task, "test"))}
    assert kinds == {"", "ambiguous", "doubtful"}


@pytest.mark.parametrize("task", DATA_HASHES)
def test_no_model_sees_the_notes(task: str) -> None:
    loaded = load_task(STARTER / task)
    texts = " ".join(f"{one.query.text} {one.answer}" for one in (*loaded.train, *loaded.test))
    assert not [note for note in noted(task, "train") + noted(task, "test") if note and note in texts]
