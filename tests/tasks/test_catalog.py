"""Every dataset of the catalogue makes a task of rows in its Hub's column form, and a mistake is one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from manyicl.episodes.encoding import Encoder
from manyicl.errors import MachineError, UserError
from manyicl.tasks.catalog import CATALOG_FOLDER, CatalogEntry, catalog_entries, catalog_files, search_catalog
from manyicl.tasks.files import load_task, load_tasks
from manyicl.tasks.hub import read_hub_rows
from manyicl.tasks.task import FAMILIES
from tests.builders import byte_level_bpe
from tests.tasks.catalog_rows import FIRST_EXAMPLES, ROWS, shown_all, write_rows

ENTRIES = catalog_entries()
NAMES = [entry.name for entry in ENTRIES]
DOCS = Path(__file__).parents[2] / "docs" / "catalog.md"
SIBLINGS = (
    {"rotten_tomatoes", "sst2", "sst5", "subj"},
    {"tweet_stance_abortion", "tweet_stance_atheism", "tweet_stance_climate", "tweet_stance_feminist"},
    {"massive_intent", "massive_scenario"},
    {"yelp_polarity", "yelp_review_full"},
    {"anli_r1", "anli_r2", "anli_r3"},
    {"mnli", "xnli_de", "xnli_es", "xnli_fr"},
    {"squad", "squad_v2", "adversarial_qa", "qnli", "squad_question_generation"},
    {"arc_easy", "arc_challenge"},
    {"race_middle", "race_high"},
    {"swag", "hellaswag"},
    {"gsm8k", "gsm8k_explain"},
    {"svamp", "multiarith"},
    {"enron_spam", "aeslc"},
)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder with the rows of every task, as --data-root."""
    for name in NAMES:
        write_rows(name, tmp_path)
    return tmp_path


# --- the entries --------------------------------------------------------------------------------------------


def test_the_catalogue_covers_every_family_with_many_datasets() -> None:
    assert len({(entry.data.hf, entry.data.config) for entry in ENTRIES}) >= 40
    families = [entry.spec.family for entry in ENTRIES]
    for family in ("classification", "nli", "qa", "math"):
        assert families.count(family) >= 6
    assert families.count("summarization") + families.count("generation") >= 6
    assert len(set(NAMES)) == len(NAMES)
    assert set(NAMES).isdisjoint(FAMILIES)
    assert set(ROWS) == set(NAMES)


@pytest.mark.parametrize("entry", ENTRIES, ids=NAMES)
def test_an_entry_is_complete(entry: CatalogEntry) -> None:
    (file,) = catalog_files(entry.name)
    assert file.parent.parent == CATALOG_FOLDER / entry.spec.family
    assert file.read_text(encoding="utf-8").startswith("# Instruction, templates")
    assert entry.spec.name is None, "the folder names it"
    assert entry.spec.instruction
    assert entry.spec.description
    assert entry.data.train != entry.data.test
    assert entry.data.num_train
    assert entry.data.num_test
    closed = entry.spec.closed_labels is not None or entry.spec.choices is not None
    assert closed or entry.spec.max_answer_tokens


def test_datasets_made_of_one_another_name_one_source() -> None:
    source_of = {entry.name: entry.spec.source or entry.name for entry in ENTRIES}
    groups: dict[str, set[str]] = {}
    for name, source in source_of.items():
        groups.setdefault(source, set()).add(name)
    for siblings in SIBLINGS:
        assert any(siblings <= group for group in groups.values()), siblings
    for entry in ENTRIES:
        others = [
            other for other in ENTRIES if (other.data.hf, other.data.config) == (entry.data.hf, entry.data.config)
        ]
        assert len({source_of[other.name] for other in others}) == 1 or entry.data.hf == "facebook/anli"


@pytest.mark.parametrize("name", NAMES)
def test_a_local_folder_and_the_hub_give_the_same_task(name: str, tmp_path: Path) -> None:
    from datasets import Dataset

    (entry,) = catalog_entries(name)
    asked: list[tuple[str, str | None, str, str | None]] = []

    def load_dataset(hf: str, config: str | None, *, split: str, revision: str | None) -> Dataset:
        asked.append((hf, config, split, revision))
        return Dataset.from_list(ROWS[name][(entry.data.train, entry.data.test).index(split)])

    write_rows(name, tmp_path)
    local = load_task(f"catalog:{name}", tmp_path)
    task = load_task(f"catalog:{name}", load_dataset=load_dataset)
    data = entry.data
    assert asked == [(data.hf, data.config, split, data.revision) for split in (data.train, data.test)]
    assert task.data_hash == local.data_hash
    assert (task.name, task.family, task.metric) == (name, entry.spec.family, entry.spec.metric or task.metric)
    assert task.train
    assert task.test
    for example in (*task.train, *task.test):
        assert example.query.choices is None or example.answer in example.query.choices
        assert task.labels is None or example.answer in task.labels
        assert "{{" not in example.query.text + example.answer
    assert local.query(ROWS[name][1][-1]).text == local.test[-1].query.text


def test_first_examples_read_as_they_were_checked() -> None:
    assert shown_all() == FIRST_EXAMPLES.read_text(encoding="utf-8"), "run python -m tests.tasks.catalog_rows"


@pytest.mark.parametrize("name", ["arc_easy", "squad", "boolq", "copa"])
def test_numbered_parquet_files_as_the_hub_stores_them_are_read(name: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (entry,) = catalog_entries(name)
    (tmp_path / name).mkdir()
    write_rows(name, tmp_path / "lines")
    for split, rows in zip((entry.data.train, entry.data.test), ROWS[name], strict=True):
        for number, row in enumerate(rows):
            path = tmp_path / name / f"{split}-{number:05}-of-{len(rows):05}.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    as_lines = load_task(f"catalog:{name}", tmp_path / "lines")
    assert load_task(f"catalog:{name}", tmp_path).data_hash == as_lines.data_hash


def test_rows_without_a_gold_label_are_dropped_and_counted(hub: Path) -> None:
    assert load_task("catalog:snli", hub).dropped == {"row without a label": 1}
    assert load_task("catalog:newsgroups_20", hub).dropped == {"empty query": 1}


def test_options_with_blank_lines_are_for_models_that_end_answers_in_one(hub: Path) -> None:
    path = hub / "arc_easy" / "train.jsonl"
    first, *others = ROWS["arc_easy"][0]
    key = first["choices"]["label"].index(first["answerKey"])
    texts = [f"{text}.\n \nAll of it." for text in first["choices"]["text"]]
    write_row = {**first, "choices": {**first["choices"], "text": texts}}
    path.write_text("".join(json.dumps(row) + "\n" for row in (write_row, *others)))
    task = load_task("catalog:arc_easy", hub)
    Encoder(byte_level_bpe()).require_suitable_answers(task)
    choices = task.train[0].query.choices
    assert choices is not None
    assert task.train[0].answer == choices[key] == texts[key].replace("\n \n", "\n")


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "names"),
    [
        ("catalog:trec", ["trec"]),
        ("catalog:anli_*", ["anli_r1", "anli_r2", "anli_r3"]),
        ("catalog:generation", ["asset_simplification", "common_gen", "jfleg_grammar", "squad_question_generation"]),
        ("catalog:*", NAMES),
    ],
)
def test_a_name_a_pattern_and_a_family_stand_for_tasks(reference: str, names: list[str], hub: Path) -> None:
    assert [task.name for task in load_tasks([reference], hub)] == names


def test_catalogue_tasks_stand_beside_folders_each_once(hub: Path) -> None:
    folder = CATALOG_FOLDER / "qa" / "squad"
    assert [task.name for task in load_tasks(["catalog:squad", folder, "catalog:squad*"], hub)] == [
        "squad",
        "squad_question_generation",
        "squad_v2",
    ]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("catalog:bankng77", "no task 'bankng77'. Did you mean 'banking77'?"),
        ("catalog:clasification", "Did you mean 'classification'?"),
        ("catalog:tweets_*", "no task 'tweets_*'."),
        ("catalog:anli_*", "is the name of 3 tasks. Name one of them: anli_r1, anli_r2, anli_r3."),
        ("trec", "The task 'trec' does not exist. The catalogue has catalog:trec."),
    ],
)
def test_a_mistyped_name_offers_the_nearest(reference: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_task(reference)
    assert message in str(caught.value)


def test_search_finds_by_name_family_description_and_hub_id() -> None:
    for word, name in (("BANKING", "banking77"), ("math", "svamp"), ("voice assistant", "massive_intent")):
        assert name in [entry.name for entry in search_catalog(ENTRIES, word)]
    assert [entry.name for entry in search_catalog(ENTRIES, "ChilleD/SVAMP")] == ["svamp"]
    with pytest.raises(UserError, match=r"mentions 'bankng77'\. Did you mean 'banking77'\?"):
        search_catalog(ENTRIES, "bankng77")


# --- local copies -------------------------------------------------------------------------------------------


def test_a_missing_split_names_the_file_that_is_expected(hub: Path) -> None:
    (hub / "sst2" / "validation.jsonl").rename(hub / "sst2" / "valdation.jsonl")
    with pytest.raises(UserError) as caught:
        load_task("catalog:sst2", hub)
    said = str(caught.value)
    assert f"{hub / 'sst2'}: the split 'validation' is missing; expected {hub / 'sst2'}/validation.jsonl" in said
    assert "Did you mean 'valdation.jsonl'?" in said
    (hub / "sst2" / "train.csv").write_text("sentence,label\n")
    with pytest.raises(UserError, match=r"holds train\.jsonl and train\.csv\. Keep one"):
        load_task("catalog:sst2", hub)


def test_a_broken_row_is_named_with_file_and_line(hub: Path) -> None:
    path = hub / "cola" / "train.jsonl"
    path.write_text(path.read_text() + '{"sentence": "x", "label": 7}\n')
    with pytest.raises(
        UserError, match=r"cola/train\.jsonl:3: class_names does not name the class '7' of the column 'label'"
    ):
        load_task("catalog:cola", hub)
    path.write_text(path.read_text().replace("sentence", "sentense"))
    with pytest.raises(UserError, match=r"cola/train\.jsonl:1: .*'sentence'.* Did you mean 'sentense'\?"):
        load_task("catalog:cola", hub)


def test_a_csv_copy_gives_the_same_task(hub: Path) -> None:
    before = load_task("catalog:cola", hub)
    for split in ("train", "validation"):
        rows = ROWS["cola"][split == "validation"]
        (hub / "cola" / f"{split}.jsonl").unlink()
        lines = [f"{row['sentence']},{row['label']},{row['idx']}\n" for row in rows]
        (hub / "cola" / f"{split}.csv").write_text("sentence,label,idx\n" + "".join(lines))
    assert load_task("catalog:cola", hub).data_hash == before.data_hash


def test_options_in_columns_of_their_own_are_all_needed(hub: Path) -> None:
    path = hub / "piqa" / "train.jsonl"
    path.write_text(path.read_text().replace('"sol2"', '"sol_2"'))
    with pytest.raises(UserError, match=r"piqa/train\.jsonl:1: .*'sol2'"):
        load_task("catalog:piqa", hub)


# --- the Hub ------------------------------------------------------------------------------------------------


def unreachable(*args: object, **options: object) -> Any:
    raise ConnectionError(f"Couldn't reach the Hub with {os.environ.get('HF_TOKEN')}.\nTraceback")


def test_a_hub_out_of_reach_says_which_files_stand_in_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_marker")
    with pytest.raises(MachineError) as caught:
        load_task("catalog:snli", load_dataset=unreachable)
    said = str(caught.value)
    assert said == (
        "hf:stanfordnlp/snli train: the Hub cannot be reached (couldn't reach the Hub with $HF_TOKEN). A copy is "
        "read from the folder that --data-root names, as snli/train.jsonl and snli/test.jsonl, CSV or Parquet."
    )
    (tmp_path / "snly").mkdir()
    with pytest.raises(MachineError, match=r"snli/train\.jsonl and snli/test\.jsonl.* Did you mean 'snly'\?"):
        load_task("catalog:snli", tmp_path, load_dataset=unreachable)


def test_a_gated_dataset_asks_for_the_token_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_marker")

    def gated(*args: object, **options: object) -> Any:
        raise FileNotFoundError("Dataset 'o/n' is a gated dataset; hf_marker has no access.")

    with pytest.raises(UserError) as caught:
        read_hub_rows("o/n", "train", load_dataset=gated)
    assert "Set HF_TOKEN in the environment" in str(caught.value)
    assert "hf_marker" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["0", "1"], ""),
        (["Negative", "positive"], ""),
        (["bad", "good"], ""),
        (
            ["positive", "negative"],
            "are in another order than on the Hub; expected the 2 classes ['positive', 'negative']",
        ),
        (["negative", "neutral", "positive"], "expected the 3 classes ['negative', 'neutral', 'positive'], found 2"),
    ],
)
def test_class_names_are_compared_with_the_hubs(names: list[str], message: str) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    def load_dataset(*args: object, split: str, **options: object) -> Any:
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        rows = [{"text": f"{split} {number}", "label": number % 2} for number in range(4)]
        return Dataset.from_list(rows, features=features)

    if not message:
        task = load_task("catalog:rotten_tomatoes", load_dataset=load_dataset)
        assert [example.answer for example in task.train] == ["negative", "positive"] * 2
        return
    with pytest.raises(UserError) as caught:
        load_task("catalog:rotten_tomatoes", load_dataset=load_dataset)
    assert message in str(caught.value)


def test_offline_a_command_ends_with_one_sentence_and_without_the_token(tmp_path: Path) -> None:
    token = "hf_markerOfTheTest"
    environment: Mapping[str, str] = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_TOKEN": token,
        "HF_HOME": str(tmp_path / "home"),
        "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets"),
        "HF_HUB_VERBOSITY": "debug",
    }
    command = [sys.executable, "-c", "from manyicl.cli.main import main; main()", "tasks", "check", "catalog:trec"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "the Hub cannot be reached, and HF_HUB_OFFLINE keeps this machine offline" in line
    assert "trec/train.jsonl and trec/test.jsonl" in line
    assert token not in done.stderr
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        assert token.encode() not in path.read_bytes(), path


# --- the page -----------------------------------------------------------------------------------------------


def table_line(entry: CatalogEntry) -> str:
    sizes = f"{entry.data.num_train:,} | {entry.data.num_test:,}"
    splits = f"{entry.data.train}, {entry.data.test}"
    return f"| `{entry.name}` | {entry.spec.family} | `{entry.hub}` | {splits} | {sizes} | {entry.spec.description} |"


def test_the_page_lists_every_entry_as_it_is() -> None:
    page = DOCS.read_text(encoding="utf-8").splitlines()
    lines = [line for line in page[page.index("## The table") :] if line.startswith("| `")]
    assert lines == [table_line(entry) for entry in ENTRIES]
    assert any(f"{len(ENTRIES)} task files" in line for line in page)
