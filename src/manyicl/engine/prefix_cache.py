"""Demonstrations prefilled once, reused by every query."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.engine.backend import Identity
from manyicl.episodes.text_format import AnyFormat
from manyicl.model.continuation import Block, Continuation, OwnKeys, continue_model
from manyicl.tasks.task import Example, Task

# Prefilling in chunks bounds the memory of activations; the result is the same for any chunk size.
PREFILL_CHUNK_TOKENS = 1024

OnLogits = Callable[[Sequence[int], Tensor], None]


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values of an instruction and its demonstrations, of batch size 1. Immutable.

    Queries keep their own keys apart, and a longer prefix adds a block to those it shares with a shorter one, so
    nothing that an interrupted call leaves behind can spoil a prefix.

    Attributes:
        identity: The network that made the keys and values.
        text_format: How examples became text.
        task: What the demonstrations are of.
        demonstrations: Those that stand in the prefix, in order.
        num_left_out: Demonstrations that were given and did not fit the context.
        token_ids: The prefix, (P,).
        blocks: Keys and values of consecutive parts of it; none while P is 0.
    """

    identity: Identity
    text_format: AnyFormat
    task: Task
    demonstrations: tuple[Example, ...]
    num_left_out: int
    token_ids: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def num_tokens(self) -> int:
        """P, the tokens before a query."""
        return len(self.token_ids)

    @property
    def num_shots(self) -> int:
        """Demonstrations before a query."""
        return len(self.demonstrations)


def shared_beginning(blocks: Sequence[Block], num_tokens: int) -> tuple[Block, ...]:
    """Return views of the blocks' first ``num_tokens`` tokens; nothing is copied."""
    shared = []
    for block in blocks:
        kept = min(block.num_tokens, num_tokens - block.start)
        if kept > 0:
            shared.append(block if kept == block.num_tokens else block.first(kept))
    return tuple(shared)


def longer(blocks: Sequence[Block], added: Block) -> tuple[Block, ...]:
    """Put a block behind others, joining it with those before it that are less than twice as large.

    So every block is at least twice as large as the next, and P tokens lie in at most log2(P) + 1 blocks however small
    the steps they came in; each block costs a call of the attention kernel per layer.
    """
    kept = list(blocks)
    while kept and kept[-1].num_tokens < 2 * added.num_tokens:
        added = kept.pop().joined(added)
    return (*kept, added)


@torch.no_grad()
def encode_behind(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    token_ids: Sequence[int],
    *,
    chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    keep: Sequence[int] = (),
    on_logits: OnLogits | None = None,
) -> tuple[Block, ...]:
    """Run tokens through the model once, in chunks, behind what is there.

    Args:
        model: In evaluation mode.
        blocks: What the tokens continue; stays as it is.
        token_ids: New tokens, (T,).
        chunk_tokens: Tokens per pass.
        keep: Rising places among the new tokens whose logits are wanted.
        on_logits: Called after each chunk with its places out of ``keep`` and their logits, (S, V).

    Returns:
        ``blocks`` and the new tokens behind them.
    """
    if not token_ids:
        return tuple(blocks)
    start = blocks[-1].end if blocks else 0
    own = OwnKeys(1, len(token_ids))
    for begin in range(0, len(token_ids), chunk_tokens):
        chunk = token_ids[begin : begin + chunk_tokens]
        place = torch.arange(begin, begin + len(chunk), device=model.device)
        before = (*blocks, Block(start, tuple(own.keys), tuple(own.values)).first(begin)) if begin else blocks
        kept = [i for i in keep if begin <= i < begin + len(chunk)]
        logits = continue_model(
            model,
            chunk,
            Continuation(
                prefix=before,
                positions=start + place,
                sequence=torch.zeros_like(place),
                column=place - begin,
                num_sequences=1,
                num_columns=len(chunk),
                own=own,
                slot=place,
            ),
            [i - begin for i in kept],
        )
        if on_logits is not None and kept:
            on_logits(kept, logits)
    return longer(blocks, Block(start, tuple(own.keys), tuple(own.values)))
