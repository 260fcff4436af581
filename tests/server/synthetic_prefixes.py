"""Prefixes whose every key and value follows from the tokens up to it, without a network."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from manyicl.engine.label_trie import num_shared_tokens
from manyicl.engine.local import LocalBackend
from manyicl.engine.prefix_cache import PrefixCache, longer, shared_beginning
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.model.continuation import Block, key_shape
from tests.builders import make_task

TASK = make_task()


def block_of_tokens(backend: LocalBackend, token_ids: Sequence[int], start: int = 0) -> Block:
    """Keys and values of the tokens from a position on: a hash of all tokens up to each."""
    heads, size = key_shape(backend.model)
    state = hashlib.shake_128()
    rows = []
    for position, token_id in enumerate(token_ids):
        state.update(token_id.to_bytes(4, "little"))
        if position >= start:
            digest = bytearray(state.digest(2 * heads * size))
            rows.append(torch.frombuffer(digest, dtype=torch.uint8).view(2, heads, size))
    states = torch.stack(rows, dim=2).to(backend.model.dtype)
    layers = range(backend.model.config.get_text_config().num_hidden_layers)
    return Block(
        start,
        tuple((states[:1] + 300 * layer).contiguous() for layer in layers),
        tuple((states[1:] - 300 * layer).contiguous() for layer in layers),
    )


def cache_of(backend: LocalBackend, token_ids: Sequence[int], reuse: PrefixCache | None = None) -> PrefixCache:
    """Make keys and values, sharing those of another prefix as `LocalBackend.prefill` does."""
    blocks: tuple[Block, ...] = ()
    if reuse is not None:
        blocks = shared_beginning(reuse.blocks, num_shared_tokens(token_ids, reuse.token_ids))
    start = blocks[-1].end if blocks else 0
    if start < len(token_ids):
        blocks = longer(blocks, block_of_tokens(backend, token_ids, start))
    return PrefixCache(backend.identity, tuple(token_ids), blocks)


def prefix_of(backend: LocalBackend, token_ids: Sequence[int], reuse: PrefixCache | None = None) -> TaskPrefix:
    """Make a prefix of a task that does not matter."""
    return TaskPrefix(TASK, (), 0, "", cache_of(backend, token_ids, reuse))


def require_right(backend: LocalBackend, cache: PrefixCache | None, token_ids: Sequence[int]) -> int:
    """Check that a cache has the keys and values of a beginning of the tokens, bit by bit; return how many tokens."""
    if cache is None:
        return 0
    num_tokens = len(cache.token_ids)
    assert cache.token_ids == tuple(token_ids[:num_tokens])
    assert cache.identity == backend.identity
    end = 0
    for block in cache.blocks:
        assert block.start == end
        assert block.num_tokens > 0
        end = block.end
    assert end == num_tokens > 0
    expected = block_of_tokens(backend, token_ids[:num_tokens])
    for layer in range(len(expected.keys)):
        assert torch.equal(torch.cat([block.keys[layer] for block in cache.blocks], dim=2), expected.keys[layer])
        assert torch.equal(torch.cat([block.values[layer] for block in cache.blocks], dim=2), expected.values[layer])
    return num_tokens
