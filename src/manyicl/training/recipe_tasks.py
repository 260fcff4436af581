"""Load the tasks that a recipe names, and make sure that held-out tasks are unseen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from manyicl.errors import UserError
from manyicl.model.manifest import TrainedTask
from manyicl.tasks.files import load_tasks
from manyicl.tasks.task import Task
from manyicl.training.recipe import Recipe


@dataclass(frozen=True)
class RecipeTasks:
    """The tasks of a run.

    Attributes:
        train: Tasks that are trained on.
        held_out: Tasks of other sources that are only evaluated.
    """

    train: tuple[Task, ...]
    held_out: tuple[Task, ...]


def load_recipe_tasks(recipe: Recipe) -> RecipeTasks:
    """Load the tasks of a recipe and check that held-out tasks are unseen.

    Raises:
        UserError: If a task cannot be loaded, or training and held-out tasks share a source or a name.
    """
    train = load_tasks(recipe.tasks.train, recipe.tasks.data_root)
    held_out = load_tasks(recipe.tasks.evaluate, recipe.tasks.data_root) if recipe.tasks.evaluate else []
    sources = {task.source: task.name for task in train}
    names = {task.name for task in train}
    for task in held_out:
        if task.source in sources:
            raise UserError(
                "task_not_unseen",
                f"tasks.evaluate: {task.name!r} comes from the same source ({task.source!r}) as the training task "
                f"{sources[task.source]!r}, so it is not unseen",
                remedy="Leave one of them out.",
                field="tasks.evaluate",
            )
        if task.name in names:
            raise UserError(
                "duplicate_task",
                f"tasks.evaluate: a training task is named {task.name!r}, too",
                remedy="Rename one of them.",
                field="tasks.evaluate",
            )
    return RecipeTasks(tuple(train), tuple(held_out))


def require_unseen_by_base(held_out: Sequence[Task], base: str | None, base_tasks: Iterable[TrainedTask]) -> None:
    """Check that the base was not trained on held-out tasks, or on siblings of them, either.

    Raises:
        UserError: If it was.
    """
    seen = list(base_tasks)
    for task in held_out:
        for known in seen:
            if known.source == task.source or known.data_hash == task.data_hash:
                raise UserError(
                    "task_not_unseen",
                    f"tasks.evaluate: {task.name!r} is not unseen: the base {base!r} was trained on {known.name!r} "
                    f"of the source {known.source!r}",
                    remedy="Leave it out, or use another base.",
                    field="tasks.evaluate",
                )
