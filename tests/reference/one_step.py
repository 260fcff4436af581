"""The loss of an optimizer step, the slow and obvious way: every episode alone, every token by itself."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.episodes.episode import EncodedEpisode
from manyicl.training.recipe import ObjectiveSettings


def slow_weights(episode: EncodedEpisode, objective: ObjectiveSettings) -> dict[int, float]:
    """Target position -> weight, straight from the words of the recipe."""
    weights: dict[int, float] = {}
    for place in range(1, len(episode.token_ids)):
        answers = [span for span in episode.answer_spans if span[0] <= place < span[1]]
        counts = bool(answers) and (objective.supervise != "last_answer" or answers[0] == episode.answer_spans[-1])
        if objective.supervise == "every_token":
            weights[place] = 1.0
        elif counts:
            start, end = answers[0]
            weights[place] = 1.0 if objective.weighting == "token" else 1 / (end - start)
        elif objective.context_weight:
            weights[place] = objective.context_weight
    return weights


def slow_loss(model: PreTrainedModel, episodes: Iterable[EncodedEpisode], objective: ObjectiveSettings) -> Tensor:
    """Weighted mean of the negative log-probabilities of all targets of a step."""
    total = torch.zeros(())
    total_weight = 0.0
    for episode in episodes:
        logits = model(input_ids=torch.tensor([episode.token_ids]), use_cache=False).logits[0]
        log_probabilities = logits.float().log_softmax(dim=-1)
        for place, weight in slow_weights(episode, objective).items():
            total = total - weight * log_probabilities[place - 1, episode.token_ids[place]]
            total_weight += weight
    return total / total_weight
