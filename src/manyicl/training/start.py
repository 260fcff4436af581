"""The model before its first step: a base, a base with an adapter, or a new model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.pytorch_utils import Conv1D

from manyicl.errors import UserError
from manyicl.model.decoder_layers import decoder_layers
from manyicl.model.kernels import use_flash_attention, use_liger_kernels
from manyicl.model.load import DTYPES, cast_weights, load_model, load_quantized, max_positions
from manyicl.model.manifest import TrainedTask
from manyicl.model.merging import merge_adapter
from manyicl.tasks.task import Task
from manyicl.training.from_scratch import END, PADDING, new_config, new_model, require_loadable, train_tokenizer
from manyicl.training.merged_projections import merge_projections
from manyicl.training.processes import is_sharded, local_rank
from manyicl.training.recipe import LoraSettings, Recipe
from manyicl.training.requirements import too_few_positions


@dataclass(frozen=True)
class StartingPoint:
    """What training starts from.

    Attributes:
        model: Model whose weights are trained.
        tokenizer: Tokenizer of the model.
        base: Reference of the base, valid from any folder; None for a new model.
        base_fingerprint: Hash of the base's weights in the recipe's ``model.dtype``; None for a new model.
        base_tasks: Tasks that the base was trained on already.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: str | None
    base_fingerprint: str | None
    base_tasks: tuple[TrainedTask, ...] = ()


def starting_point(recipe: Recipe, tasks: Sequence[Task]) -> StartingPoint:
    """Load or make the model of a recipe, the same for the same seed.

    Raises:
        UserError: If it cannot be loaded or made, or has fewer positions than a packed sequence has tokens.
    """
    set_seed(recipe.training.seed)
    base = recipe.model.base
    start = _new_start(recipe, tasks) if base is None else _start_from_base(recipe, base)
    if error := too_few_positions(recipe, max_positions(start.model)):
        raise error
    if recipe.training.gradient_checkpointing:
        recompute_activations(start.model)
    return start


def recompute_activations(model: PreTrainedModel) -> None:
    """Keep only the inputs of each layer for the backward pass, under the name of this transformers (5.17, 5.23).

    transformers also asks for the gradient of the embeddings, which checkpointing needs only in its older, reentrant
    form. It would let the backward pass go through all layers below the lowest with an adapter.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()


def _new_start(recipe: Recipe, tasks: Sequence[Task]) -> StartingPoint:
    settings = recipe.model.from_scratch
    assert settings is not None
    tokenizer = train_tokenizer(tasks, settings.tokenizer, recipe.format.without_turns((PADDING, END)))
    config = new_config(settings, tokenizer, recipe.sequences.max_context_tokens)
    require_loadable(tokenizer, config)
    model = new_model(settings, config, recipe.training.seed)
    cast_weights(model, DTYPES[recipe.model.dtype])
    _use_kernels(model, recipe)
    return StartingPoint(model, tokenizer, None, None)


def _start_from_base(recipe: Recipe, base: str) -> StartingPoint:
    """Load the base, and put an adapter over it if the recipe says so.

    Its fingerprint is that of the base as it is saved, in 4 bits as well: so an adapter that was trained over 4 bits is
    loaded like any other, over the base in ``model.dtype``.
    """
    lora, dtype, device = recipe.model.lora, recipe.model.dtype, training_device()
    in_4_bits = recipe.model.quantize is not None
    loaded = load_model(base, dtype=dtype, device="cpu" if in_4_bits else device, check_isolation=not in_4_bits)
    model = loaded.model
    adapter = cast(object, model)
    if isinstance(adapter, PeftModel):
        if lora is not None:
            over = "an adapter over it would have a base that is saved nowhere"
            remedy = "Train on its own base, or leave out model.lora to train the merged model."
            what = f"model.base {base!r} is an adapter itself; {over}"
            raise UserError("base_is_adapter", what, remedy=remedy, field="model.lora")
        model = merge_adapter(adapter)
    elif in_4_bits:
        model = load_quantized(base, dtype, device)
    _use_kernels(model, recipe)
    # An adapter must find its base from wherever it is loaded later.
    path = Path(base)
    reference = str(path.resolve()) if path.exists() else base
    if lora is None:
        model.requires_grad_(True)
    else:
        if path.is_dir():
            # The name that PEFT writes into adapter_config.json.
            model.name_or_path = model.config._name_or_path = reference
        set_seed(recipe.training.seed)
        model = with_adapter(model, lora)
        # Measured on a CPU alone; a sharded model is on one, too, before FSDP places it.
        if device == "cpu" and not is_sharded():
            merge_projections(model)
    base_tasks = loaded.manifest.tasks if loaded.manifest else ()
    return StartingPoint(model, loaded.tokenizer, reference, loaded.fingerprint, base_tasks)


def _use_kernels(model: PreTrainedModel, recipe: Recipe) -> None:
    """Put the kernels of other libraries into a model, each compared with what it replaces."""
    if recipe.model.attention == "split" and not recipe.training.liger:
        return
    if recipe.model.quantize is None:
        torch.nn.Module.to(model, training_device())
    if recipe.model.attention == "flash":
        use_flash_attention(model)
    if recipe.training.liger:
        use_liger_kernels(model)


def with_adapter(model: PreTrainedModel, lora: LoraSettings) -> PreTrainedModel:
    """Put a fresh low-rank adapter over a model; only the adapter is trainable.

    Raises:
        UserError: If the model has no linear layer of a name in ``target_modules`` where an adapter is to be, or fewer
            layers than ``layers``.
    """
    target = lora.target_modules
    names = {name for name, part in model.named_modules() if isinstance(part, (nn.Linear, Conv1D))}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=target if isinstance(target, str) else list(target),
        task_type="CAUSAL_LM",
    )
    if lora.layers is not None:
        path, chosen = _uppermost(model, lora.layers)
        # peft takes layers by their number only together with names of parts.
        within = rf"{re.escape(path)}\.\d+\.(.+)"
        names = {found[1] for name in names if (found := re.fullmatch(within, name))}
        config.target_modules = sorted(names) if isinstance(target, str) else list(target)
        config.layers_to_transform, config.layers_pattern = chosen, path.rpartition(".")[2]
    try:
        # peft 0.21 asks transformers 5.23 for a property by its deprecated name.
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise _unknown_layer(target, names) from error
    changed = cast(Any, adapted).targeted_module_names
    unknown = [] if isinstance(target, str) else [name for name in target if not _matches(name, changed)]
    if unknown:
        raise _unknown_layer(unknown, names)
    return cast(PreTrainedModel, adapted)


def _uppermost(model: PreTrainedModel, num_layers: int) -> tuple[str, list[int]]:
    """Return the path of the decoder's layers, and the numbers of so many of the uppermost."""
    found, key = decoder_layers(model), "model.lora.layers"
    if found is None:
        what = f"The layers of a {model.config.model_type} are not in a list, so that {key} cannot choose among them"
        raise UserError("no_list_of_layers", what, remedy=f"Leave out {key}.", field=key)
    num_all = len(found.layers)
    if num_layers > num_all:
        what = "The model has fewer layers than are to get an update"
        raise UserError("too_few_layers", what, expected=f"at most {num_all}", found=str(num_layers), field=key)
    return found.path, list(range(num_all - num_layers, num_all))


def _matches(name: str, paths: Iterable[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for path in paths)


def _unknown_layer(target: str | Sequence[str], linear: Iterable[str]) -> UserError:
    names = sorted({name.rpartition(".")[2] for name in linear})
    key, expected = "model.lora.target_modules", f"names of linear layers, {names}"
    return UserError("unknown_layer", f"{key}: {list(target)} match no layer", expected=expected, field=key)


def training_device() -> str:
    """Return where to load a base: this process's GPU; the CPU if there is none or FSDP will place it."""
    if not torch.cuda.is_available() or is_sharded():
        return "cpu"
    return f"cuda:{local_rank()}"
