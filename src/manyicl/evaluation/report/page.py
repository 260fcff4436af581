"""Records -> one self-contained HTML page that opens without a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from manyicl.atomic import write_atomically
from manyicl.errors import pluralized
from manyicl.evaluation.calibration import COVERAGES, sentence
from manyicl.evaluation.report.lines import BASELINES, Part, notes, sections
from manyicl.evaluation.report.message import message, remarks
from manyicl.evaluation.report.plots import (
    NEAREST_COLOUR,
    TFIDF_COLOUR,
    coverage_panel,
    inline_panel,
    model_colours,
    reliability_panel,
)
from manyicl.evaluation.report.task_mistakes import TaskMistakes, mistakes_missing, tasks_with_mistakes
from manyicl.evaluation.report.template import as_score, as_signed, is_report, render
from manyicl.evaluation.result import ContextExample, PredictedAnswer, Result, ResultStore
from manyicl.evaluation.summary import OVERALL, Summary
from manyicl.evaluation.uncertainty import Estimate, estimate_over_tasks
from manyicl.outputs import require_output_file

# A worked prediction should be read whole: few demonstrations, and the first queries rather than chosen ones.
WORKED_SHOTS = 8
WORKED_QUERIES = 2
# Tasks whose calibration is drawn; beyond these, a page would be megabytes of curves.
MOST_CALIBRATIONS_DRAWN = 12


def write_report(
    results: str | Path | Sequence[Result],
    output: str | Path,
    *,
    parts: Sequence[Part] | None = None,
    title: str = "Shot curves",
    examples: bool = True,
) -> Path:
    """Write one HTML page from records alone.

    Args:
        results: A folder of results, or records; worked predictions need the folder.
        output: Path of the page.
        parts: What to show, one comparison after the other, where a folder holds several; None for all in one.
        title: Head of the page.
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
    store = store if examples else None
    rendered = [_content_of(part, store) for part in parts or (Part("", results),)]
    dotted = {"tfidf": TFIDF_COLOUR, "nearest": NEAREST_COLOUR}
    page = render("report.html", title=title, parts=rendered, OVERALL=OVERALL, dotted=dotted, BASELINES=BASELINES)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, page)
    return output


def _content_of(part: Part, store: ResultStore | None) -> dict[str, object]:
    """Collect what the page says of one comparison; worked predictions only from a folder of results."""
    summary = part.summary
    names = {name for record in summary.records for name in record.versions}
    return {
        "title": part.title,
        "lead": _lead(summary),
        "summary": summary,
        "message": message(part),
        "findings": _findings(summary),
        "colours": model_colours(summary),
        "sections": sections(summary),
        "curves": part.curves() if part.by_task else None,
        # One task is drawn large, and its table is printed once.
        "alone": len(summary.compared) == 1 and not part.by_task,
        "remarks": lambda section: remarks(summary, section),
        # On a narrow screen a table keeps the first, the middle and the last shot count.
        "kept_columns": {0, len(summary.shots) // 2, len(summary.shots) - 1},
        "kept_coverages": {COVERAGES.index(share) for share in (1.0, 0.8, 0.5)},
        "panel": lambda section, wide=False: Markup(inline_panel(summary, section, wide=wide)),
        "worked": worked_tasks(summary, store) if store is not None else [],
        "mistakes": tasks_with_mistakes(summary, store) if store is not None else [],
        "mistakes_missing": mistakes_missing(summary, store) if store is not None else None,
        "calibrated": sentence,
        "calibration_panels": _calibration_panels,
        "most_drawn": MOST_CALIBRATIONS_DRAWN,
        "notes": notes(summary),
        # One record describes its model; one knows the source, hash, labels and counts of its task.
        "models": {model: records[0] for (model, _, _), records in summary.by_point.items()},
        "task_facts": {task: next(r for r in summary.records if r.task == task) for task in summary.families},
        "seen": {t: {r.seen_in_training for r in summary.records if r.task == t} for t in summary.families},
        # Several versions are joined, so that a mixture shows.
        "versions": {name: ", ".join(sorted({r.versions.get(name, "–") for r in summary.records})) for name in names},
    }


def _calibration_panels(one: TaskMistakes) -> list[Markup]:
    """Draw how far the confidence of a model on a task can be relied on."""
    salt = f"{one.result.task} {one.result.line} {one.result.num_shots}"
    found = one.calibration
    return [Markup(draw(found, salt)) for draw in (reliability_panel, coverage_panel)] if found else []


def _lead(summary: Summary) -> str:
    """Say how many models and tasks the page is about; a model that also retrieves rows is one."""
    num_models = len({(record.model_name, record.model_fingerprint) for record in summary.records})
    retrieves = {record.num_retrieved > 0 for record in summary.records}
    with_rows = ", with and without retrieved rows," if len(retrieves) > 1 else ", with retrieved rows,"
    seen = {(record.task, record.seen_in_training) for record in summary.records}
    is_unseen = all((task, False) in seen and (task, True) not in seen for task in summary.families)
    num_tasks, num_families = len(summary.families), len(set(summary.families.values()))
    lead = (
        f"{pluralized(num_models, 'model')}{with_rows if True in retrieves else ''} on {pluralized(num_tasks, 'task')} "
        f"of {num_families} {'family' if num_families == 1 else 'families'}"
        f"{' that fine-tuning never used' if is_unseen else ''}, with {summary.shots[0]} to {summary.shots[-1]} "
        "demonstrations in the context."
    )
    if num_alone := len(summary.not_compared):
        lead += f" {num_alone} of the tasks {'is' if num_alone == 1 else 'are'} in no mean, for reasons that are below."
    return lead


class Finding(NamedTuple):
    """One number worth reading first."""

    value: str
    label: str
    detail: str
    colour: str | None = None


def _findings(summary: Summary) -> list[Finding]:
    """Take the mean of each model at its most shots, and its difference from the first model."""
    findings = []
    for model, colour in model_colours(summary).items():
        scores = [(shots, score) for shots in summary.shots if (score := summary.score(model, OVERALL, shots))]
        if not scores:
            continue
        (fewest, first), (most, last) = scores[0], scores[-1]
        detail = f"{_interval(last)}; {as_score(first.mean)} at {pluralized(fewest, 'shot')}"
        means = [(summary.families[task], summary.tasks[model, task, most].mean) for task in summary.compared]
        if (other_tasks := estimate_over_tasks(means)) is not None:
            detail += f"; {_interval(other_tasks)} had other tasks of these families been chosen"
        findings.append(Finding(as_score(last.mean), f"{model}, {pluralized(most, 'shot')}", detail, colour))
    base, *others = summary.models
    for model in others:
        differences = [(n, one) for n in summary.shots if (one := summary.difference(base, model, OVERALL, n))]
        for most, difference in differences[-1:]:
            label = f"{model} over {base}, {pluralized(most, 'shot')}"
            findings.append(Finding(as_signed(difference.mean), label, _compared(difference)))
    return findings


def _compared(difference: Estimate) -> str:
    """Say how a difference was measured, and whether its interval excludes 0."""
    is_paired = difference.pairing == "paired"
    measured = "paired over the same queries" if is_paired else "not paired: other queries or demonstrations"
    detail = f"{measured}, {_interval(difference, as_signed)}"
    if difference.includes_zero is None:
        return detail
    return f"{detail}: the interval {'includes' if difference.includes_zero else 'excludes'} 0"


def _interval(estimate: Estimate, write: Callable[[float], str] = as_score) -> str:
    if estimate.interval is None:
        return "too few queries for an interval"
    low, high = estimate.interval
    return f"95% interval {write(low)} to {write(high)}"


class WorkedTask(NamedTuple):
    """Demonstrations as they are in the context, and what each model answered to the first queries after them."""

    result: Result
    context: list[ContextExample]
    answers: dict[str, list[PredictedAnswer]]


def worked_tasks(summary: Summary, store: ResultStore) -> list[WorkedTask]:
    """Return one task of each family, the first by name, with its first test queries: nothing is hand-picked."""
    tasks = summary.compared or tuple(summary.families)
    first_of_family = {summary.families[task]: task for task in reversed(tasks)}
    worked = (_worked_task(summary, store, task) for task in reversed(first_of_family.values()))
    return [one for one in worked if one is not None]


def _worked_task(summary: Summary, store: ResultStore, task: str) -> WorkedTask | None:
    """Collect the answers of all models after the same few demonstrations; None where no answers were kept."""
    measured = sorted({shots for _, name, shots in summary.by_point if name == task})
    shots = max((n for n in measured if n <= WORKED_SHOTS), default=measured[0])
    answered = []
    for model in summary.models:
        records = summary.by_point.get((model, task, shots))
        if records and (answers := store.predictions(records[0])[:WORKED_QUERIES]):
            context = store.context(records[0])
            answered.append((records[0], (context, [line.query for line in answers]), model, answers))
    if not answered:
        return None
    result, asked, _, _ = answered[0]
    # A model with a shorter context may have fewer demonstrations; it is then not part of this comparison.
    return WorkedTask(result, asked[0], {model: answers for _, same, model, answers in answered if same == asked})
