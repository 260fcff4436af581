"""Demonstrations prefilled once, reused by every query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from manyicl.tasks.task import Example, Task

# Prefilling in chunks bounds the memory of activations; the result is the same for any chunk size.
PREFILL_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of an instruction and its demonstrations. Immutable: continuations keep theirs apart.

    Attributes:
        task: What the demonstrations are of.
        demonstrations: Those that stand in the prefix, in order.
        num_left_out: Demonstrations that were given and did not fit the context.
        token_ids: The prefix, (P,).
        keys: One per layer, (1, key heads, P, head size); empty while P is 0.
        values: As ``keys``.
    """

    task: Task
    demonstrations: tuple[Example, ...]
    num_left_out: int
    token_ids: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        """P, the tokens before a query."""
        return len(self.token_ids)

    @property
    def num_shots(self) -> int:
        """Demonstrations before a query."""
        return len(self.demonstrations)

    @property
    def opens_sequence(self) -> bool:
        """Whether a query behind this prefix is the first text of its sequence."""
        return not self.demonstrations and not self.task.instruction()

    def continuation(self, batch_size: int) -> DynamicCache:
        """Return a growing cache that begins with this prefix, once for each of ``batch_size`` queries.

        Growing concatenates into new tensors, so the prefix itself is never written to.
        """
        return cache_from(
            [keys.expand(batch_size, -1, -1, -1) for keys in self.keys],
            [values.expand(batch_size, -1, -1, -1) for values in self.values],
        )


def cache_from(keys: Sequence[Tensor], values: Sequence[Tensor]) -> DynamicCache:
    """Build transformers' growing cache around given keys and values, without copying them.

    Every layer keeps all keys; windows of sliding layers are the attention's business, see model/attention.py.
    """
    cache = DynamicCache()
    for layer_keys, layer_values in zip(keys, values, strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(layer_keys, layer_values)
        layer.keys, layer.values = layer_keys, layer_values
        cache.layers.append(layer)
    return cache


def keys_and_values(cache: DynamicCache) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Take keys and values out of transformers' cache, one pair per layer."""
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    keys = tuple(layer.keys for layer in layers if layer.keys is not None)
    values = tuple(layer.values for layer in layers if layer.values is not None)
    assert len(keys) == len(values) == len(cache.layers), "every layer keeps keys and values"
    return keys, values


@torch.no_grad()
def encode_behind(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    keys: Sequence[Tensor] = (),
    values: Sequence[Tensor] = (),
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run tokens through the model behind given keys and values, and return the longer keys and values.

    Args:
        model: In evaluation mode.
        token_ids: New tokens, (T,).
        keys: One per layer, (1, key heads, P, head size), or none.
        values: As ``keys``.
        chunk_tokens: Tokens per pass.

    Returns:
        Keys and values of P + T tokens, one per layer.
    """
    cache = cache_from(keys, values)
    start = keys[0].shape[2] if keys else 0
    for begin in range(0, len(token_ids), chunk_tokens):
        chunk = torch.tensor([token_ids[begin : begin + chunk_tokens]], device=model.device)
        positions = torch.arange(start + begin, start + begin + chunk.shape[1], device=model.device)[None]
        model(input_ids=chunk, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return keys_and_values(cache)
