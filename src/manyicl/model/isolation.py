"""The comparison at load time that refuses models which mix the episodes of a packed row."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from manyicl.errors import UserError
from manyicl.model.attention import packed_arguments

# Measured differences are below 1e-5 in float32 where a model isolates and above 1e-2 where it does not; in
# bfloat16 rounding alone reaches a few 1e-2 of the logits' own spread.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}


@torch.no_grad()
def packing_error(model: PreTrainedModel) -> float:
    """Return the largest difference between logits of two packed segments and of each alone.

    It is given relative to the standard deviation of the logits, so that it means the same for every model. Three
    lengths are compared, so that windows and chunks shorter than a segment would show.
    """
    lengths = (7, 31, 12)
    vocabulary_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    segments = [torch.randint(vocabulary_size, (1, n), generator=generator).to(model.device) for n in lengths]
    was_training = model.training
    model.eval()
    try:
        packed = model(
            input_ids=torch.cat(segments, dim=1), use_cache=False, **packed_arguments(lengths, model.device)
        ).logits
        alone = torch.cat(
            [
                model(input_ids=ids, use_cache=False, **packed_arguments([ids.shape[1]], model.device)).logits
                for ids in segments
            ],
            dim=1,
        )
    finally:
        model.train(was_training)
    spread = alone.float().std().clamp_min(1e-6)
    return float((packed.float() - alone.float()).abs().max() / spread)


def require_isolation(model: PreTrainedModel) -> None:
    """Refuse a model in which a packed episode sees its neighbours.

    Raises:
        UserError: If packed and separate logits differ, or the model cannot be called on a packed row.
    """
    try:
        error = packing_error(model)
    except (TypeError, ValueError, NotImplementedError) as failure:
        raise UserError(
            f"{type(model).__name__} cannot be called on packed episodes ({failure}). Expected a causal transformer "
            "with position ids, such as Llama, Mistral, Qwen or Gemma."
        ) from failure
    tolerance = TOLERANCE.get(model.dtype, 1e-3)
    if not error <= tolerance:
        raise UserError(
            f"{type(model).__name__} mixes the episodes of a packed row: its logits differ by {error:.2g} standard "
            f"deviations from each episode alone, at most {tolerance:g} is expected. Models with recurrent or linear "
            "attention layers, or with learned absolute positions that ignore position ids, cannot be packed."
        )
