"""Records -> one self-contained HTML page that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import regex  # type: ignore[import-untyped]
from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from manyicl.atomic import write_atomically
from manyicl.errors import UserError
from manyicl.evaluation.report.plots import TFIDF_COLOUR, family_title, inline_panel, model_colours
from manyicl.evaluation.report.tables import notes
from manyicl.evaluation.result import (
    PredictedAnswer,
    Result,
    ResultStore,
    ShownExample,
)
from manyicl.evaluation.summary import OVERALL, Summary, summarise
from manyicl.evaluation.uncertainty import Estimate

# A worked prediction should be read whole: few demonstrations, and the first queries rather than chosen ones.
WORKED_SHOTS = 8
WORKED_QUERIES = 2
MAX_SHOWN_CHARACTERS = 700
# What report.html says of itself, and at the end of its title, which older pages have alone.
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
        output: The page to write.
        only: Records to show, where a folder holds those of other runs too; None for all.
        title: Head of the page.
        lead: A sentence below it; None for one that counts models, tasks and results.
        examples: Whether worked predictions, and with them texts of the tasks, may stand in it.

    Returns:
        The path of the page.

    Raises:
        UserError: If there is no record, or one is broken.
    """
    if Path(output).is_dir():
        raise UserError(f"The report is one file; {str(output)!r} is a folder.")
    store = ResultStore(results) if isinstance(results, str | Path) else None
    if only is not None:
        records = [*only]
    else:
        records = ResultStore(results).load() if isinstance(results, str | Path) else [*results]
    records.sort(key=lambda record: record.created)
    summary = summarise(records)
    page = _template().render(
        title=title,
        lead=lead or _lead(summary),
        summary=summary,
        OVERALL=OVERALL,
        findings=_findings(summary),
        colours=model_colours(summary),
        tfidf_colour=TFIDF_COLOUR,
        sections=_sections(summary),
        panel=lambda group, wide=False: Markup(inline_panel(summary, group, wide=wide)),
        worked=worked_tasks(summary, store) if store is not None and examples else [],
        notes=notes(summary),
        models=_models(summary),
        metric_of={record.task: record.metric for record in records},
        task_facts=_task_facts(summary),
        seen_in_training=_seen_in_training(summary),
        has_tfidf=any(record.tfidf is not None for record in summary.records),
        versions=_versions(records),
        seeds=sorted({record.seed for record in summary.records}),
        query_seeds=sorted({record.query_seed for record in summary.records}),
        num_answers=sum(record.num_queries for record in summary.records),
        seconds=sum(record.seconds for record in summary.records),
        created=(records[0].created, records[-1].created),
    )
    output = Path(output)
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
    num_tasks, num_families = len(summary.compared), len(summary.groups)
    seen = {record.seen_in_training for record in summary.records}
    unseen = " that fine-tuning never used" if False in seen and True not in seen else ""
    return (
        f"{_counted(len(summary.models), 'model')} on {_counted(num_tasks, 'task')} of "
        f"{_counted(num_families, 'family', 'families')}{unseen}, asked after "
        f"{summary.shots[0]} to {summary.shots[-1]} demonstrations."
    )


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One number worth reading first."""

    value: str
    label: str
    detail: str
    colour: str | None = None


def _findings(summary: Summary) -> list[Finding]:
    """Take the mean of each model at its most shots, and its paired difference from the first model."""
    findings = []
    colours = model_colours(summary)
    for model in summary.models:
        shots = summary.shots_of(model)
        first, last = summary.score(model, OVERALL, shots[0]), summary.score(model, OVERALL, shots[-1])
        if first is None or last is None:
            continue
        detail = f"95% interval {_interval(last)}; {_score(first.mean)} at {_counted(shots[0], 'shot')}"
        other_tasks = summary.score_over_tasks(model, shots[-1])
        if other_tasks is not None:
            detail += f"; {_interval(other_tasks)} had other tasks of these families been chosen"
        findings.append(Finding(_score(last.mean), f"{model}, {shots[-1]} shots", detail, colours[model]))
    base = summary.models[0]
    for model in summary.models[1:]:
        common = [s for s in summary.shots if summary.difference(base, model, OVERALL, s) is not None]
        if not common:
            continue
        difference = summary.difference(base, model, OVERALL, common[-1])
        assert difference is not None, "common holds shot counts with a difference"
        low, high = difference.interval
        verdict = "the interval excludes 0" if low > 0 or high < 0 else "the interval includes 0"
        label = f"{model} over {base}, {common[-1]} shots"
        detail = f"paired over the same queries, 95% interval {_signed(low)} to {_signed(high)}: {verdict}"
        findings.append(Finding(_signed(difference.mean), label, detail))
    return findings


def _interval(estimate: Estimate) -> str:
    low, high = estimate.interval
    return f"{max(low, 0):.3f} to {min(high, 1):.3f}"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table: a model, a difference or a level, at every shot count."""

    label: str
    cells: tuple[Estimate | None, ...]
    kind: str
    colour: str | None = None


@dataclass(frozen=True, slots=True)
class Section:
    """A family, or the mean over families: its lines, and its tasks with theirs."""

    group: str
    num_tasks: int
    lines: list[Line]
    tasks: dict[str, list[Line]]


def _sections(summary: Summary) -> list[Section]:
    """Collect the tables of the mean over families, if there is one, and of each family."""
    sections = []
    groups = (OVERALL, *summary.groups) if len(summary.groups) > 1 else summary.groups
    for group in groups:
        tasks = {} if group == OVERALL else {task: _task_lines(summary, task) for task in summary.members(group)}
        sections.append(Section(group, len(summary.members(group)), _group_lines(summary, group), tasks))
    if summary.not_compared:
        alone = {task: _task_lines(summary, task) for task in summary.not_compared}
        sections.append(Section("not measured everywhere", len(alone), [], alone))
    return sections


def _group_lines(summary: Summary, group: str) -> list[Line]:
    colours = model_colours(summary)
    lines = [
        Line(model, tuple(summary.score(model, group, shots) for shots in summary.shots), "model", colours[model])
        for model in summary.models
    ]
    base = summary.models[0]
    lines += [
        Line(
            f"{other} − {base}",
            tuple(summary.difference(base, other, group, shots) for shots in summary.shots),
            "difference",
        )
        for other in summary.models[1:]
    ]
    levels = {name: [summary.level(name, group, shots) for shots in summary.shots] for name in _LEVELS}
    return lines + _level_lines(levels)


def _task_lines(summary: Summary, task: str) -> list[Line]:
    colours = model_colours(summary)
    lines = [
        Line(model, tuple(summary.tasks.get((model, task, shots)) for shots in summary.shots), "model", colours[model])
        for model in summary.models
    ]
    levels = {name: [summary.task_level(name, task, shots) for shots in summary.shots] for name in _LEVELS}
    return lines + _level_lines(levels)


_LEVELS = {"majority": "majority answer", "chance": "chance", "tfidf": "TF-IDF + logistic regression"}


def _level_lines(levels: dict[str, list[float | None]]) -> list[Line]:
    return [
        Line(_LEVELS[name], tuple(None if v is None else Estimate(v, 0.0, 1) for v in values), "level")
        for name, values in levels.items()
        if any(value is not None for value in values)
    ]


@dataclass(frozen=True, slots=True)
class WorkedQuery:
    """A query and what each model answered after the same demonstrations."""

    query: str
    references: tuple[str, ...]
    origin: str
    answers: list[tuple[str, PredictedAnswer, float | None]]


@dataclass(frozen=True, slots=True)
class WorkedTask:
    """Demonstrations as they stood in the context, and the first queries asked after them."""

    task: str
    family: str
    metric: str
    num_shots: int
    seed: int
    context: list[ShownExample]
    queries: list[WorkedQuery]


def worked_tasks(summary: Summary, store: ResultStore) -> list[WorkedTask]:
    """Show one task of each family, the first by name, with the first queries asked: nothing is hand-picked."""
    first_of_family: dict[str, str] = {}
    for task in summary.compared or tuple(summary.families):
        first_of_family.setdefault(summary.families[task], task)
    worked = (_worked_task(summary, store, task) for task in first_of_family.values())
    return [one for one in worked if one is not None]


def _worked_task(summary: Summary, store: ResultStore, task: str) -> WorkedTask | None:
    measured = [s for s in summary.shots if any((model, task, s) in summary.tasks for model in summary.models)]
    shots = max((s for s in measured if s <= WORKED_SHOTS), default=measured[0])
    results = {model: found[0] for model in summary.models if (found := summary.by_point.get((model, task, shots)))}
    answers = {model: store.predictions(result) for model, result in results.items()}
    answers = {model: lines for model, lines in answers.items() if lines}
    if not answers:
        return None
    # A model with a shorter context may have been shown less; it then has no place in this comparison.
    shown = next(iter(answers))
    result, context = results[shown], store.context(results[shown])
    answers = {model: lines for model, lines in answers.items() if store.context(results[model]) == context}
    return WorkedTask(
        task=task,
        family=summary.families[task],
        metric=result.metric,
        num_shots=result.num_shots_shown,
        seed=result.seed,
        context=context,
        queries=[_worked_query(answers, result, i) for i in range(min(WORKED_QUERIES, result.num_queries))],
    )


def _worked_query(answers: dict[str, list[PredictedAnswer]], result: Result, position: int) -> WorkedQuery:
    asked = next(iter(answers.values()))[position]
    same = {
        model: lines[position]
        for model, lines in answers.items()
        if position < len(lines) and lines[position].query == asked.query
    }
    return WorkedQuery(
        query=asked.query,
        references=asked.references,
        origin=asked.origin,
        answers=[
            (model, line, line.scores.get(result.metric, line.scores.get("accuracy"))) for model, line in same.items()
        ],
    )


def _models(summary: Summary) -> list[tuple[str, Result]]:
    """Pair each display name with a record that describes the model."""
    first: dict[str, Result] = {}
    for (model, _, _), records in summary.by_point.items():
        first.setdefault(model, records[0])
    return [(model, first[model]) for model in summary.models if model in first]


def _task_facts(summary: Summary) -> dict[str, Result]:
    """Take for each task one record, which knows its source, hash, labels and counts."""
    facts: dict[str, Result] = {}
    for record in summary.records:
        facts.setdefault(record.task, record)
    return {task: facts[task] for task in summary.families}


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
