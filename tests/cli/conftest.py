"""A tiny model and a small table, as folders and files that a command can be pointed at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders import byte_level_bpe, tiny_model


@pytest.fixture(name="model_folder", scope="module")
def _model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_level_bpe()
    tiny_model("llama", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(name="table")
def _table(tmp_path: Path) -> Path:
    path = tmp_path / "tickets.csv"
    rows = "".join(f"film {i} was fine,{('good', 'bad')[i % 2]}\n" for i in range(40))
    path.write_text("text,label\n" + rows, encoding="utf-8")
    return path
