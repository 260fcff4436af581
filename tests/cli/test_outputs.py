"""Where nothing can be written is found before a model is loaded, and trying leaves nothing behind."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from manyicl.cli import outputs
from manyicl.cli.outputs import require_writable
from manyicl.errors import UserError
from tests.bad_input.files import recipe
from tests.cli.test_predict import run


def test_a_place_that_takes_files_keeps_nothing_of_the_trial(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "x", tmp_path / "not" / "there"):
        require_writable(path)
        require_writable(path, beside=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs the /proc of Linux, where nobody makes a file")
def test_a_place_that_takes_no_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"output '/proc/x': cannot be written, .*; name another place"):
        require_writable(Path("/proc/x"))
    with pytest.raises(UserError, match="file name too long"):
        require_writable(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    "command",
    [
        "predict --task t --input new.jsonl --output out.jsonl",
        "compile --task t --output out.prefix",
        "evaluate --tasks t --output results",
        "export --output exported",
    ],
)
def test_every_command_says_so_before_it_looks_for_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str
) -> None:
    _fill(monkeypatch, tmp_path)
    assert run(monkeypatch, *command.split(), "--model", "nowhere") == 2
    assert "cannot be written, permission denied; name another place." in capsys.readouterr().err


def test_a_run_says_so_too_and_a_dry_run_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _fill(monkeypatch, tmp_path)
    assert run(monkeypatch, "train", "recipe.yaml") == 2
    assert "output 'run': cannot be written, permission denied" in capsys.readouterr().err
    assert run(monkeypatch, "train", "recipe.yaml", "--dry-run") == 0


def _fill(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Write a task, a recipe and queries into a folder that takes no further file."""

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for name, content in {**recipe(), "new.jsonl": '{"text": "film"}\n'}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(outputs, "TemporaryFile", refuse)
