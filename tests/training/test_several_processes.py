"""Two processes that share a run: the same update, sequences of their own, one end for all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch import Tensor

from manyicl.errors import MachineError, UserError
from manyicl.training.checkpoint import Checkpoints
from tests.training import shared_runs
from tests.training.processes import outcomes, results
from tests.training.recipes import TEXT, is_finished, small_recipe
from tests.training.shared_runs import adapter_recipe, full_recipe, save_base
from tests.training.test_train import write_task

FSDP2 = Path(__file__).parents[2] / "recipes" / "accelerate" / "fsdp2.yaml"
# So few that a sequence needs several chunks: the vocabularies have 200 and 330 tokens.
BYTES_OF_LOGITS = 4 * 200 * 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare each tensor by the largest number of all."""
    assert found.keys() == expected.keys()
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    assert scale > 1e-3
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= tolerance * scale, name


def launched(num_processes: int) -> dict[str, str]:
    """What `accelerate launch` with the configuration in recipes/ tells each process."""
    options = ["--config_file", str(FSDP2), "--num_processes", str(num_processes)]
    arguments = launch_command_parser().parse_args([*options, "-m", "manyicl", "train", "recipe.yaml"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment: dict[str, str] = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_"))}


@pytest.mark.parametrize(
    "sharded", [pytest.param(False, id="DDP"), pytest.param(True, id="FSDP2", marks=pytest.mark.slow)]
)
def test_two_processes_give_the_update_of_one_from_sequences_of_their_own(
    tmp_path: Path, base: Path, sharded: bool
) -> None:
    (tmp_path / "text.txt").write_text("film 1 was song play 2 was book good bad\n" * 30, encoding="utf-8")
    replay = f"sequences.replay={{text: '{tmp_path / 'text.txt'}', share: 0.2, segment_tokens: 31}}"
    recipes = [
        full_recipe(tmp_path / "full", "objective={weighting: answer, context_weight: 0.5}", replay),
        full_recipe(tmp_path / "last", "training.gradient_checkpointing=true", "objective.supervise=last_answer"),
        adapter_recipe(tmp_path / "adapter", base),
    ]
    environment = launched(2) if sharded else {}
    both = results(shared_runs.all_few_steps, recipes, BYTES_OF_LOGITS, sharded, environment=environment)
    alone = [shared_runs.few_steps(recipe) for recipe in recipes]
    for one, first, second in zip(alone, *both, strict=True):
        assert one.chunks is None
        for of_two in (first, second):
            assert of_two.kinds == ({"DTensor"} if sharded else {"Parameter"})
            assert_close(of_two.gradients, one.gradients, 1e-6)
            assert_close(of_two.weights, one.weights, 1e-5)
            assert of_two.losses == pytest.approx(one.losses, rel=1e-5)
            assert of_two.chunks is not None
            assert "at most" in of_two.chunks
        assert (first.indices, second.indices) == ([0, 2, 4, 6], [1, 3, 5, 7])
        assert one.indices == list(range(8))


@pytest.mark.slow
def test_two_that_compute_in_bfloat16_sum_gradients_and_losses_in_float32(tmp_path: Path, base: Path) -> None:
    recipes = [
        full_recipe(tmp_path / "full", "training.bf16=true"),
        adapter_recipe(tmp_path / "adapter", base, "training.bf16=true", "model.dtype=bfloat16"),
    ]
    both = results(shared_runs.all_few_steps, recipes, BYTES_OF_LOGITS, True, environment=launched(2))
    for recipe, of_two in zip(recipes, both[0], strict=True):
        one = shared_runs.few_steps(recipe)
        assert {tensor.dtype for tensor in (*of_two.gradients.values(), *of_two.weights.values())} == {torch.float32}
        assert any(float(torch.tensor(loss).bfloat16()) != loss for loss in of_two.losses)
        assert of_two.losses == pytest.approx(one.losses, rel=1e-2)
        assert_close(of_two.gradients, one.gradients, 3e-2)


@pytest.mark.slow
def test_torchrun_starts_the_command_as_a_module(tmp_path: Path) -> None:
    train, held_out = write_task(tmp_path / "a", "reviews"), write_task(tmp_path / "b", "news")
    text = TEXT.replace("train: [unused]", f"train: [{train}]").replace("evaluate: [unused]", f"evaluate: [{held_out}]")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{text}  evaluate_shots: [0]\noutput: {tmp_path / 'run'}\n", encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "manyicl", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"The model is in {tmp_path / 'run'} after 4 steps.") == 1
    assert is_finished(tmp_path / "run")
    checkpoint = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert checkpoint is not None
    assert '"num_processes": 2' in (checkpoint / "manifest.json").read_text(encoding="utf-8")


def test_a_loss_that_is_not_a_number_in_one_process_ends_both_with_the_sentence(tmp_path: Path) -> None:
    for outcome in outcomes(shared_runs.spoilt_step, full_recipe(tmp_path)):
        assert isinstance(outcome, MachineError)
        assert str(outcome).startswith("The loss became nan in step 1, in a sequence with tasks")


def test_held_out_tasks_are_shared_out_and_scored_as_by_one_process() -> None:
    (first, shown), (second, _) = results(shared_runs.evaluated)
    expected, _ = shared_runs.evaluated()
    assert first == second == expected
    assert shown == [(number, 4) for number in range(5)], "two of the three tasks"


def weights_in(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.parametrize(
    "sharded", [pytest.param(False, id="DDP"), pytest.param(True, id="FSDP2", marks=pytest.mark.slow)]
)
def test_a_run_of_two_that_failed_in_one_ends_in_both_and_is_resumed_by_two_alone(
    tmp_path: Path, sharded: bool
) -> None:
    changes = ("training.num_steps=3", "training.evaluate_every=1", "training.evaluate_shots=[1]")
    whole, parts, alone = (small_recipe(tmp_path / name, *changes) for name in ("whole", "parts", "alone"))
    options: dict[str, Any] = {"environment": launched(2) if sharded else {}}
    ended = results(shared_runs.trains, [(whole, "refuse", None), (parts, "refuse", 2)], sharded, **options)
    for of_process in ended:
        assert of_process[0].error is None, of_process[0].error
        assert of_process[0].scores == ended[0][0].scores
        assert len(of_process[0].scores) == 3
        assert type(of_process[1].error) in (ArithmeticError, MachineError)
        assert "seven times eight" in str(of_process[1].error)
    assert "of the first of 2 processes" in ended[0][0].screen or sharded
    checkpoints = Checkpoints(tmp_path / "parts" / "checkpoints")
    with pytest.raises(UserError, match=r"weights shared out over processes.*Resume with the launcher") as other:
        checkpoints.resume_point(2, is_sharded=not sharded)
    assert other.value.code == "other_sharding"
    assert checkpoints.resume_point(2, is_sharded=sharded).checkpoint == checkpoints.path(1)
    assert shared_runs.train(alone, fails_at=2).error is not None
    refused = shared_runs.train(parts, "resume").error
    assert isinstance(refused, UserError)
    assert (refused.code, refused.expected, refused.found) == ("other_num_processes", "2", "1")
    cases = [(alone, "resume", None), (parts, "resume", None)]
    for of_process in results(shared_runs.trains, cases, sharded, **options):
        refused = of_process[0].error
        assert isinstance(refused, UserError)
        assert (refused.code, refused.expected, refused.found) == ("other_num_processes", "1", "2")
        assert refused.remedy
        assert of_process[1].error is None
        assert [*ended[0][1].scores, *of_process[1].scores] == ended[0][0].scores
    expected, found = weights_in(tmp_path / "whole"), weights_in(tmp_path / "parts")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
