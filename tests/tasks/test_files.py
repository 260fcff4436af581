"""Task files and tables become tasks, and mistakes are named with file and line."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from manyicl.errors import UserError
from manyicl.tasks.accepted_answers import AcceptedAnswers
from manyicl.tasks.files import load_task, load_tasks
from manyicl.tasks.leakage import ON_BOTH_SIDES
from manyicl.tasks.schema import OneFile
from manyicl.tasks.spec import TaskSpec
from manyicl.tasks.split import split
from manyicl.tasks.task import Example, Query, Task
from manyicl.tasks.values import as_text

Rows = Sequence[Mapping[str, Any]]

TRAIN: Rows = [
    {"text": "good film", "label": "positive"},
    {"text": "bad film", "label": "negative"},
    {"text": "fine film", "label": "positive"},
]
TEST: Rows = [{"text": "dull film", "label": "negative"}]
CLASSIFICATION = "family: classification\nquery: '{{ text }}'\nanswer: '{{ label }}'\n"
FILES = "data: {train: train.jsonl, test: test.jsonl}\n"


def write_task(folder: Path, keys: str = CLASSIFICATION, train: Rows = TRAIN, test: Rows = TEST) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(keys if "data:" in keys else keys + FILES)
    return folder


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_task(folder, **options)
    return str(caught.value)


def answers(task: Task) -> list[str]:
    return [example.answer for example in (*task.train, *task.test)]


# --- what a task file says ----------------------------------------------------------------------------------


def test_a_folder_becomes_a_task(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path / "films"))
    assert (task.name, task.family, task.metric, task.source) == ("films", "classification", "accuracy", "films")
    assert task.labels == ("negative", "positive")
    assert task.columns == ("text",)
    assert [example.origin for example in task.train] == ["train.jsonl:1", "train.jsonl:2", "train.jsonl:3"]
    assert task.test[0].query == task.query("dull film") == task.query({"text": "dull film"})


@pytest.mark.parametrize(
    ("keys", "metric"),
    [
        ("family: qa", "exact_match"),
        ("family: summarization", "rougeL"),
        ("family: generation", "rougeL"),
        ("family: math", "numeric_match"),
        ("family: math\nlabels: [positive, negative]", "accuracy"),
        ("family: qa\nmetric: token_f1", "token_f1"),
    ],
)
def test_the_metric_follows_from_family_and_labels(tmp_path: Path, keys: str, metric: str) -> None:
    folder = write_task(tmp_path / "t", f"{keys}\nquery: '{{{{ text }}}}'\nanswer: '{{{{ label }}}}'\n")
    assert load_task(folder).metric == metric


def test_a_family_may_have_any_name_where_a_metric_is_given(tmp_path: Path) -> None:
    keys = CLASSIFICATION.replace("classification", "triage")
    task = load_task(write_task(tmp_path / "t", f"{keys}metric: macro_f1\nlabels: [positive, negative]\n"))
    assert (task.family, task.metric, task.labels) == ("triage", "macro_f1", ("positive", "negative"))
    assert TaskSpec.model_validate_json(task.spec.model_dump_json()) == task.spec
    with pytest.raises(UserError) as caught:
        load_task(write_task(tmp_path / "t", keys))
    assert (caught.value.code, caught.value.field) == ("wrong_value", "family")
    assert "or any other name together with a metric, found 'triage'" in str(caught.value)
    path = write_tickets(tmp_path / "tickets.csv")
    assert load_task(f"{path}:text:label,family=triage,metric=exact_match").family == "triage"
    assert Task.from_examples("t", [("a", "b")], family="triage", metric="exact_match").family == "triage"
    with pytest.raises(UserError, match="Did you mean 'classification'"):
        Task.from_examples("t", [("a", "b")], family="clasification")


def test_metrics_that_a_task_file_may_name_are_those_that_exist() -> None:
    from typing import get_args

    from manyicl.evaluation.metrics import METRICS
    from manyicl.tasks.schema import Metric

    assert set(get_args(Metric)) == set(METRICS)


def test_labels_stay_what_was_written_even_where_yaml_would_read_something_else(tmp_path: Path) -> None:
    labels = ["yes", "no", "007", "1.0", "NA", "null", "2024-01-01"]
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    task = load_task(
        write_task(tmp_path / "t", CLASSIFICATION + f"labels: [{', '.join(labels)}]\n", train=rows, test=[])
    )
    assert list(task.labels or ()) == labels == answers(task)


def test_json_booleans_are_read_as_written_and_null_as_nothing(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": True, "note": None}, {"text": "b", "label": False, "note": "n"}]
    keys = CLASSIFICATION.replace("{{ text }}", "{{ text }}|{{ note }}")
    task = load_task(write_task(tmp_path / "t", keys, train=rows, test=[]))
    assert task.labels == ("false", "true")
    assert [example.query.text for example in task.train] == ["a|", "b|n"]


@pytest.mark.parametrize("names", ["[negative, positive]", "{0: negative, 1: positive}"])
def test_class_numbers_become_names_before_the_templates(tmp_path: Path, names: str) -> None:
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    keys = CLASSIFICATION + f"class_names: {{label: {names}}}\n"
    assert answers(load_task(write_task(tmp_path / "t", keys, train=rows, test=[]))) == ["positive", "negative"]
    rows[1]["label"] = -1
    write_task(tmp_path / "t", keys, train=rows, test=[])
    assert "train.jsonl:2: the column 'label' is -1: the row has no label. Fix the row, or" in refusal(tmp_path / "t")
    rows[1]["label"] = 7
    write_task(tmp_path / "t", keys, train=rows, test=[])
    assert "train.jsonl:2: class_names does not name the class '7' of the column 'label'" in refusal(tmp_path / "t")


def test_choices_are_the_rows_own_options(tmp_path: Path) -> None:
    rows = [{"text": "?", "label": "b", "options": ["a", " b"]}]
    keys = CLASSIFICATION.replace("classification", "qa") + "choices: options\n"
    task = load_task(write_task(tmp_path / "t", keys, train=rows, test=[]))
    assert (task.labels, task.metric, task.train[0].query.choices) == (None, "accuracy", ("a", "b"))
    write_task(tmp_path / "t", keys, train=[{"text": "?", "label": "c", "options": ["a", "b"]}], test=[])
    assert "train.jsonl:1: the answer 'c' is none of the row's options; expected one of ['a', 'b']" in refusal(
        tmp_path / "t"
    )


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"options": {"text": ["a", "b"]}}, "options.text"),
        ({"first": "a", "second": "b"}, "first, second"),
        ({"options.text": ["a", "b"], "options": {"text": ["x"]}}, "options.text"),
    ],
)
def test_choices_stand_within_a_column_or_in_columns_of_their_own(
    tmp_path: Path, options: dict[str, Any], where: str
) -> None:
    keys = CLASSIFICATION.replace("classification", "qa") + f"choices: {where}\n"
    rows = [{"text": "?", "label": "b", **options}]
    task = load_task(write_task(tmp_path / "t", keys, train=rows, test=[]))
    assert task.train[0].query.choices == task.query(rows[0]).choices == ("a", "b")
    write_task(tmp_path / "t", keys, train=[{"text": "?", "label": "b"}], test=[])
    assert "train.jsonl:1: " in refusal(tmp_path / "t")


@pytest.mark.parametrize(
    ("row", "extra"),
    [
        ({"text": "q", "label": ["one", "uno", "one"]}, ""),
        ({"text": "q", "label": "one", "also": {"text": ["one", "uno"]}}, "references: also.text\n"),
        ({"text": "q", "label": "one", "also": ["one", "uno"]}, "references: also\n"),
    ],
)
def test_several_accepted_answers_come_from_a_list(tmp_path: Path, row: dict[str, Any], extra: str) -> None:
    keys = CLASSIFICATION.replace("classification", "qa") + extra
    example = load_task(write_task(tmp_path / "t", keys, train=[row], test=[])).train[0]
    assert (example.answer, example.references) == ("one", ("one", "uno"))


def test_rows_on_both_sides_leave_the_training_side_and_are_counted(tmp_path: Path) -> None:
    train = [*TRAIN, {"text": "  DULL\tfilm ", "label": "negative"}]
    task = load_task(write_task(tmp_path / "t", train=train))
    assert len(task.train) == 3
    assert len(task.test) == 1
    assert task.dropped == {ON_BOTH_SIDES: 1}


def test_the_data_hash_follows_content_not_form(tmp_path: Path) -> None:
    one = load_task(write_task(tmp_path / "one"))
    (tmp_path / "two").mkdir()
    for name, rows in (("train", TRAIN), ("test", TEST)):
        text = "".join(f"{row['text']},{row['label']}\n" for row in rows)
        (tmp_path / "two" / f"{name}.csv").write_text("text,label\n" + text)
    (tmp_path / "two" / "task.yaml").write_text(CLASSIFICATION + FILES.replace("jsonl", "csv"))
    assert load_task(tmp_path / "two").data_hash == one.data_hash
    other = [*TRAIN[:-1], {"text": "fine film!", "label": "positive"}]
    assert load_task(write_task(tmp_path / "three", train=other)).data_hash != one.data_hash


def test_the_data_hash_covers_instruction_and_labels(tmp_path: Path) -> None:
    keys = ["", "instruction: Say it.\n", "instruction: Say it!\n", "labels: [positive, negative]\n"]
    keys.append("labels: [positive, negative, mixed]\n")
    tasks = [load_task(write_task(tmp_path / str(i), CLASSIFICATION + more)) for i, more in enumerate(keys)]
    assert len({task.data_hash for task in tasks}) == len(tasks)


def test_an_instruction_may_name_labels_that_only_the_rows_know(tmp_path: Path) -> None:
    keys = CLASSIFICATION + "labels: from_train\ninstruction: 'Say {{ labels[0] }} or {{ labels[1] }}.'\n"
    assert load_task(write_task(tmp_path / "t", keys)).instruction() == "Say negative or positive."
    folder = write_task(tmp_path / "t", keys.replace("labels[1]", "labels[2]"))
    assert "task.yaml: instruction: Template" in refusal(folder)


def test_a_negative_number_of_demonstrations_is_refused(tmp_path: Path) -> None:
    task = load_task(write_task(tmp_path / "t"))
    assert task.demonstrations(0) == ()
    with pytest.raises(UserError, match="expected num_shots from 0 to 3, found -3"):
        task.demonstrations(-3)


def test_data_paths_begin_beside_the_task_file_or_else_under_the_data_root(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "data" / "films")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "task.yaml").write_text(
        CLASSIFICATION + "data: {train: films/train.jsonl, test: films/test.jsonl}\n"
    )
    assert len(load_task(tmp_path / "t", tmp_path / "data").train) == 3
    assert len(load_task(folder, tmp_path / "data").train) == 3
    assert "--data-root" in refusal(tmp_path / "t")
    assert "Did you mean 'data'?" in refusal(tmp_path / "t", data_root=tmp_path / "dta")


def test_rows_of_the_hub_are_read_through_datasets(tmp_path: Path) -> None:
    class Split(list[dict[str, object]]):
        features: Mapping[str, object] = {}

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> Split:
        return Split(TRAIN if split == "train" else TEST)  # type: ignore[arg-type]

    folder = write_task(tmp_path / "t", CLASSIFICATION + "data: {hf: owner/films, test: validation}\n")
    task = load_task(folder, load_dataset=load_dataset)
    assert len(task.train) == 3
    assert task.test[0].origin == "films test:1".replace("test", "validation")


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("querry: x\n", "unknown key 'querry'. Did you mean 'query'?"),
        ("family: clasification\n", "Did you mean 'classification'?"),
        ("metric: rouge\n", "Did you mean 'rouge"),
        ("labels: [a, a]\n", "the label 'a' is given twice"),
        ("labels: [a]\n", "expected two labels at least"),
        ("labels: [a, b]\nchoices: c\n", "give one of them"),
        ("max_answer_tokens: 0\n", "max_answer_tokens"),
        ("name: a b\n", "a name has no spaces"),
        ("data: {tran: x}\n", "Did you mean 'train'?"),
        ("data: {file: x, test_fractoin: 0.1}\n", "Did you mean 'test_fraction'?"),
        ("data: {file: x, test_fraction: 1.5}\n", "test_fraction"),
        ("query: text\n", "names no column. Write one in braces, as in '{{ text }}'"),
        ("query: '{{ text'\n", "does not parse"),
        ("bad_rows: ignore\n", "bad_rows"),
        ("query: '{{ text }}'\nquery: '{{ text }}'\n", "task.yaml:5: not valid YAML, the key 'query' occurs twice"),
        ("query: [\n", "not valid YAML"),
        ("query: {{ text }}\n", "task.yaml:4: not valid YAML, a key is a list or a mapping. Put text that begins"),
        ("? [a, b]\n: c\n", "not valid YAML, a key is a list or a mapping"),
    ],
)
def test_a_mistake_in_a_task_file_is_one_clear_sentence(tmp_path: Path, keys: str, message: str) -> None:
    written = {key.split(":")[0] for key in keys.splitlines()}
    rest = [line for line in CLASSIFICATION.splitlines() if line.split(":")[0] not in written]
    folder = write_task(tmp_path / "t", "\n".join(rest) + "\n" + ("" if "data" in keys else FILES) + keys)
    said = refusal(folder)
    assert message in said
    assert "task.yaml" in said


def test_a_task_file_that_is_not_utf8_is_named_by_line(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t")
    (folder / "task.yaml").write_bytes((CLASSIFICATION + FILES + "instruction: Gefühl\n").encode("latin-1"))
    assert "task.yaml:5: not text in UTF-8; found the byte 0xfc" in refusal(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x", "label": ""}, "an answer or option is empty"),
        ({"text": "x", "label": None}, "an answer or option is empty"),
        ({"text": "  ", "label": "positive"}, "the query is empty"),
        ({"text": "x", "label": "positiv"}, "'positiv' is no label of task 't'"),
        ({"text": "\ud83d", "label": "positive"}, "half a character"),
    ],
)
def test_a_bad_row_is_refused_by_line_or_dropped_and_counted(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    keys = CLASSIFICATION + "labels: [positive, negative]\n"
    folder = write_task(tmp_path / "t", keys, train=[*TRAIN, row])
    said = refusal(folder)
    assert "train.jsonl:4: " in said
    assert message in said
    task = load_task(write_task(folder, keys + "bad_rows: drop\n", train=[*TRAIN, row]))
    assert len(task.train) == 3
    assert sum(task.dropped.values()) == 1


def test_a_missing_column_is_named_with_the_line_and_the_nearest_column(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t", train=[TRAIN[0], {"txt": "x", "label": "positive"}])
    said = refusal(folder)
    assert "train.jsonl:2: " in said
    assert "'text'" in said
    assert "Did you mean 'txt'?" in said


@pytest.mark.parametrize(
    ("answer", "label", "extra"),
    [
        ("{{ label }}", ["joy", "anger"], ""),
        ("{{ label | join(', ') }}", ["joy", "anger"], ""),
        ("{{ label }}", "joy, anger", "labels: [joy, anger]\n"),
    ],
)
def test_a_multi_label_task_is_refused_by_name(tmp_path: Path, answer: str, label: object, extra: str) -> None:
    keys = CLASSIFICATION.replace("'{{ label }}'", f'"{answer}"') + "bad_rows: drop\n" + extra
    train: Rows = [{"text": "a", "label": ["joy"] if isinstance(label, list) else "joy"}, {"text": "b", "label": label}]
    folder = write_task(tmp_path / "emotions", keys, train=train)
    said = refusal(folder)
    assert "train.jsonl:2: task 'emotions' is multi-label: this row has ['anger', 'joy']" in said


def test_an_answer_that_is_a_label_is_one_whatever_lists_its_template_reads(tmp_path: Path) -> None:
    keys = "name: letters\nfamily: qa\nquery: '{{ text }}'\nanswer: \"{{ 'AB'[options.index(right)] }}\"\n"
    keys += "labels: [A, B]\ndata: {train: train.jsonl, test: test.jsonl}\n"
    rows: Rows = [{"text": f"q {n}", "options": ["red", "blue"], "right": ("red", "blue")[n % 2]} for n in range(4)]
    task = load_task(write_task(tmp_path / "letters", keys, train=rows, test=[{**rows[0], "text": "another"}]))
    assert [example.answer for example in task.train] == ["A", "B", "A", "B"]


def test_a_list_with_one_label_is_that_label(tmp_path: Path) -> None:
    train = [{"text": "a", "label": ["joy"]}, {"text": "b", "label": ["anger"]}]
    assert load_task(write_task(tmp_path / "t", train=train, test=[])).labels == ("anger", "joy")


def test_a_test_label_that_training_lacks_is_refused(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t", test=[{"text": "x", "label": "mixed"}])
    assert "test.jsonl:1: no training row of task 't' has the label 'mixed'" in refusal(folder)


def test_a_task_without_training_rows_says_where_they_went(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t", train=TEST)
    assert f"no training rows left; dropped: 1 ({ON_BOTH_SIDES})" in refusal(folder)


def test_a_template_cannot_reach_beyond_its_row(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t", CLASSIFICATION.replace("{{ text }}", "{{ text.__class__.__mro__ }}"))
    assert "train.jsonl:1: Template" in refusal(folder)


# --- a table as a task --------------------------------------------------------------------------------------


def write_tickets(path: Path, num_rows: int = 40) -> Path:
    lines = [f"ticket number {i},{'billing' if i % 3 else 'login'},c{i // 4}\n" for i in range(num_rows)]
    path.write_text("text,label,customer\n" + "".join(lines))
    return path


@pytest.mark.parametrize("form", ["{}:text:label", "{}:text->label"])
def test_a_table_with_two_named_columns_is_a_task(tmp_path: Path, form: str) -> None:
    path = write_tickets(tmp_path / "my tickets.csv")
    task = load_task(form.format(path))
    assert (task.name, task.family, task.labels) == ("my_tickets", "classification", ("billing", "login"))
    assert (len(task.train), len(task.test)) == (32, 8)
    assert task == load_task(form.format(path))
    assert task.query("x").text == "x"


def test_the_split_follows_seed_fraction_and_group(tmp_path: Path) -> None:
    path = write_tickets(tmp_path / "tickets.csv")
    first = load_task(f"{path}:text:label")
    assert load_task(f"{path}:text:label,seed=1").test != first.test
    assert len(load_task(f"{path}:text:label,test_fraction=0.5").test) == 20
    assert load_task(f"{path}:text:label,test_fraction=0").test == ()
    grouped = load_task(f"{path}:text:label,group=customer")
    customers = [{int(e.query.text.split()[-1]) // 4 for e in side} for side in (grouped.train, grouped.test)]
    assert customers[0].isdisjoint(customers[1])
    assert len(grouped.test) == 8


@pytest.mark.parametrize("missing", ["", " ", None])
def test_rows_without_a_group_are_split_alike_in_every_form(tmp_path: Path, missing: str | None) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"text": f"ticket {i}", "label": f"answer {i}", "customer": f"c{i // 4}" if i % 2 else missing}
        for i in range(40)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = [",".join(str(value or "") for value in row.values()) for row in rows]
    (tmp_path / "t.csv").write_text("\n".join(["text,label,customer", *fields]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    forms = [load_task(f"{tmp_path}/t.{suffix}:text:label,group=customer") for suffix in ("jsonl", "csv", "parquet")]
    assert len({task.data_hash for task in forms}) == 1
    assert 8 <= len(forms[0].test) <= 9


def test_rows_with_the_same_query_stay_on_one_side_and_rare_labels_in_training(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    rows = [f"Text {i % 20},{'a' if i % 20 else 'rare'}\n" for i in range(60)]
    path.write_text("q,a\n" + "".join(rows))
    for seed in range(5):
        task = load_task(f"{path}:q:a,seed={seed},test_fraction=0.5")
        assert task.dropped == {}
        assert "rare" in {example.answer for example in task.train}
        assert {e.query.text for e in task.train}.isdisjoint({e.query.text for e in task.test})


def test_each_label_has_its_share_of_the_test_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    labels = [label for label, count in (("common", 60), ("usual", 30), ("rare", 10)) for _ in range(count)]
    path.write_text("q,a\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels)))
    for seed in range(5):
        task = load_task(f"{path}:q:a,seed={seed}")
        assert Counter(example.answer for example in task.test) == {"common": 12, "usual": 6, "rare": 2}


def test_labels_with_few_rows_share_the_test_rows_that_are_left(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    labels = ["a"] * 6 + ["b"] * 5 + ["c"] * 5 + ["single"]
    path.write_text("q,a\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels)))
    for seed in range(5):
        task = load_task(f"{path}:q:a,seed={seed},family=classification,test_fraction=0.3")
        counts = Counter(example.answer for example in task.test)
        assert counts.total() == 5
        assert counts.keys() == {"a", "b", "c"}
        assert "single" in {example.answer for example in task.train}


def test_rows_of_ten_thousand_labels_are_split_evenly() -> None:
    examples = [Example(Query(f"text {i}"), f"{i % 10_000}", (f"{i % 10_000}",), f"t:{i}") for i in range(30_000)]
    train, test = split(examples, OneFile(file="t"), {}, is_closed=True)
    assert (len(train), len(test)) == (24_000, 6_000)
    assert max(Counter(example.answer for example in test).values()) == 1


def test_the_family_of_a_table_is_inferred_from_its_answers(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("q,a\n" + "".join(f"q{i},answer {i}\n" for i in range(20)) + "q99,\n")
    task = load_task(f"{path}:q:a")
    assert (task.family, task.labels, task.dropped) == ("generation", None, {"empty answer": 1})
    assert load_task(f"{path}:q:a,family=qa").metric == "exact_match"


def test_a_table_may_have_another_delimiter(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("q;a\n" + "".join(f"q{i};{'x' if i % 2 else 'y'}\n" for i in range(20)))
    assert load_task(f"{path}:q:a,delimiter=;").labels == ("x", "y")


def test_a_table_may_be_packed_and_in_another_encoding(tmp_path: Path) -> None:
    rows = "Text;Team\n" + "".join(f"Größe {i};{'x' if i % 2 else 'y'}\n" for i in range(20))
    (tmp_path / "my tickets.csv.gz").write_bytes(gzip.compress(rows.encode("cp1252")))
    task = load_task(f"{tmp_path}/my tickets.csv.gz:Text:Team,encoding=cp1252,delimiter=;")
    assert (task.name, task.labels) == ("my_tickets", ("x", "y"))
    assert task.train[0].query.text.startswith("Größe")
    assert task == load_task(f"{tmp_path}/my tickets.csv.gz:Text:Team,encoding=cp1252")
    write_task(
        tmp_path / "t",
        CLASSIFICATION.replace("text", "Text").replace("label", "Team")
        + "name: my_tickets\n"
        + "data: {file: ../my tickets.csv.gz, encoding: cp1252}\n",
    )
    assert load_task(tmp_path / "t").data_hash == task.data_hash


def test_columns_of_a_table_may_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("Customer text,in\n" + "".join(f"q{i},{'x' if i % 2 else 'y'}\n" for i in range(20)))
    task = load_task(f"{path}:Customer text:in")
    assert task.columns == ("Customer text",)
    assert task.query("hello").text == task.query({"Customer text": "hello"}).text == "hello"


@pytest.mark.parametrize(
    "name",
    ["range", "self", "None", "True", "dict", "lipsum", "not", "row", "loop", "items", "it's", "a\\b", "}}", '"'],
)
def test_no_name_of_a_column_has_another_meaning(tmp_path: Path, name: str) -> None:
    path = tmp_path / "t.csv"
    quoted = name.replace('"', '""')
    path.write_text(f'"{quoted}",label\n' + "".join(f"q{i},{'x' if i % 2 else 'y'}\n" for i in range(20)))
    task = load_task(f"{path}:{name}:label")
    assert task.columns == (name,)
    assert task.query("hello").text == "hello"
    assert load_task(f"{path}:label:{name}").family == "generation"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("txt:label", "the column 'txt' is missing; .* Did you mean 'text'"),
        ("text-", "write a colon instead"),
        ("text", "no answer column is named"),
        ("text:label,seed=1,seed=2", "the option 'seed' has no value, or is given twice"),
        ("text:label,grup=customer", "Did you mean 'group'"),
        ("text:label,test_fraction=2", "test_fraction"),
        ("text:label,encoding=cp1253x", r"no encoding of texts has the name 'cp1253x'.*Did you mean 'cp125"),
        ("text:label,sheet=one", "data: sheet has no effect, for no file is an Excel workbook"),
        ("text:label,family=clasification", "Did you mean 'classification'"),
    ],
)
def test_a_mistake_in_the_form_of_a_table_is_refused(tmp_path: Path, columns: str, message: str) -> None:
    path = write_tickets(tmp_path / "tickets.csv")
    with pytest.raises(UserError, match=message):
        load_task(f"{path}:{columns}")


# --- many tasks ---------------------------------------------------------------------------------------------


def test_tasks_are_found_by_folder_file_glob_and_table_each_once(tmp_path: Path) -> None:
    for name in ("films_a", "films_b", "other"):
        write_task(tmp_path / "all" / name)
    tickets = write_tickets(tmp_path / "tickets.csv")
    (tmp_path / "all" / "README.md").write_text("not a task")

    def names(*patterns: str | Path) -> list[str]:
        return [task.name for task in load_tasks(patterns)]

    assert names(tmp_path / "all") == ["films_a", "films_b", "other"]
    assert names(f"{tmp_path}/all/films_*") == ["films_a", "films_b"]
    assert names(f"{tmp_path}/all/*", tmp_path / "all" / "other" / "task.yaml") == ["films_a", "films_b", "other"]
    assert names(f"{tickets}:text:label", tmp_path / "all" / "other") == ["tickets", "other"]


def test_a_tilde_is_the_home_folder_wherever_a_path_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = write_task(tmp_path / "films")
    write_tickets(tmp_path / "tickets.csv")
    write_task(tmp_path / "other", CLASSIFICATION + "data: {train: ~/films/train.jsonl, test: test.jsonl}")
    rooted = write_task(tmp_path / "rooted", CLASSIFICATION + "data: {train: films/train.jsonl}")
    tasks = load_tasks(["~/films", "~/oth*", "~/tickets.csv:text:label", folder])
    assert [task.name for task in tasks] == ["films", "other", "tickets"]
    assert tasks[0].train == tasks[1].train == load_task(rooted, Path("~")).train
    assert load_task("~/tickets.csv:text:label") == tasks[2]


@pytest.mark.parametrize(
    ("file", "name"), [("می\u200cروم", "می\u200cروم"), ("a\u3000b, c", "a_b_c"), ("a\u202eb\x1bc", "a_b_c")]
)
def test_the_name_of_a_file_or_folder_is_made_fit_for_a_task(tmp_path: Path, file: str, name: str) -> None:
    assert load_task(f"{write_tickets(tmp_path / f'{file}.csv')}:text:label").name == name
    assert load_task(write_task(tmp_path / file)).name == name


def test_an_option_that_a_row_repeats_is_one_answer(tmp_path: Path) -> None:
    keys = CLASSIFICATION.replace("classification", "qa") + "choices: options\n"
    row = {"text": "a", "label": "b", "options": ["b", "c ", "b", "c"]}
    assert load_task(write_task(tmp_path / "t", keys, [row], [])).train[0].query.choices == ("b", "c")


@pytest.mark.parametrize(
    ("key", "row"),
    [("choices: options", {"options": [1, 0]}), ("references: options.numbers", {"options": {"numbers": [0, 1]}})],
)
def test_class_names_are_those_of_choices_and_references_too(tmp_path: Path, key: str, row: dict[str, Any]) -> None:
    keys = CLASSIFICATION.replace("classification", "qa")
    keys += f"class_names: {{{key.split(': ')[1]}: [x, y]}}\n{key}\n"
    folder = write_task(tmp_path / "t", keys, [{"text": "a", "label": "x", **row}], [])
    example = load_task(folder).train[0]
    assert example.query.choices == (("y", "x") if "choices" in key else None)
    assert example.references == (("x",) if "choices" in key else ("x", "y"))
    write_task(tmp_path / "u", keys.replace("[x, y]", "[x]"), [{"text": "a", "label": "x", **row}], [])
    with pytest.raises(UserError, match="does not name the class '1'"):
        load_task(tmp_path / "u")


@pytest.mark.parametrize(
    ("place", "answer", "row"),
    [
        ("options", "{{ options[right] }}", {"options": [1, 0]}),
        ("options.ids", "{{ options.ids[right] }}", {"options": {"ids": [1, 0]}}),
        ("'first, second'", "{{ [first, second][right] }}", {"first": 1, "second": 0}),
        ("options", "{{ 1 - right }}", {"options": [1, 0]}),
    ],
)
def test_names_of_options_name_the_answer_too(tmp_path: Path, place: str, answer: str, row: dict[str, Any]) -> None:
    answer = answer.replace("right", "(right | int)")
    keys = f"family: qa\nquery: '{{{{ text }}}}'\nanswer: '{answer}'\nchoices: {place}\n"
    keys += f"class_names: {{{place}: [x, y]}}\n"
    rows: Rows = [{"text": "a", "right": 0, **row}, {"text": "b", "right": 1, **row}]
    task = load_task(write_task(tmp_path / "t", keys, rows, []))
    assert [(example.query.choices, example.answer) for example in task.train] == [(("y", "x"), "y"), (("y", "x"), "x")]
    # Predictions are scored against the same answers.
    accepted = AcceptedAnswers(task.spec)
    assert [accepted(as_text(one)) for one in rows] == [("y",), ("x",)]


def test_a_row_without_accepted_answers_or_options_is_a_bad_row(tmp_path: Path) -> None:
    keys = CLASSIFICATION.replace("classification", "qa") + "references: all\nbad_rows: drop\n"
    rows: Rows = [{"text": "a", "label": "x", "all": ["y"]}, {"text": "b", "label": "x", "all": None}]
    task = load_task(write_task(tmp_path / "t", keys, rows, []))
    assert (len(task.train), task.dropped) == (1, {"empty answer": 1})
    without = [{"text": "a", "label": "x"}]
    assert "the column 'all' lists the accepted answers" in refusal(write_task(tmp_path / "u", keys, without, []))
    keys = CLASSIFICATION.replace("classification", "qa") + "choices: options\nbad_rows: drop\n"
    rows = [{"text": name, "label": "x", "options": options} for name, options in OPTIONS.items()]
    task = load_task(write_task(tmp_path / "v", keys, rows, []))
    assert (len(task.train), task.dropped) == (1, {"empty option": 1, "option that is no text": 2})


OPTIONS: dict[str, Any] = {"good": ["x", "y"], "null": None, "lists": [["x"], ["y"]], "mappings": [{"a": "x"}]}


def test_class_names_of_a_column_that_they_would_not_name_are_refused(tmp_path: Path) -> None:
    keys = CLASSIFICATION + "class_names: {first: [x, y]}\nchoices: first, second\n"
    row = {"text": "a", "label": "0", "first": "0", "second": "1"}
    with pytest.raises(UserError, match="no template reads the column 'first', nor is it choices or references"):
        load_task(write_task(tmp_path / "t", keys, [row], []))


def test_two_tasks_of_one_name_are_refused(tmp_path: Path) -> None:
    write_task(tmp_path / "a" / "films")
    write_task(tmp_path / "b" / "films")
    with pytest.raises(UserError, match="Two tasks are named 'films'"):
        load_tasks([tmp_path])


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("flms", r"does not exist\. Did you mean 'films'\?"),
        ("film*x", r"No task\.yaml matches"),
        ("empty", r"holds no task\.yaml"),
        ("tickets.csv", r"a table is no task by itself. Name its columns too, as in tickets\.csv:text:label"),
        ("tickts.csv:text:label", r"Did you mean 'tickets\.csv'\?"),
    ],
)
def test_a_pattern_that_finds_nothing_says_so(
    tmp_path: Path, pattern: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path / "films")
    (tmp_path / "empty").mkdir()
    write_tickets(tmp_path / "tickets.csv")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_tasks([pattern])


def test_links_to_task_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    films = write_task(tmp_path / "elsewhere" / "films")
    folder = tmp_path / "tasks"
    write_task(folder / "own")
    (folder / "linked").symlink_to(films)
    (folder / "again").symlink_to(films)
    (folder / "circle").symlink_to(folder)
    (folder / "nowhere").symlink_to(tmp_path / "gone")
    assert [task.name for task in load_tasks([folder])] == ["films", "own"]
    assert [task.name for task in load_tasks(str(tmp_path / "task*"))] == ["films", "own"]


@pytest.mark.parametrize("path", [None, 3, ["a"], ""])
def test_what_is_no_path_is_refused(path: Any) -> None:
    with pytest.raises(UserError) as caught:
        load_task(path)
    assert caught.value.code == "no_task_named"


def test_a_large_group_does_not_swallow_the_test_side(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"

    def num_test(rows: Rows, options: str = "") -> int:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return len(load_task(f"{path}:text:label,{options}test_fraction=0.1,seed=0").test)

    texts = [f"message {number}" for number in range(240)] + ["ok thanks"] * 60
    rows = [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(texts)]
    assert num_test(rows) == 30
    owned = [{**row, "text": f"{number} {row['text']}", "customer": min(number, 60)} for number, row in enumerate(rows)]
    assert num_test(owned, "group=customer,") == 30
    # Where no other is left, the smallest is taken.
    two = [{**row, "customer": "small" if number < 60 else "large"} for number, row in enumerate(owned)]
    assert num_test(two, "group=customer,") == 60


def test_a_query_of_a_program_is_that_of_a_row_in_a_file() -> None:
    task = Task.from_examples("toy", [("1.0", "a"), ("2.0", "b")])
    assert task.query({"text": 1.0, "other": b"\xff"}).text == "1.0"
    assert task.query({"text": float("nan")}).text == task.query({"text": None}).text == ""


@pytest.mark.parametrize("example", [5, None, "ab", ("a", 1), ("a", "b", "c")])
def test_what_is_no_example_is_refused(example: Any) -> None:
    with pytest.raises(UserError, match="an example is a query and its answer"):
        Task.from_examples("toy", [("a", "b"), example])
