"""With --json standard output holds one JSON value and nothing else; with --quiet it is empty."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from manyicl.training.dry_run import FIELDS
from tests.cli.test_predict import run
from tests.documents import DOCS
from tests.training.recipes import TEXT
from tests.training.test_train import write_task


def documented(page: str, section: str) -> set[str]:
    """Return the fields that a section of a page lists in its table."""
    text = (DOCS / page).read_text(encoding="utf-8").partition(f"# {section}\n")[2].partition("\n#")[0]
    return {name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


@pytest.fixture(name="recipe")
def _recipe(tmp_path: Path) -> Path:
    path, train = tmp_path / "recipe.yaml", write_task(tmp_path / "reviews", "reviews")
    text = TEXT.replace("train: [unused]", f"train: [{train}]").replace("  evaluate: [unused]\n", "")
    path.write_text(f"{text}output: {tmp_path / 'run'}\n", encoding="utf-8")
    return path


def summary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object, exit_code: int = 0
) -> dict[str, Any]:
    """Run a command with --json; everything that it prints on standard output is one object."""
    assert run(monkeypatch, *arguments, "--json") == exit_code
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def test_a_dry_run_is_told_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    told = summary(monkeypatch, capsys, "train", recipe, "--dry-run")
    assert set(told) == set(FIELDS) == documented("formats.md", "Dry run")
    assert (told["num_training_tasks"], told["num_held_out_tasks"], told["num_steps"]) == (1, 0, 4)
    assert told["num_trainable"] == told["num_parameters"] > 0
    assert told["num_tokens"] == round(16 * told["tokens_per_sequence"])
    assert 0 < told["hours"] < 1
    assert told["memory_gib"] > 0
    assert (told["missing"], told["unknown"]) == ([], [])
    assert not (recipe.parent / "run").exists()


def test_what_cannot_be_known_of_a_run_is_null_and_said_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    monkeypatch.setattr("manyicl.training.dry_run._is_available", lambda name: False)
    base = ["--set", "model={base: 'hf:owner/name', lora: {rank: 4}}"]
    told = summary(monkeypatch, capsys, "train", recipe, "--dry-run", *base)
    assert told["num_steps"] == 4
    assert told["hours"] is told["num_tokens"] is told["num_parameters"] is None
    assert "the Hub cannot be reached" in told["unknown"][0]


def test_a_quiet_dry_run_and_a_quiet_training_print_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    for dry_run in (["--dry-run"], []):
        assert run(monkeypatch, "train", recipe, "--quiet", *dry_run) == 0
        assert capsys.readouterr() == ("", "")
    assert (recipe.parent / "run" / "manyicl.json").is_file()


def test_json_of_a_training_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    assert run(monkeypatch, "train", recipe, "--json") == 2
    assert "--json goes with --dry-run" in capsys.readouterr().err


def test_a_compiled_task_is_told_in_json(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    tmp_path: Path,
) -> None:
    output = tmp_path / "tickets.prefix"
    arguments = ["compile", "-m", model_folder, "-t", f"{table}:text:label", "-o", output]
    told = summary(monkeypatch, capsys, *arguments, "--shots", 12)
    groups = told["observed"]
    assert set(told) == documented("formats.md", "Compile")
    page = (DOCS / "formats.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in groups[0])
    assert (told["output"], told["num_bytes"]) == (str(output), output.stat().st_size)
    assert (told["num_shots"], told["num_dropped"], told["num_other_rows"]) == (12, 0, 0)
    assert told["num_encoded_tokens"] == told["num_tokens"]
    assert [(one["first_shots"], one["last_shots"]) for one in groups] == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 11)]
    assert sum(one["num_demonstrations"] for one in groups) == 12
    assert all(isinstance(sentence, str) for sentence in told["advice"])
    again = summary(monkeypatch, capsys, *arguments, "--shots", 16, "--update")
    assert 0 < again["num_encoded_tokens"] < again["num_tokens"]
    assert run(monkeypatch, *arguments, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
