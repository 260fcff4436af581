"""`manyicl train` in two processes: the command as a user meets it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from manyicl.training.checkpoint import Checkpoints
from manyicl.training.run_folder import RunFolder
from tests.cli.test_train import command
from tests.training.recipes import TEXT
from tests.training.test_train import write_task

CHANGES = ("--set", "training.num_steps=60", "--set", "training.log_every=1")
IN_TWO = ("--set", "training.num_processes=2")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    train = write_task(tmp_path / "a", "reviews")
    path = tmp_path / "recipe.yaml"
    text = TEXT.replace("train: [unused]", f"train: [{train}]").replace("  evaluate: [unused]\n", "")
    path.write_text(f"{text}output: {tmp_path / 'run'}\n", encoding="utf-8")
    return path


def wait_for(process: subprocess.Popen[bytes], log: Path, text: str) -> None:
    deadline = time.monotonic() + 240
    while text not in log.read_text(encoding="utf-8"):
        assert process.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_was_stopped_resumes_in_as_many_processes_to_the_same_bits(recipe: Path) -> None:
    log, run, unbroken = recipe.parent / "log", recipe.parent / "run", recipe.parent / "unbroken"
    process = command(recipe, *CHANGES, *IN_TWO)
    wait_for(process, log, "step 3/")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    text = log.read_text(encoding="utf-8")
    assert text.startswith("Training in 2 processes of 1 thread each, because training.num_processes says so.")
    for said in ("A packed sequence holds", "Stopping once this step", "a checkpoint is saved. Resume with", "step 3/"):
        assert text.count(said) == 1, text
    assert "torchrun" not in text
    assert Checkpoints(RunFolder(run).checkpoints).num_processes() == 2

    assert command(recipe, *CHANGES, "--resume").wait(timeout=240) == 0
    text = log.read_text(encoding="utf-8")
    assert "Training in 2 processes of 1 thread each, because as many saved the checkpoint that is resumed." in text
    assert command(recipe, *CHANGES, *IN_TWO, "--set", f"output={unbroken}").wait(timeout=240) == 0
    assert (run / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_command_with_one_sentence(recipe: Path) -> None:
    log = recipe.parent / "log"
    process = command(recipe, *CHANGES, *IN_TWO, "--set", "training.num_steps=100000", "--set", "training.save_every=2")
    wait_for(process, log, "step 3/")
    ranks = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    last = log.read_text(encoding="utf-8").splitlines()[-4:]
    assert "failed One of the 2 processes of the run was ended by SIGKILL" in last[1]
    assert "The last good checkpoint is " in last[1]
    assert last[3].startswith("  manyicl train ")
    assert "Traceback" not in log.read_text(encoding="utf-8")
    assert not any(child.is_running() for child in ranks)


def test_a_mistake_that_shows_in_the_processes_ends_with_2_and_is_said_once(recipe: Path) -> None:
    (recipe.parent / "a" / "task.yaml").write_text("family: nonsense\n", encoding="utf-8")
    assert command(recipe, *IN_TWO).wait(timeout=120) == 2
    lines = (recipe.parent / "log").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if " so far" not in line]  # progress, on a slow machine
    assert len(lines) == 2
    assert lines[1].startswith("error ")
    assert not (recipe.parent / "run" / "checkpoints").exists()
