"""Cross-entropy at supervised positions, summed first and divided once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from manyicl.training.batch import Batch, first_tokens

# Logits of so many bytes in float32 are made at once; their softmax and its gradient are as large.
BYTES_OF_LOGITS = 512 * 2**20
# Logits of so many tokens are compared before they are made in another way.
NUM_TOKENS_COMPARED = 64
# Keys of configurations by which models cap or scale their logits, and the value that does nothing.
CAPS_AND_SCALES = {
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
    "logit_scale": 1,
    "logits_scaling": 1,
    "lm_head_multiplier": 1,
}
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
        total_weight: Sum of weights in the step, over all processes; a number may be 0, where nothing is supervised,
            but no tensor, which is not looked at, since its device would have to be waited for.

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
    divisor = total_weight if isinstance(total_weight, Tensor) else total_weight or 1.0
    return (token_nats * weights).sum() / divisor


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
        most_logits: Where more positions are supervised, the head makes logits of so many at a time, and again in the
            backward pass, so that memory does not grow with them; see `head_is_separable`. None: never.
    """
    targets, weights = batch["targets"], batch["weights"]
    if most_logits is None or len(targets) <= most_logits:
        return answer_loss(_logits(model, batch), targets, weights, total_weight)
    head = _head(model)
    make_logits = head.forward

    def part(states: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return answer_loss(make_logits(states), targets, weights, total_weight)

    def loss_in_parts(states: Tensor) -> Tensor:
        parts = zip(*(tensor.split(most_logits) for tensor in (states[0], targets, weights)), strict=True)
        return torch.stack([checkpoint(part, *each, use_reentrant=False) for each in parts]).sum(0, keepdim=True)

    # The head returns a loss where the model expects its logits. So everything runs within the model's own forward
    # pass, without which DDP would not average the gradients and FSDP2 would not gather the weights.
    with _head_replaced(head, loss_in_parts):
        return _logits(model, batch)


def most_logits_at_once(vocabulary_size: int) -> int:
    """Return how many positions may have logits at the same time."""
    return max(1, BYTES_OF_LOGITS // (4 * vocabulary_size))


def caps_or_scales_logits(config: PreTrainedConfig) -> bool:
    """Tell from a configuration whether a model caps or scales its logits, under the names that are known."""
    values = {name: getattr(config.get_text_config(), name, None) for name in CAPS_AND_SCALES}
    return any(value not in (None, CAPS_AND_SCALES[name]) for name, value in values.items())


@torch.no_grad()
def head_is_separable(model: nn.Module, batch: Batch) -> bool:
    """Tell whether what the head returns are the model's own logits.

    They are not where a model scales or caps them afterwards. That is also looked up, because small logits hardly show
    a cap. Compared are the first tokens of a sequence, whether or not they are supervised.
    """
    if caps_or_scales_logits(cast(Any, model).config):
        return False
    first = first_tokens(batch, NUM_TOKENS_COMPARED)
    first["supervised_positions"] = torch.arange(first["input_ids"].shape[1], device=first["input_ids"].device)
    was_training, head, returned = model.training, _head(model), list[Tensor]()
    make_logits = head.forward

    def noted(states: Tensor) -> Tensor:
        returned.append(make_logits(states))
        return returned[-1].clone()

    model.eval()
    try:
        with _head_replaced(head, noted):
            expected = _logits(model, first).float()
    finally:
        model.train(was_training)
    if len(returned) != 1 or returned[0].shape[1:] != expected.shape:
        return False
    difference, size = (returned[0][0].float() - expected).norm(), expected.norm()
    return bool(size > 0 and difference <= TOLERANCE[returned[0].dtype] * size)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's own logits at the supervised positions, (S, V)."""
    output = model(
        input_ids=batch["input_ids"],
        logits_to_keep=batch["supervised_positions"],
        use_cache=False,
        **batch["packed"],
    )
    return cast(Tensor, output.logits[0])


def _head(model: Any) -> nn.Module:
    """Return what makes logits of the last hidden states, with its adapter if it has one."""
    model = getattr(model, "module", model)  # within the wrapper of DDP
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    return cast(nn.Module, causal.get_output_embeddings())


@contextmanager
def _head_replaced(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a head do something else when the model calls it."""
    own = vars(head).get("forward")
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own
