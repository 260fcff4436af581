"""`predict --blend`: columns, compiled tasks, and refusals before a model is loaded."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from manyicl.engine import blend
from tests.cli.test_predict import run


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("is_blended", [True, False])
def test_blended_answers_say_so(
    is_blended: bool, monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    (tmp_path / "new.csv").write_text("text\nfilm\n\nplay 3\n", encoding="utf-8")
    task = ["--task", f"{table}:text:label", "--shots", 20]
    arguments = ["--input", tmp_path / "new.csv", "--output", tmp_path / "answers.csv", "--scores"]
    option = "--blend" if is_blended else "--no-blend"
    assert run(monkeypatch, "predict", "--model", model_folder, *task, *arguments, option) == 3
    first, empty, second = rows_of(tmp_path / "answers.csv")
    told = ["true", "", "true"] if is_blended else [None, None, None]
    assert [row.get("blended") for row in (first, empty, second)] == told
    for row in (first, second):
        assert float(row["probability"]) == float(row[f"score:{row['answer']}"])
        assert float(row["score:good"]) + float(row["score:bad"]) == pytest.approx(1, abs=1e-3)


def test_a_compiled_task_answers_with_the_blend_that_it_carries(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    (tmp_path / "new.jsonl").write_text('{"text": "film"}\n{"text": "play 3"}\n', encoding="utf-8")
    prefix, task = tmp_path / "task.prefix", ["--task", f"{table}:text:label"]
    model = ["--model", model_folder]
    fits = num_fits(monkeypatch)
    found: list[list[dict[str, Any]]] = []

    def answers(*source: object) -> None:
        output = tmp_path / f"answers{len(found)}.jsonl"
        arguments = [*source, "--input", tmp_path / "new.jsonl", "--output", output, "--blend"]
        assert run(monkeypatch, "predict", *model, *arguments) == 0
        found.append([json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()])

    answers(*task, "--shots", 20)
    compiling = ["compile", *model, *task, "--output", prefix]
    for options, num_while_compiling, num_while_answering in (
        (["--shots", 20], 0, 1),
        (["--shots", 20, "--blend"], 1, 0),
        (["--shots", 24, "--update"], 1, 0),
    ):
        fits.clear()
        assert run(monkeypatch, *compiling, *options) == 0
        assert len(fits) == num_while_compiling
        fits.clear()
        answers("--prefix", prefix)
        assert len(fits) == num_while_answering
    for first, *others in zip(*found[:3], strict=True):
        assert first["blended"]
        for other in others:
            assert other["blended"]
            assert other["answer"] == first["answer"]
            assert other["probability"] == pytest.approx(first["probability"], abs=2e-3)


def num_fits(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Note each time that weights are fitted."""
    noted: list[None] = []

    def fit(*arguments: Any) -> blend.BlendWeights:
        noted.append(None)
        return fit_weights(*arguments)

    fit_weights = blend.fit_weights
    monkeypatch.setattr(blend, "fit_weights", fit)
    return noted


def test_a_task_that_cannot_be_blended_is_not_compiled_with_a_blend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "table.csv"
    path.write_text("text,label\n" + "".join(f"film {i},label {i % 34}\n" for i in range(400)), encoding="utf-8")
    task = ["--task", f"{path}:text:label,test_fraction=0", "--output", tmp_path / "task.prefix"]
    assert run(monkeypatch, "compile", "--model", "builtin:one", *task, "--blend") == 2
    assert "at most 32 labels, found 34 labels" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("table_of", "arguments", "sentence"),
    [
        (lambda i: f"film {i},label {i % 34}", (), "at most 32 labels, found 34 labels"),
        (lambda i: f"film {i},{('good', 'bad')[i % 2]}", ("--retrieve", 2), "--blend does not go with --retrieve"),
    ],
)
def test_what_cannot_be_blended_is_refused_before_a_model_is_loaded(
    table_of: object,
    arguments: tuple[object, ...],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert callable(table_of)
    path = tmp_path / "table.csv"
    path.write_text("text,label\n" + "".join(f"{table_of(i)}\n" for i in range(400)), encoding="utf-8")
    task = ["--task", f"{path}:text:label,test_fraction=0", "--input", path]
    assert run(monkeypatch, "predict", "--model", "builtin:one", *task, *arguments, "--blend") == 2
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_free_answers_are_not_blended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "task.yaml"
    path.write_text('query: "{{ text }}"\nanswer: "{{ label }}"\nfamily: generation\ndata: {file: rows.csv}\n')
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"film {i},word {i}\n" for i in range(20)))
    task = ["--model", model_folder, "--task", path, "--shots", 2, "--input", tmp_path / "rows.csv"]
    assert run(monkeypatch, "predict", *task, "--blend") == 2
    assert "found free answers" in capsys.readouterr().err
    assert run(monkeypatch, "predict", *task, "--output", tmp_path / "answers.jsonl") == 0
    assert "blended" not in json.loads((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()[0])
