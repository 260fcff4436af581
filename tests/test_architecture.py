"""Imports flow one way, and training and engine meet only below."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "manyicl"
MAY_IMPORT: dict[str, set[str]] = {
    "tasks": set(),
    "episodes": {"tasks"},
    "model": {"tasks", "episodes"},
    "training": {"tasks", "episodes", "model"},
    "engine": {"tasks", "episodes", "model"},
    "evaluation": {"tasks", "episodes", "model", "training", "engine"},
    "server": {"tasks", "episodes", "model", "engine", "evaluation"},
    "cli": {"tasks", "episodes", "model", "training", "engine", "evaluation", "server"},
}
MOST_BODY_LINES = 40
NEVER = {"tasks": {"torch", "transformers", "tokenizers", "peft"}, "episodes": {"torch", "peft"}}


def imported_modules(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            modules.add(node.module or "")
    return modules


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_stands_below_it(folder: str) -> None:
    for path in (PACKAGE / folder).rglob("*.py"):
        for module in imported_modules(path):
            parts = module.split(".")
            if parts[0] == "manyicl" and len(parts) > 1 and parts[1] in MAY_IMPORT:
                assert parts[1] == folder or parts[1] in MAY_IMPORT[folder], f"{path} imports {module}"
            assert parts[0] not in NEVER.get(folder, set()), f"{path} imports {module}"


def test_every_folder_of_the_package_has_its_place_in_the_order() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(MAY_IMPORT)


def test_consoles_are_made_in_one_place_so_that_none_replaces_text_by_emoji() -> None:
    made = {path.name for path in PACKAGE.rglob("*.py") if re.search(r"\bConsole\(", path.read_text(encoding="utf-8"))}
    assert made == {"printing.py"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda path: path.name)
def test_the_command_line_parses_and_prints(path: Path) -> None:
    assert "torch" not in {module.split(".")[0] for module in imported_modules(path)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            num_lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert num_lines <= MOST_BODY_LINES, f"{path}: {node.name} has {num_lines} lines"


def test_the_command_line_starts_without_libraries_that_take_seconds_to_load() -> None:
    heavy = ("torch", "transformers", "peft", "datasets", "pyarrow", "numpy", "pandas", "sklearn", "matplotlib")
    program = f"import sys, manyicl.cli.main; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_codes_of_errors_are_words_joined_by_underscores(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
            code = node.args[0]
            if isinstance(code, ast.Constant):
                assert re.fullmatch(r"[a-z]+(_[a-z0-9]+)*", str(code.value)), f"{path}:{node.lineno}: {code.value!r}"
