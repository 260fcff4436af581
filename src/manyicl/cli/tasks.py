"""``manyicl tasks``: list tasks, check them with or without a tokenizer, show an episode as a model sees it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyicl.cli.options import EndOfAnswer, TextFormat
from manyicl.errors import UserError, counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from manyicl.episodes.checks import Lengths, TaskCheck
    from manyicl.episodes.encoding import Encoder
    from manyicl.episodes.episode import EncodedEpisode, Episode
    from manyicl.episodes.text_format import FormatKind, PlainFormat
    from manyicl.tasks.task import Task

DEFAULT_CONTEXT_TOKENS = 2048
WIDTH_WITHOUT_TERMINAL = 160
MOST_LABELS_SHOWN = 100
ASKED = ("default", "default dim")
SUPERVISED = ("black on green", "black on bright_green")
NO_MODEL_TO_FORMAT = "--format and --end-of-answer belong to a model; name it with --model, or leave them out."
_OF_TOKENS_ALONE = (
    "labels_in_labels_as_tokens",
    "joined_share",
    "num_altered_answers",
    "num_examined",
    "shots_that_fit",
)

app = typer.Typer(
    name="tasks",
    help="List, check and show tasks.",
    no_args_is_help=True,
)

TaskPatterns = Annotated[
    list[str],
    typer.Argument(
        metavar="TASK...",
        help="Task folders, task.yaml files, folders of task folders, globs, catalog:NAME, or a table with its "
        "columns, as in tickets.csv:text:label.",
        show_default=False,
    ),
]
ListedPatterns = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TASK...]",
        help="A family, name or pattern of the catalogue, such as nli or tweet_*; or task folders, task.yaml files, "
        "folders of task folders, globs and tables, which are loaded. [default: the whole catalogue]",
        show_default=False,
    ),
]
OneTask = Annotated[
    str, typer.Argument(metavar="TASK", help="A task folder, catalog:NAME, or a table as in tickets.csv:text:label.")
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        help="Where data paths begin that are not found beside their task.yaml, and where copies of Hub datasets "
        "stand, as NAME/train.jsonl."
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "--tokenizer",
        help="Model whose tokenizer and format are used: folder, or hf:owner/name. Without one, nothing is counted in "
        "tokens.",
        show_default=False,
    ),
]


@app.command(
    "list",
    epilog="Examples:\n\nmanyicl tasks list\n\nmanyicl tasks list nli\n\nmanyicl tasks list --search sentiment\n\n"
    "manyicl tasks list tasks/\n\nmanyicl tasks list recipes/real/train --data-root ~/data",
)
def list_tasks(
    tasks: ListedPatterns = None,
    search: Annotated[
        str | None,
        typer.Option(help="Of the catalogue, those whose name, family, description or Hub id hold this word."),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """List the catalogue, or a family of it, without downloading; or load tasks and list labels, rows, source."""
    from rich.table import Table

    from manyicl.tasks.files import load_tasks

    if not tasks or all(map(_is_of_catalog, tasks)):
        _list_catalog(tasks or ["catalog:"], search, data_root)
        return
    if search is not None:
        raise UserError(f"--search looks through the catalogue; leave out {tasks[0]!r}, or --search.")
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


def _is_of_catalog(pattern: str) -> bool:
    """Tell a name, a family or a pattern of the catalogue from what stands on disk, which comes first."""
    from glob import glob

    if pattern.startswith("catalog:"):
        return True
    return all(letter.isalnum() or letter in "_*?[]-" for letter in pattern) and not glob(pattern)  # noqa: PTH207


def _list_catalog(patterns: Sequence[str], search: str | None, data_root: Path | None) -> None:
    """Print entries of the catalogue, as their task files describe them."""
    from rich.table import Table

    from manyicl.tasks.catalog import catalog_entries, search_catalog

    entries = list({entry.name: entry for pattern in patterns for entry in catalog_entries(pattern)}.values())
    if search is not None:
        entries = list(search_catalog(entries, search))
    table = Table("task", "family", "Hub")
    for heading in ("train", "test"):
        table.add_column(heading, justify="right")
    table.add_column("description")
    if data_root is not None:
        table.add_column(f"in {data_root}")
    for entry in entries:
        cells = [entry.name, entry.spec.family, entry.hub, _size(entry.data.num_train), _size(entry.data.num_test)]
        cells.append(entry.spec.description or "")
        if data_root is not None:
            cells.append("yes" if (data_root / entry.name).is_dir() else "")
        table.add_row(*cells)
    console = _console()
    console.print(table)
    console.print(
        f"{len(entries)} tasks of the catalogue. Name one as catalog:{entries[0].name} wherever a task is named.",
        markup=False,
        highlight=False,
    )


def _size(num_rows: int | None) -> str:
    return f"{num_rows:,}" if num_rows is not None else "–"


@app.command(
    "check",
    epilog="Examples:\n\nmanyicl tasks check tasks/banking77\n\n"
    "manyicl tasks check tickets.csv:text:label --context 8192 --model hf:HuggingFaceTB/SmolLM2-135M",
)
def check_tasks(
    tasks: TaskPatterns,
    data_root: DataRoot = None,
    model: Model = None,
    text_format: TextFormat = None,
    end_of_answer: EndOfAnswer = None,
    context: Annotated[
        int | None,
        typer.Option(min=8, help="Context in tokens to fit shots in; by default what the model was trained with."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Check tasks: balance, lengths, repeats; with --model, labels that begin one another, shots that fit."""
    from manyicl.tasks.files import load_tasks

    if model is None and context is not None:
        raise UserError("--context is in tokens; name the model that counts them with --model.")
    if model is None and (text_format, end_of_answer) != (None, None):
        raise UserError(NO_MODEL_TO_FORMAT)
    loaded = load_tasks(tasks, data_root)
    if model is None:
        checks = [_check_in_characters(task) for task in loaded]
        max_context_tokens = None
    else:
        from manyicl.episodes.checks import check_task

        encoder, trained_context = _encoder(model, text_format, end_of_answer, loaded)
        max_context_tokens = context or trained_context or DEFAULT_CONTEXT_TOKENS
        checks = [check_task(task, encoder, max_context_tokens) for task in loaded]
    if as_json:
        values = [asdict(check) if model is not None else _values_in_characters(check) for check in checks]
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    console = _console()
    console.print(_check_table(checks, max_context_tokens))
    if len(checks) == 1:
        _print_details(checks[0], console, in_tokens=model is not None)
    for check in checks:
        for problem in check.problems:
            console.print(f"{check.name}: {problem}", style="yellow", markup=False, highlight=False)
    num_with_problems = sum(bool(check.problems) for check in checks)
    console.print(f"{len(checks)} checked, {num_with_problems} with something to look at.", highlight=False)
    if model is None:
        console.print("Name a --model to count tokens, and the shots that fit in a context.", highlight=False)


def _check_in_characters(task: Task) -> TaskCheck:
    """Check a task as if every character were a token and no context too short: all that needs no tokenizer."""
    from manyicl.episodes.checks import check_task
    from manyicl.episodes.encoding import Encoder
    from manyicl.episodes.text_format import PlainFormat, Segment

    class Characters(Encoder):
        """Every character is a token, its number the character's own."""

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

    check = check_task(task, Characters(), sys.maxsize)
    num_cut = sum(PlainFormat().ends_early(example.answer) for example in (*task.train, *task.test))
    if not num_cut:
        return check
    problem = (
        f"{counted(num_cut, 'answer')} with a blank line, which ends an answer unless the model was taught another end "
        "(format.end_of_answer)."
    )
    return replace(check, problems=(*check.problems, problem))


def _values_in_characters(check: TaskCheck) -> dict[str, Any]:
    """Return the values of a check in characters, under names that say so, without those of tokens alone."""
    values = {name: value for name, value in asdict(check).items() if name not in _OF_TOKENS_ALONE}
    return {name.replace("_tokens", "_characters"): value for name, value in values.items()}


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
    model: Model = None,
    text_format: TextFormat = None,
    end_of_answer: EndOfAnswer = None,
) -> None:
    """Show an episode as the model sees it; what is supervised is coloured, without colour it stands in «».

    With --model it is drawn token by token.
    """
    from manyicl.episodes.episode import Episode
    from manyicl.episodes.text_format import PlainFormat
    from manyicl.tasks.files import load_task

    if model is None and (text_format, end_of_answer) != (None, None):
        raise UserError(NO_MODEL_TO_FORMAT)
    loaded = load_task(task, data_root)
    episode = Episode(loaded.name, loaded.instruction(), loaded.demonstrations(shots, seed, "random"))
    console = _console()
    with_marks = console.color_system is None
    if model is None:
        drawn = draw_segments(episode, PlainFormat(), with_marks)
        supervised = "supervised with the blank line that ends each; name a --model to see its tokens"
    else:
        encoder, _ = _encoder(model, text_format, end_of_answer, [loaded])
        encoded = encoder.encode_episode(episode)
        drawn = draw_tokens(encoded, encoder, with_marks)
        num_supervised = sum(end - start for start, end in encoded.answer_spans)
        supervised = f"{num_supervised:,} of {len(encoded.token_ids):,} tokens supervised"
    console.print(drawn, soft_wrap=True)
    console.print(
        f"{loaded.name}, seed {seed}: {shots} answers, {supervised}; ⏎ is a line break.",
        style="dim",
        markup=False,
        highlight=False,
    )


def draw_segments(episode: Episode, text_format: PlainFormat, with_marks: bool) -> Text:
    """Draw an episode segment by segment, answers on a coloured ground.

    Args:
        episode: To be drawn.
        text_format: Where its segments meet.
        with_marks: Put supervised segments in «», for output without colour.
    """
    from rich.text import Text

    from manyicl.episodes.text_format import text_of

    drawn = Text()
    _draw(drawn, [text_of(text_format.preamble(episode.instruction))], ASKED)
    for example in episode.examples:
        _draw(drawn, [text_of(text_format.query(example.query.text))], ASKED)
        _draw_supervised(drawn, [text_of(text_format.answer(example.answer))], with_marks)
    return drawn


def draw_tokens(episode: EncodedEpisode, encoder: Encoder, with_marks: bool) -> Text:
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
        _draw(drawn, _token_texts(encoder, episode.token_ids[position:start]), ASKED)
        _draw_supervised(drawn, _token_texts(encoder, episode.token_ids[start:end]), with_marks)
        position = end
    _draw(drawn, _token_texts(encoder, episode.token_ids[position:]), ASKED)
    return drawn


def _draw_supervised(drawn: Text, texts: Iterable[str], with_marks: bool) -> None:
    drawn.append("«" if with_marks else "")
    _draw(drawn, texts, SUPERVISED)
    drawn.append("»\n" if with_marks else "\n")


def _draw(drawn: Text, texts: Iterable[str], shades: tuple[str, str]) -> None:
    """Append texts in two shades by turns, their line breaks visible."""
    from manyicl.printing import printable

    for number, text in enumerate(texts):
        *lines, rest = printable(text).split("\n")
        style = shades[number % 2]
        for line in lines:
            drawn.append(f"{line}⏎", style)
            drawn.append("\n")
        drawn.append(rest, style)


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
    reference: str, kind: FormatKind | None, end_of_answer: str | None, tasks: Sequence[Task]
) -> tuple[Encoder, int | None]:
    """Load a model's tokenizer and format, and the context it was trained with if it says so."""
    from manyicl.episodes.encoding import Encoder
    from manyicl.model.load import load_tokenizer, resolve_reference
    from manyicl.model.manifest import Manifest, format_to_ask_in

    tokenizer = load_tokenizer(reference)
    folder = Path(resolve_reference(reference))
    manifest = Manifest.read(folder) if folder.is_dir() else None
    encoder = Encoder(tokenizer, format_to_ask_in(tokenizer, manifest, kind, end_of_answer, tasks))
    for task in tasks:
        encoder.require_no_end_inside(task)
    return encoder, manifest.max_context_tokens if manifest else None


def _console() -> Console:
    """Make a console that does not squeeze tables into 80 columns where there is no terminal."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, WIDTH_WITHOUT_TERMINAL))


def _check_table(checks: Iterable[TaskCheck], max_context_tokens: int | None) -> Table:
    """Make the table of checks; without a context they are in characters, and what needs tokens is left out."""
    from rich.table import Table

    unit = "characters" if max_context_tokens is None else "tokens"
    table = Table("task", "family")
    headings = ["train", "test", "labels", "majority", f"query {unit}", f"answer {unit}", "repeated", "both sides"]
    if max_context_tokens is not None:
        headings += ["joined", f"shots in {max_context_tokens:,}"]
    for heading in headings:
        table.add_column(heading, justify="right")
    for check in checks:
        values = [
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
        ]
        if max_context_tokens is not None:
            fit = check.shots_that_fit
            values += [f"{check.joined_share:.0%}", f"{fit.guaranteed:,} to {fit.typical:,}"]
        table.add_row(*values)
    table.caption = f"{unit}: shortest / median / longest, with separator and end."
    if max_context_tokens is not None:
        table.caption += (
            " joined: examples whose segments equal the tokens of the joined text. shots: guaranteed to typical."
        )
    return table


def _print_details(check: TaskCheck, console: Console, in_tokens: bool) -> None:
    """Print what the table has no room for: balance of labels, beginnings, dropped rows."""
    from rich.table import Table
    from rich.text import Text

    from manyicl.printing import printable

    if check.labels:
        balance = Table("label", title="Balance")
        for heading in ("train", "test"):
            balance.add_column(heading, justify="right")
        for label in check.labels[:MOST_LABELS_SHOWN]:
            balance.add_row(Text(printable(label.label)), f"{label.num_train:,}", f"{label.num_test:,}")
        if others := check.labels[MOST_LABELS_SHOWN:]:
            sums = (sum(label.num_train for label in others), sum(label.num_test for label in others))
            balance.add_row(f"{len(others):,} other labels", *(f"{number:,}" for number in sums), style="dim")
        console.print(balance)
    kinds = {"text": check.labels_in_labels, "tokens": check.labels_in_labels_as_tokens if in_tokens else ()}
    for kind, pairs in kinds.items():
        if pairs:
            shown = "; ".join(f"{first!r} begins {second!r}" for first, second in pairs[:10])
            more = f"; and {len(pairs) - 10} more" if len(pairs) > 10 else ""
            console.print(f"As {kind}: {shown}{more}. The end of the answer keeps them apart.", markup=False)
    for reason, count in check.dropped.items():
        console.print(f"Dropped: {count:,} ({reason}).", markup=False)


def _spread(lengths: Lengths) -> str:
    return f"{lengths.shortest:,} / {lengths.median:,} / {lengths.longest:,}"
