"""Free answers after a prefix and a query, token by token."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.engine.backend import GeneratedToken, Sampling, Stop, TokenIds
from manyicl.engine.packing import ActivationBudget, QueriesInFlight, log_denominators, numbers_of
from manyicl.model.continuation import Block


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prefix: Sequence[Block],
    queries: Sequence[TokenIds],
    stop: Stop,
    max_tokens: int,
    budget: ActivationBudget,
    sampling: Sampling | None,
    numbers: Sequence[int],
) -> Iterator[GeneratedToken]:
    """Generate one answer per query and yield its tokens as they come.

    Args:
        model: In evaluation mode.
        prefix: Shared by all queries.
        queries: Encoded, up to where the answer begins.
        stop: Decides after every token whether an answer has ended.
        max_tokens: Limit for answers that do not end before.
        budget: Bounds how many queries advance together.
        sampling: How tokens are drawn; None for the most probable ones.
        numbers: Number of each query, which fixes its draws together with the seed.
    """
    written: list[list[int]] = [[] for _ in queries]
    draws = [random.Random(f"answer {sampling.seed if sampling else 0} {number}") for number in numbers]
    for chunk in budget.chunks([len(query) for query in queries], [max_tokens] * len(queries), in_line=True):
        flight = QueriesInFlight(model, prefix, [queries[i] for i in chunk], max_tokens, in_line=True)
        live = list(range(len(chunk)))
        logits = flight.read()
        for num_written in range(1, max_tokens + 1):
            tokens, log_probabilities = _next_tokens(logits, sampling, [draws[chunk[i]] for i in live])
            going: list[tuple[int, int]] = []
            for i, token, log_probability in zip(live, tokens, log_probabilities, strict=True):
                query = chunk[i]
                written[query].append(token)
                stopped = stop.ended(written[query])
                if not stopped:
                    going.append((i, token))
                is_last = stopped or num_written == max_tokens
                yield GeneratedToken(query, token, log_probability, stopped, is_last)
            live = [i for i, _ in going]
            if not live or num_written == max_tokens:
                break
            logits = flight.follow(live, [token for _, token in going], [num_written - 2] * len(live))


def _next_tokens(
    logits: Tensor, sampling: Sampling | None, draws: Sequence[random.Random]
) -> tuple[list[int], list[float]]:
    """Choose the next token of each query, (Q, V), and give its log-probability under the model."""
    if sampling is None:
        chosen = logits.argmax(dim=-1)
    else:
        chosen = torch.stack([_draw(row, sampling, draw) for row, draw in zip(logits, draws, strict=True)])
    picked = logits.gather(1, chosen[:, None])[:, 0].float() - log_denominators(logits)
    return chosen.tolist(), numbers_of(picked)


def _draw(logits: Tensor, sampling: Sampling, draw: random.Random) -> Tensor:
    """Draw a token, (V,) -> scalar: the one at which the probabilities, in falling order, pass a random number."""
    ordered, tokens = (logits.double() / sampling.temperature).softmax(dim=-1).sort(descending=True, stable=True)
    reached = ordered.cumsum(dim=-1)
    num_kept = int((reached < sampling.top_p).sum()) + 1
    kept = reached[:num_kept]
    rank = int(torch.searchsorted(kept, draw.random() * float(kept[-1]), right=True))
    return tokens[min(rank, len(kept) - 1)]
