"""Report everything that can be known about a run without running it."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache

from manyicl.activity import Activity
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
from manyicl.training.recipe import Recipe
from manyicl.training.recipe_tasks import RecipeTasks, load_recipe_tasks
from manyicl.training.requirements import problems, remark_on_precision
from manyicl.training.run_folder import RunFolder, RunState
from manyicl.training.train import packed_sequences, prepare_run

# What `as_json` tells of every run; lists collect sentences, and null is what could not be known.
FIELDS: Mapping[str, Any] = {
    "output": None,
    "num_training_tasks": None,
    "num_training_rows": None,
    "num_held_out_tasks": None,
    "num_steps": None,
    "sequences_per_step": None,
    "max_context_tokens": None,
    "num_processes": None,
    "tokens_per_sequence": None,
    "answers_per_sequence": None,
    "replayed_tokens_per_sequence": None,
    "replayed_loss_share": None,
    "unused_share": None,
    "most_shots": None,
    "num_tokens": None,
    "num_answers": None,
    "num_parameters": None,
    "num_trainable": None,
    "hours": None,
    "memory_gib": None,
    "measured_by": None,
    "missing": (),
    "remarks": (),
    "unknown": (),
}


class Finding(NamedTuple):
    """Something that is known of a run.

    Attributes:
        sentence: How it is said.
        values: The same as numbers and names, by the fields of `FIELDS`.
    """

    sentence: str
    values: Mapping[str, Any] = {}


def dry_run(
    recipe: Recipe,
    tasks: RecipeTasks | None = None,
    *,
    overwrite: bool = False,
    rehash: bool = False,
    activity: Activity | None = None,
) -> Iterator[str]:
    """Yield lines about a run: its size, its packed sequences, and what it will cost on this machine.

    Arguments and errors are those of `findings`.
    """
    for finding in findings(recipe, tasks, overwrite=overwrite, rehash=rehash, activity=activity):
        yield finding.sentence


def as_json(found: Iterable[Finding]) -> dict[str, Any]:
    """Put what is known of a run into one object with the keys of `FIELDS`."""
    known: dict[str, Any] = {name: list(value) if value == () else value for name, value in FIELDS.items()}
    for finding in found:
        for name, value in finding.values.items():
            if isinstance(known[name], list):
                known[name].append(value)
            else:
                known[name] = value
    return known


def findings(
    recipe: Recipe,
    tasks: RecipeTasks | None = None,
    *,
    overwrite: bool = False,
    rehash: bool = False,
    activity: Activity | None = None,
) -> Iterator[Finding]:
    """Find out what is known of a run without training: its size, its packed sequences, and what it will cost here.

    A small model that is on this machine is run on the first tokens for some seconds. A large one, or one of the Hub,
    is estimated from its configuration; where not even that is available, the lines say what cannot be known. They also
    say so where the recipe asks for a library or a GPU that is not here: it is a run for another machine.

    Args:
        recipe: The run.
        tasks: Its tasks, if they are loaded already.
        overwrite: True if the run would replace another one in its output folder.
        rehash: Read all rows of the tasks, even of files whose sizes and times are as before.
        activity: Shows what is done; None to show nothing.

    Raises:
        UserError: If recipe, tasks and model do not go together, or the output folder is taken by something else.
    """
    activity = activity or Activity()
    folder = RunFolder(recipe.output)
    if overwrite or folder.state() not in (RunState.STARTED, RunState.FINISHED):
        folder.require_free(recipe, overwrite=overwrite)
    missing = []
    for problem in problems(recipe, with_tasks=tasks is None):
        if problem.code == "missing_requirement":
            missing.append(str(problem))
        elif problem.code != "model_not_cached":
            raise problem
    if tasks is None:
        activity.begin("reading tasks")
        tasks = load_recipe_tasks(recipe, rehash=rehash, on_progress=activity.show)
    yield from _size(recipe, tasks)
    yield from (Finding(f"Not on this machine: {sentence}", {"missing": sentence}) for sentence in missing)
    num_processes = 1
    if not missing:
        choice = choose_processes(recipe)
        num_processes = choice.num_processes
        yield Finding(choice.sentence(), {"num_processes": num_processes})
    if remark := remark_on_precision(recipe):
        yield Finding(remark, {"remarks": remark})
    if missing:
        recipe = _without_kernels(recipe)
    else:
        activity.begin("timing matrix products")
        if remark := remark_on_speed(recipe):
            yield Finding(remark, {"remarks": remark})
    base = recipe.model.base
    if base is not None and (missing or recipe.model.quantize is not None or _is_only_described(base)):
        yield from _from_description(recipe, base, tasks, num_processes, activity, is_for_this_machine=not missing)
        return
    run = prepare_run(recipe, tasks, activity)
    yield from _what_sequences_hold(recipe, run.statistics, run.sequences)
    if missing or num_weights(run.start.model)[0] > MOST_PARAMETERS_MEASURED:
        cost = estimated_cost(recipe, run.statistics, run.start.model.config)
    else:
        yield Finding(f"Timing forward and backward passes for about {SECONDS_MEASURED:.0f} seconds …")
        activity.begin("timing forward and backward passes")
        cost = measured_cost(recipe, run.start, run.sequences, run.statistics)
    yield from _costs(cost, num_processes, is_for_this_machine=not missing)


def _size(recipe: Recipe, tasks: RecipeTasks) -> Iterator[Finding]:
    """Say how many tasks, rows and steps there are."""
    num_rows = sum(len(task.train) for task in tasks.train)
    yield Finding(
        f"Tasks: {len(tasks.train)} to train on with {num_rows:,} rows, {len(tasks.held_out)} held out.",
        {
            "num_training_tasks": len(tasks.train),
            "num_training_rows": num_rows,
            "num_held_out_tasks": len(tasks.held_out),
        },
    )
    yield Finding(
        f"Run: {recipe.num_steps:,} steps of {recipe.training.sequences_per_step} sequences of at most "
        f"{recipe.sequences.max_context_tokens:,} tokens.",
        {
            "output": str(recipe.output),
            "num_steps": recipe.num_steps,
            "sequences_per_step": recipe.training.sequences_per_step,
            "max_context_tokens": recipe.sequences.max_context_tokens,
        },
    )


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
    recipe: Recipe,
    base: str,
    tasks: RecipeTasks,
    num_processes: int,
    activity: Activity,
    *,
    is_for_this_machine: bool,
) -> Iterator[Finding]:
    """Describe a run over a base whose weights are not looked at."""
    activity.begin(f"loading the tokenizer of {base}")
    try:
        if base.startswith(HUB_PREFIX) and not _is_available(base.removeprefix(HUB_PREFIX)):
            raise UserError("hub_unreachable", "the Hub cannot be reached", remedy="Repeat this with a connection.")
        tokenizer = load_tokenizer(base)
    except UserError as error:
        most_tokens = recipe.num_sequences * recipe.sequences.max_context_tokens
        why = (
            f"Answers, unused share, hours and memory cannot be known, because the tokenizer of {base!r} is not on "
            f"this machine and could not be fetched: {error}"
        )
        yield Finding(f"Tokens: at most {most_tokens:,}. {why}", {"unknown": why})
        return
    sequences = packed_sequences(recipe, tasks.train, tokenizer, activity)
    statistics = sample_sequences(sequences, recipe.objective)
    yield from _what_sequences_hold(recipe, statistics, sequences)
    try:
        cost = estimated_cost(recipe, statistics)
    except UserError as error:
        why = f"Hours and memory cannot be known, because the configuration of {base!r} is not available: {error}"
        yield Finding(why, {"unknown": why})
        return
    yield from _costs(cost, num_processes, is_for_this_machine=is_for_this_machine)


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


def _what_sequences_hold(
    recipe: Recipe, statistics: SequenceStatistics, sequences: PackedSequences
) -> Iterator[Finding]:
    """Say what packed sequences hold, and what the run holds."""
    yield Finding(
        statistics.sentence(),
        {
            "tokens_per_sequence": statistics.tokens,
            "answers_per_sequence": statistics.answers,
            "replayed_tokens_per_sequence": statistics.replayed_tokens,
            "replayed_loss_share": statistics.replayed_loss_share,
            "unused_share": statistics.unused_share,
            "most_shots": statistics.most_shots,
        },
    )
    yield from map(Finding, describe(sequences.encoder.format))
    num_tokens, num_answers = statistics.tokens * recipe.num_sequences, statistics.answers * recipe.num_sequences
    yield Finding(
        f"In all about {num_tokens:,.0f} tokens and {num_answers:,.0f} supervised answers; up to "
        f"{statistics.most_shots:,} shots before an answer in the sequences looked at.",
        {"num_tokens": round(num_tokens), "num_answers": round(num_answers)},
    )


def _costs(cost: Cost, num_processes: int, *, is_for_this_machine: bool) -> Iterator[Finding]:
    """Say how large the model is, and what training it takes."""
    share = cost.num_trainable / cost.num_parameters
    yield Finding(
        f"Model: {cost.num_parameters:,} weights, {cost.num_trainable:,} of them trained ({share:.1%}).",
        {"num_parameters": cost.num_parameters, "num_trainable": cost.num_trainable},
    )
    if not is_for_this_machine:
        memory = f"About {cost.memory_gib:.1f} GiB of memory, estimated from the configuration."
        why = "Hours cannot be known on this machine."
        yield Finding(f"{memory} {why}", {"memory_gib": cost.memory_gib, "unknown": why})
        return
    time = f"{cost.hours:,.1f} hours" if cost.hours >= 2 else f"{cost.hours * 60:,.0f} minutes"
    if cost.hours < 0.05:
        time = f"{cost.hours * 3600:,.0f} seconds"
    memory = f"{cost.memory_gib:.1f} GiB of memory"
    if num_processes > 1:
        time, memory = f"{time} in one process", f"{memory} for each of {num_processes}"
    yield Finding(
        f"About {time} on this machine, evaluation aside, and {memory} ({cost.how}).",
        {"hours": cost.hours, "memory_gib": cost.memory_gib, "measured_by": cost.how},
    )
