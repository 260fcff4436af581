"""``manyicl tasks``: list tasks, check them against a tokenizer, show an episode as a model sees it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from manyicl.episodes.checks import Lengths, TaskCheck
    from manyicl.episodes.encoding import Encoder
    from manyicl.episodes.episode import EncodedEpisode

DEFAULT_MODEL = "builtin:nano"
DEFAULT_CONTEXT_TOKENS = 2048
WIDTH_WITHOUT_TERMINAL = 160

app = typer.Typer(
    name="tasks",
    help="List, check and show tasks.",
    no_args_is_help=True,
)

TaskPatterns = Annotated[
    list[str],
    typer.Argument(
        metavar="TASK...",
        help="Task folders, task.yaml files, folders of task folders, globs, or a table with its columns, "
        "as in tickets.csv:text:label.",
        show_default=False,
    ),
]
OneTask = Annotated[str, typer.Argument(metavar="TASK", help="A task folder, or a table as in tickets.csv:text:label.")]
DataRoot = Annotated[
    Path | None, typer.Option(help="Where data paths begin that are not found beside their task.yaml.")
]
Model = Annotated[
    str,
    typer.Option("--model", "--tokenizer", help="Model whose tokenizer and format are used: folder, or hf:owner/name."),
]


@app.command(
    "list",
    epilog="Examples:\n\nmanyicl tasks list tasks/\n\nmanyicl tasks list recipes/real/train --data-root ~/data",
)
def list_tasks(tasks: TaskPatterns, data_root: DataRoot = None) -> None:
    """List tasks: family, metric, labels, rows, source."""
    from rich.table import Table

    from manyicl.tasks.files import load_tasks

    table = Table("task", "family", "metric")
    for heading in ("labels", "train", "test", "dropped"):
        table.add_column(heading, justify="right")
    table.add_column("source")
    for task in load_tasks(tasks, data_root):
        table.add_row(
            task.name,
            task.family,
            task.metric,
            str(len(task.labels)) if task.labels else "per row" if task.choices_column else "free",
            f"{len(task.train):,}",
            f"{len(task.test):,}",
            f"{sum(task.dropped.values()):,}",
            task.source,
        )
    _console().print(table)


@app.command(
    "check",
    epilog="Examples:\n\nmanyicl tasks check tasks/banking77\n\n"
    "manyicl tasks check tickets.csv:text:label --context 8192 --tokenizer hf:HuggingFaceTB/SmolLM2-135M",
)
def check_tasks(
    tasks: TaskPatterns,
    data_root: DataRoot = None,
    model: Model = DEFAULT_MODEL,
    context: Annotated[
        int | None,
        typer.Option(min=8, help="Context in tokens to fit shots in; by default what the model was trained with."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check tasks: balance, lengths in tokens, repeats, labels that begin one another, shots that fit."""
    from manyicl.episodes.checks import check_task
    from manyicl.tasks.files import load_tasks

    loaded = load_tasks(tasks, data_root)
    encoder, trained_context = _encoder(model)
    max_context_tokens = context or trained_context or DEFAULT_CONTEXT_TOKENS
    checks = [check_task(task, encoder, max_context_tokens) for task in loaded]
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2, ensure_ascii=False))
        return
    console = _console()
    console.print(_check_table(checks, max_context_tokens))
    if len(checks) == 1:
        _print_details(checks[0], console)
    for check in checks:
        for problem in check.problems:
            console.print(f"{check.name}: {problem}", style="yellow", markup=False, highlight=False)
    num_with_problems = sum(bool(check.problems) for check in checks)
    console.print(f"{len(checks)} checked, {num_with_problems} with something to look at.", highlight=False)


@app.command(
    "nano",
    epilog="Examples:\n\nmanyicl tasks nano runs/nano/tasks --split base\n\n"
    "manyicl tasks nano my-world --split unseen --seed 7",
)
def write_nano_tasks(
    folder: Annotated[Path, typer.Argument(help="Where the task folders go.", show_default=False)],
    split: Annotated[str, typer.Option(help="base, train or unseen.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Decides every rule and row.")] = 0,
) -> None:
    """Write tasks of the nano world, whose hidden rules only demonstrations reveal."""
    from manyicl.tasks.nanoworld.world import checked_split, write_nano_world

    places = write_nano_world(folder, seed=seed, split=checked_split(split))
    typer.echo(f"{len(places):,} tasks written to {folder}")


@app.command(
    "show",
    epilog="Examples:\n\nmanyicl tasks show tasks/banking77\n\n"
    "manyicl tasks show tickets.csv:text:label --shots 8 --seed 1",
)
def show_task(
    task: OneTask,
    data_root: DataRoot = None,
    shots: Annotated[int, typer.Option(min=1, help="Examples in the episode.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Which examples, in which order.")] = 0,
    model: Model = DEFAULT_MODEL,
) -> None:
    """Show an episode as the model sees it; supervised tokens are coloured, without colour they stand in «»."""
    from manyicl.episodes.episode import Episode
    from manyicl.tasks.files import load_task

    loaded = load_task(task, data_root)
    encoder, _ = _encoder(model)
    examples = loaded.demonstrations(shots, seed, "random")
    episode = encoder.encode_episode(Episode(loaded.name, loaded.instruction(), examples))
    console = _console()
    console.print(episode_text(episode, encoder, with_marks=console.color_system is None), soft_wrap=True)
    num_supervised = sum(end - start for start, end in episode.answer_spans)
    console.print(
        f"{loaded.name}, seed {seed}: {shots} answers, {num_supervised:,} of {len(episode.token_ids):,} tokens "
        "supervised; ⏎ is a line break.",
        style="dim",
        highlight=False,
    )


def episode_text(episode: EncodedEpisode, encoder: Encoder, with_marks: bool) -> Text:
    """Draw an episode token by token, what is supervised on a coloured ground, in alternating shades.

    Args:
        episode: To be drawn.
        encoder: Turns its tokens back into text.
        with_marks: Put supervised stretches in «», for output without colour.
    """
    from rich.text import Text

    drawn = Text()
    position = 0
    for start, end in episode.answer_spans:
        _draw_tokens(drawn, encoder, episode.token_ids[position:start], ("default", "default dim"))
        drawn.append("«" if with_marks else "")
        _draw_tokens(drawn, encoder, episode.token_ids[start:end], ("black on green", "black on bright_green"))
        drawn.append("»\n" if with_marks else "\n")
        position = end
    return drawn


def _draw_tokens(drawn: Text, encoder: Encoder, token_ids: Sequence[int], shades: tuple[str, str]) -> None:
    """Append tokens in two shades by turns; tokens that are parts of one character are drawn together."""
    pending: list[int] = []
    num_drawn = 0
    for position, token_id in enumerate(token_ids):
        pending.append(token_id)
        text = encoder.decode(pending)
        if "\ufffd" in text and position + 1 < len(token_ids):
            continue
        *lines, rest = text.split("\n")
        style = shades[num_drawn % 2]
        for line in lines:
            drawn.append(f"{line}⏎", style)
            drawn.append("\n")
        drawn.append(rest, style)
        num_drawn += 1
        pending = []


def _encoder(reference: str) -> tuple[Encoder, int | None]:
    """Load a model's tokenizer and format, and the context it was trained with if it says so."""
    from manyicl.episodes.encoding import Encoder
    from manyicl.model.load import load_tokenizer, resolve_reference
    from manyicl.model.manifest import Manifest

    tokenizer = load_tokenizer(reference)
    folder = Path(resolve_reference(reference))
    manifest = Manifest.read(folder) if folder.is_dir() else None
    if manifest is None:
        return Encoder(tokenizer), None
    return Encoder(tokenizer, manifest.text_format), manifest.max_context_tokens


def _console() -> Console:
    """Make a console that does not squeeze tables into 80 columns where there is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, WIDTH_WITHOUT_TERMINAL))


def _check_table(checks: Iterable[TaskCheck], max_context_tokens: int) -> Table:
    from rich.table import Table

    table = Table("task", "family")
    headings = ("train", "test", "labels", "majority", "query tokens", "answer tokens", "repeated", "both sides")
    for heading in (*headings, "joined", f"shots in {max_context_tokens:,}"):
        table.add_column(heading, justify="right")
    for check in checks:
        fit = check.shots_that_fit
        table.add_row(
            check.name,
            check.family,
            f"{check.num_train:,}",
            f"{check.num_test:,}",
            str(len(check.labels)) if check.labels else "-",
            f"{check.majority_share:.2f}" if check.majority_share is not None else "-",
            _spread(check.query_tokens),
            _spread(check.answer_tokens),
            str(check.num_repeated),
            str(check.num_on_both_sides),
            f"{check.joined_share:.0%}",
            f"{fit.guaranteed:,} to {fit.typical:,}",
        )
    table.caption = (
        "tokens: shortest / median / longest. joined: examples whose pieces equal the tokens of the joined text. "
        "shots: guaranteed to typical."
    )
    return table


def _print_details(check: TaskCheck, console: Console) -> None:
    """Print what the table has no room for: balance of labels, beginnings, dropped rows."""
    from rich.table import Table

    if check.labels:
        balance = Table("label", title="Balance")
        for heading in ("train", "test"):
            balance.add_column(heading, justify="right")
        for label in check.labels:
            balance.add_row(label.label, f"{label.num_train:,}", f"{label.num_test:,}")
        console.print(balance)
    for kind, pairs in (
        ("text", check.labels_in_labels),
        ("tokens", check.labels_in_labels_as_tokens),
    ):
        if pairs:
            shown = "; ".join(f"{first!r} begins {second!r}" for first, second in pairs[:10])
            more = f"; and {len(pairs) - 10} more" if len(pairs) > 10 else ""
            console.print(f"As {kind}: {shown}{more}. The terminator keeps them apart.", markup=False)
    for reason, count in check.dropped.items():
        console.print(f"Dropped: {count:,} ({reason}).", markup=False)


def _spread(lengths: Lengths) -> str:
    return f"{lengths.shortest:,} / {lengths.median:,} / {lengths.longest:,}"
