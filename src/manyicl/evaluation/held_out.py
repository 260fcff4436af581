"""The score on held-out tasks that is measured during training, and by which the best checkpoint is chosen."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from manyicl.errors import UserError, pluralized
from manyicl.tasks.leakage import normalised
from manyicl.tasks.task import Task

if TYPE_CHECKING:
    from manyicl.model.load import LoadedModel


Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


class ScoreAt(NamedTuple):
    """The score of a task at a shot count.

    Attributes:
        shots: Requested number of demonstrations.
        score: The score.
        has_fewer: Whether the task or the context had room for fewer.
    """

    shots: int
    score: float
    has_fewer: bool


class ShareOut(Protocol):
    """Lets each process of a run do some of the work, and returns the outcomes of all to each, in any order.

    See `shared_out`.
    """

    def __call__(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Outcome]], /
    ) -> Sequence[Outcome]:
        """Call ``work`` with the items of this process."""


def in_this_process(items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Outcome]], /) -> Sequence[Outcome]:
    """Do all work here."""
    return work(items)


def held_out_measure(
    tasks: Sequence[Task],
    *,
    shots: tuple[int, ...],
    num_queries: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None = None,
    share_out: ShareOut = in_this_process,
) -> Callable[[LoadedModel], dict[str, float]]:
    """Return a function that measures a model on held-out tasks: its score at each shot count, and their mean.

    Where tasks have fewer demonstrations than a shot count, or fewer fit, they are measured with those, and the figure
    `tasks_below_N_shots` counts them.

    The best model is chosen by it, so queries are training rows of these tasks; their test rows stay untouched for
    `manyicl evaluate`.

    Args:
        tasks: Held-out tasks.
        shots: Shot counts.
        num_queries: Validation queries per task.
        seed: Seed of their choice and of the demonstrations.
        on_progress: Called before the first score and after each with how many are measured, and how many there
            are; of the tasks that this process measures.
        share_out: Gives each of several processes some of the tasks. A task is measured in one of them, exactly as by
            one process, so that the figures are the same.

    Raises:
        UserError: If a task has too few training rows.
    """
    from manyicl.engine.engine import Engine
    from manyicl.evaluation.shot_curve import EvaluationSettings, measure_shot_curves

    validation_tasks = [validation_task(task, num_queries, seed) for task in tasks]
    settings = EvaluationSettings(shots=shots, num_seeds=1, num_queries=num_queries, seed=seed, keep_confidence=False)
    report = on_progress or (lambda num_done, num_all: None)

    def scores_of(loaded: LoadedModel, own_tasks: Sequence[Task]) -> list[ScoreAt]:
        num_all = len(own_tasks) * len(settings.points())
        num_done = itertools.count(1)
        report(0, num_all)
        # The figures go to the log; the records of a model that changes with every step are not kept.
        with TemporaryDirectory() as folder:
            results = measure_shot_curves(
                Engine.local(loaded),
                own_tasks,
                folder,
                settings,
                on_result=lambda result, was_found: report(next(num_done), num_all),
            ).results
        return [ScoreAt(one.num_shots, one.score, one.num_shots_used < one.num_shots) for one in results]

    def measure(loaded: LoadedModel) -> dict[str, float]:
        scores = share_out(validation_tasks, lambda own_tasks: scores_of(loaded, own_tasks))
        figures = {"score": fmean(one.score for one in scores)}
        for shots in settings.shots:
            own = [one for one in scores if one.shots == shots]
            figures[f"score_at_{shots}_shots"] = fmean(one.score for one in own)
            if num_below := sum(one.has_fewer for one in own):
                figures[f"tasks_below_{shots}_shots"] = num_below
        return figures

    return measure


def validation_task(task: Task, num_queries: int, seed: int) -> Task:
    """Turn training rows of a held-out task into its test queries, so that its own test rows stay untouched.

    Args:
        task: Held-out task.
        num_queries: Most queries; at most half of the training rows are taken.
        seed: Seed of the choice.

    Returns:
        The task with the chosen rows as its test side. The others are its training side, without those that
        repeat a chosen query.

    Raises:
        UserError: If it has fewer than two training rows, or all others repeat the queries.
    """
    if len(task.train) < 2:
        what = f"tasks.evaluate: {task.name!r} has too few training rows, on some of which training validates"
        found, remedy = str(len(task.train)), "Add rows, or leave the task out."
        raise UserError("too_few_rows", what, expected="at least 2", found=found, remedy=remedy, field="tasks.evaluate")
    order = list(task.train)
    random.Random(f"watched {seed}").shuffle(order)
    num_chosen = min(num_queries, len(order) // 2)
    queries, others = order[:num_chosen], order[num_chosen:]
    texts = {normalised(example.query.text) for example in queries}
    demonstrations = tuple(example for example in others if normalised(example.query.text) not in texts)
    if not demonstrations:
        what = f"tasks.evaluate: the training rows of {task.name!r} have too few different texts"
        found = pluralized(len(texts), "text")
        remedy = "Add rows, or leave the task out."
        raise UserError("too_few_rows", what, expected="more", found=found, remedy=remedy, field="tasks.evaluate")
    return replace(task, train=demonstrations, test=tuple(queries))
