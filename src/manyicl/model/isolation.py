"""The comparisons at load time that refuse models whose packed episodes, or whose scores, would be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from transformers import PreTrainedModel

from manyicl.errors import UserError
from manyicl.library_errors import reason
from manyicl.model.attention import packed_arguments
from manyicl.model.continuation import Block, Continuation, OwnKeys, continue_model

# Measured differences are below 1e-5 in float32 where a model isolates and above 1e-2 where it does not; in
# bfloat16 rounding alone reaches a few 1e-2 of the logits' own spread.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
# Between two right attentions, rounding in bfloat16 reached 0.12 (a tiny random Gemma); attentions that lack a term
# were off by 1.9 (sinks) and 4.9 (chunks) in float32 already.
ATTENTION_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.25}
SEGMENT_LENGTHS = (7, 31, 12)
# transformers chooses their factors anew in every pass, by its highest position.
POSITION_DEPENDENT_ROPE = ("longrope", "dynamic")
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
    implementation = model.config._attn_implementation
    ours = probe_logits(model)
    try:
        model.set_attn_implementation("eager")
        theirs = probe_logits(model)
    finally:
        model.set_attn_implementation(implementation)
    return _relative_difference(ours, theirs)


@torch.no_grad()
def probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of one short text, (1, T, V), by which two ways to compute a model are compared."""
    ids = max(_segments(model), key=lambda segment: segment.shape[1])
    was_training = model.training
    model.eval()
    try:
        return _logits(model, ids)
    finally:
        model.train(was_training)


def require_same_logits(model: PreTrainedModel, before: torch.Tensor, library: str) -> None:
    """Refuse kernels that change what a model computes by more than rounding.

    Args:
        model: Model with the kernels.
        before: `probe_logits` of the same model without them.
        library: Library that the kernels come from.

    Raises:
        UserError: If so.
    """
    tolerance = ATTENTION_TOLERANCE.get(model.dtype, 1e-3)
    difference = _relative_difference(probe_logits(model), before)
    if not difference <= tolerance:
        raise _differs(
            "kernels_differ",
            f"{type(model).__name__} scores otherwise with the kernels of {library} than without",
            difference,
            tolerance,
            remedy="Leave them out.",
        )


@torch.no_grad()
def continuation_error(model: PreTrainedModel) -> float:
    """Return the largest difference between logits of packed queries after a prefix and of each whole text alone."""
    queries = _segments(model)[:2]
    prefix = max(_segments(model), key=lambda segment: segment.shape[1])
    lengths = [query.shape[1] for query in queries]
    was_training = model.training
    model.eval()
    try:
        own = OwnKeys(1, prefix.shape[1])
        _continue(model, [prefix], (), own)
        block = Block(0, tuple(own.keys), tuple(own.values))
        packed = _continue(model, queries, (block,))
        alone = torch.cat(
            [
                _logits(model, torch.cat([prefix, query], dim=1))[0, -length:]
                for query, length in zip(queries, lengths, strict=True)
            ]
        )
    finally:
        model.train(was_training)
    return _relative_difference(packed, alone)


def require_isolation(model: PreTrainedModel) -> None:
    """Refuse a model in which a packed episode sees its neighbours, or our attention scores otherwise than its own.

    Raises:
        UserError: If so, or if the model cannot be called on a packed sequence.
    """
    name = type(model).__name__
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if not layer_types <= KNOWN_LAYER_TYPES:
        raise UserError(
            "unsupported_layers",
            f"{name} has layers of another kind",
            expected="attention over the whole text or a sliding window, as in Llama, Mistral, Qwen2, Qwen3 or Gemma",
            found=repr(min(layer_types - KNOWN_LAYER_TYPES)),
        )
    if (scaling := _rope_type(model)) in POSITION_DEPENDENT_ROPE:
        raise UserError(
            "unsupported_positions",
            f"{name} scales its rotary positions by {scaling!r}, which depends on the longest text of a pass: what is "
            "packed or prefilled in chunks would score otherwise than alone",
            remedy="Use a model with a fixed scaling, such as the version of it for shorter contexts.",
        )
    tolerance = TOLERANCE.get(model.dtype, 1e-3)
    attention_tolerance = ATTENTION_TOLERANCE.get(model.dtype, 1e-3)
    try:
        packing = packing_error(model)
        if not isfinite(packing):
            _require_finite_weights(model)
        if not packing <= tolerance:
            raise _differs(
                "mixes_episodes",
                f"{name} mixes the episodes of a packed sequence, where logits should be those of each alone",
                packing,
                tolerance,
                remedy="Models with recurrent or linear attention layers, or with learned absolute positions that "
                "ignore position ids, cannot be packed; use another.",
            )
        if _has_window(model) and not _windows_seen(model):
            raise UserError(
                "window_not_passed",
                f"{name} has layers with a sliding window that does not reach its attention function; beyond the "
                "window it would score otherwise than with its own",
                remedy="Use a model such as Mistral, Qwen2 or Gemma.",
            )
        attention = attention_error(model)
        if not attention <= attention_tolerance:
            raise _differs(
                "attention_differs",
                f"{name} scores otherwise with this attention than with its own, which has a term that is not "
                "supported",
                attention,
                attention_tolerance,
            )
        continuing = continuation_error(model)
        if not continuing <= attention_tolerance:
            raise _differs(
                "continuation_differs",
                f"{name} scores otherwise after a cached prefix than in one pass; not all of its layers hand their "
                "keys to the attention function that they are given",
                continuing,
                attention_tolerance,
            )
    except (TypeError, ValueError, NotImplementedError, AttributeError, IndexError, RuntimeError) as failure:
        if "memory" in str(failure):
            raise
        raise UserError(
            "not_callable",
            f"{name} cannot be called on packed episodes: {reason(failure)}",
            expected="a causal transformer with position ids, such as Llama, Mistral, Qwen or Gemma",
        ) from failure


def _differs(code: str, what: str, difference: float, tolerance: float, remedy: str | None = None) -> UserError:
    return UserError(
        code,
        what,
        expected=f"logits within {tolerance:g} standard deviations",
        found=f"{difference:.2g} standard deviations",
        remedy=remedy,
    )


def _require_finite_weights(model: PreTrainedModel) -> None:
    """Refuse weights that are not numbers."""
    for name, weights in model.named_parameters():
        if not torch.isfinite(weights).all():
            raise UserError(
                "weights_not_finite",
                f"The weights of this {type(model).__name__} are not all numbers",
                found=f"{int((~torch.isfinite(weights)).sum()):,} values that are none in {name!r}",
                remedy="The training of the model diverged, or its file is damaged; use another.",
            )


def _rope_type(model: PreTrainedModel) -> str | None:
    """Return how a model scales its rotary positions, if it says so."""
    config = model.config.get_text_config()
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    found = {kind.get("rope_type", kind.get("type")) for kind in kinds}
    return next((kind for kind in found if kind in POSITION_DEPENDENT_ROPE), None)


def _has_window(model: PreTrainedModel) -> bool:
    """Tell whether a configuration gives some layer a sliding window."""
    config = model.config.get_text_config()
    if not getattr(config, "sliding_window", None) or getattr(config, "use_sliding_window", None) is False:
        return False
    layer_types = getattr(config, "layer_types", None)
    return layer_types is None or "sliding_attention" in layer_types


@torch.no_grad()
def _windows_seen(model: PreTrainedModel) -> bool:
    """Tell whether a window reaches the attention function."""
    seen: list[int] = []
    ids = _segments(model)[0]
    model(input_ids=ids, use_cache=False, windows_seen=seen, **packed_arguments([ids.shape[1]], model.device))
    return bool(seen)


def _segments(model: PreTrainedModel) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary_size = model.config.get_text_config().vocab_size
    return [torch.randint(vocabulary_size, (1, n), generator=generator).to(model.device) for n in SEGMENT_LENGTHS]


def _continue(
    model: PreTrainedModel, sequences: Sequence[torch.Tensor], prefix: Sequence[Block], own: OwnKeys | None = None
) -> torch.Tensor:
    """Run sequences after a prefix, packed, and return all logits, (T, V)."""
    lengths = [ids.shape[1] for ids in sequences]
    column = torch.cat([torch.arange(length) for length in lengths]).to(model.device)
    continuation = Continuation(
        prefix=prefix,
        positions=column + (prefix[-1].end if prefix else 0),
        sequence=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(model.device),
        column=column,
        num_sequences=len(lengths),
        num_columns=max(lengths),
        own=own,
        slot=column,
    )
    return continue_model(model, torch.cat(list(sequences), dim=1)[0].tolist(), continuation, range(sum(lengths)))


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(
        input_ids=ids, use_cache=False, **packed_arguments([ids.shape[1]], model.device)
    ).logits
    return logits


def _relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    spread = other.float().std().clamp_min(1e-6)
    return float((one.float() - other.float()).abs().max() / spread)
