"""A comparison of a few tiny trainings, with its base and tasks as folders."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from manyicl.evaluation.comparison.roles import ComparisonTasks, assigned
from manyicl.evaluation.comparison.settings import Comparison
from manyicl.tasks.task import Task
from tests.builders import byte_level_bpe, make_task, tiny_model

TEXT = """
model: {base: unused}
tasks: {train: [unused], evaluate: [unused]}
sequences: {max_context_tokens: 120, examples_per_episode: [1, 6]}
training:
  num_tokens: 1200
  sequences_per_step: 2
  learning_rate: 1e-3
  num_threads: 1
  evaluate_shots: [0, 2]
  evaluate_queries: 4
compare:
  unseen: [unused]
  num_seen: 1
  num_training_seeds: 1
  few_shot_demonstrations: 2
  shots: [0, 2]
  num_queries: 4
output: unused
"""
LABELS = {"classification": ("good", "bad"), "nli": ("yes", "no")}


def comparison(*overrides: str) -> Comparison:
    """The comparison above, with changes; `compare.dedicated` only where it is given."""
    return Comparison.parse(TEXT, overrides=overrides)


def comparison_in(folder: Path, *overrides: str) -> Comparison:
    """A comparison over a base and tasks in a folder, which are written if they are not there."""
    if not (folder / "base").is_dir():
        tokenizer = byte_level_bpe()
        tiny_model(vocabulary_size=len(tokenizer)).save_pretrained(str(folder / "base"))
        tokenizer.save_pretrained(str(folder / "base"))
        for side, number in (("train", 2), ("validation", 1), ("unseen", 1)):
            for family, labels in LABELS.items():
                for index in range(number):
                    write_task(folder / side / f"{family}_{side}_{index}", family, labels)
    places = (
        f"model.base={folder / 'base'}",
        f"tasks.train=[{folder / 'train'}]",
        f"tasks.evaluate=[{folder / 'validation'}]",
        f"compare.unseen=[{folder / 'unseen'}]",
        f"output={folder / 'output'}",
    )
    return comparison(*places, *overrides)


def write_task(place: Path, family: str, labels: tuple[str, ...], num_train: int = 24) -> None:
    """A task folder of short reviews, whose text begins with the name of the task."""
    place.mkdir(parents=True)
    rows = [{"text": f"{place.name[0]} film {i} was fine", "answer": labels[i % 2]} for i in range(num_train + 8)]
    for side, part in (("train", rows[:num_train]), ("test", rows[num_train:])):
        (place / f"{side}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part), encoding="utf-8")
    keys: dict[str, object] = {"name": place.name, "family": family, "query": "{{ text }}", "answer": "{{ answer }}"}
    keys |= {"labels": list(labels), "data": {"train": "train.jsonl", "test": "test.jsonl"}}
    (place / "task.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")


def toy_tasks(settings: Comparison) -> ComparisonTasks:
    """Tasks in memory: four to train on, and one of each of two families to validate and to test on."""

    def of(side: str, number: int) -> list[Task]:
        return [
            make_task(f"{family} {side} {index}", family=family, data_hash=f"{family} {side} {index}")
            for family in LABELS
            for index in range(number)
        ]

    return assigned(settings, of("train", 2), of("validation", 1), of("unseen", 1))
