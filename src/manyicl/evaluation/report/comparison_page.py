"""Records of a comparison -> one self-contained HTML page, Markdown tables, and each plot as SVG and CSV."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from manyicl.atomic import write_atomically
from manyicl.errors import pluralized
from manyicl.evaluation.comparison.omissions import omissions
from manyicl.evaluation.comparison.records import COMPARISON_FILE, ComparisonRecords
from manyicl.evaluation.comparison.statistics import ROLES, ComparedRole, Statistics, statistics_of
from manyicl.evaluation.report import comparison_tables as tables
from manyicl.evaluation.report.comparison_markdown import MARK, as_markdown
from manyicl.evaluation.report.comparison_message import Message, enumerated, forgetting_sentence, messages, metrics_of
from manyicl.evaluation.report.comparison_plots import (
    MEASURED_COLUMNS,
    Plot,
    as_csv,
    differences_plot,
    forgetting_plot,
    forgetting_steps_plot,
    in_weights_plot,
    measured_cells,
    positions_plot,
    shot_curves,
)
from manyicl.evaluation.report.comparison_tables import Table
from manyicl.evaluation.report.drawing import family_title, is_picture
from manyicl.evaluation.report.lines import FLAGS_OF_COMPARISONS, flag_notes
from manyicl.evaluation.report.template import is_report, render
from manyicl.evaluation.result import Result, hash_of, readable_name
from manyicl.evaluation.summary import OVERALL
from manyicl.outputs import require_output_file

TITLE = "Does one many-shot model replace one model per task?"
PAGE, MARKDOWN, PLOTS = "report.html", "report.md", "plots"
# Tasks whose own curves are drawn; beyond these, a page would be megabytes of curves.
MOST_TASKS_DRAWN = 40
_DEDICATED_BUDGETS = {
    "each": "every dedicated model may take the whole budget",
    "share": "the dedicated models of one size and seed share the budget",
}


@dataclass(frozen=True)
class RoleContent:
    """What the page says of one kind of tasks.

    Attributes:
        role: Seen or unseen.
        message: The sentences to read first.
        headline: Regimes by families.
        beside_dedicated: The same on the tasks with dedicated models, where those are not all.
        differences: What a sentence may claim.
        in_weights: Examples in context against examples in weights.
        shares: Share of the gap that is closed.
        tasks: Every task.
        plots: The plots by what they are for: curves, differences, in_weights.
        families: Curves of each family.
        task_plots: Curves of each task.
    """

    role: ComparedRole
    message: Message
    headline: Table
    beside_dedicated: Table | None
    differences: Table | None
    in_weights: Table | None
    shares: Table | None
    tasks: Table | None
    plots: Mapping[str, Plot]
    families: tuple[Plot, ...]
    task_plots: tuple[Plot, ...]


def write_comparison(folder: str | Path) -> list[Path]:
    """Write the report of a comparison, finished or not, into its folder, from its records alone.

    Args:
        folder: Folder of the comparison.

    Returns:
        The page, the Markdown file, and the files of the plots.

    Raises:
        UserError: If it holds no comparison, a record is broken, or a file of the report would replace one that is
            not ours.
    """
    folder = Path(folder)
    records = ComparisonRecords.load(folder)
    numbers = statistics_of(records)
    roles = [_role_content(numbers, message) for message in messages(numbers)]
    common = [
        plot for plot in (positions_plot(numbers), forgetting_plot(numbers), forgetting_steps_plot(numbers)) if plot
    ]
    plots = [*common, *(plot for one in roles for plot in _plots_of(one))]
    data = {plot.name: (plot.columns, plot.rows) for plot in plots} | _data(numbers)
    _require_outputs(folder, [plot.name for plot in plots], {name: columns for name, (columns, _) in data.items()})
    missing = [*omissions(records, numbers), *flag_notes(numbers.all_results, FLAGS_OF_COMPARISONS)]
    notes, again, title = _notes(numbers), _how_to_run(folder, records), TITLE
    sentences = [("Not in these numbers", missing), ("Notes", notes), ("How to run it again", again)]
    page = render(
        "comparison.html",
        title=title,
        lead=_lead(numbers),
        roles=roles,
        forgetting_sentence=forgetting_sentence(numbers),
        common=dict.fromkeys(("positions", "forgetting", "forgetting_steps")) | {plot.name: plot for plot in common},
        tables={
            "forgetting": tables.forgetting(numbers),
            "costs": tables.costs(numbers),
            "ablations": tables.ablations(numbers),
        },
        missing=missing,
        notes=notes,
        again=again,
        facts=_task_facts(numbers),
        cells=records.cells,
        num_results=len(numbers.all_results),
        panel=lambda plot, is_wide: Markup(plot.for_page(is_wide=is_wide)),
        dashes=_legend_dashes,
    )
    markdown = as_markdown(title, (one.message for one in roles), tables.all_tables(numbers), sentences)
    files = {folder / PAGE: page, folder / MARKDOWN: markdown}
    files |= {folder / PLOTS / f"{plot.name}.svg": plot.as_svg() for plot in plots}
    files |= {folder / PLOTS / f"{name}.csv": as_csv(*rows) for name, rows in data.items()}
    (folder / PLOTS).mkdir(exist_ok=True)
    for path, content in files.items():
        write_atomically(path, content)
    return list(files)


def require_report(folder: str | Path) -> None:
    """Refuse, before anything is trained, a folder in which a report would replace what is not ours."""
    _require_outputs(Path(folder), (), {})


def _require_outputs(folder: Path, pictures: Iterable[str], data: Mapping[str, Sequence[str]]) -> None:
    """Refuse to replace a file that is not ours, before anything is drawn."""

    def begins_with(line: str) -> Callable[[Path], bool]:
        return lambda path: path.read_bytes().startswith(line.encode())

    # Rows of an earlier version may have other columns after the first two.
    recognised: dict[Path, Callable[[Path], bool]] = {folder / PAGE: is_report, folder / MARKDOWN: begins_with(MARK)}
    recognised |= {folder / PLOTS / f"{name}.svg": is_picture for name in pictures}
    recognised |= {
        folder / PLOTS / f"{name}.csv": begins_with(as_csv(columns[:2], ()).rstrip()) for name, columns in data.items()
    }
    for path, is_ours in recognised.items():
        require_output_file(path, is_ours=is_ours, with_parents=True)


def _role_content(numbers: Statistics, message: Message) -> RoleContent:
    role = message.role
    compared = numbers.compared(role)
    headline = tables.headline(numbers.headline(role), role)
    assert headline is not None
    plots: dict[str, Plot | None] = {
        "curves": shot_curves(numbers, f"curves_{role}", f"Mean over families, {role} tasks", compared)
    }
    differences = numbers.differences(role)
    plots["differences"] = differences_plot(
        differences, f"differences_{role}", f"All answers, differences on {role} tasks"
    )
    found = numbers.in_weights(role)
    if found is not None:
        title = f"Examples in context and in weights, {pluralized(len(found.tasks), f'{role} task')}"
        plots["in_weights"] = in_weights_plot(found, f"in_weights_{role}", title)
    groups = numbers.groups(compared)
    families = (
        shot_curves(numbers, f"curves_{role}_{_file_name(family)}", family_title(family), members, is_small=True)
        for family, members in groups.items()
        if family != OVERALL
    )
    task_plots = (
        shot_curves(numbers, f"task_{role}_{_file_name(task)}", task, (task,), is_small=True)
        for task in compared
        if len(compared) <= MOST_TASKS_DRAWN
    )
    return RoleContent(
        role=role,
        message=message,
        headline=headline,
        beside_dedicated=tables.headline(numbers.beside_dedicated(role), role),
        differences=tables.differences(differences, role),
        in_weights=tables.in_weights(numbers, role),
        shares=tables.shares(numbers, role),
        tasks=tables.tasks(numbers, role),
        plots={name: plot for name, plot in plots.items() if plot is not None},
        families=tuple(plot for plot in families if plot is not None),
        task_plots=tuple(plot for plot in task_plots if plot is not None),
    )


def _file_name(name: str) -> str:
    """Return the name of a task or family as a file can have it; where it changes, a hash keeps it apart."""
    readable = readable_name(name)
    return name if readable == name else f"{readable}-{hash_of(name)[:8]}"


def _plots_of(content: RoleContent) -> Iterable[Plot]:
    yield from content.plots.values()
    yield from content.families
    yield from content.task_plots


def _data(numbers: Statistics) -> dict[str, tuple[tuple[str, ...], list[Sequence[object]]]]:
    """Return the rows of the tables that no plot draws."""
    found: dict[str, tuple[tuple[str, ...], list[Sequence[object]]]] = {}
    rows: list[Sequence[object]] = []
    for role in ROLES:
        for row in numbers.headline(role):
            for group, one in row.cells.items():
                worst = row.worst if group == OVERALL else None
                rows.append((role, row.point.arm.label, row.point.shots, group, *measured_cells(one), worst))
    if rows:
        found["regimes"] = ("role", "regime", "shots", "group", *MEASURED_COLUMNS, "worst_draw"), rows
    costs: list[Sequence[object]] = [
        (
            arm.label,
            one.num_models,
            one.num_trainings,
            " ".join(map(str, one.learning_rates)),
            one.num_steps,
            one.num_tokens,
            one.num_answers,
            one.seconds,
            one.peak_memory_gib,
        )
        for arm, one in numbers.costs().items()
    ]
    if costs:
        columns = ("regime", "models", "trainings", "learning_rates", "steps", "tokens", "answers", "seconds")
        found["costs"] = (*columns, "peak_memory_gib"), costs
    ablations: list[Sequence[object]] = [
        (row.point.arm.variant, *measured_cells(row.overall), *measured_cells(one.measured if one else None))
        for row, one in numbers.ablations()
    ]
    if ablations:
        differences = (f"difference_{column}" for column in MEASURED_COLUMNS)
        found["ablations"] = ("ablation", *MEASURED_COLUMNS, *differences), ablations
    return found


def _lead(numbers: Statistics) -> str:
    """Say what was compared, at which budget."""
    plan = numbers.plan
    main = [arm for arm in numbers.arms if arm.is_main and arm.regime != "base"]
    counts = {role: len(numbers.compared(role)) for role in ROLES}
    some = enumerated([pluralized(count, f"{role} task") for role, count in counts.items() if count] or ["no task yet"])
    text = (
        f"{pluralized(len(main), 'way')} to fine-tune {plan.model} once for all tasks"
        + (", and models fine-tuned for one task each," if numbers.dedicated else "")
        + f" on {some}, with up to {pluralized(plan.num_training_seeds, 'training seed')} and "
        f"{pluralized(plan.num_draws, 'draw')} of demonstrations for each."
    )
    if plan.budget == "tokens" and plan.num_tokens:
        text += f" Every regime processes {plan.num_tokens:,} tokens"
    else:
        text += " Every regime takes the same optimizer steps"
    budget = _DEDICATED_BUDGETS.get(plan.dedicated_budget or "")
    return f"{text}; {budget}." if budget and numbers.dedicated else f"{text}."


def _notes(numbers: Statistics) -> list[str]:
    """Say in sentences what a reader of the numbers must know."""
    plan = numbers.plan
    seeds = pluralized(plan.num_training_seeds, "training seed")
    metrics = sorted(metrics_of(numbers, [task for role in ROLES for task in numbers.compared(role)]))
    notes = [
        "Scores are means over families of means over tasks, each task in its own metric"
        + (f" ({', '.join(metrics)})" if metrics else "")
        + ", in percent. Seen tasks were trained on and are scored on their test rows; unseen ones share no source "
        "with training or validation tasks.",
        f"Intervals of 95% hold what other trainings, draws of demonstrations and queries would change, as far as "
        f"{seeds} show it, and not what other tasks would. Student's t widens them where trainings are few. With one "
        "training there is no such interval, and nothing is claimed.",
        "Differences are paired over the same training seeds, draws and queries. “Not distinguishable” means that the "
        "interval holds zero. Each interval stands for itself: of twenty true zeros, about one would be excluded by "
        "chance.",
        "Worst draw: the worst score of any draw and order of the demonstrations of a training, averaged over "
        "trainings and tasks; it falls with the number of draws and orders.",
        "The share of a gap has Fieller's interval, of every share that the data do not exclude; where the gap is not "
        "above the noise, no share is given.",
        "Models per task see no demonstration and the same instruction; their rows are training seeds as well.",
    ]
    if plan.num_training_seeds == 2:
        notes.append(
            "Two trainings may agree by luck: in simulated comparisons with two, an interval of 95% held the truth in "
            "88 to 94% of cases; with three or more, in 93 to 96%."
        )
    if numbers.forgotten():
        notes.append(
            "The rise of the loss on general text has an interval over trainings alone: the text is the same for all."
        )
    return notes


def _how_to_run(folder: Path, records: ComparisonRecords) -> list[str]:
    """Say how to make the comparison and this report again, and from what."""
    digest = hashlib.sha256((folder / COMPARISON_FILE).read_bytes()).hexdigest()
    versions = ", ".join(f"{name} {number}" for name, number in sorted(_versions(records.results).items()))
    texts = sorted({one.text_sha256 for cell in records.cells for one in cell.forgetting if one.text_sha256})
    base = sorted({cell.model_fingerprint for cell in records.cells if cell.regime == "base"})
    return [
        f"The comparison: manyicl compare {COMPARISON_FILE} (the file of this folder, SHA-256 {digest}).",
        "This report, from the records: manyicl report with this folder.",
        *([f"Base model: {records.settings.model.base}, weights {', '.join(base)}."] if base else []),
        *([f"General text: SHA-256 {', '.join(texts)}."] if texts else []),
        *([f"Versions: {versions}."] if versions else []),
    ]


def _versions(results: Sequence[Result]) -> dict[str, str]:
    """Return the version of each library; several are joined, so that a mixture shows."""
    names = {name for result in results for name in result.versions}
    return {name: ", ".join(sorted({r.versions.get(name, "–") for r in results})) for name in sorted(names)}


def _task_facts(numbers: Statistics) -> dict[str, tuple[str, Result]]:
    """Return the role of each measured task, and a record that knows its metric, source, hash and counts."""
    known = {task: result for (_, task, _), rows in numbers.results.items() for row in rows.values() for result in row}
    return {task: (numbers.roles[task], known[task]) for task in numbers.roles if task in known}


def _legend_dashes(dash: object) -> str:
    """Write dashes as an SVG line has them; an empty text for a solid line."""
    return "" if isinstance(dash, str) else " ".join(f"{2 * float(part):g}" for part in dash[1])  # type: ignore[index]
