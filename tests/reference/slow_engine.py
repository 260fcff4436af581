"""Answers the slow, obvious way: plain transformers with its own attention over the whole text, one label at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights under transformers' eager attention, which knows nothing of this package."""
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    return plain


@torch.no_grad()
def full_pass_logits(plain: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """Logits behind every token of one sequence, (T, V), without a cache."""
    logits: Tensor = plain(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits.float()


def slow_score(plain: PreTrainedModel, before: Sequence[int], answer: Sequence[int]) -> float:
    """Log-probability of an answer's tokens, one full pass over the whole text."""
    logits = full_pass_logits(plain, [*before, *answer]).log_softmax(-1)
    return sum(float(logits[len(before) - 1 + i, token]) for i, token in enumerate(answer))


def slow_greedy(
    plain: PreTrainedModel, before: Sequence[int], is_finished: Callable[[list[int]], bool], most: int
) -> tuple[list[int], float]:
    """The likeliest tokens one by one, each from a full pass, and their log-probability."""
    answer: list[int] = []
    log_probability = 0.0
    while len(answer) < most and not is_finished(answer):
        scores = full_pass_logits(plain, [*before, *answer])[-1].log_softmax(-1)
        answer.append(int(scores.argmax()))
        log_probability += float(scores.max())
    return answer, log_probability
