"""A grid of cells, such as recipes times evaluation settings: run one by one, resumable, with the state on disk.

::

    grid/
      lora_seed0/
        cell.json          what the cell is; another content under the same name is refused
        done.json          what its work returned, once it is done
        failed.json        why its work failed
        …                  what its work writes: a run folder, records

Several processes may work on one grid, also on several machines that share its folder: each takes cells that nobody
else is working on. A cell that was interrupted is taken up again; its work must resume, as `ensure_trained` and
`measure_shot_curves` do.
"""

from __future__ import annotations

import json
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from manyicl.atomic import write_atomically
from manyicl.errors import UserError

CELL_FILE, DONE_FILE, FAILED_FILE, LOCK_FILE = "cell.json", "done.json", "failed.json", ".lock"


class CellState(Enum):
    """How far a cell is."""

    WAITING = "waiting"
    INTERRUPTED = "interrupted"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True)
class Cell:
    """One point of a grid.

    Attributes:
        name: Name of the cell and of its folder.
        settings: Everything that decides its result, as JSON: a dumped recipe, evaluation settings.
    """

    name: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class CellReport:
    """What is known of a cell.

    Attributes:
        cell: The cell.
        state: How far it is.
        result: What its work returned; None unless it is done.
        failure: Why its work failed, the fields of an error; None unless it failed.
    """

    cell: Cell
    state: CellState
    result: Any = None
    failure: Mapping[str, Any] | None = None

    def sentence(self) -> str:
        """Say how far the cell is."""
        reason = f": {self.failure['sentence']}" if self.failure else ""
        return f"{self.cell.name}: {self.state.value}{reason}"


Work = Callable[[Cell, Path], Any]


class Grid:
    """Cells and the folder of their states."""

    def __init__(self, folder: str | Path, cells: Iterable[Cell]) -> None:
        """Check the cells against what the folder holds; nothing is written.

        Raises:
            UserError: If two cells have one name, a name cannot be that of a folder, or the folder holds another
                cell of the same name.
        """
        self.folder = Path(folder)
        self.cells: Sequence[Cell] = tuple(cells)
        num_of_name = Counter(cell.name for cell in self.cells)
        for cell in self.cells:
            if num_of_name[cell.name] > 1 or not re.fullmatch(r"[\w-][\w.-]*", cell.name):
                expected = "a name of its own of letters, digits, '.', '_' and '-'"
                raise UserError("wrong_cell_name", f"the cell {cell.name!r} cannot have this name", expected=expected)
            file = self.folder / cell.name / CELL_FILE
            if file.is_file() and _read(file) != json.loads(_as_json(cell.settings)):
                what = f"the grid holds another cell named {cell.name!r}"
                raise UserError("another_cell", what, remedy="Give it another name, or use another folder.", file=file)

    def reports(self) -> list[CellReport]:
        """Look at every cell; this is the plan of the grid before it runs, and its summary afterwards."""
        return [self._report(cell) for cell in self.cells]

    def plan(self, describe: Callable[[Cell], Iterable[str]] | None = None) -> Iterator[str]:
        """Yield lines about the whole grid without running anything.

        Args:
            describe: Yields lines about a cell that is still to be done, such as those of `dry_run`; a mistake in it
                is a line as well, so that all are seen at once.
        """
        reports = self.reports()
        counts = {state: sum(report.state is state for report in reports) for state in CellState}
        yield f"{len(reports):,} cells: " + ", ".join(f"{n:,} {state.value}" for state, n in counts.items() if n)
        for report in reports:
            yield report.sentence()
            if describe is None or report.state is CellState.DONE:
                continue
            try:
                yield from (f"  {line}" for line in describe(report.cell))
            except UserError as error:
                yield f"  refused: {error}"

    def run(
        self, work: Work, *, retry_failed: bool = False, on_report: Callable[[CellReport], None] | None = None
    ) -> list[CellReport]:
        """Work on all cells that are not done and that nobody else is working on.

        A cell that fails is recorded and the others are worked on; failed ones are not tried again by default.

        Args:
            work: Trains and evaluates a cell in its folder, and returns a result that JSON can hold.
            retry_failed: Try failed cells again.
            on_report: Called after each cell that was worked on.

        Returns:
            What is known of every cell afterwards.
        """
        for cell in self.cells:
            with _taken(self.folder / cell.name) as is_taken:
                state = self._report(cell).state
                if not is_taken or state is CellState.DONE or (state is CellState.FAILED and not retry_failed):
                    continue
                self._work_on(cell, work)
            if on_report is not None:
                on_report(self._report(cell))
        return self.reports()

    def _work_on(self, cell: Cell, work: Work) -> None:
        folder = self.folder / cell.name
        (folder / FAILED_FILE).unlink(missing_ok=True)
        write_atomically(folder / CELL_FILE, _as_json(cell.settings))
        try:
            file, content = DONE_FILE, work(cell, folder)
        except Exception as error:  # whatever it is, it must not end the other cells
            other = {"sentence": f"{type(error).__name__}: {error}"}
            content = error.fields() if isinstance(error, UserError) else other
            file, content["traceback"] = FAILED_FILE, "".join(traceback.format_exception(error))
        write_atomically(folder / file, _as_json(content))

    def _report(self, cell: Cell) -> CellReport:
        folder = self.folder / cell.name
        if (folder / DONE_FILE).is_file():
            return CellReport(cell, CellState.DONE, result=_read(folder / DONE_FILE))
        if (folder / FAILED_FILE).is_file():
            return CellReport(cell, CellState.FAILED, failure=_read(folder / FAILED_FILE))
        if not (folder / CELL_FILE).is_file():
            return CellReport(cell, CellState.WAITING)
        with _taken(folder, timeout=0) as is_free:
            return CellReport(cell, CellState.INTERRUPTED if is_free else CellState.RUNNING)


@contextmanager
def _taken(folder: Path, timeout: float = 1) -> Iterator[bool]:
    """Keep other processes away from a cell; False where another one has it. A kill lets go, too.

    A process that looks at the state holds the lock for a moment, so that one who wants to work waits a little.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE, timeout=timeout)
    with suppress(Timeout):
        lock.acquire()
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _as_json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
