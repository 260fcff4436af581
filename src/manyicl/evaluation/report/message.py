"""Records -> the sentences to read first: how good, compared with what, and whether more examples help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from manyicl.errors import pluralized
from manyicl.evaluation.report.lines import Line, Part, Section
from manyicl.evaluation.summary import OVERALL, Group, Summary
from manyicl.evaluation.uncertainty import Estimate

# Metrics that count right answers, so that a share of them can be said in percent.
COUNTS_RIGHT_ANSWERS = frozenset({"accuracy", "exact_match", "numeric_match"})
_BASELINES = {
    "tfidf": "TF-IDF with logistic regression",
    "nearest": "Repeating the answer of the most similar example",
    "majority": "Always giving the most frequent answer",
}
# A smaller share of answers that were cut is only in the notes.
LEAST_SHARE_CUT = 0.01


def message(part: Part) -> dict[str, str]:
    """Say in a few sentences what one comparison shows, for each task by itself or for their mean, by its name.

    A trivial baseline that is better than the model comes first. Differences whose interval holds zero are ties.
    """
    summary = part.summary
    if not summary.compared:
        return {}
    is_one = len(summary.compared) == 1
    groups: list[Group] = [(task,) for task in summary.compared] if part.by_task or is_one else [OVERALL]
    return {_name(summary, group): " ".join(_sentences(summary, group)) for group in groups}


def _sentences(summary: Summary, group: Group) -> Iterator[str]:
    """Say what the last model, usually the fine-tuned one, reaches with the most examples."""
    *others, model = summary.models
    scores = {shots: score for shots in summary.shots if (score := summary.score(model, group, shots))}
    if not scores:
        return
    most, score = max(scores.items())
    level, is_better = _baseline(summary, group, most, score)
    if is_better:
        yield level
    reached = f"After {pluralized(most, 'example')} {model} {_reached(summary, group, score)}"
    for other in others:
        if (before := summary.score(other, group, most)) is None:
            continue
        reached += f"; {other} {_amount(summary, group, before.mean)}"
        difference = summary.difference(other, model, group, most)
        reached += ", a tie within the noise" if difference is not None and _is_tie(difference) else ""
    yield f"{reached}."
    if level and not is_better:
        yield level
    yield from _growth(summary, group, model, list(scores))


def _baseline(summary: Summary, group: Group, shots: int, score: Estimate) -> tuple[str, bool]:
    """Say if the best trivial baseline is above the model's interval, or within it; and whether it is above."""
    known = [(one.mean, name) for key, name in _BASELINES.items() if (one := summary.baseline(key, group, shots))]
    low, high = score.interval or (score.mean, score.mean)
    baseline, name = max(known, default=(-1.0, ""))
    if baseline < low:
        return "", False
    model = _amount(summary, group, score.mean, unit=False)
    if baseline > high:
        after = f" with {pluralized(shots, 'example')}" if shots else ""
        return f"{name} is better than the model{after}: {_amount(summary, group, baseline)} against {model}.", True
    return f"{name} is as good within the noise: {_amount(summary, group, baseline)}.", False


def _growth(summary: Summary, group: Group, model: str, shots: Sequence[int]) -> Iterator[str]:
    """Say whether the last step to more examples changed the score, on the same queries."""
    fewer, more = ([0, 0] + [count for count in shots if count])[-2:]
    change = summary.growth(model, group, fewer, more) if fewer else None
    if change is None:
        return
    if _is_tie(change):
        yield f"From {fewer} to {more} examples it does not change beyond the noise."
    elif change.mean > 0:
        yield f"From {fewer} to {more} examples it gains {_change(summary, group, change.mean)}: more may help."
    else:
        yield f"From {fewer} to {more} examples it loses {_change(summary, group, -change.mean)}: use fewer."


def remarks(summary: Summary, section: Section) -> list[str]:
    """Say what a reader of one curve would stumble over: a fall, a score of zero everywhere, answers that were cut."""
    group = group_of(summary, section)
    found: list[str] = []
    for line in (line for line in section.lines if line.kind == "model"):
        model = line.label
        found += _falls(summary, group, line)
        if len(summary.shots) > 1 and all(cell is not None and cell.mean == 0 for cell in line.cells):
            found.append(f"{model} never gave an accepted answer here, with any number of examples.")
        found += _cut_answers(summary, group, model)
    return found


def _falls(summary: Summary, group: Group, line: Line) -> Iterator[str]:
    counts = [shots for shots, cell in zip(summary.shots, line.cells, strict=True) if cell is not None]
    for fewer, more in pairwise(counts):
        change = summary.growth(line.label, group, fewer, more)
        if change is not None and change.mean < 0 and not _is_tie(change):
            lost = _change(summary, group, -change.mean)
            yield f"{line.label} falls by {lost} from {fewer} to {pluralized(more, 'example')}."


def _cut_answers(summary: Summary, group: Group, model: str) -> Iterator[str]:
    points = ((model, task, shots) for task in summary.members(group) for shots in summary.shots)
    records = [record for point in points for record in summary.by_point.get(point, ())]
    num_cut, total = (sum(getattr(r, name) for r in records) for name in ("num_cut_answers", "num_queries"))
    if num_cut > LEAST_SHARE_CUT * total:
        yield f"{num_cut:,} of {total:,} answers of {model} were cut at the token limit."


def group_of(summary: Summary, section: Section) -> Group:
    """Return what a section shows: a family, the mean over families, or one task."""
    return section.group if section.group in (OVERALL, *summary.groups) else (section.group,)


def metric_of(summary: Summary, group: Group) -> str:
    """Return the metric that all tasks of a group share, or ``score``."""
    members = set(summary.members(group))
    metrics = {record.metric for record in summary.records if record.task in members}
    return metrics.pop() if len(metrics) == 1 else "score"


def _name(summary: Summary, group: Group) -> str:
    if group == OVERALL:
        return f"Mean of {pluralized(len(summary.compared), 'task')}"
    return ", ".join(group) if isinstance(group, tuple) else group


def _reached(summary: Summary, group: Group, score: Estimate) -> str:
    verb = "answers" if metric_of(summary, group) in COUNTS_RIGHT_ANSWERS else "scores"
    text = f"{verb} {_amount(summary, group, score.mean)}"
    if score.interval is not None:
        low, high = score.interval
        text += f" ({_amount(summary, group, low, unit=False)} to {_amount(summary, group, high, unit=False)})"
    return text


def _amount(summary: Summary, group: Group, value: float, *, unit: bool = True) -> str:
    """Write a score with its unit: ``85 % right``, or ``0.44 (token_f1)``."""
    metric = metric_of(summary, group)
    if metric in COUNTS_RIGHT_ANSWERS:
        return f"{100 * value:.0f}" + (" % right" if unit else "")
    return f"{value:.2f}" + (f" in {metric}" if unit and metric != "score" else "")


def _change(summary: Summary, group: Group, value: float) -> str:
    """Write a difference in the unit of the scores: ``45 points`` of percent right, or ``0.44``."""
    if metric_of(summary, group) in COUNTS_RIGHT_ANSWERS:
        return pluralized(round(100 * value), "point")
    return f"{value:.2f}"


def _is_tie(difference: Estimate) -> bool:
    """Tell whether a difference is not shown: its interval holds zero, or there is none."""
    return difference.includes_zero is not False
