"""`manyicl quickstart`: the whole job, offline, on a tiny model and procedural tasks."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyicl.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from manyicl.evaluation.result import Result
    from manyicl.evaluation.uncertainty import Estimate
    from manyicl.training.recipe import Recipe

SHOTS = (0, 1, 2, 4, 8, 16, 32, 64)
NUM_SEEDS = 3
NUM_QUERIES = 20
BASE_NAME, TUNED_NAME = "base", "fine-tuned"


def quickstart_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of tasks, model, results and report.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the task world, the training and the evaluation.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew instead of using what is there.")] = False,
) -> None:
    """Fine-tune a tiny model on tasks and see how it learns unseen ones from examples, offline, in minutes.

    It writes a world of procedural tasks in five families, fine-tunes the tiny base model of the package on its
    training tasks with every answer supervised, evaluates base and fine-tuned model on tasks whose rules neither
    has seen, with 0 to 64 examples in context, and writes a report. A second run uses what the first one made.

    Examples:

        manyicl quickstart

        manyicl quickstart --output /tmp/quickstart --seed 1
    """
    from rich.console import Console

    console = Console()
    console.rule("1  tasks")
    training_folder, unseen_folder = _write_tasks(output / "tasks", seed, console)
    console.rule("2  fine-tuning on every answer of the training tasks")
    recipe = quickstart_recipe(output, training_folder, seed)
    _fine_tune(recipe, console, fresh=fresh)
    console.rule("3  unseen tasks, with 0 to 64 examples in context")
    results = _measure(recipe, unseen_folder, output / "results", seed, console)
    report = _report(results, output, console)
    console.rule("done")
    console.print(f"Report with plots and worked predictions: {report}", highlight=False)
    first_task = sorted(training_folder.iterdir())[0]
    console.print(f"What was supervised: manyicl tasks show {first_task} --shots 3", highlight=False)
    console.print("Answers to your own queries: manyicl predict --help", highlight=False)


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


def _measure(recipe: Recipe, unseen_folder: Path, folder: Path, seed: int, console: Console) -> list[Result]:
    """Measure base and fine-tuned model on the unseen tasks."""
    from manyicl.cli.evaluate import measure_with_progress
    from manyicl.engine.engine import Engine
    from manyicl.evaluation.shot_curve import EvaluationSettings
    from manyicl.tasks.files import load_tasks

    settings = EvaluationSettings(shots=SHOTS, num_seeds=NUM_SEEDS, num_queries=NUM_QUERIES, seed=seed)
    unseen = load_tasks([str(unseen_folder)])
    results: list[Result] = []
    for name, reference in ((BASE_NAME, str(recipe.model.base)), (TUNED_NAME, str(recipe.output))):
        engine = Engine.from_pretrained(reference)
        results += measure_with_progress(engine, unseen, folder, settings, name, console).results
    return results


def _report(results: list[Result], output: Path, console: Console) -> Path:
    """Print the table, and write the plot and the page."""
    from manyicl.evaluation.report import plot_shot_curves, print_table, write_report

    print_table(results, console)
    _print_difference(results, console)
    plot_shot_curves(results, output / "shot_curves.svg")
    return write_report(
        output / "results", output / "report.html", only=results, title="Quickstart: learning unseen tasks"
    )


def _print_difference(results: list[Result], console: Console) -> None:
    """Say in one sentence what fine-tuning changed at the most shots, with its interval."""
    from manyicl.evaluation.summary import OVERALL, summarise

    summary = summarise(results)
    most = max(summary.shots)
    scores = [summary.score(name, OVERALL, most) for name in (BASE_NAME, TUNED_NAME)]
    difference = summary.difference(BASE_NAME, TUNED_NAME, OVERALL, most)
    if difference is None or None in scores:
        return
    base, tuned = (f"{score.mean:.2f}{_margin(score)}" for score in scores if score)
    paired = "paired difference" if difference.pairing == "paired" else "difference, not paired,"
    console.print(
        f"Unseen tasks at {most} shots, mean over families with 95 % interval: base {base}, fine-tuned {tuned}; "
        f"{paired} {difference.mean:+.2f}{_margin(difference)}.",
        highlight=False,
    )


def _margin(estimate: Estimate) -> str:
    if estimate.interval is None:
        return ""
    low, high = estimate.interval
    return f" ± {(high - low) / 2:.2f}"
