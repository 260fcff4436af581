"""Where nothing can be written is found before a model is loaded, and trying leaves nothing behind."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from manyicl import outputs
from tests.bad_input.files import recipe
from tests.cli.test_predict import run


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
    assert "the output cannot be written, permission denied. Name another place." in capsys.readouterr().err


def test_a_run_says_so_too_and_a_dry_run_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    _fill(monkeypatch, tmp_path)
    assert run(monkeypatch, "train", "recipe.yaml") == 2
    assert "run: the output cannot be written, permission denied" in capsys.readouterr().err
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
