"""Memory that a process of a run needs, from what is known without loading its model; imports no torch."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from manyicl.model.manifest import Manifest
from manyicl.model.reference import config_folder
from manyicl.training.recipe import FromScratchSettings, Recipe

# What a process holds once everything is imported, before a model and tasks: 0.5 GiB were seen.
IMPORTS_BYTES = 3 * 2**28


class ModelSize(NamedTuple):
    """Sizes of a model.

    Attributes:
        num_weights: Number of all weights.
        sum_of_sides: Rows plus columns of the matrices in its layers, which is what an adapter of rank 1 would have.
        num_layers: Number of layers.
        hidden_size: Width of a layer.
        vocabulary_size: Number of tokens that it knows.
    """

    num_weights: int
    sum_of_sides: int
    num_layers: int
    hidden_size: int
    vocabulary_size: int


def model_size(recipe: Recipe) -> ModelSize | None:
    """Read the sizes of a recipe's model from its files or settings; None where they do not say."""
    if recipe.model.from_scratch is not None:
        return _size_of_new(recipe.model.from_scratch)
    folder = config_folder(recipe.model.base)
    if folder is not None and (folder / "adapter_config.json").is_file():
        manifest = Manifest.read(folder)
        folder = config_folder(manifest.base if manifest else None)
    if folder is None:
        return None
    with suppress(OSError, ValueError, KeyError, TypeError, SafetensorError):
        return _size_of_folder(folder)
    return None


def _size_of_folder(folder: Path) -> ModelSize | None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    vocabulary_size = int(config["vocab_size"])
    num_weights = sum_of_sides = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="np") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                shape = tensors.get_slice(name).get_shape()
                num_weights += math.prod(shape)
                if len(shape) == 2 and vocabulary_size not in shape:
                    sum_of_sides += sum(shape)
    if not num_weights:
        return None
    layers, width = int(config["num_hidden_layers"]), int(config["hidden_size"])
    return ModelSize(num_weights, sum_of_sides, layers, width, vocabulary_size)


def _size_of_new(settings: FromScratchSettings) -> ModelSize | None:
    """Count roughly: four square matrices and three of the inner width in a layer, two of the vocabulary."""
    config: dict[str, Any] = settings.config
    layers, width = config.get("num_hidden_layers"), config.get("hidden_size")
    if not isinstance(layers, int) or not isinstance(width, int):
        return None
    inner = config.get("intermediate_size")
    inner = inner if isinstance(inner, int) else 4 * width
    tokens = settings.tokenizer.vocabulary_size
    num_weights = layers * width * (4 * width + 3 * inner) + 2 * tokens * width
    return ModelSize(num_weights, layers * (11 * width + 3 * inner), layers, width, tokens)


def process_bytes(recipe: Recipe, size: ModelSize) -> float:
    """Estimate from above what one of several processes needs: weights, gradients, optimizer and activations."""
    lora = recipe.model.lora
    num_trained = size.num_weights if lora is None else min(size.num_weights, lora.rank * size.sum_of_sides)
    held = size.num_weights * (2 if recipe.model.dtype == "bfloat16" else 4)
    if recipe.training.bf16 and recipe.model.dtype != "bfloat16":
        held += size.num_weights * 2  # the copies that products in bfloat16 take
    # In float32: gradients, the buckets in which they are averaged, and two averages of the optimizer.
    trained = num_trained * (4 + 4 + 8)
    num_tokens = recipe.sequences.max_context_tokens
    is_every_token = recipe.objective.supervise == "every_token" or recipe.objective.context_weight > 0
    num_targets = num_tokens if is_every_token else num_tokens / 2
    activations = kept_bytes(
        recipe, size.num_layers, size.hidden_size, size.vocabulary_size, num_tokens=num_tokens, num_logits=num_targets
    )
    return IMPORTS_BYTES + held + trained + activations


def kept_bytes(
    recipe: Recipe,
    num_layers: int,
    hidden_size: int,
    vocabulary_size: int,
    *,
    num_tokens: float,
    num_logits: float,
) -> float:
    """Estimate the memory of what the forward pass over a sequence keeps, and of its logits.

    Args:
        recipe: The run.
        num_layers: Layers of its model.
        hidden_size: Width of a layer.
        vocabulary_size: Number of tokens that the model knows.
        num_tokens: Tokens of the sequence.
        num_logits: Supervised positions that have logits at the same time.
    """
    # About 17 values of the hidden size per token and layer are kept without checkpointing (34 bytes in 16 bits:
    # Korthikanti et al. 2022, arXiv:2205.05198); with it one, and those of the layer at work. Nothing is kept of layers
    # below the lowest with an adapter.
    lora = recipe.model.lora
    num_layers = (lora.layers if lora else None) or num_layers
    num_kept = num_layers + 17 if recipe.training.gradient_checkpointing else 17 * num_layers
    bytes_per_value = 2 if recipe.training.bf16 or recipe.model.dtype == "bfloat16" else 4
    # Logits, their softmax and its gradient, in float32.
    logits = 3 * 4 * num_logits * vocabulary_size
    return num_kept * hidden_size * num_tokens * bytes_per_value + logits
