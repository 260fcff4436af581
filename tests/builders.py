"""Small tasks, tokenizers and models, built in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from manyicl.model.attention import ATTENTION
from manyicl.model.load import LoadedModel, fingerprint
from manyicl.model.manifest import Manifest
from manyicl.tasks.task import Example, Query, Task, TaskSpec

TEXTS = [
    "the film was good and the music was fine",
    "a bad play, and a long one. never again!",
    "Where is the red box?\nIt stands by the door.",
    "1 + 12 = 13, 2 / 3 is 0.67",
    "déjà vu, naïve café; 日本語 и русский 🎉",
]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]


def make_example(query: str, answer: str, choices: tuple[str, ...] | None = None) -> Example:
    return Example(Query(query, choices), answer, (answer,))


def make_task(
    name: str = "toy",
    train: Sequence[Example] | None = None,
    test: Sequence[Example] | None = None,
    labels: tuple[str, ...] | None = ("good", "bad"),
    instruction: str | None = None,
    **changes: object,
) -> Task:
    """A task over one column `text`; by default 40 short reviews with two labels."""
    words = ["film", "play", "song", "book", "box"]
    rows = [make_example(f"{words[i % 5]} {i} was {words[i % 3]}", ("good", "bad")[i % 2]) for i in range(60)]
    examples: dict[str, Any] = {"data_hash": "0" * 64, "dropped": {}}
    examples |= {key: changes.pop(key) for key in ("data_hash", "dropped") if key in changes}
    fields: dict[str, Any] = {"family": "classification", "metric": "accuracy", "query_template": "{{ text }}"}
    spec = TaskSpec(name=name, labels=labels, instruction_template=instruction, **{**fields, **changes})
    sides = (tuple(rows[:40] if train is None else train), tuple(rows[40:] if test is None else test))
    return Task(spec, *sides, **examples)


def byte_level_bpe() -> PreTrainedTokenizerFast:
    """GPT-2 style: any text, a space belongs to the word behind it."""
    return byte_level_bpe_of(TEXTS, 330)


def byte_level_bpe_of(texts: Sequence[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer like `byte_level_bpe` with the words of other texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=None, eos_token="</s>", unk_token="<unk>")


def sentencepiece_bpe(prepend_normalizer: bool = False) -> PreTrainedTokenizerFast:
    """Llama-2 style: a marker ▁ before every text, byte fallback, a bos token."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if prepend_normalizer:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS[:4], trainer)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_bos(backend)


def unigram() -> PreTrainedTokenizerFast:
    """T5/Gemma style unigram with the leading-space marker."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    alphabet = sorted({character for text in TEXTS for character in text.replace(" ", "▁")} | set("\n▁0123456789"))
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return _with_bos(backend)


def word_level(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a word; line breaks are tokens, spaces are not."""
    vocabulary = dict.fromkeys(
        ["<unk>", "\n", "\n\n", *words, *" ".join(TEXTS).split(), "good", "bad", "box", "book", "song"]
    )
    vocabulary.update(dict.fromkeys(str(number) for number in range(100)))
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n\n|\n"), "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r" +(?=\n)"), ""),
            decoders.Replace(Regex(r"(?<=\n) +"), ""),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def _with_bos(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 9, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": 9},
    "olmo2": {},
}


def tiny_model(
    architecture: str = "llama", vocabulary_size: int = 97, seed: int = 0, attention: str = ATTENTION, **changes: object
) -> PreTrainedModel:
    """A random model of a few thousand weights with windows shorter than the text, in evaluation mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=vocabulary_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **{**ARCHITECTURES.get(architecture, {}), **changes},
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.eval()
    return model


def tiny_loaded(
    architecture: str = "llama", tokenizer: PreTrainedTokenizerFast | None = None, seed: int = 0
) -> LoadedModel:
    """A tiny model with a tokenizer and a manifest, as if loaded from a folder."""
    tokenizer = tokenizer or byte_level_bpe()
    model = tiny_model(architecture, len(tokenizer), seed)
    return LoadedModel(model, tokenizer, Manifest(max_context_tokens=256), fingerprint(model), f"tiny-{architecture}")
