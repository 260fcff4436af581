"""What is missing from the numbers of a comparison, and why, in sentences."""

from __future__ import annotations

from manyicl.errors import pluralized
from manyicl.evaluation.comparison.arms import REGIME_LABELS
from manyicl.evaluation.comparison.records import IMPORTED, ComparisonRecords
from manyicl.evaluation.comparison.statistics import ROLES, Statistics
from manyicl.evaluation.grid import CellState

# Cells that wait which a sentence names.
MOST_NAMED = 6


def omissions(records: ComparisonRecords, statistics: Statistics) -> list[str]:
    """Say in sentences what is missing from the numbers, and why."""
    plan = statistics.plan
    waiting = [report.cell.name for report in records.failures if report.state is CellState.WAITING]
    others = [report for report in records.failures if report.state is not CellState.WAITING]
    lines = [report.sentence().removesuffix(".") + "." for report in others]
    if waiting:
        more = "" if len(waiting) <= MOST_NAMED else f" and {len(waiting) - MOST_NAMED} more"
        lines.append(f"{pluralized(len(waiting), 'cell')} not started: {', '.join(waiting[:MOST_NAMED])}{more}.")
    lines += [f"Learning rate {report.sentence().removesuffix('.')}." for report in records.failed_trials]
    cells = {cell.name for cell in records.cells}
    unfinished = {r.model_name for r in records.results if r.model_name not in cells} - {
        r.model_name for r in records.results if r.model_name.startswith(IMPORTED)
    }
    lines += [f"{name}: its results do not count, since the cell is not done." for name in sorted(unfinished)]
    trained = {arm.regime for arm in statistics.cells}
    lines += [
        f"{REGIME_LABELS.get(name, name)}: no cell of this regime is done."
        for name in plan.regimes
        if name not in trained
    ]
    for arm, its_cells in statistics.cells.items():
        num_seeds = len({cell.training_seed for cell in its_cells})
        if not arm.variant and num_seeds < plan.num_training_seeds:
            lines.append(f"{arm.label}: {num_seeds} of {pluralized(plan.num_training_seeds, 'seed')} done.")
    if "base" not in plan.regimes and any(cell.forgetting for cell in records.cells):
        lines.append("What was lost since the base is not known, for the base is not among the regimes.")
    if statistics.dedicated and not records.settings.is_tuned:
        lines.append("Models per task took their whole budget: with one learning rate, no number of steps was chosen.")
    for role in ROLES:
        for task in statistics.tasks_of(role):
            if (reason := statistics.why_not_compared(role, task)) is not None:
                lines.append(f"{task} ({role}) is in no mean: {reason}.")
        compared, with_models = statistics.compared(role), statistics.dedicated_tasks(role)
        if statistics.dedicated and len(with_models) < len(compared):
            number = f"{len(compared) - len(with_models)} of {pluralized(len(compared), f'{role} task')}"
            lines.append(f"{number} without a model per task of every size, and in no comparison with those.")
    return lines
