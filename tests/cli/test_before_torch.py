"""A mistyped name, key or number is refused before torch is imported, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TABLE = "table.csv:text:label"
RECIPE = """model: {base: builtin:nano}
tasks: {train: [table.csv:text:label]}
training: {num_tokens: 1000, learning_rate: 1e-4, warmup_step: 3}
output: run
"""
# Calls every command in one process, which imports the libraries once. What one command imports stays imported, so that
# the first command that needs torch is found, and those after it with it.
SCRIPT = """
import contextlib, io, json, sys
from manyicl.cli.main import main

for words in json.load(sys.stdin):
    sys.argv = ["manyicl", *words]
    said, code = io.StringIO(), None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, "torch" in sys.modules, said.getvalue()]))
"""
MISTAKES = [
    "predict --model builtin:nano --prefix nowhere.prefix --input table.csv",
    f"predict --model builtin:unknown --task {TABLE} --input table.csv",
    f"predict --model nowhere --task {TABLE} --input table.csv",
    f"predict --model builtin:nano --task {TABLE} --input nowhere.csv",
    f"predict --model builtin:nano --task {TABLE} --input table.csv --dtype floot",
    f"compile --model builtin:nano --task {TABLE} --output x.prefix --shots 640",
    f"compile --model nowhere --task {TABLE} --output x.prefix",
    f"predict --model builtin:nano --task {TABLE} --input table.csv --output answers.txt",
    f"predict --model builtin:nano --task {TABLE} --input table.csv --encoding utf-9",
    f"compile --model builtin:nano --task {TABLE} --output nowhere/x.prefix",
    f"evaluate --model nowhere --tasks {TABLE} --output results",
    f"evaluate --model builtin:nano --tasks {TABLE} --shots 1,x --output results",
    "evaluate --model builtin:nano --tasks nowhere --output results",
    "train nowhere.yaml",
    "train recipe.yaml",
    "train recipe.yaml --dry-run",
    "train recipe.yaml --set training.learning_rate=fast",
    "report nowhere",
    "export --model nowhere --output exported",
    "export --model builtin:nano --output exported --dtype floot",
    "doctor nowhere.yaml",
    "doctor recipe.yaml",
    "models get nowhere",
    "tasks check nowhere.csv:text:label",
    "tasks check table.csv",
    f"tasks check {TABLE} --model nowhere",
    "tasks show nowhere",
]
LOOKS = ["tasks check", "tasks show --shots 2", "tasks list"]


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "table.csv").write_text("text,label\na b,x\nc d,y\ne f,x\ng h,y\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


Ended = tuple[int | None, bool, str]


@pytest.fixture(name="ended", scope="module")
def _ended(folder: Path) -> dict[str, Ended]:
    """Exit code, whether torch was imported by then, and what was printed to standard error, of each command."""
    commands = [*(f"{look} {TABLE}" for look in LOOKS), *MISTAKES]
    words = json.dumps([command.split() for command in commands])
    program = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(program, cwd=folder, input=words, capture_output=True, text=True, check=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return {command: tuple(result) for command, result in zip(commands, results, strict=True)}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_found_before_torch_is_imported(words: str, ended: dict[str, Ended]) -> None:
    code, has_torch, said = ended[words]
    assert (code, has_torch) == (2, False), said
    assert said.startswith("error "), said


@pytest.mark.parametrize("command", LOOKS)
def test_a_task_is_looked_at_without_torch(command: str, ended: dict[str, Ended]) -> None:
    code, has_torch, said = ended[f"{command} {TABLE}"]
    assert (code, has_torch) == (0, False), said
