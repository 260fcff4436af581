"""Score one model on the validation or the test tasks of the one model, as recipes/one_model/evidence.json says.

    python benchmarks/one_model_scores.py DATA --role validation --model builtin:one --name one-model --output DIR
    python benchmarks/one_model_scores.py DATA --role validation --model builtin:smollm2 --name base --output DIR

DATA is as in recipes/real/README.md. The model is loaded once for all tasks. Records are those of `manyicl evaluate`,
with the probability that each answer has among its task's labels; points that are in the folder already are not
measured again, so that a run that was stopped goes on where it was. A task whose data differ from those that
evidence.json describes is not scored. The command ends with 1 if any task failed; the others are scored all the same.

Test tasks are scored once, with the files that ship: see docs/one_model.md. `one_model_table.py` makes tables of the
records.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyicl.engine.engine import Engine
from manyicl.errors import UserError
from manyicl.evaluation.result import Result
from manyicl.evaluation.shot_curve import EvaluationSettings, measure_shot_curves
from manyicl.model.load import LoadedModel, load_model
from manyicl.tasks.files import load_task
from manyicl.tasks.task import Task

FOLDER = Path(__file__).parents[1] / "recipes" / "one_model"
EVIDENCE = FOLDER / "evidence.json"


@dataclass(frozen=True)
class Planned:
    """A task as evidence.json describes it.

    Attributes:
        name: Name of the task, and of its folder.
        data_hash: Hash of the task's rendered examples.
        settings: Shots, seeds and queries.
        max_context_tokens: Longest prefix and query together.
    """

    name: str
    data_hash: str
    settings: EvaluationSettings
    max_context_tokens: int

    @classmethod
    def of(cls, entry: dict[str, Any], num_queries: int | None = None) -> Planned:
        """Read an entry; ``num_queries`` replaces its number of queries where a script is tried out."""
        seed, seeds = entry["query_seed"], entry["demonstration_seeds"]
        if seeds != list(range(seed, seed + len(seeds))):
            raise ValueError(f"{entry['name']}: an evaluation draws seeds in a row from {seed}; found {seeds}")
        settings = EvaluationSettings(
            shots=tuple(entry["shots"]),
            num_seeds=len(seeds),
            num_queries=num_queries or entry["num_queries"],
            seed=seed,
            keep_confidence=True,
        )
        return cls(entry["name"], entry["data_hash"], settings, entry["max_context_tokens"])

    def load(self, role: str, data: Path) -> Task:
        """Load the task.

        Raises:
            UserError: If its data are others than those that were described.
        """
        task = load_task(FOLDER / role / self.name / "task.yaml", data)
        if task.data_hash != self.data_hash:
            raise UserError(
                "data_changed",
                f"the data of task {self.name!r} are not those that {EVIDENCE.name} describes",
                expected=f"hash {self.data_hash[:12]}",
                found=task.data_hash[:12],
                remedy="Score it on the data of the plan.",
            )
        return task


def planned_tasks(role: str, names: Sequence[str] | None = None, num_queries: int | None = None) -> list[Planned]:
    """Return the tasks of a role in the order of evidence.json, or those of them that are named.

    Raises:
        UserError: If a name is not one of them.
    """
    entries: list[dict[str, Any]] = json.loads(EVIDENCE.read_text(encoding="utf-8"))[role]
    unknown = set(names or ()) - {entry["name"] for entry in entries}
    if unknown:
        raise UserError(
            "unknown_task",
            f"no {role} task is named {', '.join(sorted(unknown))}",
            expected=f"some of {', '.join(entry['name'] for entry in entries)}",
        )
    return [Planned.of(entry, num_queries) for entry in entries if names is None or entry["name"] in names]


def score(loaded: LoadedModel, planned: Planned, task: Task, options: argparse.Namespace) -> str:
    """Measure one task and return its mean score at each shot count."""
    engine = Engine.local(
        loaded,
        activation_budget_mib=options.activation_budget_mib,
        text_format=options.text_format,
        end_of_answer=options.end_of_answer,
        max_context_tokens=planned.max_context_tokens,
    )
    curves = measure_shot_curves(engine, [task], options.output, planned.settings, model_name=options.name)
    return f"{scores_by_shots(curves.results)} ({curves.num_found} of {len(curves.results)} points found)"


def scores_by_shots(results: Sequence[Result]) -> str:
    """Write mean scores over seeds, as in ``0: .310, 4: .440``."""
    by_shots: dict[int, list[float]] = {}
    for result in results:
        by_shots.setdefault(result.num_shots, []).append(result.score)
    return ", ".join(f"{shots}: {sum(scores) / len(scores):.3f}" for shots, scores in sorted(by_shots.items()))


def say(*texts: object) -> None:
    """Print at once: whoever waits for a rented machine sees it where output is piped."""
    print(*texts, flush=True)


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--role", choices=("validation", "test"), required=True)
    arguments.add_argument("--model", required=True, help="Folder, .gguf file, builtin:NAME or hf:OWNER/NAME.")
    arguments.add_argument("--name", required=True, help="What tables call the model.")
    arguments.add_argument("--output", type=Path, required=True, help="Folder of the records.")
    arguments.add_argument("--tasks", help="Names separated by commas; all tasks of the role if left out.")
    arguments.add_argument("--device")
    arguments.add_argument("--dtype")
    arguments.add_argument("--activation-budget-mib", type=int)
    arguments.add_argument("--text-format", choices=("plain", "chat"), help="For a model not fine-tuned here.")
    arguments.add_argument("--end-of-answer", help="For a model not fine-tuned here.")
    # To try the script out; a score after fewer queries than planned is no result.
    arguments.add_argument("--queries", type=int, help=argparse.SUPPRESS)
    return arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Score the tasks one after the other; return 1 if any failed, 2 for a mistake in the arguments."""
    options = parser().parse_args(arguments)
    if options.queries and options.role == "test":
        say("Test tasks are scored once, with the queries of the plan.")
        return 2
    started = time.perf_counter()
    try:
        planned = planned_tasks(options.role, options.tasks.split(",") if options.tasks else None, options.queries)
        loaded = load_model(options.model, dtype=options.dtype, device=options.device)
    except UserError as error:
        say(error)
        return 2
    say(f"{options.model} loaded in {time.perf_counter() - started:.1f} s; {len(planned)} tasks")
    failed = []
    for one in planned:
        task_started = time.perf_counter()
        try:
            line = score(loaded, one, one.load(options.role, options.data), options)
        except UserError as error:
            failed.append(one.name)
            line = f"FAILED: {error}"
        except Exception:
            failed.append(one.name)
            line = f"FAILED: {traceback.format_exc()}"
        say(f"{one.name:32} {time.perf_counter() - task_started:7.1f} s  {line}")
    say(f"{time.perf_counter() - started:.1f} s in all; failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
