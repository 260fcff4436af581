"""Log-probability of candidate answers behind a prefix and a query, each whole answer with its terminator.

This is the reference form: every candidate of every query is a row of its own behind a copy of the prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.engine.prefix_cache import PrefixCache


@dataclass(frozen=True, slots=True)
class Candidate:
    """One possible answer to one query, as tokens."""

    query_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Query and answer, as the model reads them."""
        return (*self.query_ids, *self.answer_ids)


@torch.no_grad()
def score_candidates(
    model: PreTrainedModel, prefix: PrefixCache, candidates: Sequence[Candidate], batch_size: int
) -> list[float]:
    """Return the log-probability of each candidate's answer in nats, terminator included.

    Candidates of similar length share a batch and are padded on the right, where a causal model cannot look.
    """
    by_length = sorted(range(len(candidates)), key=lambda i: len(candidates[i].token_ids))
    scores = [0.0] * len(candidates)
    for batch in _batches(by_length, batch_size):
        chosen = [candidates[i] for i in batch]
        for i, score in zip(batch, _score_batch(model, prefix, chosen), strict=True):
            scores[i] = score
    return scores


def _score_batch(model: PreTrainedModel, prefix: PrefixCache, candidates: Sequence[Candidate]) -> list[float]:
    """Score one padded batch in one pass."""
    num_tokens = max(len(candidate.token_ids) for candidate in candidates)
    padded = [(*candidate.token_ids, *[0] * (num_tokens - len(candidate.token_ids))) for candidate in candidates]
    # Only positions that some answer of the batch is predicted from meet the vocabulary projection.
    first_kept = min(len(candidate.query_ids) for candidate in candidates) - 1
    input_ids = torch.tensor(padded, device=model.device)
    positions = torch.arange(prefix.num_tokens, prefix.num_tokens + num_tokens, device=model.device)
    logits: Tensor = model(
        input_ids=input_ids,
        position_ids=positions[None].expand(len(candidates), -1),
        past_key_values=prefix.continuation(len(candidates)),
        use_cache=True,
        logits_to_keep=torch.arange(first_kept, num_tokens, device=model.device),
    ).logits
    log_probabilities = logits.float().log_softmax(dim=-1)
    scores = []
    for row, candidate in enumerate(candidates):
        start = len(candidate.query_ids) - 1 - first_kept
        predicted = log_probabilities[row, start : start + len(candidate.answer_ids)]
        targets = torch.tensor(candidate.answer_ids, device=model.device)
        scores.append(float(predicted.gather(1, targets[:, None]).sum()))
    return scores


def _batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
