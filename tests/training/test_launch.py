"""Processes that are started for a run: what they share, how they fail, and that none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from safetensors.torch import load_file

from manyicl.errors import MachineError, UserError
from manyicl.tasks.files import load_task
from manyicl.training.checkpoint import Checkpoints
from manyicl.training.launch import ProcessLostError, in_processes
from manyicl.training.recipe_tasks import load_recipe_tasks
from manyicl.training.run_folder import RunFolder, RunState
from tests.training import launch_jobs
from tests.training.killing import PROCESSES
from tests.training.recipes import small_recipe
from tests.training.test_train import write_task


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork processes from one that has imported torch already, where how they start is not what is tested."""
    monkeypatch.setattr("multiprocessing.get_context", lambda method: PROCESSES)


def test_processes_form_a_group_and_the_first_one_answers() -> None:
    before = dict(os.environ)
    assert in_processes(partial(launch_jobs.describe, "hello"), 2, 1) == ("hello", 2, 1, 3.0, True)
    assert dict(os.environ) == before


def test_each_process_has_its_threads_and_meets_in_a_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "with a space, 100 % and ü"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    # The module of the job imports torch before the environment says how many threads there are.
    assert in_processes(launch_jobs.threads_of_torch, 2, 1) == [1, 1]
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("forked")
def test_a_mistake_that_one_process_meets_is_raised_as_it_was() -> None:
    with pytest.raises(UserError, match=r"something is wrong. Make it right\.") as caught:
        in_processes(partial(launch_jobs.fail_in_second, "mistake"), 2, 1)
    assert (caught.value.code, caught.value.field) == ("a_code", "a.key")


@pytest.mark.usefixtures("forked")
def test_a_bug_in_one_process_is_shown_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="UnpicklableError: a bug of ours") as caught:
        in_processes(partial(launch_jobs.fail_in_second, "bug"), 2, 1)
    assert "fail_in_second" in "".join(caught.value.__notes__)


@pytest.mark.usefixtures("forked")
def test_a_process_that_is_killed_ends_all_and_is_named_as_the_cause() -> None:
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(
        ProcessLostError, match=r"One of the 2 processes of the run was ended by SIGKILL, as the system"
    ):
        in_processes(partial(launch_jobs.fail_in_second, "kill"), 2, 1)
    # One of them looks after what is shared, for as long as this process lives.
    new = [child for child in psutil.Process().children() if child.pid not in before]
    assert all("resource_tracker" in " ".join(child.cmdline()) for child in new)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("how", "then", "expected", "sentence"),
    [
        ("mistake", "aborts", UserError, r"something is wrong. Make it right\."),
        ("machine", "aborts", MachineError, r"The disk is full\."),
        ("kill", "aborts", ProcessLostError, r"One of the 2 processes of the run was ended by SIGKILL"),
        ("kill", "cannot save", ProcessLostError, r"One of the 2 processes of the run was ended by SIGKILL"),
    ],
)
def test_the_first_failure_is_shown_however_another_process_fails_because_of_it(
    how: str, then: str, expected: type[Exception], sentence: str
) -> None:
    with pytest.raises(expected, match=sentence) as caught:
        in_processes(partial(launch_jobs.fail_in_second_and_then_first, how, then), 2, 1)
    assert type(caught.value) is expected


@pytest.mark.usefixtures("forked")
def test_a_bug_is_shown_by_the_process_that_has_it_and_not_by_one_that_was_told() -> None:
    with pytest.raises(ZeroDivisionError, match="seven by nothing") as caught:
        in_processes(launch_jobs.fail_in_second_and_tell_first, 2, 1)
    assert "fail_in_second_and_tell_first" in "".join(caught.value.__notes__)


@pytest.mark.usefixtures("forked")
def test_a_process_that_is_killed_while_it_reports_is_lost() -> None:
    with pytest.raises(ProcessLostError, match="SIGKILL"):
        in_processes(launch_jobs.die_while_reporting, 1, 1)


def waiting_command(folder: Path, how: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Start a command with two processes that wait for signals, in a group of its own as a shell does."""
    command = [sys.executable, str(launch_jobs.__file__), str(folder), how]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    wait_until(lambda: len(list(folder.iterdir())) == 2)
    return parent, [psutil.Process(int(path.name)) for path in folder.iterdir()]


def are_alive(processes: list[psutil.Process]) -> bool:
    """Tell whether any is; one that nobody has waited for is not."""
    return any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def wait_until(is_so: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_each_process_once(tmp_path: Path) -> None:
    parent, _ = waiting_command(tmp_path, "stops")
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.communicate(timeout=60)[0] == "stopped by 1 of SIGTERM\n"


def test_a_second_ctrl_c_ends_processes_that_do_not_stop(tmp_path: Path) -> None:
    parent, processes = waiting_command(tmp_path, "never")
    os.killpg(parent.pid, signal.SIGINT)
    time.sleep(2.5)
    assert are_alive(processes)
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.communicate(timeout=20)[0] == "ended at once\n"
    assert not are_alive(processes)


def test_processes_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent, processes = waiting_command(tmp_path, "never")
    parent.kill()
    parent.communicate()
    wait_until(lambda: not are_alive(processes), seconds=20)


@pytest.mark.usefixtures("forked")
def test_two_processes_train_the_weights_that_one_does(tmp_path: Path) -> None:
    changes = ["model.from_scratch.config.attention_dropout=0", "training.learning_rate=1e-3", "tasks.evaluate=[]"]
    base = tmp_path / "base"
    launch_jobs.train_small(small_recipe(base, *changes, "training.num_steps=1"))
    over_base = ["model.from_scratch=null", f"model.base={base}", "model.lora={rank: 4}", *changes[1:]]
    kinds = (("model.safetensors", changes), ("adapter_model.safetensors", over_base))
    alone, shared = (
        [small_recipe(tmp_path / number / name, *of_kind) for name, of_kind in kinds] for number in ("one", "two")
    )
    launch_jobs.train_all_small(alone)
    runs = in_processes(partial(launch_jobs.train_all_small, shared), 2, 1)
    assert [(run.finished, run.num_steps) for run in runs] == [(True, 4)] * 2
    for (name, _), one, two in zip(kinds, alone, shared, strict=True):
        assert RunFolder(two.output).state() is RunState.FINISHED
        assert Checkpoints(RunFolder(two.output).checkpoints).num_processes() == 2
        expected, found = (load_file(recipe.output / name) for recipe in (one, two))
        assert max((expected[key] - found[key]).abs().max().item() for key in expected) <= 1e-6


@pytest.mark.slow
def test_rows_that_are_to_be_read_again_are_read_by_one_process(tmp_path: Path, cache: Path) -> None:
    train, held_out = write_task(tmp_path / "a", "reviews"), write_task(tmp_path / "b", "news")
    recipe = small_recipe(tmp_path / "run", f"tasks.train=[{train}]", f"tasks.evaluate=[{held_out}]")
    before = [task.data_hash for side in load_recipe_tasks(recipe) for task in side]
    rows = train / "train.jsonl"
    stat = rows.stat()
    rows.write_text(rows.read_text(encoding="utf-8").replace("train 0", "train X"), encoding="utf-8")
    os.utime(rows, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    mistaken = write_task(tmp_path / "c", "letters")
    (mistaken / "train.jsonl").write_text("{", encoding="utf-8")
    wrong = small_recipe(tmp_path / "wrong", f"tasks.train=[{mistaken}]", "tasks.evaluate=[]")
    of_processes = in_processes(partial(launch_jobs.load_with_rehash, recipe, wrong), 2, 1)
    (first, hashes, mistake), (second, others, told) = of_processes
    assert (first, second) == ((str(train / "task.yaml"), str(held_out / "task.yaml")), ())
    assert hashes == others == tuple(load_task(folder).data_hash for folder in (train, held_out))
    assert [old == new for old, new in zip(before, hashes, strict=True)] == [False, True]
    assert str(mistake) == str(told)
    assert str(mistaken / "train.jsonl:1") in str(told)
