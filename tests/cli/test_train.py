from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from manyicl.cli.train import resume_command, train_command
from manyicl.errors import MachineError, UserError
from manyicl.model.manifest import Manifest
from manyicl.training.checkpoint import RunInterrupted, SavingFailedError
from manyicl.training.run_folder import RunFolder, RunState
from tests.training.recipes import TEXT, is_finished
from tests.training.test_train import write_task

app = typer.Typer()
app.command()(train_command)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    train, held_out = write_task(tmp_path / "a", "reviews"), write_task(tmp_path / "b", "news")
    path = tmp_path / "recipe.yaml"
    text = TEXT.replace("train: [unused]", f"train: [{train}]").replace("evaluate: [unused]", f"evaluate: [{held_out}]")
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


def test_a_dry_run_spends_nothing(recipe: Path) -> None:
    result = CliRunner().invoke(app, [str(recipe), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "supervised answers" in result.output
    assert not (recipe.parent / "run").exists()


def test_mistakes_are_user_errors(recipe: Path) -> None:
    for arguments in (["--set", "training.sed=1"], ["--resume"], ["--resume", "--overwrite"]):
        result = CliRunner().invoke(app, [str(recipe), *arguments])
        assert isinstance(result.exception, UserError)


def test_the_command_that_resumes_repeats_what_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    command = resume_command(Path("my recipe.yaml"), ["output=a b", "training.seed=1"])
    assert command == "manyicl train 'my recipe.yaml' --set 'output=a b' --set training.seed=1 --resume"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    command = resume_command(Path("recipe.yaml"), [])
    assert command == "torchrun --nproc-per-node 2 -m manyicl train recipe.yaml --resume"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    command = resume_command(Path("recipe.yaml"), [])
    launcher = "accelerate launch --config_file CONFIG --num_processes 2 -m"
    assert command == f"{launcher} manyicl train recipe.yaml --resume"


def command(recipe: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start the command as a person does, its screen in a file."""
    with (recipe.parent / "log").open("w", encoding="utf-8") as screen:
        return subprocess.Popen(
            [sys.executable, "-m", "manyicl", "train", str(recipe), *arguments],
            stdout=screen,
            stderr=screen,
            env={**os.environ, "COLUMNS": "200"},
        )


@pytest.mark.parametrize(("rank", "num_lines"), [("0", 1), ("1", 0)])
def test_only_the_main_process_prints_a_mistake(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, rank: str, num_lines: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert command(recipe, "--resume", "--overwrite").wait(timeout=120) == 2
    assert len((recipe.parent / "log").read_text(encoding="utf-8").splitlines()) == num_lines


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_leaves_a_checkpoint_and_prints_the_command_that_resumes(recipe: Path, number: signal.Signals) -> None:
    log = recipe.parent / "log"
    process = command(recipe, "--set", "training.num_steps=100000", "--set", "training.log_every=1")
    deadline = time.monotonic() + 120
    while "step 3/" not in log.read_text(encoding="utf-8") and time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=60) == 130
    text = log.read_text(encoding="utf-8")
    assert "a checkpoint is saved. Resume with" in text
    assert f"manyicl train {recipe} --set training.num_steps=100000 --set training.log_every=1 --resume" in text
    assert list((recipe.parent / "run" / "checkpoints").glob("checkpoint-*/manifest.json"))


def raising(error: BaseException) -> Callable[..., None]:
    def raises(*arguments: object, **options: object) -> None:
        raise error

    return raises


@pytest.mark.parametrize(
    ("place", "error", "arguments", "said"),
    [
        (
            "job.load_recipe_tasks",
            KeyboardInterrupt(),
            [],
            "Stopped before training; no run has started. The",
        ),
        ("job.ensure_trained", KeyboardInterrupt(), ["--resume"], "Stopped before training; nothing has changed. The"),
        ("dry_run.load_recipe_tasks", KeyboardInterrupt(), ["--dry-run"], "Stopped; nothing was written."),
        (
            "job.ensure_trained",
            RunInterrupted(None),
            [],
            "There is no checkpoint yet. Resume with\n\n  manyicl",
        ),
        (
            "job.ensure_trained",
            RunInterrupted(Path("checkpoint-4")),
            ["--seed", "3"],
            "checkpoint-4. Resume with",
        ),
    ],
)
def test_a_command_that_is_ended_at_once_says_what_it_leaves(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: BaseException, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(f"manyicl.training.{place}", raising(error))
    result = CliRunner().invoke(app, [str(recipe), *arguments])
    assert result.exit_code == 130
    assert said in result.output
    if "--seed" in arguments:
        assert f"manyicl train {recipe} --set training.seed=3 --resume" in result.output
    assert not (recipe.parent / "run").exists()


def test_sigterm_before_training_is_ctrl_c(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("manyicl.training.job.load_recipe_tasks", terminated)
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(app, [str(recipe)])
    assert (result.exit_code, signal.getsignal(signal.SIGTERM)) == (130, before)


def test_a_checkpoint_that_cannot_be_saved_ends_with_the_command_that_resumes(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyicl.training.job.ensure_trained", raising(SavingFailedError("No room.")))
    result = CliRunner().invoke(app, [str(recipe), "--set", "training.log_every=1"])
    assert isinstance(result.exception, MachineError)
    assert str(result.exception) == (
        f"No room. Resume with\n\n  manyicl train {recipe} --set training.log_every=1 --resume"
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_command_killed_fifty_times_ends_as_one_that_was_left_alone(recipe: Path) -> None:
    changes = ["--set", "training.num_steps=40", "--set", "training.evaluate_every=7", "--set", "training.save_every=2"]

    def started(output: Path, *more: str) -> subprocess.Popen[bytes]:
        resume = ["--resume"] if RunFolder(output).state() is RunState.STARTED else []
        return command(recipe, *changes, "--set", f"output={output}", *resume, *more)

    unbroken, clock = recipe.parent / "unbroken", time.monotonic()
    assert started(unbroken).wait() == 0
    seconds = time.monotonic() - clock
    rng = random.Random(50)
    num_killed = num_runs = 0
    while num_killed < 50:
        output = recipe.parent / f"run{num_runs}"
        num_runs += 1
        while not is_finished(output):
            process, clock = started(output), time.monotonic()
            if num_killed < 50:
                # The first third of a command is imports, where nothing can go wrong.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(rng.uniform(0.3 * seconds, seconds))
                process.kill()
            status = process.wait()
            assert status in (0, -signal.SIGKILL), (recipe.parent / "log").read_text(encoding="utf-8")
            num_killed += status == -signal.SIGKILL
            # Where the machine has less to do than before, a run ends before it is killed.
            seconds = min(seconds, time.monotonic() - clock) if status == 0 else seconds
        assert (output / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    print(f"{num_killed} kills over {num_runs} runs; one that is left alone takes {seconds:.1f} s")
