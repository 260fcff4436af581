"""Load the tasks that a recipe names, and make sure that held-out tasks are unseen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

from manyicl.errors import UserError
from manyicl.model.manifest import TrainedTask
from manyicl.tasks.files import OnProgress, load_tasks
from manyicl.tasks.task import Task
from manyicl.tasks.task_cache import load_known
from manyicl.training.recipe import Recipe


class RecipeTasks(NamedTuple):
    """The tasks of a run.

    Attributes:
        train: Tasks that are trained on.
        held_out: Tasks of other sources that are only evaluated.
    """

    train: tuple[Task, ...]
    held_out: tuple[Task, ...]


def load_recipe_tasks(recipe: Recipe, *, rehash: bool = False, on_progress: OnProgress | None = None) -> RecipeTasks:
    """Load the tasks of a recipe, with their rows left in their files, and check that held-out tasks are unseen.

    Args:
        recipe: The run.
        rehash: Read all rows, even of files whose sizes and times are as before.
        on_progress: Called with how many training tasks are loaded, of how many.

    Raises:
        UserError: If a task cannot be loaded, or training and held-out tasks share a source or a name.
    """
    load = partial(load_known, rehash=rehash)
    train = load_tasks(recipe.tasks.train, recipe.tasks.data_root, load, on_progress)
    held_out = load_tasks(recipe.tasks.evaluate, recipe.tasks.data_root, load) if recipe.tasks.evaluate else []
    sources = {task.source: task.name for task in train}
    names = {task.name for task in train}
    for task in held_out:
        if task.source in sources:
            sibling = f"comes from the same source ({task.source!r}) as the training task {sources[task.source]!r}"
            raise _not_unseen(f"{task.name!r} {sibling}, so it is not unseen", "Leave one of them out.")
        if task.name in names:
            what = f"tasks.evaluate: a training task is named {task.name!r}, too"
            raise UserError("duplicate_task", what, remedy="Rename one of them.", field="tasks.evaluate")
    return RecipeTasks(tuple(train), tuple(held_out))


def require_unseen_by_base(held_out: Sequence[Task], base: str | None, base_tasks: Iterable[TrainedTask]) -> None:
    """Check that the base was not trained on held-out tasks, or on siblings of them, either.

    Raises:
        UserError: If it was.
    """
    for task, known in product(held_out, base_tasks):
        if known.source == task.source or known.data_hash == task.data_hash:
            trained = f"the base {base!r} was trained on {known.name!r} of the source {known.source!r}"
            raise _not_unseen(f"{task.name!r} is not unseen: {trained}", "Leave it out, or use another base.")


def _not_unseen(what: str, remedy: str) -> UserError:
    return UserError("task_not_unseen", f"tasks.evaluate: {what}", remedy=remedy, field="tasks.evaluate")
