"""The work of a comparison: try learning rates, train, evaluate; every step of it can be interrupted and resumed.

Several processes may work on one comparison. Each takes cells that no other one works on. The learning rate of a regime
follows from all of its trials, so a process that has none left waits for those that others work on.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console
from transformers import TrainerState

from manyicl.activity import Activity
from manyicl.atomic import is_leftover, write_atomically
from manyicl.engine.engine import Engine
from manyicl.episodes.chat_template import chosen_format
from manyicl.episodes.text_format import AnyFormat
from manyicl.errors import UserError, pluralized
from manyicl.evaluation.comparison.base_weights import base_weights
from manyicl.evaluation.comparison.budgets import Length, budget_problems, lengths_of
from manyicl.evaluation.comparison.cells import (
    Run,
    Trial,
    evaluated_tasks,
    evaluation_of,
    measured_along,
    planned_runs,
    planned_trials,
    recipe_of_run,
    recipe_of_trial,
    run_tasks,
    settings_of_run,
    settings_of_trial,
    trial_tasks,
)
from manyicl.evaluation.comparison.checks import comparison_problems, require_possible, text_problems
from manyicl.evaluation.comparison.choosing import CHOSEN_FILE, Choice, choose, known_choices, write_choices
from manyicl.evaluation.comparison.forgetting_along import ForgettingOfModels
from manyicl.evaluation.comparison.records import (
    CELLS_FILE,
    COMPARISON_FILE,
    IMPORTED,
    IMPORTED_FILE,
    MODEL_FOLDER,
    RATES_FOLDER,
    RESULTS_FOLDER,
    RUNS_FOLDER,
    TASKS_FILE,
    TRIALS_FILE,
    CellRecord,
    ComparisonRecords,
    PositionScore,
    is_comparison,
    results_in,
)
from manyicl.evaluation.comparison.roles import ComparisonTasks, load_comparison_tasks
from manyicl.evaluation.comparison.rules import BASE_WEIGHTS, RulesOfRuns, RulesOfTrials
from manyicl.evaluation.comparison.settings import Comparison
from manyicl.evaluation.grid import LOCK_FILE, Cell, CellReport, CellState, Grid
from manyicl.evaluation.held_out import held_out_measure
from manyicl.evaluation.imported import export_queries, fingerprint_of, import_predictions
from manyicl.evaluation.positions import score_positions
from manyicl.evaluation.result import hash_of
from manyicl.evaluation.shot_curve import EvaluationSettings, choose_queries, measure_shot_curves
from manyicl.model.load import LoadedModel, load_model, load_tokenizer
from manyicl.model.manifest import Manifest
from manyicl.outputs import require_output_folder
from manyicl.printing import new_console, say
from manyicl.training.checkpoint import Checkpoints
from manyicl.training.counts import RunCounts, SequenceCounts
from manyicl.training.job import TrainedRun, ensure_trained
from manyicl.training.throughput import forget_peak

# Log and counts of a training, kept in the folder of its cell when the checkpoints go.
HISTORY_FILE = "history.json"
# Queries of the evaluation, for other systems to answer, and a hash of all that they depend on.
QUERIES_FILE, QUERIES_HASH_FILE = "queries.jsonl", "queries.hash"
# A kill may leave no more than these.
BEFORE_THE_FIRST_FILE = (LOCK_FILE, IMPORTED_FILE, TASKS_FILE, CELLS_FILE, TRIALS_FILE)
SECONDS_BETWEEN_LOOKS = 2.0
UNSETTLED = {CellState.WAITING, CellState.RUNNING, CellState.INTERRUPTED}


@dataclass(frozen=True)
class PreparedComparison:
    """A comparison that can start: its tasks, the length of each training, and its cells.

    Attributes:
        settings: The comparison.
        tasks: Its tasks.
        lengths: Length of each kind of training.
        trials: Trials of learning rates.
        runs: Models of the comparison.
        found: The file of the comparison that the folder held; None where it held none.
    """

    settings: Comparison
    tasks: ComparisonTasks
    lengths: Mapping[str, Length]
    trials: tuple[Trial, ...]
    runs: tuple[Run, ...]
    found: str | None = None

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return self.settings.output

    @cached_property
    def rates(self) -> Grid:
        """The grid of the trials.

        Raises:
            UserError: If the folder holds another trial under a name.
        """
        return Grid(self.folder / RATES_FOLDER, map(self._trial_cell, self.trials), RulesOfTrials(self.settings))

    @cached_property
    def models(self) -> Grid:
        """The grid of the models.

        Raises:
            UserError: If the folder holds another model under a name.
        """
        return Grid(self.folder / RUNS_FOLDER, map(self._run_cell, self.runs), RulesOfRuns(self.settings))

    def _trial_cell(self, trial: Trial) -> Cell:
        recipe = recipe_of_trial(trial, self.settings, self.lengths, Path(MODEL_FOLDER))
        return self._cell(trial.name, settings_of_trial(trial, self.tasks, recipe))

    def _run_cell(self, run: Run) -> Cell:
        recipe = None
        if run.length is not None:
            rate = self.settings.learning_rates[0]
            recipe = recipe_of_run(run, self.settings, self.lengths, Path(MODEL_FOLDER), rate)
        return self._cell(run.name, settings_of_run(run, self.settings, self.tasks, recipe))

    @cached_property
    def _base_weights(self) -> str | None:
        return base_weights(self.settings.model.base)

    def _cell(self, name: str, settings: Mapping[str, Any]) -> Cell:
        known = {} if self._base_weights is None else {BASE_WEIGHTS: self._base_weights}
        return Cell(name, {**known, **settings})

    def settled_choices(self) -> Mapping[str, Choice | UserError] | None:
        """Return the learning rates that the trials tell; the only one where none are tried.

        A rate is chosen once, for all processes and for good: a trial that is tried again later changes nothing. None
        where a trial has not ended, as one that another process tries again.
        """
        rates = self.settings.learning_rates
        if not self.settings.is_tuned:
            return {run.choice: Choice(rates[0]) for run in self.runs if run.length}
        file = self.rates.folder / CHOSEN_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.rates.folder / LOCK_FILE):
            chosen = known_choices(file, rates)
            missing = [trial for trial in self.trials if trial.choice not in chosen]
            reports = {report.cell.name: report for report in self.rates.reports()}
            if any(reports[trial.name].state in UNSETTLED for trial in missing):
                return None
            found = choose(missing, [reports[trial.name] for trial in missing])
            chosen |= {name: choice for name, choice in found.items() if isinstance(choice, Choice)}
            write_choices(file, rates, chosen)
        return {**found, **chosen}

    def missing_results(self) -> dict[str, str]:
        """Say of each model that is done and not all of whose results are there, by its name, how many are missing.

        Raises:
            UserError: If a record is damaged.
        """
        folder = self.folder / RESULTS_FOLDER
        # States first: another process may finish a cell meanwhile, and its results are there before it is done.
        reports = self.models.reports()
        known = {(one.model_name, one.task, one.num_shots, one.seed, one.order) for one in results_in(self.folder)}
        sentences = {}
        for run, report in zip(self.runs, reports, strict=True):
            expected = {
                (run.name, task.name, point.num_shots, point.seed, point.order)
                for task in evaluated_tasks(run, self.tasks)
                for point in evaluation_of(run, self.settings).points()
            }
            if report.state is CellState.DONE and (missing := expected - known):
                number = f"{len(missing):,} of {pluralized(len(expected), 'result')}"
                sentences[run.name] = f"{run.name}: {number} missing in {folder}; it is evaluated again."
        return sentences


def prepare(settings: Comparison, activity: Activity | None = None) -> PreparedComparison:
    """Load the tasks, and check all that can be known before anything is trained. Nothing is written.

    Raises:
        UserError: With everything that is wrong.
    """
    activity = activity or Activity()
    require_output_folder(settings.output)
    others = (
        path for path in settings.output.glob("*") if path.name not in BEFORE_THE_FIRST_FILE and not is_leftover(path)
    )
    if settings.output.is_dir() and any(others) and not is_comparison(settings.output):
        what, remedy = "the output is not empty and holds no comparison", "Use another output."
        raise UserError("output_exists", what, remedy=remedy, file=settings.output)
    found = _comparison_file(settings.output)
    activity.begin("reading tasks")
    tasks = load_comparison_tasks(settings, activity.show)
    problems = list(comparison_problems(settings, tasks))
    assert settings.model.base is not None
    try:
        tokenizer = load_tokenizer(settings.model.base)
    except UserError as error:
        require_possible(problems or [error])
        raise
    # Packed sequences of tasks that do not fit cannot be looked at.
    require_possible([*problems, *text_problems(settings, tokenizer)])
    lengths = lengths_of(settings, tasks, tokenizer, activity)
    require_possible(budget_problems(settings, lengths))
    trials, runs = planned_trials(settings, tasks), planned_runs(settings, tasks)
    prepared = PreparedComparison(settings, tasks, lengths, trials, runs, found)
    # Both are compared with what the folder holds, and so is what is done or failed.
    prepared.rates.reports()
    prepared.models.reports()
    return prepared


def run_comparison(
    settings: Comparison, *, retry_failed: bool = False, console: Console | None = None
) -> ComparisonRecords:
    """Train and evaluate all models of a comparison, those aside that are done or that other processes work on.

    Args:
        settings: The comparison.
        retry_failed: Try failed cells again, and failed trials of regimes of which no model has started.
        console: Where progress is shown; None for standard error.

    Raises:
        UserError: With everything that is wrong, before anything is trained.
        KeyboardInterrupt: If a signal stops it; the same call resumes.
    """
    console = console or new_console(stderr=True)
    with Activity(console, quiet=console.quiet) as activity:
        prepared = prepare(settings, activity)
    work = _Work(prepared, console)
    _write_files(prepared)
    work.exchange_predictions()
    work.try_rates(retry_failed=retry_failed)
    work.train_models(retry_failed=retry_failed)
    return ComparisonRecords.load(prepared.folder)


def _comparison_file(folder: Path) -> str | None:
    file = folder / COMPARISON_FILE
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _write_files(prepared: PreparedComparison) -> None:
    """Write what is compared; a comparison to which cells are added is written anew.

    Raises:
        UserError: If another process has written something else since this one has looked.
    """
    folder = prepared.folder
    folder.mkdir(parents=True, exist_ok=True)
    roles = {name: role.model_dump(mode="json") for name, role in prepared.tasks.roles().items()}
    imported = {name: fingerprint_of(path) for name, path in prepared.settings.compare.predictions.items()}
    text = prepared.settings.to_yaml()
    with FileLock(folder / LOCK_FILE):
        if (now := _comparison_file(folder)) not in (prepared.found, text):
            what = "another process began a comparison with other settings here" if now else "the file was removed"
            remedy = "Compare into another output, or start again with the settings of the file."
            raise UserError("another_comparison", what, remedy=remedy, file=folder / COMPARISON_FILE)
        for name, content in (
            (IMPORTED_FILE, json.dumps(imported, indent=2) + "\n"),
            (TASKS_FILE, json.dumps(roles, ensure_ascii=False, indent=2) + "\n"),
            (CELLS_FILE, json.dumps([run.name for run in prepared.runs], indent=2) + "\n"),
            (TRIALS_FILE, json.dumps([trial.name for trial in prepared.trials], indent=2) + "\n"),
            (COMPARISON_FILE, text),
        ):
            write_atomically(folder / name, content)


class _Work:
    """One process at work on a comparison."""

    def __init__(self, prepared: PreparedComparison, console: Console) -> None:
        self.prepared = prepared
        self.settings = prepared.settings
        self.console = console
        self.trials = {trial.name: trial for trial in prepared.trials}
        self.runs = {run.name: run for run in prepared.runs}
        self.choices: Mapping[str, Choice | UserError] = {}
        is_measured = prepared.settings.compare.forgetting is not None
        self.forgetting = ForgettingOfModels(prepared.settings, prepared.tasks) if is_measured else None

    def try_rates(self, *, retry_failed: bool) -> None:
        """Score every learning rate, wait for the trials of other processes, and choose."""
        rates = self.prepared.rates
        if self.trials:
            rates.run(self._try, on_report=self._say)
            if retry_failed:
                self._free_choices().run(self._try, retry_failed=True, on_report=self._say)
            self._wait_for_others(rates)
        while (choices := self.prepared.settled_choices()) is None:
            self._wait_for_others(rates)
        self.choices = choices
        for name, choice in self.choices.items():
            say(self.console, str(choice) if isinstance(choice, UserError) else choice.sentence(name))

    def _free_choices(self) -> Grid:
        """Return the trials of what is still free to be chosen."""
        models = self.prepared.models.folder
        # Earlier versions did not write what was chosen.
        fixed = {run.choice for run in self.prepared.runs if (models / run.name / MODEL_FOLDER).is_dir()}
        fixed |= known_choices(self.prepared.rates.folder / CHOSEN_FILE, self.settings.learning_rates).keys()
        free = [cell for cell in self.prepared.rates.cells if self.trials[cell.name].choice not in fixed]
        for report in self.prepared.rates.reports():
            choice = self.trials[report.cell.name].choice
            if report.state is CellState.FAILED and choice in fixed:
                say(self.console, f"{report.cell.name} is not tried again: the rate of {choice} was chosen without it.")
        return Grid(self.prepared.rates.folder, free, self.prepared.rates.rules)

    def _wait_for_others(self, grid: Grid) -> None:
        """Wait until other processes have ended their trials; take over those that they leave."""
        reports = grid.reports()
        while any(report.state in UNSETTLED for report in reports):
            with self._activity("waiting for trials") as activity:
                # A trial that nobody works on is left, or was: then the wait ends, and so does its bar.
                while (states := Counter(report.state for report in reports)).keys() & UNSETTLED == {CellState.RUNNING}:
                    trials = pluralized(states[CellState.RUNNING], "trial")
                    activity.begin(f"waiting for {trials} of learning rates that other processes work on")
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                    reports = grid.reports()
            reports = grid.run(self._try, on_report=self._say)

    def train_models(self, *, retry_failed: bool) -> None:
        """Train and evaluate the models."""
        self._reopen_without_results()
        self.prepared.models.run(self._train_and_evaluate, retry_failed=retry_failed, on_report=self._say)

    def _reopen_without_results(self) -> None:
        """Let models whose results are gone be evaluated again, and trained again only where they are gone, too."""
        models = self.prepared.models
        sentences = self.prepared.missing_results()
        for cell in models.cells:
            if (sentence := sentences.get(cell.name)) is not None and models.reopen(cell):
                say(self.console, sentence)

    @contextmanager
    def _activity(self, what: str, total: int | None = None) -> Iterator[Activity]:
        """Show what is done while the block runs; a training has an activity of its own."""
        with Activity(self.console, quiet=self.console.quiet) as activity:
            activity.begin(what, total)
            yield activity

    def _say(self, report: CellReport) -> None:
        say(self.console, report.sentence())

    def _begin(self, what: str, cell: Cell, cells: Sequence[Cell]) -> None:
        number = [each.name for each in cells].index(cell.name) + 1
        say(self.console, f"{what} {cell.name}, {number:,} of {len(cells):,}")

    def _try(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """Train a trial and return its scores by step."""
        self._begin("Trial", cell, self.prepared.rates.cells)
        trial = self.trials[cell.name]
        recipe = recipe_of_trial(trial, self.settings, self.prepared.lengths, folder / MODEL_FOLDER)
        tasks = trial_tasks(trial, self.prepared.tasks)
        run = _finished(ensure_trained(recipe, tasks, held_out_measure, console=self.console))
        history = _kept_history(run, folder)
        scores = {entry["step"]: entry["eval_score"] for entry in history.log_history if "eval_score" in entry}
        return {"learning_rate": trial.learning_rate, "scores": scores, **_costs(run, history)}

    def _train_and_evaluate(self, cell: Cell, folder: Path) -> dict[str, Any]:
        """Train a model, evaluate it, and return its record."""
        self._begin("Model", cell, self.prepared.models.cells)
        run = self.runs[cell.name]
        engine, known = self._untrained(run) if run.length is None else self._trained(run, folder)
        self._evaluate(run, engine)
        if run.task is None:
            known["positions"] = self._positions(run, engine)
        record = CellRecord(
            name=run.name,
            regime=run.regime,
            replay=run.replay,
            variant=run.variant,
            equal=run.equal,
            training_seed=run.seed,
            task=run.task.name if run.task else None,
            num_examples=run.num_examples,
            model_fingerprint=engine.identity.fingerprint,
            **known,
        )
        return record.model_dump(mode="json")

    def _untrained(self, run: Run) -> tuple[Engine, dict[str, Any]]:
        """Return an engine of the base, and what is known of it."""
        known: dict[str, Any] = {}
        loaded, text_format = self._base()
        # The same for every seed.
        if self.forgetting is not None and run.draw == 0:
            known = {"forgetting": self.forgetting.of_base(loaded, text_format)}
        return self._base_engine(loaded, text_format), known

    def _trained(self, run: Run, folder: Path) -> tuple[Engine, dict[str, Any]]:
        """Train a model, and return an engine of it and what is known of its training.

        Raises:
            UserError: If no learning rate could be chosen.
        """
        choice = self.choices[run.choice]
        if isinstance(choice, UserError):
            raise choice
        recipe = recipe_of_run(
            run, self.settings, self.prepared.lengths, folder / MODEL_FOLDER, choice.learning_rate, choice.num_steps
        )
        tasks = run_tasks(run, self.settings, self.prepared.tasks)
        # A dedicated model is used for its task alone.
        along = self.forgetting if run.task is None else None
        measured, measure = (measured_along(recipe), along.along) if along else (recipe, None)
        forget_peak()
        trained = _finished(ensure_trained(measured, tasks, measure, console=self.console))
        history = _kept_history(trained, folder)
        known = {"learning_rate": choice.learning_rate, **_costs(trained, history)}
        known |= {"forgetting": along.of_log(history)} if along else {}
        return self._engine(str(trained.folder)), known

    def _base(self) -> tuple[LoadedModel, AnyFormat]:
        """Load the base, and return how the models that come from it are prompted."""
        settings = self.settings
        assert settings.model.base is not None
        with self._activity(f"loading {settings.model.base}"):
            loaded = load_model(settings.model.base, dtype=settings.model.dtype)
        return loaded, chosen_format(settings.format, loaded.tokenizer, self.prepared.tasks.evaluated)

    def _base_engine(self, loaded: LoadedModel, text_format: AnyFormat) -> Engine:
        length = self.settings.sequences.max_context_tokens
        return Engine.local(loaded, merge=True, text_format=text_format, max_context_tokens=length)

    def _engine(self, folder: str) -> Engine:
        """Load a trained model; all models are given contexts as long as a training sequence."""
        length = self.settings.sequences.max_context_tokens
        with self._activity(f"loading {folder}"):
            return Engine.from_pretrained(folder, dtype=self.settings.model.dtype, max_context_tokens=length)

    def _positions(self, run: Run, engine: Engine) -> list[PositionScore]:
        """Score the demonstrations of a sequence of each task by their position, if the context holds any."""
        num_examples, sampling = max(self.settings.shots), self.settings.sequences.sampling
        found: list[PositionScore] = []
        if num_examples == 0:
            return found
        with self._activity(f"scoring demonstrations by position, {run.name}") as activity:
            for task in activity.counting(self.prepared.tasks.evaluated):
                try:
                    found += score_positions(engine, task, num_examples, run.draw, sampling=sampling)
                except UserError as error:
                    if error.code != "no_shot_fits":
                        raise
                    say(self.console, f"{run.name}: not scored by position, {error}")
        return found

    def exchange_predictions(self) -> None:
        """Write the queries for other systems, and score the answers of those that have answered.

        Raises:
            UserError: If a file of answers does not answer exactly these queries.
        """
        file, written_for = self.prepared.folder / QUERIES_FILE, self.prepared.folder / QUERIES_HASH_FILE
        predictions = self.settings.compare.predictions
        settings = EvaluationSettings(
            shots=(0,), num_queries=self.settings.compare.num_queries, seed=self.settings.training.seed
        )
        hashes = [task.data_hash for task in self.prepared.tasks.evaluated]
        identity = hash_of(settings.model_dump_json(), str(self.settings.sequences.max_context_tokens), *hashes) + "\n"
        is_current = file.is_file() and written_for.is_file() and written_for.read_text(encoding="utf-8") == identity
        if is_current and not predictions:
            return
        say(self.console, f"Writing the queries of all tasks to {file}.")
        engine = self._base_engine(*self._base())
        tasks = [choose_queries(engine, task, settings)[0] for task in self.prepared.tasks.evaluated]
        export_queries(tasks, file)
        write_atomically(written_for, identity)
        results = self.prepared.folder / RESULTS_FOLDER
        for name, path in predictions.items():
            import_predictions(path, f"{IMPORTED}{name}", tasks, results, settings)

    def _evaluate(self, run: Run, engine: Engine) -> None:
        """Measure the shot curves of a model."""
        tasks, settings = evaluated_tasks(run, self.prepared.tasks), evaluation_of(run, self.settings)
        with self._activity(f"evaluating {run.name}", len(tasks) * len(settings.points())) as activity:
            measure_shot_curves(
                engine,
                tasks,
                self.prepared.folder / RESULTS_FOLDER,
                settings,
                model_name=run.name,
                on_result=lambda result, was_found: activity.advance(found=was_found),
                activity=activity,
            )


def _finished(run: TrainedRun) -> TrainedRun:
    """Return a run that is finished.

    Raises:
        KeyboardInterrupt: If a signal ended it early, and its checkpoint stays; or came in its last step, and the
            finished run is found when the comparison resumes.
    """
    if not run.finished or run.was_signalled:
        raise KeyboardInterrupt
    return run


def _kept_history(run: TrainedRun, cell_folder: Path) -> TrainerState:
    """Keep the log and the counts of a finished training, and remove its checkpoints, which are large and many."""
    checkpoints, file = Checkpoints(run.folder / "checkpoints"), cell_folder / HISTORY_FILE
    newest = checkpoints.newest()
    if newest is not None:
        write_atomically(file, (newest / "trainer_state.json").read_text(encoding="utf-8"))
        checkpoints.rotate(0)
    history: TrainerState = TrainerState.load_from_json(str(file))
    return history


def _costs(run: TrainedRun, history: TrainerState) -> dict[str, Any]:
    """Return what a training took; its time is that of all its tokens at the speed since its start or last resume."""
    manifest = Manifest.read(run.folder)
    speed = manifest.throughput if manifest else {}
    saved: Mapping[str, Any] = history.stateful_callbacks  # type: ignore[assignment]
    counts = SequenceCounts(**saved[RunCounts.__name__]["attributes"]["total"])
    per_second = speed.get("tokens_per_second", 0.0)
    return {
        "num_steps": history.global_step,
        "num_tokens": counts.num_tokens,
        "num_answers": counts.num_answers,
        "seconds": counts.num_tokens / per_second if per_second else 0.0,
        "peak_memory_gib": speed.get("peak_memory_gib"),
    }
