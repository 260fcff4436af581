"""Whatever cuts writing off, a name stands for all that was written, or still for what it held before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from manyicl.atomic import folder_written_atomically, is_leftover, sync_folder, write_atomically


@pytest.mark.parametrize(
    "content", ["zwei\r\nLinien ä", "zwei\r\nLinien ä".encode(), lambda p: p.write_bytes("zwei\r\nLinien ä".encode())]
)
def test_text_bytes_and_a_function_write_the_same(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    write_atomically(path, content)
    assert path.read_bytes() == "zwei\r\nLinien ä".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_function_sees_the_ending_of_the_file(tmp_path: Path) -> None:
    seen: list[Path] = []
    write_atomically(tmp_path / "a.svg", seen.append)
    assert seen[0].suffix == ".svg"
    assert is_leftover(seen[0])
    assert not is_leftover(tmp_path / "a.svg")


def _fail(_: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("content", "error"), [("\ud800", UnicodeEncodeError), (_fail, KeyboardInterrupt)])
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, content: str, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error):
        write_atomically(path, content)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    seen: list[bool] = []
    sync = os.fsync

    def note_and_sync(descriptor: int) -> None:
        seen.append(path.exists())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note_and_sync)
    write_atomically(path, "new")
    assert seen == [False, True], "first the file, then its folder once the name stands"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "file"
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "file", "new")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_appears_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder"
    with folder_written_atomically(path) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "file").write_text("x")
        assert not path.exists()
        assert is_leftover(aside)
    assert (path / "inner" / "file").read_text() == "x"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_fails_or_is_taken_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), folder_written_atomically(tmp_path / "a"):
        raise KeyboardInterrupt
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(OSError, match="not empty"), folder_written_atomically(tmp_path / "b"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["b", "mine"]


def test_a_file_system_without_folders_to_sync_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    sync_folder(tmp_path)
