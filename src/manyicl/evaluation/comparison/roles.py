"""Which task is what in a comparison; what is drawn is drawn by the training seed, before any result is known."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from manyicl.episodes.sampling import shuffled_lazily
from manyicl.evaluation.comparison.records import Role, TaskRole
from manyicl.evaluation.comparison.settings import Comparison
from manyicl.evaluation.result import hash_of
from manyicl.tasks.files import OnProgress, load_tasks
from manyicl.tasks.leakage import normalised
from manyicl.tasks.spec import family_order
from manyicl.tasks.task import Example, Task
from manyicl.tasks.task_cache import load_known


@dataclass(frozen=True)
class ComparisonTasks:
    """The tasks of a comparison.

    Attributes:
        train: Tasks that are trained on.
        validation: Tasks on whose training rows learning rates are chosen.
        unseen: Tasks that are only evaluated.
        seen: Training tasks that are evaluated on their test rows.
        dedicated: Seen and unseen tasks that get dedicated models.
        dedicated_validation: Validation tasks on which rate and length of dedicated models are chosen.
        probes: Tasks that are neither trained on nor similar to those.
    """

    train: tuple[Task, ...]
    validation: tuple[Task, ...]
    unseen: tuple[Task, ...]
    seen: tuple[Task, ...]
    dedicated: tuple[Task, ...]
    dedicated_validation: tuple[Task, ...]
    probes: tuple[Task, ...] = ()

    @property
    def evaluated(self) -> tuple[Task, ...]:
        """Tasks on whose test rows every model is evaluated."""
        return (*self.seen, *self.unseen)

    def roles(self) -> dict[str, TaskRole]:
        """Say what each task is that a result or a choice is about."""
        parts: tuple[tuple[Role, tuple[Task, ...]], ...] = (
            ("seen", self.seen),
            ("unseen", self.unseen),
            ("validation", self.validation),
            ("probe", self.probes),
        )
        return {
            task.name: TaskRole(role=role, family=task.family, source=task.source)
            for role, tasks in parts
            for task in tasks
        }


def load_comparison_tasks(settings: Comparison, on_progress: OnProgress | None = None) -> ComparisonTasks:
    """Load all tasks, with their rows left in their files, and draw those that are evaluated.

    Raises:
        UserError: If a task cannot be loaded.
    """
    load = partial(load_tasks, data_root=settings.tasks.data_root, load=load_known)
    validation = load(settings.tasks.evaluate) if settings.tasks.evaluate else []
    unseen = load(settings.compare.unseen)
    forgetting = settings.compare.forgetting
    probes = load(forgetting.probes) if forgetting and forgetting.probes else []
    tasks = assigned(settings, load(settings.tasks.train, on_progress=on_progress), validation, unseen)
    return replace(tasks, probes=tuple(probes))


def assigned(
    settings: Comparison, train: Sequence[Task], validation: Sequence[Task], unseen: Sequence[Task]
) -> ComparisonTasks:
    """Draw the seen tasks and those of the dedicated models."""
    seed, compare = settings.training.seed, settings.compare
    # A score of one test row has no error.
    with_test_rows = [task for task in train if len(task.test) > 1]
    seen = drawn_per_family(with_test_rows, compare.num_seen, f"seen {seed}")
    dedicated: tuple[Task, ...] = ()
    on_validation: tuple[Task, ...] = ()
    if "dedicated" in compare.regimes:
        number = compare.dedicated.tasks_per_family
        dedicated = tuple(
            task
            for role, tasks in (("seen", seen), ("unseen", unseen))
            for task in drawn_per_family(tasks, number, f"dedicated {role} {seed}")
        )
        on_validation = drawn_per_family(validation, 1, f"dedicated validation {seed}")
    return ComparisonTasks(tuple(train), tuple(validation), tuple(unseen), seen, dedicated, on_validation)


def by_family(tasks: Iterable[Task]) -> Mapping[str, list[Task]]:
    """Group tasks by family, families in their usual order and tasks by name."""
    families: defaultdict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        families[task.family].append(task)
    return {
        family: sorted(families[family], key=lambda task: task.name) for family in sorted(families, key=family_order)
    }


def drawn_per_family(tasks: Iterable[Task], number: int | None, seed: str) -> tuple[Task, ...]:
    """Draw so many tasks of each family; all where there are fewer, or for None."""
    chosen: list[Task] = []
    for family, of_family in by_family(tasks).items():
        most = len(of_family) if number is None else min(number, len(of_family))
        drawn = random.Random(f"{seed} {family}").sample(of_family, most)
        chosen += sorted(drawn, key=lambda task: task.name)
    return tuple(chosen)


def share_of_tasks(tasks: Sequence[Task], share: float, seed: int) -> tuple[Task, ...]:
    """Draw a share of the tasks of each family, at least one of each; they keep their order."""
    if share == 1:
        return tuple(tasks)
    kept: set[str] = set()
    for family, of_family in by_family(tasks).items():
        number = max(1, round(share * len(of_family)))
        order = shuffled_lazily(len(of_family), random.Random(f"share of tasks {seed} {family}"))
        # The smaller of two shares is part of the larger.
        kept |= {of_family[position].name for position, _ in zip(order, range(number), strict=False)}
    return tuple(task for task in tasks if task.name in kept)


def limited(task: Task, num_examples: int, draw: int) -> Task:
    """Return a task with as many training examples: those that a model is given in context in the same draw."""
    return _with_rows(task, task.demonstrations(num_examples, draw), f"{num_examples} examples of draw {draw}")


def remaining(task: Task, num_examples: int, draw: int) -> Task:
    """Return a task with the training examples that `limited` omits, without those that repeat one of its queries."""
    used = {normalised(example.query.text) for example in task.demonstrations(num_examples, draw)}
    others = [example for example in task.train if normalised(example.query.text) not in used]
    return _with_rows(task, others, f"without {num_examples} examples of draw {draw}")


def _with_rows(task: Task, rows: Iterable[Example], what: str) -> Task:
    """Return a task with other training rows, and a hash that says so."""
    return replace(task, train=tuple(rows), data_hash=hash_of(task.data_hash, what))
