"""The examples in docstrings do what they show."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
MODULES = [
    ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    for path in sorted(SOURCE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]
# The names that most programs begin with.
MAIN = [
    ("manyicl.engine.backend", "Backend"),
    ("manyicl.engine.engine", "Engine"),
    ("manyicl.engine.prediction", "Prediction"),
    ("manyicl.episodes.encoding", "Encoder"),
    ("manyicl.tasks.spec", "TaskSpec"),
    ("manyicl.tasks.task", "Task"),
    ("manyicl.training.recipe", "Recipe"),
]


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module_run(module: str) -> None:
    tried = doctest.testmod(importlib.import_module(module))
    assert tried.attempted
    assert not tried.failed


@pytest.mark.parametrize(("module", "name"), MAIN)
def test_a_main_name_has_an_example(module: str, name: str) -> None:
    documented = getattr(importlib.import_module(module), name).__doc__
    assert documented is not None
    assert ">>> " in documented
