"""Where nothing can be written, or something would be lost, is found before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyicl.errors import UserError
from manyicl.outputs import require_output_file, require_output_folder, require_writable


def test_a_place_that_takes_files_keeps_nothing_of_the_trial(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "x", tmp_path / "not" / "there"):
        require_writable(path)
        require_writable(path, as_a_whole=True)
    require_output_file(tmp_path / "x.html", endings=(".html",))
    require_output_file(tmp_path / "not" / "there", with_parents=True)
    require_output_folder(tmp_path / "not" / "there")
    require_output_folder(tmp_path, empty=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs the /proc of Linux, where nobody makes a file")
def test_a_place_that_takes_no_files_is_refused(tmp_path: Path) -> None:
    _assert_refused("output_not_writable", lambda: require_writable(Path("/proc/x")))
    _assert_refused("output_not_writable", lambda: require_writable(tmp_path / ("x" * 300) / "y"))


@pytest.mark.parametrize("name", ["x" * 248, "ä" * 125])
def test_a_name_is_refused_whose_files_aside_would_be_too_long(tmp_path: Path, name: str) -> None:
    _assert_refused("output_name_too_long", lambda: require_output_file(tmp_path / name))
    _assert_refused("output_name_too_long", lambda: require_output_folder(tmp_path / name))


def test_a_file_is_refused_where_it_cannot_stand_or_would_replace_another(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("a")
    (tmp_path / "empty.csv").touch()
    _assert_refused("output_is_folder", lambda: require_output_file(tmp_path))
    _assert_refused("output_folder_missing", lambda: require_output_file(tmp_path / "no" / "x"))
    _assert_refused("output_below_file", lambda: require_output_file(tmp_path / "mine.csv" / "x"))
    _assert_refused("wrong_ending", lambda: require_output_file(tmp_path / "x", endings=(".csv", ".jsonl")))
    _assert_refused("output_exists", lambda: require_output_file(tmp_path / "mine.csv"))
    _assert_refused("output_exists", lambda: require_output_file(Path("/dev/null"), is_ours=lambda _: True))
    _assert_refused(
        "output_is_input",
        lambda: require_output_file(tmp_path / "mine.csv", inputs={"--prefix": None, "--input": tmp_path / "mine.csv"}),
    )
    require_output_file(tmp_path / "mine.csv", is_ours=lambda path: path.read_text() == "a")
    require_output_file(tmp_path / "empty.csv")


def test_a_folder_is_refused_where_it_cannot_stand_or_should_be_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    _assert_refused("output_is_file", lambda: require_output_folder(tmp_path / "file"))
    _assert_refused("output_below_file", lambda: require_output_folder(tmp_path / "file" / "x"))
    _assert_refused("output_exists", lambda: require_output_folder(tmp_path, empty=True))
    require_output_folder(tmp_path)


def _assert_refused(code: str, check: object) -> None:
    with pytest.raises(UserError) as caught:
        check()  # type: ignore[operator]
    assert caught.value.code == code, str(caught.value)
