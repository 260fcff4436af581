"""`manyicl compile`: prefill demonstrations once, save the result, and report how well the model predicts them."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyicl.activity import Activity
from manyicl.cli import options
from manyicl.engine.queries import can_blend, require_blendable
from manyicl.errors import UserError, pluralized, quoted
from manyicl.printing import new_console, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from manyicl.engine.engine import Engine
    from manyicl.engine.task_prefix import TaskPrefix
    from manyicl.tasks.task import Example, Query, Task

BAR_CHARACTERS = 20
# Rows that are retrieved for each query to see whether that would help, where the command does not say how many.
NUM_RETRIEVED = 4
MOST_LABELS_NAMED = 5


def compile_command(
    model: options.Model,
    task: Annotated[str, options.TASK_OPTION],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, such as `tickets.prefix`.")],
    shots: options.Shots = None,
    retrieve: Annotated[
        int,
        typer.Option(
            min=0,
            help="Keep the texts of the other training rows in the file, and room for so many of them in each query's "
            "context, for `predict --prefix F --retrieve N`.",
        ),
    ] = 0,
    blend: Annotated[
        bool,
        typer.Option(
            "--blend",
            help="Also fit the weights that `predict --blend` uses, which costs up to 64 short passes; without them in "
            "the file it fits them itself, each time.",
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the choice and order of demonstrations.")] = 0,
    update: Annotated[
        bool,
        typer.Option(
            "--update", help="Keep what OUTPUT holds of the task, and encode only what follows the first change."
        ),
    ] = False,
    data_root: options.DataRoot = None,
    max_context_tokens: options.MaxContextTokens = None,
    text_format: options.TextFormat = None,
    end_of_answer: options.EndOfAnswer = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Prefill a task's demonstrations once and save the result, so that `manyicl predict --prefix` starts at once.

    From the same pass it reports how well the model predicts each demonstration given those before it: whether the
    answer, chosen token by token among the labels (among all tokens, for free answers), is right. So it shows before
    the first query whether the task will work. In the channel form it reports none of this.

    It ends with what to do, as far as that was measured: whether a trivial baseline that learns from the same
    demonstrations is better or as good, and whether fewer or more shots would be. With labels, and where at least 16
    rows of the task are not among the demonstrations, up to 40 of them are answered twice to see whether retrieving
    similar rows for each query would help; `--update` does not do that.

    `--update` brings a compiled task up to date: demonstrations that are still rows of the task stay in their order,
    new rows come after them, as far as `--shots` allows, and only what follows the first change is encoded. Without
    such a file, or where it is of another model, everything is compiled. A file with a blend keeps one.

    The file contains the demonstrations in recoverable form, and with `--retrieve` the other training rows as text;
    anyone who has it can read them. It works only with the model it was made with.

    Examples:

        manyicl compile --model runs/one-model --task tasks/tickets --output tickets.prefix

        manyicl predict --model runs/one-model --prefix tickets.prefix --input new.csv --output answers.csv

        manyicl compile --model runs/one-model --task tasks/tickets --shots 64 --retrieve 4 --output tickets.prefix
    """
    from manyicl.engine.compiled_file import require_output
    from manyicl.tasks.files import load_task

    require_output(output)
    console = new_console(stderr=True, quiet=quiet)
    with Activity(console, quiet=quiet) as activity:
        activity.begin("reading the task")
        loaded_task = load_task(task, data_root)
        if blend:
            require_blendable(loaded_task)
        demonstrations = loaded_task.demonstrations(len(loaded_task.train) if shots is None else shots, seed)
        engine = options.load_engine(
            model, dtype, device, text_format, end_of_answer, max_context_tokens, activity=activity
        )
        earlier = _earlier(engine, output, retrieve, console) if update else None
        if earlier is not None:
            in_order = loaded_task.demonstrations(len(loaded_task.train), seed)
            demonstrations = kept_first(earlier.demonstrations, in_order)[: len(demonstrations)]
            if earlier.task.data_hash != loaded_task.data_hash:
                say_unused(loaded_task, demonstrations, console)
        activity.begin(f"reading {pluralized(len(demonstrations), 'demonstration')}")
        compiled = engine.compile(loaded_task, demonstrations, num_retrieved=retrieve, reuse=earlier)
        if blend or (earlier is not None and earlier.blend is not None and can_blend(loaded_task)):
            activity.begin("fitting a blend with a linear classifier")
            compiled = engine.with_blend(compiled)
        activity.begin(f"writing {output}")
        engine.save(compiled, output)
        sentences: list[str] = []
        if compiled.answers and (as_json or not quiet):
            activity.begin("comparing with trivial baselines, and with rows retrieved for each query")
            num_retrieved = 0 if update else retrieve or NUM_RETRIEVED
            sentences = advice_for(engine, compiled, loaded_task, num_retrieved=num_retrieved)
    if as_json:
        summary = _as_json(compiled, sentences, output, model, activity.seconds)
        typer.echo(json.dumps(summary, ensure_ascii=False, indent=2))
    elif not quiet:
        _print_compiled(engine, compiled, sentences, output, is_updated=earlier is not None)


def _print_compiled(
    engine: Engine, compiled: TaskPrefix, sentences: Sequence[str], output: Path, *, is_updated: bool
) -> None:
    """Print what was compiled, how well the model predicts it, and what to do."""
    from manyicl.cli.predict import describe

    out = new_console(highlight=False)
    if is_updated:
        num_encoded = compiled.num_tokens - compiled.num_reused_tokens
        out.print(f"{num_encoded:,} of {pluralized(compiled.num_tokens, 'token')} encoded; the others were kept")
    describe(out, engine, compiled)
    if compiled.answers:
        print_observed(compiled, out)
    elif engine.is_channel:
        sentence = "In the channel form demonstrations are not scored on the way; `manyicl evaluate` scores test rows."
        out.print(sentence, soft_wrap=True)
    for sentence in sentences:
        out.print(sentence, markup=False, soft_wrap=True)
    size = f"{output.stat().st_size / 2**20:,.1f} MiB"
    others = f", and {pluralized(len(compiled.rows), 'other row')} as text" if compiled.rows else ""
    typer.echo(f"{output}, {size}. It contains the demonstrations in recoverable form{others}.")


def _as_json(
    compiled: TaskPrefix, sentences: Sequence[str], output: Path, model: str, seconds: float
) -> dict[str, Any]:
    """Return the summary that ``--json`` prints."""
    return {
        "output": str(output),
        "num_bytes": output.stat().st_size,
        "model": model,
        "task": compiled.task.name,
        "num_shots": compiled.num_shots,
        "num_dropped": compiled.num_dropped,
        "num_tokens": compiled.num_tokens,
        "num_encoded_tokens": compiled.num_tokens - compiled.num_reused_tokens,
        "num_other_rows": len(compiled.rows),
        "observed": [asdict(one) for one in observed_groups(compiled)],
        "advice": list(sentences),
        "seconds": round(seconds, 3),
    }


@dataclass(frozen=True, slots=True)
class ObservedGroup:
    """How well the model predicted demonstrations with similarly many before them.

    Attributes:
        first_shots: Fewest demonstrations before one of the group.
        last_shots: Most demonstrations before one of the group.
        num_demonstrations: Demonstrations in the group.
        right: Share of them whose answer was right.
        standard_error: Standard error of that share; None for one demonstration.
        nats_per_answer: Mean negative log-probability of their answers.
    """

    first_shots: int
    last_shots: int
    num_demonstrations: int
    right: float
    standard_error: float | None
    nats_per_answer: float


def observed_groups(prefix: TaskPrefix) -> list[ObservedGroup]:
    """Group the demonstrations of a compiled task by the number of those before them."""
    from manyicl.engine.observed import groups_of_shots
    from manyicl.evaluation.uncertainty import mean_over_queries

    found = []
    for first, last, group in groups_of_shots(prefix.answers):
        right = mean_over_queries([float(one.is_right) for one in group])
        nats = -sum(one.log_probability for one in group) / len(group)
        found.append(ObservedGroup(first, last, len(group), right.mean, right.standard_error, nats))
    return found


def _earlier(engine: Engine, path: Path, num_retrieved: int, console: Console) -> TaskPrefix | None:
    """Load what is to be brought up to date; None, and a line that says why, where everything is to be compiled.

    Raises:
        UserError: If it holds rows to retrieve, and the update would not.
    """
    if not path.exists():
        return None
    try:
        earlier = engine.load(path)
    except UserError as error:
        say(console, f"Compiling everything: {error}")
        return None
    if earlier.rows and not num_retrieved:
        what, remedy = (
            "the compiled task holds rows to retrieve, and --update would lose them",
            "Give --retrieve again.",
        )
        raise UserError("rows_would_be_lost", what, remedy=remedy, file=path, field="--retrieve")
    return earlier


def kept_first(earlier: Sequence[Example], examples: Sequence[Example]) -> tuple[Example, ...]:
    """Order examples so that those of an earlier prefix come first, in its order, and new ones after them."""
    new: dict[tuple[Query, str], deque[Example]] = {}
    for example in examples:
        new.setdefault((example.query, example.answer), deque()).append(example)
    contents = [(example.query, example.answer) for example in earlier]
    kept = [new[content].popleft() for content in contents if new.get(content)]
    of_prefix = set(map(id, kept))  # examples may be equal
    return (*kept, *(example for example in examples if id(example) not in of_prefix))


def say_unused(task: Task, demonstrations: Sequence[Example], console: Console) -> None:
    """Say how many rows of a changed task are not among its demonstrations, and which labels have none there."""
    if not (num_unused := len(task.train) - len(demonstrations)):
        return
    with_demonstration = {example.answer for example in demonstrations}
    labels = [quoted(label) for label in task.labels or () if label not in with_demonstration]
    more = ["…"] if len(labels) > MOST_LABELS_NAMED else []
    without = f", and no row of {', '.join([*labels[:MOST_LABELS_NAMED], *more])} is" if labels else ""
    what = f"{num_unused:,} of {pluralized(len(task.train), 'row')} are not among the demonstrations{without}"
    remedy = "Raise --shots to add new rows, or drop --update to choose among all anew."
    say(console, f"The rows have changed, and earlier demonstrations come first: {what}. {remedy}")


def print_observed(prefix: TaskPrefix, console: Console) -> None:
    """Print how often the model was right on demonstrations, by the number of demonstrations before them."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("shots before", "demonstrations", "right", "", "nats per answer"):
        table.add_column(name, justify="left" if not name else "right")
    for one in observed_groups(prefix):
        error = f" ± {one.standard_error:.2f}" if one.standard_error is not None else ""
        bar = "█" * round(BAR_CHARACTERS * one.right)
        shots = f"{one.first_shots}" if one.first_shots == one.last_shots else f"{one.first_shots}–{one.last_shots}"
        table.add_row(shots, f"{one.num_demonstrations}", f"{one.right:.2f}{error}", bar, f"{one.nats_per_answer:.2f}")
    console.print(table)


def advice_for(engine: Engine, prefix: TaskPrefix, task: Task, *, num_retrieved: int) -> list[str]:
    """Measure what the advice needs besides the pass itself, and say what to do; 0 retrieved rows are not tried."""
    from manyicl.evaluation.advice import advice, first_compared
    from manyicl.evaluation.prequential import prequential_baselines
    from manyicl.evaluation.retrieval_gain import measure_retrieval

    baselines = prequential_baselines(task, prefix.demonstrations, first_compared(prefix.num_shots))
    return advice(
        [float(one.is_right) for one in prefix.answers],
        [-one.log_probability for one in prefix.answers],
        baselines.scores,
        measure_retrieval(engine, prefix, task, num_retrieved) if num_retrieved else None,
        baselines.notes,
    )
