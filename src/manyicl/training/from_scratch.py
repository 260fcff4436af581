"""A new tokenizer, trained on the tasks' training rows, and a new model of the size given in the recipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from manyicl.episodes.text_format import ParagraphFormat, Segment, text_of
from manyicl.errors import UserError, did_you_mean
from manyicl.model.attention import ATTENTION
from manyicl.model.isolation import require_isolation
from manyicl.tasks.task import Task
from manyicl.training.recipe import FromScratchSettings, TokenizerSettings

UNKNOWN, PADDING, END = "<unk>", "<pad>", "<eos>"


def train_tokenizer(
    tasks: Sequence[Task], settings: TokenizerSettings, text_format: ParagraphFormat
) -> PreTrainedTokenizerBase:
    """Train a tokenizer on instructions, queries and answers, segment by segment as they will be encoded."""
    tokenizer, trainer = _word_level(settings) if settings.kind == "word" else _byte_level_bpe(settings)
    tokenizer.train_from_iterator(training_segments(tasks, text_format), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PADDING,
        eos_token=END,
        unk_token=UNKNOWN if settings.kind == "word" else None,
        clean_up_tokenization_spaces=False,
    )


def training_segments(tasks: Sequence[Task], text_format: ParagraphFormat) -> Iterator[str]:
    """Yield the texts of which packed sequences are made; test rows are never looked at."""
    for task in tasks:
        yield text_of(text_format.preamble(task.instruction()))
        yield from (_written(text_format.answer(label)) for label in task.labels or ())
        for example in task.train:
            yield text_of(text_format.query(example.query.text))
            yield _written(text_format.answer(example.answer))


def _written(segments: Iterable[Segment]) -> str:
    """Join segments without control tokens, which a tokenizer does not learn from text."""
    return text_of(segment for segment in segments if not segment.is_control)


def _word_level(settings: TokenizerSettings) -> tuple[Tokenizer, trainers.Trainer]:
    """One token per word between spaces; line breaks, and pairs of them, are tokens of their own.

    Words are joined by single spaces again, except around line breaks: so text whose words are
    separated by single spaces or line breaks comes back exactly.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    lines, words = pre_tokenizers.Split(Regex("\n\n|\n"), "isolated"), pre_tokenizers.Split(" ", "removed")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([lines, words])
    tokenizer.decoder = decoders.Sequence(
        [
            # "##" marks no token here; WordPiece is the decoder that puts a space between words.
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(" +(?=\n)"), ""),
            decoders.Replace(Regex("(?<=\n) +"), ""),
        ]
    )
    special = [UNKNOWN, PADDING, END]
    return tokenizer, trainers.WordLevelTrainer(
        vocab_size=settings.vocabulary_size, special_tokens=special, show_progress=False
    )


def _byte_level_bpe(settings: TokenizerSettings) -> tuple[Tokenizer, trainers.Trainer]:
    """Pairs merged over all 256 bytes, so that any text comes back exactly, seen in training or not."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=settings.vocabulary_size,
        special_tokens=[PADDING, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def require_loadable(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Check that plain transformers will load this tokenizer for this architecture, before anything is trained.

    For some architectures (qwen2 in 5.23) AutoTokenizer puts the library's own pre-tokenizer in the place of the
    saved one, without a word.

    Raises:
        UserError: If what it loads encodes differently.
    """
    probe = "The  film,\n1 + 12 was good\n\nné"
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if loaded(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
        raise _refusal(
            "tokenizer_replaced",
            f"architecture: for {config.model_type} this transformers replaces a new tokenizer by "
            f"{type(loaded).__name__}, which encodes differently",
            "Use another architecture: llama with attention_bias: true has the shape of qwen2.",
        )


def _refusal(code: str, what: str, remedy: str | None = None, key: str = "") -> UserError:
    """Refuse a key of model.from_scratch, with which ``what`` begins."""
    field = f"model.from_scratch.{what.partition(':')[0]}{key and f'.{key}'}"
    return UserError(code, f"model.from_scratch.{what}", remedy=remedy, field=field)


def new_config(
    settings: FromScratchSettings, tokenizer: PreTrainedTokenizerBase, max_context_tokens: int
) -> PreTrainedConfig:
    """Build the configuration: the recipe's keys, and what follows from tokenizer and context.

    Raises:
        UserError: If the architecture or one of its keys is unknown, or the keys do not go together.
    """
    architecture = settings.architecture
    if architecture not in CONFIG_MAPPING:
        remedy = did_you_mean(architecture, CONFIG_MAPPING.keys()).strip()
        raise _refusal("unknown_architecture", f"architecture: transformers knows no {architecture!r}", remedy)
    known = {*AutoConfig.for_model(architecture).to_dict(), "rope_theta", "rope_scaling"}
    for key in settings.config:
        if key not in known:
            remedy = did_you_mean(key, known).strip()
            raise _refusal("unknown_key", f"config: {architecture} has no key {key!r}", remedy, key)
    derived: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max_context_tokens,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        return AutoConfig.for_model(architecture, **(derived | settings.config))
    except (TypeError, ValueError, ArithmeticError, LookupError, StrictDataclassError) as error:
        raise _refusal("wrong_config", f"config: {_last_line(error)}") from error


def new_model(settings: FromScratchSettings, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Make a model with fresh weights, the same for the same seed.

    Raises:
        UserError: If the architecture is no causal language model, or mixes packed episodes.
    """
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, trust_remote_code=False)
    except (TypeError, ValueError, ArithmeticError, LookupError, AssertionError) as error:
        what = f"config: {settings.architecture} cannot be made with it: {_last_line(error)}"
        raise _refusal("wrong_config", what) from error
    if settings.initialization == "structured":
        from manyicl.model.initialization import structured_initialization

        structured_initialization(model, seed)
    require_isolation(model)
    return cast(PreTrainedModel, model)


def _last_line(error: Exception) -> str:
    """Return the cause at the end of what a library says, without the name of its exception."""
    lines = [line.strip() for line in str(error).splitlines() if any(map(str.isalnum, line))]
    last = lines[-1] if lines else type(error).__name__
    return last.removeprefix("ValueError: ").removeprefix("TypeError: ").rstrip(".") + "."
