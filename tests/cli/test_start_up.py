"""What a command does not need, it does not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from manyicl.episodes.segment_tokenizer import SegmentTokenizer
from manyicl.episodes.text_format import PlainFormat
from tests.builders import byte_level_bpe, sentencepiece_bpe

SCRIPT = """
import sys
from manyicl.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = ("torch", "peft", "datasets", "pyarrow", "sklearn", "matplotlib")
print([name for name in heavy if name in sys.modules])
"""


@pytest.mark.slow
def test_a_compiled_task_of_a_model_without_adapter_is_answered_with_torch_and_transformers_alone(
    model_folder: Path, table: Path, tmp_path: Path
) -> None:
    queries = tmp_path / "new.csv"
    queries.write_text("text\nfilm 3 was fine\n", encoding="utf-8")
    common = ["--model", str(model_folder)]
    task = ["--task", f"{table}:text:label,test_fraction=0", "--shots", "8", "--output", str(tmp_path / "a.prefix")]
    prefix = ["--prefix", str(tmp_path / "a.prefix"), "--input", str(queries), "--output", str(tmp_path / "out.csv")]
    for words in (["compile", *common, *task], ["predict", *common, *prefix]):
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *words]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "['torch']"


@pytest.mark.parametrize(("make_tokenizer", "num_copies"), [(byte_level_bpe, 1), (sentencepiece_bpe, 2)])
def test_a_vocabulary_is_parsed_once_where_no_marker_comes_before_a_text(
    monkeypatch: pytest.MonkeyPatch, make_tokenizer: object, num_copies: int
) -> None:
    assert callable(make_tokenizer)
    tokenizer = make_tokenizer()
    copies = []
    parse = Tokenizer.from_str

    class Counting:
        @staticmethod
        def from_str(text: str) -> Tokenizer:
            copies.append(text)
            return parse(text)

    monkeypatch.setattr("manyicl.episodes.segment_tokenizer.Tokenizer", Counting)
    SegmentTokenizer(tokenizer, PlainFormat().constants)
    assert len(copies) == num_copies
