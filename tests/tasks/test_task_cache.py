"""A task is found by sizes and times, equals the task that is loaded, and leaves its rows in their files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from manyicl.errors import UserError
from manyicl.tasks import task_cache
from manyicl.tasks.files import load_task, load_tasks
from manyicl.tasks.starter_tables import STARTER_TABLES
from manyicl.tasks.task import Task
from manyicl.tasks.task_cache import ExamplesInFiles, load_known

LINE = '{{"text": "row {0}", "label": "{1}"}}\n'


def write_task(folder: Path, num_rows: int = 6, data: Path | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "family: classification\nquery: '{{ text }}'\nanswer: '{{ label }}'\nlabels: [a, b]\n"
    (folder / "task.yaml").write_text(text + "data: {train: train.jsonl, test: test.jsonl}\n", encoding="utf-8")
    for side in ("train", "test"):
        rows = "".join(LINE.format(f"{side} {row}", "ab"[row % 2]) for row in range(num_rows))
        ((data or folder) / f"{side}.jsonl").write_text(rows, encoding="utf-8")
    return folder / "task.yaml"


@pytest.fixture(autouse=True)
def _nothing_held(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(task_cache, "_HELD", task_cache._HeldTasks())


def in_memory(task: Task) -> tuple[Any, ...]:
    return task.spec, task.data_hash, dict(task.dropped), tuple(task.train), tuple(task.test)


def reading_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("rows were read")

    monkeypatch.setattr(task_cache, "load_place", fail)


@pytest.mark.parametrize("name", ["tickets", "titles", "urgency"])
def test_a_known_task_equals_the_loaded_one_and_is_known_without_reading_its_rows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = STARTER_TABLES / name
    task = load_task(folder)
    first = load_known(folder / "task.yaml", None)
    assert in_memory(first) == in_memory(task)
    reading_nothing(monkeypatch)
    known = load_known(folder / "task.yaml", None)
    assert known == first
    assert (len(known.train), len(known.test)) == (len(task.train), len(task.test))


def test_a_slice_is_a_view_and_a_task_pickles_as_its_place(tmp_path: Path) -> None:
    task = load_known(write_task(tmp_path / "t", num_rows=500), None)
    assert len(pickle.dumps(task)) < 3000
    again = pickle.loads(pickle.dumps(task))
    assert again == task
    assert list(again.train[2:5]) == list(task.train)[2:5]
    assert again.train[-1] == list(task.train)[-1]
    assert isinstance(again.train[2:5], ExamplesInFiles)


@pytest.mark.parametrize("changed", ["train.jsonl", "task.yaml"])
def test_a_file_with_another_size_or_time_is_read_again(tmp_path: Path, changed: str) -> None:
    place = write_task(tmp_path / "t")
    before = load_known(place, None)
    file = place.parent / changed
    file.write_text(file.read_text(encoding="utf-8").replace("row train 0", "row train X").replace("[a, b]", "[b, a]"))
    os.utime(file, ns=(0, 10**18))
    after = load_known(place, None)
    assert after.data_hash != before.data_hash
    assert after.data_hash == load_task(place).data_hash


def test_rows_changed_under_the_same_size_and_time_are_found_by_rehash_and_refused_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = write_task(tmp_path / "t")
    before = load_known(place, None)
    file = place.parent / "train.jsonl"
    stat = file.stat()
    file.write_text(file.read_text(encoding="utf-8").replace("row train 0", "row train X"), encoding="utf-8")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    monkeypatch.setattr(task_cache, "_HELD", task_cache._HeldTasks())
    assert load_known(place, None) == before
    with pytest.raises(UserError, match="no longer those that this run began with") as raised:
        list(before.train)
    assert (raised.value.code, "--rehash" in str(raised.value)) == ("rows_changed", True)
    after = load_known(place, None, rehash=True)
    assert after.data_hash == load_task(place).data_hash != before.data_hash
    assert load_known(place, None) == after


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": ["0", 1]}'])
def test_a_damaged_record_is_made_again(tmp_path: Path, cache: Path, content: str) -> None:
    place = write_task(tmp_path / "t")
    task = load_known(place, None)
    (record,) = (cache / "tasks").glob("*.json")
    whole = record.read_bytes()
    record.write_text(content, encoding="utf-8")
    assert load_known(place, None) == task
    assert record.read_bytes() == whole


def test_the_record_of_another_version_or_place_is_not_believed(tmp_path: Path, cache: Path) -> None:
    place = write_task(tmp_path / "t")
    task = load_known(place, None)
    (record,) = (cache / "tasks").glob("*.json")
    whole = json.loads(record.read_text(encoding="utf-8"))
    for changes in ({"version": ["0.0.0", 1]}, {"place": "/elsewhere/task.yaml"}):
        record.write_text(json.dumps({**whole, "data_hash": "0" * 64, **changes}), encoding="utf-8")
        assert load_known(place, None) == task


def test_a_file_that_comes_before_the_one_that_was_read_is_noticed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    place = write_task(tmp_path / "t", data=data)
    before = load_known(place, data)
    assert load_known(place, data) == before
    (tmp_path / "t" / "train.jsonl").write_text(LINE.format("nearer", "a") + LINE.format("by", "b"), encoding="utf-8")
    after = load_known(place, data)
    assert [example.query.text for example in after.train] == ["row nearer", "row by"]


def test_a_table_is_known_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(f"film {row},{'ab'[row % 2]}\n" for row in range(20))
    (tmp_path / "films.csv").write_text("text,label\n" + rows, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (task,) = load_tasks("films.csv:text:label,name=films", load=load_known)
    monkeypatch.chdir("/")
    assert in_memory(task) == in_memory(load_task(f"{tmp_path}/films.csv:text:label,name=films"))
    assert isinstance(task.train, ExamplesInFiles)


def test_without_a_cache_folder_a_task_has_its_rows_in_memory(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file", encoding="utf-8")
    place = write_task(tmp_path / "t")
    assert load_known(place, None) == load_task(place)


def test_a_mistake_in_a_task_is_reported_as_when_it_is_loaded(tmp_path: Path) -> None:
    place = write_task(tmp_path / "t")
    (place.parent / "train.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(UserError) as loaded:
        load_task(place)
    with pytest.raises(UserError) as known:
        load_known(place, None)
    assert str(known.value) == str(loaded.value)


def test_a_copy_of_a_hub_dataset_is_known_until_its_folder_changes(tmp_path: Path) -> None:
    place = write_task(tmp_path / "t", data=tmp_path)
    text = place.read_text(encoding="utf-8").partition("data:")[0]
    place.write_text(text + "data: {hf: owner/name}\n", encoding="utf-8")
    copy = tmp_path / "data" / "t"
    copy.mkdir(parents=True)
    for side in ("train", "test"):
        (tmp_path / f"{side}.jsonl").rename(copy / f"{side}.jsonl")
    task = load_known(place, tmp_path / "data")
    assert isinstance(task.train, ExamplesInFiles)
    assert in_memory(task) == in_memory(load_task(place, tmp_path / "data"))
    (copy / "train.csv").write_text("text,label\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"holds train\.jsonl and train.csv"):
        load_known(place, tmp_path / "data")


def test_only_the_rows_of_the_tasks_used_last_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_cache, "MOST_EXAMPLES_HELD", 24)
    tasks = [load_known(write_task(tmp_path / name), None) for name in "abcd"]
    for task in (*tasks, *tasks):
        assert len(list(task.train)) == 6
        held = task_cache._HELD._tasks
        assert len(held) <= 2
        assert task_cache._HELD._num_examples == sum(len(each.train) + len(each.test) for each in held.values())
