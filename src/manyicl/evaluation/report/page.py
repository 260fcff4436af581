"""Records -> one self-contained HTML page that opens without a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import regex  # type: ignore[import-untyped]
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from manyicl.atomic import write_atomically
from manyicl.errors import counted
from manyicl.evaluation.report.lines import notes, sections
from manyicl.evaluation.report.plots import TFIDF_COLOUR, family_title, inline_panel, model_colours
from manyicl.evaluation.result import (
    ContextExample,
    PredictedAnswer,
    Result,
    ResultStore,
)
from manyicl.evaluation.summary import OVERALL, Summary, summarise
from manyicl.evaluation.uncertainty import Estimate
from manyicl.outputs import require_output_file

# A worked prediction should be read whole: few demonstrations, and the first queries rather than chosen ones.
WORKED_SHOTS = 8
WORKED_QUERIES = 2
MAX_SHOWN_CHARACTERS = 700
# How a page of ours is recognised: its generator, or in older pages the end of its title.
PAGE_MARKS = (b'<meta name="generator" content="manyicl">', " · manyicl</title>".encode())


def write_report(
    results: str | Path | Sequence[Result],
    output: str | Path,
    *,
    only: Sequence[Result] | None = None,
    title: str = "Shot curves",
    lead: str | None = None,
    examples: bool = True,
) -> Path:
    """Write one HTML page from records alone.

    Args:
        results: A folder of results, or records; worked predictions need the folder.
        output: Path of the page.
        only: Records to show, where a folder holds those of other runs too; None for all.
        title: Head of the page.
        lead: A sentence below it; None for one that counts models, tasks and results.
        examples: Whether worked predictions, and with them texts of the tasks, may appear in it.

    Returns:
        The path of the page.

    Raises:
        UserError: If there is no record, one is broken, or the page cannot be written there.
    """
    output = Path(output)
    require_output_file(output, is_ours=is_report, with_parents=True)
    store = None
    if isinstance(results, str | Path):
        store = ResultStore(results)
        results = store.load()
    summary = summarise(results if only is None else only)
    page = _template().render(
        title=title,
        lead=lead or _lead(summary),
        summary=summary,
        OVERALL=OVERALL,
        findings=_findings(summary),
        colours=model_colours(summary),
        tfidf_colour=TFIDF_COLOUR,
        sections=sections(summary),
        panel=lambda section, wide=False: Markup(inline_panel(summary, section, wide=wide)),
        worked=worked_tasks(summary, store) if store is not None and examples else [],
        notes=notes(summary),
        models=_models(summary),
        # One record of each task knows its metric, source, hash, labels and counts.
        task_facts={task: next(r for r in summary.records if r.task == task) for task in summary.families},
        seen_in_training=_seen_in_training(summary),
        versions=_versions(summary.records),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, page)
    return output


def is_report(path: Path) -> bool:
    """Tell whether a file is a page that `write_report` wrote."""
    content = path.read_bytes() if path.is_file() else b""
    return any(mark in content for mark in PAGE_MARKS)


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["score"] = _score
    environment.filters["signed"] = _signed
    environment.filters["family"] = family_title
    environment.filters["shortened"] = _shortened
    source = files("manyicl.evaluation.report").joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(source)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def _shortened(text: str, limit: int = MAX_SHOWN_CHARACTERS) -> str:
    """Cut a long text for display, never within what a reader sees as one character, and say how much is hidden."""
    if len(text) <= limit:
        return _in_html(text)
    ends = (cluster.end() for cluster in regex.finditer(r"\X", text[: limit + 100]))
    kept = max((end for end in ends if end <= limit), default=limit)
    return f"{_in_html(text[:kept])} … ({len(text) - kept:,} more characters)"


def _in_html(text: str) -> str:
    """Show control characters, which no HTML may hold, as the pictures that Unicode has of them."""
    return text.translate(_CONTROL_PICTURES)


# All below a space but tab and line feed, and delete.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (0x09, 0x0A)} | {0x7F: 0x2421}


def _lead(summary: Summary) -> str:
    seen = {record.seen_in_training for record in summary.records}
    unseen = " that fine-tuning never used" if False in seen and True not in seen else ""
    num_families = len(summary.groups)
    return (
        f"{counted(len(summary.models), 'model')} on {counted(len(summary.compared), 'task')} of {num_families} "
        f"{'family' if num_families == 1 else 'families'}{unseen}, with {summary.shots[0]} to {summary.shots[-1]} "
        "demonstrations in the context."
    )


@dataclass(frozen=True, slots=True)
class Finding:
    """One number worth reading first."""

    value: str
    label: str
    detail: str
    colour: str | None = None


def _findings(summary: Summary) -> list[Finding]:
    """Take the mean of each model at its most shots, and its difference from the first model."""
    findings = []
    colours = model_colours(summary)
    for model in summary.models:
        shots = summary.shots_of(model)
        first, last = summary.score(model, OVERALL, shots[0]), summary.score(model, OVERALL, shots[-1])
        if first is None or last is None:
            continue
        detail = f"{_interval(last)}; {_score(first.mean)} at {counted(shots[0], 'shot')}"
        other_tasks = summary.score_over_tasks(model, shots[-1])
        if other_tasks is not None:
            detail += f"; {_interval(other_tasks)} had other tasks of these families been chosen"
        findings.append(Finding(_score(last.mean), f"{model}, {counted(shots[-1], 'shot')}", detail, colours[model]))
    base, *others = summary.models
    for model in others:
        measured = [(shots, summary.difference(base, model, OVERALL, shots)) for shots in summary.shots]
        differences = [(shots, difference) for shots, difference in measured if difference is not None]
        if differences:
            most, difference = differences[-1]
            label = f"{model} over {base}, {counted(most, 'shot')}"
            findings.append(Finding(_signed(difference.mean), label, _compared(difference)))
    return findings


def _compared(difference: Estimate) -> str:
    """Say how a difference was measured, and whether its interval excludes 0."""
    is_paired = difference.pairing == "paired"
    measured = "paired over the same queries" if is_paired else "not paired: other queries, seeds or number of them"
    if difference.interval is None:
        return f"{measured}, too few queries for an interval"
    low, high = difference.interval
    verdict = "excludes" if low > 0 or high < 0 else "includes"
    return f"{measured}, {_interval(difference, _signed)}: the interval {verdict} 0"


def _interval(estimate: Estimate, write: Callable[[float], str] = _score) -> str:
    if estimate.interval is None:
        return "too few queries for an interval"
    low, high = estimate.interval
    return f"95% interval {write(low)} to {write(high)}"


@dataclass(frozen=True, slots=True)
class WorkedTask:
    """Demonstrations as they are in the context, and what each model answered to the first queries after them."""

    result: Result
    context: list[ContextExample]
    answers: dict[str, list[PredictedAnswer]]


def worked_tasks(summary: Summary, store: ResultStore) -> list[WorkedTask]:
    """Show one task of each family, the first by name, with its first test queries: nothing is hand-picked."""
    first_of_family: dict[str, str] = {}
    for task in summary.compared or tuple(summary.families):
        first_of_family.setdefault(summary.families[task], task)
    worked = (_worked_task(summary, store, task) for task in first_of_family.values())
    return [one for one in worked if one is not None]


def _worked_task(summary: Summary, store: ResultStore, task: str) -> WorkedTask | None:
    measured = [s for s in summary.shots if any((model, task, s) in summary.tasks for model in summary.models)]
    shots = max((s for s in measured if s <= WORKED_SHOTS), default=measured[0])
    results = {model: found[0] for model in summary.models if (found := summary.by_point.get((model, task, shots)))}
    answers = {model: store.predictions(result)[:WORKED_QUERIES] for model, result in results.items()}
    model = next((model for model, lines in answers.items() if lines), None)
    if model is None:
        return None
    context, queries = store.context(results[model]), [line.query for line in answers[model]]
    # A model with a shorter context may have fewer demonstrations; it is then not part of this comparison.
    same = {
        other: lines
        for other, lines in answers.items()
        if [line.query for line in lines] == queries and store.context(results[other]) == context
    }
    return WorkedTask(results[model], context, same)


def _models(summary: Summary) -> list[tuple[str, Result]]:
    """Pair each display name with a record that describes the model."""
    first: dict[str, Result] = {}
    for (model, _, _), records in summary.by_point.items():
        first.setdefault(model, records[0])
    return [(model, first[model]) for model in summary.models if model in first]


def _seen_in_training(summary: Summary) -> dict[str, str]:
    """Say for each task whether any model's fine-tuning used its source, as far as manifests tell."""
    seen: dict[str, set[bool | None]] = {task: set() for task in summary.families}
    for record in summary.records:
        seen[record.task].add(record.seen_in_training)
    return {task: "yes" if True in s else "no" if False in s else "not recorded" for task, s in seen.items()}


def _versions(records: Sequence[Result]) -> dict[str, str]:
    """Name every version that took part; several are joined, so that a mixture shows."""
    names = dict.fromkeys(name for record in records for name in record.versions)
    return {
        name: ", ".join(sorted({record.versions[name] for record in records if name in record.versions}))
        for name in names
    }
