from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from manyicl.cli.train import held_out_evaluation, resume_command, train_command, watched
from manyicl.errors import UserError
from manyicl.model.manifest import Manifest
from manyicl.tasks.building import normalised
from manyicl.training.recipe import Recipe
from manyicl.training.train import load_recipe_tasks
from tests.builders import make_example, make_task, tiny_loaded
from tests.training.recipes import TEXT
from tests.training.test_train import write_task

app = typer.Typer()
app.command()(train_command)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    train, held_out = write_task(tmp_path / "a", "reviews"), write_task(tmp_path / "b", "news")
    path = tmp_path / "recipe.yaml"
    text = TEXT.replace("train: [unused]", f"train: [{train}]\n  evaluate: [{held_out}]")
    path.write_text(f"# a comment\n{text}  evaluate_shots: [0, 2]\noutput: {tmp_path / 'run'}\n", encoding="utf-8")
    return path


def test_a_recipe_becomes_a_model_chosen_on_held_out_tasks(recipe: Path) -> None:
    result = CliRunner().invoke(app, [str(recipe), "--set", "training.evaluate_every=2", "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert "score_at_2_shots" in result.output
    assert "the best on held-out tasks with a score of" in result.output
    manifest = Manifest.read(recipe.parent / "run")
    assert manifest is not None
    assert manifest.recipe["training"]["seed"] == 3
    assert [task.name for task in manifest.tasks] == ["a"]


def test_a_held_out_task_is_watched_by_rows_of_its_training_side_that_are_not_shown() -> None:
    repeated = make_example("film 7  WAS play", "bad")
    rows = make_task().train
    task = make_task(train=[*rows, *[repeated] * 3])
    asked = watched(task, 10, seed=1)
    assert asked.test == watched(task, 10, seed=1).test != watched(task, 10, seed=2).test
    assert len(asked.test) == 10
    assert not {normalised(e.query.text) for e in asked.test} & {normalised(e.query.text) for e in asked.train}
    assert {*asked.test, *asked.train} <= {*task.train}
    half = watched(make_task(), 1000, seed=1)
    assert len(half.test) == len(half.train) == 20
    with pytest.raises(UserError, match="'toy' has 1 training rows; at least 2"):
        watched(make_task(train=rows[:1]), 10, seed=1)


def test_training_never_asks_a_test_row(recipe: Path) -> None:
    tasks = load_recipe_tasks(Recipe.read(recipe)).held_out
    loaded = tiny_loaded()
    evaluation = held_out_evaluation(Recipe.read(recipe), tasks)
    without_test_rows = held_out_evaluation(Recipe.read(recipe), tuple(replace(task, test=()) for task in tasks))
    assert evaluation(loaded) == without_test_rows(loaded)


def test_a_dry_run_spends_nothing(recipe: Path) -> None:
    result = CliRunner().invoke(app, [str(recipe), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "supervised answers" in result.output
    assert not (recipe.parent / "run").exists()


def test_mistakes_are_user_errors(recipe: Path) -> None:
    for arguments in (["--set", "training.sed=1"], ["--resume"], ["--resume", "--overwrite"]):
        result = CliRunner().invoke(app, [str(recipe), *arguments])
        assert isinstance(result.exception, UserError)


def test_the_command_that_resumes_repeats_what_was_set() -> None:
    command = resume_command(Path("my recipe.yaml"), ["output=a b", "training.seed=1"])
    assert command == "manyicl train 'my recipe.yaml' --set 'output=a b' --set training.seed=1 --resume"


def test_ctrl_c_leaves_a_checkpoint_and_prints_the_command_that_resumes(recipe: Path) -> None:
    log = recipe.parent / "log"
    changes = ["--set", "training.num_steps=100000", "--set", "training.log_every=1"]
    code = "from manyicl.cli.main import main; main()"
    with log.open("w", encoding="utf-8") as screen:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "train", str(recipe), *changes],
            stdout=screen,
            stderr=screen,
            env={**os.environ, "COLUMNS": "200"},
        )
        deadline = time.monotonic() + 120
        while "step 3/" not in log.read_text(encoding="utf-8") and time.monotonic() < deadline:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    text = log.read_text(encoding="utf-8")
    assert "a checkpoint is saved. Resume with" in text
    assert f"manyicl train {recipe} --set training.num_steps=100000 --set training.log_every=1 --resume" in text
    assert list((recipe.parent / "run" / "checkpoints").glob("checkpoint-*"))
