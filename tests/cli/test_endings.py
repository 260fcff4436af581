"""How the command line ends, whatever happens."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from manyicl.__main__ import main
from manyicl.errors import UserError
from manyicl.paths import files_below


def code_where_it_raises(error: BaseException, place: str, monkeypatch: pytest.MonkeyPatch) -> object:
    """Run the command line with a function in it that raises, and return the exit code."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(place, fail)
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_ctrl_c_ends_quietly_also_while_modules_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert code_where_it_raises(KeyboardInterrupt(), "manyicl.cli.main.main", monkeypatch) == 130


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "A file could not be written: no space left on device. Make",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a.jsonl"), "a.jsonl: permission denied."),
        (OSError(errno.EIO, "Input/output error"), "Input/output error."),
        (MemoryError("no room for an array"), "Out of memory: no room for an array"),
    ],
)
def test_a_failure_of_the_machine_is_a_sentence(
    error: Exception, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_where_it_raises(error, "manyicl.cli.main.app", monkeypatch) == 1
    assert f"failed {sentence}" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    scan = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"a: the folder cannot be read, permission denied\."):
        list(files_below(tmp_path))
