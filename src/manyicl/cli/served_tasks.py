"""`manyicl tasks push | pull`: task folders and tables to a task server, and tasks of a server to folders."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyicl.cli.options import DataRoot, TaskPatterns
from manyicl.errors import UserError, pluralized, quoted

if TYPE_CHECKING:
    from manyicl.client import Client, RemoteTask
    from manyicl.served import TaskInfo
    from manyicl.tasks.files import TaskWithRows
    from manyicl.tasks.schema import TaskFile

# What a task file says of its rows and of where they are: only rows that break no rule are pushed.
OF_LOCAL_ROWS = {"name", "data", "bad_rows", "on_both_sides"}
TRAIN_FILE = "train.jsonl"

Url = Annotated[
    str | None,
    typer.Option(
        help="Address of the server; the key is read from the variable MANYICL_API_KEY. [default: the variable "
        "MANYICL_URL, else http://127.0.0.1:8000]",
    ),
]


def push(client: Client, local: TaskWithRows, *, remove_others: bool) -> str:
    """Make a task of a server what a local one is, wait until it can answer, and say what was done.

    Test rows stay where they are. Where the server has the task, rows that it lacks are added.

    Args:
        client: Client of the server.
        local: The local task.
        remove_others: Whether demonstrations that the local task lacks are removed.

    Raises:
        UserError: If the server has a task of that name with other keys, refuses the task, or cannot compile it.
    """
    from manyicl.served import RefusedRequestError

    task, keys = client.task(local.task.name), _keys_to_push(local.keys)
    try:
        info = task.info()
    except RefusedRequestError as error:
        if error.status != 404:
            raise
        info = client.create_task(local.task.name, local.train_rows(), **keys).wait()
        return f"{info.name}: made with {pluralized(info.num_demonstrations, 'demonstration')}, ready"
    _require_equal_keys(info, keys)
    return f"{info.name}: {_update(task, info, local, remove_others=remove_others)}"


def _keys_to_push(keys: TaskFile) -> dict[str, Any]:
    """Return the keys that the task file gives, without those about its rows."""
    return keys.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude=OF_LOCAL_ROWS)


def _require_equal_keys(info: TaskInfo, keys: Mapping[str, Any]) -> None:
    """Refuse a task of the server with other keys: demonstrations that were made for them would change their meaning.

    Raises:
        UserError: If one differs, after defaults.
    """
    from manyicl.checked import validated
    from manyicl.tasks.schema import TaskFile

    default = {"query": "{{ query }}", "answer": "{{ answer }}", "data": {"train": TRAIN_FILE}}
    there, here = (
        validated(TaskFile, {**default, **given}, None).model_dump(mode="json", exclude=OF_LOCAL_ROWS)
        for given in (info.task, keys)
    )
    if different := [key for key in here if here[key] != there[key]]:
        key = different[0]
        what = f"the server has a task {info.name!r} with another {key}"
        remedy = "Push the task under another name, or delete the one on the server."
        raise UserError(
            "other_keys", what, expected=quoted(here[key]), found=quoted(there[key]), remedy=remedy, field=key
        )


def _update(task: RemoteTask, info: TaskInfo, local: TaskWithRows, *, remove_others: bool) -> str:
    """Add rows that the server lacks, and say how many; if another change goes before, nothing is added twice."""
    lacking = Counter(map(_canonical, local.train_rows()))
    others = []
    for one in task.demonstrations(info.version):
        written = _canonical(one["columns"])
        if lacking[written]:
            lacking[written] -= 1
        else:
            others.append(one["number"])
    added = [json.loads(written) for written in lacking.elements()]
    revision = info.revision
    if added:
        revision = task.add(added, if_revision=revision).task.revision
    for number in others if remove_others else ():
        revision = task.remove(number, if_revision=revision).task.revision
    task.wait()
    done = [f"{len(added):,} added"]
    if others:
        done.append(f"{len(others):,} removed" if remove_others else f"{len(others):,} that are not here, kept")
    return ", ".join(done)


def _canonical(columns: Mapping[str, Any]) -> str:
    """Write a row so that equal rows are equal texts."""
    return json.dumps(columns, ensure_ascii=False, sort_keys=True)


def push_tasks(
    tasks: TaskPatterns,
    url: Url = None,
    remove_others: Annotated[
        bool, typer.Option("--remove-others", help="Remove demonstrations of the server that the task here lacks.")
    ] = False,
    data_root: DataRoot = None,
) -> None:
    """Make tasks on a task server of the training rows of tasks here, or add the rows that it lacks.

    The command ends when the tasks can answer. Test rows are not sent. Of a table, a fifth of the rows are test rows,
    unless `,test_fraction=0` says otherwise.

    Examples:

        manyicl tasks push tasks/tickets

        manyicl tasks push tickets.csv:text:label,test_fraction=0 --url https://tasks.example.org
    """
    from manyicl.client import Client
    from manyicl.tasks.files import load_with_rows, task_places

    loaded = [load_with_rows(place, data_root) for pattern in tasks for place in task_places(pattern)]
    with Client(url) as client:
        for local in loaded:
            typer.echo(push(client, local, remove_others=remove_others))


def pull_task(
    task: Annotated[str, typer.Argument(help="Name or id of a task of the server.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    url: Url = None,
    version: Annotated[int | None, typer.Option(min=1, help="Version of the task. [default: the newest]")] = None,
) -> None:
    """Write a task of a task server to a folder: task.yaml, and its demonstrations as train.jsonl.

    Examples:

        manyicl tasks pull tickets tasks/tickets
    """
    from manyicl.atomic import folder_written_atomically
    from manyicl.client import Client

    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        remedy = "Name another folder, or move it away."
        raise UserError("output_exists", "there is something already", remedy=remedy, file=folder)
    with Client(url) as client:
        remote = client.task(task)
        info = remote.info()
        with folder_written_atomically(folder) as aside:
            num_rows = _write_rows(aside / TRAIN_FILE, remote.demonstrations(version or info.version))
            (aside / "task.yaml").write_text(_task_file(info), encoding="utf-8")
    typer.echo(f"{folder}: {pluralized(num_rows, 'demonstration')}")


def _write_rows(path: Path, demonstrations: Iterator[Mapping[str, Any]]) -> int:
    """Write demonstrations as JSON lines, and count them."""
    num_rows = 0
    with path.open("w", encoding="utf-8") as file:
        for one in demonstrations:
            file.write(json.dumps(one["columns"], ensure_ascii=False) + "\n")
            num_rows += 1
    return num_rows


def _task_file(info: TaskInfo) -> str:
    """Write the task file of a task of the server."""
    import yaml

    keys = {"name": info.name, "query": "{{ query }}", "answer": "{{ answer }}", **info.task}
    content = {**keys, "data": {"train": TRAIN_FILE}}
    return yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=1_000)
