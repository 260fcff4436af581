"""Answers of another system to the same queries: exported queries, and imported answers scored like those of a model.

::

    queries.jsonl   {"query_hash": "9f…", "task": "tickets", "instruction": "…", "query": "…", "options": ["…", "…"]}
    answers.jsonl   {"query_hash": "9f…", "answer": "billing"}

The hash of a query is that of its task and text, so that an answer cannot get to another query.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from manyicl.atomic import write_atomically
from manyicl.checked import read_text, require_whole_characters
from manyicl.errors import UserError, located, pluralized, quoted, shortened
from manyicl.evaluation.metrics import metrics_of
from manyicl.evaluation.result import PredictedAnswer, Result, ResultStore, hash_of, result_key
from manyicl.evaluation.shot_curve import (
    EvaluationSettings,
    example_scores,
    hash_of_queries,
    scores_of_answers,
    trivial_baselines,
)
from manyicl.model.manifest import library_versions
from manyicl.paths import exists, nearest_path, sha256_of_file
from manyicl.tasks.task import Query, Task

# Imported answers were given without demonstrations of ours.
NUM_SHOTS = 0
EXPORT_AGAIN = "Export the queries again, with the settings of this evaluation, and answer all of them."


def query_hash(task: Task, query: Query) -> str:
    """Return the hash by which an answer names its query: that of the task's name, the text and the options."""
    return hash_of(task.name, query.text, *(query.choices or task.labels or ()))


def export_queries(tasks: Sequence[Task], path: str | Path) -> Path:
    """Write the queries of tasks for a system that answers them elsewhere: one JSON object in a line.

    Args:
        tasks: Tasks whose test side is what models are evaluated on, as `choose_queries` returns them.
        path: File to write; it is replaced.
    """
    lines = {
        query_hash(task, example.query): {
            "query_hash": query_hash(task, example.query),
            "task": task.name,
            "instruction": task.instruction(),
            "query": example.query.text,
            "options": list(example.query.choices or task.labels or ()),
        }
        for task in tasks
        for example in task.test
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values()))
    return path


def import_predictions(
    path: str | Path,
    name: str,
    tasks: Sequence[Task],
    output: str | Path,
    settings: EvaluationSettings | None = None,
) -> list[Result]:
    """Score the answers in a file like those of a model, and add one result a task to a folder of results.

    A result has no demonstrations and stands at 0 shots, whatever the other system knew. What is there already, from
    the same file and queries, is not added again.

    Args:
        path: JSON lines with ``query_hash`` and ``answer``; other keys are passed over.
        name: What reports call the other system.
        tasks: The tasks, as they were exported.
        output: Folder of the results.
        settings: Those of the evaluation of the models; its seed is recorded.

    Raises:
        UserError: If the file cannot be read, or a query has no answer in it, or several, or it answers a query that is
            none of these tasks.
    """
    file, settings = Path(path), settings or EvaluationSettings()
    answers = _answers_in(file)
    _require_the_same_queries(answers, tasks, file)
    store, fingerprint = ResultStore(output), fingerprint_of(file)
    return [_result(task, answers, name, fingerprint, str(path), settings, store) for task in tasks]


def fingerprint_of(path: Path) -> str:
    """Return what the results of a file of answers have in place of the hash of a model's weights."""
    return f"imported {sha256_of_file(path)}"


def require_answers_to(tasks: Sequence[Task], path: Path) -> None:
    """Refuse a file of answers before a model is loaded: which of the test rows are queries shows only then.

    Raises:
        UserError: If the file cannot be read, or it answers what is no test row of these tasks.
    """
    hashes = {query_hash(task, example.query) for task in tasks for example in task.test}
    _require_no_foreign(_answers_in(path), hashes, path)


class _Answer(NamedTuple):
    """An imported answer, and the line that holds it."""

    text: str
    row: int


def _answers_in(file: Path) -> dict[str, _Answer]:
    """Read the answers by the hash of their query."""
    if not exists(file) or not file.is_file():
        remedy = nearest_path(file).strip() or "Export the queries and let the other system answer them."
        raise UserError("missing_file", "there is no file of answers", remedy=remedy, file=file)
    answers: dict[str, _Answer] = {}
    for row, key, answer in _lines_in(file):
        if key in answers:
            what = f"the query {key!r} is answered twice"
            found = f"another answer in line {answers[key].row}"
            raise UserError("answered_twice", what, found=found, remedy="Keep one of them.", file=file, row=row)
        answers[key] = _Answer(answer, row)
    return answers


def _lines_in(file: Path) -> Iterator[tuple[int, str, str]]:
    for row, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            content = None
        values = [content.get(key) if isinstance(content, dict) else None for key in ("query_hash", "answer")]
        if not all(isinstance(value, str) for value in values):
            expected = 'an object such as {"query_hash": "9f…", "answer": "…"}, both of them texts'
            raise UserError(
                "no_answer", "a line holds no answer", expected=expected, found=quoted(line), file=file, row=row
            )
        query, answer = str(values[0]), str(values[1])
        with located(file=file, row=row, field="answer"):
            require_whole_characters(answer)
        yield row, query, answer


def _require_the_same_queries(answers: Mapping[str, _Answer], tasks: Sequence[Task], file: Path) -> None:
    """Refuse answers to other queries, and queries without an answer.

    Raises:
        UserError: With the first of them: its hash, and its line or its text.
    """
    queries = {query_hash(task, example.query): (task, example.query) for task in tasks for example in task.test}
    _require_no_foreign(answers, queries, file)
    missing = [(key, task, query) for key, (task, query) in queries.items() if key not in answers]
    if missing:
        key, task, query = missing[0]
        what = f"the query {key!r} of task {task.name!r} has no answer, {shortened(query.text, 60)!r}"
        more = f"{len(missing):,} of {len(queries):,} queries without one"
        raise UserError("missing_answer", what, found=more, remedy=EXPORT_AGAIN, file=file)


def _require_no_foreign(answers: Mapping[str, _Answer], hashes: Collection[str], file: Path) -> None:
    foreign = [(answer.row, key) for key, answer in answers.items() if key not in hashes]
    if foreign:
        row, key = foreign[0]
        what = f"the answer to {key!r} belongs to no query of these tasks"
        more = f"{pluralized(len(foreign), 'such answer')} of {len(answers):,}"
        raise UserError("foreign_query", what, found=more, remedy=EXPORT_AGAIN, file=file, row=row)


def _result(
    task: Task,
    answers: Mapping[str, _Answer],
    name: str,
    fingerprint: str,
    reference: str,
    settings: EvaluationSettings,
    store: ResultStore,
) -> Result:
    """Score the answers to the queries of one task."""
    conditions = {
        "task": task.name,
        "data_hash": task.data_hash,
        "metric": metrics_of(task)[0],
        "sampling": settings.sampling,
        "query_seed": settings.seed,
        "queries_hash": hash_of_queries(task),
        "model_fingerprint": fingerprint,
        "text_format": {},
        "max_context_tokens": 0,
    }
    key = result_key({**conditions, "imported": name, "num_shots": NUM_SHOTS, "seed": settings.seed})
    if (found := store.find(task.name, NUM_SHOTS, settings.seed, key)) is not None:
        return found
    predictions = [
        PredictedAnswer(
            origin=example.origin,
            query=example.query.text,
            answer=(answer := answers[query_hash(task, example.query)].text),
            references=example.references,
            scores=example_scores(task, example, answer),
            log_probability=None,
        )
        for example in task.test
    ]
    result = Result(
        key=key,
        num_shots=NUM_SHOTS,
        num_shots_used=0,
        seed=settings.seed,
        seconds=0,
        created=datetime.now(UTC),
        family=task.family,
        source=task.source,
        num_labels=len(task.labels) if task.labels else None,
        num_queries=len(task.test),
        model=reference,
        model_name=name,
        prompt_hash=hash_of(*(query_hash(task, example.query) for example in task.test)),
        num_context_tokens=0,
        versions=library_versions(),
        **conditions,
        **scores_of_answers(task, predictions),
        **trivial_baselines(task, ()),
    )
    return store.add(result, predictions, ())[0]
