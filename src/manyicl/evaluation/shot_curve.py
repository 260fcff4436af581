"""Measure a model on tasks at several shot counts and seeds: one record for each.

Demonstration sets of one seed are nested, and a prefix reuses the shorter one before it, so a whole curve costs one
prefill of its longest point. Every shot count, seed and model answers the same queries.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from manyicl.activity import Activity
from manyicl.engine.label_scores import MOST_LABELS_SCORED
from manyicl.engine.queries import has_few_labels
from manyicl.episodes.budget import fit_demonstrations, max_answer_tokens, require_instruction_fits
from manyicl.errors import UserError, pluralized
from manyicl.evaluation.baselines import chance_level, majority_level, nearest_level, tfidf_level
from manyicl.evaluation.metrics import METRICS, metrics_of
from manyicl.evaluation.result import ContextExample, PredictedAnswer, Result, ResultStore, hash_of, result_key
from manyicl.evaluation.retrieval_prefix import prefill_to_retrieve
from manyicl.evaluation.uncertainty import mean_over_queries, resampled_scores, smallest_error, spread
from manyicl.model.manifest import library_versions
from manyicl.outputs import require_output_folder
from manyicl.tasks.demonstrations import ShotSampling, in_another_order
from manyicl.tasks.task import Example, Task

if TYPE_CHECKING:
    from manyicl.engine.backend import ScoreScope
    from manyicl.engine.engine import Engine
    from manyicl.engine.prediction import Prediction
    from manyicl.engine.queries import Retrieve
    from manyicl.engine.task_prefix import TaskPrefix


class Point(NamedTuple):
    """One measurement of a task: seed, demonstrations for all queries, rows retrieved for each, order of the former."""

    seed: int
    num_shots: int
    num_retrieved: int
    order: int = 0


class EvaluationSettings(BaseModel):
    """Which points of a shot curve are measured, and on how many queries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shots: Annotated[tuple[NonNegativeInt, ...], AfterValidator(lambda shots: tuple(sorted(set(shots))))] = Field(
        (0, 1, 4, 16, 64, 256), min_length=1, description="Shot counts."
    )
    num_seeds: int = Field(3, ge=1, description="Draws of demonstrations for each task.")
    num_queries: int = Field(200, ge=1, description="Test queries; fewer where a task has fewer rows.")
    seed: int = Field(0, description="Seed of the order of test rows; demonstrations use seed, seed + 1, ...")
    first_draw: int | None = Field(
        None, description="Seed of the first draw of demonstrations where it is not that of the order of test rows."
    )
    sampling: ShotSampling = Field("balanced", description="How demonstrations are chosen.")
    keep_confidence: bool | None = Field(
        None,
        description="Score all labels, to record the probability of each answer; none to do so up to "
        f"{MOST_LABELS_SCORED} labels.",
    )
    num_retrieved: int = Field(
        0,
        ge=0,
        description="Training rows retrieved for each query at a second point after each; 0 for no such points.",
    )
    num_orders: int = Field(
        1, ge=1, description="Orders in which the demonstrations of each draw are measured, its own the first."
    )

    @model_validator(mode="after")
    def _orders_of_what_all_queries_share(self) -> Self:
        if self.num_orders > 1 and self.num_retrieved:
            raise ValueError("num_orders and num_retrieved are not measured together; give one of them")
        return self

    def points(self) -> list[Point]:
        """Return the points in the order of measurement; without demonstrations one seed says it all."""
        first = self.seed if self.first_draw is None else self.first_draw
        return [
            Point(seed, shots, num_retrieved, order)
            for seed in range(first, first + self.num_seeds)
            # Prefixes of one order reuse each other, of different orders they do not.
            for order in range(self.num_orders)
            for shots in self.shots
            for num_retrieved in sorted({0, self.num_retrieved})
            if (shots > 0 or seed == first) and (shots > 1 or order == 0)
        ]


class ShotCurves(NamedTuple):
    """Results of an evaluation.

    Attributes:
        results: One per task, seed and shot count, in that order; those found on disk included.
        num_found: Number of them that an earlier run had already measured.
    """

    results: tuple[Result, ...]
    num_found: int


OnResult = Callable[[Result, bool], None]


def measure_shot_curves(
    engine: Engine,
    tasks: Sequence[Task],
    output: str | Path,
    settings: EvaluationSettings | None = None,
    *,
    model_name: str | None = None,
    on_result: OnResult | None = None,
    activity: Activity | None = None,
) -> ShotCurves:
    """Measure a model on tasks at several shot counts and seeds; skip what is in ``output`` already.

    Args:
        engine: Engine of the model.
        tasks: Tasks with a test side each.
        output: Folder of the records.
        settings: Shot counts, seeds and number of queries.
        model_name: What reports call the model; None for the last part of a path, or its whole reference.
        on_result: Called after each result with it and whether it was found on disk.
        activity: Shows which task, shot count and seed is measured, and how many queries are answered.

    Raises:
        UserError: If a task has no test row, an unknown metric, or no query that fits the context.
    """
    settings = settings or EvaluationSettings()
    store = ResultStore(output)
    require_output_folder(store.folder)
    for task in tasks:
        metrics_of(task)
        if not task.test:
            remedy = "Give it some, or split its file."
            raise UserError("no_test_rows", f"task {task.name!r} has no test rows", remedy=remedy)
    name = model_name or short_name(engine.identity.reference)
    activity = activity or Activity()
    measured = []
    for task in tasks:
        activity.now(f"{task.name}: choosing queries")
        chosen = choose_queries(engine, task, settings)
        for result, was_found in _curve(engine, *chosen, settings, store, name, activity):
            measured.append((result, was_found))
            if on_result is not None:
                on_result(result, was_found)
    return ShotCurves(tuple(result for result, _ in measured), sum(was_found for _, was_found in measured))


def short_name(reference: str) -> str:
    """Return what a report calls a model without a name: of a local folder or file the last part of its path.

    Examples:
        >>> short_name("runs/2026/tickets-model/"), short_name("hf:owner/name"), short_name("builtin:one")
        ('tickets-model', 'hf:owner/name', 'builtin:one')
    """
    is_path = ":" not in reference or Path(reference).exists()
    return Path(reference).resolve().name or reference if is_path else reference


def choose_queries(engine: Engine, task: Task, settings: EvaluationSettings) -> tuple[Task, int]:
    """Take the first ``num_queries`` test rows of a seeded order that the context can hold.

    Returns:
        The task with these test rows alone, and the number of those that were skipped because the context does not
        hold them even without demonstrations.

    Raises:
        UserError: If there is none, or the instruction alone fills the context.
    """
    engine.encoder.require_encodable(task)
    most = engine.max_context_tokens
    preamble = require_instruction_fits(task, engine.encoder, most)
    order = list(range(len(task.test)))
    random.Random(f"queries {settings.seed}").shuffle(order)
    chosen: list[Example] = []
    num_skipped = 0
    for position in order:
        example = task.test[position]
        if preamble + engine.num_reserved_tokens(task, [example.query]) <= most:
            chosen.append(example)
        else:
            num_skipped += 1
        if len(chosen) == settings.num_queries:
            break
    if not chosen:
        what = f"no test row of task {task.name!r} fits: all {num_skipped} are too long without any demonstration"
        remedy = "Add shorter test rows, or use a longer context."
        raise UserError("query_too_long", what, expected=f"at most {most:,} tokens", remedy=remedy)
    return replace(task, test=tuple(chosen)), num_skipped


def _curve(
    engine: Engine,
    task: Task,
    num_skipped: int,
    settings: EvaluationSettings,
    store: ResultStore,
    name: str,
    activity: Activity,
) -> Iterator[tuple[Result, bool]]:
    """Yield the result of each point of a task's curve, and whether it was found on disk instead of measured.

    The test rows of ``task`` are the queries.
    """
    curve = _Curve(engine, task, num_skipped, settings, name, activity)
    for point in settings.points():
        result = store.find(task.name, point.num_shots, point.seed, curve.key(point))
        was_found = result is not None
        if result is None:
            result, was_found = store.add(*curve.measure(point))
        yield _under_name(result, name, store), was_found


class _Answered(NamedTuple):
    """Answers to the queries, after which demonstrations, and the time that they took."""

    demonstrations: tuple[Example, ...]
    answers: list[PredictedAnswer]
    seconds: float


class _Curve:
    """Measures the points of a task's curve; each prefix reuses what it shares with the one before."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        num_skipped: int,
        settings: EvaluationSettings,
        name: str,
        activity: Activity,
    ) -> None:
        self._engine, self._task, self._settings, self._activity = engine, task, settings, activity
        self._conditions = _conditions(engine, task, settings)
        self._description = _description(engine, task, num_skipped, name)
        self._scope: ScoreScope = "all" if keeps_confidence(task, settings) else "best"
        self._prefix: TaskPrefix | None = None
        # The last answers for each number of retrieved rows.
        self._answered: dict[int, _Answered] = {}

    def key(self, point: Point) -> str:
        """Hash everything on which the result of a point depends."""
        arguments = {
            **self._conditions,
            "dtype": self._engine.identity.dtype,
            "instruction": self._task.instruction(),
            "max_answer_tokens": max_answer_tokens(self._task),
            "num_shots": point.num_shots,
            "seed": point.seed,
        }
        # No score depends on it, but a record without confidences cannot take the place of one that has them.
        if self._scope == "all":
            arguments["keep_confidence"] = True
        # Where nothing is retrieved, the key is that of records from before there was retrieval.
        if point.num_retrieved:
            arguments["num_retrieved"] = point.num_retrieved
        if point.order:
            arguments["order"] = point.order
        return result_key(arguments)

    def measure(self, point: Point) -> tuple[Result, list[PredictedAnswer], list[ContextExample]]:
        """Draw demonstrations, prefill them, answer the queries after them, and score the answers."""
        task = self._task
        self._activity.now(_name_of(task, point))
        start = time.perf_counter()
        num_available = min(point.num_shots, len(task.train))
        drawn = self._demonstrations(num_available, point)
        prefix, retrieve = prefill_to_retrieve(self._engine, task, drawn, point.num_retrieved, self._prefix)
        self._prefix = prefix
        answered = self._answer(prefix, retrieve, point.num_retrieved, start)
        result = Result(
            key=self.key(point),
            num_shots=point.num_shots,
            num_shots_used=prefix.num_shots,
            num_shots_missing=point.num_shots - num_available,
            num_shots_dropped=num_available - prefix.num_shots,
            num_retrieved=point.num_retrieved,
            seed=point.seed,
            order=point.order,
            max_answer_tokens=None if task.is_closed else max_answer_tokens(task),
            seconds=answered.seconds,
            created=datetime.now(UTC),
            **self._conditions,
            **self._description,
            **scores_of_answers(task, answered.answers),
            **trivial_baselines(task, prefix.demonstrations),
            **_context(self._engine, task, prefix, retrieve, self._description["trained_shots"]),
        )
        context = [ContextExample(origin=e.origin, query=e.query.text, answer=e.answer) for e in prefix.demonstrations]
        return result, answered.answers, context

    def _demonstrations(self, num_available: int, point: Point) -> tuple[Example, ...]:
        """Draw demonstrations, and put those that fit the context into another order: all orders have the same."""
        drawn = self._task.demonstrations(num_available, point.seed, self._settings.sampling)
        if not point.order:
            return drawn
        engine, reserve = self._engine, self._engine.num_reserved_tokens(self._task)
        fitting, _ = fit_demonstrations(self._task, drawn, engine.encoder, engine.max_context_tokens, reserve)
        return in_another_order(fitting, point.seed, point.order)

    def _answer(self, prefix: TaskPrefix, retrieve: Retrieve | None, num_retrieved: int, start: float) -> _Answered:
        """Answer the queries after a prefix, whose making began at ``start``.

        Two shot counts that fill the context keep the same demonstrations; the queries are answered once.
        """
        answered = self._answered.get(num_retrieved)
        if answered is None or answered.demonstrations != prefix.demonstrations:
            answers = _answers(self._engine, self._task, prefix, retrieve, self._scope, self._activity)
            answered = _Answered(prefix.demonstrations, answers, time.perf_counter() - start)
            self._answered[num_retrieved] = answered
        return answered


def _name_of(task: Task, point: Point) -> str:
    """Name a point as progress shows it."""
    retrieved = f", {point.num_retrieved} retrieved" if point.num_retrieved else ""
    order = f", order {point.order + 1}" if point.order else ""
    return f"{task.name}, {pluralized(point.num_shots, 'shot')}{retrieved}, seed {point.seed}{order}"


def keeps_confidence(task: Task, settings: EvaluationSettings) -> bool:
    """Tell whether the probability of each answer of a task is recorded, for which all labels are scored."""
    return has_few_labels(task) if settings.keep_confidence is None else task.is_closed and settings.keep_confidence


def _conditions(engine: Engine, task: Task, settings: EvaluationSettings) -> dict[str, Any]:
    """Return the fields of a record on which its score depends, besides shots and seed."""
    return {
        "task": task.name,
        "data_hash": task.data_hash,
        "metric": task.metric,
        "sampling": settings.sampling,
        "query_seed": settings.seed,
        "queries_hash": hash_of_queries(task),
        "model_fingerprint": engine.identity.fingerprint,
        "text_format": engine.encoder.format.model_dump(),
        "max_context_tokens": engine.max_context_tokens,
    }


def hash_of_queries(task: Task) -> str:
    """Hash the test queries of a task in order, with their references."""
    return hash_of(*(text for one in task.test for text in (one.query.text, *one.references)))


def _description(engine: Engine, task: Task, num_skipped: int, name: str) -> dict[str, Any]:
    """Return the other fields of a record that are the same for a whole curve."""
    manifest = engine.manifest
    trained = manifest.tasks if manifest else ()
    # Fine-tuning saw this task, or another one of its source.
    is_seen = any(task.source == one.source or task.data_hash == one.data_hash for one in trained)
    return {
        "family": task.family,
        "source": task.source,
        "num_labels": len(task.labels) if task.labels else None,
        "num_queries": len(task.test),
        "num_queries_skipped": num_skipped,
        "model": engine.identity.reference,
        "model_name": name,
        "trained_context_tokens": engine.trained_context_tokens,
        "trained_shots": manifest.max_trained_shots if manifest else None,
        "seen_in_training": is_seen if manifest else None,
        "versions": {
            **library_versions(),
            **{library: version(library) for library in ("scikit-learn", "rouge-score")},
        },
    }


def _under_name(found: Result, name: str, store: ResultStore) -> Result:
    """Return the record of a measurement under the name of this model, copied if it is not there yet.

    The same weights under another name stay another model.
    """
    if found.model_name == name:
        return found
    copy = found.model_copy(update={"key": hash_of(found.key, name), "model_name": name})
    earlier = store.find(copy.task, copy.num_shots, copy.seed, copy.key)
    if earlier is None:
        store.save(copy, store.predictions(found), store.context(found))
    return earlier or copy


def _answers(
    engine: Engine,
    task: Task,
    prefix: TaskPrefix,
    retrieve: Retrieve | None,
    scores: ScoreScope,
    activity: Activity,
) -> list[PredictedAnswer]:
    """Answer the queries after a prefix, and score each answer in the metrics that score single answers."""
    predictions = engine.predict(prefix, [one.query for one in task.test], retrieve=retrieve, scores=scores)
    answered = _with_progress(predictions, len(task.test), activity)
    return [
        PredictedAnswer(
            origin=example.origin,
            query=example.query.text,
            answer=prediction.answer,
            references=example.references,
            scores=example_scores(task, example, prediction.answer),
            log_probability=prediction.log_probability,
            confidence=prediction.scores.probabilities[prediction.answer] if prediction.scores else None,
            stopped=prediction.stopped,
        )
        for example, prediction in zip(task.test, answered, strict=True)
    ]


def example_scores(task: Task, example: Example, answer: str) -> dict[str, float]:
    """Score one answer in the metrics of the task that score single answers."""
    metrics = (METRICS[name] for name in metrics_of(task))
    return {metric.name: metric.of_example(answer, example.references) for metric in metrics if metric.of_example}


def _with_progress(predictions: Iterator[Prediction], num_queries: int, activity: Activity) -> Iterator[Prediction]:
    """Pass predictions on, and say how many there are."""
    activity.part(f"0 of {num_queries:,} queries")
    for number, prediction in enumerate(predictions, start=1):
        activity.part(f"{number:,} of {num_queries:,} queries")
        yield prediction


def _context(
    engine: Engine, task: Task, prefix: TaskPrefix, retrieve: Retrieve | None, trained_shots: int | None
) -> dict[str, Any]:
    """Describe the context in tokens, and whether training ever went so far."""
    preceding = engine.encoder.preceding(task.instruction(), prefix.num_shots)
    query_ids = (engine.encoder.query_ids_uncached(one.query.text, preceding) for one in task.test)
    retrieved = [tuple(retrieve(one.query)) if retrieve else () for one in task.test]
    num_tokens = prefix.num_tokens + engine.num_reserved_tokens(task, retrieve=retrieve)
    num_shots = prefix.num_shots + max(map(len, retrieved))
    limits = ((num_tokens, engine.trained_context_tokens), (num_shots, trained_shots))
    texts = [text for found in retrieved for example in found for text in (example.query.text, example.answer)]
    return {
        "prompt_hash": hash_of(str(prefix.token_ids), *map(str, query_ids), *texts),
        "mean_num_retrieved": sum(map(len, retrieved)) / len(retrieved),
        "num_context_tokens": prefix.num_tokens,
        "beyond_training": any(trained is not None and number > trained for number, trained in limits),
    }


def scores_of_answers(task: Task, answers: Sequence[PredictedAnswer]) -> dict[str, Any]:
    """Score the whole set in the task's metric and its companions."""
    primary, *others = metrics_of(task)
    texts = [one.answer for one in answers]
    references = [one.references for one in answers]

    def score_of_all(name: str) -> float:
        if METRICS[name].of_example is None:
            return METRICS[name].score(texts, references)
        return fmean(one.scores[name] for one in answers)

    each = resampled = None
    if METRICS[primary].of_example is not None:
        each = tuple(one.scores[primary] for one in answers)
        standard_error = mean_over_queries(each).standard_error
    else:
        score = METRICS[primary].score
        resampled = resampled_scores(lambda q: score([texts[i] for i in q], [references[i] for i in q]), len(texts))
        smallest = smallest_error(len(texts))
        standard_error = None if smallest is None else max(spread(resampled), smallest)
    return {
        "score": score_of_all(primary),
        "standard_error": standard_error,
        "query_scores": each,
        "resampled_scores": resampled,
        "companions": {name: score_of_all(name) for name in others},
        "num_cut_answers": sum(not one.stopped for one in answers),
    }


def trivial_baselines(task: Task, demonstrations: Sequence[Example]) -> dict[str, Any]:
    """Score the trivial baselines, and say why any is missing."""
    levels = {
        "chance": chance_level(task, task.test),
        "majority": majority_level(task, task.test),
        "tfidf": tfidf_level(task, demonstrations, task.test),
        "nearest": nearest_level(task, demonstrations, task.test),
    }
    notes = {name: level.note for name, level in levels.items() if level.note}
    return {**{name: level.score for name, level in levels.items()}, "level_notes": notes}
