"""Mistakes in task.yaml, in templates, and in what names a task."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.bad_input.case import Case, accepted, meet, refused, table_of
from tests.bad_input.files import DATA, KEYS, TRAIN, lines, spoilt, table_task, task, task_with

CHECK = "tasks check t"


def test_the_task_that_is_spoilt_below_is_sound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meet(accepted("all is well", CHECK, "1 checked", files=task()), tmp_path, monkeypatch, capsys)


def link_to_itself(folder: Path) -> None:
    (folder / "t").symlink_to("t")


def close(folder: Path) -> None:
    (folder / "t" / "task.yaml").chmod(0)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

TABLE = "text,label\n" + "".join(f"film {i},{'good' if i % 2 else 'bad'}\n" for i in range(20))


NOT_FOUND = [
    *(
        refused(f"columns of {name}", f"tasks check {name}:text:label", "unknown_suffix", files={name: "PK"})
        for name, what_to_do in (("x.xls", "Export"), ("n.txt", "Export"), ("x.csv.zip", "Unpack"))
    ),
    refused(
        "an option of a table twice",
        "tasks check a.csv:text:label,seed=1,seed=2",
        "bad_table",
        file="a.csv",
        files={"a.csv": TABLE},
    ),
    refused(
        "an option of a table without a value",
        "tasks check a.csv:text:label,name=",
        "bad_table",
        file="a.csv",
        files={"a.csv": TABLE},
    ),
    refused("a task without a name", "tasks check ''", "no_task_named", found="an empty name"),
    accepted(
        "a Persian name of a table",
        "tasks check می\u200cروم.csv:text:label",
        "1 checked",
        files={"می\u200cروم.csv": TABLE},
    ),
    accepted(
        "a name of a table that is unfit for a task",
        "tasks check 'a\u3000\u202eb.csv:text:label'",
        "1 checked",
        files={"a\u3000\u202eb.csv": TABLE},
    ),
    refused("a folder that does not exist", "tasks check tt", "unknown_task", remedy="Did you mean 't'?", files=task()),
    refused("a folder without a task file", CHECK, "no_tasks", file="t", files={"t/train.jsonl": lines(*TRAIN)}),
    refused(
        "a task file of another name",
        "tasks show t",
        "no_tasks",
        file="t",
        remedy="Did you mean 'task.yml'?",
        files={"t/task.yml": KEYS + DATA},
    ),
    refused("a link that leads to itself", CHECK, "unknown_task", prepare=link_to_itself),
    refused(
        "a name longer than a file may have",
        f"tasks check {'t' * 5000}",
        "bad_path",
        file="ttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttttt…",
    ),
    refused("a task file that is a folder", "tasks show t", "no_tasks", file="t", files={"t/task.yaml/x": ""}),
    refused("a pattern that matches nothing", "tasks list 'u*/'", "no_tasks", files=task()),
    refused(
        "a table without its columns",
        "tasks check t/a.csv",
        "table_without_columns",
        file="t/a.csv",
        files={"t/a.csv": ""},
    ),
    refused(
        "a table with the name of one column",
        "tasks check a.csv:text",
        "bad_table",
        file="a.csv",
        found="a.csv:text",
        files={"a.csv": "text,label\n"},
    ),
    refused(
        "a column that the table lacks",
        "tasks check a.csv:txt:label",
        "missing_column",
        file="a.csv",
        row=2,
        field="txt",
        found="the columns ['label', 'text']",
        remedy="Did you mean 'text'?",
        files={"a.csv": "text,label\nx,y\n"},
    ),
    refused(
        "an unknown option of a table",
        "tasks check a.csv:text:label,grup=x",
        "unknown_key",
        file="a.csv",
        remedy="Did you mean 'group'?",
        files={"a.csv": "text,label\nx,y\n"},
    ),
    refused(
        "an entry that the catalogue lacks", "tasks show catalog:trecc", "unknown_task", remedy="Did you mean 'trec'?"
    ),
    refused("a family of the catalogue where one task is meant", "tasks show catalog:nli", "several_tasks"),
    refused("a word that no entry mentions", "tasks list --search zzz", "no_match"),
    refused("a search among tasks of one's own", "tasks list t --search film", "conflicting_options", files=task()),
    refused(
        "a data root that is a file", "tasks check t --data-root a", "not_a_folder", file="a", files={**task(), "a": ""}
    ),
    refused(
        "two tasks of one name",
        "tasks check a b",
        "duplicate_task",
        says=("Two tasks are named 'same': a/task.yaml and b/task.yaml. Rename one with `name:` in its", "task.yaml."),
        files={**task(KEYS + DATA + "name: same\n", name="a"), **task(KEYS + DATA + "name: same\n", name="b")},
    ),
    refused("a context without a model that counts it", f"{CHECK} --context 100", "no_effect", files=task()),
]

YAML = [
    refused("an empty task file", CHECK, "no_mapping", file="t/task.yaml", found="nothing", files=task("")),
    refused(
        "a task file of comments",
        CHECK,
        "no_mapping",
        file="t/task.yaml",
        found="nothing",
        files=task("# to be done\n"),
    ),
    refused(
        "a list in place of keys",
        CHECK,
        "no_mapping",
        file="t/task.yaml",
        found="['family', 'query']",
        files=task("- family\n- query\n"),
    ),
    refused(
        "a sentence in place of keys", CHECK, "no_mapping", file="t/task.yaml", found="'my task'", files=task("my task")
    ),
    refused(
        "two documents in one file",
        CHECK,
        "broken_yaml",
        file="t/task.yaml",
        row=5,
        files=task(f"{KEYS}{DATA}---\nname: x\n"),
    ),
    refused(
        "a tab that indents", CHECK, "broken_yaml", file="t/task.yaml", row=5, files=task(f"{KEYS}data:\n\ttrain: x\n")
    ),
    refused(
        "a key that stands twice", CHECK, "broken_yaml", file="t/task.yaml", row=5, files=task_with("family: qa\n")
    ),
    refused(
        "a bracket that is not closed",
        CHECK,
        "broken_yaml",
        file="t/task.yaml",
        row=6,
        files=task_with("labels: [a, b\n"),
    ),
    refused(
        "a template without quotes",
        CHECK,
        "broken_yaml",
        file="t/task.yaml",
        row=2,
        files=task(spoilt("'{{ text }}'", "{{ text }}", KEYS) + DATA),
    ),
    refused(
        "a key that is a list", CHECK, "broken_yaml", file="t/task.yaml", row=5, files=task_with("? [a, b]\n: c\n")
    ),
    refused(
        "aliases that stand for a billion values",
        CHECK,
        "broken_yaml",
        file="t/task.yaml",
        row=9,
        files=task_with(BOMB),
    ),
    refused(
        "an alias within itself",
        CHECK,
        "broken_yaml",
        file="t/task.yaml",
        row=5,
        files=task_with("labels: &a [*a, *a]\n"),
    ),
    refused(
        "a list a thousand deep",
        CHECK,
        "broken_yaml",
        file="t/task.yaml",
        files=task_with(f"labels: {'[' * 1000}{']' * 1000}\n"),
    ),
    refused(
        "a list seventy deep",
        CHECK,
        "broken_yaml",
        file="t/task.yaml",
        row=5,
        files=task_with(f"labels: {'[' * 70}{']' * 70}\n"),
    ),
    refused(
        "a tag that makes a program",
        CHECK,
        "broken_yaml",
        file="t/task.yaml",
        row=5,
        files=task_with("name: !!python/object:os.system x\n"),
    ),
    refused(
        "half a character in a key",
        CHECK,
        "broken_yaml",
        file="t/task.yaml",
        row=5,
        files=task_with('name: "\\ud83d"\n'),
    ),
    refused(
        "a task file in Latin-1",
        CHECK,
        "not_utf8",
        file="t/task.yaml",
        row=5,
        found="the byte 0xfc",
        files={**task(), "t/task.yaml": (KEYS + DATA + "instruction: Gefühl\n").encode("latin-1")},
    ),
    refused(
        "a task file in UTF-16",
        CHECK,
        "not_utf8",
        file="t/task.yaml",
        files={**task(), "t/task.yaml": (KEYS + DATA).encode("utf-16")},
    ),
    refused(
        "a task file in UTF-16 without a mark",
        CHECK,
        "not_utf8",
        file="t/task.yaml",
        row=1,
        found="a NUL byte",
        files={**task(), "t/task.yaml": (KEYS + DATA).encode("utf-16-le")},
    ),
    accepted(
        "a byte order mark and CRLF in a task file",
        CHECK,
        "1 checked",
        files={**task(), "t/task.yaml": ("\ufeff" + KEYS + DATA).replace("\n", "\r\n")},
    ),
    accepted("an anchor and an alias", CHECK, "1 checked", files=task_with("name: &n film\nsource: *n\n")),
]

NAMED_KEYS = [
    refused(
        "an unknown key",
        CHECK,
        "unknown_key",
        file="t/task.yaml",
        field="metrik",
        remedy="Did you mean 'metric'?",
        says=("t/task.yaml: unknown key 'metrik'. Did you mean 'metric'?",),
        files=task_with("metrik: accuracy\n"),
    ),
    refused(
        "an unknown key that is like none",
        CHECK,
        "unknown_key",
        file="t/task.yaml",
        field="zzz",
        files=task_with("zzz: 1\n"),
    ),
    refused("a number as a key", CHECK, "unknown_key", file="t/task.yaml", field="1", files=task_with("1: 2\n")),
    refused(
        "a key that is missing",
        CHECK,
        "missing_key",
        file="t/task.yaml",
        field="answer",
        files=task(spoilt("answer: '{{ label }}'\n", "", KEYS) + DATA),
    ),
    refused(
        "a key without a value",
        CHECK,
        "missing_key",
        file="t/task.yaml",
        field="family",
        files=task(spoilt("family: classification", "family:", KEYS) + DATA),
    ),
    refused("no data", CHECK, "missing_key", file="t/task.yaml", field="data", files=task(KEYS)),
    refused(
        "data that is a path",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="data",
        found="'train.jsonl'",
        files=task(f"{KEYS}data: train.jsonl\n"),
    ),
    refused(
        "data with a misspelt key",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="data",
        found="['tran']",
        remedy="Did you mean 'train'?",
        says=(
            "t/task.yaml: data: it does not say where the rows are; expected `train` and `test`, or `file`,",
            "or `hf`, found ['tran']. Did you mean 'train'?",
        ),
        files=task(f"{KEYS}data: {{tran: x}}\n"),
    ),
    refused(
        "data of two kinds",
        CHECK,
        "unknown_key",
        file="t/task.yaml",
        field="data.train",
        files=task(f"{KEYS}data: {{file: x, train: y}}\n"),
    ),
    refused(
        "data without the training side",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="data",
        found="['test']",
        files=task(f"{KEYS}data: {{test: test.jsonl}}\n"),
    ),
    refused(
        "an empty list of files",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="data.train",
        found="[]",
        files=task(f"{KEYS}data: {{train: []}}\n"),
    ),
    refused(
        "a family that there is not",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="family",
        found="'clasification'",
        remedy="Did you mean 'classification'?",
        says=(
            "t/task.yaml: family: no metric is usual for it; expected one of classification, nli, qa, summarization,",
            "generation, math, or any other name together with a metric, found 'clasification'. Did you mean",
        ),
        files=task(spoilt("classification", "clasification", KEYS) + DATA),
    ),
    refused(
        "a metric that there is not",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="metric",
        found="'acuracy'",
        remedy="Did you mean 'accuracy'?",
        files=task_with("metric: acuracy\n"),
    ),
    refused(
        "a share of everything",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="data.test_fraction",
        found="'1.0'",
        files=table_task("", "file: rows.csv, test_fraction: 1.0"),
    ),
    refused(
        "a share that is not a number",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="data.test_fraction",
        found="'nan'",
        files=table_task("", "file: rows.csv, test_fraction: nan"),
    ),
    refused(
        "a share below nothing",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="data.test_fraction",
        found="'-0.5'",
        files=table_task("", "file: rows.csv, test_fraction: -0.5"),
    ),
    refused(
        "a seed that is a word",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="data.seed",
        found="'one'",
        files=table_task("", "file: rows.csv, seed: one"),
    ),
    refused(
        "a delimiter of two characters",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="data.delimiter",
        found="'||'",
        files=table_task("", "file: rows.csv, delimiter: '||'"),
    ),
    refused(
        "a delimiter that is a quote",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="data.delimiter",
        found="'\"'",
        files=table_task("", "file: rows.csv, delimiter: '\"'"),
    ),
    refused(
        "quotes that there are not",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="data.quotes",
        found="'single'",
        files=table_task("", "file: rows.csv, quotes: single"),
    ),
    refused(
        "a Hub dataset without an owner",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="data.hf",
        found="'banking77'",
        files=task(f"{KEYS}data: {{hf: banking77}}\n"),
    ),
    refused(
        "no answer tokens",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="max_answer_tokens",
        found="'0'",
        files=task_with("max_answer_tokens: 0\n"),
    ),
    refused(
        "more answer tokens than can be counted",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="max_answer_tokens",
        found="'99999999999999999999'",
        files=task_with(f"max_answer_tokens: {'9' * 20}\n"),
    ),
    refused(
        "more characters than a template may write",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="max_characters",
        found="'5000000'",
        files=task_with("max_characters: 5000000\n"),
    ),
    refused(
        "a word for a number of characters",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="max_characters",
        found="'many'",
        files=task_with("max_characters: many\n"),
    ),
    refused(
        "bad rows to be ignored",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="bad_rows",
        found="'ignore'",
        files=task_with("bad_rows: ignore\n"),
    ),
    refused(
        "a key in capitals",
        CHECK,
        "unknown_key",
        file="t/task.yaml",
        field="FAMILY",
        remedy="Did you mean 'family'?",
        files=task(spoilt("family", "FAMILY", KEYS) + DATA),
    ),
    refused(
        "class names of a column that nothing reads",
        CHECK,
        "no_effect",
        file="t/task.yaml",
        field="class_names",
        remedy="Did you mean 'label'?",
        files=task_with("class_names: {lable: {good: fine, bad: poor}}\n"),
    ),
    *(
        refused(
            f"a name with U+{ord(mark):04X}",
            CHECK,
            "wrong_value",
            file="t/task.yaml",
            field="name",
            files=task_with(f'name: "a{mark}b"\n'),
        )
        for mark in "\u00a0\u3000\u2028\u202e\u2066"
    ),
    *(
        accepted(f"a name that holds U+{ord(mark):04X}", CHECK, "1 checked", files=task_with(f'name: "a{mark}b"\n'))
        for mark in "\u200c\u200d\u200e\u200f\u00ad"
    ),
    refused(
        "a name with a slash", CHECK, "wrong_value", file="t/task.yaml", field="name", files=task_with("name: a/b\n")
    ),
    refused(
        "a name of control characters",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="name",
        files=task_with('name: "a\\e[31mb"\n'),
    ),
    refused("one label", CHECK, "wrong_value", file="t/task.yaml", field="labels", files=task_with("labels: [good]\n")),
    refused("no label", CHECK, "wrong_value", file="t/task.yaml", field="labels", files=task_with("labels: []\n")),
    refused(
        "a label that stands twice",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="labels",
        files=task_with("labels: [good, bad, ' good']\n"),
    ),
    refused(
        "an empty label",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="labels",
        files=task_with("labels: [good, '']\n"),
    ),
    refused(
        "labels that are no list",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="labels",
        found="'good, bad'",
        files=task_with("labels: good, bad\n"),
    ),
    refused(
        "labels and choices",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        files=task_with("labels: [good, bad]\nchoices: c\n"),
    ),
    refused("references beside labels", CHECK, "wrong_value", file="t/task.yaml", files=task_with("references: r\n")),
    refused(
        "class names that are a word",
        CHECK,
        "wrong_value",
        file="t/task.yaml",
        field="class_names",
        found="'label'",
        files=task_with("class_names: label\n"),
    ),
]

TEMPLATES = [
    refused(
        "a template that names no column",
        CHECK,
        "template_without_column",
        file="t/task.yaml",
        field="query",
        files=task(spoilt("'{{ text }}'", "text", KEYS) + DATA),
    ),
    refused(
        "a template that is not closed",
        CHECK,
        "broken_template",
        file="t/task.yaml",
        field="query",
        files=task(spoilt("{{ text }}", "{{ text", KEYS) + DATA),
    ),
    refused(
        "a column that does not exist",
        CHECK,
        "missing_column",
        file="t/train.jsonl",
        row=1,
        field="txt",
        found="the columns ['label', 'text']",
        remedy="Did you mean 'text'?",
        says=(
            "t/train.jsonl:1: Template '{{ txt }}' names the column 'txt', which is missing; found the",
            "columns ['label', 'text']. Did you mean 'text'?",
        ),
        files=task(spoilt("{{ text }}", "{{ txt }}", KEYS) + DATA),
    ),
    refused(
        "a column whose name has a space",
        CHECK,
        "broken_template",
        file="t/task.yaml",
        field="query",
        files=task(spoilt("{{ text }}", "{{ a b }}", KEYS) + DATA),
    ),
    *(
        Case(
            f"a column whose name has a mark, {column}",
            CHECK,
            ("t/train.jsonl:1: Template", f"Such a column is written row['{column}']."),
            task(
                spoilt("{{ text }}", f"{{{{ {column} }}}}", KEYS) + DATA,
                train=[{**others, column: "x", "label": "good"}],
            ),
        )
        for column, others in (("a-b", {}), ("a.b", {}), ("a-b-c", {"a": "1", "b": "2", "c": "3"}))
    ),
    *(
        refused(
            f"a column whose name has another meaning, {column}",
            CHECK,
            "template_without_column",
            file="t/task.yaml",
            field="query",
            files=task(
                spoilt("{{ text }}", f"{{{{ {column} }}}}", KEYS) + DATA, train=[{column: "x", "label": "good"}]
            ),
        )
        for column in ("true", "range")
    ),
    refused(
        "a filter that does not exist",
        CHECK,
        "broken_template",
        file="t/task.yaml",
        field="query",
        files=task(spoilt("{{ text }}", "{{ text | uper }}", KEYS) + DATA),
    ),
    refused(
        "a template that raises",
        CHECK,
        "template_fails",
        file="t/train.jsonl",
        row=1,
        files=task(spoilt("{{ text }}", "{{ 1 / (text | length - text | length) }}", KEYS) + DATA),
    ),
    refused(
        "a template that cuts to nothing",
        CHECK,
        "template_fails",
        file="t/train.jsonl",
        row=1,
        files=task(spoilt("{{ text }}", "{{ text | truncate(0) }}", KEYS) + DATA),
    ),
    refused(
        "a template that loops",
        CHECK,
        "template_fails",
        file="t/train.jsonl",
        row=1,
        says=(
            "t/train.jsonl:1: Template '{% for i in range(99999) %}{% for j in range(99999) %}{{ text }}{%",
            "endfor %}{% endfor %}' fails: it takes more than 100,000 steps; loop over less.",
        ),
        files=task(
            spoilt(
                "{{ text }}",
                "{% for i in range(99999) %}{% for j in range(99999) %}{{ text }}{% endfor %}{% endfor %}",
                KEYS,
            )
            + DATA
        ),
    ),
    refused(
        "a template that writes without end",
        CHECK,
        "template_fails",
        file="t/train.jsonl",
        row=1,
        files=task(spoilt("{{ text }}", "{{ text * 99999999 }}", KEYS) + DATA),
    ),
    refused(
        "a template that reaches for the machine",
        CHECK,
        "template_fails",
        file="t/train.jsonl",
        row=1,
        files=task(spoilt("{{ text }}", "{{ text.__class__.__mro__ }}", KEYS) + DATA),
    ),
    refused(
        "a template that includes a file",
        CHECK,
        "broken_template",
        file="t/task.yaml",
        field="query",
        files=task(spoilt("{{ text }}", "{% include text %}", KEYS) + DATA),
    ),
    refused(
        "an answer that names nothing",
        CHECK,
        "template_without_column",
        file="t/task.yaml",
        field="answer",
        files=task(spoilt("'{{ label }}'", "good", KEYS) + DATA),
    ),
    refused(
        "an instruction that names a column",
        CHECK,
        "missing_column",
        file="t/task.yaml",
        field="text",
        found="the columns ['labels']",
        files=task_with("instruction: 'Judge {{ text }}.'\n"),
    ),
    refused(
        "an instruction that counts on more labels",
        CHECK,
        "template_fails",
        file="t/task.yaml",
        field="instruction",
        files=task_with("instruction: 'Say {{ labels[2].x }}.'\n"),
    ),
    refused(
        "a template that changes what it is given",
        CHECK,
        "template_fails",
        file="t/train.jsonl",
        row=1,
        files=task(spoilt("{{ text }}", "{{ row.update({}) }}{{ text }}", KEYS) + DATA),
    ),
]


@table_of([*NOT_FOUND, *YAML, *NAMED_KEYS, *TEMPLATES])
def test_a_mistake_in_a_task_file_is_one_sentence(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meet(case, tmp_path, monkeypatch, capsys)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_task_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case("", CHECK, ("t/task.yaml: cannot be read, permission denied",), task(), prepare=close)
    meet(case, tmp_path, monkeypatch, capsys)
