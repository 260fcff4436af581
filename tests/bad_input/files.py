"""Whole, sound files, to be spoilt one line at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, object]

KEYS = "family: classification\nquery: '{{ text }}'\nanswer: '{{ label }}'\n"
DATA = "data: {train: train.jsonl, test: test.jsonl}\n"
TRAIN: Sequence[Row] = [{"text": f"film {i} was fine", "label": ("good", "bad")[i % 2]} for i in range(8)]
TEST: Sequence[Row] = [{"text": f"play {i} was dull", "label": ("good", "bad")[i % 2]} for i in range(4)]


def lines(*rows: Row) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def task(
    keys: str = KEYS + DATA, train: Sequence[Row] = TRAIN, test: Sequence[Row] = TEST, name: str = "t"
) -> dict[str, str]:
    """The files of a task folder."""
    return {f"{name}/task.yaml": keys, f"{name}/train.jsonl": lines(*train), f"{name}/test.jsonl": lines(*test)}


def task_with(more: str, **others: Any) -> dict[str, str]:
    """A task folder whose file has further keys, from line 5 on."""
    return task(KEYS + DATA + more, **others)


def table_task(
    rows: str | bytes, data: str = "file: rows.csv", name: str = "rows.csv", more: str = ""
) -> dict[str, str | bytes]:
    """A task folder over one table."""
    return {"t/task.yaml": f"{KEYS}data: {{{data}}}\n{more}", f"t/{name}": rows}


RECIPE = """\
model:
  from_scratch:
    architecture: llama
    config: {hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4}
    tokenizer: {kind: word, vocabulary_size: 200}
tasks: {train: [t]}
sequences: {max_context_tokens: 60}
training: {num_steps: 2, sequences_per_step: 2, learning_rate: 1e-2, num_threads: 1}
output: run
"""


def recipe(text: str = RECIPE, **others: Any) -> dict[str, str]:
    """A recipe and the task that it names."""
    return {"recipe.yaml": text, **task(**others)}


def spoilt(old: str, new: str, text: str = RECIPE) -> str:
    """The text with one part of it replaced."""
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
    return text.replace(old, new)
