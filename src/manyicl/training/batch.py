"""Packed row -> the first tensors. One row is one micro-batch of size 1, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from manyicl.episodes.row import Row
from manyicl.model.attention import packed_arguments
from manyicl.training.counts import RowCounts
from manyicl.training.objective import supervised_spans, target_weights
from manyicl.training.recipe import ObjectiveSettings


class Batch(TypedDict):
    """One packed row as tensors.

    The supervised *position* is the one whose logits are compared, just before the target token::

        row            <bos> query ⏎ answer ⏎⏎ | <bos> query ⏎ answer ⏎⏎
        position_ids     0     1   2    3    4  |   0     1   2    3    4
        supervised                 2    3                     7    8
        targets                 answer  ⏎⏎                 answer  ⏎⏎
    """

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T), from 0 in each episode
    cu_seq_lens_q: Tensor  # (episodes + 1,), where episodes end
    supervised_positions: Tensor  # (S,)
    targets: Tensor  # (S,), the token after each of them
    weights: Tensor  # (S,), share of each in the loss
    counts: RowCounts  # what the row holds and what was left out of it
    task_names: tuple[str, ...]  # one per episode


def row_tensors(row: Row, objective: ObjectiveSettings) -> Batch:
    """Turn a row into tensors. No target lies in another episode than its position."""
    token_ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for episode in row.episodes:
        for place, weight in enumerate(target_weights(episode, objective)):
            if weight:
                positions.append(len(token_ids) + place - 1)
                targets.append(episode.token_ids[place])
                weights.append(weight)
        token_ids.extend(episode.token_ids)
    packed = packed_arguments([len(episode.token_ids) for episode in row.episodes])
    return Batch(
        input_ids=torch.tensor([token_ids]),
        position_ids=packed["position_ids"],
        cu_seq_lens_q=packed["cu_seq_lens_q"],
        supervised_positions=torch.tensor(positions, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(weights, dtype=torch.float32),
        counts=row_counts(row, objective),
        task_names=tuple(episode.task_name for episode in row.episodes),
    )


def row_counts(row: Row, objective: ObjectiveSettings) -> RowCounts:
    """Count what a row holds, and what was left out of it."""
    return RowCounts(
        num_rows=1,
        num_tokens=row.num_tokens,
        num_unused_tokens=row.max_context_tokens - row.num_tokens,
        num_answers=sum(len(supervised_spans(episode, objective)) for episode in row.episodes),
        num_shots_left_out=row.num_shots_left_out,
        num_shots_too_long=row.num_shots_too_long,
        most_shots=max((len(episode.answer_spans) - 1 for episode in row.episodes), default=0),
    )


@dataclass(frozen=True)
class Collator:
    """What the data loader calls: a list that holds one row -> its tensors."""

    objective: ObjectiveSettings

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Turn the one row of a micro-batch into tensors."""
        (row,) = rows
        return row_tensors(row, self.objective)
