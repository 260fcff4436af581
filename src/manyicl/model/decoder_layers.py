"""Where the layers of a decoder are in a model."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import nn


class DecoderLayers(NamedTuple):
    """The layers of a decoder.

    Attributes:
        path: Their path in the model, such as ``model.layers``.
        layers: The layers themselves, the lowest first.
    """

    path: str
    layers: nn.ModuleList


def decoder_layers(model: nn.Module) -> DecoderLayers | None:
    """Find the layers of a causal language model, with or without an adapter, by their number.

    Architectures keep them in a list, under various names; a list in a layer, such as experts, comes after that.

    Returns:
        None where there is no list of so many.
    """
    num_layers = cast(Any, model).config.get_text_config().num_hidden_layers
    for path, part in model.named_modules():
        if isinstance(part, nn.ModuleList) and len(part) == num_layers:
            return DecoderLayers(path, part)
    return None
