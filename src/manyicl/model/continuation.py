"""What packed tokens attend to when they continue a prefix: its keys, and the keys of their own sequence.

::

    prefix      p p p p p p p                   one copy, seen by all sequences
    packed      a a a b b b b c c               new tokens of sequences a, b, c, packed without padding
    batch       a a a .                         the same tokens, one sequence a row, padded, for their own part
                b b b b
                c c . .
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.model.partial_attention import Part, attend_causally, attend_to_all, attend_where, merge


@dataclass(frozen=True)
class Block:
    """Keys and values of consecutive tokens at the beginning of a sequence.

    Attributes:
        start: Position of the first token.
        keys: One per layer, (1, key heads, tokens, head size).
        values: Values, shaped as ``keys``.
    """

    start: int
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in the block."""
        return self.keys[0].shape[2]

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + self.num_tokens

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values."""
        return sum(states.nbytes for states in (*self.keys, *self.values))

    def joined(self, following: Block) -> Block:
        """Return one block of both, a copy."""
        return Block(
            self.start,
            tuple(torch.cat(pair, dim=2) for pair in zip(self.keys, following.keys, strict=True)),
            tuple(torch.cat(pair, dim=2) for pair in zip(self.values, following.values, strict=True)),
        )

    def first(self, num_tokens: int) -> Block:
        """Return a view of the first tokens; nothing is copied."""
        return Block(
            self.start,
            tuple(keys[:, :, :num_tokens] for keys in self.keys),
            tuple(values[:, :, :num_tokens] for values in self.values),
        )


class OwnKeys:
    """Keys and values of sequences in flight, one padded batch per layer, (sequences, key heads, slots, head size).

    Allocated in the first pass, which knows the shapes. A slot holds one token; what was written stays until the slot
    is written again.
    """

    def __init__(self, num_sequences: int, num_slots: int) -> None:
        """Remember the size of the batches."""
        self.num_sequences = num_sequences
        self.num_slots = num_slots
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def write(self, layer: int, line: Tensor, slot: Tensor, key: Tensor, value: Tensor) -> None:
        """Write the keys and values of new tokens, (1, key heads, T, head size), to their slots."""
        while layer >= len(self.keys):
            shape = (self.num_sequences, key.shape[1], self.num_slots)
            # Slots that were never written are hidden, but NaN in them would pass through a weight of zero.
            self.keys.append(key.new_zeros(*shape, key.shape[3]))
            self.values.append(value.new_zeros(*shape, value.shape[3]))
        self.keys[layer][line, :, slot] = key[0].transpose(0, 1)
        self.values[layer][line, :, slot] = value[0].transpose(0, 1)

    def read(self, layer: int, num_slots: int, lines: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return keys and values of the first slots, of all lines or of those named."""
        keys, values = self.keys[layer][:, :, :num_slots], self.values[layer][:, :, :num_slots]
        return (keys, values) if lines is None else (keys[lines], values[lines])


@dataclass(frozen=True)
class Continuation:
    """New tokens, packed from several sequences that share a prefix.

    Attributes:
        prefix: Blocks that every token sees, in order.
        positions: Position of each new token, (T,).
        sequence: Which sequence each new token belongs to, (T,), rising.
        column: Position of each token among the new tokens of its sequence, (T,).
        num_sequences: Rows of the padded batch.
        num_columns: Most new tokens of one sequence.
        own: Keys and values kept for later passes; None if there is none.
        own_line: Line of ``own`` that belongs to each sequence, (sequences,); None if they are all of them, in order.
        slot: Slot of ``own`` for each new token, (T,).
        slot_positions: Position of each slot, (sequences, slots); for windows.
        visible: Which slots of ``own`` each new token sees, (sequences, columns, slots). None if the tokens are the
            first of their sequences: then each sees its own sequence up to itself.
    """

    prefix: Sequence[Block]
    positions: Tensor
    sequence: Tensor
    column: Tensor
    num_sequences: int
    num_columns: int
    own: OwnKeys | None = None
    own_line: Tensor | None = None
    slot: Tensor | None = None
    slot_positions: Tensor | None = None
    visible: Tensor | None = None

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attend to the prefix and to the own sequence.

        Args:
            layer: Index of the calling layer.
            query: Queries of the new tokens, (1, heads, T, head size).
            key: Keys of the new tokens, (1, key heads, T, head size).
            value: Values, shaped as ``key``.
            scale: Factor of the scores.
            window: A token sees at most so many keys, itself included; None for all.
            softcap: Scores are squashed to plus or minus this; None for no cap.

        Returns:
            (1, heads, T, head size).
        """
        if self.own is not None:
            assert self.slot is not None, "kept tokens have slots"
            line = self.sequence if self.own_line is None else self.own_line[self.sequence]
            self.own.write(layer, line, self.slot, key, value)
        parts = [self._own_part(layer, query, key, value, scale, window, softcap)]
        for block in self.prefix:
            parts += self._block_parts(block, layer, query, scale, window, softcap)
        return merge(parts)

    def _block_parts(
        self, block: Block, layer: int, query: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> list[Part]:
        """Attend to a block: to the keys that all tokens see without a mask, to those that some see with one.

        With a window, the keys of the prefix fall into three: too far for every token, within reach of the tokens
        nearest to it, within reach of all.
        """
        keys, values = block.keys[layer], block.values[layer]
        if window is None:
            return [attend_to_all(query, keys, values, scale, softcap)]
        first, last = self._position_range
        some = min(max(first - window + 1 - block.start, 0), block.num_tokens)
        all_see = min(max(last - window + 1 - block.start, 0), block.num_tokens)
        parts = []
        if some < all_see:
            place = torch.arange(block.start + some, block.start + all_see, device=query.device)
            visible = place > self.positions[:, None] - window
            few_keys, few_values = keys[:, :, some:all_see], values[:, :, some:all_see]
            parts.append(attend_where(query, few_keys, few_values, visible[None], scale, softcap))
        if all_see < block.num_tokens:
            parts.append(attend_to_all(query, keys[:, :, all_see:], values[:, :, all_see:], scale, softcap))
        return parts

    @cached_property
    def _position_range(self) -> tuple[int, int]:
        return int(self.positions.min()), int(self.positions.max())

    def _own_part(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Part:
        """Attend within each sequence, as one padded batch."""
        lines = self._padded(query)
        if self.visible is None:
            part = attend_causally(lines, self._padded(key), self._padded(value), scale, softcap, window)
        else:
            assert self.own is not None, "tokens after others need their keys"
            assert self.slot_positions is not None, "kept tokens have positions"
            visible = self.visible
            if window is not None:
                line_positions = self.positions.new_zeros(self.num_sequences, self.num_columns)
                line_positions[self.sequence, self.column] = self.positions
                visible = visible & (self.slot_positions[:, None, :] > line_positions[..., None] - window)
            keys, values = self.own.read(layer, visible.shape[2], self.own_line)
            part = attend_where(lines, keys, values, visible, scale, softcap)
        return Part(self._row(part.output), self._row(part.lse[..., None])[..., 0])

    @cached_property
    def _is_full(self) -> bool:
        """Whether no sequence is padded, so that the packed tokens and the batch are views of each other."""
        return len(self.positions) == self.num_sequences * self.num_columns

    def _padded(self, row: Tensor) -> Tensor:
        """Unpack, (1, heads, T, size) -> (sequences, heads, columns, size), zeros where there is no token."""
        _, heads, _, size = row.shape
        if self._is_full:
            return row[0].view(heads, self.num_sequences, self.num_columns, size).transpose(0, 1)
        lines = row.new_zeros(self.num_sequences, heads, self.num_columns, size)
        lines[self.sequence, :, self.column] = row[0].transpose(0, 1)
        return lines

    def _row(self, lines: Tensor) -> Tensor:
        """Undo `_padded`."""
        if self._is_full:
            return lines.transpose(0, 1).reshape(1, lines.shape[1], len(self.positions), lines.shape[3])
        return lines[self.sequence, :, self.column].transpose(0, 1)[None]


def key_shape(model: PreTrainedModel) -> tuple[int, int]:
    """Return the key heads of a layer and the size of each, from the network's configuration."""
    config = model.config.get_text_config()
    heads: int = config.num_attention_heads
    key_heads: int = getattr(config, "num_key_value_heads", None) or heads
    head_size: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    return key_heads, head_size


def continue_model(
    model: PreTrainedModel, token_ids: Sequence[int], continuation: Continuation, keep: Sequence[int]
) -> Tensor:
    """Run new tokens through the model after what they continue.

    Args:
        model: Causal, in evaluation mode, with this package's attention.
        token_ids: New tokens, (T,).
        continuation: Positions of the new tokens, and what they attend to.
        keep: Places whose logits are wanted, (S,); only these meet the vocabulary projection.

    Returns:
        Logits, (S, V).
    """
    logits: Tensor = model(
        input_ids=torch.tensor([token_ids], device=model.device),
        position_ids=continuation.positions[None],
        use_cache=False,
        logits_to_keep=torch.tensor(keep, dtype=torch.long, device=model.device),
        continuation=continuation,
    ).logits
    return logits[0]
