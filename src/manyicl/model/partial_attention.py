"""Attention over parts of the keys, and the merge of the parts: the softmax over all keys, never seen at once.

Each part gives its own softmax and the log of that softmax's denominator. Parts merge by these alone::

    output = sum over parts of  exp(lse_part - lse_all) * output_part,     lse_all = logsumexp over parts of lse_part

so that keys shared by many tokens (a prefix) and keys of few (their own) need neither one mask nor one tensor.

Source: Juravsky et al. 2024, Hydragen, arXiv:2402.05099; Dao et al. 2022, FlashAttention, arXiv:2205.14135.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Explicit scores are made for so many query tokens at a time that they stay within this. On a GPU each part costs the
# launch of its kernels.
EXPLICIT_SCORE_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}


class Part(NamedTuple):
    """Attention of tokens to some of the keys.

    Attributes:
        output: (B, heads, T, head size), in the dtype of the query. Zero where a token sees none of the keys.
        lse: Log of the softmax's denominator, (B, heads, T), float32. Minus infinity where it sees none.
    """

    output: Tensor
    lse: Tensor


def attend_to_all(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None = None) -> Part:
    """Let every token see every key.

    Heads that share keys are folded into the query length, so that grouped keys are never repeated in memory.

    Args:
        query: (B, heads, T, head size).
        key: (B, key heads, K, head size), K at least 1.
        value: Values, shaped as ``key``.
        scale: Factor of the scores.
        softcap: Scores are squashed to plus or minus this; None for no cap.
    """
    heads, key_heads, num_tokens = query.shape[1], key.shape[1], query.shape[2]
    folded = query.reshape(query.shape[0], key_heads, heads // key_heads * num_tokens, query.shape[3])
    part = (
        _flash(folded, key, value, scale, causal=False)
        if softcap is None and _has_flash(query)
        else _explicit(folded, key, value, scale, softcap, None)
    )
    return Part(part.output.reshape(query.shape), part.lse.reshape(query.shape[:3]))


def attend_causally(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None = None, window: int | None = None
) -> Part:
    """Let every token see the keys up to its own, at most ``window`` of them; shapes as above with K = T."""
    if softcap is None and (window is None or window >= key.shape[2]) and _has_flash(query):
        return _flash(query, key, value, scale, causal=True)
    place = torch.arange(key.shape[2], device=key.device)
    visible = place <= place[:, None]
    if window is not None:
        visible &= place > place[:, None] - window
    return attend_where(query, key, value, visible.expand(len(query), -1, -1), scale, softcap)


def attend_where(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, softcap: float | None = None
) -> Part:
    """Let tokens see the keys that ``visible``, (B, T, K), says; shapes as above."""
    heads, key_heads, num_tokens = query.shape[1], key.shape[1], query.shape[2]
    groups = heads // key_heads
    folded = query.reshape(query.shape[0], key_heads, groups * num_tokens, query.shape[3])
    part = _explicit(folded, key, value, scale, softcap, visible.repeat(1, groups, 1))
    return Part(part.output.reshape(query.shape), part.lse.reshape(query.shape[:3]))


def merge(parts: Sequence[Part]) -> Tensor:
    """Return the attention to the keys of all parts together, (B, heads, T, head size).

    Every token must see a key of some part.
    """
    if len(parts) == 1:
        return parts[0].output
    shares = torch.stack([part.lse for part in parts]).softmax(dim=0)
    output = torch.zeros_like(parts[0].output, dtype=torch.float32)
    for share, part in zip(shares, parts, strict=True):
        output.addcmul_(share[..., None], part.output.float())
    return output.to(parts[0].output.dtype)


def _has_flash(query: Tensor) -> bool:
    """Tell whether torch has a fused kernel here that gives the denominators too."""
    if query.device.type == "cpu":
        return query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return query.device.type == "cuda" and query.dtype in (torch.bfloat16, torch.float16)


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> Part:
    """Call the kernel of `scaled_dot_product_attention`, which keeps the denominators to itself."""
    # Under autocast rotary positions leave queries and keys in float32, and this kernel is not autocast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if query.device.type == "cpu":
        return Part(
            *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, is_causal=causal, scale=scale
            )
        )
    if key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # The GPU's kernel takes head sizes in multiples of 8; zeros added to the head change no score.
    head_size = query.shape[3]
    if head_size % 8:
        query, key, value = (F.pad(states, (0, -head_size % 8)) for states in (query, key, value))
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, is_causal=causal, scale=scale)[
        :2
    ]
    return Part(output[..., :head_size], lse.float())


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None, visible: Tensor | None
) -> Part:
    """Make the scores themselves, for so many tokens at a time that they stay small; key heads = heads here."""
    per_token = query.shape[0] * query.shape[1] * key.shape[2] * 4
    step = max(1, EXPLICIT_SCORE_BYTES.get(query.device.type, EXPLICIT_SCORE_BYTES["cpu"]) // per_token)
    keys = key.transpose(2, 3)
    outputs, denominators = [], []
    for start in range(0, query.shape[2], step):
        scores = (query[:, :, start : start + step] @ keys).float() * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None, start : start + step], float("-inf"))
        lse = scores.logsumexp(dim=-1)
        # A token that sees no key has no finite denominator; its weights are all zero.
        weights = (scores - lse.clamp_min(torch.finfo(torch.float32).min)[..., None]).exp()
        outputs.append(weights.to(query.dtype) @ value)
        denominators.append(lse)
    return Part(torch.cat(outputs, dim=2), torch.cat(denominators, dim=2))
