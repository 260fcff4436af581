"""A check that passed is not repeated; one that failed, or that would be of something else, is."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyicl.errors import UserError
from manyicl.model import load, passed_checks
from manyicl.model.load import load_model
from manyicl.model.passed_checks import passed_before
from tests.builders import byte_level_bpe, tiny_model


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))


def test_only_what_has_passed_is_remembered() -> None:
    calls: list[str] = []

    def fails() -> None:
        calls.append("fails")
        raise UserError("no", "it does not pass")

    for _ in range(2):
        with pytest.raises(UserError):
            passed_before({"model": 1}, fails)
        passed_before({"model": 2}, lambda: calls.append("passes"))
    passed_before({"model": 3}, lambda: calls.append("another"))
    assert calls == ["fails", "passes", "fails", "another"]


def test_other_versions_and_another_source_are_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    passed_before({}, lambda: calls.append(1))
    monkeypatch.setattr(passed_checks, "library_versions", lambda: {"torch": "0"})
    passed_before({}, lambda: calls.append(2))
    monkeypatch.setattr(passed_checks, "_source_hash", lambda: "changed")
    passed_before({}, lambda: calls.append(3))
    passed_before({}, lambda: calls.append(4))
    assert calls == [1, 2, 3]


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "file"))
    calls: list[int] = []
    for number in range(2):
        passed_before({}, lambda number=number: calls.append(number))  # type: ignore[misc]
    assert calls == [0, 1]


def test_a_model_is_compared_once_and_again_after_any_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    checked: list[object] = []
    monkeypatch.setattr(load, "require_isolation", checked.append)
    tokenizer = byte_level_bpe()
    for folder, seed in (("a", 0), ("b", 1)):
        tiny_model("llama", len(tokenizer), seed=seed).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    for _ in range(2):
        load_model(tmp_path / "a")
    assert len(checked) == 1
    load_model(tmp_path / "b")
    assert len(checked) == 2, "other weights"
    load_model(tmp_path / "a", dtype="bfloat16")
    assert len(checked) == 3, "another precision"
    config = tmp_path / "a" / "config.json"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'), encoding="utf-8")
    assert config.read_text(encoding="utf-8") != text
    load_model(tmp_path / "a")
    assert len(checked) == 4, "another configuration"


def test_a_set_is_the_same_in_every_order() -> None:
    # As the names of layers in the configuration of an adapter are.
    calls: list[int] = []
    names = [f"name {number}" for number in range(30)]
    for order in (names, names[::-1]):
        other = set(order[:1])
        other.update(order)
        passed_before({"layers": other}, lambda: calls.append(1))
    assert len(calls) == 1
    assert passed_checks._as_json({"b", "a"}) == ["a", "b"]


def test_the_oldest_marks_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passed_checks, "MOST_REMEMBERED", 3)
    calls: list[int] = []
    for number in (0, 1, 2, 3, 4, 4, 0):
        passed_before({"number": number}, lambda number=number: calls.append(number))  # type: ignore[misc]
    assert calls == [0, 1, 2, 3, 4, 0]
