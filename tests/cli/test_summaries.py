"""With --json standard output holds one JSON value and nothing else; with --quiet it is empty."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from manyicl.cli.answer_columns import AnswerColumns
from manyicl.engine.prediction import Prediction
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


def test_an_evaluation_and_its_report_are_told_in_the_same_json(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    tmp_path: Path,
) -> None:
    options = ["--shots", "0,4", "--seeds", 2, "--queries", 5, "--output", tmp_path / "results", "--json"]
    assert run(monkeypatch, "evaluate", "-m", model_folder, "-t", f"{table}:text:label", *options) == 0
    points = json.loads(capsys.readouterr().out)
    assert [(one["shots"], one["num_answers"]) for one in points] == [(0, 5), (4, 10)]
    page = (DOCS / "formats.md").read_text(encoding="utf-8").partition("### Evaluate and report\n")[2]
    for point in points:
        assert set(point) == documented("formats.md", "Evaluate and report")
        assert point["num_wrong"] == sum(one["num_answers"] for one in point["confusions"])
        found = point["calibration"]
        assert found["coverage"][0]["accuracy"] == found["accuracy"] == pytest.approx(point["score"])
        parts = [found, *found["bins"], *found["coverage"], *point["labels"], *point["confusions"]]
        assert all(f"`{name}`" in page.partition("### Compile")[0] for part in parts for name in part)
    assert run(monkeypatch, "report", tmp_path / "results", "--json") == 0
    assert json.loads(capsys.readouterr().out) == points


@pytest.fixture(name="predict")
def _predict(model_folder: Path, table: Path, tmp_path: Path) -> list[object]:
    queries = tmp_path / "new.csv"
    queries.write_text("text\nfilm 1\nfilm 2\n\nfilm 3\n", encoding="utf-8")
    task = ["--task", f"{table}:text:label", "--shots", 8]
    return ["predict", "--model", model_folder, *task, "--input", queries, "--output", tmp_path / "answers.csv"]


def test_predict_is_told_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], predict: list[object], tmp_path: Path
) -> None:
    told = summary(monkeypatch, capsys, *predict, "--abstain-below", 1, exit_code=3)
    assert set(told) == documented("formats.md", "Predict")
    assert told["output"] == str(tmp_path / "answers.csv")
    assert (told["task"], told["num_rows"], told["num_problems"], told["num_abstained"]) == ("tickets", 4, 1, 3)
    assert (told["num_shots"], told["num_dropped"], told["num_continued"]) == (8, 0, 0)
    assert told["num_prefix_tokens"] > 8
    assert told["seconds"] > 0
    assert told["scores"] is None


def test_predict_tells_how_good_the_answers_are_where_the_rows_have_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], predict: list[object], tmp_path: Path
) -> None:
    (tmp_path / "new.csv").write_text("text,label\nfilm 1,good\nfilm 2,bad\n", encoding="utf-8")
    scores = summary(monkeypatch, capsys, *predict)["scores"]
    assert scores["num_scored"] == 2
    assert 0 <= scores["accuracy"] <= 1


def test_a_quiet_predict_says_how_many_rows_have_a_problem_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], predict: list[object], tmp_path: Path
) -> None:
    assert run(monkeypatch, *predict, "--quiet") == 3
    assert capsys.readouterr() == ("", "1 of 4 rows could not be answered; the column `problem` says why.\n")
    (tmp_path / "new.csv").write_text("text\nfilm 1\n", encoding="utf-8")
    assert run(monkeypatch, *predict, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_a_summary_where_the_answers_are_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], predict: list[object]
) -> None:
    assert run(monkeypatch, *predict, "--output", "-", "--json") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Name a file with --output" in printed.err


def test_a_quiet_run_continues_one_that_was_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], predict: list[object], tmp_path: Path
) -> None:
    (tmp_path / "new.csv").write_text("text\n" + "film\n" * 6, encoding="utf-8")
    monkeypatch.setattr("manyicl.engine.engine.READ_AHEAD_QUERIES", 2)
    with monkeypatch.context() as interrupted:
        columns = AnswerColumns.columns
        left = iter(range(4))

        def interrupt(self: AnswerColumns, prediction: Prediction) -> dict[str, object]:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return columns(self, prediction)

        interrupted.setattr(AnswerColumns, "columns", interrupt)
        assert run(monkeypatch, *predict) == 130
    capsys.readouterr()
    told = summary(monkeypatch, capsys, *predict, "--quiet")
    assert (told["num_rows"], told["num_continued"]) == (6, 4)
