"""Keys and values of tokens that queries share, computed once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.engine.backend import BetweenChunks, Identity, TokenIds
from manyicl.model.continuation import Block, Continuation, OwnKeys, continue_model

# Prefilling in chunks bounds the memory of activations; the result is the same for any chunk size. On a GPU a chunk
# costs the launch of its kernels.
PREFILL_CHUNK_TOKENS = {"cpu": 1024, "cuda": 8192}
# Where other work may go first between chunks, a chunk takes about so long, whatever its length in tokens.
CHUNK_SECONDS = 0.25
FIRST_TIMED_CHUNK_TOKENS = 128
FEWEST_CHUNK_TOKENS, MOST_CHUNK_TOKENS = 16, 4096

OnLogits = Callable[[Sequence[int], Tensor], None]


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of a prefix, of batch size 1. Immutable.

    Queries keep their own keys apart, and a longer prefix adds a block to those it shares with a shorter one, so
    nothing that an interrupted call leaves can spoil a prefix.

    Attributes:
        identity: The network that made the keys and values.
        token_ids: The prefix, (P,).
        blocks: Keys and values of consecutive parts of it; none while P is 0.
    """

    identity: Identity
    token_ids: TokenIds
    blocks: tuple[Block, ...]


def shared_beginning(blocks: Sequence[Block], num_tokens: int) -> tuple[Block, ...]:
    """Return views of the blocks' first ``num_tokens`` tokens; nothing is copied."""
    shared = []
    for block in blocks:
        kept = min(block.num_tokens, num_tokens - block.start)
        if kept > 0:
            shared.append(block if kept == block.num_tokens else block.first(kept))
    return tuple(shared)


def longer(blocks: Sequence[Block], added: Block) -> tuple[Block, ...]:
    """Append a block to others, joined with those before it that are less than twice as large.

    So every block is at least twice as large as the next, and P tokens are in at most log2(P) + 1 blocks however small
    the steps they came in; each block costs a call of the attention kernel per layer.
    """
    kept = list(blocks)
    while kept and kept[-1].num_tokens < 2 * added.num_tokens:
        added = kept.pop().joined(added)
    return (*kept, added)


@torch.no_grad()
def extend_blocks(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    token_ids: Sequence[int],
    *,
    chunk_tokens: int | None = None,
    keep: Sequence[int] = (),
    on_logits: OnLogits | None = None,
    between_chunks: BetweenChunks | None = None,
    after_chunk: BetweenChunks | None = None,
) -> tuple[Block, ...]:
    """Run tokens through the model once, in chunks, after what is there.

    Args:
        model: In evaluation mode.
        blocks: What the tokens continue; stays as it is.
        token_ids: New tokens, (T,).
        chunk_tokens: Tokens per forward pass, or the most of them where ``between_chunks`` is given. None for what
            suits the device, or for ``MOST_CHUNK_TOKENS``.
        keep: Positions among the new tokens whose logits are wanted, rising.
        on_logits: Called after each chunk with its positions out of ``keep`` and their logits, (S, V).
        between_chunks: Called between two chunks. The first then has ``FIRST_TIMED_CHUNK_TOKENS`` at most, and each
            later one takes about as many seconds as the function returned, or ``CHUNK_SECONDS`` where it returned None.
        after_chunk: Called after each chunk with the number of tokens done and in total; it changes no chunk.

    Returns:
        ``blocks`` and the new tokens after them.
    """
    if not token_ids:
        return tuple(blocks)
    if between_chunks is not None:
        most_tokens = chunk_tokens or MOST_CHUNK_TOKENS
        chunk_tokens = min(FIRST_TIMED_CHUNK_TOKENS, most_tokens)
    else:
        most_tokens = chunk_tokens or PREFILL_CHUNK_TOKENS.get(model.device.type, PREFILL_CHUNK_TOKENS["cpu"])
        chunk_tokens = most_tokens
    start = blocks[-1].end if blocks else 0
    own = OwnKeys(1, len(token_ids))
    begin = 0
    while begin < len(token_ids):
        chunk = token_ids[begin : begin + chunk_tokens]
        position = torch.arange(begin, begin + len(chunk), device=model.device)
        before = (*blocks, Block(start, tuple(own.keys), tuple(own.values)).first(begin)) if begin else blocks
        kept = [i for i in keep if begin <= i < begin + len(chunk)]
        started = time.perf_counter()
        logits = continue_model(
            model,
            chunk,
            Continuation(
                prefix=before,
                positions=start + position,
                sequence=torch.zeros_like(position),
                column=position - begin,
                num_sequences=1,
                num_columns=len(chunk),
                own=own,
                slot=position,
            ),
            [i - begin for i in kept],
        )
        if on_logits is not None and kept:
            on_logits(kept, logits)
        begin += len(chunk)
        if after_chunk is not None:
            after_chunk(start + begin, start + len(token_ids))
        if between_chunks is not None and begin < len(token_ids):
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            took = time.perf_counter() - started
            may_take = between_chunks(start + begin, start + len(token_ids))
            chunk_tokens = min(next_chunk_tokens(len(chunk), took, may_take or CHUNK_SECONDS), most_tokens)
    return longer(blocks, Block(start, tuple(own.keys), tuple(own.values)))


def next_chunk_tokens(num_tokens: int, seconds: float, may_take: float = CHUNK_SECONDS) -> int:
    """Size the next chunk so that it takes about ``may_take`` seconds, growing at most fourfold at a time.

    >>> next_chunk_tokens(1024, 2.0), next_chunk_tokens(64, 0.0001), next_chunk_tokens(64, 100.0)
    (128, 256, 16)
    """
    in_time = int(num_tokens * may_take / max(seconds, 1e-9))
    return max(FEWEST_CHUNK_TOKENS, min(in_time, 4 * num_tokens, MOST_CHUNK_TOKENS))
