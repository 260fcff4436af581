"""Tasks are plain data: JSON in and out, pickled as they are, stored on disk and read from there."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from torch.utils.data import DataLoader

import manyicl
import manyicl.tasks
from manyicl.errors import UserError
from manyicl.tasks import Example, Query, Task, TaskSpec, load_task, load_tasks
from manyicl.tasks.nanoworld.world import write_nano_world
from manyicl.tasks.task import hash_content
from tests.engine.parts import refused
from tests.tasks.catalog_rows import write_rows
from tests.tasks.test_files import write_task

PAIRS = [("what a film", "good"), ("so dull", "bad"), ("never again", "bad"), ("once more", "good")]
QUIZ = [
    Example(Query(f"{number} + 1 is?", (str(number + 1), "none")), str(number + 1), (str(number + 1), f"{number}+1"))
    for number in range(5000)
]


def from_file(folder: Path) -> list[Task]:
    return [load_task(write_task(folder / "films"))]


def from_catalog(folder: Path) -> list[Task]:
    for name in ("banking77", "arc_easy", "squad", "xsum"):
        write_rows(name, folder)
    return load_tasks(["catalog:banking77", "catalog:arc_easy", "catalog:squad", "catalog:xsum"], folder)


def from_nanoworld(folder: Path) -> list[Task]:
    write_nano_world(folder, seed=3, split="unseen")
    return load_tasks([folder])[:3]


def from_pairs(folder: Path) -> list[Task]:
    del folder
    return [Task.from_examples("mood", PAIRS, labels=("good", "bad"), instruction="{{ labels | join(' or ') }}?")]


ORIGINS = [from_file, from_catalog, from_nanoworld, from_pairs]


@pytest.mark.parametrize("origin", ORIGINS)
def test_a_task_and_its_spec_come_back_from_pickle_and_the_spec_from_json(
    tmp_path: Path, origin: Callable[[Path], list[Task]]
) -> None:
    for task in origin(tmp_path):
        again = pickle.loads(pickle.dumps(task))
        assert again == task
        assert hash_content(again) == task.data_hash
        spec = TaskSpec.model_validate_json(task.spec.model_dump_json())
        assert spec == task.spec == pickle.loads(pickle.dumps(task.spec))
        assert spec.instruction() == task.instruction()
        assert "Template" not in repr(task)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_worker_processes_are_given_tasks_as_they_are(tmp_path: Path, method: str) -> None:
    tasks = [task for origin in ORIGINS for task in origin(tmp_path / origin.__name__)]
    tasks.append(Task.from_examples("quiz", QUIZ).store(tmp_path / "quiz"))
    expected = [task.data_hash for task in tasks]
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, context) as pool:
        assert list(pool.map(hash_content, tasks)) == expected
    collate: Any = hash_content
    loader: DataLoader[Any] = DataLoader(
        tasks,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=1,
        collate_fn=collate,
        multiprocessing_context=context,
    )
    assert list(loader) == expected


def test_a_stored_task_is_the_same_task_and_pickles_as_its_location(tmp_path: Path) -> None:
    task = Task.from_examples("quiz", QUIZ, test=[Example(Query("?", ("a", "b")), "a", ("a",))])
    stored = task.store(tmp_path / "quiz")
    assert tuple(stored.train) == task.train
    assert tuple(stored.test) == task.test
    assert hash_content(stored) == stored.data_hash == task.data_hash
    assert Task.open(tmp_path / "quiz") == stored
    assert len(pickle.dumps(stored)) < 2000 < len(pickle.dumps(task)) / 100
    assert pickle.loads(pickle.dumps(stored)) == stored
    assert stored.demonstrations(7, seed=2) == task.demonstrations(7, seed=2)


@pytest.mark.parametrize("cut", [slice(3, 4990), slice(None, None, -7), slice(-3, None), slice(9, 9)])
def test_stored_examples_are_a_sequence_with_slices(tmp_path: Path, cut: slice) -> None:
    stored = Task.from_examples("quiz", QUIZ).store(tmp_path / "quiz").train
    part = stored[cut]
    assert list(part) == QUIZ_STORED[cut]
    assert len(part) == len(QUIZ_STORED[cut])
    assert pickle.loads(pickle.dumps(part)) == part
    for position in (0, -1, 1023, 1024):
        assert stored[position] == QUIZ_STORED[position]
    with pytest.raises(IndexError):
        stored[5000]


def test_examples_of_another_task_or_side_are_not_opened_as_a_tasks_own(tmp_path: Path) -> None:
    task = Task.from_examples("quiz", QUIZ, test=[Example(Query("?", ("a", "b")), "a", ("a",))])
    task.store(tmp_path / "quiz")
    replace(task, train=task.train[:10]).store(tmp_path / "part")
    Task.from_examples("mood", PAIRS).store(tmp_path / "mood")
    for source in ("part/train.arrow", "mood/train.arrow", "quiz/test.arrow"):
        folder = tmp_path / f"swapped {source.replace('/', ' ')}"
        shutil.copytree(tmp_path / "quiz", folder)
        shutil.copy(tmp_path / source, folder / "train.arrow")
        with pytest.raises(UserError) as caught:
            Task.open(folder)
        assert (caught.value.code, caught.value.file) == ("not_a_stored_task", folder)


def test_a_damaged_byte_of_a_text_is_refused_where_the_task_is_opened(tmp_path: Path) -> None:
    Task.from_examples("mood", PAIRS).store(tmp_path / "mood")
    file = tmp_path / "mood" / "train.arrow"
    file.write_bytes(file.read_bytes().replace(b"so dull", b"so\xffdull"))
    with refused("not_a_stored_task", file=str(file)):
        Task.open(tmp_path / "mood")


@pytest.mark.parametrize(
    ("before", "after"), [('"bad"', '"awful"'), ("accuracy", "macro_f1"), ('"dropped": {}', '"dropped": {"empty": 3}')]
)
def test_a_stored_task_that_was_edited_by_hand_is_refused(tmp_path: Path, before: str, after: str) -> None:
    Task.from_examples("mood", PAIRS, labels=("good", "bad")).store(tmp_path / "mood")
    file = tmp_path / "mood" / "task.json"
    text = file.read_text("utf-8")
    file.write_text(text.replace(before, after), "utf-8")
    with refused("not_a_stored_task", file=str(tmp_path / "mood"), remedy="Restore the folder"):
        Task.open(tmp_path / "mood")
    file.write_bytes(text.replace("\n", "\r\n").encode())  # as git writes it on some systems
    assert Task.open(tmp_path / "mood").labels == ("good", "bad")


def test_a_task_stored_before_edits_could_be_told_is_refused_with_the_remedy() -> None:
    with refused("wrong_value", field="format_version", found="1", remedy="Restore the folder, or store the task"):
        Task.open(Path(__file__).with_name("stored_v1"))


def test_half_a_character_is_refused_and_nothing_is_stored(tmp_path: Path) -> None:
    task = Task.from_examples("mood", PAIRS)
    with refused("half_a_character", found=r"'\ud800'"):
        replace(task, train=[Example(Query("\ud800"), "good", ("good",))]).store(tmp_path / "mood")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", [None, 5, [1]])
def test_what_is_no_path_is_refused(folder: Any) -> None:
    for use in (Task.open, Task.from_examples("mood", PAIRS).store):
        with refused("not_a_path", found="nothing" if folder is None else str(folder)):
            use(folder)


def test_a_sampling_that_does_not_exist_is_refused() -> None:
    sampling: Any = "foo"
    with refused("unknown_sampling", expected="'random' or 'balanced'", found="'foo'"):
        Task.from_examples("mood", PAIRS).demonstrations(2, sampling=sampling)


def test_a_slice_of_stored_examples_reads_the_file_that_is_open(tmp_path: Path) -> None:
    stored = Task.from_examples("quiz", QUIZ).store(tmp_path / "quiz").train
    (tmp_path / "quiz" / "train.arrow").unlink()
    assert stored[10:][0] == QUIZ_STORED[10]


QUIZ_STORED = [replace(example, origin=f"train:{number}") for number, example in enumerate(QUIZ, 1)]


def test_a_stored_task_never_replaces_anything_and_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    task = Task.from_examples("mood", PAIRS)
    task.store(tmp_path / "mood")
    with pytest.raises(UserError, match="exists already") as caught:
        task.store(tmp_path / "mood")
    assert caught.value.code == "folder_exists"
    with pytest.raises(UserError) as caught:
        task.store(tmp_path / "none" / "mood")
    assert caught.value.code == "no_such_folder"
    assert [path.name for path in tmp_path.iterdir()] == ["mood"]
    (tmp_path / "mood" / "train.arrow").write_bytes(b"no arrow")
    for folder in (tmp_path, tmp_path / "mood"):
        with pytest.raises(UserError) as caught:
            Task.open(folder)
        assert caught.value.code == "not_a_stored_task"


def test_examples_are_held_to_the_rules_of_rows() -> None:
    task = Task.from_examples("mood", PAIRS, labels=("good", "bad"), test=[("So  dull", "bad"), ("fine", "good")])
    assert [example.query.text for example in task.train] == ["what a film", "never again", "once more"]
    assert sum(task.dropped.values()) == 1
    assert (task.family, task.metric, task.source, task.is_closed) == ("classification", "accuracy", "mood", True)
    assert Task.from_examples("mood", PAIRS, labels="from_train").labels == ("bad", "good")
    free = Task.from_examples("mood", PAIRS)
    assert (free.family, free.metric, free.is_closed) == ("generation", "rougeL", False)
    quiz = Task.from_examples("quiz", QUIZ[:3], family="qa")
    assert (quiz.choices_column, quiz.metric, quiz.is_closed) == ("choices", "accuracy", True)
    assert quiz.query({"text": "?", "choices": ["a", "b"]}) == Query("?", ("a", "b"))


@pytest.mark.parametrize(
    ("examples", "labels", "row"),
    [
        ([("a", "good"), ("b", "ugly")], ("good", "bad"), 2),
        ([("a", "good"), ("b", " ")], None, 2),
        ([(" ", "good")], None, 1),
        ([("a", "good"), "ab"], None, 2),
        ([("a", "good", "more")], None, 1),
        ([("a", 1)], None, 1),
        ([("a\ud800", "b")], None, 1),
    ],
)
def test_a_bad_example_is_refused_by_its_number(examples: object, labels: object, row: int) -> None:
    with pytest.raises(UserError, match=f"^train:{row}: "):
        Task.from_examples("mood", examples, labels=labels)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no training rows"):
        Task.from_examples("mood", [])


@pytest.mark.parametrize(
    "changes",
    [{"labels": ("a", "a")}, {"labels": ()}, {"family": "poem"}, {"max_answer_tokens": 0}, {"name": ""}, {"nme": "x"}],
)
def test_a_spec_is_checked_when_it_is_made(changes: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TaskSpec.model_validate({"name": "a", "family": "qa", "query_template": "{{ text }}", **changes})


def test_sides_are_replaced_and_the_spec_changed_without_touching_the_rest() -> None:
    task = Task.from_examples("mood", PAIRS, labels=("good", "bad"))
    assert replace(task, test=task.train[:1], train=task.train[1:]).labels == task.labels
    changed = task.with_spec(metric="macro_f1")
    assert (changed.metric, changed.train, changed.data_hash) == ("macro_f1", task.train, task.data_hash)
    for changes, code in (({"family": "a poem"}, "wrong_value"), ({"metrc": "macro_f1"}, "unknown_key")):
        with pytest.raises(UserError) as caught:
            task.with_spec(**changes)
        assert (caught.value.code, caught.value.field) == (code, *changes)
    assert task.with_spec(family="poem").family == "poem"  # its metric is known


def test_the_package_exports_tasks() -> None:
    assert manyicl.TaskSpec is TaskSpec
    assert manyicl.Task is Task


def test_a_task_without_a_name_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        Task.from_examples(None, [("a", "x")])  # type: ignore[arg-type]
    assert refused.value.code == "wrong_type"
    assert refused.value.field == "name"
