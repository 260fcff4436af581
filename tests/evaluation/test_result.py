"""The record on disk: whole or named as broken."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from manyicl.episodes.text_format import PlainFormat
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


def point(number: int, task: str = "toy") -> Result:
    """A result among others of its task."""
    return make_result(task=task, key=f"{number:016}", seed=number)


def test_a_task_has_one_file_however_many_results_it_has(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    for number in range(4):
        store.save(point(number, "toy" if number % 2 else "other"), [ANSWER], [SHOWN])
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".results.lock", "other.results.jsonl", "toy.results.jsonl"]


def test_what_a_killed_process_left_of_a_line_is_not_there_and_is_replaced(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    first, second, third = map(point, range(3))
    path = store.save(first, [ANSWER], [SHOWN])
    line = path.read_bytes()
    # As long as a long text is read back in.
    for half in (line[:-2], line[:50], b"{" + b"x" * 200_000):
        path.write_bytes(line + half)
        again = ResultStore(tmp_path)
        assert again.load() == [first]
        assert again.find(second.task, second.num_shots, second.seed, second.key) is None
    again.save(second, [ANSWER, ANSWER], [])
    assert again.find(second.task, second.num_shots, second.seed, second.key) == second
    store.save(third, [], [SHOWN])
    assert ResultStore(tmp_path).load() == store.load() == again.load() == [first, second, third]
    assert [len(store.predictions(one)) for one in (first, second, third)] == [1, 2, 0]


def test_a_last_line_without_its_end_counts_and_stays(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    first, second, third = map(point, range(3))
    path = store.save(first, [ANSWER], [SHOWN])
    store.save(second, [ANSWER, ANSWER], [])
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    again = ResultStore(tmp_path)
    assert again.find(second.task, second.num_shots, second.seed, second.key) == second
    assert len(again.predictions(second)) == 2
    store.save(third, [], [SHOWN])
    assert again.find(third.task, third.num_shots, third.seed, third.key) == third
    assert ResultStore(tmp_path).load() == again.load() == [first, second, third]
    assert [len(again.predictions(one)) for one in (first, second, third)] == [1, 2, 0]
    assert path.read_bytes().count(b"\n") == 3


def test_a_last_line_that_is_no_record_is_named_and_not_cut_off(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    path = store.save(point(0), [ANSWER], [SHOWN])
    path.write_bytes(path.read_bytes() + b'{"record": {}}')
    with pytest.raises(UserError, match=r"toy\.results\.jsonl:2: not a complete record"):
        ResultStore(tmp_path).load()
    store.save(point(1), [], [])
    assert b'{"record": {}}\n' in path.read_bytes()


@pytest.mark.parametrize("blank", ["\n", "\r\n", " \t\n\n", "  "])
def test_empty_lines_are_skipped(blank: str, tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    path = store.save(point(0), [ANSWER], [SHOWN])
    line = path.read_text(encoding="utf-8")
    path.write_text(f"\n{line}{blank}", encoding="utf-8", newline="")
    again = ResultStore(tmp_path)
    assert again.find("toy", 4, 0, point(0).key) == point(0)
    again.save(point(1), [ANSWER], [])
    assert ResultStore(tmp_path).load() == again.load() == [point(0), point(1)]
    assert again.context(point(0)) == [SHOWN]


def test_a_folder_in_place_of_the_file_of_a_task_is_named(tmp_path: Path) -> None:
    (tmp_path / "toy.results.jsonl").mkdir()
    uses: list[Callable[[ResultStore], object]] = [
        lambda store: store.find("toy", 4, 0, "key"),
        lambda store: store.save(point(0), [], []),
    ]
    for use in uses:
        with pytest.raises(UserError, match=r"toy\.results\.jsonl: .* is a folder; expected a file"):
            use(ResultStore(tmp_path))


def test_the_last_of_several_results_of_a_key_counts(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    store.save(make_result(score=0.25), [ANSWER], [])
    store.save(make_result(), [ANSWER, ANSWER], [SHOWN])
    assert store.load() == [make_result()]
    assert len(store.predictions(make_result())) == 2


def test_a_store_sees_what_another_one_adds(tmp_path: Path) -> None:
    one, other = ResultStore(tmp_path), ResultStore(tmp_path)
    for number in range(3):
        one.save(point(number), [ANSWER], [])
        assert other.find("toy", 4, number, point(number).key) == point(number)


def test_a_result_is_added_once_and_the_one_that_is_there_is_returned(tmp_path: Path) -> None:
    one, other = ResultStore(tmp_path), ResultStore(tmp_path)
    mine, theirs = make_result(score=0.25), make_result()
    assert one.add(theirs, [ANSWER], []) == (theirs, False)
    assert other.add(mine, [ANSWER] * 3, []) == (theirs, True)
    assert (tmp_path / "toy.results.jsonl").read_bytes().count(b"\n") == 1
    assert other.predictions(theirs) == [ANSWER]
    assert other.add(point(1), [], []) == (point(1), False)


def test_a_store_reads_a_file_anew_that_was_written_again(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    path = store.save(point(0), [ANSWER], [])
    assert store.load() == [point(0)]
    path.unlink()
    for number in range(1, 3):
        ResultStore(tmp_path).save(point(number), [ANSWER] * number, [])
    assert store.load() == [point(1), point(2)]
    assert len(store.predictions(point(2))) == 2


def save_many(folder: Path, first: int) -> None:
    store = ResultStore(folder)
    for number in range(first, first + 40):
        # Longer than a buffer, so that a line is written in several pieces.
        store.save(point(number), [ANSWER] * 100, [SHOWN] * number)


def test_two_processes_add_to_one_file_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=save_many, args=(tmp_path, first)) for first in (0, 100)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    store = ResultStore(tmp_path)
    records = store.load()
    assert sorted(record.seed for record in records) == [*range(40), *range(100, 140)]
    assert all(store.context(record) == [SHOWN] * record.seed for record in records)
    assert all(store.predictions(record) == [ANSWER] * 100 for record in records)


def test_folders_inside_the_folder_are_read_too(tmp_path: Path) -> None:
    result = make_result(task="[odd] name")
    ResultStore(tmp_path / "base").save(result, [ANSWER], [SHOWN])
    store = ResultStore(tmp_path)
    assert store.load() == [result]
    assert store.predictions(result) == [ANSWER]


def test_folders_that_hold_one_measurement_under_two_names_have_two_results(tmp_path: Path) -> None:
    for folder, name in (("before", "base"), ("after", "untrained")):
        ResultStore(tmp_path / folder).save(make_result(model_name=name), [ANSWER], [SHOWN])
    store = ResultStore(tmp_path)
    results = store.load()
    assert {result.model_name for result in results} == {"base", "untrained"}
    assert [store.predictions(result) for result in results] == [[ANSWER], [ANSWER]]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    result = make_result()
    ResultStore(tmp_path / "elsewhere").save(result, [ANSWER], [SHOWN])
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "results")
    store = ResultStore(tmp_path / "results")
    assert store.load() == [result]
    assert store.predictions(result) == [ANSWER]


@pytest.mark.parametrize("name", ["x.result.json", "x.results.jsonl"])
def test_a_folder_named_like_a_record_is_no_record(name: str, tmp_path: Path) -> None:
    result = make_result()
    ResultStore(tmp_path / name).save(result, [], [])
    assert ResultStore(tmp_path).load() == [result]


def test_a_record_without_a_score_for_each_query_is_no_record(tmp_path: Path) -> None:
    ResultStore(tmp_path).save(point(1), [ANSWER], [])
    (path,) = tmp_path.glob("*.jsonl")
    line = json.loads(path.read_text(encoding="utf-8"))
    line["record"]["query_scores"] = [1.0] * (line["record"]["num_queries"] + 1)
    path.write_text(json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"jsonl:1: not a complete record of this version, .* scores of "):
        ResultStore(tmp_path).load()


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
    # One text ended answer and instruction then.
    assert (
        result.text_format
        == PlainFormat(end_of_answer="\n\n", end_is_control_token=False, end_of_instruction="\n\n").model_dump()
    )
    assert len(store.predictions(result)) == result.num_queries == 2
    assert len(store.context(result)) == result.num_shots_used == 6
    assert store.find(result.task, result.num_shots, result.seed, result.key) == result
    (tmp_path / "results").mkdir()
    for path in folder.iterdir():
        shutil.copy(path, tmp_path / "results")
    both = ResultStore(tmp_path / "results")
    both.save(point(1), [ANSWER], [])
    assert [record.task for record in both.load()] == ["toy", "old"]
    assert len(both.context(result)) == 6


@pytest.mark.parametrize("text", ["", "{", "[]", '{"task": "x"}', "\x00"])
def test_a_broken_record_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "toy.result.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"toy\.result\.json: not a complete record"):
        ResultStore(tmp_path).load()
    path.unlink()
    if not text:
        return  # an empty line is skipped
    results = ResultStore(tmp_path).save(make_result(), [], [])
    results.write_text(results.read_text(encoding="utf-8") + text + "\n", encoding="utf-8")
    reads: list[Callable[[ResultStore], object]] = [ResultStore.load, lambda store: store.find("toy", 4, 0, "key")]
    for read in reads:
        with pytest.raises(UserError, match=r"toy\.results\.jsonl:2: not a complete record"):
            read(ResultStore(tmp_path))


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
