"""`manyicl tasks push | pull` against a server that keeps tasks in a dictionary."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from manyicl.cli.tasks import app
from manyicl.errors import UserError
from manyicl.tasks.files import load_task, load_with_rows, task_places
from tests.scripted_server import Answer, Sent, scripted_server

TASK_YAML = """\
family: classification
query: "{{ title }}: {{ text }}"
answer: "{{ label }}"
labels: [yes, no, "007"]
instruction: "One of {{ labels | join(', ') }}."
bad_rows: drop
data: {train: [train.csv, more.jsonl], test: test.csv}
"""


class Tasks:
    """The routes that push and pull need."""

    def __init__(self) -> None:
        self.tasks: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, dict[int, Any]] = {}
        self.revision = 1

    def __call__(self, sent: Sent) -> Answer:
        name, number = re.fullmatch(r"/v1/tasks/?([^/]*)(?:/demonstrations/?(\d*))?", sent.path).groups()  # type: ignore[union-attr]
        if sent.method == "POST" and not name:
            body = sent.json
            self.tasks[body["name"]] = {"task": body["task"]}
            self.rows[body["name"]] = dict(enumerate(body["demonstrations"], start=1))
            return Answer(201, self.info(body["name"]))
        if name not in self.tasks:
            return Answer(404, {"code": "unknown_task", "detail": f"There is no task {name!r}."})
        if sent.path.endswith("/demonstrations") and sent.method == "GET":
            numbered = [{"number": number, "columns": columns} for number, columns in self.rows[name].items()]
            return Answer(200, {"data": numbered, "next_cursor": None})
        if sent.method != "GET" and sent.headers.get("if-match") != f'"{self.revision}"':
            return Answer(412, {"code": "changed_meanwhile", "detail": "It was changed meanwhile."})
        if sent.method == "POST":
            self.rows[name] |= dict(enumerate(sent.json["demonstrations"], start=max(self.rows[name]) + 1))
        elif sent.method == "DELETE":
            del self.rows[name][int(number)]
        else:
            return Answer(200, self.info(name))
        self.revision += 1
        version = {"version": 2, "change": "added", "state": "compiling"}
        return Answer(201, {"task": self.info(name), "version": version, "numbers": None})

    def info(self, name: str) -> dict[str, Any]:
        known = {"id": name, "name": name, "revision": self.revision, "version": 1, "state": "ready"}
        return {**known, **self.tasks[name], "num_demonstrations": len(self.rows[name])}


@pytest.fixture
def tasks() -> Tasks:
    return Tasks()


@pytest.fixture(autouse=True)
def _server(tasks: Tasks, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with scripted_server(tasks) as server:
        monkeypatch.setenv("MANYICL_URL", server.url)
        yield


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tickets"
    folder.mkdir()
    (folder / "task.yaml").write_text(TASK_YAML, encoding="utf-8")
    (folder / "train.csv").write_text("title,text,label\nA,first,yes\nB,second,no\nC,no label,\nD,asked,no\n")
    (folder / "more.jsonl").write_text('{"title": 1e3, "text": "drei € ", "label": "007", "other": [1]}\n')
    (folder / "test.csv").write_text("title,text,label\nD,asked,no\n")
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_task_makes_the_round_trip_with_its_keys_and_training_rows(
    folder: Path, tasks: Tasks, tmp_path: Path
) -> None:
    assert run("push", folder) == "tickets: made with 3 demonstrations, ready\n"
    assert tasks.tasks["tickets"]["task"].keys() == {"family", "query", "answer", "labels", "instruction"}
    assert list(tasks.rows["tickets"].values()) == [
        {"title": "A", "text": "first", "label": "yes"},
        {"title": "B", "text": "second", "label": "no"},
        {"title": "1e3", "text": "drei € ", "label": "007", "other": ["1"]},
    ]
    assert "3 demonstrations" in run("pull", "tickets", tmp_path / "copy")
    original, copy = load_task(folder), load_task(tmp_path / "copy")
    assert copy.spec == original.spec
    assert [(one.query, one.answer) for one in copy.train] == [(one.query, one.answer) for one in original.train]
    assert not copy.test


def test_pushing_again_adds_only_what_the_server_lacks(folder: Path, tasks: Tasks) -> None:
    run("push", folder)
    assert run("push", folder) == "tickets: 0 added\n"
    with (folder / "train.csv").open("a") as file:
        file.write("E,fifth,yes\n")
    assert run("push", folder) == "tickets: 1 added\n"
    assert tasks.rows["tickets"][4] == {"title": "E", "text": "fifth", "label": "yes"}


def test_what_the_folder_lacks_is_kept_and_said_or_removed_on_request(folder: Path, tasks: Tasks) -> None:
    run("push", folder)
    (folder / "train.csv").write_text("title,text,label\nA,corrected,yes\nB,second,no\n")
    assert run("push", folder) == "tickets: 1 added, 1 that are not here, kept\n"
    assert run("push", folder, "--remove-others") == "tickets: 0 added, 1 removed\n"
    assert list(tasks.rows["tickets"]) == [2, 3, 4]


def test_a_task_of_the_server_with_other_keys_is_left_as_it_is(folder: Path, tasks: Tasks) -> None:
    run("push", folder)
    task_file = folder / "task.yaml"
    task_file.write_text(TASK_YAML.replace("One of", "Any of"), encoding="utf-8")
    with pytest.raises(UserError, match="another instruction") as caught:
        run("push", folder)
    assert caught.value.code == "other_keys"
    task_file.write_text(TASK_YAML.replace("bad_rows: drop", "metric: accuracy\nbad_rows: drop"), encoding="utf-8")
    with pytest.raises(UserError, match="another metric"):
        run("push", folder)
    assert len(tasks.rows["tickets"]) == 3


def test_a_table_is_pushed_with_the_columns_it_has(tmp_path: Path, tasks: Tasks) -> None:
    lines = "".join(f"film {number},{('good', 'bad')[number % 2]}\n" for number in range(10))
    (tmp_path / "films.csv").write_text("review,verdict\n" + lines)
    assert "made with 10" in run("push", f"{tmp_path}/films.csv:review:verdict,test_fraction=0")
    assert tasks.tasks["films"]["task"]["family"] == "classification"
    assert tasks.rows["films"][1].keys() == {"review", "verdict"}


def test_a_folder_with_something_in_it_is_not_written_to(folder: Path) -> None:
    run("push", folder)
    with pytest.raises(UserError) as caught:
        run("pull", "tickets", folder)
    assert caught.value.code == "output_exists"


def test_an_unknown_task_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run("pull", "tickets", tmp_path / "copy")
    assert caught.value.code == "unknown_task"
    assert not list(tmp_path.iterdir())


def test_rows_of_two_files_with_one_name_are_not_mixed_up(folder: Path) -> None:
    (folder / "old").mkdir()
    (folder / "train.csv").rename(folder / "old" / "more.jsonl")
    (folder / "old" / "more.jsonl").write_text('{"title": "x", "text": "y", "label": "yes"}\n')
    (folder / "task.yaml").write_text(TASK_YAML.replace("train.csv", "old/more.jsonl"))
    (place,) = task_places(folder)
    with pytest.raises(UserError) as caught:
        load_with_rows(place, None).train_rows()
    assert caught.value.code == "repeated_file_name"
