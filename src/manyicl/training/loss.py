"""Cross-entropy at supervised positions, summed first and divided once."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from manyicl.training.batch import Batch


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


def sequence_loss(model: nn.Module, batch: Batch, total_weight: float | Tensor) -> Tensor:
    """Run the model over one packed sequence and return the sequence's part of the step's loss.

    Only supervised positions meet the vocabulary projection, through the model's own one-dimensional
    ``logits_to_keep``, so that its caps and scales and an adapter on its head all apply. No attention mask is
    passed: the restarting positions and the segment ends isolate the episodes.
    """
    logits = model(
        input_ids=batch["input_ids"],
        logits_to_keep=batch["supervised_positions"],
        use_cache=False,
        **batch["packed"],
    ).logits[0]
    return answer_loss(logits, batch["targets"], batch["weights"], total_weight)
