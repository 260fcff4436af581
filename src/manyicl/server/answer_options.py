"""How rows are answered: what the request says, else the task's settings, as the engine takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from manyicl.engine.backend import Sampling, ScoreScope
from manyicl.engine.queries import AnswerOptions, has_few_labels, require_options
from manyicl.errors import UserError
from manyicl.server.records import TaskSettings
from manyicl.server.schemas import AnswerChoices
from manyicl.tasks.task import Task


@dataclass(frozen=True)
class HowToAnswer:
    """Arguments of `Engine.predict` for the rows of one request.

    Attributes:
        options: Options of the predictions; bad rows are always reported.
        num_retrieved: Demonstrations to retrieve for each query.
    """

    options: AnswerOptions
    num_retrieved: int = 0


def how_to_answer(choices: AnswerChoices, settings: TaskSettings, task: Task) -> HowToAnswer:
    """Put together what the request and the task say.

    Abstention and a blend need all scores, so they bring them.

    Args:
        choices: What the request says.
        settings: Settings of the task, where it says nothing.
        task: Task of the rows.

    Raises:
        UserError: If the options contradict each other or the task.
    """
    given = choices.model_fields_set
    abstain_below = choices.abstain_below if "abstain_below" in given else settings.abstain_below
    num_retrieved = settings.num_retrieved if choices.retrieve is None else choices.retrieve
    # The blend of a task's settings gives way to retrieved examples; one of the request contradicts them.
    blend = settings.blend and not num_retrieved if choices.blend is None else choices.blend
    if num_retrieved > settings.num_retrieved:
        what = f"task {task.name!r} reserves no tokens for so many retrieved demonstrations"
        expected, found = f"at most {settings.num_retrieved}", str(num_retrieved)
        remedy = "Make the task with `num_retrieved` in its settings."
        raise UserError("no_tokens_reserved", what, expected=expected, found=found, remedy=remedy, field="retrieve")
    options: AnswerOptions = {
        "scores": _scope(choices, task, needs_all=blend or abstain_below is not None),
        "abstain_below": abstain_below,
        "blend": blend,
        "sampling": _sampling(choices),
        "bad_rows": "report",
        "num_similar": choices.similar,
    }
    require_options(task, (), options, retrieves=num_retrieved > 0)
    return HowToAnswer(options, num_retrieved)


def _scope(choices: AnswerChoices, task: Task, *, needs_all: bool) -> ScoreScope:
    """Return which labels are scored: by default all where they are few, as `manyicl predict` does."""
    if task.is_closed and needs_all:
        return "all"
    if choices.scores is not None:
        return choices.scores
    if not task.is_closed:
        return "best"
    return "all" if has_few_labels(task) else "best_two"


def _sampling(choices: AnswerChoices) -> Sampling | None:
    """Return how tokens are drawn; None for the most probable ones."""
    named = {"temperature": choices.temperature, "top_p": choices.top_p, "seed": choices.seed}
    given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    return Sampling(**given) if given else None


def require_settings(settings: TaskSettings, task: Task) -> None:
    """Refuse settings that no prediction of the task could be made with.

    Raises:
        UserError: If there are any.
    """
    how_to_answer(AnswerChoices(), settings, task)
    if settings.blend and settings.num_retrieved:
        what = "weights of a blend are fitted without additional examples for each query"
        raise UserError("conflicting_options", what, remedy="Leave out blend or num_retrieved.", field="blend")
