"""A run as one call: found, resumed or started, and refused where something else is in its place."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from manyicl.errors import UserError
from manyicl.model.load import LoadedModel, load_model
from manyicl.training.job import Existing, TrainedRun, ensure_trained
from manyicl.training.processes import is_main_process, local_rank, world_size
from manyicl.training.recipe import Recipe
from manyicl.training.recipe_tasks import RecipeTasks
from tests.training.recipes import measuring, small_recipe, small_tasks
from tests.training.test_train import assert_equal_weights, stop_in_step


def ensured(
    recipe: Recipe, tasks: RecipeTasks | None = None, existing: Existing = "use", stop_in: int | None = None
) -> TrainedRun:
    def score(loaded: LoadedModel) -> Mapping[str, float]:
        return {"score": 0.5}

    evaluation = score if stop_in is None else stop_in_step(stop_in)
    console = Console(file=io.StringIO())
    return ensure_trained(recipe, tasks or small_tasks(), measuring(evaluation), existing=existing, console=console)


def test_a_run_starts_resumes_and_is_found(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", "training.evaluate_every=1")
    stopped = ensured(recipe, stop_in=2)
    assert (stopped.finished, stopped.num_steps, stopped.was_found) == (False, 2, False)
    resumed = ensured(recipe)
    assert (resumed.finished, resumed.num_steps, resumed.best_score, resumed.was_found) == (True, 4, 0.5, False)
    before = (tmp_path / "run" / "model.safetensors").stat()
    found = ensured(recipe)
    assert found == replace(resumed, was_found=True)
    assert (tmp_path / "run" / "model.safetensors").stat() == before
    whole = small_recipe(tmp_path / "whole", "training.evaluate_every=1")
    ensured(whole)
    assert ensured(recipe, existing="replace").was_found is False


def test_a_finished_run_is_found_only_as_the_same_run(tmp_path: Path) -> None:
    base = tmp_path / "base"
    ensured(small_recipe(base))
    over = ("model.from_scratch=null", f"model.base={base}")
    recipe = small_recipe(tmp_path / "run", *over)
    ensured(recipe, RecipeTasks(small_tasks().train[:1], ()))
    assert ensured(recipe, RecipeTasks(small_tasks().train[:1], ())).was_found
    for tasks in (small_tasks(), RecipeTasks(small_tasks().train[1:], ())):
        with pytest.raises(UserError) as error:
            ensured(recipe, tasks)
        assert error.value.code == "another_run"
    with pytest.raises(UserError) as error:
        ensured(small_recipe(tmp_path / "run", *over, "training.seed=1"))
    assert (error.value.code, error.value.field) == ("another_run", "training.seed")
    ensured(small_recipe(base, "training.seed=2"), existing="replace")
    with pytest.raises(UserError, match=r"the weights of the base .* changed"):
        ensured(recipe, RecipeTasks(small_tasks().train[:1], ()))


def test_a_run_is_found_without_loading_a_base_whose_files_are_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    ensured(small_recipe(base))
    no_new_model = "model.from_scratch=null"
    recipe = small_recipe(tmp_path / "run", no_new_model, f"model.base={base}")
    tasks = RecipeTasks(small_tasks().train[:1], ())
    ensured(recipe, tasks)
    loads: list[str] = []

    def load(reference: str, **options: Any) -> LoadedModel:
        loads.append(reference)
        return load_model(reference, **options)

    monkeypatch.setattr("manyicl.training.job.load_model", load)
    assert ensured(recipe, tasks).was_found
    assert not loads
    adapter = small_recipe(
        tmp_path / "adapter", "model.from_scratch=null", f"model.base={base}", "model.lora={rank: 2}"
    )
    ensured(adapter, tasks)
    merged = small_recipe(tmp_path / "merged", no_new_model, f"model.base={adapter.output}")
    ensured(merged, tasks)
    assert ensured(merged, tasks).was_found
    assert not loads
    (base / "model.safetensors").touch()
    for one in (recipe, recipe, merged, merged):
        assert ensured(one, tasks).was_found
    assert loads == [str(base), str(adapter.output)]


def test_a_run_by_another_version_is_another_run(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run")
    ensured(recipe)
    path = tmp_path / "run" / "recipe.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("sequences:", "rows:"), encoding="utf-8")
    with pytest.raises(UserError, match="'rows' is called 'sequences' now") as error:
        ensured(recipe)
    assert error.value.code == "another_run"


def test_other_files_in_the_output_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    modes: tuple[Existing, ...] = ("use", "refuse", "resume", "replace")
    for existing in modes:
        with pytest.raises(UserError):
            ensured(small_recipe(tmp_path), existing=existing)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("value", ["abc", "", "-1", "0", "1.5", "²"])
def test_a_number_of_processes_that_is_none_is_a_mistake_of_the_user(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(UserError) as error:
        world_size()
    assert (error.value.code, error.value.field) == ("wrong_environment", "WORLD_SIZE")


def test_a_launcher_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (world_size(), is_main_process(), local_rank()) == (1, True, 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (world_size(), is_main_process(), local_rank()) == (4, False, 1)


def test_a_resumed_run_ends_as_one_that_was_left_alone(tmp_path: Path) -> None:
    changes = ("training.evaluate_every=1", "training.num_steps=6")
    ensured(small_recipe(tmp_path / "whole", *changes))
    recipe = small_recipe(tmp_path / "parts", *changes)
    while not ensured(recipe, stop_in=2).finished:
        pass
    ensured(recipe)
    assert_equal_weights(tmp_path / "whole", tmp_path / "parts")
