"""Free-form answers behind a prefix and a query, until the end-of-answer text appears."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.engine.packing import QueriesInFlight, WorkingMemory, log_denominators, numbers_of
from manyicl.episodes.encoding import Encoder
from manyicl.errors import UserError
from manyicl.model.continuation import Block

# Below it probabilities leave the range of floating point.
LEAST_TEMPERATURE = 1e-4


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an answer's tokens are drawn, in place of taking the likeliest.

    Attributes:
        temperature: Logits are divided by it before they become probabilities.
        top_p: Only the likeliest tokens that together reach this probability are drawn from.
        seed: With a query's number in its stream it fixes that query's draws, whatever is asked beside it.

    Raises:
        UserError: If a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise UserError(
                f"temperature is at least {LEAST_TEMPERATURE}; found {self.temperature}. Leave it out for the "
                "likeliest tokens."
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p lies above 0 and at most at 1; found {self.top_p}.")


@dataclass
class Generation:
    """An answer under way.

    Attributes:
        token_ids: Generated so far.
        log_probability: Of these tokens under the model, in nats; temperature and top_p leave it as it is, and an
            end-of-sequence token, which ends an answer in place of the end-of-answer text, adds nothing.
        answer: The text before the end-of-answer text, once it has appeared or the limit is reached.
        stopped: True if the end-of-answer text or the end-of-sequence token was met, False at the limit.
    """

    token_ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0
    answer: str | None = None
    stopped: bool = False


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    encoder: Encoder,
    prefix: Sequence[Block],
    queries: Sequence[tuple[int, ...]],
    max_answer_tokens: int,
    memory: WorkingMemory,
    sampling: Sampling | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Generation]:
    """Generate one answer per query.

    Args:
        model: In evaluation mode.
        encoder: Decodes, and knows the end-of-answer text.
        prefix: Shared by all queries.
        queries: Encoded, up to where the answer begins.
        max_answer_tokens: Where an answer without an end is cut; such answers are marked.
        memory: Bounds how many queries advance together.
        sampling: How tokens are drawn; None for the likeliest.
        numbers: Of the queries in their stream, for ``sampling``; None for 0, 1, 2, …
    """
    generations = [Generation() for _ in queries]
    ends = end_token_ids(model, encoder)
    numbers = range(len(queries)) if numbers is None else numbers
    chances = [random.Random(f"answer {sampling.seed if sampling else 0} {number}") for number in numbers]
    for chunk in memory.chunks([len(query) for query in queries], [max_answer_tokens] * len(queries), in_line=True):
        flight = QueriesInFlight(model, prefix, [queries[i] for i in chunk], max_answer_tokens, in_line=True)
        live = list(range(len(chunk)))
        logits = flight.read()
        for place in range(max_answer_tokens):
            tokens, log_probabilities = _next_tokens(logits, sampling, [chances[chunk[i]] for i in live])
            for i, token, log_probability in zip(live, tokens, log_probabilities, strict=True):
                _append(generations[chunk[i]], token, log_probability, encoder, ends)
            live, tokens = _unfinished(live, tokens, [generations[chunk[i]] for i in live])
            if not live or place == max_answer_tokens - 1:
                break
            logits = flight.follow(live, tokens, [place - 1] * len(live))
        for i in chunk:
            if generations[i].answer is None:
                generations[i].answer = encoder.decode_answer(generations[i].token_ids)
    return generations


def _unfinished(
    live: Sequence[int], tokens: Sequence[int], generations: Sequence[Generation]
) -> tuple[list[int], list[int]]:
    """Keep the queries whose answers go on, with their newest tokens."""
    going = [(i, token) for i, token, one in zip(live, tokens, generations, strict=True) if not one.stopped]
    return [i for i, _ in going], [token for _, token in going]


def _next_tokens(
    logits: Tensor, sampling: Sampling | None, chances: Sequence[random.Random]
) -> tuple[list[int], list[float]]:
    """Choose the next token of each query, (Q, V), and give its log-probability under the model."""
    if sampling is None:
        chosen = logits.argmax(dim=-1)
    else:
        chosen = torch.stack([_draw(row, sampling, chance) for row, chance in zip(logits, chances, strict=True)])
    picked = logits.gather(1, chosen[:, None])[:, 0].float() - log_denominators(logits)
    return chosen.tolist(), numbers_of(picked)


def _draw(logits: Tensor, sampling: Sampling, chance: random.Random) -> Tensor:
    """Draw a token, (V,) -> scalar: the one at which the probabilities, likeliest first, pass a random number."""
    ordered, tokens = (logits.double() / sampling.temperature).softmax(dim=-1).sort(descending=True, stable=True)
    reached = ordered.cumsum(dim=-1)
    num_kept = int((reached < sampling.top_p).sum()) + 1
    kept = reached[:num_kept]
    place = int(torch.searchsorted(kept, chance.random() * float(kept[-1]), right=True))
    return tokens[min(place, len(kept) - 1)]


def end_token_ids(model: PreTrainedModel, encoder: Encoder) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's, the model's generation_config's, and a turn's own."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    ends = (encoder.tokenizer.eos_token_id, encoder.answer_end_id, *listed)
    return frozenset(token for token in ends if token is not None)


def _append(generation: Generation, token: int, log_probability: float, encoder: Encoder, ends: frozenset[int]) -> None:
    """Add a token, and stop where the answer ends."""
    generation.token_ids.append(token)
    terminated = encoder.has_ended(generation.token_ids)
    if token in ends and not terminated:
        # The end of the sequence takes the place of the end-of-answer text, which is often such a token itself.
        generation.token_ids.pop()
    else:
        generation.log_probability += log_probability
    if token in ends or terminated:
        generation.stopped = True
        generation.answer = encoder.decode_answer(generation.token_ids)
