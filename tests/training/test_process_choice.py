"""How many processes a run on a CPU gets, and what is said about it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from manyicl.errors import UserError
from manyicl.model import machine
from manyicl.training.checkpoint import Checkpoints
from manyicl.training.memory import model_size, process_bytes
from manyicl.training.process_choice import ProcessChoice, choose_processes
from manyicl.training.recipe import LoraSettings
from manyicl.training.requirements import problems
from tests.machines import H100
from tests.training.recipes import small_recipe

GIB = 2**30
LONG = ("training.num_threads=null", "training.num_steps=1_000_000_000", "tasks.evaluate=[]")


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores with two hardware threads each, much memory, and nothing set that decides."""
    found = replace(machine.processor(), num_physical_cores=4, num_logical_cores=8, num_usable_cores=8)
    monkeypatch.setattr(machine, "processor", lambda: found)
    monkeypatch.setattr(machine, "memory_bytes", lambda: (64 * GIB, 48 * GIB))
    monkeypatch.setattr(machine, "gpus", lambda: ())
    for name in ("OMP_NUM_THREADS", "WORLD_SIZE", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)


def choice(*changes: str, resumes: bool = False) -> ProcessChoice:
    return choose_processes(small_recipe(Path("run"), *LONG, *changes), resumes=resumes)


def test_a_long_run_gets_one_process_per_core() -> None:
    chosen = choice("training.sequences_per_step=8")
    assert (chosen.num_processes, chosen.num_threads, chosen.is_news) == (4, 1, True)
    assert chosen.sentence().startswith(
        "Training in 4 processes of 1 thread each, because there are 4 cores and 8 sequences a step; processes need "
        "about 0.8 GiB each, and 48.0 GiB are available."
    )


@pytest.mark.parametrize(
    ("num_sequences", "num_processes", "num_threads"), [(4, 4, 1), (6, 3, 1), (2, 2, 2), (10, 2, 2), (9, 3, 1)]
)
def test_sequences_are_shared_evenly(num_sequences: int, num_processes: int, num_threads: int) -> None:
    chosen = choice(f"training.sequences_per_step={num_sequences}")
    assert (chosen.num_processes, chosen.num_threads) == (num_processes, num_threads)


@pytest.mark.parametrize("num_sequences", [1, 5, 7])
def test_sequences_that_cannot_be_shared_are_left_to_threads_and_that_is_news(num_sequences: int) -> None:
    chosen = choice(f"training.sequences_per_step={num_sequences}")
    assert (chosen.num_processes, chosen.num_threads, chosen.is_news) == (1, None, True)
    assert "training.sequences_per_step" in chosen.sentence()


@pytest.mark.parametrize(("available", "num_processes"), [(3.5, 4), (2.5, 2), (1.0, 1)])
def test_only_as_many_as_memory_holds(monkeypatch: pytest.MonkeyPatch, available: float, num_processes: int) -> None:
    monkeypatch.setattr(machine, "memory_bytes", lambda: (64 * GIB, int(available * GIB)))
    chosen = choice()
    assert chosen.num_processes == num_processes
    assert f"{available} GiB are available" in chosen.sentence()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("training.num_threads=4", "training.num_threads is set"),
        ("training.num_steps=100", "too short"),
        ("training.num_processes=1", "training.num_processes says so"),
    ],
)
def test_a_recipe_that_stays_in_one_process_says_nothing_unless_it_is_requested(change: str, reason: str) -> None:
    chosen = choice(change)
    assert (chosen.num_processes, chosen.is_news) == (1, False)
    assert reason in chosen.sentence()


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "WORLD_SIZE", "ACCELERATE_USE_CPU"])
def test_an_environment_that_decides_is_followed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    assert choice().num_processes == 1


def test_on_a_gpu_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "gpus", lambda: (H100,))
    assert choice().num_processes == 1
    errors = list(problems(small_recipe(Path("run"), "training.num_processes=2"), with_tasks=False))
    assert [error.code for error in errors] == ["conflicting_processes"]
    assert "torchrun --nproc-per-node 2" in str(errors[0])


def test_another_number_than_that_of_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    errors = list(problems(small_recipe(Path("run"), "training.num_processes=2"), with_tasks=False))
    assert str(errors[0]).startswith("training.num_processes is 2 and a launcher started 4.")
    assert not list(problems(small_recipe(Path("run"), "training.num_processes=4"), with_tasks=False))


def test_what_a_recipe_says_comes_first_and_must_share_evenly() -> None:
    chosen = choice("training.num_processes=2", "training.num_steps=1", "training.num_threads=3")
    assert (chosen.num_processes, chosen.num_threads) == (2, 3)
    with pytest.raises(UserError, match="num_processes is 3 and they share the 4 sequences of a step"):
        choice("training.num_processes=3")


@pytest.mark.parametrize("saved_by", [1, 2])
def test_a_run_resumes_in_as_many_processes_as_saved_it(monkeypatch: pytest.MonkeyPatch, saved_by: int) -> None:
    monkeypatch.setattr(Checkpoints, "num_processes", lambda self: saved_by)
    assert choice(resumes=True).num_processes == saved_by
    assert choice(resumes=False).num_processes == 4
    assert choice("training.num_processes=4", resumes=True).num_processes == 4


def test_sizes_are_read_from_files_and_bound_what_an_adapter_needs() -> None:
    recipe = small_recipe(Path("run"), "model.from_scratch=null", "model.base=builtin:nano")
    lora = recipe.model.model_copy(update={"lora": LoraSettings(rank=4)})
    size = model_size(recipe)
    assert size is not None
    assert 1_000_000 < size.num_weights < 1_300_000
    everything = process_bytes(recipe, size)
    adapter = process_bytes(recipe.model_copy(update={"model": lora}), size)
    assert everything - adapter == pytest.approx(16 * (size.num_weights - 4 * size.sum_of_sides))


def test_the_command_that_starts_processes_does_not_import_torch() -> None:
    modules = "cli.train", "training.launch", "training.process_choice", "training.run_folder"
    code = f"import sys, {', '.join(f'manyicl.{module}' for module in modules)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
