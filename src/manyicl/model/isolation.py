"""Comparisons at load time that refuse models whose packed episodes, or whose scores, would be wrong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from manyicl.errors import UserError
from manyicl.library_errors import reason
from manyicl.model.attention import packed_arguments
from manyicl.model.continuation import Block, Continuation, OwnKeys, continue_model

# Differences of logits that may be rounding, as their root mean square in standard deviations of the logits. In
# bfloat16 single logits of the packaged base move by 0.7 between two implementations of attention, and by 0.15 between
# the kernels for one segment and for many on a GPU. The root mean square moves by 0.04 at most; a layer that ignores
# the prefix makes it 0.2. In float32 all stay below 1e-5.
TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.05}
FLOAT32_TOLERANCE = 1e-3
SEGMENT_LENGTHS = (7, 31, 12)
# transformers chooses their factors anew in every pass, by its highest position.
POSITION_DEPENDENT_ROPE = {"longrope", "dynamic"}
KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}


def packing_error(model: PreTrainedModel) -> float:
    """Return how far logits of packed segments are from those of each alone, as their root mean square.

    It is given relative to the standard deviation of the logits, so that it means the same for every model.
    """
    segments = _segments(model)
    with _evaluation(model):
        packed = _logits(model, *segments)
        alone = torch.cat([_logits(model, ids) for ids in segments], dim=1)
    return _mean_difference(packed, alone)


def leakage_error(model: PreTrainedModel) -> float:
    """Return how much the logits of packed segments change at most when the first segment holds other tokens.

    Both passes have the same shapes and so the same kernels: in any precision it is zero where segments are isolated.
    """
    first, *others = _segments(model)
    replaced = (first + 1) % model.config.get_text_config().vocab_size
    with _evaluation(model):
        logits = _logits(model, first, *others)
        changes = (logits - _logits(model, replaced, *others))[:, first.shape[1] :]
    return float(changes.abs().max() / _spread(logits))


def attention_error(model: PreTrainedModel) -> float:
    """Return how far our attention is from transformers' own on one segment, as the root mean square of logits."""
    implementation = model.config._attn_implementation
    ours = probe_logits(model)
    try:
        model.set_attn_implementation("eager")
        theirs = probe_logits(model)
    finally:
        model.set_attn_implementation(implementation)
    return _mean_difference(ours, theirs)


def continuation_error(model: PreTrainedModel) -> float:
    """Return how far packed queries after a prefix are from each whole text alone, as the root mean square."""
    queries = _segments(model)[:2]
    prefix = _probe(model)
    with _evaluation(model):
        own = OwnKeys(1, prefix.shape[1])
        _continue(model, [prefix], (), own)
        block = Block(0, tuple(own.keys), tuple(own.values))
        packed = _continue(model, queries, (block,)).float()
        whole = [_logits(model, torch.cat([prefix, query], dim=1))[0, prefix.shape[1] :] for query in queries]
    return _mean_difference(packed, torch.cat(whole))


def probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of one short text, (1, T, V), by which two ways to compute a model are compared."""
    with _evaluation(model):
        return _logits(model, _probe(model))


def require_same_logits(model: PreTrainedModel, before: torch.Tensor, library: str) -> None:
    """Refuse kernels that change what a model computes by more than rounding.

    Args:
        model: Model with the kernels.
        before: `probe_logits` of the same model without them.
        library: Library that the kernels come from.

    Raises:
        UserError: If so.
    """
    what = f"scores otherwise with the kernels of {library} than without"
    _require_close(model, _mean_difference(probe_logits(model), before), "kernels_differ", what, "Leave them out.")


def require_isolation(model: PreTrainedModel) -> None:
    """Refuse a model in which a packed episode sees its neighbours, or our attention scores otherwise than its own.

    Raises:
        UserError: If so, or if the model cannot be called on a packed sequence.
    """
    name = type(model).__name__
    config = model.config.get_text_config()
    if unknown := set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYER_TYPES:
        expected = "attention over the whole text or a sliding window, as in Llama, Mistral, Qwen2, Qwen3 or Gemma"
        found = repr(min(unknown))
        raise UserError("unsupported_layers", f"{name} has layers of another kind", expected=expected, found=found)
    if scaling := _rope_types(config) & POSITION_DEPENDENT_ROPE:
        what = (
            f"{name} scales its rotary positions by {min(scaling)!r}, which depends on the longest text of a pass: "
            "what is packed or prefilled in chunks would score otherwise than alone"
        )
        remedy = "Use a model with a fixed scaling, such as the version of it for shorter contexts."
        raise UserError("unsupported_positions", what, remedy=remedy)
    try:
        mixing = (
            "mixes_episodes",
            "mixes the episodes of a packed sequence, where logits should be those of each alone",
            "Models with recurrent or linear attention layers, or with learned absolute positions that ignore "
            "position ids, cannot be packed; use another.",
        )
        _require_close(model, packing_error(model), *mixing)
        _require_close(model, leakage_error(model), *mixing, tolerance=FLOAT32_TOLERANCE)
        if _has_window(config) and not _windows_seen(model):
            what = (
                f"{name} has layers with a sliding window that does not reach its attention function; beyond the "
                "window it would score otherwise than with its own"
            )
            raise UserError("window_not_passed", what, remedy="Use a model such as Mistral, Qwen2 or Gemma.")
        what = "scores otherwise with this attention than with its own, which has a term that is not supported"
        _require_close(model, attention_error(model), "attention_differs", what)
        what = (
            "scores otherwise after a cached prefix than in one pass; not all of its layers hand their keys to the "
            "attention function that they are given"
        )
        _require_close(model, continuation_error(model), "continuation_differs", what)
    except (TypeError, ValueError, NotImplementedError, AttributeError, IndexError, RuntimeError) as failure:
        if "memory" in str(failure):
            raise
        what = f"{name} cannot be called on packed episodes: {reason(failure)}"
        expected = "a causal transformer with position ids, such as Llama, Mistral, Qwen or Gemma"
        raise UserError("not_callable", what, expected=expected) from failure


def _require_close(
    model: PreTrainedModel,
    difference: float,
    code: str,
    what: str,
    remedy: str | None = None,
    tolerance: float | None = None,
) -> None:
    """Refuse a difference that is more than rounding, or is none because something computed is no number."""
    name = type(model).__name__
    if not isfinite(difference):
        for parameter, weights in model.named_parameters():
            if num_bad := int((~torch.isfinite(weights)).sum()):
                what, found = (
                    f"The weights of this {name} are not all numbers",
                    f"{num_bad:,} values that are none in {parameter!r}",
                )
                remedy = "The training of the model diverged, or its file is damaged; use another."
                raise UserError("weights_not_finite", what, found=found, remedy=remedy)
        remedy = "Use a wider dtype than float16; DoRA divides by zero where a row of the base's weights is zero."
        what = f"The logits of this {name} are not all numbers, although its weights are"
        raise UserError("logits_not_finite", what, remedy=remedy)
    tolerance = TOLERANCE.get(model.dtype, FLOAT32_TOLERANCE) if tolerance is None else tolerance
    if difference > tolerance:
        expected, found = f"logits within {tolerance:g} standard deviations", f"{difference:.2g} standard deviations"
        raise UserError(code, f"{name} {what}", expected=expected, found=found, remedy=remedy)


def _rope_types(config: PreTrainedConfig) -> set[str]:
    """Return how the layers of a model scale their rotary positions, if it says so."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    return {str(kind.get("rope_type", kind.get("type"))) for kind in kinds}


def _has_window(config: PreTrainedConfig) -> bool:
    """Tell whether a configuration gives some layer a sliding window."""
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


@contextmanager
def _evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Compute without dropout and gradients, and leave the model in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _segments(model: PreTrainedModel) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    vocabulary_size = model.config.get_text_config().vocab_size
    return [torch.randint(vocabulary_size, (1, n), generator=generator).to(model.device) for n in SEGMENT_LENGTHS]


def _probe(model: PreTrainedModel) -> torch.Tensor:
    return max(_segments(model), key=torch.numel)


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


def _logits(model: PreTrainedModel, *segments: torch.Tensor) -> torch.Tensor:
    """Return the logits of packed segments, (1, T, V), in float32."""
    arguments = packed_arguments([ids.shape[1] for ids in segments], model.device)
    logits: torch.Tensor = model(input_ids=torch.cat(segments, dim=1), use_cache=False, **arguments).logits
    return logits.float()


def _mean_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).square().mean().sqrt() / _spread(other))


def _spread(logits: torch.Tensor) -> torch.Tensor:
    return logits.std().clamp_min(1e-6)
