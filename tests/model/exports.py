"""Tiny models and adapters in folders, as training leaves them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from manyicl.episodes.text_format import PlainFormat
from manyicl.model.load import load_model
from manyicl.model.manifest import Manifest, TrainedTask
from tests.builders import byte_level_bpe, make_task, tiny_model

FORMAT = PlainFormat(separator="\n= ", end_of_answer="\n\n", end_is_control_token=False)


def save_model(
    folder: Path,
    architecture: str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
    dtype: torch.dtype = torch.float32,
    **changes: object,
) -> Path:
    """A tiny full model with its tokenizer."""
    tokenizer = tokenizer or byte_level_bpe()
    config = tiny_model(architecture, len(tokenizer)).config
    config.update(changes)
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(0, 0.3)
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def save_adapter(
    folder: Path,
    base: Path,
    tokenizer: PreTrainedTokenizerFast | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    dtype: str = "float32",
    **settings: Any,
) -> Path:
    """An adapter over a base, with random weights in both of its factors, and a manifest as training writes it."""
    with warnings.catch_warnings(action="ignore"):
        model = AutoModelForCausalLM.from_pretrained(str(base))
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **settings)
        adapter: PeftModel = get_peft_model(model, config)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weights in adapter.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    weights.normal_(0, 0.2)
        adapter.save_pretrained(str(folder))
    (tokenizer or byte_level_bpe()).save_pretrained(str(folder))
    manifest = Manifest(
        text_format=FORMAT,
        max_context_tokens=256,
        max_trained_shots=7,
        tasks=(TrainedTask.of(make_task("seen")),),
        objective="all_answers",
        base=str(base),
        base_fingerprint=load_model(str(base), dtype=dtype, device="cpu").fingerprint,
        recipe={"model": {"base": str(base), "lora": {"rank": 4}, "dtype": dtype}},
    )
    manifest.write(folder)
    return folder


def adapter_logits(folder: Path, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits of the unmerged adapter under our loader, (1, T, V)."""
    with torch.no_grad():
        return logits(load_model(str(folder), dtype="float32", device="cpu").model, token_ids)


def logits(model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = model(input_ids=token_ids, use_cache=False).logits
    return answer
