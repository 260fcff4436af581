"""One mistake, the command that meets it, and what the one sentence must say."""

from __future__ import annotations

import hashlib
import io
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from manyicl.cli import main as main_module
from manyicl.cli.main import main
from manyicl.errors import UserError

Content = str | bytes


@dataclass(frozen=True)
class Case:
    """A person's mistake, or what looks like one and is accepted.

    Attributes:
        name: A sentence.
        command: What follows ``manyicl`` on the command line; ``MODEL`` stands for a model folder.
        says: Parts of the sentence on standard error, or where all is well of what is printed.
        files: Path -> content, written before the command runs; a string has its line ends as they are.
        prepare: Whatever else makes the mistake, done in the folder of the files.
        stdin: What is sent to the command.
        leaves: Paths that may be there afterwards: answers to the queries before a mistake.
        is_option: True where typer itself refuses an option, in a box of its own.
        exit_code: 2, 0 for what is accepted, or 3 where bad rows are reported.
        code: Code of the error; None where it is not asserted.
        fields: Fields of the error and their values; a string may be the beginning of the value.
    """

    name: str
    command: str
    says: tuple[str, ...] = ()
    files: Mapping[str, Content] = field(default_factory=dict)
    prepare: Callable[[Path], object] | None = None
    stdin: str = ""
    leaves: tuple[str, ...] = ()
    is_option: bool = False
    exit_code: int = 2
    code: str | None = None
    fields: Mapping[str, str | int] = field(default_factory=dict)


def accepted(name: str, command: str, *says: str, **others: Any) -> Case:
    """A case in which nothing is wrong."""
    return Case(name, command, says, exit_code=0, **others)


def refused(name: str, command: str, code: str, /, **others: Any) -> Case:
    """A case whose error has this code; keywords that are fields of an error are compared with it."""
    names = ("what", "expected", "found", "remedy", "file", "row", "field")
    fields: dict[str, str | int] = {key: others.pop(key) for key in names if key in others}
    return Case(name, command, code=code, fields=fields, **others)


def table_of(cases: Iterable[Case]) -> pytest.MarkDecorator:
    """Parametrize a test with cases, each under its sentence."""
    listed = list(cases)
    names = [case.name for case in listed]
    assert len(set(names)) == len(names), "two cases have one name"
    return pytest.mark.parametrize("case", listed, ids=names)


def meet(
    case: Case,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model: Path | None = None,
) -> None:
    """Run a case as a user would, and hold that it ends with one sentence and that nothing is lost."""
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    monkeypatch.chdir(folder)
    if case.prepare is not None:
        case.prepare(folder)
    before = _content_of(folder)
    words = ["manyicl", *shlex.split(case.command)]
    monkeypatch.setattr("sys.argv", [str(model) if word == "MODEL" else word for word in words])
    monkeypatch.setattr("sys.stdin", io.StringIO(case.stdin))
    # The boxes of typer would be broken into lines of 80 characters.
    monkeypatch.setenv("COLUMNS", "1000")
    errors: list[UserError] = []
    print_error = main_module.print_error

    def note_and_print(error: UserError, console: Console) -> None:
        errors.append(error)
        print_error(error, console)

    monkeypatch.setattr(main_module, "print_error", note_and_print)
    exit_code = run()
    printed = capsys.readouterr()
    assert exit_code == case.exit_code, printed.err + printed.out
    assert "Traceback" not in printed.err
    said = printed.err
    if case.exit_code == 2 and not case.is_option:
        assert said.endswith("\n")
        said = said.splitlines()[-1]
        assert said.startswith("error "), repr(printed.err)
        assert sum(line.startswith(("error", "failed")) for line in printed.err.splitlines()) == 1
        assert said.endswith((".", "?", "…", ")")), said
    elif case.exit_code != 2:
        assert not any(line.startswith(("error", "failed")) for line in said.splitlines()), said
        said += printed.out
    for part in case.says:
        assert part in said, said
    if case.code is not None:
        (error,) = errors
        known = error.fields()
        assert known["code"] == case.code, known
        for key, value in case.fields.items():
            found = known.get(key)
            assert found == value or (isinstance(value, str) and str(found).startswith(value)), (key, known)
    if case.exit_code:
        after = {path: content for path, content in _content_of(folder).items() if path not in case.leaves}
        assert after == before


def run() -> int:
    """Run what `sys.argv` says, and return the exit code."""
    try:
        main()
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


def _content_of(folder: Path) -> dict[str, str]:
    """Hash every file of a folder; folders and links count with their names."""
    content = {}
    for place, folders, files in os.walk(folder):
        for name in folders:
            content[str((Path(place) / name).relative_to(folder))] = "folder"
        for name in files:
            path = Path(place) / name
            whole = path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else b"no file"
            content[str(path.relative_to(folder))] = hashlib.sha256(whole).hexdigest()
    return content
