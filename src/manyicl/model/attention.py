"""One attention for training and engine: isolated episodes in a row, and a prefix with what continues it.

Registered through transformers' public `AttentionInterface`, so that no model file is patched. Without a mask
function of its own it is handed no mask, only each layer's ``sliding_window`` and ``softcap``; what a token may
see follows from the order of keys alone:

::

    packed           segments 0 0 0 1 1 1 1 2 2             a token sees its own segment, up to itself
    continuation     prefix p p p p | row a a b b b         a token sees the whole prefix and its own sequence
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, modeling_flash_attention_utils

from manyicl.errors import UserError
from manyicl.model.continuation import Continuation

ATTENTION = "manyicl"
# transformers takes every name with "flash" in it for its own implementation.
VARIABLE_LENGTH_ATTENTION = "manyicl_varlen"
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
MAX_KERNEL_HEAD_SIZE = 256
# What some architectures add to their scores; leaving it out in silence would change every result.
UNKNOWN_TERMS = ("s_aux", "position_bias")


class PackedArguments(TypedDict):
    """What a model needs in addition to the ids of a packed sequence, under the names that transformers gives them.

    Made once for all layers, so that none of them has to ask the device how long a segment is.
    """

    position_ids: Tensor  # (1, T), from 0 in each segment
    cu_seq_lens_q: Tensor  # (segments + 1,), from 0 to T, 32-bit integers
    cu_seq_lens_k: Tensor  # the same tensor: tokens attend within the sequence
    max_length_q: int  # tokens of the longest segment
    max_length_k: int  # the same


def packed_arguments(segment_lengths: Sequence[int], device: torch.device | str = "cpu") -> PackedArguments:
    """Describe the segments of a packed sequence to a model.

    Args:
        segment_lengths: Tokens of each isolated episode; they sum to T.
        device: Device of the sequence.
    """
    positions = [torch.arange(length) for length in segment_lengths]
    ends = torch.tensor([0, *segment_lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    longest = max(segment_lengths)
    return PackedArguments(
        position_ids=torch.cat(positions)[None].to(device),
        cu_seq_lens_q=ends,
        cu_seq_lens_k=ends,
        max_length_q=longest,
        max_length_k=longest,
    )


def isolated_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    continuation: Continuation | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally, within segments of a packed sequence or over a prefix and the own sequence after it.

    Splitting by segment costs the sum of squares instead of the square of the sum: measured 22 times faster
    than a dense mask for 8 segments of 1,024 tokens on a CPU. On a GPU in 16 bits torch's variable-length kernel
    takes all segments in one call.

    Args:
        module: The attention layer that calls.
        query: (B, heads, T, head size).
        key: (B, key heads, K, head size); K = T, or more where transformers' own cache comes before them.
        value: Values, shaped as ``key``.
        attention_mask: Must be None; a mask would be ignored here.
        scaling: Factor of the scores before the softmax; None for one over the root of the head size.
        dropout: Share of attention weights dropped in training.
        sliding_window: A token sees at most so many keys, itself included; None for all.
        softcap: Scores are squashed to plus or minus this; None for no cap.
        cu_seq_lens_q: Ends of the segments of a packed sequence, (segments + 1,); None for one segment.
        max_length_q: Tokens of the longest segment. Without it, the lengths are read from the device.
        continuation: What the sequence continues, if it continues a prefix; it replaces segments.
        **kwargs: What else transformers hands over. Nothing in it changes the result, or it is refused.

    Returns:
        (B, T, heads, head size), and None in place of attention weights.

    Raises:
        UserError: If the model insists on a mask, on bidirectional layers, or on terms that are not known here.
        ValueError: If segments are given and keys and tokens differ in number.
    """
    _require_known_terms(module, attention_mask, kwargs)
    _note_window(sliding_window, kwargs)
    if continuation is not None:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        layer: Any = module.layer_idx
        return continuation.attend(layer, query, key, value, scale, sliding_window, softcap).transpose(1, 2), None
    num_keys, num_tokens = key.shape[2], query.shape[2]
    if cu_seq_lens_q is not None and num_keys != num_tokens:
        raise ValueError(
            f"cu_seq_lens_q divides {num_tokens} tokens, but there are {num_keys} keys; segments have no cache before "
            "them. Call the model with use_cache=False."
        )
    if cu_seq_lens_q is None or len(cu_seq_lens_q) <= 2:
        return _causal_attention(query, key, value, scaling, dropout, sliding_window, softcap).transpose(1, 2), None
    if max_length_q is not None and _has_variable_length_kernel(value, softcap):
        return _variable_length_kernel(
            query, key, value, cu_seq_lens_q, max_length_q, scaling, dropout, sliding_window
        ), None
    ends = cu_seq_lens_q.tolist()
    parts = [
        _causal_attention(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scaling, dropout, sliding_window, softcap)
        for a, b in pairwise(ends)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def variable_length_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Do what `isolated_attention` does, all segments of a packed sequence in one call of flash-attn.

    The call is transformers' own. The arguments are those of `isolated_attention`, which also gets what is no packed
    sequence. Tested with a slow stand-in for flash-attn; the library itself was never run.

    Returns:
        (1, T, heads, head size), and None in place of attention weights.

    Raises:
        UserError: As there, and if the model does not compute in 16 bits.
    """
    if max_length_q is None or options.get("continuation") is not None:
        return isolated_attention(module, query, key, value, attention_mask, max_length_q=max_length_q, **options)
    _require_known_terms(module, attention_mask, options)
    _note_window(options.get("sliding_window"), options)
    if query.dtype not in KERNEL_DTYPES:
        raise UserError(
            "not_16_bits",
            "flash-attn computes in 16 bits",
            found=str(query.dtype).removeprefix("torch."),
            remedy="Use model.dtype: bfloat16.",
        )
    attended: Tensor = modeling_flash_attention_utils._flash_attention_forward(
        query.transpose(1, 2),  # (1, T, heads, head size)
        key.transpose(1, 2),
        value.transpose(1, 2),
        attention_mask=None,
        query_length=query.shape[2],
        is_causal=True,
        dropout=options.get("dropout", 0.0),
        softmax_scale=options.get("scaling"),
        sliding_window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        cu_seq_lens_q=options["cu_seq_lens_q"],
        cu_seq_lens_k=options["cu_seq_lens_k"],
        max_length_q=max_length_q,
        max_length_k=options["max_length_k"],
        attn_implementation="flash_attention_2",
    )
    return attended, None


def _has_variable_length_kernel(states: Tensor, softcap: float | None) -> bool:
    """Tell whether torch's variable-length kernel takes such states: a recent GPU, 16 bits, no cap."""
    return (
        states.device.type == "cuda"
        and states.dtype in KERNEL_DTYPES
        and softcap is None
        and states.shape[0] == 1
        and states.shape[3] % 8 == 0
        and states.shape[3] <= MAX_KERNEL_HEAD_SIZE
        and torch.cuda.get_device_capability(states.device) >= (8, 0)
    )


def _variable_length_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    longest: int,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Attend within all segments by one call of torch's FlashAttention kernel; (1, T, heads, head size).

    The operator below `torch.nn.attention.varlen`, which takes grouped keys in all versions of torch that are allowed.
    """
    # Under autocast rotary positions leave queries and keys in float32, and this kernel is not autocast.
    states = [part[0].transpose(0, 1).to(value.dtype) for part in (query, key, value)]  # (T, heads, head size)
    attended: Tensor = torch.ops.aten._flash_attention_forward(
        *states,
        ends,
        ends,
        longest,
        longest,
        dropout,
        True,  # causal
        False,  # no mask of what was dropped
        scale=scaling,
        # Keys to the left and to the right of a token, itself not counted.
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
    return attended[None]


def _note_window(sliding_window: int | None, others: Mapping[str, Any]) -> None:
    """Note that a layer handed over a window, where the comparison at load asks for it with ``windows_seen``."""
    seen: list[int] | None = others.get("windows_seen")
    if seen is not None and sliding_window is not None:
        seen.append(sliding_window)


def _require_known_terms(module: nn.Module, attention_mask: Tensor | None, others: Mapping[str, Any]) -> None:
    if attention_mask is not None:
        raise UserError(
            "unexpected_mask",
            f"{type(module).__name__} hands a mask to its attention, which follows segments alone",
            remedy="Call the model without attention_mask.",
        )
    for term in UNKNOWN_TERMS:
        if others.get(term) is not None:
            raise UserError(
                "unsupported_term", f"{type(module).__name__} adds {term!r} to its attention, which is not supported"
            )
    if getattr(module, "is_causal", True) is False:
        raise UserError(
            "not_causal", f"{type(module).__name__} attends in both directions", expected="a causal language model"
        )


def _causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attend from the last T of K positions to all positions before them, themselves included; (B, heads, T, D)."""
    num_tokens, num_keys = query.shape[2], key.shape[2]
    grouped = key.shape[1] != query.shape[1]
    if window is not None and window >= num_keys:
        window = None
    if softcap is None and window is None and (num_tokens == num_keys or num_tokens == 1):
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=num_tokens > 1, scale=scaling, enable_gqa=grouped
        )
    visible = visible_keys(num_tokens, num_keys, window, query.device)
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
    if grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = torch.tanh(scores / softcap) * softcap
    weights = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, dropout) @ value


def visible_keys(num_tokens: int, num_keys: int, window: int | None, device: torch.device | str = "cpu") -> Tensor:
    """Return which keys the last ``num_tokens`` positions see, (T, K), True where visible."""
    key_position = torch.arange(num_keys, device=device)
    own_position = key_position[num_keys - num_tokens :, None]
    visible = key_position <= own_position
    if window is not None:
        visible &= key_position > own_position - window
    return visible


AttentionInterface.register(ATTENTION, isolated_attention)
AttentionInterface.register(VARIABLE_LENGTH_ATTENTION, variable_length_attention)
