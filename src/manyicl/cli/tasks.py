"""`manyicl tasks`: list tasks, check them with or without a tokenizer, and show an episode as a model sees it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from glob import glob
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyicl.cli.options import DataRoot, EndOfAnswer, TextFormat
from manyicl.errors import UserError, pluralized
from manyicl.tasks.nanoworld.rule import Split

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from manyicl.episodes.checks import Lengths, TaskCheck
    from manyicl.episodes.encoding import Encoder
    from manyicl.episodes.episode import EncodedEpisode
    from manyicl.episodes.text_format import FormatKind
    from manyicl.tasks.task import Task

Span = tuple[Iterable[str], bool]  # texts side by side, and whether they are supervised
DEFAULT_CONTEXT_TOKENS = 2048
WIDTH_WITHOUT_TERMINAL = 160
MOST_LABELS_SHOWN = 100
NOT_SUPERVISED = ("default", "default dim")
SUPERVISED = ("black on green", "black on bright_green")
_TEXT_HEADINGS = frozenset({"task", "family", "metric", "source", "Hub", "description", "label"})
_OF_TOKENS_ALONE = frozenset(
    {"labels_in_labels_as_tokens", "joined_share", "num_altered_answers", "num_examined", "shots_that_fit"}
)

app = typer.Typer(name="tasks", help="List, check and show tasks.", no_args_is_help=True)

TaskPatterns = Annotated[
    list[str],
    typer.Argument(
        metavar="TASK...",
        help="Task folders, task.yaml files, folders of task folders, globs, catalog:NAME, or a table with its "
        "columns, as in tickets.csv:text:label.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--tokenizer",
        help="Model whose tokenizer and format are used: folder, or hf:owner/name. Without it, nothing is counted in "
        "tokens.",
        show_default=False,
    ),
]


@app.command("list")
def list_tasks(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TASK...]",
            help="A family, name or pattern of the catalogue, such as nli or tweet_*; or task folders, task.yaml "
            "files, folders of task folders, globs and tables, which are loaded. [default: the whole catalogue]",
            show_default=False,
        ),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(help="Only catalogue entries whose name, family, description or Hub id contains this word."),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """List the catalogue or one of its families, without downloading; or load tasks and list labels, rows, source.

    Examples:

        manyicl tasks list

        manyicl tasks list nli

        manyicl tasks list --search sentiment

        manyicl tasks list tasks/

        manyicl tasks list recipes/real/train --data-root ~/data
    """
    from manyicl.tasks.files import load_tasks

    if not tasks or all(map(_is_of_catalog, tasks)):
        _list_catalog(tasks or ["catalog:"], search, data_root)
        return
    if search is not None:
        what, remedy = "--search looks through the catalogue", f"Leave out {tasks[0]!r}, or --search."
        raise UserError("conflicting_options", what, remedy=remedy, field="--search")
    _console().print(_table(map(_row_of_task, load_tasks(tasks, data_root))))


def _row_of_task(task: Task) -> dict[str, str]:
    return {
        "task": task.name,
        "family": task.family,
        "metric": task.metric,
        "labels": str(len(task.labels)) if task.labels else "per row" if task.choices_column else "free",
        "train": f"{len(task.train):,}",
        "test": f"{len(task.test):,}",
        "dropped": f"{sum(task.dropped.values()):,}",
        "source": task.source,
    }


def _table(rows: Iterable[dict[str, str]], **options: Any) -> Table:
    """Make a table of rows that all have the same headings; numbers are aligned to the right."""
    from rich.table import Table

    table = Table(**options)
    for row in rows:
        if not table.columns:
            for heading in row:
                is_text = heading in _TEXT_HEADINGS or heading.startswith("in ")
                table.add_column(heading, justify="left" if is_text else "right")
        table.add_row(*row.values())
    return table


def _is_of_catalog(pattern: str) -> bool:
    """Tell a name, a family or a pattern of the catalogue from what is on disk, which comes first."""
    if pattern.startswith("catalog:"):
        return True
    return re.fullmatch(r"[\w*?\[\]-]+", pattern) is not None and not glob(pattern)  # noqa: PTH207


def _list_catalog(patterns: Sequence[str], search: str | None, data_root: Path | None) -> None:
    """Print entries of the catalogue, as their task files describe them."""
    from manyicl.tasks.catalog import catalog_entries, search_catalog

    entries = list({entry.name: entry for pattern in patterns for entry in catalog_entries(pattern)}.values())
    if search is not None:
        entries = list(search_catalog(entries, search))
    rows = [
        {
            "task": entry.name,
            "family": entry.spec.family,
            "Hub": entry.hub,
            "train": f"{entry.data.num_train:,}",
            "test": f"{entry.data.num_test:,}",
            "description": entry.spec.description or "",
        }
        for entry in entries
    ]
    if data_root is not None:
        rows = [row | {f"in {data_root}": "yes" if (data_root / row["task"]).is_dir() else ""} for row in rows]
    console = _console()
    console.print(_table(rows))
    note = f"{len(entries)} tasks of the catalogue. Name one as catalog:{entries[0].name} wherever a task is named."
    console.print(note)


@app.command("check")
def check_tasks(
    tasks: TaskPatterns,
    data_root: DataRoot = None,
    model: Model = None,
    text_format: TextFormat = None,
    end_of_answer: EndOfAnswer = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Context in tokens into which shots must fit; by default that of fine-tuning, or the model's maximum.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check tasks: balance, lengths, repeats; with --model, labels that begin other labels, and shots that fit.

    Examples:

        manyicl tasks check tasks/banking77

        manyicl tasks check tickets.csv:text:label --context 8192 --model hf:HuggingFaceTB/SmolLM2-135M
    """
    from manyicl.episodes.checks import check_task
    from manyicl.tasks.files import load_tasks

    if model is None and context is not None:
        remedy = "Name the model that counts them with --model."
        raise UserError("no_effect", "--context is in tokens", remedy=remedy, field="--context")
    loaded = load_tasks(tasks, data_root)
    encoder, context_of_model = _encoder(model, text_format, end_of_answer, loaded)
    max_context_tokens = None if model is None else context or context_of_model or DEFAULT_CONTEXT_TOKENS
    checks = [check_task(task, encoder, max_context_tokens or sys.maxsize) for task in loaded]
    if model is None:
        checks = list(map(_without_model, checks, loaded))
    if as_json:
        values = map(asdict if model is not None else _values_in_characters, checks)
        typer.echo(json.dumps(list(values), indent=2, ensure_ascii=False))
        return
    console = _console()
    console.print(_check_table(checks, max_context_tokens))
    if len(checks) == 1:
        _print_details(checks[0], console)
    for check in checks:
        for problem in check.problems:
            console.print(f"{check.name}: {problem}", style="yellow")
    num_with_problems = sum(bool(check.problems) for check in checks)
    console.print(f"{len(checks)} checked, {num_with_problems} with something to look at.")
    if model is None:
        console.print("Name a --model to count tokens, and the shots that fit in a context.")


def character_encoder() -> Encoder:
    """Return an encoder of the plain format in which every character is a token: all that needs no tokenizer."""
    from manyicl.episodes.encoding import Encoder
    from manyicl.episodes.text_format import PlainFormat, Segment

    class Characters(Encoder):
        def __init__(self) -> None:
            self.bos_ids = ()
            self._use_format(PlainFormat())

        def _encode_segment(self, segment: Segment, opens_sequence: bool) -> tuple[int, ...]:
            return tuple(map(ord, segment.text))

        def decode(self, token_ids: Iterable[int]) -> str:
            return "".join(map(chr, token_ids))

        def require_no_end_inside(self, task: Task) -> None:
            """Only a model decides what ends an answer."""

        def _ends_early(self, answer: str) -> bool:
            return False

    return Characters()


def _without_model(check: TaskCheck, task: Task) -> TaskCheck:
    """Leave out what only tokens can show, and add what most models would refuse."""
    from manyicl.episodes.text_format import PlainFormat

    problems = list(check.problems)
    if num_cut := sum(PlainFormat().ends_early(example.answer) for example in (*task.train, *task.test)):
        end = "ends an answer unless the model was taught another end (format.end_of_answer)"
        problems.append(f"{pluralized(num_cut, 'answer')} with a blank line, which {end}.")
    return replace(check, problems=tuple(problems), labels_in_labels_as_tokens=())


def _values_in_characters(check: TaskCheck) -> dict[str, Any]:
    """Return the values of a check in characters, under names that say so, without those of tokens alone."""
    values = {name: value for name, value in asdict(check).items() if name not in _OF_TOKENS_ALONE}
    return {name.replace("_tokens", "_characters"): value for name, value in values.items()}


@app.command("nano")
def write_nano_tasks(
    folder: Annotated[Path, typer.Argument(help="Folder for the task folders.", show_default=False)],
    split: Annotated[Split, typer.Option(help="Which tasks.")] = "train",
    seed: Annotated[int, typer.Option(min=0, help="Seed of all rules and rows.")] = 0,
) -> None:
    """Write tasks of the nano world, whose hidden rules can be learned only from demonstrations.

    Examples:

        manyicl tasks nano runs/nano/tasks --split base

        manyicl tasks nano my-world --split unseen --seed 7
    """
    from manyicl.tasks.nanoworld.world import write_nano_world

    places = write_nano_world(folder, seed=seed, split=split)
    typer.echo(f"{len(places):,} tasks written to {folder}")


@app.command("starter")
def copy_starter_tables(
    folder: Annotated[Path, typer.Argument(help="Where the task folders go.", show_default=False)],
) -> None:
    """Copy three small tables to try things on: tickets and their team, messages and their urgency, product titles.

    Examples:

        manyicl tasks starter tables
    """
    from manyicl.tasks.starter_tables import write_starter_tables

    for place in write_starter_tables(folder):
        typer.echo(str(place))


@app.command("show")
def show_task(
    task: Annotated[
        str,
        typer.Argument(metavar="TASK", help="A task folder, catalog:NAME, or a table as in tickets.csv:text:label."),
    ],
    data_root: DataRoot = None,
    shots: Annotated[int, typer.Option(min=1, help="Examples in the episode.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice and order of examples.")] = 0,
    model: Model = None,
    text_format: TextFormat = None,
    end_of_answer: EndOfAnswer = None,
) -> None:
    """Show an episode as the model sees it; supervised text is coloured, or in «» without colour.

    With --model it is shown token by token.

    Examples:

        manyicl tasks show tasks/banking77

        manyicl tasks show tickets.csv:text:label --shots 8 --seed 1
    """
    from manyicl.episodes.episode import Episode
    from manyicl.tasks.files import load_task

    loaded = load_task(task, data_root)
    encoder, _ = _encoder(model, text_format, end_of_answer, [loaded])
    episode = Episode(loaded.name, loaded.instruction(), loaded.demonstrations(shots, seed, "random"))
    encoded = encoder.encode_episode(episode)
    console = _console()
    drawn = draw(spans_of(encoded, encoder, by_token=model is not None), console.color_system is None)
    console.print(drawn, soft_wrap=True)
    supervised = "supervised with the blank line that ends each; name a --model to see its tokens"
    if model is not None:
        num_supervised = sum(end - start for start, end in encoded.answer_spans)
        supervised = f"{num_supervised:,} of {len(encoded.token_ids):,} tokens supervised"
    note = f"{loaded.name}, seed {seed}: {shots} answers, {supervised}; ⏎ is a line break."
    console.print(note, style="dim")


def spans_of(episode: EncodedEpisode, encoder: Encoder, by_token: bool) -> Iterator[Span]:
    """Yield the texts of an episode, token by token or each span as one text, answers as supervised."""
    boundaries = [0, *chain(*episode.answer_spans), len(episode.token_ids)]
    for number, (start, end) in enumerate(pairwise(boundaries)):
        if token_ids := episode.token_ids[start:end]:
            is_answer = number % 2 == 1
            yield _token_texts(encoder, token_ids) if by_token else [encoder.decode(token_ids)], is_answer


def draw(spans: Iterable[Span], with_marks: bool) -> Text:
    """Draw texts in two alternating shades, their line breaks visible, what is supervised on a coloured ground.

    Args:
        spans: Texts side by side, and whether they are supervised.
        with_marks: Put what is supervised in «», for output without colour.
    """
    from rich.text import Text

    from manyicl.printing import printable

    drawn = Text()
    for texts, is_supervised in spans:
        drawn.append("«" if is_supervised and with_marks else "")
        for number, text in enumerate(texts):
            style = (SUPERVISED if is_supervised else NOT_SUPERVISED)[number % 2]
            *lines, rest = printable(text).split("\n")
            for line in lines:
                drawn.append(f"{line}⏎", style).append("\n")
            drawn.append(rest, style)
        drawn.append(("»\n" if with_marks else "\n") if is_supervised else "")
    return drawn


def _token_texts(encoder: Encoder, token_ids: Sequence[int]) -> Iterator[str]:
    """Yield the text of each token; tokens that are parts of one character come together."""
    pending: list[int] = []
    for position, token_id in enumerate(token_ids):
        pending.append(token_id)
        text = encoder.decode(pending)
        if "\ufffd" in text and position + 1 < len(token_ids):
            continue
        yield text
        pending = []


def _encoder(
    reference: str | None, kind: FormatKind | None, end_of_answer: str | None, tasks: Sequence[Task]
) -> tuple[Encoder, int | None]:
    """Load a model's tokenizer and format, and the context it was fine-tuned with, or else all its positions."""
    from manyicl.episodes.encoding import Encoder
    from manyicl.model.load import load_tokenizer, model_config, read_manifest, resolve_reference
    from manyicl.model.manifest import format_to_ask_in

    if reference is None:
        if (kind, end_of_answer) != (None, None):
            what, remedy = "--format and --end-of-answer belong to a model", "Name it with --model, or leave them out."
            raise UserError("no_effect", what, remedy=remedy, field="--format")
        return character_encoder(), None
    tokenizer = load_tokenizer(reference)
    manifest = read_manifest(resolve_reference(reference))
    encoder = Encoder(tokenizer, format_to_ask_in(tokenizer, manifest, kind, end_of_answer, tasks))
    for task in tasks:
        encoder.require_no_end_inside(task)
    if manifest is not None:
        return encoder, manifest.max_context_tokens
    return encoder, getattr(model_config(reference).get_text_config(), "max_position_embeddings", None)


def _console() -> Console:
    """Make a console of plain texts that does not squeeze tables into 80 columns where there is no terminal."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH_WITHOUT_TERMINAL)
    return console


def _check_table(checks: Iterable[TaskCheck], max_context_tokens: int | None) -> Table:
    """Make the table of checks; without a context they are in characters, and what needs tokens is omitted."""
    unit = "characters" if max_context_tokens is None else "tokens"
    caption = f"{unit}: shortest / median / longest, with separator and end."
    if max_context_tokens is not None:
        caption += " joined: examples whose segments equal the tokens of the joined text. shots: guaranteed to typical."
    rows = []
    for check in checks:
        row = {
            "task": check.name,
            "family": check.family,
            "train": f"{check.num_train:,}",
            "test": f"{check.num_test:,}",
            "labels": str(len(check.labels)) if check.labels else "-",
            "majority": f"{check.majority_share:.2f}" if check.majority_share is not None else "-",
            f"query {unit}": _spread(check.query_tokens),
            f"answer {unit}": _spread(check.answer_tokens),
            "repeated": str(check.num_repeated),
            "both sides": str(check.num_on_both_sides),
        }
        if max_context_tokens is not None:
            fit = check.shots_that_fit
            row["joined"] = f"{check.joined_share:.0%}"
            row[f"shots in {max_context_tokens:,}"] = f"{fit.guaranteed:,} to {fit.typical:,}"
        rows.append(row)
    return _table(rows, caption=caption)


def _print_details(check: TaskCheck, console: Console) -> None:
    """Print what does not fit in the table: balance of labels, shared beginnings, dropped rows."""
    from manyicl.printing import printable

    if check.labels:
        balance = [(printable(label.label), label.num_train, label.num_test) for label in check.labels]
        if others := balance[MOST_LABELS_SHOWN:]:
            sums = (sum(num_train for _, num_train, _ in others), sum(num_test for _, _, num_test in others))
            balance = [*balance[:MOST_LABELS_SHOWN], (f"{len(others):,} other labels", *sums)]
        rows = ({"label": name, "train": f"{a:,}", "test": f"{b:,}"} for name, a, b in balance)
        console.print(_table(rows, title="Balance"))
    for kind, pairs in (("text", check.labels_in_labels), ("tokens", check.labels_in_labels_as_tokens)):
        if pairs:
            examples = "; ".join(f"{first!r} begins {second!r}" for first, second in pairs[:10])
            more = f"; and {len(pairs) - 10} more" if len(pairs) > 10 else ""
            console.print(f"As {kind}: {examples}{more}. The end of the answer keeps them apart.")
    for reason, count in check.dropped.items():
        console.print(f"Dropped: {count:,} ({reason}).")


def _spread(lengths: Lengths) -> str:
    return f"{lengths.shortest:,} / {lengths.median:,} / {lengths.longest:,}"
