"""The model before its first step: a base, an adapter over one, or a new one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from manyicl.errors import UserError
from manyicl.model.load import DTYPES, load_model, max_positions
from manyicl.model.manifest import TrainedTask
from manyicl.model.merging import merge_adapter
from manyicl.tasks.task import Task
from manyicl.training.from_scratch import new_config, new_model, require_loadable, train_tokenizer
from manyicl.training.recipe import LoraSettings, Recipe


@dataclass(frozen=True)
class StartingPoint:
    """What training begins from.

    Attributes:
        model: Has the trainable weights.
        tokenizer: Its tokenizer.
        base: As it can be found again from anywhere; None for a new model.
        base_fingerprint: Hash of the base's weights in the recipe's ``model.dtype``; None for a new model.
        base_tasks: Tasks that the base was trained on already.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: str | None
    base_fingerprint: str | None
    base_tasks: tuple[TrainedTask, ...] = ()

    @property
    def num_trainable_parameters(self) -> int:
        """Weights that training changes."""
        return sum(weights.numel() for weights in self.model.parameters() if weights.requires_grad)


def starting_point(recipe: Recipe, tasks: Sequence[Task]) -> StartingPoint:
    """Load or make the model of a recipe, the same for the same seed.

    Raises:
        UserError: If it cannot be loaded or made, or has fewer positions than a row has tokens.
    """
    set_seed(recipe.training.seed)
    start = _new_start(recipe, tasks) if recipe.model.from_scratch is not None else _start_from_base(recipe)
    positions = max_positions(start.model)
    if positions is not None and recipe.rows.max_context_tokens > positions:
        raise UserError(
            f"rows.max_context_tokens is {recipe.rows.max_context_tokens:,}; the model has {positions:,} positions. "
            "Use shorter rows, or a model with a longer context."
        )
    if recipe.training.gradient_checkpointing:
        recompute_activations(start.model)
    return start


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only the inputs of each layer for the backward pass, under the name of this transformers (5.17, 5.23)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _new_start(recipe: Recipe, tasks: Sequence[Task]) -> StartingPoint:
    settings = recipe.model.from_scratch
    assert settings is not None
    tokenizer = train_tokenizer(tasks, settings.tokenizer, recipe.format)
    config = new_config(settings, tokenizer, recipe.rows.max_context_tokens)
    require_loadable(tokenizer, config)
    model = new_model(settings, config, recipe.training.seed)
    torch.nn.Module.to(model, DTYPES[recipe.model.dtype])
    return StartingPoint(model, tokenizer, None, None)


def _start_from_base(recipe: Recipe) -> StartingPoint:
    assert recipe.model.base is not None
    loaded = load_model(recipe.model.base, dtype=recipe.model.dtype, device=training_device())
    base = recipe.model.base
    is_local = Path(base).is_dir()
    if is_local:
        # An adapter must find its base from wherever it is loaded later.
        base = str(Path(base).resolve())
    model = loaded.model
    adapter = cast(object, model)
    if isinstance(adapter, PeftModel):
        if recipe.model.lora is not None:
            raise UserError(
                f"model.base {recipe.model.base!r} is an adapter itself; an adapter over it would have a base that "
                "is saved nowhere. Train on its own base, or leave out model.lora to train the merged model."
            )
        model = merge_adapter(adapter)
    if recipe.model.lora is not None:
        if is_local:
            # The name that PEFT writes into adapter_config.json.
            model.name_or_path = model.config._name_or_path = base
        set_seed(recipe.training.seed)
        model = with_adapter(model, recipe.model.lora)
    else:
        model.requires_grad_(True)
    base_tasks = loaded.manifest.tasks if loaded.manifest else ()
    return StartingPoint(model, loaded.tokenizer, base, loaded.fingerprint, base_tasks)


def with_adapter(model: PreTrainedModel, lora: LoraSettings) -> PreTrainedModel:
    """Put a fresh low-rank adapter over a model; only the adapter is trainable.

    Raises:
        UserError: If the model has no layer of a name in ``target_modules``.
    """
    target = lora.target_modules
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target if isinstance(target, str) else list(target),
        task_type="CAUSAL_LM",
    )
    try:
        # peft 0.21 asks transformers 5.23 for a property by its deprecated name.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            return cast(PreTrainedModel, get_peft_model(model, config))
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if _is_linear(part)})
        raise UserError(
            f"model.lora.target_modules: {list(target)} match no layer; linear layers are {names}."
        ) from error


def _is_linear(part: torch.nn.Module) -> bool:
    return isinstance(part, torch.nn.Linear)


def training_device() -> str:
    """Return where to load a base: this process's GPU; the CPU if there is none or FSDP will place it."""
    if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true"):
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
