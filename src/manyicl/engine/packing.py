"""Many continuations in one packed sequence: positions, own keys, and how many queries fit in memory at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.errors import NotFiniteError
from manyicl.model.continuation import Block, Continuation, OwnKeys, continue_model, key_shape

# Names that configurations have for the width of the feed-forward layer; without one it is four times the hidden size.
INNER_SIZES = ("intermediate_size", "n_inner", "ffn_dim")
# Without a bound of the user's own, queries in flight may use half of what the prefix uses, and at least this.
LEAST_ACTIVATION_BUDGET_MIB = 64
# On a GPU they may use half of what is free, up to where larger passes are no faster.
MOST_GPU_ACTIVATION_BUDGET_MIB = 4096
# Queries that advance together differ so little in length that at most this share of their padded batch is padding.
# Only attention is padded. On a GPU a pass costs the launch of its kernels, so few passes matter more; so they do where
# each generated token is a pass, which reads all weights for one query or for many.
MOST_PADDING = {"cpu": 0.10, "cuda": 0.50}
MOST_PADDING_IN_LINE = 0.75
# Normalising logits in float32 goes through so many bytes at a time.
NORMALISING_BYTES = 8 * 2**20


@dataclass(frozen=True)
class ActivationBudget:
    """Memory that a pass may use in addition to model and prefix, and what a token of it costs; all in bytes.

    The costs are estimates from the shape of the network, compared with a measurement by
    ``benchmarks/packed_queries.py``.

    Attributes:
        limit: Bound on activations, logits and own keys together. One query alone may exceed it.
        per_token: Activations of a token while it passes through a layer.
        per_logits: Logits of one position.
        per_slot: Keys and values of one token in all layers.
        most_padding: Share of a padded batch that may be padding.
    """

    limit: int
    per_token: int
    per_logits: int
    per_slot: int
    most_padding: float = MOST_PADDING["cpu"]

    @classmethod
    def after(cls, model: PreTrainedModel, prefix: Sequence[Block], mib: int | None = None) -> ActivationBudget:
        """Bound what queries after a prefix use.

        That is ``mib``, or half of what the prefix uses; on a GPU half of the free memory, up to 4 GiB. Without ``mib``
        it is never less than 64 MiB.
        """
        if mib is not None:
            return cls.of(model, mib * 2**20)
        half = sum(block.num_bytes for block in prefix) // 2
        if model.device.type == "cuda":
            half = min(free_gpu_bytes(model.device) // 2, MOST_GPU_ACTIVATION_BUDGET_MIB * 2**20)
        return cls.of(model, max(half, LEAST_ACTIVATION_BUDGET_MIB * 2**20))

    @classmethod
    def of(cls, model: PreTrainedModel, limit: int) -> ActivationBudget:
        """Read the costs off a network's configuration."""
        config = model.config.get_text_config()
        size = torch.empty(0, dtype=model.dtype).element_size()
        heads: int = config.num_attention_heads
        key_heads, head_size = key_shape(model)
        inner_sizes = [getattr(config, name, None) for name in INNER_SIZES]
        inner_size = next(filter(None, inner_sizes), 4 * config.hidden_size)
        # Residual, norms, query, keys and values, outputs of the parts in float32, and the gated inner layer.
        per_token = size * (8 * config.hidden_size + 4 * inner_size) + 4 * 4 * heads * head_size
        per_slot = size * 2 * config.num_hidden_layers * key_heads * head_size
        most_padding = MOST_PADDING.get(model.device.type, MOST_PADDING["cpu"])
        return cls(limit, per_token, size * config.vocab_size, per_slot, most_padding)

    def tokens_per_pass(self, num_logits_per_token: int = 0) -> int:
        """Return how many tokens go through the model at once, at least one."""
        return max(1, self.limit // (self.per_token + num_logits_per_token * self.per_logits))

    def slots_per_query(self) -> int:
        """Return how many tokens may follow one query in a tree, so that about 8 queries still advance together.

        A sixteenth of the budget may go to its keys, and as much to the square that says which of them sees which.
        """
        return max(32, min(self.limit // (16 * self.per_slot), math.isqrt(self.limit // 16)))

    def chunks(
        self,
        lengths: Sequence[int],
        num_later_slots: Sequence[int],
        *,
        in_line: bool = False,
        num_logits: Sequence[int] | None = None,
    ) -> Iterator[list[int]]:
        """Group queries, by length, so that each group fits the budget and hardly pads.

        Args:
            lengths: Tokens of each query.
            num_later_slots: Keys kept after each query; 0 if none of its keys are kept.
            in_line: Whether later tokens follow one another, as generated ones do, instead of in a tree.
            num_logits: Tokens of each query whose logits are wanted; None for the last one.

        Yields:
            Positions of the queries of each group.
        """
        most_padding = MOST_PADDING_IN_LINE if in_line else self.most_padding
        chunk: list[int] = []
        num_tokens = num_later = num_kept = 0
        for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], num_later_slots[i], i)):
            tokens = num_tokens + lengths[i]
            columns = lengths[i] * (len(chunk) + 1)
            later = max(num_later, num_later_slots[i])
            slots = lengths[i] + later if later else 0
            # In a tree, which later tokens see which is a square of bytes.
            per_query = slots * self.per_slot + (0 if in_line else later**2)
            kept = num_kept + (num_logits[i] if num_logits else 1)
            cost = tokens * self.per_token + kept * self.per_logits + (len(chunk) + 1) * per_query
            if chunk and (cost > self.limit or columns - tokens > most_padding * columns):
                yield chunk
                chunk, tokens, later, kept = [], lengths[i], num_later_slots[i], kept - num_kept
            chunk.append(i)
            num_tokens, num_later, num_kept = tokens, later, kept
        if chunk:
            yield chunk


def free_gpu_bytes(device: torch.device) -> int:
    """Return what can be allocated: free on the card, or kept by torch's allocator and unused."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free, _ = torch.cuda.mem_get_info(device)
    return free + kept


class QueriesInFlight:
    """Queries that advance together after one prefix: prefilled once, then followed by tokens in a line or a tree.

    The prefix is never copied or written to; the queries' own keys are in a padded batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefix: Sequence[Block],
        queries: Sequence[Sequence[int]],
        num_later_slots: int = 0,
        *,
        in_line: bool = False,
    ) -> None:
        """Take encoded queries.

        Args:
            model: In evaluation mode.
            prefix: Shared by all queries.
            queries: Each at least one token.
            num_later_slots: Most tokens that will follow a query at a time; 0 if none will.
            in_line: Whether each of them follows the one before it; otherwise they may be a tree.
        """
        self.model = model
        self.prefix = prefix
        self.queries = queries
        self.lengths = np.array([len(query) for query in queries])
        self.start = prefix[-1].end if prefix else 0
        self.num_later_slots = num_later_slots
        self.own = OwnKeys(len(queries), int(self.lengths.max()) + num_later_slots) if num_later_slots else None
        # Of each query's later tokens: how many there are, how deep each is, and which others each sees. The last entry
        # is the query itself, -1 as a parent.
        self.num_later = np.zeros(len(queries), dtype=np.int64)
        self.depths = np.full((len(queries), num_later_slots + 1), -1)
        num_tree_slots = 0 if in_line else num_later_slots
        self.sees = np.zeros((len(queries), num_tree_slots + 1, num_tree_slots), dtype=bool)
        self.in_line = in_line

    def read(self, keep: Sequence[int] | None = None) -> Tensor:
        """Prefill the queries and return the logits after each, (Q, V), or after the packed tokens in ``keep``."""
        sequence = np.repeat(np.arange(len(self.queries)), self.lengths)
        column = np.concatenate([np.arange(length) for length in self.lengths])
        return continue_model(
            self.model,
            [token for query in self.queries for token in query],
            Continuation(
                prefix=self.prefix,
                positions=self._tensor(self.start + column),
                sequence=self._tensor(sequence),
                column=self._tensor(column),
                num_sequences=len(self.queries),
                num_columns=int(self.lengths.max()),
                own=self.own,
                slot=self._tensor(column),
            ),
            (self.lengths.cumsum() - 1).tolist() if keep is None else keep,
        )

    def follow(self, queries: Sequence[int], token_ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Let tokens follow queries, and return the logits after each, (T, V).

        Args:
            queries: Which query each token follows, rising, (T,).
            token_ids: (T,).
            parents: Which of its query's later tokens, numbered in the order they came, each follows; -1 for the query
                itself. A parent comes before its children.
        """
        assert self.own is not None, "queries that are followed keep their keys"
        query_of = np.array(queries)
        active, line, num_new = np.unique(query_of, return_inverse=True, return_counts=True)
        column = np.concatenate([np.arange(num) for num in num_new])
        number = self.num_later[query_of] + column
        assert not self.in_line or (number - 1 == parents).all(), "tokens in a line each follow the last"
        for query, i, parent in zip(queries, number, parents, strict=True):
            self.depths[query, i] = self.depths[query, parent] + 1
            if not self.in_line:
                self.sees[query, i] = self.sees[query, parent]
                self.sees[query, i, i] = True
        self.num_later[active] += num_new
        lengths, num_later = self.lengths[active], self.num_later[active]
        num_slots = int((lengths + num_later).max())
        visible = np.zeros((len(active), int(num_new.max()), num_slots), dtype=bool)
        slot_positions = np.zeros((len(active), num_slots), dtype=np.int64)
        for i, (query, new, length, later) in enumerate(zip(active, num_new, lengths, num_later, strict=True)):
            seen = self.sees[query, later - new : later, :later]
            visible[i, :new, :length] = True
            visible[i, :new, length : length + later] = np.tri(new, later, later - new) if self.in_line else seen
            slot_positions[i, :length] = np.arange(length)
            slot_positions[i, length : length + later] = length + self.depths[query, :later]
        return continue_model(
            self.model,
            token_ids,
            Continuation(
                prefix=self.prefix,
                positions=self._tensor(self.start + self.lengths[query_of] + self.depths[query_of, number]),
                sequence=self._tensor(line),
                column=self._tensor(column),
                num_sequences=len(active),
                num_columns=int(num_new.max()),
                own=self.own,
                own_line=None if len(active) == len(self.queries) else self._tensor(active),
                slot=self._tensor(self.lengths[query_of] + number),
                slot_positions=self._tensor(self.start + slot_positions),
                visible=torch.from_numpy(visible).to(self.model.device),
            ),
            range(len(token_ids)),
        )

    def forget(self, query: int) -> None:
        """Drop the tokens that followed a query, so that others can follow it."""
        self.num_later[query] = 0

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.model.device)


def log_probabilities(logits: Tensor, rows: Sequence[int], token_ids: Sequence[int]) -> list[float]:
    """Return the log-probability of single tokens in nats.

    Args:
        logits: (S, V).
        rows: Row of each token, (N,).
        token_ids: (N,).
    """
    row = torch.tensor(rows, dtype=torch.long, device=logits.device)
    token = torch.tensor(token_ids, dtype=torch.long, device=logits.device)
    return numbers_of(logits[row, token].float() - log_denominators(logits)[row])


def numbers_of(log_probabilities: Tensor) -> list[float]:
    """Take log-probabilities off the device.

    Raises:
        NotFiniteError: If one is not a number: the model's weights or its precision are broken.
    """
    if bool(log_probabilities.isnan().any()):
        raise NotFiniteError(
            "The model gives scores that are not numbers. Its weights are broken, or its precision too narrow: load it "
            "in bfloat16 or float32."
        )
    values: list[float] = log_probabilities.tolist()
    return values


def log_denominators(logits: Tensor) -> Tensor:
    """Return the log of the softmax's denominator of each row, (S, V) -> (S,), float32, a few rows at a time."""
    rows = max(1, NORMALISING_BYTES // (4 * logits.shape[1]))
    return torch.cat([part.float().logsumexp(dim=-1) for part in logits.split(rows)])
