"""The record on disk: whole or named as broken."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from manyicl.errors import UserError
from manyicl.evaluation.result import (
    ContextExample,
    PredictedAnswer,
    Result,
    ResultStore,
    file_stem,
    hash_of,
    result_key,
)


def make_result(**changes: object) -> Result:
    fields: dict[str, object] = {
        "key": "0123456789abcdef",
        "task": "toy",
        "family": "classification",
        "source": "toy",
        "data_hash": "0" * 64,
        "num_shots": 4,
        "num_shots_used": 4,
        "seed": 0,
        "sampling": "balanced",
        "query_seed": 0,
        "num_queries": 4,
        "queries_hash": "q",
        "metric": "accuracy",
        "score": 0.5,
        "standard_error": 0.25,
        "companions": {"macro_f1": 0.4},
        "query_scores": (0.0, 1.0, 0.0, 1.0),
        "majority": 0.5,
        "model": "runs/one",
        "model_name": "one",
        "model_fingerprint": "f" * 64,
        "text_format": {"kind": "plain"},
        "prompt_hash": "p",
        "num_context_tokens": 10,
        "max_context_tokens": 100,
        "versions": {"python": "3"},
        "created": datetime(2026, 1, 1, tzinfo=UTC),
        "seconds": 1.0,
    }
    return Result.model_validate({**fields, **changes})


ANSWER = PredictedAnswer(
    origin="test.jsonl:1",
    query="line\u2028separator",
    answer="x\x85y",
    references=("x",),
    scores={},
    log_probability=-1,
)
SHOWN = ContextExample(origin="train.jsonl:7", query="a\u2029b", answer="c")


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    store, result = ResultStore(tmp_path / "new" / "folder"), make_result()
    store.save(result, [ANSWER, ANSWER], [SHOWN])
    assert store.load() == [result]
    assert store.find(result.task, result.num_shots, result.seed, result.key) == result
    assert store.predictions(result) == [ANSWER, ANSWER]
    assert store.context(result) == [SHOWN]


def test_no_partial_file_is_left_behind(tmp_path: Path) -> None:
    ResultStore(tmp_path).save(make_result(), [ANSWER], [])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name.split(".", 1)[1] for name in names] == ["context.jsonl", "predictions.jsonl", "result.json"]


def test_folders_inside_the_folder_are_read_too(tmp_path: Path) -> None:
    result = make_result(task="[odd] name")
    ResultStore(tmp_path / "base").save(result, [ANSWER], [SHOWN])
    store = ResultStore(tmp_path)
    assert store.load() == [result]
    assert store.predictions(result) == [ANSWER]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    result = make_result()
    ResultStore(tmp_path / "elsewhere").save(result, [ANSWER], [SHOWN])
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "results")
    store = ResultStore(tmp_path / "results")
    assert store.load() == [result]
    assert store.predictions(result) == [ANSWER]


def test_a_folder_named_like_a_record_is_no_record(tmp_path: Path) -> None:
    result = make_result()
    ResultStore(tmp_path / "x.result.json").save(result, [], [])
    assert ResultStore(tmp_path).load() == [result]


def test_a_record_of_version_1_is_read(tmp_path: Path) -> None:
    folder = Path(__file__).parent / "results_version_1"
    store = ResultStore(folder)
    (result,) = store.load()
    assert (result.record_version, result.num_shots, result.num_shots_dropped, result.num_queries_skipped) == (
        2,
        9,
        3,
        1,
    )
    assert len(store.predictions(result)) == result.num_queries == 2
    assert len(store.context(result)) == result.num_shots_used == 6
    assert ResultStore(tmp_path).save(result, [], []).name == next(folder.glob("*.result.json")).name


@pytest.mark.parametrize("text", ["", "{", "[]", '{"task": "x"}', "\x00"])
def test_a_broken_record_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "toy.result.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"toy\.result\.json: not a complete record"):
        ResultStore(tmp_path).load()


def test_a_record_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "toy.result.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match=r"toy\.result\.json"):
        ResultStore(tmp_path).load()


def test_a_missing_or_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder"):
        ResultStore(tmp_path / "absent").load()
    with pytest.raises(UserError, match="holds no result"):
        ResultStore(tmp_path).load()


def test_an_unknown_field_or_an_impossible_score_is_refused() -> None:
    with pytest.raises(ValidationError):
        make_result(scroe=1)
    with pytest.raises(ValidationError):
        make_result(score=1.2)


def test_the_key_is_a_function_of_the_arguments_alone() -> None:
    assert result_key({"a": 1, "b": 2}) == result_key({"b": 2, "a": 1})
    assert result_key({"a": 1}) != result_key({"a": 2})
    assert hash_of("ab", "c") != hash_of("a", "bc")


@pytest.mark.parametrize("task", ["../../etc/passwd", "задача", "a/b c", "", "x" * 300, ".hidden"])
def test_a_file_name_stays_in_its_folder(task: str) -> None:
    stem = file_stem(task, 4, 0, "key")
    assert "/" not in stem
    assert not stem.startswith(".")
    assert len(stem) < 120
