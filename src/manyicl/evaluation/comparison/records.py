"""What a comparison leaves on the disk: its file, the roles of its tasks, its cells, and their results.

::

    OUTPUT/
      comparison.yaml     the resolved file
      tasks.json          role, family and source of each task
      cells.json          names of the models; trials.json: those of the trials
      imported.json       fingerprint of the answers of each other system that comparison.yaml names
      rates/CELL/         a trial of a learning rate: cell.json, done.json, model/
      rates/chosen.json   the rates that were chosen by them
      runs/CELL/          a training with the chosen rate, evaluated: cell.json, done.json (a `CellRecord`), model/
      results/            records of the evaluations; `model_name` is the name of a cell
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from manyicl.errors import UserError
from manyicl.evaluation.comparison.settings import Comparison, Regime
from manyicl.evaluation.grid import CELL_FILE, DONE_FILE, FAILED_FILE, Cell, CellReport, CellState, Grid, Rules, parsed
from manyicl.evaluation.result import RESULTS_ENDING, Result, ResultStore

COMPARISON_FILE, TASKS_FILE = "comparison.yaml", "tasks.json"
CELLS_FILE, TRIALS_FILE = "cells.json", "trials.json"
IMPORTED_FILE = "imported.json"
RATES_FOLDER, RUNS_FOLDER, RESULTS_FOLDER = "rates", "runs", "results"
# The model_name of imported answers begins so.
IMPORTED = "import_"
# In the folder of a cell.
MODEL_FOLDER = "model"

Role = Literal["seen", "unseen", "validation", "probe"]
Equal = Literal["tokens", "steps", "answers"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskRole(_Record):
    """What a task is in a comparison."""

    role: Role = Field(
        description="seen: trained on, evaluated on its test rows; unseen: only evaluated; validation: learning rates "
        "are chosen on it; probe: neither trained on nor similar to what is."
    )
    family: str
    source: str = Field(description="What the task was drawn from.")


class Forgetting(_Record):
    """What was measured of a model at one moment of its training, besides its tasks."""

    step: int = Field(ge=0, description="Optimizer steps before it; 0 is the base.")
    nats_per_token: float | None = Field(None, description="Mean loss on general text.")
    nats_per_byte: float | None = Field(None, description="The same per byte of UTF-8, whatever the tokenizer.")
    num_tokens: int | None = Field(None, description="Tokens of text that were scored.")
    text_sha256: str | None = Field(None, description="Hash of the text.")
    probes: dict[str, float] = Field(default_factory=dict, description="Probe task -> score.")


class PositionScore(_Record):
    """How a model answers the demonstrations of a sequence by their position, each given those before it."""

    task: str
    first: int = Field(ge=0, description="First position, from 0; so many demonstrations come before it.")
    last: int = Field(ge=0, description="Last position.")
    num_answers: int = Field(ge=1)
    accuracy: float | None = Field(None, description="Share of right answers; None for free answers.")
    nats_per_answer: float


class CellRecord(_Record):
    """A finished cell: how the model was adapted, and at what cost."""

    name: str = Field(description="Name of the cell, and the model_name of its results.")
    regime: Regime
    replay: bool = Field(False, description="General text was mixed in.")
    variant: str | None = Field(None, description="Ablation of all_answers.")
    equal: Equal = Field(
        description="What its budget has in common with the others; answers: all_answers with as many supervised "
        "answers as last_answer."
    )
    training_seed: int
    task: str | None = Field(None, description="Task of a dedicated model.")
    num_examples: int | None = Field(None, description="Examples that a dedicated model was trained on.")
    learning_rate: float | None = None
    num_steps: int = 0
    num_tokens: int = 0
    num_answers: int = Field(0, description="Supervised answers.")
    seconds: float = Field(0, description="Time of training at the speed since its start or last resume.")
    peak_memory_gib: float | None = None
    model_fingerprint: str
    forgetting: tuple[Forgetting, ...] = ()
    positions: tuple[PositionScore, ...] = ()


class _RulesOfRecords(Rules):
    result = TypeAdapter(CellRecord)


@dataclass(frozen=True)
class ComparisonRecords:
    """Everything that is known of a comparison.

    Attributes:
        settings: The resolved file.
        roles: Role of each task by its name.
        cells: Finished cells, in the order of the plan.
        failures: Cells that failed, wait, run or were interrupted.
        results: Results of all evaluations, in the order of their creation; of imported answers, those of the files
            that the comparison names now.
        failed_trials: Trials of learning rates that failed, of regimes that are compared.
    """

    settings: Comparison
    roles: Mapping[str, TaskRole]
    cells: tuple[CellRecord, ...]
    failures: tuple[CellReport, ...]
    results: tuple[Result, ...]
    failed_trials: tuple[CellReport, ...] = ()

    @property
    def failed(self) -> tuple[CellReport, ...]:
        """Return the cells and the trials that failed."""
        return (*(report for report in self.failures if report.failure is not None), *self.failed_trials)

    @classmethod
    def load(cls, folder: str | Path) -> ComparisonRecords:
        """Read the folder of a comparison, finished or not.

        Raises:
            UserError: If it holds none, or a record is broken.
        """
        folder = Path(folder)
        if not is_comparison(folder):
            what, remedy = "the folder holds no comparison", "Run `manyicl compare` first."
            raise UserError("no_comparison", what, expected=COMPARISON_FILE, remedy=remedy, file=folder)
        settings = Comparison.read(folder / COMPARISON_FILE)
        roles = parsed(TypeAdapter(dict[str, TaskRole]), folder / TASKS_FILE)
        names = parsed(TypeAdapter(list[str]), folder / CELLS_FILE)
        reports = [report_of(folder / RUNS_FOLDER, name, _RulesOfRecords()) for name in names]
        cells = [CellRecord.model_validate(report.result) for report in reports if report.state is CellState.DONE]
        failures = [report for report in reports if report.state is not CellState.DONE]
        results = _current(results_in(folder), settings, folder)
        trials = (report_of(folder / RATES_FOLDER, name) for name in _failed_trials(folder))
        failed_trials = tuple(report for report in trials if report.state is CellState.FAILED)
        return cls(settings, roles, tuple(cells), tuple(failures), tuple(results), failed_trials)


def _failed_trials(folder: Path) -> list[str]:
    """Name the trials that failed; those of regimes that are no longer compared decide nothing."""
    failed = sorted(path.parent.name for path in (folder / RATES_FOLDER).glob(f"*/{FAILED_FILE}"))
    file = folder / TRIALS_FILE
    # Earlier versions did not write it.
    return sorted({*failed} & {*parsed(TypeAdapter(list[str]), file)}) if file.is_file() else failed


def _current(results: Iterable[Result], settings: Comparison, folder: Path) -> Iterator[Result]:
    """Leave out imported answers that the comparison no longer names, and those of an earlier content of a file."""
    file = folder / IMPORTED_FILE
    # Earlier versions did not write it.
    fingerprints = parsed(TypeAdapter(dict[str, str]), file) if file.is_file() else {}
    for result in results:
        name = result.model_name.removeprefix(IMPORTED)
        is_imported = name != result.model_name
        is_named = name in settings.compare.predictions
        if not is_imported or (is_named and fingerprints.get(name) in (None, result.model_fingerprint)):
            yield result


def is_comparison(folder: Path) -> bool:
    """Tell whether a folder is that of a comparison."""
    return all((folder / name).is_file() for name in (COMPARISON_FILE, TASKS_FILE, CELLS_FILE))


def results_in(folder: Path) -> list[Result]:
    """Load the results of all evaluations of a comparison; none where nothing was evaluated yet.

    Raises:
        UserError: If a record is damaged.
    """
    results = folder / RESULTS_FOLDER
    return ResultStore(results).load() if any(results.glob(f"*{RESULTS_ENDING}")) else []


def report_of(folder: Path, name: str, rules: Rules | None = None) -> CellReport:
    """Look at one cell of a grid as it is on the disk; nothing is written where it has not started."""
    place = folder / name
    if not any((place / file).is_file() for file in (CELL_FILE, DONE_FILE, FAILED_FILE)):
        return CellReport(Cell(name, {}), CellState.WAITING)
    file = place / CELL_FILE
    settings = parsed(TypeAdapter(dict[str, Any]), file) if file.is_file() else {}
    (report,) = Grid(folder, [Cell(name, settings)], rules).reports()
    return report
