"""Rows give exactly the text that was written; white space around answers goes; 10,000 labels are read in time."""

from __future__ import annotations

import csv
import json
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from manyicl.errors import UserError
from manyicl.tasks.catalog import catalog_entries
from manyicl.tasks.files import load_task
from manyicl.tasks.leakage import normalised
from manyicl.tasks.retrieval import terms
from manyicl.tasks.rows import read_rows
from manyicl.tasks.task import Task
from manyicl.tasks.words import folded, parts, without_invisible, words
from tests.odd_text import SCRIPTS, TEXTS, WITH_CARRIAGE_RETURNS

SPACES = ("", " ", "\t", "\u00a0", "\u3000", "\u2028", " \u202f\n")


def write_csv(path: Path, texts: list[str]) -> None:
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
        writer.writerows([["text", "label"], *([text, "good"] for text in texts)])


def write_json(path: Path, texts: list[str]) -> None:
    escaped = len(path.stem) % 2 == 0
    lines = [json.dumps({"text": text, "label": "good"}, ensure_ascii=escaped) + "\n" for text in texts]
    path.write_bytes("".join(lines).encode())


def write_parquet(path: Path, texts: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": ["good"] * len(texts)}), path)


WRITERS: dict[str, Callable[[Path, list[str]], None]] = {
    "rows.csv": write_csv,
    "rows.tsv": write_csv,
    "rows.jsonl": write_json,
    "plain.jsonl": write_json,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_row_is_exactly_the_text_that_was_written(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, list(TEXTS.values()))
    assert [row.columns["text"] for row in read_rows(tmp_path / name)] == list(TEXTS.values())


@pytest.mark.parametrize("name", WRITERS)
def test_line_ends_within_a_field_become_line_feeds_in_csv_alone(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, [WITH_CARRIAGE_RETURNS])
    expected = "one\ntwo\nthree" if name.endswith("sv") else WITH_CARRIAGE_RETURNS
    assert [row.columns["text"] for row in read_rows(tmp_path / name)] == [expected]


def task_of(tmp_path: Path, rows: list[dict[str, Any]], **keys: Any) -> Task:
    """Write a task folder whose rows stand on both sides, the queries of the second changed, and load it."""
    folder = tmp_path / "task"
    folder.mkdir(exist_ok=True)
    for side in ("train", "test"):
        lines = [json.dumps({**row, "text": f"{row.get('text', 'q')} {side} {i}"}) for i, row in enumerate(rows)]
        (folder / f"{side}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    content = {
        "family": "classification",
        "query": "{{ text }}",
        "answer": "{{ label }}",
        "data": {"train": "train.jsonl", "test": "test.jsonl"},
        **keys,
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    return load_task(folder)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_queries_answers_and_labels_keep_their_characters(text: str, tmp_path: Path) -> None:
    task = task_of(tmp_path, [{"text": text, "label": text}, {"text": "plain", "label": "plain"}])
    assert task.train[0].query.text == f"{text} train 0"
    assert task.train[0].answer == text
    assert set(task.labels or ()) == {text, "plain"}
    assert task.query({"text": text}).text == text


@pytest.mark.parametrize("before", SPACES)
@pytest.mark.parametrize("after", SPACES)
def test_white_space_around_an_answer_has_no_meaning_wherever_it_comes_from(
    before: str, after: str, tmp_path: Path
) -> None:
    def padded(text: str) -> str:
        return f"{before}{text}{after}"

    rows = [{"label": padded("good")}, {"label": "bad"}, {"label": "good"}]
    for labels in ("from_train", [padded("good"), padded("bad")]):
        task = task_of(tmp_path, rows, labels=labels)
        assert set(task.labels or ()) == {"good", "bad"}
        assert [example.answer for example in task.train] == ["good", "bad", "good"]
    numbered = [{"label": 0}, {"label": 1}]
    task = task_of(tmp_path, numbered, class_names={"label": [padded("good"), padded("bad")]})
    assert [example.answer for example in task.train] == ["good", "bad"]
    free = [{"label": padded("good"), "others": [padded("fine"), "good"]}]
    task = task_of(tmp_path, free, family="qa", references="others")
    assert task.train[0].references == ("good", "fine")
    chosen = [{"label": padded("good"), "options": ["good", padded("bad")]}]
    task = task_of(tmp_path, chosen, family="qa", choices="options")
    assert task.train[0].query.choices == ("good", "bad")
    assert task.train[0].answer == "good"


@pytest.mark.parametrize("blank", ["", " ", "\u00a0", "\u3000", "\t\n", "\u2028"])
def test_an_answer_of_white_space_alone_is_refused_as_empty(blank: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"label": blank, "options": ["a", "b"]}, {"label": "a", "options": ["a", "b"]}]
    with pytest.raises(UserError, match="empty"):
        task_of(tmp_path, rows)
    with pytest.raises(UserError, match="empty"):
        task_of(tmp_path, rows, family="qa")
    with pytest.raises(UserError, match="empty"):
        task_of(tmp_path, [{"label": "a"}], labels=["a", blank])
    with pytest.raises(UserError, match="empty"):
        task_of(tmp_path, [{"label": "a", "options": ["a", blank]}], family="qa", choices="options")


def test_a_zero_width_character_at_the_end_of_a_label_is_no_white_space(tmp_path: Path) -> None:
    task = task_of(tmp_path, [{"label": "good\u200b"}, {"label": "good"}, {"label": "\ufeffgood"}])
    assert len(task.labels or ()) == 3


def test_names_of_the_catalogue_have_no_white_space_at_their_ends() -> None:
    for entry in catalog_entries("catalog:*"):
        names = [name for of_column in entry.spec.class_names.values() for name in of_column.values()]
        listed = entry.spec.labels if isinstance(entry.spec.labels, tuple) else ()
        assert all(name == name.strip() and name for name in (*names, *listed))


def test_composed_and_decomposed_letters_are_two_labels_and_one_query(tmp_path: Path) -> None:
    task = task_of(tmp_path, [{"label": "caf\u00e9"}, {"label": "cafe\u0301"}])
    assert set(task.labels or ()) == {"caf\u00e9", "cafe\u0301"}
    assert normalised("Cafe\u0301  x") == normalised("CAF\u00c9 x") == "caf\u00e9 x"


@given(st.text(st.characters(max_codepoint=127)))
def test_on_ascii_the_same_query_is_one_of_the_same_case_and_spaces(text: str) -> None:
    assert normalised(text) == " ".join(text.casefold().split())


@given(st.text())
def test_composed_text_is_only_folded_so_that_splits_of_it_stay(text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    assert normalised(composed) == " ".join(composed.casefold().split())


@given(st.text())
def test_words_hold_no_space_and_come_again_from_themselves(text: str) -> None:
    found = words(text)
    assert all(word and not any(map(str.isspace, word)) for word in found)
    assert words(" ".join(found)) == found
    assert "".join(parts(text)) == text
    assert set(found) <= set(terms(text))
    assert without_invisible(folded(text)) == folded(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1\u4e2a\u82f9\u679c", ["1", "\u4e2a", "\u82f9", "\u679c"]),
        ("\uff21\uff22 \uff11\uff12", ["ab", "12"]),
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467!", ["\U0001f468\u200d\U0001f469\u200d\U0001f467"]),
        ("\U0001f44d\U0001f3fd\U0001f44d", ["\U0001f44d\U0001f3fd", "\U0001f44d"]),
        ("\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7", ["\U0001f1e9\U0001f1ea", "\U0001f1eb\U0001f1f7"]),
        ("\u2764\ufe0f \u2764", ["\u2764", "\u2764"]),
        ("zero\u200bwidth so\u00adft", ["zerowidth", "soft"]),
        ("\u0e01\u0e33\u0e14\u0e35", ["\u0e01\u0e4d", "\u0e32", "\u0e14\u0e35"]),
        ("STRASSE stra\u00dfe", ["strasse", "strasse"]),
        ("\u06f1\u06f2 \u0967", ["\u06f1\u06f2", "\u0967"]),
    ],
)
def test_words_of_every_script(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_a_text_of_any_script_has_words(text: str) -> None:
    assert words(text)


@pytest.mark.parametrize("number", [3_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_labels_are_read_in_time_whatever_their_rows_say(tmp_path: Path, number: int) -> None:
    labels = [f"label {one:05d} of many" for one in range(number)]
    start = time.perf_counter()
    task = task_of(tmp_path, [{"label": label} for label in labels], labels=labels)
    assert task.labels == tuple(labels)
    wrong = [{"label": f"{label} x"} for label in labels[:2_000]]
    task = task_of(tmp_path, [*wrong, {"label": labels[0]}], labels=labels, bad_rows="drop")
    assert task.dropped["label outside the closed set"] == 2 * 2_000
    assert task.demonstrations(1)
    # Some 3 seconds alone with 10,000; a search through all labels for each of the wrong rows takes minutes.
    assert time.perf_counter() - start < 40
