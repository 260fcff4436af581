"""GPU kernels of other libraries, used only if they give the same results as the model without them.

They were never run on a GPU: tests replace them by stand-ins, and Liger 0.8.5 was compared once in Triton's
interpreter. So each is compared when a run starts, with torch's own kernels and packed with alone, and refused where
it differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from manyicl.errors import UserError
from manyicl.library_errors import reason
from manyicl.model.attention import VARIABLE_LENGTH_ATTENTION
from manyicl.model.isolation import probe_logits, require_isolation, require_same_logits
from manyicl.model.machine import import_library

# Only kernels that stand in for a part of a layer. Those of the loss would take the place of logits_to_keep, or of
# torch's cross_entropy for the whole process, ours with it.
LIGER_KERNELS = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    "geglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


def use_flash_attention(model: PreTrainedModel) -> None:
    """Let flash-attn compute the packed sequences of a model, in place.

    Raises:
        UserError: If flash-attn cannot be imported or does not run, or the model's logits become others.
    """
    import_library("flash_attn")
    before = probe_logits(model)
    with _as_user_error("model.attention: flash-attn", "Use model.attention: split."):
        model.set_attn_implementation(VARIABLE_LENGTH_ATTENTION)
        require_same_logits(model, before, "flash-attn")
    require_isolation(model)


def use_liger_kernels(model: PreTrainedModel) -> None:
    """Put Liger's norms, rotary positions and gates into a model, in place; its losses stay out.

    Liger also replaces functions of the model's module in transformers, so that from here on other models of the
    architecture in this process use them, too.

    Raises:
        UserError: If Liger cannot be imported, does not run or knows no kernels for the architecture, about which
            it is silent itself, or the model's logits become others.
    """
    patch = import_library("liger_kernel.transformers")
    architectures = import_library("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    model_type = model.config.model_type
    if model_type not in architectures:
        what, expected = (
            "liger-kernel has no kernels for this architecture",
            f"one of {', '.join(sorted(architectures))}",
        )
        remedy, field = "Remove training.liger.", "training.liger"
        raise UserError("no_kernels", what, expected=expected, found=model_type, remedy=remedy, field=field)
    before = probe_logits(model)
    with _as_user_error("training.liger: liger-kernel", "Remove training.liger."):
        patch._apply_liger_kernel_to_instance(model=model, **LIGER_KERNELS)
        require_same_logits(model, before, "liger-kernel")
    require_isolation(model)


@contextmanager
def _as_user_error(what: str, remedy: str) -> Iterator[None]:
    """Turn what a kernel raises about a shape, type or architecture into one sentence; lack of memory stays."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        what = f"{what} does not run with this model: {reason(error)}"
        raise UserError("kernels_fail", what, remedy=remedy) from error
