"""A command that takes long says what it is doing, and how far it is, where standard error is no terminal."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manyicl.evaluation.result import ResultStore
from tests.cli.test_predict import run
from tests.evaluation.test_summary import RECORDS
from tests.training.recipes import TEXT
from tests.training.test_train import write_task

SECONDS_OF_A_SLOW_STEP = 0.2


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lines come often."""
    monkeypatch.setattr("manyicl.activity.SECONDS_BETWEEN_LINES", 0.02)


def slow_down(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Let a function take its time, each time it is called."""
    module, _, name = place.rpartition(".")
    function = getattr(importlib.import_module(module), name)

    def slowly(*arguments: Any, **options: Any) -> Any:
        time.sleep(SECONDS_OF_A_SLOW_STEP)
        return function(*arguments, **options)

    monkeypatch.setattr(place, slowly)


@pytest.fixture(name="said")
def _said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Run a command of which one step is slow, and return the lines that it writes to standard error."""

    def said(slow_step: str, *arguments: object) -> list[str]:
        slow_down(monkeypatch, slow_step)
        assert run(monkeypatch, *arguments) == 0
        return capsys.readouterr().err.splitlines()

    return said


def has(lines: list[str], beginning: str, ending: str = "") -> bool:
    return any(line.startswith(beginning) and line.endswith(ending) for line in lines)


@pytest.fixture(name="predict")
def _predict(model_folder: Path, table: Path, tmp_path: Path) -> list[object]:
    queries = tmp_path / "new.csv"
    queries.write_text("text\nfilm 1\nfilm 2\nfilm 3\n", encoding="utf-8")
    task = ["--task", f"{table}:text:label", "--shots", 8]
    return ["predict", "--model", model_folder, *task, "--input", queries, "--output", tmp_path / "answers.csv"]


def test_predict_says_what_it_loads(said: Callable[..., list[str]], predict: list[object], model_folder: Path) -> None:
    assert has(said("manyicl.model.load.load_model", *predict), f"loading {model_folder}; 0 s so far")


def test_predict_says_how_many_tokens_of_the_prefix_there_are(
    monkeypatch: pytest.MonkeyPatch, said: Callable[..., list[str]], predict: list[object]
) -> None:
    monkeypatch.setattr("manyicl.engine.prefix_cache.PREFILL_CHUNK_TOKENS", {"cpu": 50})
    assert has(said("manyicl.engine.prefix_cache.continue_model", *predict), "answering: 0 of 3, prefix: 50 of ")


def test_predict_says_how_many_queries_are_answered_and_how_long_the_others_take(
    monkeypatch: pytest.MonkeyPatch, said: Callable[..., list[str]], predict: list[object]
) -> None:
    monkeypatch.setattr("manyicl.engine.engine.READ_AHEAD_QUERIES", 1)
    lines = said("manyicl.engine.local.score_labels", *predict)
    assert has(lines, "answering: 0 of 3; 0 s so far")
    assert has(lines, "answering: 1 of 3; 0 s so far, about ", " s left")


def test_compile_says_how_many_tokens_of_the_demonstrations_are_encoded(
    monkeypatch: pytest.MonkeyPatch, said: Callable[..., list[str]], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("manyicl.engine.local.OBSERVED_CHUNK_TOKENS", 50)
    task = ["--task", f"{table}:text:label", "--shots", 8]
    arguments = ["compile", "--model", model_folder, *task, "--output", tmp_path / "tickets.prefix"]
    assert has(
        said("manyicl.engine.prefix_cache.continue_model", *arguments), "reading 8 demonstrations, prefix: 50 of "
    )


def test_evaluate_says_which_task_shots_and_seed_it_measures(
    said: Callable[..., list[str]], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    what = ["--tasks", f"{table}:text:label", "--shots", "0,2", "--seeds", 1, "--queries", 3]
    arguments = ["evaluate", "--model", model_folder, *what, "--output", tmp_path / "results"]
    lines = said("manyicl.engine.local.score_labels", *arguments)
    assert has(lines, "evaluating: 0 of 2, tickets, 0 shots, seed 0, 0 of 3 queries; ")
    assert has(lines, "evaluating: 1 of 2, tickets, 2 shots, seed 0, 0 of 3 queries; ", " left")


@pytest.fixture(name="recipe")
def _recipe(tmp_path: Path) -> Path:
    path, train = tmp_path / "recipe.yaml", write_task(tmp_path / "reviews", "reviews")
    held_out = write_task(tmp_path / "news", "news")
    text = TEXT.replace("train: [unused]", f"train: [{train}]").replace("evaluate: [unused]", f"evaluate: [{held_out}]")
    path.write_text(f"{text}  evaluate_shots: [0, 2]\noutput: {tmp_path / 'run'}\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("step", "line"),
    [
        ("manyicl.training.dry_run.load_recipe_tasks", "reading tasks; "),
        ("manyicl.training.train.starting_point", "making a new model; "),
        ("manyicl.training.dry_run.measured_cost", "timing forward and backward passes; "),
    ],
)
def test_a_dry_run_says_what_it_is_doing(said: Callable[..., list[str]], recipe: Path, step: str, line: str) -> None:
    assert has(said(step, "train", recipe, "--dry-run"), line)


def test_training_says_its_steps_its_tokens_and_the_time_left(said: Callable[..., list[str]], recipe: Path) -> None:
    lines = said("manyicl.training.trainer.sequence_loss", "train", recipe, "--set", "training.evaluate_every=null")
    assert has(lines, "training: 0 of 4; ")
    assert any(line.startswith("training: 2 of 4") and " tokens; " in line and line.endswith(" left") for line in lines)


@pytest.mark.parametrize(
    ("step", "options", "line"),
    [
        ("manyicl.tasks.files.task_places", (), "reading tasks; "),
        ("manyicl.episodes.checks.check_task", (), "checking tasks: 0 of 1, tickets; "),
        ("manyicl.model.load.load_tokenizer", ("--model", "{model}"), "loading the tokenizer of {model}; "),
    ],
)
def test_the_check_of_tasks_says_what_it_is_doing(
    said: Callable[..., list[str]], model_folder: Path, table: Path, step: str, options: tuple[str, ...], line: str
) -> None:
    given = [option.format(model=model_folder) for option in options]
    lines = said(step, "tasks", "check", f"{table}:text:label", *given)
    assert has(lines, line.format(model=model_folder))


@pytest.mark.parametrize(
    ("step", "line"),
    [
        ("manyicl.model.export._load", "loading {model}; "),
        ("manyicl.model.export._save", "rounding and writing weights; "),
        ("manyicl.model.export._read_back", "reading back what was written; "),
    ],
)
def test_an_export_says_what_it_is_doing(
    said: Callable[..., list[str]], model_folder: Path, tmp_path: Path, step: str, line: str
) -> None:
    lines = said(step, "export", "--model", model_folder, "--output", tmp_path / "exported")
    assert has(lines, line.format(model=model_folder))


def test_the_doctor_says_that_it_looks(said: Callable[..., list[str]]) -> None:
    assert has(said("manyicl.model.machine.this_machine", "doctor"), "looking at this machine and its libraries; ")


@pytest.mark.parametrize(
    ("step", "line"),
    [
        ("manyicl.evaluation.report.write_report", "drawing the report; "),
        ("manyicl.evaluation.mistakes.errors_as_csv", "writing wrong answers; "),
    ],
)
def test_the_report_says_what_it_is_doing(said: Callable[..., list[str]], tmp_path: Path, step: str, line: str) -> None:
    ResultStore(tmp_path / "results").save(RECORDS[0], [], [])
    assert has(said(step, "report", tmp_path / "results", "--errors", tmp_path / "wrong.csv"), line)
