"""Tiny .gguf files, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.builders import byte_level_bpe

SHAPE: dict[str, object] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"


def gguf_library() -> Any:
    """The package gguf, or the reason why a test that needs it is skipped."""
    return pytest.importorskip("gguf", reason="the package gguf is not installed")


def entries(folder: Path) -> list[str]:
    """What lies in a cache of converted models, its lock and marks of passed checks aside."""
    others = {".lock", "passed_checks", "fingerprints"}
    return sorted(path.name for path in folder.iterdir() if path.name not in others) if folder.is_dir() else []


def tiny_base(architecture: str = "llama", **changes: object) -> PreTrainedModel:
    """A random model whose widths can be quantized in blocks of 32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=len(byte_level_bpe()), **{**SHAPE, **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(0, 0.3)
    model.eval()
    return model


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast | None = None,
    quantization: str = "F32",
    architecture: str | None = None,
    metadata: dict[str, Any] | None = None,
    leave_out: str | None = None,
) -> Path:
    """Write a model and its tokenizer; ``metadata`` adds to what is written or stands instead of it."""
    gguf = gguf_library()
    architecture = architecture or model.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_metadata(model, tokenizer or byte_level_bpe(), architecture), **(metadata or {})}.items():
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        if value is not None:
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
    for name, weights in model.state_dict().items():
        stored_as = names.get_name(name, (".weight", ".bias"))
        if stored_as == leave_out or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        values = weights.detach().numpy()
        if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = values.reshape(-1, 2, config.head_dim // 2, values.shape[1])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        kind = gguf.GGMLQuantizationType[quantization if values.ndim > 1 else "F32"]
        writer.add_tensor(stored_as, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, architecture: str) -> dict[str, Any]:
    config = model.config
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    control = {token["content"] for token in backend["added_tokens"]}
    return {
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{architecture}.attention.key_length": config.head_dim,
        f"{architecture}.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in control else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in backend["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
