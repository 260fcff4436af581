"""Adapters on the uppermost layers only: nothing is kept of the layers below, and nothing computed backward."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from manyicl.errors import UserError
from manyicl.model.attention import packed_arguments
from manyicl.model.decoder_layers import decoder_layers
from manyicl.model.load import load_model
from manyicl.training.job import ensure_trained
from manyicl.training.recipe import LoraSettings
from manyicl.training.start import recompute_activations, with_adapter
from tests.builders import byte_level_bpe, tiny_model
from tests.training.recipes import small_recipe, small_tasks

NUM_LAYERS = 4
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_head": 2, "n_layer": NUM_LAYERS, "bos_token_id": None, "eos_token_id": None},
    "gpt_neox": {"eos_token_id": None, "bos_token_id": None},
}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": NUM_LAYERS}


def network(architecture: str) -> PreTrainedModel:
    shape = {"vocab_size": 50, **SHAPE, **SHAPES.get(architecture, {})}
    if architecture == "gpt2":
        shape = {"vocab_size": 50, **SHAPES["gpt2"]}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape))
    model.train()
    return model


def adapted(model: nn.Module) -> set[str]:
    return {name for name, weights in model.named_parameters() if weights.requires_grad}


def layers_of(model: nn.Module) -> list[nn.Module]:
    found = decoder_layers(model)
    assert found is not None
    return list(found.layers)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning")  # peft notices that GPT-2 holds its weights transposed
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma", "gemma2", "gpt2", "gpt_neox"])
def test_the_uppermost_layers_alone_get_what_all_layers_would(architecture: str) -> None:
    everywhere = with_adapter(network(architecture), LoraSettings(rank=2))
    upper = with_adapter(network(architecture), LoraSettings(rank=2, layers=3))
    path = cast(Any, decoder_layers(upper)).path
    assert adapted(upper) == {name for name in adapted(everywhere) if not name.startswith(f"{path}.0.")}
    assert 0 < len(adapted(upper)) == len(adapted(everywhere)) * 3 / 4


class Kept:
    """A tensor that a layer keeps for the backward pass."""

    def __init__(self, number: int, tensor: Tensor) -> None:
        self.number, self.tensor = number, tensor


@pytest.mark.parametrize("checkpointed", [False, True])
def test_layers_below_keep_nothing_for_a_backward_pass(checkpointed: bool) -> None:
    model = with_adapter(network("llama"), LoraSettings(rank=2, layers=1))
    if checkpointed:
        recompute_activations(model)
    kept: WeakSet[Kept] = WeakSet()
    number, needs_gradient = -1, []

    def enter(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal number
        number = layers_of(model).index(layer)
        needs_gradient.append(inputs[0].requires_grad)

    def keep(tensor: Tensor) -> Kept:
        kept.add(held := Kept(number, tensor))
        return held

    for layer in layers_of(model):
        layer.register_forward_pre_hook(enter)
    arguments = packed_arguments([7, 4])
    with saved_tensors_hooks(keep, lambda held: held.tensor):
        logits = model(input_ids=torch.arange(11)[None], use_cache=False, **arguments).logits
    assert needs_gradient == [False] * NUM_LAYERS
    assert {held.number for held in kept} == {NUM_LAYERS - 1}
    logits.sum().backward()
    assert all(weights.grad is not None for weights in model.parameters() if weights.requires_grad)


def test_more_layers_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match="fewer layers than are to get an update; expected at most 4, found 5") as info:
        with_adapter(network("llama"), LoraSettings(layers=5))
    assert (info.value.code, info.value.field) == ("too_few_layers", "model.lora.layers")


def test_the_head_is_above_all_layers() -> None:
    names = adapted(
        with_adapter(network("llama"), LoraSettings(rank=2, layers=1, target_modules=("q_proj", "lm_head")))
    )
    assert {name.split(".")[2 if "lm_head" in name else 4] for name in names} == {"lm_head", "3"}
    assert len(names) == 4


def test_each_name_of_layers_must_match_one_that_is_there() -> None:
    for names, layers in itertools.product((("attn",), ("q_proj", "attn")), (None, 1)):
        with pytest.raises(UserError, match=r"\['attn'\] match no layer; expected names of linear layers, \['down"):
            with_adapter(tiny_model(), LoraSettings(target_modules=names, layers=layers))
    assert adapted(with_adapter(tiny_model(), LoraSettings(target_modules=("q_proj", "lm_head"))))


def test_a_trained_adapter_of_the_uppermost_layer_loads_over_its_base(tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    base, output = tmp_path / "base", tmp_path / "run"
    tiny_model(vocabulary_size=len(tokenizer)).save_pretrained(str(base))
    tokenizer.save_pretrained(str(base))
    settings = ["model.from_scratch=null", f"model.base={base}", "model.lora={rank: 2, layers: 1}"]
    recipe = small_recipe(output, *settings, "sequences.max_context_tokens=100", "training.evaluate_every=null")
    ensure_trained(recipe, small_tasks())
    config = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    num_layers = len(layers_of(load_model(base).model))
    assert config["layers_to_transform"] == [num_layers - 1]
    loaded = load_model(output).model
    trained = {name: weights for name, weights in loaded.named_parameters() if "lora_B" in name}
    assert trained
    for name, weights in trained.items():
        assert f".layers.{num_layers - 1}." in name
        assert weights.any()
