"""The nano world written out as ordinary task folders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

import yaml

from manyicl.errors import UserError, did_you_mean
from manyicl.tasks.nanoworld.arithmetic import OperatorRule
from manyicl.tasks.nanoworld.basics import BASICS
from manyicl.tasks.nanoworld.classification import TriggerRule
from manyicl.tasks.nanoworld.headline import HeadlineRule
from manyicl.tasks.nanoworld.nli import VerbRule
from manyicl.tasks.nanoworld.qa import QuestionRule
from manyicl.tasks.nanoworld.rule import Binding, Columns, Rule

Split = Literal["base", "train", "unseen"]
DrawRule = Callable[[random.Random], Rule]

# Short name in task names -> how a hidden rule of the family is drawn.
HIDDEN_RULES: dict[str, DrawRule] = {
    "cls": TriggerRule.draw,
    "nli": VerbRule.draw,
    "qa": QuestionRule.draw,
    "headline": HeadlineRule.draw,
    "math": OperatorRule.draw,
}
NUM_TRAINING_TASKS, NUM_UNSEEN_TASKS = 60, 4  # of each family
NUM_TRAIN_ROWS, NUM_TEST_ROWS = 200, 40
NUM_BASE_ROWS = 64


def checked_split(split: str) -> Split:
    """Return the split of this name.

    Raises:
        UserError: If there is none.
    """
    if split not in get_args(Split):
        raise UserError(
            "unknown_split",
            "The nano world has no such split",
            expected=f"one of {', '.join(get_args(Split))}",
            found=repr(split),
            remedy=did_you_mean(split, get_args(Split)).strip() or None,
        )
    return cast(Split, split)


def write_nano_world(folder: Path | str, seed: int = 0, split: Split = "train") -> list[Path]:
    """Write one split of the world: a folder per task, with task.yaml, train.jsonl and test.jsonl.

    ``train`` and ``unseen`` hold the five families whose rules only demonstrations reveal. All use the same words;
    what they stand for differs: an unseen rule is drawn until it shares no binding (see ``rule.py``) with any
    training task of its family. ``base`` holds what a base model is made of, see ``basics.py``.

    Args:
        folder: Where the task folders go; created if missing.
        seed: Decides every rule and row, the same on every machine.
        split: Which tasks.

    Returns:
        The task folders.
    """
    folder = Path(folder)
    if split == "base":
        return [
            _write_task(folder, f"nano-base-{kind}-{number:04d}", exercise.draw(rng), NUM_BASE_ROWS, 0, rng)
            for kind, exercise in BASICS.items()
            for number in range(exercise.num_tasks)
            for rng in [random.Random(f"nano world {seed} base {kind} {number}")]
        ]
    return [
        _write_task(folder, name, rule, NUM_TRAIN_ROWS, NUM_TEST_ROWS, random.Random(f"nano rows {seed} {name}"))
        for name, rule in hidden_rules(seed, split).items()
    ]


def hidden_rules(seed: int, split: Split) -> dict[str, Rule]:
    """Draw the rules of the training tasks or of the unseen tasks, by task name."""
    if split == "train":
        return {
            f"nano-{short_name}-train-{number:03d}": draw(random.Random(f"nano world {seed} {short_name} {number}"))
            for short_name, draw in HIDDEN_RULES.items()
            for number in range(NUM_TRAINING_TASKS)
        }
    trained = hidden_rules(seed, "train")
    rules = {}
    for short_name, draw in HIDDEN_RULES.items():
        seen = frozenset[Binding]().union(
            *(rule.bindings for name, rule in trained.items() if name.startswith(f"nano-{short_name}-"))
        )
        rng = random.Random(f"nano world {seed} {short_name} unseen")
        for number in range(NUM_UNSEEN_TASKS):
            rules[f"nano-{short_name}-unseen-{number:03d}"] = _draw_without(seen, draw, rng)
    return rules


def _draw_without(seen: frozenset[Binding], draw: DrawRule, rng: random.Random) -> Rule:
    """Draw a rule again and again until it shares no binding with what was seen."""
    while True:
        rule = draw(rng)
        if seen.isdisjoint(rule.bindings):
            return rule


def _write_task(
    folder: Path, name: str, rule: Rule, num_train_rows: int, num_test_rows: int, rng: random.Random
) -> Path:
    """Draw rows with different queries and write them with their task.yaml."""
    rows = draw_rows(rule, num_train_rows + num_test_rows, rng)
    # A rule with few different queries gives fewer rows; both sides shrink alike.
    num_test_rows = len(rows) * num_test_rows // (num_train_rows + num_test_rows)
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    description: dict[str, object] = {
        "name": name,
        "family": rule.family,
        "query": rule.query_template,
        "answer": "{{ answer }}",
    }
    if rule.labels is not None:
        description["labels"] = list(rule.labels)
    else:
        description["metric"] = "exact_match"
        description["max_answer_tokens"] = 4
    description["data"] = {"train": "train.jsonl"}
    if num_test_rows:
        description["data"] = {"train": "train.jsonl", "test": "test.jsonl"}
        _write_rows(place / "test.jsonl", rows[:num_test_rows])
    _write_rows(place / "train.jsonl", rows[num_test_rows:])
    (place / "task.yaml").write_text(yaml.safe_dump(description, sort_keys=False), encoding="utf-8")
    return place


def draw_rows(rule: Rule, num_rows: int, rng: random.Random) -> list[Columns]:
    """Draw up to ``num_rows`` answered rows, no query twice; fewer where the rule has not as many queries."""
    rows: dict[tuple[str, ...], Columns] = {}
    for _ in range(20 * num_rows):
        if len(rows) == num_rows:
            break
        row = rule.draw_row(rng)
        query = tuple(value for column, value in row.items() if column != "answer")
        rows.setdefault(query, {**row, "answer": rule.answer(row)})
    return list(rows.values())


def _write_rows(path: Path, rows: Sequence[Columns]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
