"""`manyicl quickstart`: the one model on three small tables, then fine-tuning a tiny model, all offline."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyicl.activity import Activity
from manyicl.errors import UserError
from manyicl.outputs import require_output_folder
from manyicl.printing import new_console

if TYPE_CHECKING:
    from rich.console import Console

    from manyicl.evaluation.report import Part
    from manyicl.evaluation.result import Result
    from manyicl.evaluation.shot_curve import EvaluationSettings
    from manyicl.evaluation.uncertainty import Estimate
    from manyicl.tasks.task import Task
    from manyicl.training.recipe import Recipe

NUM_QUERIES = 20
TABLE_SHOTS = (0, 4, 16, 64)
# What reports call a model, and where it is loaded from.
TABLE_MODELS = {"smollm2 (Q4_1)": "builtin:smollm2", "one (Q4_1)": "builtin:one"}
TABLES_TITLE = "Three small tables"

NANO_SHOTS = (0, 1, 2, 4, 8, 16, 32, 64)
NANO_SEEDS = 3
NANO_BASE, NANO_TUNED = "nano", "nano fine-tuned"
NANO_TITLE = "Nano world"

# The reasons why the real part may be missing, each of which names its remedy.
MISSING_MODEL = ("model_not_fetched", "model_not_packaged")


def quickstart_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of tasks, model, results and report.")] = Path(
        "quickstart"
    ),
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of demonstrations, queries, the nano world and the training.")
    ] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of using what is there.")] = False,
) -> None:
    """See what a model learns from examples, before and after fine-tuning on other tasks, offline, in minutes.

    First a real language model on three small tables: `builtin:smollm2` and `builtin:one`, which is the same model
    fine-tuned once on many tasks, with 0, 4, 16 and 64 examples. `manyicl models get smollm2` fetches the base
    beforehand; without it this part is skipped.

    Then fine-tuning itself, at the size of a toy: it writes a world of procedural tasks in five families, fine-tunes
    the tiny base model of the package on its training tasks with every answer supervised, and evaluates both on
    tasks whose rules neither has seen, with 0 to 64 examples.

    It writes one report. A second run uses what the first one made.

    Examples:

        manyicl quickstart

        manyicl quickstart --output /tmp/quickstart --seed 1
    """
    require_output_folder(output)
    console = new_console()
    results = output / "results"
    if fresh:
        _remove_results(results)
    console.rule("1  three small tables, with 0 to 64 examples in context")
    parts = _measure_tables(results, seed, console)
    console.rule("2  a toy world of tasks")
    training_folder, unseen_folder = _write_tasks(output / "tasks", seed, console)
    console.rule("3  fine-tuning a tiny model on every answer of its training tasks")
    recipe = quickstart_recipe(output, training_folder, seed)
    _fine_tune(recipe, console, fresh=fresh)
    console.rule("4  its unseen tasks, with 0 to 64 examples in context")
    parts.append(_measure_nano(recipe, unseen_folder, results, seed, console))
    console.rule("done")
    report = _report(parts, output, console)
    console.print(f"Report with plots and worked predictions: {report}", highlight=False)
    console.print("The three tables, to try things on: manyicl tasks starter tables", highlight=False)
    console.print("Answers to your own queries: manyicl predict --help", highlight=False)


def _remove_results(folder: Path) -> None:
    """Delete the records of earlier runs, and nothing else."""
    from manyicl.evaluation.result import CONTEXT_ENDING, PREDICTIONS_ENDING, RECORD_ENDING, RESULTS_ENDING

    for ending in (RESULTS_ENDING, RECORD_ENDING, PREDICTIONS_ENDING, CONTEXT_ENDING):
        for path in folder.glob(f"*{ending}"):
            path.unlink()


def _measure_tables(folder: Path, seed: int, console: Console) -> list[Part]:
    """Measure the pretrained base and the one model on the starter tables; nothing where a model is missing."""
    from manyicl.evaluation.report import Part
    from manyicl.evaluation.shot_curve import EvaluationSettings
    from manyicl.tasks.files import load_tasks
    from manyicl.tasks.starter_tables import STARTER_TABLES

    settings = EvaluationSettings(shots=TABLE_SHOTS, num_seeds=1, num_queries=NUM_QUERIES, seed=seed)
    tables = load_tasks([str(STARTER_TABLES)])
    console.print(f"{', '.join(table.name for table in tables)}: {NUM_QUERIES} queries each", highlight=False)
    try:
        results = _measure(TABLE_MODELS, tables, folder, settings, console)
    except UserError as error:
        if error.code not in MISSING_MODEL:
            raise
        console.print(f"Only the toy world is shown: {error}", style="yellow", markup=False, highlight=False)
        return []
    part = Part(TABLES_TITLE, results, by_task=True)
    _print_difference(part, console)
    return [part]


def _write_tasks(folder: Path, seed: int, console: Console) -> tuple[Path, Path]:
    """Write the training tasks and the unseen ones, and return their folders."""
    from manyicl.tasks.nanoworld.world import write_nano_world

    training_folder, unseen_folder = folder / "train", folder / "unseen"
    write_nano_world(training_folder, seed=seed, split="train")
    write_nano_world(unseen_folder, seed=seed, split="unseen")
    for written in (training_folder, unseen_folder):
        console.print(f"{len(list(written.glob('*/task.yaml')))} tasks in {written}", highlight=False)
    return training_folder, unseen_folder


def quickstart_recipe(output: Path, training_folder: Path, seed: int) -> Recipe:
    """Return the recipe of the package with the folders of this run in it."""
    from manyicl.training.recipe import Recipe

    text = files("manyicl.cli").joinpath("quickstart.yaml").read_text(encoding="utf-8")
    # JSON is YAML, and quotes whatever a path may hold.
    overrides = [
        f"tasks.train={json.dumps([str(training_folder)])}",
        f"output={json.dumps(str(output / 'model'))}",
        f"training.seed={seed}",
    ]
    return Recipe.parse(text, "quickstart.yaml", overrides)


def _fine_tune(recipe: Recipe, console: Console, *, fresh: bool) -> None:
    """Train, resume an interrupted run, or use the finished one; a run of another recipe or base is replaced."""
    from manyicl.training.job import ensure_trained

    try:
        run = ensure_trained(recipe, existing="replace" if fresh else "use", console=console)
    except UserError as error:
        if error.code != "another_run":
            raise
        run = ensure_trained(recipe, existing="replace", console=console)
    if run.was_found:
        console.print(f"The finished model of an earlier run is in {run.folder}; --fresh trains anew.")
    if not run.finished:
        console.print("Stopped, and saved; the same command resumes from here.")
        raise KeyboardInterrupt


def _measure_nano(recipe: Recipe, unseen_folder: Path, folder: Path, seed: int, console: Console) -> Part:
    """Measure the tiny base and the fine-tuned model on the unseen tasks."""
    from manyicl.evaluation.report import Part
    from manyicl.evaluation.shot_curve import EvaluationSettings
    from manyicl.tasks.files import load_tasks

    settings = EvaluationSettings(shots=NANO_SHOTS, num_seeds=NANO_SEEDS, num_queries=NUM_QUERIES, seed=seed)
    models = {NANO_BASE: str(recipe.model.base), NANO_TUNED: str(recipe.output)}
    return Part(NANO_TITLE, _measure(models, load_tasks([str(unseen_folder)]), folder, settings, console))


def _measure(
    models: dict[str, str], tasks: list[Task], folder: Path, settings: EvaluationSettings, console: Console
) -> list[Result]:
    """Measure models one after the other; every point is kept as soon as it is there."""
    from manyicl.cli.evaluate import measure_with_progress
    from manyicl.cli.options import load_engine

    results: list[Result] = []
    with Activity(console) as activity:
        for name, reference in models.items():
            engine = load_engine(reference, None, None, None, None, None, activity=activity)
            results += measure_with_progress(engine, tasks, folder, settings, name, activity).results
    return results


def _report(parts: list[Part], output: Path, console: Console) -> Path:
    """Print the table, and write the picture and the page."""
    from manyicl.evaluation.report import plot_parts, print_parts, write_report

    print_parts(parts, console)
    for part in parts:
        _print_difference(part, console)
    plot_parts(parts, output / "shot_curves.svg")
    title = "Quickstart: learning tasks from examples"
    return write_report(output / "results", output / "report.html", parts=parts, title=title)


def _print_difference(part: Part, console: Console) -> None:
    """Say in one sentence what fine-tuning changed at the most shots, with its interval."""
    from manyicl.evaluation.summary import OVERALL

    summary = part.summary
    most = max(summary.shots)
    base, tuned = summary.models
    scores = [(name, score) for name in (base, tuned) if (score := summary.score(name, OVERALL, most))]
    difference = summary.difference(base, tuned, OVERALL, most)
    if difference is None or len(scores) < 2:
        return
    means = ", ".join(f"{name} {score.mean:.2f}{_margin(score)}" for name, score in scores)
    paired = "paired difference" if difference.pairing == "paired" else "difference, not paired,"
    console.print(
        f"{part.title} at {most} shots, mean over families with 95 % interval: {means}; "
        f"{paired} {difference.mean:+.2f}{_margin(difference)}.",
        highlight=False,
    )


def _margin(estimate: Estimate) -> str:
    if estimate.interval is None:
        return ""
    low, high = estimate.interval
    return f" ± {(high - low) / 2:.2f}"
