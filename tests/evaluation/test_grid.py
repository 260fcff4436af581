from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from manyicl.errors import UserError
from manyicl.evaluation.grid import Cell, CellReport, CellState, Grid, Rules

CELLS = [Cell(f"seed{seed}", {"seed": seed, "shots": (0, 4)}) for seed in range(3)]


def states(reports: list[CellReport]) -> list[str]:
    return [report.state.value for report in reports]


def double(cell: Cell, folder: Path) -> int:
    with (folder / "calls").open("a", encoding="utf-8") as calls:
        calls.write("x")
    return 2 * int(cell.settings["seed"])


def test_every_cell_is_worked_on_once_and_its_result_is_kept(tmp_path: Path) -> None:
    seen: list[str] = []
    reports = Grid(tmp_path, CELLS).run(double, on_report=lambda report: seen.append(report.sentence()))
    assert [(report.state, report.result) for report in reports] == [(CellState.DONE, n) for n in (0, 2, 4)]
    assert seen == ["seed0: done", "seed1: done", "seed2: done"]
    again = Grid(tmp_path, [*CELLS, Cell("seed3", {"seed": 3})]).run(double)
    assert [report.result for report in again] == [0, 2, 4, 6]
    assert (tmp_path / "seed0" / "calls").read_text(encoding="utf-8") == "x"


def test_a_failed_cell_is_kept_apart_and_tried_again_only_where_asked_for(tmp_path: Path) -> None:
    def failing(cell: Cell, folder: Path) -> int:
        if cell.name == "seed1":
            raise UserError("too_few_rows", "the task is too small", remedy="Add rows.")
        if cell.name == "seed2":
            raise ZeroDivisionError("of ours")
        return double(cell, folder)

    reports = Grid(tmp_path, CELLS).run(failing)
    assert states(reports) == ["done", "failed", "failed"]
    assert reports[1].sentence() == "seed1: failed: the task is too small. Add rows."
    assert reports[1].failure is not None
    assert reports[1].failure["code"] == "too_few_rows"
    assert reports[2].failure is not None
    assert "ZeroDivisionError: of ours" in reports[2].failure["traceback"]
    assert states(Grid(tmp_path, CELLS).run(double)) == ["done", "failed", "failed"]
    assert states(Grid(tmp_path, CELLS).run(double, retry_failed=True)) == ["done", "done", "done"]


def test_a_cell_that_was_interrupted_is_taken_up_again(tmp_path: Path) -> None:
    def interrupted(cell: Cell, folder: Path) -> None:
        if cell.name == "seed1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Grid(tmp_path, CELLS).run(interrupted)
    assert states(Grid(tmp_path, CELLS).reports()) == ["done", "interrupted", "waiting"]
    assert states(Grid(tmp_path, CELLS).run(double)) == ["done", "done", "done"]


def test_the_plan_of_the_whole_says_what_is_left_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    def describe(cell: Cell) -> Iterator[str]:
        yield f"{cell.settings['seed']} hours"
        if cell.name == "seed2":
            raise UserError("missing_file", "there is no base")

    grid = Grid(tmp_path / "grid", CELLS)
    assert next(grid.plan()) == "3 cells: 3 waiting"
    assert not (tmp_path / "grid").exists()
    Grid(tmp_path / "grid", CELLS[:1]).run(double)
    assert list(grid.plan(describe)) == [
        "3 cells: 2 waiting, 1 done",
        "seed0: done",
        "seed1: waiting",
        "  1 hours",
        "seed2: waiting",
        "  2 hours",
        "  refused: there is no base.",
    ]


def test_another_cell_under_the_same_name_is_refused(tmp_path: Path) -> None:
    Grid(tmp_path, CELLS).run(double)
    with pytest.raises(UserError) as error:
        Grid(tmp_path, [Cell("seed0", {"seed": 7})])
    assert error.value.code == "another_cell"
    for cells in ([CELLS[0], CELLS[0]], [Cell("a/b", {})], [Cell("..", {})], [Cell("", {})]):
        with pytest.raises(UserError) as error:
            Grid(tmp_path, cells)
        assert error.value.code == "wrong_cell_name"


def test_a_refusal_names_the_first_key_that_changed_with_both_values(tmp_path: Path) -> None:
    Grid(tmp_path, [Cell("a", {"training": {"seed": 0, "rates": [1]}, "hash": "x"})]).run(lambda cell, folder: 0)
    with pytest.raises(UserError) as error:
        Grid(tmp_path, [Cell("a", {"training": {"seed": 0, "rates": [1, 2]}, "hash": "x"})])
    assert "training.rates was [1], is [1, 2]" in str(error.value)
    with pytest.raises(UserError) as error:
        Grid(tmp_path, [Cell("a", {"training": {"seed": 0, "rates": [1]}})])
    assert "hash was 'x', is nothing" in str(error.value)


def test_a_cell_that_another_process_began_meanwhile_with_other_settings_is_refused_and_not_mixed(
    tmp_path: Path,
) -> None:
    ours = Grid(tmp_path, [Cell("seed0", {"seed": 7})])
    Grid(tmp_path, CELLS).run(double)
    with pytest.raises(UserError) as error:
        ours.run(double)
    assert error.value.code == "another_cell"
    assert json.loads((tmp_path / "seed0" / "cell.json").read_text(encoding="utf-8"))["seed"] == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [("done.json", '{"a": '), ("cell.json", "[]"), ("cell.json", "{"), ("failed.json", '{"code": "x"}')],
)
def test_a_damaged_file_of_a_cell_is_named(tmp_path: Path, name: str, content: str) -> None:
    Grid(tmp_path, CELLS).run(double)
    folder = tmp_path / "seed1"
    if name == "failed.json":
        (folder / "done.json").unlink()
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        Grid(tmp_path, CELLS).reports()
    assert (error.value.code, error.value.file) == ("broken_comparison", folder / name)


class _Replacing(Rules):
    def may_replace(self, cell: Cell, folder: Path) -> bool:
        return cell.name != "seed1"


def test_a_cell_that_failed_takes_other_settings_where_the_rules_let_it(tmp_path: Path) -> None:
    def failing(cell: Cell, folder: Path) -> int:
        raise UserError("missing_file", "there is no text")

    Grid(tmp_path, CELLS).run(failing)
    with pytest.raises(UserError):
        Grid(tmp_path, [Cell("seed0", {"seed": 7})])
    with pytest.raises(UserError):
        Grid(tmp_path, [Cell("seed1", {"seed": 7})], _Replacing())
    grid = Grid(tmp_path, [Cell("seed0", {"seed": 7}), CELLS[2]], _Replacing())
    assert states(grid.reports()) == ["waiting", "failed"]
    assert [report.result for report in grid.run(double)] == [14, None]
    with pytest.raises(UserError):
        Grid(tmp_path, [Cell("seed0", {"seed": 8})], _Replacing())


def slowly(cell: Cell, folder: Path) -> str:
    (folder / "started").touch()
    time.sleep(0.2)
    return multiprocessing.current_process().name


def work_on(folder: Path) -> None:
    Grid(folder, CELLS).run(slowly)


def test_several_processes_share_the_cells(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work_on, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    seen: set[CellState] = set()
    while any(worker.is_alive() for worker in workers):
        seen.update(report.state for report in Grid(tmp_path, CELLS).reports())
        time.sleep(0.02)
    assert CellState.RUNNING in seen
    assert states(Grid(tmp_path, CELLS).reports()) == ["done"] * 3
    for cell in CELLS:
        assert json.loads((tmp_path / cell.name / "done.json").read_text(encoding="utf-8")).startswith("SpawnProcess")
