r"""Initial weights that already attend back, gather and match, so that a tiny model soon learns from context.

A transformer that starts from random weights spends most of a small budget before it finds out that an answer
can be looked up in its own context. Here the looking-up is laid into the first weights, with nothing but the
parameters every Llama with attention biases has; training is then free to keep or change it. No code runs at load time.

The hidden dimensions start in three blocks::

    identity              | before               | around
    this token            | the token before it  | the last few tokens, averaged
    embeddings, tied head | layer 0, head 0      | layer 0, heads 1 and 2

    query + "\n"   ──looks for──►   a token that has "\\n" before it and similar words around it: the answer to
    a similar query ──►  its identity is copied, and the tied head reads it.            (layers 1 up, heads 0, 1)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from manyicl.errors import UserError

EMBEDDING_SCALE = 0.1
LEAST_HEADS = 4
# Positional scores come from biases turned by RoPE; slower turns than this (radians per token) tell no positions
# apart within an episode, and slower ones than the second keep a content match whole over a thousand tokens.
SLOWEST_POSITIONAL_TURN = 0.005
FASTEST_MATCHING_TURN = 0.002
# Logit gains of looking one back, of a window, of "same token before" and of "similar words around": chosen by
# reasoning and tried in a few trainings, not tuned.
BACK_GAIN, WINDOW_GAIN, BEFORE_GAIN, AROUND_GAIN = 8.0, 3.0, 1.5, 4.0
COPY_GAIN = 2.0
NARROW_WINDOW, WIDE_WINDOW = 4, 8


@torch.no_grad()
def structured_initialization(model: PreTrainedModel, seed: int) -> None:
    """Overwrite all weights of a new Llama model, so that looking up in its own context is near.

    Layer 0: one head looks one token back, two average windows of the last tokens, one looks two back.
    Layers 1 up: two heads find earlier positions that had this token before them and similar words around them,
    and copy what stood there; one matches like content nearby; one matches like content anywhere (in layer 1
    it looks one back). Everything else is small and random.

    After 0.4M tokens of easy lists with four answers, a model of this start looked up 0.99 of them; the library's own
    first weights still guessed (0.29), see tests/model/test_initialization.py. Which part does how much was not
    separated.

    Args:
        model: A Llama with attention_bias (Qwen2 has the same biases, but plain transformers loads only Qwen2's
            own tokenizer for it), tied embeddings, one key head per query head, and at least four heads.
        seed: Seed of the random directions.

    Raises:
        UserError: If the model has another shape.
    """
    if not isinstance(model, LlamaForCausalLM) or not model.config.attention_bias:
        expected, found = "llama with attention_bias: true", repr(model.config.model_type)
        raise _unfit("is written for one architecture", expected, found, "Use initialization: default.")
    config = model.config
    if config.num_attention_heads < LEAST_HEADS or config.num_key_value_heads != config.num_attention_heads:
        expected = f"at least {LEAST_HEADS} attention heads and as many key-value heads"
        raise _unfit("needs other heads", expected, f"{config.num_attention_heads} and {config.num_key_value_heads}")
    if not config.tie_word_embeddings:
        raise _unfit("reads copied tokens with tied embeddings", remedy="Set tie_word_embeddings: true.")
    turns = model.model.rotary_emb.inv_freq.float().cpu()
    if 2 * len(turns) * config.num_attention_heads != config.hidden_size:
        what = f"splits hidden_size {config.hidden_size} evenly over {config.num_attention_heads} heads"
        raise _unfit(what, remedy="Leave head_dim to the library.")
    _Structure(model, turns, torch.Generator().manual_seed(seed)).fill()


def _unfit(what: str, expected: str | None = None, found: str | None = None, remedy: str | None = None) -> UserError:
    what = f"initialization: structured {what}"
    return UserError("unfit_initialization", what, expected=expected, found=found, remedy=remedy)


class _Structure:
    """The blocks of the hidden dimensions, and the heads that read and write them."""

    def __init__(self, model: LlamaForCausalLM, turns: Tensor, generator: torch.Generator) -> None:
        """Lay out the blocks. ``turns`` holds the radians per token of each RoPE pair, (head size / 2,)."""
        self.model = model
        self.turns = turns
        self.generator = generator
        self.hidden = model.config.hidden_size
        self.num_heads = model.config.num_attention_heads
        self.head = self.hidden // self.num_heads
        self.identity = self.hidden // 2
        quarter = (self.hidden - self.identity) // 2
        self.before = slice(self.identity, self.identity + quarter)
        self.around = slice(self.identity + quarter, self.hidden)
        # Two views of a token's identity: what it leaves in the block `before`, and in `around`.
        self.as_before = self._directions(quarter, self.identity) * math.sqrt(self.identity / quarter)
        num_around = self.hidden - self.around.start
        self.as_around = self._directions(num_around, self.identity) * math.sqrt(self.identity / num_around)
        slow = torch.nonzero(turns < FASTEST_MATCHING_TURN).flatten()
        if len(slow) < len(turns) // 2:
            slow = torch.arange(len(turns) // 2, len(turns))
        self.matching = torch.cat([slow, slow + len(turns)])

    def fill(self) -> None:
        """Overwrite every weight."""
        embeddings = self.model.model.embed_tokens.weight
        self._normal(embeddings, EMBEDDING_SCALE / 10)
        embeddings[:, : self.identity] *= 10
        for number, layer in enumerate(self.model.model.layers):
            self._normal(layer.mlp.gate_proj.weight, self.hidden**-0.5)
            self._normal(layer.mlp.up_proj.weight, self.hidden**-0.5)
            self._normal(layer.mlp.down_proj.weight, 0.1 * self.model.config.intermediate_size**-0.5)
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.bias.zero_()
                self._normal(projection.weight, 0.02)
            directions = self._directions(self.hidden, self.hidden)
            for index in range(self.num_heads):
                head = _Head(attention, slice(index * self.head, (index + 1) * self.head))
                # By default a head hands on its own share of what it sees, in place.
                head.value.copy_(directions[head.rows])
                head.output.copy_(directions[head.rows].T * (EMBEDDING_SCALE * COPY_GAIN / 2))
                if number == 0:
                    self._gathering_head(head, index)
                else:
                    self._matching_head(head, index, number)

    def _gathering_head(self, head: _Head, index: int) -> None:
        if index == 0:
            self._look_back(head, 1.0, BACK_GAIN)
            self._copy(head, self.as_before, self.before)
        elif index in (1, 2):
            width = NARROW_WINDOW if index == 1 else WIDE_WINDOW
            self._look_back(head, 0.8 * width, WINDOW_GAIN, width)
            self._copy(head, self.as_around, self.around)
        else:
            self._look_back(head, 2.0, BACK_GAIN)

    def _matching_head(self, head: _Head, index: int, layer: int) -> None:
        if index in (0, 1):
            self._look_up(head, index)
        elif index == 3 and layer == 1:
            self._look_back(head, 1.0, BACK_GAIN)
        else:
            like = torch.zeros(self.head, self.hidden)
            like[self.matching] = self._directions(len(self.matching), self.hidden)
            head.query.copy_(like)
            head.key.copy_(like)
            if index == 2:
                self._look_back(head, 5.0, WINDOW_GAIN, 10)

    def _look_back(self, head: _Head, distance: float, gain: float, width: float = 0.0) -> None:
        """Let biases and RoPE make a score that peaks ``distance`` tokens back.

        It is the sum of gain² cos(turn (d - distance)) over the turns. With a ``width``, fast turns are damped, and
        the peak becomes a window about that wide.
        """
        amplitude = gain * torch.exp(-0.5 * (self.turns * width / 2) ** 2) * (self.turns > SLOWEST_POSITIONAL_TURN)
        angle = self.turns * distance
        head.key_bias.copy_(torch.cat([amplitude, torch.zeros_like(amplitude)]))
        head.query_bias.copy_(torch.cat([amplitude * angle.cos(), -amplitude * angle.sin()]))

    def _copy(self, head: _Head, view: Tensor, block: slice) -> None:
        """Write a view of the seen token's identity into a block."""
        rank = min(self.head, len(view))
        head.value.zero_()
        head.value[:rank, : self.identity] = view[:rank]
        head.output.zero_()
        head.output[block.start : block.start + rank, :rank] = torch.eye(rank) * (EMBEDDING_SCALE * COPY_GAIN)

    def _look_up(self, head: _Head, half: int) -> None:
        """Find a position with this token before it and similar words around it; copy half of its identity."""
        same = self._directions(len(self.matching), self.before.stop - self.before.start)
        similar = self._directions(len(self.matching), self.hidden - self.around.start)
        query, key = torch.zeros(2, self.head, self.hidden)
        query[self.matching, : self.identity] = BEFORE_GAIN * same @ self.as_before
        key[self.matching, self.before] = BEFORE_GAIN * same
        query[self.matching, self.around] = AROUND_GAIN * similar
        key[self.matching, self.around] = AROUND_GAIN * similar
        head.query.copy_(query)
        head.key.copy_(key)
        width = self.identity // 2
        block = slice(half * width, (half + 1) * width)
        self._copy(head, torch.eye(self.identity)[block], block)

    def _directions(self, rows: int, columns: int) -> Tensor:
        """Draw a random matrix with orthonormal rows or columns, whichever are fewer."""
        size = max(rows, columns)
        random = torch.randn(size, size, generator=self.generator)
        directions: Tensor = torch.linalg.qr(random)[0]
        return directions[:rows, :columns]

    def _normal(self, weight: Tensor, deviation: float) -> None:
        weight.copy_(torch.randn(weight.shape, generator=self.generator) * deviation)


class _Head:
    """Views of one head's weights: changing them changes the model."""

    def __init__(self, attention: LlamaAttention, rows: slice) -> None:
        self.rows = rows
        self.query: Tensor = attention.q_proj.weight[rows]
        self.key: Tensor = attention.k_proj.weight[rows]
        self.value: Tensor = attention.v_proj.weight[rows]
        self.query_bias: Tensor = attention.q_proj.bias[rows]
        self.key_bias: Tensor = attention.k_proj.bias[rows]
        self.output: Tensor = attention.o_proj.weight[:, rows]
