"""A grid of cells, such as recipes times evaluation settings: run one by one, resumable, with the state on disk.

::

    grid/
      lora_seed0/
        cell.json          what the cell is; another content under the same name is refused as long as it has left work
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
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, TypeAdapter, ValidationError

from manyicl.atomic import write_atomically
from manyicl.errors import UserError, quoted
from manyicl.library_errors import reason

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

    @property
    def reason(self) -> str | None:
        """Why its work failed, in a sentence; None unless it failed."""
        return self.failure["sentence"] if self.failure else None

    def sentence(self) -> str:
        """Say how far the cell is."""
        because = f": {self.reason}" if self.reason is not None else ""
        return f"{self.cell.name}: {self.state.value}{because}"


Work = Callable[[Cell, Path], Any]
ContentT = TypeVar("ContentT")


class _Failure(BaseModel):
    """What every record of a failure holds; there is more in it."""

    sentence: str


@dataclass(frozen=True)
class Change:
    """How the settings of a cell differ from those that its folder holds.

    Attributes:
        cell: The cell that is wanted.
        key: The first key whose value differs, with those above it, such as ``training.seed``.
        before: Its value in the folder; None where there is none.
        now: Its value in the cell that is wanted.
        file: File that holds the former settings.
    """

    cell: Cell
    key: str
    before: Any
    now: Any
    file: Path

    def error(self) -> UserError:
        """Return the refusal of a grid that nobody knows more about."""
        what = f"the grid holds another cell named {self.cell.name!r}: {self.key} was {quoted(self.before)}"
        remedy = "Give it another name, or use another folder."
        return UserError("another_cell", f"{what}, is {quoted(self.now)}", remedy=remedy, file=self.file)


class Rules:
    """What a grid leaves to those who know what its cells are.

    Attributes:
        optional: Keys of the settings that count only where both sides have them.
        result: What the work returns.
    """

    optional: frozenset[str] = frozenset()
    result: TypeAdapter[Any] = TypeAdapter(Any)

    def refusal(self, change: Change) -> UserError:
        """Return why a cell with other settings is refused."""
        return change.error()

    def may_replace(self, cell: Cell, folder: Path) -> bool:
        """Tell whether a cell that failed left nothing that depends on its settings, so that they may be others now."""
        return False


class Grid:
    """Cells and the folder of their states."""

    def __init__(self, folder: str | Path, cells: Iterable[Cell], rules: Rules | None = None) -> None:
        """Check the cells against what the folder holds; nothing is written.

        Args:
            folder: The folder of the grid.
            cells: Its cells.
            rules: What is known of cells like these; None for nothing.

        Raises:
            UserError: If two cells have one name, a name cannot be that of a folder, the folder holds another
                cell of the same name, or a file in it is damaged.
        """
        self.folder = Path(folder)
        self.rules = rules or Rules()
        self.cells: Sequence[Cell] = tuple(cells)
        num_of_name = Counter(cell.name for cell in self.cells)
        for cell in self.cells:
            if num_of_name[cell.name] > 1 or not re.fullmatch(r"[\w-][\w.-]*", cell.name):
                expected = "a name of its own of letters, digits, '.', '_' and '-'"
                raise UserError("wrong_cell_name", f"the cell {cell.name!r} cannot have this name", expected=expected)
            self._require_same(cell)

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
                # Another process may have started a cell of this name since this grid was made.
                self._require_same(cell)
                state = self._report(cell).state
                if not is_taken or state is CellState.DONE or (state is CellState.FAILED and not retry_failed):
                    continue
                self._work_on(cell, work)
            if on_report is not None:
                on_report(self._report(cell))
        return self.reports()

    def reopen(self, cell: Cell) -> bool:
        """Let a cell that is done be worked on again; False where another process has it."""
        with _taken(self.folder / cell.name) as is_taken:
            if is_taken:
                (self.folder / cell.name / DONE_FILE).unlink(missing_ok=True)
            return is_taken

    def _change(self, cell: Cell) -> Change | None:
        """Return how a cell differs from the one of its name in the folder; None where it does not."""
        file = self.folder / cell.name / CELL_FILE
        if not file.is_file():
            return None
        before: dict[str, Any] = parsed(TypeAdapter(dict[str, Any]), file)
        now: dict[str, Any] = json.loads(_as_json(cell.settings))
        for key in self.rules.optional - (before.keys() & now.keys()):
            before.pop(key, None)
            now.pop(key, None)
        keys = first_difference(before, now)
        if keys is None:
            return None
        return Change(cell, ".".join(keys), _value(before, keys), _value(now, keys), file)

    def _is_replaced(self, cell: Cell) -> bool:
        """Tell whether the folder holds a cell that failed, left nothing, and has other settings."""
        folder = self.folder / cell.name
        has_failed = (folder / FAILED_FILE).is_file() and not (folder / DONE_FILE).is_file()
        return has_failed and self._change(cell) is not None and self.rules.may_replace(cell, folder)

    def _require_same(self, cell: Cell) -> None:
        change = self._change(cell)
        if change is not None and not self._is_replaced(cell):
            raise self.rules.refusal(change)

    def _work_on(self, cell: Cell, work: Work) -> None:
        folder = self.folder / cell.name
        (folder / FAILED_FILE).unlink(missing_ok=True)
        write_atomically(folder / CELL_FILE, _as_json(cell.settings))
        try:
            file, content = DONE_FILE, work(cell, folder)
        except Exception as error:  # whatever it is, it must not end the other cells
            other = {"kind": type(error).__name__, "sentence": f"{type(error).__name__}: {error}"}
            content = error.fields() if isinstance(error, UserError) else other
            file, content["traceback"] = FAILED_FILE, "".join(traceback.format_exception(error))
        write_atomically(folder / file, _as_json(content))

    def _report(self, cell: Cell) -> CellReport:
        folder = self.folder / cell.name
        if (folder / DONE_FILE).is_file():
            return CellReport(cell, CellState.DONE, result=_read(folder / DONE_FILE, self.rules.result))
        if self._is_replaced(cell):
            return CellReport(cell, CellState.WAITING)
        if (folder / FAILED_FILE).is_file():
            return CellReport(cell, CellState.FAILED, failure=_read(folder / FAILED_FILE, TypeAdapter(_Failure)))
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


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return the keys that lead to the first value that differs, in the order of ``now``; None where none does.

    Examples:
        >>> first_difference({"training": {"seed": 0, "rate": 1}}, {"training": {"seed": 0, "rate": 2}})
        ('training', 'rate')
    """
    for key in (*now, *before):
        old, new = before.get(key), now.get(key)
        if old == new and (key in before) == (key in now):
            continue
        below = first_difference(old, new) if isinstance(old, dict) and isinstance(new, dict) else None
        return (key, *(below or ()))
    return None


def parsed(kind: TypeAdapter[ContentT], file: Path) -> ContentT:
    """Read a JSON file of a grid or a comparison.

    Raises:
        UserError: If it is missing, or not what is written there.
    """
    return _checked(kind, file)[0]


def _checked(kind: TypeAdapter[ContentT], file: Path) -> tuple[ContentT, Any]:
    """Read a file, and return what it holds and how that is written."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return kind.validate_python(content), content
    except (OSError, ValueError, ValidationError, RecursionError) as error:
        what = f"not a file of a comparison of this version, {reason(error)}"
        remedy = "Restore it, or compare anew into another output."
        raise UserError("broken_comparison", what, remedy=remedy, file=file) from error


def _value(settings: Mapping[str, Any], keys: Sequence[str]) -> Any:
    value: Any = settings
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _read(path: Path, kind: TypeAdapter[Any]) -> Any:
    """Read a file as it was written, if it is of a kind."""
    return _checked(kind, path)[1]
