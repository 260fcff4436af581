"""Every set of a folder of public data as a task file, loaded and checked.

    python benchmarks/all_tasks.py DATA --output /tmp/tasks      # writes the task files, then `manyicl tasks check`

DATA holds ``<family>/<name>/train.jsonl`` and ``test.jsonl`` and a README.md whose tables list, for each set, its name,
its columns and how many labels it has (recipes/real/README.md describes the rows). The task files written here are
plain: what columns there are decides query and answer. recipes/real has better ones, written by hand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# Column that a row's answer stands in, by preference.
ANSWERS = ("label", "answers", "answer", "output", "summary", "text", "simplification", "correction", "rewrite", "sql")
# What accompanies a row without being asked or answered.
ASIDE = {"references", "choices", "rationale", "functionality", "category"}
FAMILIES = {
    "classification": "classification",
    "nli_pairs": "nli",
    "qa": "qa",
    "generation": "generation",
    "math_reasoning": "math",
    "natural_instructions": "generation",
}
MOST_ANSWER_TOKENS = 256


@dataclass(frozen=True)
class DataSet:
    """A line of the folder's README."""

    group: str
    name: str
    columns: tuple[str, ...]
    has_labels: bool


def data_sets(data: Path) -> Iterator[DataSet]:
    """Read the tables of the folder's README."""
    group = ""
    header: list[str] = []
    for line in (data / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            # Headings name their folder in code.
            group, header = line.partition("`")[2].partition("/")[0], []
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or group not in FAMILIES:
            continue
        if cells[0] == "name":
            header = cells
        elif header and not cells[0].startswith("-"):
            row = dict(zip(header, cells, strict=False))
            columns = tuple(row.get("columns", "input, output").split(", "))
            yield DataSet(group, row["name"], columns, row.get("labels", "-").isdecimal())


def task_file(one: DataSet, data: Path) -> dict[str, Any]:
    """Decide query, answer and answer set by the columns."""
    columns = list(one.columns)
    if one.group == "generation":
        # The output column comes last, before the references.
        answer = [column for column in columns if column not in ASIDE][-1]
    else:
        answer = next(column for column in ANSWERS if column in columns)
    asked = [column for column in columns if column != answer and column not in ASIDE]
    lines = [f"{{{{ {asked[0]} }}}}"] if len(asked) == 1 else [f"{c}: {{{{ {c} }}}}" for c in asked]
    task: dict[str, Any] = {"family": FAMILIES[one.group]}
    if one.group == "natural_instructions":
        description = json.loads((data / one.group / one.name / "task.json").read_text(encoding="utf-8"))
        # A definition is text, not a template.
        task["instruction"] = f"{{% raw %}}{description['definition'].strip()}{{% endraw %}}"
    if "choices" in columns:
        lines.append("{% for choice in choices %}- {{ choice }}\n{% endfor %}")
        task["choices"] = "choices"
    task["query"] = "\n".join(lines)
    task["answer"] = f"{{{{ {answer} }}}}"
    if one.has_labels:
        task["labels"] = "from_train"
    if "references" in columns:
        task["references"] = "references"
    if "choices" not in columns and not one.has_labels:
        task["max_answer_tokens"] = MOST_ANSWER_TOKENS
    task["data"] = {split: f"{one.group}/{one.name}/{split}.jsonl" for split in ("train", "test")}
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="Folder to write task folders to.")
    parser.add_argument("--model", help="Also count tokens and shots with this model.")
    arguments = parser.parse_args()
    sets = list(data_sets(arguments.data))
    for one in sets:
        folder = arguments.output / one.name
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(task_file(one, arguments.data), allow_unicode=True, sort_keys=False, width=1000)
        (folder / "task.yaml").write_text(text, encoding="utf-8")
    print(f"{len(sets)} task files in {arguments.output}", flush=True)
    command = [Path(sys.executable).with_name("manyicl"), "tasks", "check", arguments.output]
    command += ["--data-root", arguments.data, *(["--model", arguments.model] if arguments.model else [])]
    started = time.perf_counter()
    code = subprocess.run(list(map(str, command)), check=False).returncode
    print(f"tasks check: {time.perf_counter() - started:.1f} seconds, exit code {code}")


if __name__ == "__main__":
    main()
