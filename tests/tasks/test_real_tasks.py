"""The task files and recipes for real, public data; rows are loaded where the data lies next to the checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from manyicl.tasks.files import load_task
from manyicl.tasks.schema import TwoFiles, read_task_file
from manyicl.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
TASK_FILES = sorted((ROOT / "recipes" / "real").glob("*/*/task.yaml"))
RECIPES = [ROOT / "recipes" / "real" / "many_tasks.yaml"] + [
    ROOT / "recipes" / f"{name}.yaml"
    for name in ("mistral_7b_v0.3", "llama3_8b", "gemma_7b", "smollm2_135m", "qwen3_0.6b")
]
DATA = ROOT.parent / "shared" / "data"
GROUPS = ("classification", "nli_pairs", "qa", "generation", "math_reasoning", "natural_instructions")


def group_of(file: Path) -> str:
    """The folder of data sets that a task file draws from."""
    data = read_task_file(file).data
    assert isinstance(data, TwoFiles)
    return data.train[0].split("/")[0]


def test_there_are_task_files_of_every_group() -> None:
    groups = [group_of(file) for file in TASK_FILES]
    assert len(groups) >= 45
    assert all(groups.count(group) >= 5 for group in GROUPS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_watches_only_tasks_of_other_sources(path: Path) -> None:
    recipe = Recipe.read(path)
    train, evaluate = (
        [file for place in places for file in sorted((ROOT / place).glob("*/task.yaml"))]
        for places in (recipe.tasks.train, recipe.tasks.evaluate)
    )
    assert len(train) >= 30
    assert len(evaluate) >= 10
    sources = [{read_task_file(file).source or file.parent.name for file in side} for side in (train, evaluate)]
    assert sources[0].isdisjoint(sources[1])
    for side in (train, evaluate):
        assert {group_of(file) for file in side} == set(GROUPS)


def with_one_of_each_group() -> list[Any]:
    """All task files, those after the first of a group for the slow tests."""
    first = {group_of(file): file for file in reversed(TASK_FILES)}
    chosen = set(first.values())
    return [pytest.param(file, marks=() if file in chosen else pytest.mark.slow) for file in TASK_FILES]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"the public data sets do not lie in {DATA.name}/ next to the checkout")
@pytest.mark.parametrize("file", with_one_of_each_group(), ids=lambda file: file.parent.name)
def test_a_real_task_loads_whole(file: Path) -> None:
    task = load_task(file, DATA)
    assert task.train
    assert task.test
    assert not task.dropped
    assert task.instruction()


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the data folder next to the checkout")
def test_every_set_of_the_data_folder_loads_whole_through_a_plain_task_file(tmp_path: Path) -> None:
    from benchmarks.all_tasks import data_sets, task_file

    from manyicl.tasks.files import load_tasks

    sets = list(data_sets(DATA))
    for one in sets:
        (tmp_path / one.name).mkdir()
        text = yaml.safe_dump(task_file(one, DATA), allow_unicode=True)
        (tmp_path / one.name / "task.yaml").write_text(text, encoding="utf-8")
    tasks = load_tasks([str(tmp_path)], DATA)
    assert len(tasks) == len(sets) == 190
    assert not any(task.dropped for task in tasks)
    assert sum(len(task.train) + len(task.test) for task in tasks) == 214_419
