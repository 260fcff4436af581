"""`manyicl compare`: a file in, a plan or a table out, and one sentence for a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manyicl.cli.main import app
from manyicl.errors import MachineError, UserError
from tests.evaluation.comparison.cases import comparison_in

runner = CliRunner()


@pytest.fixture(name="recipe")
def _recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("manyicl.training.estimate.SECONDS_MEASURED", 0.1)
    path = tmp_path / "compare.yaml"
    settings = comparison_in(tmp_path, "compare.regimes=[base, all_answers]", "compare.learning_rates=[1e-3]")
    path.write_text(settings.to_yaml(), encoding="utf-8")
    return path


def test_the_plan_says_what_is_left_and_a_run_prints_its_scores(recipe: Path) -> None:
    plan = runner.invoke(app, ["compare", str(recipe), "--dry-run"])
    assert plan.exit_code == 0, plan.output
    assert "Left to do: 1 training with" in plan.output
    assert "all_answers_seed0: waiting" in plan.output
    run = runner.invoke(app, ["compare", str(recipe), "--quiet"])
    assert (run.exit_code, run.output) == (0, "")
    again = runner.invoke(app, ["compare", str(recipe)])
    assert "unseen, 2 shots" in again.output
    (page,) = recipe.parent.rglob("report.html")
    assert f"Report: {page}" in again.output.replace("\n", "")
    summary = runner.invoke(app, ["compare", str(recipe), "--quiet", "--json"])
    assert [cell["state"] for cell in json.loads(summary.stdout)["cells"]] == ["done", "done"]
    plan = runner.invoke(app, ["compare", str(recipe), "--dry-run", "--quiet", "--json"])
    assert json.loads(plan.stdout)["num_tokens"] == 0


def test_a_page_of_anyone_else_is_refused_before_anything_is_trained(recipe: Path) -> None:
    output = recipe.parent / "mine"
    output.mkdir()
    (output / "report.html").write_text("mine", encoding="utf-8")
    result = runner.invoke(app, ["compare", str(recipe), "--quiet", "--set", f"output={output}"])
    assert isinstance(result.exception, UserError)
    assert result.exception.code == "output_exists"
    assert [path.name for path in output.iterdir()] == ["report.html"]


def test_a_mistake_in_the_file_is_refused_before_libraries_are_loaded(recipe: Path) -> None:
    result = runner.invoke(app, ["compare", str(recipe), "--set", "compare.shot=[1]"])
    assert isinstance(result.exception, UserError)
    assert result.exception.code == "unknown_key"


def test_ctrl_c_says_how_to_go_on(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("manyicl.evaluation.comparison.run.measure_shot_curves", stopped)
    result = runner.invoke(app, ["compare", str(recipe), "--quiet"])
    assert result.exit_code == 130
    assert "the same command resumes" in result.output


def test_what_failed_is_said_once_with_its_reason(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: object, **options: object) -> None:
        raise MachineError("The disk is full.")

    monkeypatch.setattr("manyicl.evaluation.comparison.run.ensure_trained", failing)
    changes = ["--set", "compare.learning_rates=[1e-3, 3e-3]", "--set", "compare.regimes=[all_answers]"]
    result = runner.invoke(app, ["compare", str(recipe), "--quiet", *changes])
    assert isinstance(result.exception, MachineError)
    assert str(result.exception) == (
        "1 of 1 cell and 2 trials of learning rates failed, such as all_answers_seed0: no learning rate can be chosen "
        "for all_answers: all_answers_rate0: failed: MachineError: The disk is full. Remove the cause, then run again "
        "with --retry-failed. A trial is tried again only as long as no rate was chosen without it."
    )
