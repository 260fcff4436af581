"""Cross-entropy at supervised positions, summed first and divided once."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from manyicl.training.batch import Batch

# Logits of so many bytes in float32 are made at once; their softmax and its gradient are as large.
BYTES_OF_LOGITS = 512 * 2**20
# Relative differences between logits made in two ways, by rounding alone.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def answer_loss(logits: Tensor, targets: Tensor, weights: Tensor, total_weight: float | Tensor) -> Tensor:
    """Weighted cross-entropy at the supervised positions of one packed sequence, in nats.

    Summed, then divided once by the weight of the whole optimizer step, so an answer
    counts the same however episodes fall into sequences, micro-batches and processes.

    Args:
        logits: Scores at the supervised positions only, (S, V).
        targets: Next-token id at each of them, (S,).
        weights: Share of each in the loss, (S,); 1 per token, or 1 per answer spread over its tokens.
        total_weight: Sum of weights in the step, over all processes; 0 only where nothing is supervised.

    Returns:
        Scalar. Zero, still connected to the graph, when nothing is supervised.

    Raises:
        ValueError: If logits, targets and weights cover different positions.

    Source: He et al. 2025, arXiv:2506.11103, every answer as a target.
    """
    if not len(logits) == len(targets) == len(weights):
        raise ValueError(
            f"logits cover {len(logits)} positions, targets {len(targets)}, weights {len(weights)}; "
            "take all three from the same sequence."
        )
    token_nats = F.cross_entropy(logits.float(), targets, reduction="none")
    return (token_nats * weights).sum() / (total_weight or 1.0)


def sequence_loss(
    model: nn.Module, batch: Batch, total_weight: float | Tensor, most_logits: int | None = None
) -> Tensor:
    """Run the model over one packed sequence and return the sequence's part of the step's loss.

    Only supervised positions meet the vocabulary projection, through the model's own one-dimensional
    ``logits_to_keep``, so that its caps and scales and an adapter on its head all apply. No attention mask is
    passed: the restarting positions and the segment ends isolate the episodes.

    Args:
        model: Model in training.
        batch: One packed sequence.
        total_weight: Sum of weights in the step, over all processes.
        most_logits: Where more positions are supervised, the head is called by itself on so many at a time, and again
            in the backward pass, so that memory does not grow with them; see `head_is_separable`. None: never.
    """
    targets, weights = batch["targets"], batch["weights"]
    if most_logits is None or len(targets) <= most_logits:
        return answer_loss(_logits(model, batch), targets, weights, total_weight)
    decoder, head = _decoder_and_head(model)
    hidden = decoder(input_ids=batch["input_ids"], use_cache=False, **batch["packed"]).last_hidden_state[0]

    def part(states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return answer_loss(head(states), targets, weights, total_weight)

    parts = (tensor.split(most_logits) for tensor in (hidden[batch["supervised_positions"]], targets, weights))
    return torch.stack([checkpoint(part, *each, use_reentrant=False) for each in zip(*parts, strict=True)]).sum()


def most_logits_at_once(vocabulary_size: int) -> int:
    """Return how many positions may have logits at the same time."""
    return max(1, BYTES_OF_LOGITS // (4 * vocabulary_size))


@torch.no_grad()
def head_is_separable(model: nn.Module, batch: Batch) -> bool:
    """Tell whether decoder and head, called one after the other, give the model's own logits on this sequence.

    They do not where a model scales or caps its logits. A cap is looked up, because small logits hardly show it.
    """
    if getattr(cast(Any, model).config.get_text_config(), "final_logit_softcapping", None):
        return False
    was_training = model.training
    model.eval()
    try:
        expected = _logits(model, batch).float()
        decoder, head = _decoder_and_head(model)
        hidden = decoder(input_ids=batch["input_ids"], use_cache=False, **batch["packed"]).last_hidden_state[0]
        logits = head(hidden[batch["supervised_positions"]])
    finally:
        model.train(was_training)
    difference, size = (logits.float() - expected).norm(), expected.norm()
    return bool(size > 0 and difference <= TOLERANCE[logits.dtype] * size)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's own logits at the supervised positions, (S, V)."""
    output = model(
        input_ids=batch["input_ids"],
        logits_to_keep=batch["supervised_positions"],
        use_cache=False,
        **batch["packed"],
    )
    return cast(Tensor, output.logits[0])


def _decoder_and_head(model: Any) -> tuple[nn.Module, nn.Module]:
    """Return what makes the last hidden states, and what makes logits of them, with their adapter if there is one."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return causal.get_decoder(), causal.get_output_embeddings()
