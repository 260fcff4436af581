"""Report everything that can be known about a run without running it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache
from rich.console import Console

from manyicl.episodes.chat_template import describe
from manyicl.episodes.packed_sequence import PackedSequences
from manyicl.errors import UserError
from manyicl.model.load import load_tokenizer
from manyicl.model.reference import HUB_PREFIX, resolve_reference
from manyicl.training.estimate import (
    MOST_PARAMETERS_MEASURED,
    SECONDS_MEASURED,
    Cost,
    SequenceStatistics,
    estimated_cost,
    measured_cost,
    num_weights,
    remark_on_speed,
    sample_sequences,
)
from manyicl.training.process_choice import choose_processes
from manyicl.training.progress import preparing
from manyicl.training.recipe import Recipe
from manyicl.training.recipe_tasks import RecipeTasks, load_recipe_tasks
from manyicl.training.requirements import problems, remark_on_precision
from manyicl.training.run_folder import RunFolder, RunState
from manyicl.training.train import packed_sequences, prepare_run


def dry_run(
    recipe: Recipe, tasks: RecipeTasks | None = None, *, overwrite: bool = False, rehash: bool = False
) -> Iterator[str]:
    """Yield lines about a run: its size, its packed sequences, and what it will cost on this machine.

    A small model that is on this machine is run on the first tokens for some seconds. A large one, or one of the Hub,
    is estimated from its configuration; where not even that is available, the lines say what cannot be known. They also
    say so where the recipe asks for a library or a GPU that is not here: it is a run for another machine.

    Args:
        recipe: The run.
        tasks: Its tasks, if they are loaded already.
        overwrite: True if the run would replace another one in its output folder.
        rehash: Read all rows of the tasks, even of files whose sizes and times are as before.

    Raises:
        UserError: If recipe, tasks and model do not go together, or the output folder is taken by something else.
    """
    folder = RunFolder(recipe.output)
    if overwrite or folder.state() not in (RunState.STARTED, RunState.FINISHED):
        folder.require_free(recipe, overwrite=overwrite)
    missing = []
    for problem in problems(recipe, with_tasks=tasks is None):
        if problem.code == "missing_requirement":
            missing.append(str(problem))
        elif problem.code != "model_not_cached":
            raise problem
    console = Console(stderr=True)
    if tasks is None:
        with preparing(console, "reading tasks") as show:
            tasks = load_recipe_tasks(recipe, rehash=rehash, on_progress=show)
    num_rows = sum(len(task.train) for task in tasks.train)
    yield f"Tasks: {len(tasks.train)} to train on with {num_rows:,} rows, {len(tasks.held_out)} held out."
    yield (
        f"Run: {recipe.num_steps:,} steps of {recipe.training.sequences_per_step} sequences of at most "
        f"{recipe.sequences.max_context_tokens:,} tokens."
    )
    yield from (f"Not on this machine: {sentence}" for sentence in missing)
    num_processes = 1
    if not missing:
        choice = choose_processes(recipe)
        num_processes = choice.num_processes
        yield choice.sentence()
    if remark := remark_on_precision(recipe):
        yield remark
    if missing:
        recipe = _without_kernels(recipe)
    elif remark := remark_on_speed(recipe):
        yield remark
    base = recipe.model.base
    if base is not None and (missing or recipe.model.quantize is not None or _is_only_described(base)):
        yield from _from_description(recipe, base, tasks, num_processes, is_for_this_machine=not missing)
        return
    with preparing(console, "tokenizing tasks") as show:
        run = prepare_run(recipe, tasks, show)
    yield from _run_lines(recipe, run.statistics, run.sequences)
    if missing or num_weights(run.start.model)[0] > MOST_PARAMETERS_MEASURED:
        cost = estimated_cost(recipe, run.statistics, run.start.model.config)
    else:
        yield f"Timing forward and backward passes for about {SECONDS_MEASURED:.0f} seconds …"
        cost = measured_cost(recipe, run.start, run.sequences, run.statistics)
    yield from _cost_lines(cost, num_processes, is_for_this_machine=not missing)


def _is_only_described(base: str) -> bool:
    """Tell whether to look at a base's configuration and tokenizer only, and leave its weights alone."""
    if base.startswith(HUB_PREFIX):
        return True
    weights = Path(resolve_reference(base)).glob("*.safetensors")
    # Two bytes per weight at the least.
    return sum(file.stat().st_size for file in weights) > 4 * MOST_PARAMETERS_MEASURED


def _without_kernels(recipe: Recipe) -> Recipe:
    """Leave out what changes how a model is computed, not what it is; 4 bits stay, for they change its memory."""
    model = recipe.model.model_copy(update={"attention": "split"})
    training = recipe.training.model_copy(update={"liger": False})
    return recipe.model_copy(update={"model": model, "training": training})


def _from_description(
    recipe: Recipe, base: str, tasks: RecipeTasks, num_processes: int, *, is_for_this_machine: bool
) -> Iterator[str]:
    """Describe a run over a base whose weights are not looked at."""
    try:
        if base.startswith(HUB_PREFIX) and not _is_available(base.removeprefix(HUB_PREFIX)):
            raise UserError("hub_unreachable", "the Hub cannot be reached", remedy="Repeat this with a connection.")
        tokenizer = load_tokenizer(base)
    except UserError as error:
        most_tokens = recipe.num_sequences * recipe.sequences.max_context_tokens
        yield (
            f"Tokens: at most {most_tokens:,}. Answers, unused share, hours and memory cannot be known, because the "
            f"tokenizer of {base!r} is not on this machine and could not be fetched: {error}"
        )
        return
    sequences = packed_sequences(recipe, tasks.train, tokenizer)
    statistics = sample_sequences(sequences, recipe.objective)
    yield from _run_lines(recipe, statistics, sequences)
    try:
        cost = estimated_cost(recipe, statistics)
    except UserError as error:
        yield f"Hours and memory cannot be known, because the configuration of {base!r} is not available: {error}"
        return
    yield from _cost_lines(cost, num_processes, is_for_this_machine=is_for_this_machine)


def _is_available(repository: str) -> bool:
    """Tell whether a configuration is in the cache or the Hub answers; the library would try for a minute."""
    if isinstance(try_to_load_from_cache(repository, "config.json"), str) or any(getproxies().values()):
        return True
    host = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname or "", host.port or 443), timeout=5).close()
    except OSError:
        return False
    return not constants.HF_HUB_OFFLINE


def _run_lines(recipe: Recipe, statistics: SequenceStatistics, sequences: PackedSequences) -> Iterator[str]:
    yield statistics.sentence()
    yield from describe(sequences.encoder.format)
    yield (
        f"In all about {statistics.tokens * recipe.num_sequences:,.0f} tokens and "
        f"{statistics.answers * recipe.num_sequences:,.0f} supervised answers; up to {statistics.most_shots:,} shots "
        "before an answer in the sequences looked at."
    )


def _cost_lines(cost: Cost, num_processes: int, *, is_for_this_machine: bool) -> Iterator[str]:
    share = cost.num_trainable / cost.num_parameters
    yield f"Model: {cost.num_parameters:,} weights, {cost.num_trainable:,} of them trained ({share:.1%})."
    if not is_for_this_machine:
        memory = f"About {cost.memory_gib:.1f} GiB of memory, estimated from the configuration."
        yield f"{memory} Hours cannot be known on this machine."
        return
    time = f"{cost.hours:,.1f} hours" if cost.hours >= 2 else f"{cost.hours * 60:,.0f} minutes"
    if cost.hours < 0.05:
        time = f"{cost.hours * 3600:,.0f} seconds"
    memory = f"{cost.memory_gib:.1f} GiB of memory"
    if num_processes > 1:
        time, memory = f"{time} in one process", f"{memory} for each of {num_processes}"
    yield f"About {time} on this machine, evaluation aside, and {memory} ({cost.how})."
