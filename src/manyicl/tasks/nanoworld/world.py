"""Write the nano world as ordinary task folders."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import yaml

from manyicl.tasks.nanoworld import families
from manyicl.tasks.nanoworld.basics import BASICS
from manyicl.tasks.nanoworld.rule import Binding, Columns, Rule, Split

DrawRule = Callable[[random.Random], Rule]

# Short name in task names -> how a hidden rule of the family is drawn.
HIDDEN_RULES: dict[str, DrawRule] = {
    "cls": families.draw_trigger_rule,
    "nli": families.draw_verb_rule,
    "qa": families.draw_question_rule,
    "headline": families.draw_headline_rule,
    "math": families.draw_operator_rule,
}
NUM_TRAINING_TASKS, NUM_UNSEEN_TASKS = 60, 4  # of each family
NUM_TRAIN_ROWS, NUM_TEST_ROWS = 200, 40
NUM_BASE_ROWS = 64


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
        of_family = [rule.bindings for name, rule in trained.items() if name.startswith(f"nano-{short_name}-")]
        seen = frozenset[Binding]().union(*of_family)
        rng = random.Random(f"nano world {seed} {short_name} unseen")
        for number in range(NUM_UNSEEN_TASKS):
            rule = draw(rng)
            while not seen.isdisjoint(rule.bindings):
                rule = draw(rng)
            rules[f"nano-{short_name}-unseen-{number:03d}"] = rule
    return rules


def _write_task(
    folder: Path, name: str, rule: Rule, num_train_rows: int, num_test_rows: int, rng: random.Random
) -> Path:
    """Draw rows with different queries and write them with their task.yaml."""
    rows = draw_rows(rule, num_train_rows + num_test_rows, rng)
    # A rule with few different queries gives fewer rows; both sides shrink alike.
    num_test_rows = len(rows) * num_test_rows // (num_train_rows + num_test_rows)
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    keys: dict[str, object] = {"name": name, "family": rule.family, "query": rule.query_template}
    keys["answer"] = "{{ answer }}"
    keys |= {"labels": list(rule.labels)} if rule.labels else {"metric": "exact_match", "max_answer_tokens": 4}
    sides = {"train": rows[num_test_rows:], "test": rows[:num_test_rows]}
    keys["data"] = {side: f"{side}.jsonl" for side, its_rows in sides.items() if its_rows}
    for side, its_rows in sides.items():
        if its_rows:
            lines = (json.dumps(row) + "\n" for row in its_rows)
            (place / f"{side}.jsonl").write_text("".join(lines), encoding="utf-8")
    (place / "task.yaml").write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
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
