"""Task x num_shots x seed -> Result.

Demonstration sets of one seed are nested, and a prefix reuses the shorter one before it, so a whole curve costs one
prefill of its longest point. Every shot count, seed and model answers the same queries.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from manyicl.episodes.budget import require_instruction_fits
from manyicl.errors import UserError
from manyicl.evaluation.baselines import chance_level, majority_level, tfidf_level
from manyicl.evaluation.metrics import METRICS, metrics_of
from manyicl.evaluation.result import (
    ContextExample,
    PredictedAnswer,
    Result,
    ResultStore,
    file_stem,
    hash_of,
    result_key,
)
from manyicl.evaluation.uncertainty import honest_error, mean_over_queries, resampled_scores, spread
from manyicl.model.manifest import Manifest, library_versions
from manyicl.outputs import require_output_folder
from manyicl.tasks.demonstrations import ShotSampling
from manyicl.tasks.task import Example, Task

if TYPE_CHECKING:
    from manyicl.engine.backend import Wanted
    from manyicl.engine.engine import Engine
    from manyicl.engine.task_prefix import TaskPrefix


class EvaluationSettings(BaseModel):
    """Which points of a shot curve are measured, and on how many queries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shots: tuple[int, ...] = Field((0, 1, 4, 16, 64, 256), min_length=1, description="Shot counts.")
    num_seeds: int = Field(3, ge=1, description="Draws of demonstrations for each task.")
    num_queries: int = Field(200, ge=1, description="Test queries; fewer where a task has fewer rows.")
    seed: int = Field(0, description="Seed of the order of test rows; demonstrations use seed, seed + 1, ...")
    sampling: ShotSampling = Field("balanced", description="How demonstrations are chosen.")
    keep_confidence: bool = Field(
        False, description="Score every label, to record the probability of each answer among them."
    )

    @field_validator("shots")
    @classmethod
    def _ascending(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if min(shots) < 0:
            raise ValueError(f"a shot count is at least 0; found {min(shots)}")
        return tuple(sorted(set(shots)))

    def points(self) -> list[tuple[int, int]]:
        """Return (seed, shots) in the order of measurement; without demonstrations one seed says it all."""
        seeds = range(self.seed, self.seed + self.num_seeds)
        return [(seed, shots) for seed in seeds for shots in self.shots if shots > 0 or seed == self.seed]


@dataclass(frozen=True, slots=True)
class ShotCurves:
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
) -> ShotCurves:
    """Measure a model on tasks at several shot counts and seeds; skip what is in ``output`` already.

    Args:
        engine: Engine of the model.
        tasks: Tasks with a test side each.
        output: Folder of the records.
        settings: Shot counts, seeds and number of queries.
        model_name: What reports call the model; None for its reference.
        on_result: Called after each result with it and whether it was found on disk.

    Raises:
        UserError: If a task has no test row, an unknown metric, or no query that fits the context.
    """
    settings = settings or EvaluationSettings()
    store = ResultStore(output)
    require_output_folder(store.folder)
    for task in tasks:
        metrics_of(task)
        if not task.test:
            raise UserError(
                "no_test_rows", f"task {task.name!r} has no test rows", remedy="Give it some, or split its file."
            )
    measured = []
    for task in tasks:
        curve = _Curve(engine, *choose_queries(engine, task, settings), settings, store, model_name or engine.reference)
        for seed, num_shots in settings.points():
            measured.append(curve.point(seed, num_shots))
            if on_result is not None:
                on_result(*measured[-1])
    return ShotCurves(tuple(result for result, _ in measured), sum(was_found for _, was_found in measured))


def choose_queries(engine: Engine, task: Task, settings: EvaluationSettings) -> tuple[Task, int]:
    """Take the first ``num_queries`` test rows of a seeded order that the context can hold.

    Returns:
        The task with these test rows alone, and the number of those that were skipped because the context does not
        hold them even without demonstrations.

    Raises:
        UserError: If there is none, or the instruction alone fills the context.
    """
    engine.encoder.require_encodable(task)
    preamble = require_instruction_fits(task, engine.encoder, engine.max_context_tokens)
    order = list(range(len(task.test)))
    random.Random(f"queries {settings.seed}").shuffle(order)
    chosen: list[Example] = []
    num_skipped = 0
    for position in order:
        if len(chosen) == settings.num_queries:
            break
        alone = replace(task, test=(task.test[position],))
        if preamble + engine.num_reserved_tokens(alone) <= engine.max_context_tokens:
            chosen.append(task.test[position])
        else:
            num_skipped += 1
    if not chosen:
        raise UserError(
            "query_too_long",
            f"no test row of task {task.name!r} fits: {num_skipped} of {len(task.test)} are too long without any "
            "demonstration",
            expected=f"at most {engine.max_context_tokens:,} tokens",
            remedy="Add shorter test rows, or use a longer context.",
        )
    return replace(task, test=tuple(chosen)), num_skipped


class _Curve:
    """Walks the points of one task's curve; each prefix reuses what it shares with the one before."""

    def __init__(
        self, engine: Engine, task: Task, num_skipped: int, settings: EvaluationSettings, store: ResultStore, name: str
    ) -> None:
        """Collect what all points of the curve have in common; the test rows of ``task`` are its queries."""
        self.engine = engine
        self.task = task
        self.store = store
        self.name = name
        self.scores: Wanted = "all" if settings.keep_confidence and task.is_closed else "best"
        manifest = engine.manifest
        # What a score depends on, beside shots and seed.
        self.conditions: dict[str, Any] = {
            "task": task.name,
            "data_hash": task.data_hash,
            "metric": task.metric,
            "sampling": settings.sampling,
            "query_seed": settings.seed,
            "queries_hash": hash_of(*(text for one in task.test for text in (one.query.text, *one.references))),
            "model_fingerprint": engine.fingerprint,
            "text_format": engine.encoder.format.model_dump(),
            "max_context_tokens": engine.max_context_tokens,
        }
        self.description: dict[str, Any] = {
            "family": task.family,
            "source": task.source,
            "num_labels": len(task.labels) if task.labels else None,
            "num_queries": len(task.test),
            "num_queries_skipped": num_skipped,
            "model": engine.reference,
            "model_name": name,
            "trained_context_tokens": engine.trained_context_tokens,
            "trained_shots": manifest.max_trained_shots if manifest else None,
            "seen_in_training": _seen(task, manifest) if manifest else None,
            "versions": _versions(),
        }
        self._prefix: TaskPrefix | None = None
        self._answers: list[PredictedAnswer] = []
        self._seconds = 0.0

    def point(self, seed: int, num_shots: int) -> tuple[Result, bool]:
        """Return one result, and whether it was found on disk instead of measured."""
        further = {
            "dtype": self.engine.dtype,
            "instruction": self.task.instruction(),
            "max_answer_tokens": self.engine.max_answer_tokens(self.task),
            "num_shots": num_shots,
            "seed": seed,
        }
        key = result_key({**self.conditions, **further})
        found = self.store.find(file_stem(self.task.name, num_shots, seed, key))
        if found is not None:
            return (found if found.model_name == self.name else self._by_own_name(found)), True
        num_available = min(num_shots, len(self.task.train))
        self._answer_after(self.task.demonstrations(num_available, seed, self.conditions["sampling"]))
        assert self._prefix is not None, "the queries were answered after it"
        demonstrations = self._prefix.demonstrations
        result = Result(
            key=key,
            num_shots=num_shots,
            num_shots_used=len(demonstrations),
            num_shots_missing=num_shots - num_available,
            num_shots_dropped=num_available - len(demonstrations),
            seed=seed,
            seconds=self._seconds,
            created=datetime.now(UTC),
            **self.conditions,
            **self.description,
            **_scores(self.task, self._answers),
            **_baselines(self.task, demonstrations),
            **self._context(self._prefix),
        )
        context = (ContextExample(origin=e.origin, query=e.query.text, answer=e.answer) for e in demonstrations)
        self.store.save(result, self._answers, context)
        return result, False

    def _by_own_name(self, found: Result) -> Result:
        """Return the record of this measurement by the name of this model, copied if it is not there yet.

        The same weights by another name stay another model.
        """
        key = hash_of(found.key, self.name)
        copy = self.store.find(file_stem(found.task, found.num_shots, found.seed, key))
        if copy is None:
            copy = found.model_copy(update={"key": key, "model_name": self.name})
            self.store.save(copy, self.store.predictions(found), self.store.context(found))
        return copy

    def _answer_after(self, demonstrations: Sequence[Example]) -> None:
        """Answer all queries after those demonstrations that fit, and time it.

        Two shot counts that fill the context keep the same demonstrations; the queries are answered once.
        """
        start = time.perf_counter()
        before, self._prefix = self._prefix, self.engine.prefill(self.task, demonstrations, reuse=self._prefix)
        if before is not None and before.demonstrations == self._prefix.demonstrations:
            return
        metrics = [METRICS[name] for name in metrics_of(self.task)]
        predictions = self.engine.predict(self._prefix, [one.query for one in self.task.test], scores=self.scores)
        self._answers = [
            PredictedAnswer(
                origin=example.origin,
                query=example.query.text,
                answer=prediction.answer,
                references=example.references,
                scores={m.name: m.of_example(prediction.answer, example.references) for m in metrics if m.of_example},
                log_probability=prediction.log_probability,
                confidence=prediction.scores.probabilities[prediction.answer] if prediction.scores else None,
                stopped=prediction.stopped,
            )
            for example, prediction in zip(self.task.test, predictions, strict=True)
        ]
        self._seconds = time.perf_counter() - start

    def _context(self, prefix: TaskPrefix) -> dict[str, Any]:
        """Describe the context in tokens, and whether training ever went so far."""
        engine, task, encoder = self.engine, self.task, self.engine.encoder
        preceding = encoder.preceding(task.instruction(), prefix.num_shots)
        query_ids = (encoder.query_ids_uncached(one.query.text, preceding) for one in task.test)
        trained_tokens, trained_shots = engine.trained_context_tokens, self.description["trained_shots"]
        num_tokens = prefix.num_tokens + engine.num_reserved_tokens(task)
        return {
            "prompt_hash": hash_of(str(prefix.token_ids), *map(str, query_ids)),
            "num_context_tokens": prefix.num_tokens,
            "beyond_training": (trained_tokens is not None and num_tokens > trained_tokens)
            or (trained_shots is not None and prefix.num_shots > trained_shots),
        }


def _scores(task: Task, answers: Sequence[PredictedAnswer]) -> dict[str, Any]:
    """Score the whole set in the task's metric and its companions."""
    primary, *others = metrics_of(task)
    metric = METRICS[primary]
    texts = [one.answer for one in answers]
    references = [one.references for one in answers]
    each = resampled = None
    if metric.of_example is not None:
        each = tuple(one.scores[primary] for one in answers)
        standard_error = mean_over_queries(each).standard_error
    else:
        resampled = resampled_scores(
            lambda drawn: metric.score([texts[i] for i in drawn], [references[i] for i in drawn]), len(texts)
        )
        standard_error = honest_error(spread(resampled), len(texts))
    return {
        "score": metric.score(texts, references),
        "standard_error": standard_error,
        "query_scores": each,
        "resampled_scores": resampled,
        "companions": {name: METRICS[name].score(texts, references) for name in others},
        "num_cut_answers": sum(not one.stopped for one in answers),
    }


def _seen(task: Task, manifest: Manifest) -> bool:
    """Tell whether fine-tuning used this task or another one of its source."""
    return any(task.source == one.source or task.data_hash == one.data_hash for one in manifest.tasks)


def _baselines(task: Task, demonstrations: Sequence[Example]) -> dict[str, Any]:
    """Score the trivial baselines, and say why any is missing."""
    levels = {
        "chance": chance_level(task, task.test),
        "majority": majority_level(task, task.test),
        "tfidf": tfidf_level(task, demonstrations, task.test),
    }
    notes = {name: level.note for name, level in levels.items() if level.note}
    return {**{name: level.score for name, level in levels.items()}, "level_notes": notes}


@cache
def _versions() -> dict[str, str]:
    return {**library_versions(), "scikit-learn": version("scikit-learn"), "rouge-score": version("rouge-score")}
