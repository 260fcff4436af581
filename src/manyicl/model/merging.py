"""Adapter and base -> one plain model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def is_mergeable(model: nn.Module) -> bool:
    """Tell whether a model is an adapter that can be merged without changing what it computes.

    That is LoRA in float32, since in half precision the sum would be rounded, and none of the kinds of which peft says
    only half-way through a merge that it cannot merge them.
    """
    if not hasattr(model, "peft_config"):
        return False
    # Importing peft takes a good part of a second, which a model without an adapter need not wait for.
    from peft import LoraModel, PeftModel

    if not isinstance(model, PeftModel) or not isinstance(model.base_model, LoraModel):
        return False
    config: Any = model.peft_config[model.active_adapter]
    unmergeable = (config.lora_bias, getattr(config, "alora_invocation_tokens", None), config.layer_replication)
    return model.dtype is torch.float32 and not any(unmergeable) and not getattr(config, "arrow_config", None)


def merge_adapter(adapter: Any) -> PreTrainedModel:
    """Merge a peft model into its base, which is used up.

    peft 0.21 adds an update of the head to the tensor that the head shares with the embeddings, and so to these as
    well: measured logits were off by 1.3. Where an adapter changes either, the head gets weights of its own first;
    peft then sees that the two differ, and says so in the configuration.

    Raises:
        ValueError: If peft cannot merge it, or a merged weight is not finite.
    """
    base = adapter.get_base_model()
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if head is not None and (hasattr(head, "base_layer") or hasattr(embeddings, "base_layer")):
        head, embeddings = getattr(head, "base_layer", head), getattr(embeddings, "base_layer", embeddings)
        if head.weight is embeddings.weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
    with warnings.catch_warnings(action="ignore"):
        plain: PreTrainedModel = adapter.merge_and_unload(safe_merge=True)
    return plain
