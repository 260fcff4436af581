"""The comparisons at load time that refuse models whose packed episodes, or whose scores, would be wrong."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from manyicl.errors import UserError
from manyicl.model.attention import ATTENTION, packed_arguments

# Measured differences are below 1e-5 in float32 where a model isolates and above 1e-2 where it does not; in
# bfloat16 rounding alone reaches a few 1e-2 of the logits' own spread.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# Between two right attentions, rounding in bfloat16 reached 0.12 (a tiny random Gemma); attentions that lack a term
# were off by 1.9 (sinks) and 4.9 (chunks) in float32 already.
ATTENTION_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.25}
SEGMENT_LENGTHS = (7, 31, 12)
KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}


@torch.no_grad()
def packing_error(model: PreTrainedModel) -> float:
    """Return the largest difference between logits of packed segments and of each alone.

    It is given relative to the standard deviation of the logits, so that it means the same for every model.
    """
    segments = _segments(model)
    was_training = model.training
    model.eval()
    try:
        packed = model(
            input_ids=torch.cat(segments, dim=1), use_cache=False, **packed_arguments(SEGMENT_LENGTHS, model.device)
        ).logits
        alone = torch.cat([_logits(model, ids) for ids in segments], dim=1)
    finally:
        model.train(was_training)
    return _relative_difference(packed, alone)


@torch.no_grad()
def attention_error(model: PreTrainedModel) -> float:
    """Return the largest difference between our attention and transformers' own on one segment, as above."""
    ids = max(_segments(model), key=lambda segment: segment.shape[1])
    was_training = model.training
    model.eval()
    try:
        ours = _logits(model, ids)
        model.set_attn_implementation("eager")
        theirs = _logits(model, ids)
    finally:
        model.set_attn_implementation(ATTENTION)
        model.train(was_training)
    return _relative_difference(ours, theirs)


def require_isolation(model: PreTrainedModel) -> None:
    """Refuse a model in which a packed episode sees its neighbours, or our attention scores otherwise than its own.

    Raises:
        UserError: If so, or if the model cannot be called on a packed row.
    """
    name = type(model).__name__
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if not layer_types <= KNOWN_LAYER_TYPES:
        raise UserError(
            f"{name} has layers of type {sorted(layer_types - KNOWN_LAYER_TYPES)[0]!r}; expected attention over the "
            "whole text or a sliding window, as in Llama, Mistral, Qwen2, Qwen3 or Gemma."
        )
    tolerance = TOLERANCE.get(model.dtype, 1e-3)
    try:
        packing, attention = packing_error(model), attention_error(model)
    except (TypeError, ValueError, NotImplementedError) as failure:
        raise UserError(
            f"{name} cannot be called on packed episodes ({failure}). Expected a causal transformer with position "
            "ids, such as Llama, Mistral, Qwen or Gemma."
        ) from failure
    if not packing <= tolerance:
        raise UserError(
            f"{name} mixes the episodes of a packed row: its logits differ by {packing:.2g} standard deviations from "
            f"each episode alone, at most {tolerance:g} is expected. Models with recurrent or linear attention "
            "layers, or with learned absolute positions that ignore position ids, cannot be packed."
        )
    attention_tolerance = ATTENTION_TOLERANCE.get(model.dtype, 1e-3)
    if not attention <= attention_tolerance:
        raise UserError(
            f"{name} scores otherwise with this attention than with its own: logits differ by {attention:.2g} "
            f"standard deviations, at most {attention_tolerance:g} is expected. Its attention has a term that is not "
            "supported."
        )


def _segments(model: PreTrainedModel) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary_size = model.config.get_text_config().vocab_size
    return [torch.randint(vocabulary_size, (1, n), generator=generator).to(model.device) for n in SEGMENT_LENGTHS]


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=ids, use_cache=False, **packed_arguments([ids.shape[1]], model.device)
    ).logits
    return logits


def _relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    spread = other.float().std().clamp_min(1e-6)
    return float((one.float() - other.float()).abs().max() / spread)
