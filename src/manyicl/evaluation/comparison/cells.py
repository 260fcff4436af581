"""What a comparison does, as two grids: trials of learning rates, then trainings with the chosen rates."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyicl.evaluation.comparison.budgets import EQUAL_ANSWERS, Length, replay_name, variant_name
from manyicl.evaluation.comparison.records import Equal
from manyicl.evaluation.comparison.regimes import regime_recipe, trial_recipe
from manyicl.evaluation.comparison.roles import ComparisonTasks, limited, remaining, share_of_tasks
from manyicl.evaluation.comparison.settings import Comparison, Regime
from manyicl.evaluation.result import hash_of
from manyicl.evaluation.shot_curve import EvaluationSettings
from manyicl.paths import sha256_of_file
from manyicl.tasks.task import Task
from manyicl.training.recipe import Recipe
from manyicl.training.recipe_tasks import RecipeTasks

# A trial of dedicated models is scored at most so many times on its way, so that its length can be chosen.
NUM_SCORES = 8
# Forgetting is measured so many times along a training.
NUM_MOMENTS = 4


@dataclass(frozen=True)
class Trial:
    """A training at a fifth of the budget, or of a dedicated model, that is scored on validation tasks.

    Attributes:
        name: Name of its cell.
        regime: What is trained.
        learning_rate: The rate that is tried.
        task: Validation task of a dedicated model; None for a model of many tasks.
        num_examples: Examples that a dedicated model is trained on; None for others.
    """

    name: str
    regime: Regime
    learning_rate: float
    task: Task | None = None
    num_examples: int | None = None

    @property
    def choice(self) -> str:
        """Name of what is chosen by it."""
        return choice_name(self.regime, self.num_examples)


@dataclass(frozen=True)
class Run:
    """A model of the comparison: how it is trained, and what it is evaluated on.

    Attributes:
        name: Name of its cell, and of the model in its results.
        regime: How the base is adapted.
        length: Name of the length of its training, see `budgets.lengths_of`; None for the base.
        seed: Training seed.
        draw: First draw of demonstrations.
        equal: What its budget has in common with the others.
        replay: Whether general text is mixed in.
        variant: Name of an ablation.
        task: Task of a dedicated model.
        num_examples: Examples that a dedicated model is trained on.
    """

    name: str
    regime: Regime
    length: str | None
    seed: int
    draw: int
    equal: Equal
    replay: bool = False
    variant: str | None = None
    task: Task | None = None
    num_examples: int | None = None

    @property
    def choice(self) -> str:
        """Name of the choice of its rate."""
        return choice_name(self.regime, self.num_examples)


def choice_name(regime: Regime, num_examples: int | None) -> str:
    """Return the name under which a rate is chosen: of a regime, or of dedicated models with so many examples."""
    return regime if num_examples is None else f"{regime}_{num_examples}"


def planned_trials(settings: Comparison, tasks: ComparisonTasks) -> tuple[Trial, ...]:
    """List the trials; none where there is nothing to choose."""
    return tuple(_trials(settings, tasks)) if settings.is_tuned else ()


def _trials(settings: Comparison, tasks: ComparisonTasks) -> Iterator[Trial]:
    numbered = tuple(enumerate(settings.learning_rates))
    for regime in settings.compare.regimes:
        if regime not in ("base", "dedicated"):
            yield from (Trial(f"{regime}_rate{number}", regime, rate) for number, rate in numbered)
    if tasks.dedicated:
        for num_examples in settings.compare.dedicated.num_examples:
            for task in tasks.dedicated_validation:
                name = f"dedicated_{file_name(task.name)}_{num_examples}"
                yield from (
                    Trial(f"{name}_rate{number}", "dedicated", rate, task, num_examples) for number, rate in numbered
                )


def planned_runs(settings: Comparison, tasks: ComparisonTasks) -> tuple[Run, ...]:
    """List the models of the comparison, seed by seed, so that the first seed is whole before the next one starts."""
    return tuple(_runs(settings, tasks))


def _runs(settings: Comparison, tasks: ComparisonTasks) -> Iterator[Run]:
    compare = settings.compare
    for number, seed in enumerate(settings.seeds):
        draw = number * compare.num_draws
        for regime in compare.regimes:
            length: str | None = None if regime == "base" else regime
            if regime != "dedicated":
                yield Run(f"{regime}_seed{seed}", regime, length, seed, draw, compare.budget)
            if regime == "all_answers" and "last_answer" in compare.regimes:
                yield Run(f"{EQUAL_ANSWERS}_seed{seed}", regime, EQUAL_ANSWERS, seed, draw, "answers")
        for replayed in compare.replay.regimes if compare.replay else ():
            length = replay_name(replayed)
            yield Run(f"{length}_seed{seed}", replayed, length, seed, draw, compare.budget, replay=True)
        for task in tasks.dedicated:
            for num_examples in compare.dedicated.num_examples:
                name = f"dedicated_{file_name(task.name)}_{num_examples}_seed{seed}"
                yield Run(
                    name, "dedicated", "dedicated", seed, draw, compare.budget, task=task, num_examples=num_examples
                )
        for variant in compare.variants if number == 0 else ():
            length = variant_name(variant)
            yield Run(f"{length}_seed{seed}", "all_answers", length, seed, draw, compare.budget, variant=variant)


def file_name(task: str) -> str:
    """Return the name of a task as a cell can have it; where it changes, a hash keeps it apart from others.

    Examples:
        >>> file_name("trec"), file_name("deutsch/englisch")
        ('trec', 'deutsch-englisch-6a5109fe')
    """
    readable = re.sub(r"[^A-Za-z0-9_.-]+", "-", task)[:60]
    return task if readable == task else f"{readable}-{hash_of(task)[:8]}"


def trial_tasks(trial: Trial, tasks: ComparisonTasks) -> RecipeTasks:
    """Return what a trial is trained on, and what it is scored on: training rows of validation tasks in either case."""
    if trial.task is None or trial.num_examples is None:
        return RecipeTasks(tasks.train, tasks.validation)
    # The draw of the first training seed.
    parts = (limited(trial.task, trial.num_examples, 0), remaining(trial.task, trial.num_examples, 0))
    return RecipeTasks(parts[:1], parts[1:])


def run_tasks(run: Run, settings: Comparison, tasks: ComparisonTasks) -> RecipeTasks:
    """Return what a model is trained on; the validation tasks chose its rate."""
    if run.task is not None and run.num_examples is not None:
        return RecipeTasks((limited(run.task, run.num_examples, run.draw),), ())
    share = settings.compare.variants[run.variant].task_share if run.variant else 1.0
    return RecipeTasks(share_of_tasks(tasks.train, share, settings.training.seed), tasks.validation)


def recipe_of_trial(trial: Trial, settings: Comparison, lengths: Mapping[str, Length], output: Path) -> Recipe:
    """Return the recipe of a trial."""
    length = lengths[trial.regime]
    is_dedicated = trial.regime == "dedicated"
    num_steps = length.num_steps if is_dedicated else length.num_trial_steps
    recipe = regime_recipe(
        settings,
        trial.regime,
        num_steps=num_steps,
        learning_rate=trial.learning_rate,
        seed=settings.training.seed,
        output=output,
    )
    return trial_recipe(recipe, trial.regime, settings, -(-num_steps // NUM_SCORES) if is_dedicated else None)


def recipe_of_run(
    run: Run,
    settings: Comparison,
    lengths: Mapping[str, Length],
    output: Path,
    learning_rate: float,
    num_steps: int | None = None,
) -> Recipe:
    """Return the recipe of a model.

    Args:
        run: The model.
        settings: The comparison.
        lengths: Length of each kind of training.
        output: Folder of the model.
        learning_rate: The chosen rate.
        num_steps: The chosen number of steps of a dedicated model; None for its whole budget.
    """
    assert run.length is not None
    length = lengths[run.length]
    return regime_recipe(
        settings,
        run.regime,
        num_steps=num_steps or length.num_steps,
        learning_rate=learning_rate,
        seed=run.seed,
        output=output,
        sequences_per_step=length.sequences_per_step,
        replay=run.replay,
        changes=settings.compare.variants[run.variant].set if run.variant else (),
    )


def measured_along(recipe: Recipe) -> Recipe:
    """Return the recipe of a model whose forgetting is measured a few times on its way, and after the last step."""
    every = -(-recipe.num_steps // NUM_MOMENTS)
    training = recipe.training.model_copy(update={"evaluate_every": every, "save_every": None})
    return recipe.model_copy(update={"training": training})


def evaluation_of(run: Run, settings: Comparison) -> EvaluationSettings:
    """Return how a model is evaluated: dedicated ones without demonstrations, others along the curve.

    All models answer the same queries. Training seeds differ in their demonstrations, too.
    """
    compare = settings.compare
    return EvaluationSettings(
        shots=(0,) if run.task is not None else settings.shots,
        num_seeds=compare.num_draws,
        num_queries=compare.num_queries,
        seed=settings.training.seed,
        first_draw=run.draw,
        num_orders=compare.num_orders,
    )


def evaluated_tasks(run: Run, tasks: ComparisonTasks) -> tuple[Task, ...]:
    """Return the tasks on which a model is evaluated; a dedicated one on its own alone."""
    return tasks.evaluated if run.task is None else (run.task,)


def settings_of_trial(trial: Trial, tasks: ComparisonTasks, recipe: Recipe) -> dict[str, Any]:
    """Return all that decides the score of a trial but the weights of the base, as JSON; what is hashed comes first."""
    of_trial = trial_tasks(trial, tasks)
    return {"train": _hash(of_trial.train), "validation": _hash(of_trial.held_out), "recipe": _without_place(recipe)}


def settings_of_run(run: Run, settings: Comparison, tasks: ComparisonTasks, recipe: Recipe | None) -> dict[str, Any]:
    """Return all that decides the record of a model but the weights of the base, as JSON; what is hashed comes first.

    Its rate follows from trials that are declared.

    Args:
        run: The model.
        settings: The comparison.
        tasks: Its tasks.
        recipe: Recipe of the model with any rate; None for the base.
    """
    evaluated = {
        "evaluated": _hash(evaluated_tasks(run, tasks)),
        "evaluation": evaluation_of(run, settings).model_dump(mode="json"),
        **(_besides(settings, tasks) if run.task is None else {}),
    }
    if recipe is None:
        model = settings.model_dump(mode="json", include={"model", "format"})
        return {**model, "max_context_tokens": settings.sequences.max_context_tokens, **evaluated}
    content = _without_place(recipe)
    content["training"]["learning_rate"] = list(settings.learning_rates)
    of_run = run_tasks(run, settings, tasks)
    return {"train": _hash(of_run.train), "validation": _hash(of_run.held_out), "recipe": content, **evaluated}


def _besides(settings: Comparison, tasks: ComparisonTasks) -> dict[str, Any]:
    """Return what is measured besides the tasks, as JSON; empty where nothing is."""
    forgetting = settings.compare.forgetting
    if forgetting is None:
        return {}
    content = forgetting.model_dump(mode="json", exclude={"text", "probes"})
    text = sha256_of_file(forgetting.text) if forgetting.text is not None else None
    return {"forgetting": {**content, "text": text, "probes": _hash(tasks.probes)}}


def _without_place(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe without the folder and the names of its tasks, which may move, and without what is free."""
    content = recipe.model_dump(mode="json", exclude={"output"})
    content["tasks"] = {"mixture": content["tasks"]["mixture"]}
    # Comparisons that began before the key was there go on.
    if not recipe.sequences.omit_instruction:
        del content["sequences"]["omit_instruction"]
    if recipe.sequences.replay is not None:
        content["sequences"]["replay"]["text"] = sha256_of_file(recipe.sequences.replay.text)
    for free in ("num_threads", "num_processes", "log_every", "save_every", "keep_checkpoints"):
        del content["training"][free]
    return content


def _hash(tasks: tuple[Task, ...]) -> str:
    return hash_of(*(text for task in tasks for text in (task.name, task.data_hash)))
