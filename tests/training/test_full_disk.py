"""No room while something is saved: the last good checkpoint stays, one sentence says so, and the run can go on."""

from __future__ import annotations

import io
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from manyicl.errors import MachineError
from manyicl.model.load import LoadedModel
from manyicl.training import train as train_module
from manyicl.training.checkpoint import SavingFailedError
from manyicl.training.job import TrainedRun, ensure_trained
from manyicl.training.recipe import Recipe
from tests.training.killing import score_of_bits
from tests.training.recipes import measuring, small_recipe, small_tasks
from tests.training.test_train import write_task

# Between what the smallest files take and what weights take, and between what weights and the optimizer's state take.
NO_ROOM_FOR_WEIGHTS, NO_ROOM_FOR_OPTIMIZER = 20_000, 120_000


@contextmanager
def largest_file(num_bytes: int | None) -> Iterator[Callable[[], None]]:
    """Let no file grow beyond a size, from when it is called until the block ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes or soft, hard))

    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def run(recipe: Recipe, *, after_step_1: Callable[[], None] | None = None) -> TrainedRun:
    calls = 0

    def evaluation(loaded: LoadedModel) -> Mapping[str, float]:
        nonlocal calls
        calls += 1
        if calls == 2 and after_step_1 is not None:
            after_step_1()
        return score_of_bits(loaded)

    return ensure_trained(recipe, small_tasks(), measuring(evaluation), console=Console(file=io.StringIO()))


@pytest.fixture(name="expected", scope="module")
def _expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    output = tmp_path_factory.mktemp("whole") / "run"
    run(small_recipe(output, "training.evaluate_every=1"))
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("num_bytes", [NO_ROOM_FOR_WEIGHTS, NO_ROOM_FOR_OPTIMIZER])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(
    tmp_path: Path, expected: bytes, num_bytes: int
) -> None:
    recipe = small_recipe(tmp_path / "run", "training.evaluate_every=1")
    sentence = (
        r"checkpoint-2 could not be saved: .*The last good checkpoint is .*/checkpoint-1\. .* continue with --resume"
    )
    with largest_file(num_bytes) as limit, pytest.raises(SavingFailedError, match=sentence):
        run(recipe, after_step_1=limit)
    assert sorted(path.name for path in (recipe.output / "checkpoints").iterdir()) == ["checkpoint-1", "run.json"]
    sizes = [path.stat().st_size for path in (recipe.output / "checkpoints" / "checkpoint-1").iterdir()]
    assert sorted(sizes)[-2] < NO_ROOM_FOR_OPTIMIZER < max(sizes)
    run(recipe)
    assert (recipe.output / "model.safetensors").read_bytes() == expected


def test_a_finished_model_that_cannot_be_written_leaves_the_last_checkpoint_from_which_it_is_written_later(
    tmp_path: Path, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(tmp_path / "run", "training.evaluate_every=1")
    save = train_module.save_finished
    sentence = r"The finished model could not be saved: .* is full .*The last good checkpoint is .*/checkpoint-4\. Free"
    with largest_file(NO_ROOM_FOR_WEIGHTS) as limit, monkeypatch.context() as patched:
        patched.setattr(train_module, "save_finished", lambda *arguments: (limit(), save(*arguments)))
        with pytest.raises(SavingFailedError, match=sentence):
            run(recipe)
    assert not list(recipe.output.glob("*.safetensors"))
    assert run(recipe).finished
    assert (recipe.output / "model.safetensors").read_bytes() == expected


def test_a_log_that_finds_the_disk_full_names_the_last_good_checkpoint_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    with pytest.raises(SavingFailedError, match=r"^The log of the run could not be saved: the disk of .* is full"):
        run(small_recipe(tmp_path / "run", "training.log_every=1"))


def test_an_evaluation_that_cannot_write_does_not_blame_the_disk_of_the_run(tmp_path: Path) -> None:
    def full(loaded: LoadedModel) -> Mapping[str, float]:
        raise OSError(28, "No space left on device")

    with pytest.raises(MachineError, match=r"^The evaluation after step 1 failed: .*no space left") as error:
        ensure_trained(small_recipe(tmp_path / "run", "training.evaluate_every=1"), small_tasks(), measuring(full))
    assert not isinstance(error.value, SavingFailedError)


@pytest.mark.parametrize("kilobytes", [20, 170, 330, 440, 680])
def test_a_disk_that_is_really_full_never_costs_the_last_good_checkpoint(
    tmp_path: Path, expected: bytes, kilobytes: int
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)]
    try:
        if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("only who may mount a file system can fill one")
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    try:
        recipe = small_recipe(disk / "run", "training.evaluate_every=1")
        with pytest.raises(SavingFailedError, match="is full"):
            run(recipe)
        subprocess.run(["mount", "-o", "remount,size=5m", str(disk)], check=True)
        run(recipe)
        assert (recipe.output / "model.safetensors").read_bytes() == expected
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_cache_folder_that_cannot_be_written_changes_no_weight_and_is_said_once(tmp_path: Path, cache: Path) -> None:
    task, screen = write_task(tmp_path / "a", "reviews"), io.StringIO()
    named = (f"tasks.train=[{task}]", "tasks.evaluate=[]")
    weights = []
    for name in ("with", "without"):
        recipe = small_recipe(tmp_path / name, *named)
        ensure_trained(recipe, console=Console(file=screen, width=200))
        weights.append((recipe.output / "model.safetensors").read_bytes())
        if name == "with":
            shutil.rmtree(cache / "tokens")
            (cache / "tokens").write_text("no folder", encoding="utf-8")
    assert weights[0] == weights[1]
    assert screen.getvalue().count("are kept in the temporary folder") == 1
