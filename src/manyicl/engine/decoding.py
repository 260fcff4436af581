"""Free-form answers behind a prefix and a query: greedy, until the terminator's text appears.

This is the reference form: queries of equal length advance together, each behind a copy of the prefix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.engine.prefix_cache import PrefixCache
from manyicl.episodes.encoding import Encoder


@dataclass
class Generation:
    """An answer under way.

    Attributes:
        token_ids: Generated so far.
        log_probability: Of these tokens, in nats.
        answer: The text before the terminator, once it has appeared or the limit is reached.
        stopped: True if the terminator or the end-of-sequence token was met, False at the limit.
    """

    token_ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    answer: str | None = None
    stopped: bool = False


@torch.no_grad()
def generate_greedily(
    model: PreTrainedModel,
    encoder: Encoder,
    prefix: PrefixCache,
    queries: Sequence[tuple[int, ...]],
    max_answer_tokens: int,
    batch_size: int,
) -> list[Generation]:
    """Generate one answer per query, the likeliest token at each step.

    Args:
        model: In evaluation mode.
        encoder: Decodes, and knows the terminator.
        prefix: Shared by all queries.
        queries: Encoded, up to where the answer begins.
        max_answer_tokens: Where an answer without terminator is cut; such answers are marked.
        batch_size: Queries that advance together.
    """
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for i, query in enumerate(queries):
        by_length[len(query)].append(i)
    generations = [Generation() for _ in queries]
    for group in by_length.values():
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            _advance_together(
                model,
                encoder,
                prefix,
                torch.tensor([queries[i] for i in batch], device=model.device),
                [generations[i] for i in batch],
                max_answer_tokens,
            )
    return generations


def _advance_together(
    model: PreTrainedModel,
    encoder: Encoder,
    prefix: PrefixCache,
    input_ids: Tensor,
    generations: Sequence[Generation],
    max_answer_tokens: int,
) -> None:
    """Generate for queries of equal length, (Q, T), until all have stopped."""
    cache = prefix.continuation(len(generations))
    position = prefix.num_tokens
    for _ in range(max_answer_tokens):
        num_tokens = input_ids.shape[1]
        positions = torch.arange(position, position + num_tokens, device=model.device)[None]
        logits: Tensor = model(
            input_ids=input_ids,
            position_ids=positions.expand(len(generations), -1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        best, input_ids = logits.float().log_softmax(dim=-1).max(dim=-1, keepdim=True)
        position += num_tokens
        for generation, token, log_probability in zip(
            generations, input_ids[:, 0].tolist(), best[:, 0].tolist(), strict=True
        ):
            if not generation.stopped:
                _append(generation, token, log_probability, encoder)
        if all(generation.stopped for generation in generations):
            break
    for generation in generations:
        if generation.answer is None:
            generation.answer = encoder.decode(generation.token_ids)


def _append(generation: Generation, token: int, log_probability: float, encoder: Encoder) -> None:
    """Add a token, and stop where the terminator's text appears.

    Text decides, not token ids: in Llama-3-style vocabularies ``.`` and the blank line after it are one token.
    """
    if token == encoder.tokenizer.eos_token_id:
        generation.stopped = True
        generation.answer = encoder.decode(generation.token_ids)
        return
    generation.token_ids.append(token)
    generation.log_probability += log_probability
    before, terminator, _ = encoder.decode(generation.token_ids).partition(encoder.format.terminator)
    if terminator:
        generation.stopped = True
        generation.answer = before
