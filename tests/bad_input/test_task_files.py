"""Mistakes in task.yaml, in templates, and in what names a task."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.bad_input.case import Case, accepted, meet, table_of
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
        Case(
            f"columns of {name}",
            f"tasks check {name}:text:label",
            (f"{name}: expected one of .jsonl", f"found the suffix '{Path(name).suffix}'. {what_to_do}"),
            {name: "PK"},
        )
        for name, what_to_do in (("x.xlsx", "Export"), ("n.txt", "Export"), ("x.csv.gz", "Unpack"))
    ),
    Case(
        "an option of a table twice",
        "tasks check a.csv:text:label,seed=1,seed=2",
        ("'seed' stands twice",),
        {"a.csv": TABLE},
    ),
    Case("a task without a name", "tasks check ''", ("The name of a task is empty; expected a folder",)),
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
    Case("a folder that does not exist", "tasks check tt", ("'tt' does not exist. Did you mean 't'?",), task()),
    Case("a folder without a task file", CHECK, ("The folder t holds no task.yaml",), {"t/train.jsonl": lines(*TRAIN)}),
    Case(
        "a task file of another name",
        "tasks show t",
        ("holds no task.yaml.", "Did you mean 'task.yml'?"),
        {"t/task.yml": KEYS + DATA},
    ),
    Case(
        "a link that leads to itself",
        CHECK,
        ("'t' does not exist. t is a link that leads nowhere.",),
        prepare=link_to_itself,
    ),
    Case(
        "a name longer than a file may have", f"tasks check {'t' * 5000}", ("cannot be looked for, file name too long",)
    ),
    Case("a task file that is a folder", "tasks show t", ("t holds no task.yaml",), {"t/task.yaml/x": ""}),
    Case("a pattern that matches nothing", "tasks list 'u*/'", ("No task.yaml matches 'u*/'", "relative to"), task()),
    Case(
        "a table without its columns",
        "tasks check t/a.csv",
        ("name its columns too, as in a.csv:text:label",),
        {"t/a.csv": ""},
    ),
    Case(
        "a table with the name of one column",
        "tasks check a.csv:text",
        ("found no answer column", "QUERY_COLUMN:ANSWER_COLUMN"),
        {"a.csv": "text,label\n"},
    ),
    Case(
        "a column that the table lacks",
        "tasks check a.csv:txt:label",
        ("a.csv:2: the column 'txt' is missing", "Did you mean 'text'?"),
        {"a.csv": "text,label\nx,y\n"},
    ),
    Case(
        "an unknown option of a table",
        "tasks check a.csv:text:label,grup=x",
        ("found 'grup'. Did you mean 'group'?",),
        {"a.csv": "text,label\nx,y\n"},
    ),
    Case("an entry that the catalogue lacks", "tasks show catalog:trecc", ("no task 'trecc'. Did you mean 'trec'?",)),
    Case(
        "a family of the catalogue where one task is meant",
        "tasks show catalog:nli",
        ("stands for", "name one of them"),
    ),
    Case("a word that no entry mentions", "tasks list --search zzz", ("mentions 'zzz'",)),
    Case(
        "a search among tasks of one's own",
        "tasks list t --search film",
        ("--search looks through the catalogue",),
        task(),
    ),
    Case(
        "a data root that is a file",
        "tasks check t --data-root a",
        ("The data root a is no folder",),
        {**task(), "a": ""},
    ),
    Case(
        "two tasks of one name",
        "tasks check a b",
        ("Two tasks are named 'same': a/task.yaml and b/task.yaml", "Rename one with `name:`"),
        {**task(KEYS + DATA + "name: same\n", name="a"), **task(KEYS + DATA + "name: same\n", name="b")},
    ),
    Case("a context without a model that counts it", f"{CHECK} --context 100", ("name the model", "--model"), task()),
]

YAML = [
    Case("an empty task file", CHECK, ("t/task.yaml: expected keys such as family", "found nothing"), task("")),
    Case("a task file of comments", CHECK, ("t/task.yaml: expected keys", "found nothing"), task("# to be done\n")),
    Case(
        "a list in place of keys",
        CHECK,
        ("expected keys such as", "found ['family', 'query']"),
        task("- family\n- query\n"),
    ),
    Case("a sentence in place of keys", CHECK, ("expected keys such as", "found 'my task'"), task("my task")),
    Case("two documents in one file", CHECK, ("t/task.yaml:", "not valid YAML"), task(f"{KEYS}{DATA}---\nname: x\n")),
    Case("a tab that indents", CHECK, ("t/task.yaml:5: not valid YAML", "'\\t'"), task(f"{KEYS}data:\n\ttrain: x\n")),
    Case(
        "a key that stands twice",
        CHECK,
        ("t/task.yaml:5: not valid YAML, the key 'family' stands twice",),
        task_with("family: qa\n"),
    ),
    Case("a bracket that is not closed", CHECK, ("t/task.yaml:", "not valid YAML"), task_with("labels: [a, b\n")),
    Case(
        "a template without quotes",
        CHECK,
        ("t/task.yaml:2: not valid YAML", "begins with a brace or a bracket in quotes"),
        task(spoilt("'{{ text }}'", "{{ text }}", KEYS) + DATA),
    ),
    Case(
        "a key that is a list", CHECK, ("t/task.yaml:5", "a key is a list or a mapping"), task_with("? [a, b]\n: c\n")
    ),
    Case(
        "aliases that stand for a billion values",
        CHECK,
        ("more than 100,000 values", "without aliases"),
        task_with(BOMB),
    ),
    Case(
        "an alias within itself",
        CHECK,
        ("t/task.yaml:", "nested more than 50 deep"),
        task_with("labels: &a [*a, *a]\n"),
    ),
    Case("a list a thousand deep", CHECK, ("t/task.yaml", "nested"), task_with(f"labels: {'[' * 1000}{']' * 1000}\n")),
    Case(
        "a list seventy deep",
        CHECK,
        ("t/task.yaml:5", "nested more than 50 deep"),
        task_with(f"labels: {'[' * 70}{']' * 70}\n"),
    ),
    Case(
        "a tag that makes a program",
        CHECK,
        ("not valid YAML", "python/object"),
        task_with("name: !!python/object:os.system x\n"),
    ),
    Case(
        "half a character in a key",
        CHECK,
        ("t/task.yaml:5", "a text holds '\\ud83d', which is no whole character"),
        task_with('name: "\\ud83d"\n'),
    ),
    Case(
        "a task file in Latin-1",
        CHECK,
        ("t/task.yaml:5: not UTF-8, the byte 0xfc",),
        {**task(), "t/task.yaml": (KEYS + DATA + "instruction: Gefühl\n").encode("latin-1")},
    ),
    Case(
        "a task file in UTF-16",
        CHECK,
        ("t/task.yaml: the file is UTF-16; save it as UTF-8",),
        {**task(), "t/task.yaml": (KEYS + DATA).encode("utf-16")},
    ),
    Case(
        "a task file in UTF-16 without a mark",
        CHECK,
        ("t/task.yaml:1: a NUL byte", "save the file as UTF-8"),
        {**task(), "t/task.yaml": (KEYS + DATA).encode("utf-16-le")},
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
    Case(
        "an unknown key",
        CHECK,
        ("t/task.yaml: unknown key 'metrik'. Did you mean 'metric'?",),
        task_with("metrik: accuracy\n"),
    ),
    Case(
        "an unknown key that is like none",
        CHECK,
        ("unknown key 'zzz'. Known here: ['name', 'family'",),
        task_with("zzz: 1\n"),
    ),
    Case("a number as a key", CHECK, ("t/task.yaml: unknown key '1'",), task_with("1: 2\n")),
    Case(
        "a key that is missing",
        CHECK,
        ("t/task.yaml: the key 'answer' is missing",),
        task(spoilt("answer: '{{ label }}'\n", "", KEYS) + DATA),
    ),
    Case(
        "a key without a value",
        CHECK,
        ("t/task.yaml: the key 'family' is missing",),
        task(spoilt("family: classification", "family:", KEYS) + DATA),
    ),
    Case("no data", CHECK, ("t/task.yaml: the key 'data' is missing",), task(KEYS)),
    Case(
        "data that is a path",
        CHECK,
        ("data: expected `train` and `test`, or `file`, or `hf`; found 'train.jsonl'",),
        task(f"{KEYS}data: train.jsonl\n"),
    ),
    Case(
        "data with a misspelt key",
        CHECK,
        ("t/task.yaml: data: expected", "Did you mean 'train'?"),
        task(f"{KEYS}data: {{tran: x}}\n"),
    ),
    Case(
        "data of two kinds",
        CHECK,
        ("t/task.yaml: data: unknown key 'train'",),
        task(f"{KEYS}data: {{file: x, train: y}}\n"),
    ),
    Case(
        "data without the training side",
        CHECK,
        ("t/task.yaml: data: expected",),
        task(f"{KEYS}data: {{test: test.jsonl}}\n"),
    ),
    Case("an empty list of files", CHECK, ("t/task.yaml: data: train",), task(f"{KEYS}data: {{train: []}}\n")),
    Case(
        "a family that there is not",
        CHECK,
        ("family: input should be", "found 'clasification'", "Did you mean 'classification'?"),
        task(spoilt("classification", "clasification", KEYS) + DATA),
    ),
    Case(
        "a metric that there is not",
        CHECK,
        ("metric: input should be", "found 'acuracy'. Did you mean 'accuracy'?"),
        task_with("metric: acuracy\n"),
    ),
    Case(
        "a share of everything",
        CHECK,
        ("data: test_fraction", "less than 1; found '1.0'"),
        table_task("", "file: rows.csv, test_fraction: 1.0"),
    ),
    Case(
        "a share that is not a number",
        CHECK,
        ("test_fraction", "found 'nan'"),
        table_task("", "file: rows.csv, test_fraction: nan"),
    ),
    Case(
        "a share below nothing",
        CHECK,
        ("test_fraction", "greater than or equal to 0; found '-0.5'"),
        table_task("", "file: rows.csv, test_fraction: -0.5"),
    ),
    Case("a seed that is a word", CHECK, ("data: seed", "found 'one'"), table_task("", "file: rows.csv, seed: one")),
    Case(
        "a delimiter of two characters",
        CHECK,
        ("data: delimiter", "found '||'"),
        table_task("", "file: rows.csv, delimiter: '||'"),
    ),
    Case(
        "a delimiter that is a quote",
        CHECK,
        ("data: delimiter", "found '\"'"),
        table_task("", "file: rows.csv, delimiter: '\"'"),
    ),
    Case(
        "quotes that there are not",
        CHECK,
        ("data: quotes", "'csv' or 'none'", "found 'single'"),
        table_task("", "file: rows.csv, quotes: single"),
    ),
    Case(
        "a Hub dataset without an owner",
        CHECK,
        ("data: hf", "found 'banking77'"),
        task(f"{KEYS}data: {{hf: banking77}}\n"),
    ),
    Case(
        "no answer tokens",
        CHECK,
        ("max_answer_tokens", "greater than or equal to 1; found '0'"),
        task_with("max_answer_tokens: 0\n"),
    ),
    Case(
        "more characters than a template may write",
        CHECK,
        ("max_characters", "less than or equal to 4000000"),
        task_with("max_characters: 5000000\n"),
    ),
    Case(
        "a word for a number of characters",
        CHECK,
        ("max_characters: ", "found 'many'"),
        task_with("max_characters: many\n"),
    ),
    Case(
        "bad rows to be ignored",
        CHECK,
        ("bad_rows: input should be 'refuse' or 'drop'; found 'ignore'",),
        task_with("bad_rows: ignore\n"),
    ),
    Case(
        "a key in capitals",
        CHECK,
        ("t/task.yaml: unknown key 'FAMILY'. Did you mean 'family'?",),
        task(spoilt("family", "FAMILY", KEYS) + DATA),
    ),
    Case(
        "class names of a column that nothing reads",
        CHECK,
        ("t/task.yaml: class_names: no template", "the column 'lable'; name one of ['label', 'text']", "mean 'label'?"),
        task_with("class_names: {lable: {good: fine, bad: poor}}\n"),
    ),
    *(
        Case(f"a name with U+{ord(mark):04X}", CHECK, ("name: a name has no",), task_with(f'name: "a{mark}b"\n'))
        for mark in "\u00a0\u3000\u2028\u202e\u2066"
    ),
    *(
        accepted(f"a name that holds U+{ord(mark):04X}", CHECK, "1 checked", files=task_with(f'name: "a{mark}b"\n'))
        for mark in "\u200c\u200d\u200e\u200f\u00ad"
    ),
    Case("a name with a slash", CHECK, ("name: a name has no spaces, slashes",), task_with("name: a/b\n")),
    Case("a name of control characters", CHECK, ("name: a name has no",), task_with('name: "a\\e[31mb"\n')),
    Case("one label", CHECK, ("labels: expected two labels at least, found ['good']",), task_with("labels: [good]\n")),
    Case("no label", CHECK, ("labels: expected two labels at least, found []",), task_with("labels: []\n")),
    Case(
        "a label that stands twice",
        CHECK,
        ("labels: 'good' stands twice",),
        task_with("labels: [good, bad, ' good']\n"),
    ),
    Case("an empty label", CHECK, ("labels: a label is empty",), task_with("labels: [good, '']\n")),
    Case(
        "labels that are no list",
        CHECK,
        ("labels: found 'good, bad'; expected: The closed answer set",),
        task_with("labels: good, bad\n"),
    ),
    Case(
        "labels and choices",
        CHECK,
        ("labels are one set", "give one of them"),
        task_with("labels: [good, bad]\nchoices: c\n"),
    ),
    Case("references beside labels", CHECK, ("references list accepted free answers",), task_with("references: r\n")),
    Case("class names that are a word", CHECK, ("class_names", "found 'label'"), task_with("class_names: label\n")),
]

TEMPLATES = [
    Case(
        "a template that names no column",
        CHECK,
        ("query: the template 'text' names no column", "as in '{{ text }}'"),
        task(spoilt("'{{ text }}'", "text", KEYS) + DATA),
    ),
    Case(
        "a template that is not closed",
        CHECK,
        ("t/task.yaml: query: Template '{{ text' does not parse",),
        task(spoilt("{{ text }}", "{{ text", KEYS) + DATA),
    ),
    Case(
        "a column that does not exist",
        CHECK,
        ("t/train.jsonl:1: Template '{{ txt }}' names the column 'txt'", "Did you mean 'text'?"),
        task(spoilt("{{ text }}", "{{ txt }}", KEYS) + DATA),
    ),
    Case(
        "a column whose name has a space",
        CHECK,
        ("does not parse", "A column whose name is no word is written row['a b']."),
        task(spoilt("{{ text }}", "{{ a b }}", KEYS) + DATA),
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
        Case(
            f"a column whose name has another meaning, {column}",
            CHECK,
            ("names no column", "written row['true']."),
            task(spoilt("{{ text }}", f"{{{{ {column} }}}}", KEYS) + DATA, train=[{column: "x", "label": "good"}]),
        )
        for column in ("true", "range")
    ),
    Case(
        "a filter that does not exist",
        CHECK,
        ("query: Template", "does not parse", "'uper'"),
        task(spoilt("{{ text }}", "{{ text | uper }}", KEYS) + DATA),
    ),
    Case(
        "a template that raises",
        CHECK,
        ("t/train.jsonl:1: Template", "fails on a row", "division by zero"),
        task(spoilt("{{ text }}", "{{ 1 / (text | length - text | length) }}", KEYS) + DATA),
    ),
    Case(
        "a template that cuts to nothing",
        CHECK,
        ("t/train.jsonl:1: Template", "truncate: expected length >= 3, got 0"),
        task(spoilt("{{ text }}", "{{ text | truncate(0) }}", KEYS) + DATA),
    ),
    Case(
        "a template that loops",
        CHECK,
        ("t/train.jsonl:1: Template", "more than 100,000 steps"),
        task(
            spoilt(
                "{{ text }}",
                "{% for i in range(99999) %}{% for j in range(99999) %}{{ text }}{% endfor %}{% endfor %}",
                KEYS,
            )
            + DATA
        ),
    ),
    Case(
        "a template that writes without end",
        CHECK,
        ("t/train.jsonl:1: Template", "more than 4,000,000 characters"),
        task(spoilt("{{ text }}", "{{ text * 99999999 }}", KEYS) + DATA),
    ),
    Case(
        "a template that reaches for the machine",
        CHECK,
        ("t/train.jsonl:1: Template", "unsafe"),
        task(spoilt("{{ text }}", "{{ text.__class__.__mro__ }}", KEYS) + DATA),
    ),
    Case(
        "a template that includes a file",
        CHECK,
        ("query: Template", "includes"),
        task(spoilt("{{ text }}", "{% include text %}", KEYS) + DATA),
    ),
    Case(
        "an answer that names nothing",
        CHECK,
        ("answer: the template 'good' names no column",),
        task(spoilt("'{{ label }}'", "good", KEYS) + DATA),
    ),
    Case(
        "an instruction that names a column",
        CHECK,
        ("t/task.yaml: instruction: Template", "'text'"),
        task_with("instruction: 'Judge {{ text }}.'\n"),
    ),
    Case(
        "an instruction that counts on more labels",
        CHECK,
        ("t/task.yaml: instruction: Template", "fails"),
        task_with("instruction: 'Say {{ labels[2].x }}.'\n"),
    ),
    Case(
        "a template that changes what it is given",
        CHECK,
        ("t/train.jsonl:1: Template",),
        task(spoilt("{{ text }}", "{{ row.update({}) }}{{ text }}", KEYS) + DATA),
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
