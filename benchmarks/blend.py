"""Is a blended answer never worse than the model's and the words'? Scores the tasks of blend_tasks.json.

    python benchmarks/blend.py DATA --model builtin:one --output RECORDS      # hours or minutes; resumes
    python benchmarks/blend.py DATA --output RECORDS --tables                 # tables of what is recorded, in seconds

DATA is as in recipes/real/README.md. The first command records what the model says: the scores of all labels for each
query, and for the demonstrations before they were shown. One file for each task and draw; those that are there are not
measured again. The second fits the words and the blend to the same demonstrations, as `Engine.with_blend` does, and
compares. `--role development` takes the tasks on which the fixed weights and the pull towards them were chosen; the
tasks of the evidence had no part in that.

Every draw answers the same queries. Where fewer demonstrations fit the context than a number of shots says, those that
fit are used, and the table says how many.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyicl.atomic import write_atomically
from manyicl.engine.blend import (
    BlendWeights,
    blended,
    fit_weights,
    fitted_positions,
    held_out_words,
    model_log_probabilities,
)
from manyicl.engine.engine import Engine
from manyicl.engine.linear import WordClassifier
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.evaluation.shot_curve import EvaluationSettings, choose_queries
from manyicl.evaluation.uncertainty import Estimate, mean_of_independent, paired_difference
from manyicl.model.load import load_model
from manyicl.tasks.files import load_task
from manyicl.tasks.task import Example, Task

RECIPES = Path(__file__).parents[1] / "recipes"
PLAN = Path(__file__).with_name("blend_tasks.json")
PARTS = ("model", "words", "blend")
Scores = NDArray[np.float64]


# --- What the model says


def record(engine: Engine, task: Task, draw: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Score the queries of a task after one draw of demonstrations, at every number of shots."""
    task, _ = choose_queries(engine, task, EvaluationSettings(shots=(0,), num_queries=plan["num_queries"]))
    positions = {id(example): position for position, example in enumerate(task.train)}
    prefix: TaskPrefix | None = None
    points: list[dict[str, Any]] = []
    known: dict[tuple[Example, ...], list[float]] = {}
    for shots in plan["shots"]:
        started = time.perf_counter()
        prefix = engine.prefill(task, task.demonstrations(min(shots, len(task.train)), draw), reuse=prefix)
        shown = prefix.demonstrations
        if points and len(shown) <= len(points[-1]["demonstrations"]):
            continue
        prefilled = time.perf_counter()
        queries = [example.query for example in task.test]
        predictions = list(engine.predict(prefix, queries, scores="all"))
        answered = time.perf_counter()
        fitted = fitted_positions(shown)
        new = [position for position in fitted if shown[: position + 1] not in known]
        for position, scores in zip(new, engine.scores_before_shown(prefix, new), strict=True):
            known[shown[: position + 1]] = list(scores.values())
        points.append(
            {
                "shots": shots,
                "demonstrations": [positions[id(example)] for example in shown],
                "queries": [list(one.scores.log_probabilities.values()) for one in predictions if one.scores],
                "before_shown": {position: known[shown[: position + 1]] for position in fitted},
                "num_tokens": prefix.num_tokens,
                "seconds": {
                    "prefill": prefilled - started,
                    "queries": answered - prefilled,
                    "before_shown": time.perf_counter() - answered,
                    "num_before_shown": len(new),
                },
            }
        )
    return {
        "task": task.name,
        "data_hash": task.data_hash,
        "draw": draw,
        "model": engine.identity.fingerprint,
        "queries": [example.origin for example in task.test],
        "points": points,
    }


def record_all(data: Path, plan: dict[str, Any], model: str, output: Path) -> None:
    """Record every task and draw that is not in the folder yet, all tasks of one draw before the next draw."""
    output.mkdir(parents=True, exist_ok=True)
    missing = [
        (file, path)
        for draw in plan["draws"]
        for file in plan["tasks"]
        if not (path := at(output, file, draw)).exists()
    ]
    if not missing:
        return
    engine = Engine.local(load_model(model), merge=True, max_context_tokens=plan["max_context_tokens"])
    for file, path in missing:
        # Another process may share the work.
        if path.exists():
            continue
        started = time.perf_counter()
        draw = int(path.stem.rpartition("-")[2])
        content = json.dumps(record(engine, load_task(RECIPES / file / "task.yaml", data), draw, plan))
        write_atomically(path, content + "\n")
        print(f"{path.name:32} {time.perf_counter() - started:7.1f} s", flush=True)


def at(output: Path, file: str, draw: int) -> Path:
    return output / f"{Path(file).name}-{draw}.json"


# --- What follows


@dataclass(frozen=True)
class Point:
    """One task after one draw of so many demonstrations.

    Attributes:
        task: Name of the task.
        draw: Seed of the demonstrations.
        shots: Number of shots of the plan.
        num_shown: Demonstrations that fitted.
        weights: Weights of the blend.
        log_probabilities: Part -> log-probabilities of labels for each query, (Q, L).
        answers: Column of the right label of each query, (Q,).
    """

    task: str
    draw: int
    shots: int
    num_shown: int
    weights: BlendWeights
    log_probabilities: dict[str, Scores]
    answers: list[int]

    def right(self, part: str) -> Scores:
        """Return 1 for each query that a part answers right, else 0; the first of equal labels is the answer."""
        is_right: Scores = (self.log_probabilities[part].argmax(axis=1) == self.answers).astype(float)
        return is_right


def points_of(data: Path, plan: dict[str, Any], output: Path) -> Iterator[Point]:
    """Fit words and blend at every recorded point."""
    for file in plan["tasks"]:
        task = load_task(RECIPES / file / "task.yaml", data)
        labels = task.labels or ()
        tests = {example.origin: example for example in task.test}
        for draw in plan["draws"]:
            if not at(output, file, draw).exists():
                continue
            known = json.loads(at(output, file, draw).read_text(encoding="utf-8"))
            if known["data_hash"] != task.data_hash:
                raise ValueError(f"{file}: the data are others than those that were recorded")
            queries = [tests[origin] for origin in known["queries"]]
            for point in known["points"]:
                shown = [task.train[position] for position in point["demonstrations"]]
                yield point_of((task.name, draw, point["shots"]), point, labels, shown, queries)


def point_of(
    key: tuple[str, int, int],
    point: dict[str, Any],
    labels: Sequence[str],
    shown: Sequence[Example],
    queries: Sequence[Example],
) -> Point:
    """Fit words and blend at one point."""
    positions = fitted_positions(shown)
    before_shown = [point["before_shown"][str(position)] for position in positions]
    answers = [labels.index(shown[position].answer) for position in positions]
    of_model = model_log_probabilities(named(before_shown, labels), labels)
    weights = fit_weights(of_model, held_out_words(shown, labels, positions), answers)
    model = model_log_probabilities(named(point["queries"], labels), labels)
    texts = [example.query.text for example in queries]
    words = WordClassifier.fit(shown).log_probabilities(texts, labels)
    found = {"model": model, "words": words, "blend": blended(weights, model, words)}
    return Point(*key, len(shown), weights, found, [labels.index(one.answer) for one in queries])


def named(rows: Sequence[Sequence[float]], labels: Sequence[str]) -> list[dict[str, float]]:
    return [dict(zip(labels, row, strict=True)) for row in rows]


def right_by_draw(points: Sequence[Point], part: str) -> Scores:
    """Share of the points of one task at which each query is right, for every draw, (S, Q)."""
    draws = sorted({point.draw for point in points})
    return np.array([np.mean([one.right(part) for one in points if one.draw == draw], axis=0) for draw in draws])


def gain_over(points: Sequence[Point], part: str) -> Estimate:
    """Mean over tasks of what the blend has right more often than a part, with the error of measuring these tasks."""
    by_task = [[point for point in points if point.task == task] for task in dict.fromkeys(p.task for p in points)]
    return mean_of_independent(
        [paired_difference(*(right_by_draw(own, one) for one in (part, "blend"))) for own in by_task]
    )


def mean_right(points: Sequence[Point], part: str) -> float:
    """Mean over tasks of the share of queries that a part answers right, in percent."""
    tasks = dict.fromkeys(point.task for point in points)
    return 100 * float(np.mean([right_by_draw([p for p in points if p.task == one], part).mean() for one in tasks]))


def calibration_error(points: Sequence[Point], part: str, num_bins: int = 10) -> float:
    """Expected calibration error in percent, in bins of equal width (Guo et al. 2017, arXiv:1706.04599)."""
    confidence = np.concatenate([np.exp(point.log_probabilities[part].max(axis=1)) for point in points])
    right = np.concatenate([point.right(part) for point in points])
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    return 100 * sum(abs(float((confidence - right)[bins == b].sum())) for b in range(num_bins)) / len(right)


def written(estimate: Estimate) -> str:
    """Write a difference in points with its 95 % interval."""
    low, high = estimate.interval or (float("nan"), float("nan"))
    return f"{100 * estimate.mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def print_tables(points: Sequence[Point]) -> None:
    """Print accuracy of both parts and the blend, task by task and in the mean, and the verdict."""
    cells = list(dict.fromkeys((point.task, point.shots) for point in points))
    below = []
    print("| Task | Shots | model | words | blend | blend − better part | Weights of each draw |")
    print("| --- | ---: | ---: | ---: | ---: | --- | --- |")
    for task, shots in sorted(cells):
        own = [point for point in points if (point.task, point.shots) == (task, shots)]
        accuracy = {part: mean_right(own, part) for part in PARTS}
        gain = gain_over(own, "words" if accuracy["words"] > accuracy["model"] else "model")
        if gain.interval is not None and gain.interval[1] < 0:
            below.append(f"{task} at {shots}")
        used = sorted({point.num_shown for point in own})
        fitting = "" if used == [shots] else f" ({'–'.join(map(str, dict.fromkeys((used[0], used[-1]))))} fit)"
        weights = ", ".join(f"{one.weights.model:.2f} / {one.weights.words:.2f}" for one in own)
        percent = " | ".join(f"{accuracy[part]:.1f}" for part in PARTS)
        print(f"| {task} | {shots}{fitting} | {percent} | {written(gain)} | {weights} |")
    print("\n| Shots | model | words | blend | blend − model | blend − words | Calibration error of each |")
    print("| ---: | ---: | ---: | ---: | --- | --- | --- |")
    for name in (*map(str, sorted({shots for _, shots in cells})), "all"):
        own = [point for point in points if name in (str(point.shots), "all")]
        percent = " | ".join(f"{mean_right(own, part):.1f}" for part in PARTS)
        errors = ", ".join(f"{calibration_error(own, part):.1f}" for part in PARTS)
        gains = [written(gain_over(own, part)) for part in ("model", "words")]
        print(f"| {name} | {percent} | {gains[0]} | {gains[1]} | {errors} |")
    print(f"\nBelow the better part by more than noise: {', '.join(below) or 'nowhere'}, of {len(cells)} compared.")
    for part in ("model", "words"):
        gain = gain_over(points, part)
        is_above = gain.interval is not None and gain.interval[0] > 0
        print(f"Above {part} in the mean over all: {'yes' if is_above else 'not shown'}.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Record what is missing, or print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--role", choices=("evidence", "development"), default="evidence")
    parser.add_argument("--model", default="builtin:one")
    parser.add_argument("--output", type=Path, required=True, help="Folder of the records.")
    parser.add_argument("--tables", action="store_true")
    options = parser.parse_args(arguments)
    plan = json.loads(PLAN.read_text(encoding="utf-8"))[options.role]
    if options.tables:
        print_tables(list(points_of(options.data, plan, options.output)))
    else:
        record_all(options.data, plan, options.model, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
