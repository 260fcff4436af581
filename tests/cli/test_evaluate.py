"""`manyicl evaluate`: arguments in, records out, and one sentence for a mistake."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from manyicl.cli.evaluate import evaluate_command, parse_shots
from manyicl.errors import UserError
from manyicl.evaluation.result import ResultStore
from manyicl.model.manifest import Manifest, TrainedTask
from manyicl.tasks.files import load_task
from tests.builders import byte_level_bpe, tiny_model


@pytest.fixture(name="arguments")
def _arguments(tmp_path: Path) -> dict[str, object]:
    folder = tmp_path / "model"
    tokenizer = byte_level_bpe()
    tiny_model("llama", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    table = tmp_path / "reviews.csv"
    rows = "".join(f"film {i} was fine,{('good', 'bad')[i % 2]}\n" for i in range(40))
    table.write_text("text,label\n" + rows, encoding="utf-8")
    return {
        "model": str(folder),
        "tasks": [f"{table}:text->label"],
        "output": tmp_path / "results",
        "shots": "0,2",
        "seeds": 2,
        "queries": 4,
        "name": "tiny",
    }


def test_it_writes_one_record_per_point_and_skips_them_again(
    arguments: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_command(**arguments)  # type: ignore[arg-type]
    records = ResultStore(tmp_path / "results").load()
    assert [(r.seed, r.num_shots) for r in records] == [(0, 0), (0, 2), (1, 2)]
    printed = capsys.readouterr().out
    assert "3 results in" in printed
    # Two draws of two examples, each with four queries.
    assert re.search(r"reviews after 2 examples, tiny: \d of 8 answers wrong. It is \d+ % sure on average", printed)
    assert all(word in printed for word in ("precision", "recall", "expected ↓ answered →", "--abstain-below"))
    assert all(line.confidence for one in records for line in ResultStore(tmp_path / "results").predictions(one))
    evaluate_command(**arguments)  # type: ignore[arg-type]
    assert "3 of them found" in capsys.readouterr().out
    assert ResultStore(tmp_path / "results").load() == records


def test_shots_are_sorted_and_each_counts_once() -> None:
    assert parse_shots("4, 1,0,4") == (0, 1, 4)


@pytest.mark.parametrize("text", ["", ",", "a", "1,-2", "1.5", "1;2", "²"])
def test_shots_that_are_no_whole_numbers_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="wrong --shots; expected whole numbers"):
        parse_shots(text)


def test_a_missing_model_is_a_persons_mistake(arguments: dict[str, object]) -> None:
    with pytest.raises(UserError, match="absent"):
        evaluate_command(**{**arguments, "model": "runs/absent"})  # type: ignore[arg-type]


def test_data_that_changed_since_training_is_told(
    arguments: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = load_task(str(arguments["tasks"][0]))  # type: ignore[index]
    manifest = Manifest(max_context_tokens=256, tasks=(TrainedTask.of(task),))
    manifest.write(tmp_path / "model")
    evaluate_command(**arguments)  # type: ignore[arg-type]
    assert "changed since" not in capsys.readouterr().err
    table = tmp_path / "reviews.csv"
    table.write_text(table.read_text(encoding="utf-8") + "one film more,good\n", encoding="utf-8")
    evaluate_command(**arguments)  # type: ignore[arg-type]
    printed = capsys.readouterr().err
    assert (
        f"The data of 'reviews' changed since the model was trained on it: hash {task.data_hash[:12]} then" in printed
    )


def test_json_is_all_that_is_printed_and_quiet_prints_nothing(
    arguments: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_command(**arguments, as_json=True)  # type: ignore[arg-type]
    scores = json.loads(capsys.readouterr().out)
    assert [(one["model"], one["shots"]) for one in scores] == [("tiny", 0), ("tiny", 2)]
    evaluate_command(**arguments, quiet=True)  # type: ignore[arg-type]
    assert capsys.readouterr() == ("", "")
