"""How the checks of tasks are printed: a table, details of a single task, or JSON; in tokens, or in characters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from manyicl.cli.tables import table_of
from manyicl.errors import pluralized

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from manyicl.episodes.checks import Lengths, TaskCheck
    from manyicl.tasks.task import Task

MOST_LABELS_SHOWN = 100
MOST_ROWS_NAMED = 20
_OF_TOKENS_ALONE = frozenset(
    {"labels_in_labels_as_tokens", "joined_share", "num_altered_answers", "num_examined", "shots_that_fit"}
)


def print_checks(
    checks: Sequence[TaskCheck],
    max_context_tokens: int | None,
    console: Console,
    trained_context_tokens: int | None = None,
) -> None:
    """Print checks as a table, the details of one that is alone, and what to look at.

    Args:
        checks: From `check_task`.
        max_context_tokens: Context into which shots must fit; None where no model was named.
        console: Where they are printed.
        trained_context_tokens: Context with which the model was fine-tuned; None if it was not.
    """
    console.print(_check_table(checks, max_context_tokens))
    if max_context_tokens and trained_context_tokens and max_context_tokens > trained_context_tokens:
        beyond = (
            f"The model was fine-tuned with up to {trained_context_tokens:,} tokens, and takes {max_context_tokens:,}"
        )
        console.print(f"{beyond}; --context {trained_context_tokens} counts the shots within the former.")
    if len(checks) == 1:
        _print_details(checks[0], console)
    for check in checks:
        for problem in check.problems:
            console.print(f"{check.name}: {problem}", style="yellow")
    num_with_problems = sum(bool(check.problems) for check in checks)
    console.print(f"{len(checks)} checked, {num_with_problems} with something to look at.")
    if max_context_tokens is None:
        console.print("Name a --model to count tokens, and the shots that fit in a context.")


def checks_as_json(checks: Iterable[TaskCheck], *, in_characters: bool) -> str:
    """Write checks as JSON."""
    values = map(_values_in_characters if in_characters else asdict, checks)
    return json.dumps(list(values), indent=2, ensure_ascii=False)


def without_model(check: TaskCheck, task: Task) -> TaskCheck:
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
    return table_of(rows, caption=caption)


def _print_details(check: TaskCheck, console: Console) -> None:
    """Print what does not fit in the table: balance of labels, shared beginnings, dropped rows."""
    from manyicl.printing import printable

    if check.labels:
        balance = [(printable(label.label), label.num_train, label.num_test) for label in check.labels]
        if others := balance[MOST_LABELS_SHOWN:]:
            sums = (sum(num_train for _, num_train, _ in others), sum(num_test for _, _, num_test in others))
            balance = [*balance[:MOST_LABELS_SHOWN], (f"{len(others):,} other labels", *sums)]
        rows = ({"label": name, "train": f"{a:,}", "test": f"{b:,}"} for name, a, b in balance)
        console.print(table_of(rows, title="Balance"))
    for kind, pairs in (("text", check.labels_in_labels), ("tokens", check.labels_in_labels_as_tokens)):
        if pairs:
            examples = "; ".join(f"{first!r} begins {second!r}" for first, second in pairs[:10])
            more = f"; and {len(pairs) - 10} more" if len(pairs) > 10 else ""
            console.print(f"As {kind}: {examples}{more}. The end of the answer keeps them apart.")
    for reason, count in check.dropped.items():
        origins = check.dropped_rows.get(reason, ())
        more = f" and {count - MOST_ROWS_NAMED:,} more" if count > MOST_ROWS_NAMED else ""
        where = f": {', '.join(map(printable, origins[:MOST_ROWS_NAMED]))}{more}" if origins else ""
        console.print(f"Dropped: {count:,} ({reason}){where}.")


def _spread(lengths: Lengths) -> str:
    return f"{lengths.shortest:,} / {lengths.median:,} / {lengths.longest:,}"
