"""What the one model is trained, validated and tested on: lists agree, licences allow it, no source is shared."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from benchmarks.one_model_evidence import EVIDENCE, FOLDER, ROLES, data_set, evidence

from manyicl.tasks.files import load_task
from manyicl.tasks.schema import read_task_file
from manyicl.tasks.task import FAMILIES, Task
from manyicl.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
FILES = {role: sorted(FOLDER.glob(f"{role}/*/task.yaml")) for role in ROLES}
SEEN_BY_THE_FIRST_PROBE = {"ag_news", "snips_intent", "tweet_emotion"}
# Terms that allow commercial use, ShareAlike included.
ALLOWED = re.compile(r"(CC BY 4\.0|CC BY-SA 4\.0|MIT|Apache-2\.0|OANC licence)( \(repository.*\))?(; .*)?")
LONGEST_SHARED_PHRASE = 9  # words; what is shared is a phrase such as "what is the weather going to be like"

needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the public data sets do not lie in shared/ next to the checkout"
)


@cache
def recorded() -> dict[str, list[dict[str, Any]]]:
    content: dict[str, list[dict[str, Any]]] = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    return content


@cache
def licences() -> dict[str, dict[str, str]]:
    with (FOLDER / "licences.csv").open(encoding="utf-8", newline="") as file:
        return {f"{row['group']}/{row['name']}": row for row in csv.DictReader(file)}


@cache
def tasks(role: str) -> tuple[Task, ...]:
    return tuple(load_task(file, DATA) for file in FILES[role])


def sources(role: str) -> set[str]:
    return {read_task_file(file).source or file.parent.name for file in FILES[role]}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def phrases(role: str, num_words: int) -> Iterator[tuple[str, ...]]:
    for task in tasks(role):
        for example in (*task.train, *task.test):
            text = words(example.query.text)
            yield from (tuple(text[i : i + num_words]) for i in range(len(text) - num_words + 1))


@pytest.mark.parametrize("role", ROLES)
def test_every_task_file_reads_names_its_source_and_is_listed(role: str) -> None:
    listed = {task["name"]: task for task in recorded()[role]}
    assert [file.parent.name for file in FILES[role]] == list(listed)
    for file in FILES[role]:
        spec = read_task_file(file)
        assert (spec.family, spec.source) == (listed[file.parent.name]["family"], listed[file.parent.name]["source"])
        assert spec.source
        assert data_set(file) == listed[file.parent.name]["data_set"]


def test_each_role_covers_all_families() -> None:
    assert [len(FILES[role]) for role in ROLES] == [114, 10, 17]
    for role in ROLES:
        assert {read_task_file(file).family for file in FILES[role]} == set(FAMILIES)


def test_no_two_roles_share_a_source() -> None:
    train, validation, test = map(sources, ROLES)
    assert train.isdisjoint(validation | test)
    assert validation.isdisjoint(test)


def test_what_the_first_probe_saw_is_validation() -> None:
    assert {task["name"] for task in recorded()["validation"]} >= SEEN_BY_THE_FIRST_PROBE


def test_every_training_set_has_a_licence_that_allows_it() -> None:
    used = {task["data_set"] for task in recorded()["train"]}
    assert used == {name for name, row in licences().items() if row["role"] == "train"}
    for name in used:
        row = licences()[name]
        assert row["stated_by"] in ("publisher", "repository"), name
        assert ALLOWED.fullmatch(row["licence"]), (name, row["licence"])
        assert not re.search("tweet|hate_offensive|ag_news|ag_headline", name)


@pytest.mark.parametrize("role", ROLES[1:])
def test_the_licence_table_knows_what_is_held_out(role: str) -> None:
    held_out = {task["data_set"] for task in recorded()[role]}
    assert held_out == {name for name, row in licences().items() if row["role"] == role}


def test_every_set_has_one_role_and_a_reason() -> None:
    assert len(licences()) == 190
    assert {row["role"] for row in licences().values()} == {*ROLES, "unused"}
    assert all(row["licence"] and row["reason"] for row in licences().values())
    assert {row["stated_by"] for row in licences().values()} == {"publisher", "repository", "nobody"}


def test_the_recipe_trains_on_the_training_tasks_and_never_names_a_test_task() -> None:
    recipe = Recipe.read(ROOT / "recipes" / "one_model.yaml")
    assert recipe.tasks.train == ("recipes/one_model/train",)
    assert recipe.tasks.evaluate == ("recipes/one_model/validation",)
    assert set(recipe.tasks.mixture.weights) == set(FAMILIES)


@needs_data
def test_the_licence_table_covers_the_folder() -> None:
    assert set(licences()) == {str(path.relative_to(DATA)) for path in DATA.glob("*/*") if path.is_dir()}


@pytest.mark.slow
@needs_data
def test_the_tasks_are_still_what_was_written_down() -> None:
    assert evidence(DATA) == recorded()


@pytest.mark.slow
@needs_data
def test_every_training_task_has_rows_for_many_shots() -> None:
    assert min(len(task.train) for task in tasks("train")) >= 64
    assert all(task.labels is None or 2 <= len(task.labels) <= 64 for task in tasks("train"))


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("role", ROLES[1:])
def test_no_text_of_training_is_held_out(role: str) -> None:
    trained, held_out = (
        {tuple(words(one.query.text)) for task in tasks(side) for one in (*task.train, *task.test)}
        for side in ("train", role)
    )
    # Words alone, such as "brilliant", are phrases of mpqa_polarity and words to spell, too.
    assert [text for text in trained & held_out if len(text) > 3] == []


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("role", ROLES[1:])
def test_training_and_held_out_tasks_share_no_long_phrase(role: str) -> None:
    num_words = LONGEST_SHARED_PHRASE + 1
    held_out = {hash(phrase) for phrase in phrases(role, num_words)}
    assert [phrase for phrase in phrases("train", num_words) if hash(phrase) in held_out] == []
