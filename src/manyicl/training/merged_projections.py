"""Linear layers with an adapter, computed together where they share their input, in fewer passes over memory.

peft computes each layer by itself, as ``layer(x) + B(A(x)) * scale``: it scales and adds an update as large as the
layer's output, reads ``x`` once for each A, and sums the gradients of ``x`` one by one::

    peft      q: W x, A x, B A x, times the scale, plus     the same for k, and for v
    here      (A_q; A_k; A_v) x in one product; W x and B A x of each of them into the same memory

The weights stay where they are, the adapter's under their names, so that checkpoints and saved adapters do not change.
Values and gradients are those of peft but for rounding. Measured in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Names of layers in one module that most architectures call one after the other on the same input.
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def merge_projections(model: nn.Module) -> int:
    """Let layers with an adapter be computed together where they share their input, in place.

    Layers whose update drops inputs, or that are no plain linear layers, stay with peft's own computation, and so does
    every pass without gradients.

    Returns:
        Number of layers that are computed here from now on.
    """
    merged: set[nn.Module] = set()
    for module in list(model.modules()):
        children = dict(module.named_children())
        for names in (*SHARED_INPUTS, *((name,) for name in children)):
            found = [children[name] for name in names if name in children]
            parts = [part for part in found if part not in merged and _is_plain(part)]
            shared = SharedInput(cast("list[MergedLinear]", parts))
            for number, part in enumerate(parts):
                part.__class__ = MergedLinear
                cast(MergedLinear, part).shared = (shared, number)
            merged.update(parts)
    return len(merged)


def _is_plain(part: nn.Module) -> bool:
    """Tell whether a module is a frozen linear layer with one low-rank update and nothing else."""
    if type(part) is not LoraLinear or type(part.base_layer) is not nn.Linear or len(part.lora_A) != 1:
        return False
    (name,) = part.lora_A
    return (
        isinstance(part.lora_dropout[name], nn.Identity)
        and not part.lora_variant
        and not part.lora_bias[name]
        and not any(weights.requires_grad for weights in part.base_layer.parameters())
    )


class MergedLinear(LoraLinear):
    """peft's layer with another forward pass in training.

    Attributes:
        shared: The layers that share its input, and its number among them.
    """

    shared: tuple[SharedInput, int]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output with its update."""
        shared, number = self.shared
        if args or kwargs or not shared.computes(x):
            return super().forward(x, *args, **kwargs)
        return shared.output(number, x)


class SharedInput:
    """Layers that a model calls one after the other on the same input; the first call computes all."""

    def __init__(self, parts: Sequence[MergedLinear]) -> None:
        self._parts = parts
        self._input: tuple[Tensor, int] | None = None
        self._outputs: dict[int, Tensor] = {}

    def computes(self, x: Tensor) -> bool:
        """Tell whether the layers are computed here, or as peft does it."""
        if not torch.is_grad_enabled():
            return False
        dtypes = {weights.dtype for part in self._parts for weights in part.parameters()} | {x.dtype}
        # Outside of autocast peft computes the update in the type of its weights.
        return (len(dtypes) == 1 or torch.is_autocast_enabled(x.device.type)) and all(
            not part.disable_adapters and not part.merged and part.active_adapters == list(part.lora_A)
            for part in self._parts
        )

    def output(self, number: int, x: Tensor) -> Tensor:
        """Return the output of one layer; those of the others are kept until they are called on the same tensor."""
        known = self._input is not None and self._input[0] is x and self._input[1] == x._version
        if not known or number not in self._outputs:
            self._outputs = dict(enumerate(self._compute(x)))
            self._input = (x, x._version)
        output = self._outputs.pop(number)
        if not self._outputs:
            self._input = None
        return output

    def _compute(self, x: Tensor) -> Sequence[Tensor]:
        (name,) = self._parts[0].lora_A
        layers = [cast(nn.Linear, part.base_layer) for part in self._parts]
        outputs: Sequence[Tensor] = _Projections.apply(
            x,
            [part.scaling[name] for part in self._parts],
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            *(cast(nn.Linear, part.lora_A[name]).weight for part in self._parts),
            *(cast(nn.Linear, part.lora_B[name]).weight for part in self._parts),
        )
        return outputs


class _Projections(torch.autograd.Function):
    """``W x + b + scale B A x`` for several W, b, scale, B and A, with gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: Sequence[float],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *updates: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the outputs, shaped as x but for the last dimension.

        Args:
            ctx: What is kept for the backward pass.
            x: Input of all, (…, H).
            scales: Factor of each update.
            weights: Each W, (N, H), frozen.
            biases: Each b, (N,), frozen, or None.
            *updates: All A, (rank, H), then all B, (N, rank).
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        downs, ups = updates[: len(weights)], updates[len(weights) :]
        ranks = [len(down) for down in downs]
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        cast_weights = [weight.to(dtype) for weight in weights]
        cast_ups = [up.to(dtype) for up in ups]
        down = torch.cat(downs).to(dtype)
        low = rows @ down.t()
        outputs = []
        each = zip(cast_weights, biases, cast_ups, scales, low.split(ranks, dim=1), strict=True)
        for weight, bias, up, scale, part in each:
            output = rows.new_empty(*x.shape[:-1], len(weight))
            flat = output.view(-1, len(weight))
            if bias is None:
                torch.mm(rows, weight.t(), out=flat)
            else:
                torch.addmm(bias.to(dtype), rows, weight.t(), out=flat)
            outputs.append(output)
            flat.addmm_(part, up.t(), alpha=scale)
        ctx.save_for_backward(rows, low, down, *cast_weights, *cast_ups)
        ctx.scales, ctx.ranks, ctx.shape = scales, ranks, x.shape
        ctx.dtypes = x.dtype, [update.dtype for update in updates]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, of all A and of all B."""
        rows, low, down, *others = ctx.saved_tensors
        weights, ups = others[: len(gradients)], others[len(gradients) :]
        low_gradient = torch.empty_like(low)
        input_gradient: Tensor | None = None
        up_gradients = []
        parts = zip(low.split(ctx.ranks, dim=1), low_gradient.split(ctx.ranks, dim=1), strict=True)
        for gradient, weight, up, scale, (part, part_gradient) in zip(
            gradients, weights, ups, ctx.scales, parts, strict=True
        ):
            flat = gradient.reshape(-1, gradient.shape[-1])
            part_gradient.addmm_(flat, up, beta=0, alpha=scale)
            up_gradients.append((flat.t() @ part).mul_(scale))
            if ctx.needs_input_grad[0]:
                input_gradient = flat @ weight if input_gradient is None else input_gradient.addmm_(flat, weight)
        down_gradients = (low_gradient.t() @ rows).split(ctx.ranks)
        if input_gradient is not None:
            input_gradient = input_gradient.addmm_(low_gradient, down).to(ctx.dtypes[0]).view(ctx.shape)
        updates = zip((*down_gradients, *up_gradients), ctx.dtypes[1], strict=True)
        return (input_gradient, None, None, None, *(gradient.to(dtype) for gradient, dtype in updates))
