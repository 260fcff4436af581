"""Task x num_shots x seed -> Result.

Demonstration sets of one seed are nested, and their prefix is encoded once and only extended, so a whole curve
costs one prefill of its longest point. Every shot count, seed and model is asked the same queries.
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

from manyicl.episodes.budget import fit_demonstrations, require_room_behind_instruction
from manyicl.errors import UserError
from manyicl.evaluation.baselines import chance_level, majority_level, tfidf_level
from manyicl.evaluation.metrics import METRICS, metrics_of
from manyicl.evaluation.result import (
    PredictedAnswer,
    Result,
    ResultStore,
    ShownExample,
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
    from manyicl.engine.engine import Engine, Prediction
    from manyicl.engine.prefix_cache import PrefixCache


class EvaluationSettings(BaseModel):
    """Which points of a shot curve are measured, and on how many queries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shots: tuple[int, ...] = Field((0, 1, 4, 16, 64, 256), min_length=1, description="Shot counts.")
    num_seeds: int = Field(3, ge=1, description="Draws of demonstrations for each task.")
    num_queries: int = Field(200, ge=1, description="Test rows asked; fewer where a task has fewer.")
    seed: int = Field(0, description="Of the order of test rows; demonstrations use seed, seed + 1, ...")
    sampling: ShotSampling = Field("balanced", description="How demonstrations are chosen.")

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
    """What an evaluation gives back.

    Attributes:
        results: One per task, seed and shot count, in that order; those found on disk included.
        num_found: How many of them an earlier run had already measured.
    """

    results: tuple[Result, ...]
    num_found: int


@dataclass(frozen=True, slots=True)
class AskedTask:
    """A task with the queries that every point of its curve is asked.

    Attributes:
        task: Its test side holds the chosen queries and nothing else.
        num_skipped: Test rows skipped because the context does not hold them even without demonstrations.
    """

    task: Task
    num_skipped: int

    @property
    def queries(self) -> tuple[Example, ...]:
        """The chosen queries, in order."""
        return tuple(self.task.test)


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
    """Measure a model on tasks at several shot counts and seeds; skip what stands in ``output`` already.

    Args:
        engine: The model.
        tasks: With a test side each.
        output: Folder of the records.
        settings: Shot counts, seeds and queries.
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
    name = model_name or engine.reference
    results: list[Result] = []
    num_found = 0
    for task in tasks:
        asked = choose_queries(engine, task, settings)
        curve = _Curve(engine, asked, settings, store, name)
        for seed, num_shots in settings.points():
            result, found = curve.point(seed, num_shots)
            results.append(result)
            num_found += found
            if on_result is not None:
                on_result(result, found)
    return ShotCurves(tuple(results), num_found)


def query_order(task: Task, seed: int) -> list[int]:
    """Return the positions of test rows in the order in which they are asked, a function of the seed alone."""
    order = list(range(len(task.test)))
    random.Random(f"queries {seed}").shuffle(order)
    return order


def choose_queries(engine: Engine, task: Task, settings: EvaluationSettings) -> AskedTask:
    """Take the first ``num_queries`` test rows of a seeded order that the context can hold.

    Raises:
        UserError: If there is none, or the instruction alone fills the context.
    """
    engine.encoder.require_encodable(task)
    opening = require_room_behind_instruction(task, engine.encoder, engine.max_context_tokens)
    chosen: list[Example] = []
    num_skipped = 0
    for position in query_order(task, settings.seed):
        if len(chosen) == settings.num_queries:
            break
        alone = replace(task, test=(task.test[position],))
        if opening + engine.num_reserved_tokens(alone) <= engine.max_context_tokens:
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
    return AskedTask(replace(task, test=tuple(chosen)), num_skipped)


class _Curve:
    """Walks the points of one task's curve and keeps the longest prefix so far, to extend it."""

    def __init__(
        self, engine: Engine, asked: AskedTask, settings: EvaluationSettings, store: ResultStore, name: str
    ) -> None:
        self.engine = engine
        self.asked = asked
        self.settings = settings
        self.store = store
        self.name = name
        self.queries_hash = hash_of(*(part for one in asked.queries for part in (one.query.text, *one.references)))
        self._prefix: PrefixCache | None = None
        self._answered: tuple[tuple[Example, ...], list[Prediction], float] | None = None

    def point(self, seed: int, num_shots: int) -> tuple[Result, bool]:
        """Return one result, and whether it was found on disk instead of measured."""
        key = result_key(self._arguments(seed, num_shots))
        found = self.store.find(file_stem(self.asked.task.name, num_shots, seed, key))
        if found is not None and found.model_name != self.name:
            # The same weights by another name stay another model: the measurement is copied, not renamed.
            found = self._by_own_name(found)
        if found is not None:
            return found, True
        task = self.asked.task
        num_available = min(num_shots, len(task.train))
        wanted = task.demonstrations(num_available, seed, self.settings.sampling)
        shown, num_dropped = fit_demonstrations(
            task,
            wanted,
            self.engine.encoder,
            self.engine.max_context_tokens,
            self.engine.num_reserved_tokens(task),
        )
        predictions, seconds = self._answers(shown)
        answers = self._scored(predictions)
        result = Result(
            key=key,
            num_shots=num_shots,
            num_shots_shown=len(shown),
            num_shots_missing=num_shots - num_available,
            num_shots_dropped=num_dropped,
            seed=seed,
            seconds=seconds,
            created=datetime.now(UTC),
            versions=_versions(),
            **self._identity(),
            **self._scores(answers),
            **_levels(task, shown),
            **self._context(shown),
        )
        context = (ShownExample(origin=e.origin, query=e.query.text, answer=e.answer) for e in shown)
        self.store.save(result, answers, context)
        return result, False

    def _by_own_name(self, found: Result) -> Result:
        """Return the record of this measurement by the name of this model, copied if it is not there yet."""
        key = hash_of(found.key, self.name)
        copy = self.store.find(file_stem(found.task, found.num_shots, found.seed, key))
        if copy is None:
            copy = found.model_copy(update={"key": key, "model_name": self.name})
            self.store.save(copy, self.store.predictions(found), self.store.context(found))
        return copy

    def _arguments(self, seed: int, num_shots: int) -> dict[str, Any]:
        """Collect all that a result is a function of."""
        task, engine = self.asked.task, self.engine
        return {
            "model_fingerprint": engine.fingerprint,
            "dtype": engine.dtype,
            "text_format": engine.encoder.format.model_dump(),
            "max_context_tokens": engine.max_context_tokens,
            "task": task.name,
            "data_hash": task.data_hash,
            "instruction": task.instruction(),
            "metric": task.metric,
            "max_answer_tokens": engine.max_answer_tokens(task),
            "queries_hash": self.queries_hash,
            "query_seed": self.settings.seed,
            "num_shots": num_shots,
            "seed": seed,
            "sampling": self.settings.sampling,
        }

    def _answers(self, shown: tuple[Example, ...]) -> tuple[list[Prediction], float]:
        """Answer all queries after these demonstrations, and time it.

        Two shot counts that fill the context show the same demonstrations; those are asked once.
        """
        if self._answered is not None and self._answered[0] == shown:
            return self._answered[1:]
        start = time.perf_counter()
        self._prefix = self._prefix_of(shown)
        predictions = list(self.engine.predict(self._prefix, [one.query for one in self.asked.queries]))
        self._answered = (shown, predictions, time.perf_counter() - start)
        return self._answered[1:]

    def _prefix_of(self, shown: tuple[Example, ...]) -> PrefixCache:
        """Extend the prefix there is, where it begins this one; else encode anew."""
        prefix = self._prefix
        if prefix is None or shown[: prefix.num_shots] != prefix.demonstrations:
            return self.engine.prefill(self.asked.task, shown)
        added = shown[prefix.num_shots :]
        return self.engine.extend(prefix, added) if added else prefix

    def _scored(self, predictions: Sequence[Prediction]) -> list[PredictedAnswer]:
        metrics = [METRICS[name] for name in metrics_of(self.asked.task)]
        return [
            PredictedAnswer(
                origin=example.origin,
                query=example.query.text,
                answer=prediction.answer,
                references=example.references,
                scores={m.name: m.of_example(prediction.answer, example.references) for m in metrics if m.of_example},
                log_probability=prediction.log_probability,
                stopped=prediction.stopped,
            )
            for example, prediction in zip(self.asked.queries, predictions, strict=True)
        ]

    def _scores(self, answers: Sequence[PredictedAnswer]) -> dict[str, Any]:
        """Score the whole set in the task's metric and its companions."""
        primary, *others = metrics_of(self.asked.task)
        texts = [one.answer for one in answers]
        references = [one.references for one in answers]
        metric = METRICS[primary]
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
            "metric": primary,
            "score": metric.score(texts, references),
            "standard_error": standard_error,
            "query_scores": each,
            "resampled_scores": resampled,
            "companions": {name: METRICS[name].score(texts, references) for name in others},
            "num_cut_answers": sum(not one.stopped for one in answers),
        }

    def _identity(self) -> dict[str, Any]:
        """Say which task, which queries and which model."""
        task, manifest = self.asked.task, self.engine.manifest
        return {
            "task": task.name,
            "family": task.family,
            "source": task.source,
            "data_hash": task.data_hash,
            "num_labels": len(task.labels) if task.labels else None,
            "sampling": self.settings.sampling,
            "query_seed": self.settings.seed,
            "num_queries": len(self.asked.queries),
            "num_queries_skipped": self.asked.num_skipped,
            "queries_hash": self.queries_hash,
            "model": self.engine.reference,
            "model_name": self.name,
            "model_fingerprint": self.engine.fingerprint,
            "text_format": self.engine.encoder.format.model_dump(),
            "max_context_tokens": self.engine.max_context_tokens,
            "trained_context_tokens": self.engine.trained_context_tokens,
            "trained_shots": manifest.max_trained_shots if manifest else None,
            "seen_in_training": _seen(task, manifest) if manifest else None,
        }

    def _context(self, shown: Sequence[Example]) -> dict[str, Any]:
        """Say what stood before the queries, in tokens, and whether training ever went so far."""
        engine, task = self.engine, self.asked.task
        encoder = engine.encoder
        prefix_ids = encoder.encode_prefix(task.instruction(), shown)
        place = encoder.place(task.instruction(), len(shown))
        query_ids = (encoder.query_ids(one.query.text, place) for one in self.asked.queries)
        trained_tokens = engine.trained_context_tokens
        trained_shots = engine.manifest.max_trained_shots if engine.manifest else None
        num_tokens = len(prefix_ids) + engine.num_reserved_tokens(task)
        return {
            "prompt_hash": hash_of(str(prefix_ids), *map(str, query_ids)),
            "num_context_tokens": len(prefix_ids),
            "beyond_training": (trained_tokens is not None and num_tokens > trained_tokens)
            or (trained_shots is not None and len(shown) > trained_shots),
        }


def _seen(task: Task, manifest: Manifest) -> bool:
    """Tell whether fine-tuning used this task or a sibling drawn from its source."""
    return any(task.source == one.source or task.data_hash == one.data_hash for one in manifest.tasks)


def _levels(task: Task, shown: Sequence[Example]) -> dict[str, Any]:
    """Compute the levels that cost nothing, and why any is missing."""
    levels = {
        "chance": chance_level(task, task.test),
        "majority": majority_level(task, task.test),
        "tfidf": tfidf_level(task, shown, task.test),
    }
    notes = {name: level.note for name, level in levels.items() if level.note}
    return {**{name: level.score for name, level in levels.items()}, "level_notes": notes}


@cache
def _versions() -> dict[str, str]:
    return {**library_versions(), "scikit-learn": version("scikit-learn"), "rouge-score": version("rouge-score")}
