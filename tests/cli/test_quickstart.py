"""`manyicl quickstart`: both parts in one report, the toy world alone where the base is missing, results reused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from manyicl.cli import quickstart
from manyicl.cli.main import app
from manyicl.errors import UserError
from manyicl.evaluation.result import ResultStore
from manyicl.tasks.nanoworld import world
from tests.builders import byte_level_bpe, tiny_model


@pytest.fixture(name="small", autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the world, the training and the evaluation small, and no base available."""
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(world, "NUM_TRAINING_TASKS", 2)
    monkeypatch.setattr(world, "NUM_UNSEEN_TASKS", 1)
    for name, value in {"NUM_QUERIES": 2, "TABLE_SHOTS": (0, 4), "NANO_SHOTS": (0, 1, 4), "NANO_SEEDS": 1}.items():
        monkeypatch.setattr(quickstart, name, value)
    whole = quickstart.quickstart_recipe

    def short(*arguments: Any) -> Any:
        recipe = whole(*arguments)
        training = recipe.training.model_copy(update={"num_tokens": 4000, "warmup_steps": 0})
        return recipe.model_copy(update={"training": training})

    monkeypatch.setattr(quickstart, "quickstart_recipe", short)


def run(output: Path, *options: str) -> str:
    result = CliRunner().invoke(app, ["quickstart", "--output", str(output), *options])
    assert result.exit_code == 0, (result.exception, result.output)
    return " ".join(result.output.split())


def test_a_file_as_its_folder_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    result = CliRunner().invoke(app, ["quickstart", "--output", str(tmp_path / "out")])
    assert isinstance(result.exception, UserError)
    assert (result.exception.code, result.output) == ("output_is_file", "")


def test_without_the_base_it_says_so_and_shows_the_toy_world_alone(tmp_path: Path) -> None:
    printed = run(tmp_path / "out")
    assert "Only the toy world is shown: The model 'builtin:smollm2' is not on this machine yet" in printed
    assert "manyicl models get smollm2" in printed
    assert "Nano world at 4 shots" in printed
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "nano fine-tuned" in page
    assert quickstart.TABLES_TITLE not in page


def test_both_parts_are_one_table_one_picture_and_one_page_and_a_second_run_reuses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_level_bpe()
    for name in ("before", "after"):
        model = tiny_model("llama", len(tokenizer))
        model.config.max_position_embeddings = 2048
        model.lm_head.weight.data *= 2 if name == "after" else 1
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    models = {name: str(tmp_path / name) for name in ("before", "after")}
    monkeypatch.setattr(quickstart, "TABLE_MODELS", models)
    printed = run(tmp_path / "out")
    for words in ("tickets, accuracy", "titles, token_f1", "after − before", "Nano world, mean over families"):
        assert words in printed
    assert "Three small tables at 4 shots" in printed
    page, picture = ((tmp_path / "out" / name).read_text("utf-8") for name in ("report.html", "shot_curves.svg"))
    for heading in ("Tickets", "Urgency", "Titles", "Nano world"):
        assert f">{heading}</text>" in picture
    assert 'id="curves1">Three small tables</h2>' in page
    assert 'id="curves2">Nano world</h2>' in page
    store = ResultStore(tmp_path / "out" / "results")
    made = {record.stem: record.created for record in store.load()}
    again = run(tmp_path / "out")
    assert "The finished model of an earlier run" in again
    assert {record.stem: record.created for record in store.load()} == made
    run(tmp_path / "out", "--fresh")
    anew = {record.stem: record.created for record in store.load()}
    assert not set(anew.items()) & set(made.items())


def test_the_names_in_the_table_say_that_the_base_was_quantized() -> None:
    assert all("Q4_1" in name for name in quickstart.TABLE_MODELS)
