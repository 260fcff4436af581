"""The nano world is the same everywhere, and what an unseen task binds stands in no training task."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from manyicl.tasks.files import load_tasks
from manyicl.tasks.nanoworld.basics import BASICS
from manyicl.tasks.nanoworld.rule import Binding, Split
from manyicl.tasks.nanoworld.world import (
    HIDDEN_RULES,
    NUM_UNSEEN_TASKS,
    draw_rows,
    hidden_rules,
    write_nano_world,
)
from manyicl.tasks.task import FAMILIES, Task


@pytest.fixture(name="unseen", scope="module")
def _unseen(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    folder = tmp_path_factory.mktemp("unseen")
    write_nano_world(folder, split="unseen")
    return load_tasks([str(folder)])


def test_the_same_seed_writes_the_same_bytes_and_another_seed_other_rules(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        write_nano_world(tmp_path / name, seed=seed, split="unseen")
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 3 * NUM_UNSEEN_TASKS * len(HIDDEN_RULES)
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    changed = [(tmp_path / "one" / file).read_bytes() != (tmp_path / "three" / file).read_bytes() for file in files]
    assert all(change for change, file in zip(changed, files, strict=True) if file.name == "train.jsonl")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("short_name", HIDDEN_RULES)
def test_no_binding_of_an_unseen_task_stands_in_a_training_task(short_name: str, seed: int) -> None:
    def bindings(split: Split) -> set[Binding]:
        rules = hidden_rules(seed, split)
        return {
            binding
            for name, rule in rules.items()
            if name.startswith(f"nano-{short_name}-")
            for binding in rule.bindings
        }

    trained, asked = bindings("train"), bindings("unseen")
    assert trained
    assert asked
    assert not trained & asked


def test_unseen_tasks_load_with_all_five_families_and_nothing_dropped(unseen: list[Task]) -> None:
    assert {task.family for task in unseen} == set(FAMILIES) - {"generation"}
    for task in unseen:
        assert not task.dropped
        assert len(task.train) >= 65
        assert len(task.test) >= 25


@pytest.mark.parametrize("short_name", HIDDEN_RULES)
def test_a_rule_answers_every_row_it_draws_the_same_way(short_name: str) -> None:
    rng = random.Random(0)
    rule = HIDDEN_RULES[short_name](rng)
    for row in draw_rows(rule, 100, rng):
        columns = {column: value for column, value in row.items() if column != "answer"}
        assert rule.answer(columns) == row["answer"]
        assert rule.labels is None or row["answer"] in rule.labels


@pytest.mark.parametrize("kind", BASICS)
def test_a_basic_exercise_draws_queries_with_answers(kind: str) -> None:
    rng = random.Random(0)
    rows = draw_rows(BASICS[kind].draw(rng), 40, rng)
    assert len(rows) >= 8
    assert all(row["text"] and row["answer"] for row in rows)


def test_every_word_of_unseen_tasks_stands_in_the_base_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the base tasks already holds every word, so the tokenizer of the whole base knows them all."""
    from manyicl.tasks.nanoworld import world

    few = {kind: type(exercise)(exercise.draw, exercise.num_tasks // 10) for kind, exercise in BASICS.items()}
    monkeypatch.setattr(world, "BASICS", few)
    write_nano_world(tmp_path / "base", split="base")
    write_nano_world(tmp_path / "unseen", split="unseen")

    def words(folder: Path) -> set[str]:
        rows = [json.loads(line) for path in folder.rglob("*.jsonl") for line in path.read_text().splitlines()]
        return {word for row in rows for value in row.values() for word in value.split()}

    assert words(tmp_path / "unseen") <= words(tmp_path / "base")
