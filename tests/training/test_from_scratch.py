from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from manyicl.episodes.encoding import Encoder
from manyicl.episodes.text_format import PlainFormat, text_of
from manyicl.errors import UserError
from manyicl.training.from_scratch import train_tokenizer
from manyicl.training.recipe import TokenizerSettings
from manyicl.training.start import starting_point
from tests.builders import make_example, make_task
from tests.training.recipes import small_recipe, small_tasks

WORD = TokenizerSettings(kind="word", vocabulary_size=200)
BYTES = TokenizerSettings(kind="byte_bpe", vocabulary_size=400)


@pytest.mark.parametrize("settings", [WORD, BYTES], ids=["word", "byte_bpe"])
def test_every_piece_of_a_training_row_comes_back_exactly(settings: TokenizerSettings) -> None:
    task = make_task(train=[make_example("a film\nin two lines\nis long", "good and bad")], instruction="good or bad")
    encoder = Encoder(train_tokenizer([task], settings, PlainFormat()))
    (example,) = task.train
    text = text_of((*encoder.format.query(example.query.text), *encoder.format.answer(example.answer)))
    ids = (*encoder.query_ids(example.query.text), *encoder.answer_ids(example.answer))
    assert encoder.decode(ids) == text
    assert encoder.decode(encoder.answer_ids(example.answer)) == "good and bad\n\n"


def test_a_byte_level_tokenizer_keeps_text_it_has_never_seen() -> None:
    encoder = Encoder(train_tokenizer([make_task()], BYTES, PlainFormat()))
    text = "Ünïcödé  日本語\t🎉\n"
    assert encoder.decode(encoder.segment_ids(text)) == text


def test_a_word_tokenizer_has_one_token_a_word_and_never_looks_at_test_rows() -> None:
    task = make_task(test=[make_example("secret film", "good")])
    tokenizer = train_tokenizer([task], WORD, PlainFormat())
    assert len(tokenizer("film 1 was good")["input_ids"]) == 4
    assert tokenizer("secret")["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer.pad_token_id is not None


@pytest.mark.parametrize("settings", [WORD, BYTES], ids=["word", "byte_bpe"])
def test_the_same_rows_give_the_same_tokenizer(settings: TokenizerSettings) -> None:
    first, second = (train_tokenizer([make_task()], settings, PlainFormat()) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
    assert len(first) <= settings.vocabulary_size


def test_the_same_seed_gives_the_same_weights_and_another_others(tmp_path: Path) -> None:
    models = [
        starting_point(small_recipe(tmp_path, f"training.seed={seed}"), small_tasks().train).model for seed in (1, 1, 2)
    ]
    first, again, other = (list(model.parameters()) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_vocabulary_context_and_special_tokens_follow_by_themselves(tmp_path: Path) -> None:
    start = starting_point(small_recipe(tmp_path), small_tasks().train)
    assert start.model.config.vocab_size == len(start.tokenizer)
    assert start.model.config.max_position_embeddings == 60
    assert start.model.config.pad_token_id == start.tokenizer.pad_token_id
    assert start.base is None


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gemma2"])
def test_plain_transformers_loads_the_tokenizer_of_other_architectures(tmp_path: Path, architecture: str) -> None:
    config = "{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    config += "num_key_value_heads: 2, head_dim: 8}"
    changes = [f"model.from_scratch.architecture={architecture}", f"model.from_scratch.config={config}"]
    start = starting_point(small_recipe(tmp_path, *changes), small_tasks().train)
    start.model.save_pretrained(tmp_path)
    start.tokenizer.save_pretrained(tmp_path)
    text = "film 1 was good\n\n"
    assert AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == start.tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.from_scratch.architecture=lama", "transformers knows no 'lama'. Did you mean 'llama'?"),
        ("model.from_scratch.config.hiden_size=3", "llama has no key 'hiden_size'. Did you mean 'hidden_size'?"),
        ("model.from_scratch={architecture: t5, config: {}}", "t5"),
        ("model.from_scratch={architecture: qwen2, config: {}}", "replaces a new tokenizer by Qwen2Tokenizer"),
        ("model.from_scratch.config.num_attention_heads=5", "is not a multiple of the number of attention heads (5)"),
        ("model.from_scratch.config.hidden_size=wide", "model.from_scratch.config: "),
    ],
)
def test_a_model_that_cannot_be_made_is_refused_in_one_sentence(tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        starting_point(small_recipe(tmp_path, override), small_tasks().train)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
