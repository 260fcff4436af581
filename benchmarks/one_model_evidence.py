"""What the one model is trained, validated and tested on, with hashes: writes recipes/one_model/evidence.json.

    python benchmarks/one_model_evidence.py DATA      # DATA as in recipes/real/README.md

docs/one_model.md has the rules that the file stands for. It is written before the first probe and not after; a test
builds it again and compares.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manyicl.tasks.files import load_task
from manyicl.tasks.schema import TwoFiles, read_task_file
from manyicl.tasks.task import Task

FOLDER = Path(__file__).parents[1] / "recipes" / "one_model"
EVIDENCE = FOLDER / "evidence.json"
ROLES = ("train", "validation", "test")
# A free answer takes many forward passes where a label takes one, so such tasks get fewer queries.
QUERIES: Mapping[str, tuple[int, int]] = {"validation": (50, 25), "test": (100, 50)}
SEEDS: Mapping[str, tuple[int, ...]] = {"validation": (0, 1), "test": (0, 1, 2)}
SHOTS: Mapping[str, tuple[int, ...]] = {"validation": (0, 4, 16), "test": (0, 1, 4, 16, 32, 64, 128)}
MAX_CONTEXT_TOKENS: Mapping[str, int] = {"validation": 4096, "test": 8192}
# Long texts: as many shots of average length as 8,192 tokens of SmolLM2 hold.
MOST_SHOTS: Mapping[str, int] = {"dialogsum": 32, "reddit_discourse_act": 32, "rte": 64}


def data_set(file: Path) -> str:
    """Name the set that a task file reads, as ``group/name``."""
    data = read_task_file(file).data
    assert isinstance(data, TwoFiles)
    return str(Path(data.train[0]).parent)


def settings_of(task: Task, role: str) -> dict[str, Any]:
    """Say how a validation or test task is queried."""
    closed, free = QUERIES[role]
    is_closed = task.labels is not None or task.choices_column is not None
    most = MOST_SHOTS.get(task.name, max(SHOTS[role]))
    return {
        "num_queries": min(closed if is_closed else free, len(task.test)),
        "query_seed": 0,
        "demonstration_seeds": list(SEEDS[role]),
        "shots": [shots for shots in SHOTS[role] if shots <= most],
        "max_context_tokens": MAX_CONTEXT_TOKENS[role],
    }


def record(file: Path, role: str, data: Path) -> dict[str, Any]:
    """Load a task and describe it."""
    task = load_task(file, data)
    return {
        "name": task.name,
        "family": task.family,
        "source": task.source,
        "data_set": data_set(file),
        "num_train": len(task.train),
        "num_test": len(task.test),
        "data_hash": task.data_hash,
        **({} if role == "train" else settings_of(task, role)),
    }


def evidence(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Describe every task of each role, in the order of names."""
    return {role: [record(file, role, data) for file in sorted(FOLDER.glob(f"{role}/*/task.yaml"))] for role in ROLES}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    content = evidence(parser.parse_args(arguments).data)
    EVIDENCE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print({role: len(tasks) for role, tasks in content.items()})


if __name__ == "__main__":
    main()
