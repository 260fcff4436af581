"""A run that is killed and resumed ends as one that was left alone."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from manyicl.training.recipe import Recipe
from manyicl.training.run_folder import LOCK_FILE
from tests.training.killing import NUM_STEPS, adapter_recipe, ended, scratch_recipe, start
from tests.training.recipes import is_finished

MakeRecipe = Callable[[Path], Recipe]
KINDS = ("scratch", "adapter")
# How fast a run was differs from one to the next.
TIMINGS = (
    "answers_per_second",
    "tokens_per_second",
    "flop_utilisation",
    "flop_utilisation_with_recomputed",
    "data_waiting_share",
    "peak_memory_gib",
)


class Unbroken:
    """Runs that were left alone, with the moments at which they touched a file and the time they took."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seconds: dict[str, float] = {}
        self.recipes: dict[str, MakeRecipe] = {"scratch": scratch_recipe}
        self.moments = {"scratch": self._run("scratch", folder / "scratch")}
        for seed in range(20):
            self.recipes["adapter"] = partial(adapter_recipe, base=folder / "scratch", seed=seed)
            self.moments["adapter"] = self._run("adapter", folder / f"adapter{seed}")
            if state_in(folder / f"adapter{seed}", f"checkpoint-{NUM_STEPS}")["best_global_step"] < NUM_STEPS:
                break
            # Scores are drawn from the bits of the weights. Here the last model was the best, which tests less.
        (folder / f"adapter{seed}").rename(folder / "adapter")

    def _run(self, kind: str, output: Path) -> list[str]:
        moments_file = self._folder / "moments"
        clock = time.monotonic()
        assert ended(start(self.recipes[kind](output), moments_file=moments_file))
        self.seconds[kind] = time.monotonic() - clock
        return moments_file.read_text(encoding="utf-8").replace(str(output), "OUTPUT").splitlines()

    def assert_equal(self, kind: str, output: Path) -> None:
        """Hold that another run of the kind ended with the same files and logged the same figures."""
        expected = self._folder / kind
        name = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
        for file in (name, "tokenizer.json", f"checkpoints/checkpoint-{NUM_STEPS}/{name}"):
            assert (output / file).read_bytes() == (expected / file).read_bytes(), file
        found, unbroken = (state_in(folder, f"checkpoint-{NUM_STEPS}") for folder in (output, expected))
        for key in ("stateful_callbacks", "log_history", "best_metric", "best_global_step"):
            assert found[key] == unbroken[key], key
        assert what_it_remembers(output) == what_it_remembers(expected)
        # A kill in the last moment may leave the lock, which is no longer held.
        assert {path.name for path in output.iterdir()} - {LOCK_FILE} == {path.name for path in expected.iterdir()}
        assert not [path for path in (output / "checkpoints" / "partial").rglob("*") if path.is_file()]
        assert logged_steps(output) == logged_steps(expected)


def state_in(folder: Path, checkpoint: str) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "checkpoints" / checkpoint / "trainer_state.json").read_text())
    state["log_history"] = [{k: v for k, v in line.items() if k not in TIMINGS} for line in state["log_history"]]
    return state


def what_it_remembers(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manyicl.json").read_text(encoding="utf-8"))
    del manifest["recipe"]["output"], manifest["throughput"]
    return manifest


def logged_steps(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def one_kind(chosen: str) -> list[Any]:
    return [pytest.param(kind, marks=() if kind == chosen else pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module", name="unbroken")
def _unbroken(tmp_path_factory: pytest.TempPathFactory) -> Unbroken:
    return Unbroken(tmp_path_factory.mktemp("unbroken"))


# Each kind of run is killed in one way here, and in the other with the slow tests.
@pytest.mark.parametrize("kind", one_kind("adapter"))
def test_a_run_killed_at_random_times_ends_as_an_unbroken_one(unbroken: Unbroken, tmp_path: Path, kind: str) -> None:
    # The first run of all also waited for the process that the others are forked from.
    rng, seconds = random.Random(f"times {kind}"), min(unbroken.seconds.values())
    num_killed = num_runs = 0
    while num_killed < 10:
        recipe = unbroken.recipes[kind](tmp_path / f"run{num_runs}")
        num_runs += 1
        while not is_finished(recipe.output):
            process = start(recipe)
            if num_killed < 10:
                process.join(timeout=rng.uniform(0.1, 1.2) * seconds)
                process.kill()
            num_killed += not ended(process)
        unbroken.assert_equal(kind, recipe.output)


@pytest.mark.parametrize("kind", one_kind("scratch"))
def test_a_run_killed_again_and_again_while_it_writes_ends_as_an_unbroken_one(
    unbroken: Unbroken, tmp_path: Path, kind: str
) -> None:
    rng = random.Random(f"moments {kind}")
    recipe = unbroken.recipes[kind](tmp_path / "run")
    killed_at = [rng.randrange(1, 60) for _ in range(10)]
    print(f"killed at the moments {killed_at}")
    num_killed = 0
    for moment in killed_at:
        if not is_finished(recipe.output):
            num_killed += not ended(start(recipe, moment))
    assert num_killed >= 5
    if not is_finished(recipe.output):
        assert ended(start(recipe))
    unbroken.assert_equal(kind, recipe.output)


def kill_once(unbroken: Unbroken, kind: str, output: Path, moment: int) -> None:
    recipe = unbroken.recipes[kind](output)
    name = unbroken.moments[kind][moment - 1]
    assert not ended(start(recipe, moment)), name
    if not is_finished(output):
        assert ended(start(recipe)), name
    unbroken.assert_equal(kind, output)


def test_a_run_killed_while_the_finished_model_is_put_in_place_ends_as_an_unbroken_one(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    names = unbroken.moments["scratch"]
    for name in (
        f"os.rename OUTPUT/checkpoints/partial/checkpoint-{NUM_STEPS}",
        "half of OUTPUT/checkpoints/partial/model/model.safetensors",
        "os.rename OUTPUT/checkpoints/partial/model/model.safetensors",
        "os.rename OUTPUT/checkpoints/partial/model/manyicl.json",
    ):
        moment = names.index(name) + 1
        kill_once(unbroken, "scratch", tmp_path / f"run{moment}", moment)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_any_moment_ends_as_an_unbroken_one(unbroken: Unbroken, tmp_path: Path, kind: str) -> None:
    # The steps between the first and the last but one pass the same moments.
    skipped = [f"checkpoint-{step}" for step in range(2, NUM_STEPS - 1)]
    for moment, name in enumerate(unbroken.moments[kind], 1):
        if not any(checkpoint in name for checkpoint in skipped):
            kill_once(unbroken, kind, tmp_path / f"run{moment}", moment)
