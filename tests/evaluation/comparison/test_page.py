"""Records of a comparison -> a page, Markdown tables, and plots with their rows."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from manyicl.cli.report import report_command
from manyicl.errors import UserError
from manyicl.evaluation.report.comparison_markdown import escaped
from manyicl.evaluation.report.comparison_page import write_comparison
from tests.evaluation.comparison.made_up import World
from tests.evaluation.test_report import WellFormed

EVIL = "<script>alert('x')</script> | *bold* `code` \n# $x$ \x1b[31m"
SMALL = {"unseen_a": ("unseen", "classification"), "unseen_b": ("unseen", "qa")}


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = World(tasks={**SMALL, "seen_a": ("seen", "qa")}, imported={"other": 0.8}).write(
        tmp_path_factory.mktemp("comparison")
    )
    write_comparison(folder)
    return folder


def page_of(folder: Path) -> str:
    page = (folder / "report.html").read_text(encoding="utf-8")
    parser = WellFormed()
    parser.feed(page)
    assert not parser.open
    assert len(parser.ids) == len(set(parser.ids))
    anchors = {f"#{name}" for name in parser.ids}
    assert all(link in anchors for link in parser.links), "the page needs a network, or a link leads nowhere"
    return page


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_answers_the_question_for_unseen_and_seen_tasks_apart(folder: Path) -> None:
    page = page_of(folder)
    assert page.index("2 unseen tasks") < page.index("1 seen task")
    assert re.search(r"(Yes, and more|No|Undecided): one many-shot model", page)
    assert "Nothing is missing" in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_markdown_has_a_table_of_regimes_by_families_with_intervals(folder: Path) -> None:
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    header = next(line for line in lines if line.startswith("| regime | mean over families |"))
    assert header.count("|") == 9
    assert "| Classification | QA | worst draw | trainings | draws | queries |" in header
    row = next(line for line in lines if line.startswith("| **many-shot, all answers, 16 shots** |"))
    assert row.count("|") == header.count("|")
    assert re.search(r"\| \d+\.\d \(\d+\.\d–\d+\.\d\) \|", row)
    assert row.endswith("| 3 | 3 | 80 |")


def test_each_plot_is_a_picture_with_its_rows(folder: Path) -> None:
    plots = folder / "plots"
    pictures = {path.stem for path in plots.glob("*.svg")}
    assert {"curves_unseen", "curves_seen", "differences_unseen", "in_weights_unseen", "positions"} <= pictures
    assert {"forgetting", "forgetting_steps", "curves_unseen_qa", "task_unseen_unseen_a"} <= pictures
    for name in pictures:
        assert "<svg" in (plots / f"{name}.svg").read_text(encoding="utf-8")
        assert rows_of(plots / f"{name}.csv"), name
    curve = rows_of(plots / "curves_unseen.csv")
    assert {row["shots"] for row in curve} == {"0", "4", "16"}
    page = page_of(folder)
    mean = next(
        float(r["mean"]) for r in rows_of(plots / "regimes.csv") if (r["regime"], r["group"]) == ("few-shot", "qa")
    )
    assert f"{100 * mean:.1f}" in page


def test_the_command_writes_the_report_again_and_refuses_what_has_no_effect(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "report.html").read_bytes()
    (folder / "report.md").unlink()
    report_command(folder)
    assert str(folder / "report.html") in capsys.readouterr().out
    assert (folder / "report.html").read_bytes() == before
    assert (folder / "report.md").is_file()
    report_command(folder, as_json=True)
    assert json.loads(capsys.readouterr().out)["cells"][0]["state"] == "done"
    with pytest.raises(UserError, match="--title has no effect"):
        report_command(folder, title="Mine")


def test_a_report_replaces_no_file_of_anyone_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = World(tasks={"unseen_a": SMALL["unseen_a"]}, num_seeds=1, regimes=["base"], others={}).write(tmp_path)
    for name in ("report.md", "plots/curves_unseen.csv", "plots/curves_unseen.svg", "report.html"):
        path = other / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine\n", encoding="utf-8")
        with pytest.raises(UserError, match="not written by this command"):
            write_comparison(other)
        assert path.read_text(encoding="utf-8") == "mine\n"
        assert [one.name for one in other.rglob("*") if one.name.startswith(("report", "curves"))] == [path.name]
        path.unlink()
    # Rows of an earlier version of ours are replaced.
    (other / "plots" / "curves_unseen.csv").write_text("regime,shots,earlier\n", encoding="utf-8")
    report_command(other, quiet=True)
    assert rows_of(other / "plots" / "curves_unseen.csv")
    assert capsys.readouterr() == ("", "")
    assert (other / "report.html").is_file()


def test_a_folder_without_a_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        write_comparison(tmp_path)
    assert error.value.code == "no_comparison"
    assert not list(tmp_path.iterdir())


def test_before_a_cell_is_done_the_page_says_so(tmp_path: Path) -> None:
    world = World(tasks=SMALL, num_seeds=1, regimes=["base", "all_answers"], others={})
    world.waiting = [cell.name for cell in world.cells()]
    folder = world.write(tmp_path)
    write_comparison(folder)
    page = page_of(folder)
    assert "there is no number to compare" in page
    assert "2 cells not started: base_seed0, all_answers_seed0." in page


def test_failed_and_waiting_cells_are_on_the_page(tmp_path: Path) -> None:
    world = World(
        tasks=SMALL,
        num_seeds=1,
        num_queries=10,
        failed={"few_shot_seed0": "The loss <b>is</b> not a number."},
        waiting=["last_answer_seed0"],
    )
    folder = world.write(tmp_path)
    write_comparison(folder)
    page, markdown = page_of(folder), (folder / "report.md").read_text(encoding="utf-8")
    for text in (page, markdown):
        assert "1 cell not started: last_answer_seed0." in text
        assert "<b>is</b>" not in text
        assert "one training" in text
    assert "few_shot_seed0: failed: The loss &lt;b&gt;is&lt;/b&gt; not a number." in page
    assert "Not claimed: one training each" in page


def test_hostile_names_are_shown_as_they_are(tmp_path: Path) -> None:
    tasks = {f"{EVIL}{end}": ("unseen", "classification") for end in ("", "!")}
    world = World(
        tasks=tasks, num_seeds=1, num_queries=5, regimes=["base", "all_answers"], others={}, imported={"x": 0.5}
    )
    folder = world.write(tmp_path)
    write_comparison(folder)
    page, markdown = page_of(folder), (folder / "report.md").read_text(encoding="utf-8")
    for text in (page, markdown):
        assert "<script" not in text
        assert "\x1b" not in text
    assert "&lt;script&gt;" in page
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    assert tables
    assert all("alert" not in line or line.count("|") == tables[0].count("|") for line in tables)
    assert len(list((folder / "plots").glob("task_*.svg"))) == 2
    for picture in (folder / "plots").glob("*.svg"):
        assert "<script" not in picture.read_text(encoding="utf-8")


def test_markdown_is_escaped_but_readable() -> None:
    assert escaped("all_answers") == "all_answers"
    assert escaped("a|b *c* _d_\n# <e> `f`") == "a&#124;b &#42;c&#42; &#95;d&#95; # &#60;e&#62; &#96;f&#96;"
