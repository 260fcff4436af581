"""A mistyped name, key or number is refused before torch is imported, which takes seconds."""

from __future__ import annotations

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
SCRIPT = """
import sys
from manyicl.cli.main import main
try:
    main()
except SystemExit as end:
    print("code", end.code, "torch", "torch" in sys.modules)
"""


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "table.csv").write_text("text,label\na b,x\nc d,y\ne f,x\ng h,y\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "words",
    [
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
    ],
)
def test_a_mistake_is_found_before_torch_is_imported(words: str, folder: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *words.split()]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.stdout.splitlines()[-1:] == ["code 2 torch False"], ended.stderr
    assert ended.stderr.startswith("error "), ended.stderr


@pytest.mark.parametrize("command", [["check"], ["show", "--shots", "2"], ["list"]], ids=lambda words: words[0])
def test_a_task_is_looked_at_without_torch(command: list[str], folder: Path) -> None:
    words = [sys.executable, "-W", "ignore", "-c", SCRIPT, "tasks", *command, TABLE]
    ended = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1:] == ["code 0 torch False"]
