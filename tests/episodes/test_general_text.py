"""A general text: read whole or refused, and encoded piece by piece as all at once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from manyicl.episodes.general_text import GeneralText, next_word, read_general_text
from manyicl.episodes.text_tokenizer import TextTokenizer
from manyicl.errors import UserError
from tests.builders import byte_level_bpe, sentencepiece_bpe, word_level


def test_a_plain_text_is_read_as_it_is_and_named_by_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("déjà vu\nand more\n".encode())
    text = read_general_text(path)
    assert text.text == "déjà vu\nand more\n"
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == GeneralText.of(text.text, "same").sha256


def test_documents_of_jsonl_are_divided_by_a_blank_line(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one\u2028line", "id": 1}\n\n{"text": "two"}\n', encoding="utf-8")
    assert read_general_text(path).text == "one\u2028line\n\ntwo"


@pytest.mark.parametrize("line", ["text", "[]", '{"texts": "a"}', '{"text": 1}', "7"])
def test_a_line_of_jsonl_without_a_text_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n' + line, encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_general_text(path)
    assert (error.value.code, error.value.file, error.value.row) == ("no_text", path, 2)


def test_half_a_character_in_a_line_of_jsonl_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "whole \\ud83d\\ude00"}\n{"text": "\\ud83d half"}\n', encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_general_text(path)
    assert (error.value.code, error.value.file, error.value.row) == ("half_a_character", path, 2)


@pytest.mark.parametrize(
    ("content", "code"), [(b"", "empty_text"), (b" \n\n", "empty_text"), ("Gerät".encode("cp1252"), "not_utf8")]
)
def test_a_text_that_is_empty_or_not_utf8_is_refused(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_general_text(path)
    assert (error.value.code, error.value.file) == (code, path)


def test_a_missing_text_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some", encoding="utf-8")
    with pytest.raises(UserError, match=r"Did you mean 'text.txt'") as error:
        read_general_text(tmp_path / "txt.txt", "sequences.replay.text")
    assert (error.value.code, error.value.field) == ("missing_file", "sequences.replay.text")
    with pytest.raises(UserError) as error:
        read_general_text(tmp_path)
    assert error.value.code == "not_a_file"


@pytest.mark.parametrize(
    ("tokenizer", "marker"), [(byte_level_bpe(), ""), (sentencepiece_bpe(), " ")], ids=["byte-level", "sentencepiece"]
)
@pytest.mark.parametrize("num_tokens", [1, 3, 47, 400])
def test_the_first_tokens_are_those_of_the_whole_text(tokenizer: object, marker: str, num_tokens: int) -> None:
    text = "the film was good and the music was fine\n\n" * 60
    encode = TextTokenizer(tokenizer)  # type: ignore[arg-type]
    everything = encode.ids_from(text, 0, 10**6)
    assert encode.ids_from(text, 0, num_tokens) == everything[:num_tokens]
    assert encode.num_bytes(everything) == len(f"{marker}{text}".encode())


def test_a_control_token_in_a_text_is_characters() -> None:
    tokenizer = sentencepiece_bpe()
    assert tokenizer.eos_token_id not in TextTokenizer(tokenizer).ids_from("the film </s> was", 0, 100)


def test_a_text_whose_words_are_not_known_is_refused() -> None:
    encode = TextTokenizer(word_level())
    encode.require_known_words(GeneralText.of("the film was good", "a text"))
    with pytest.raises(UserError) as error:
        encode.require_known_words(GeneralText.of("lorem ipsum dolor sit", "a text"))
    assert error.value.code == "unknown_words"


def test_a_piece_begins_with_a_whole_word() -> None:
    text = "one two\n\nthree  four"
    assert [text[next_word(text, position) :][:5] for position in (0, 3, 4, 9, 13, 14)] == [
        "two\n\n",
        "two\n\n",
        "three",
        "four",
        "four",
        "four",
    ]
    assert next_word(text, 17) == 0
