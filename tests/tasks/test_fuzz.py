"""Whatever a task file, a table or a template holds: a task, or one sentence, and soon."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyicl.cli.task_encoder import character_encoder
from manyicl.episodes.checks import check_task
from manyicl.tasks.files import load_task
from manyicl.tasks.rows import read_rows
from manyicl.tasks.task import Task
from manyicl.tasks.template import Template
from tests.fuzzing import AWKWARD, efforts, ends_well, spoilt_yaml

ROWS: list[dict[str, Any]] = [
    {"text": f"film {i}", "label": ("good", "bad")[i % 2], "options": ["good", "bad"], "group": str(i // 3)}
    for i in range(12)
]
SOUND: list[dict[str, Any]] = [
    {
        "name": "films",
        "family": "classification",
        "query": "{{ text }}",
        "answer": "{{ label }}",
        "instruction": "One of {{ labels | join(', ') }}",
        "labels": ["good", "bad"],
        "class_names": {"label": {"good": "good", "bad": "bad"}},
        "source": "films",
        "bad_rows": "drop",
        "on_both_sides": "refuse",
        "max_characters": 100,
        "data": {"train": ["train.jsonl"], "test": "test.jsonl", "quotes": "csv"},
    },
    {
        "family": "qa",
        "query": "{{ row['text'] }}",
        "answer": "{{ label }}",
        "choices": "options",
        "max_answer_tokens": 5,
        "data": {"file": "rows.csv", "test_fraction": 0.25, "seed": 1, "group": "group", "delimiter": ","},
    },
    {
        "family": "generation",
        "metric": "rougeL",
        "description": "Films.",
        "query": "{{ text }}",
        "answer": "{{ label }}",
        "references": "options",
        "data": {"hf": "owner/films", "config": "en", "revision": "main", "train": "train", "test": "test"},
    },
]


def load_dataset(*arguments: object, **others: object) -> list[dict[str, Any]]:
    """Stand in for the Hub, which is not asked."""
    return ROWS


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    write(tmp_path / "train.jsonl", lines)
    write(tmp_path / "test.jsonl", lines.replace("film", "play"))
    write(
        tmp_path / "rows.csv", "text,label,options,group\n" + "".join(f"film {i},good,x,{i // 3}\n" for i in range(12))
    )
    return tmp_path


def require_sound(task: Task | None) -> None:
    """Hold of a task what the rest of the program takes for granted."""
    if task is None:
        return
    assert task.train
    for example in (*task.train, *task.test):
        assert example.query.text.strip()
        assert example.answer
        assert task.labels is None or example.answer in task.labels
        assert example.query.choices is None or example.answer in example.query.choices
        json.dumps([example.query.text, *example.references], ensure_ascii=False).encode()
    check_task(task, character_encoder(), sys.maxsize)


@efforts
def test_any_task_file_is_a_task_or_a_sentence(effort: settings, folder: Path) -> None:
    @effort
    @given(st.sampled_from(SOUND).flatmap(spoilt_yaml))
    def holds(content: str | bytes) -> None:
        write(folder / "task.yaml", content)
        require_sound(ends_well(lambda: load_task(folder, load_dataset=load_dataset)))

    holds()


@efforts
def test_any_bytes_are_a_task_file_or_a_sentence(effort: settings, folder: Path) -> None:
    @effort
    @given(st.binary(max_size=200) | st.text(alphabet="abc:-[]{}&*!|>'\"#%@`, \n\t?<=~0", max_size=80))
    def holds(content: str | bytes) -> None:
        write(folder / "task.yaml", content)
        ends_well(lambda: load_task(folder, load_dataset=load_dataset))

    holds()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(AWKWARD) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
columns = st.sampled_from(["text", "label", "options", "group", "row", "range", "a b", ""])
json_rows = st.dictionaries(columns, json_values | st.sampled_from(["good", "bad"]), max_size=5) | json_values


@efforts
def test_any_json_rows_are_a_task_or_a_sentence(effort: settings, folder: Path) -> None:
    @effort
    @given(
        st.sampled_from(SOUND[:2]),
        st.lists(json_rows, max_size=6),
        st.sampled_from(["\n", "\r\n", "\r"]),
        st.sampled_from(["refuse", "drop"]),
    )
    def holds(keys: Mapping[str, Any], rows: list[Any], line_end: str, bad_rows: str) -> None:
        written = [*ROWS[:4], *rows, *ROWS[4:]]
        write(folder / "train.jsonl", line_end.join(map(json.dumps, written)))
        data = {"train": "train.jsonl", "test": "test.jsonl"}
        write(folder / "task.yaml", json.dumps({**keys, "bad_rows": bad_rows, "on_both_sides": "drop", "data": data}))
        require_sound(ends_well(lambda: load_task(folder)))

    holds()


@efforts
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_any_bytes_are_rows_or_a_sentence(effort: settings, folder: Path, suffix: str) -> None:
    path = folder / f"any.{suffix}"
    texts = st.text(alphabet='ab,;\t"\r\n{}[]:\\u0\ufeff\u2028é', max_size=60)

    @effort
    @given(
        st.binary(max_size=100) | texts | texts.map(lambda text: f"text,label\na,b\n{text}"),
        st.sampled_from([None, ",", ";", "\t", " ", "a", "é", "0"]),
        st.sampled_from(["csv", "none"]),
    )
    def holds(content: str | bytes, delimiter: str | None, quotes: Any) -> None:
        write(path, content)
        rows = ends_well(lambda: read_rows(path, delimiter=delimiter, quotes=quotes)) or []
        assert all(row.line >= 1 for row in rows)

    holds()


FRAGMENTS = [
    "{{", "}}", "{%", "%}", "{#", "#}", "text", "label", "row", "loop", "self", "labels", " | ", ".", "[", "]", "(",
    ")", "'", '"', "for i in ", "for i in range(9999)", "endfor", "if ", "else", "endif", "set x = ", "range",
    "(999999999)", "1", "0", "-1", "99999999999", "1e309", " * ", " + ", " ** ", " % ", " ~ ", " / ", " // ", " in ",
    " is ", " not ", ",", ":", "join", "replace", "('a','b')", "upper", "list", "batch", "tojson", "truncate",
    "truncate(0)", "first", "sum", "sort", "unique", "map('upper')", "groupby('a')", "attr('x')", "format",
    "center(99)", "split", "('')", "items", "dictsort", "int", "float", "round", "round(999)", "namespace()",
    "cycler()", "lipsum()", "dict(a=1)", "x", "_", "__class__", "mro", "\n", " ", "é", "{{ text }}",
    "{% for i in text %}", "{% endfor %}", "{{ text | ", "macro a()", "endmacro", "include text", "import text",
    "block a", "raw", "endraw", "do ", "call", "filter upper", "autoescape",
]  # fmt: skip
templates = st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join)
closed = templates.map(lambda text: "{{ " + text.replace("{{", "").replace("}}", "") + " }}")


@efforts
def test_any_template_renders_or_ends_in_a_sentence(effort: settings) -> None:
    @effort
    @given(templates | closed, json_values, json_values)
    def holds(source: str, text: Any, label: Any) -> None:
        template = ends_well(lambda: Template(source))
        if template is not None:
            row = dict.fromkeys(template.columns, label) | {"text": text}
            rendered = ends_well(lambda: template.render(row))
            assert rendered is None or isinstance(rendered, str)

    holds()
