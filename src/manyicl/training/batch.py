"""Packed sequence -> the first tensors. One sequence is one micro-batch of size 1, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypedDict, cast

import torch
from torch import Tensor

from manyicl.episodes.packed_sequence import PackedSequence
from manyicl.model.attention import PackedArguments, packed_arguments
from manyicl.training.counts import SequenceCounts
from manyicl.training.objective import supervised_spans, target_weights
from manyicl.training.recipe import ObjectiveSettings


class Batch(TypedDict):
    """One packed sequence as tensors.

    The supervised *position* is the one whose logits are compared, just before the target token::

        sequence            <bos> query ⏎ answer ⏎⏎ | <bos> query ⏎ answer ⏎⏎
        positions        0     1   2    3    4  |   0     1   2    3    4
        supervised                 2    3                     7    8
        targets                 answer  ⏎⏎                 answer  ⏎⏎
    """

    input_ids: Tensor  # (1, T)
    packed: PackedArguments  # where episodes begin and end
    segment_lengths: tuple[int, ...]  # tokens of each episode and piece of text, known without asking the device
    supervised_positions: Tensor  # (S,)
    targets: Tensor  # (S,), the token after each of them
    weights: Tensor  # (S,), share of each in the loss
    counts: SequenceCounts  # what the sequence holds and what was dropped
    task_names: tuple[str, ...]  # one per episode


def sequence_tensors(sequence: PackedSequence, objective: ObjectiveSettings) -> Batch:
    """Turn a sequence into tensors. No target lies in another episode than its position."""
    token_ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for episode in sequence.episodes:
        for place, weight in enumerate(target_weights(episode, objective)):
            if weight:
                positions.append(len(token_ids) + place - 1)
                targets.append(episode.token_ids[place])
                weights.append(weight)
        token_ids.extend(episode.token_ids)
    for segment in sequence.replayed:
        start, end = len(token_ids), len(token_ids) + len(segment.token_ids)
        positions.extend(range(start, end - 1))
        targets.extend(segment.token_ids[1:])
        weights.extend([segment.weight] * (end - start - 1))
        token_ids.extend(segment.token_ids)
    pieces = [one.token_ids for one in sequence.episodes] + [one.token_ids for one in sequence.replayed]
    segment_lengths = tuple(map(len, pieces))
    return Batch(
        input_ids=torch.tensor([token_ids]),
        packed=packed_arguments(segment_lengths),
        segment_lengths=segment_lengths,
        supervised_positions=torch.tensor(positions, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(weights, dtype=torch.float32),
        counts=sequence_counts(sequence, objective),
        task_names=tuple(episode.task_name for episode in sequence.episodes),
    )


def first_tokens(batch: Batch, length: int) -> Batch:
    """Cut a sequence after so many tokens."""
    ends = zip(batch["segment_lengths"], accumulate(batch["segment_lengths"]), strict=True)
    lengths = tuple(min(tokens, length - end + tokens) for tokens, end in ends if end - tokens < length)
    kept = batch["supervised_positions"] < length
    cut: dict[str, object] = {name: batch[name][kept] for name in ("supervised_positions", "targets", "weights")}
    cut |= {"input_ids": batch["input_ids"][:, :length], "packed": packed_arguments(lengths, batch["input_ids"].device)}
    return cast(Batch, {**batch, **cut, "segment_lengths": lengths})


def sequence_counts(sequence: PackedSequence, objective: ObjectiveSettings) -> SequenceCounts:
    """Count what a sequence holds, and what was dropped."""
    return SequenceCounts(
        num_sequences=1,
        num_tokens=sequence.num_tokens,
        num_unused_tokens=sequence.max_context_tokens - sequence.num_tokens,
        num_answers=sum(len(supervised_spans(episode, objective)) for episode in sequence.episodes),
        num_shots_dropped=sequence.num_shots_dropped,
        num_shots_too_long=sequence.num_shots_too_long,
        most_shots=max((len(episode.answer_spans) - 1 for episode in sequence.episodes), default=0),
        num_replayed_tokens=sequence.num_replayed_tokens,
    )


@dataclass(frozen=True)
class Collator:
    """What the data loader calls: a list that holds one sequence -> its tensors."""

    objective: ObjectiveSettings

    def __call__(self, sequences: Sequence[PackedSequence]) -> Batch:
        """Turn the one sequence of a micro-batch into tensors."""
        (sequence,) = sequences
        return sequence_tensors(sequence, self.objective)
