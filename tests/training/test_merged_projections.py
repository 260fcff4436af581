"""Layers that share their input, computed together, against each by itself as peft does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from manyicl.model.attention import ATTENTION, packed_arguments
from manyicl.model.load import LoadedModel
from manyicl.training.checkpoint import RunInterrupted
from manyicl.training.job import ensure_trained
from manyicl.training.merged_projections import MergedLinear, SharedInput, merge_projections
from manyicl.training.recipe import LoraSettings
from manyicl.training.start import recompute_activations, starting_point, with_adapter
from tests.builders import byte_level_bpe, tiny_model
from tests.training.recipes import measuring, small_recipe, small_tasks

NUM_LAYERS = 2
ARCHITECTURES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"]


def network(architecture: str = "llama", seed: int = 0, **lora: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=50,
    )
    base = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    model = with_adapter(base, LoraSettings(**{"rank": 3, "alpha": 5, **lora}))
    for name, weights in model.named_parameters():
        if "lora_B" in name or "bias" in name:
            nn.init.normal_(weights, std=0.2)
    model.train()
    return model


def outputs_and_gradients(model: PreTrainedModel, *, bf16: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=torch.arange(31)[None], use_cache=False, **packed_arguments([20, 11])).logits
    (logits.float() * torch.randn(logits.shape)).sum().backward()
    gradients = {name: weights.grad for name, weights in model.named_parameters() if weights.grad is not None}
    return {"logits": logits.detach(), **gradients}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)


def merged_layers(model: nn.Module) -> list[MergedLinear]:
    return [part for part in model.modules() if isinstance(part, MergedLinear)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_logits_and_gradients_are_those_of_peft(
    architecture: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(architecture)
    if checkpointed:
        recompute_activations(model)
    expected = outputs_and_gradients(model)
    names = list(model.state_dict())
    assert merge_projections(model) == 7 * NUM_LAYERS
    sizes: list[int] = []
    compute = SharedInput._compute

    def counted(shared: SharedInput, x: Tensor) -> Any:
        sizes.append(len(shared._parts))
        return compute(shared, x)

    monkeypatch.setattr(SharedInput, "_compute", counted)
    found = outputs_and_gradients(model)
    assert largest_difference(found, expected) < 1e-5
    assert len(found) == 1 + 14 * NUM_LAYERS
    # Once for q, k, v, once for o, once for gate and up, once for down: and again where activations are recomputed.
    assert sizes[:4] == [3, 1, 2, 1]
    assert len(sizes) == 4 * NUM_LAYERS * (2 if checkpointed else 1)
    assert list(model.state_dict()) == names
    assert not any(part.shared[0]._outputs for part in merged_layers(model))


@pytest.mark.parametrize("settings", [{"layers": 1}, {"target_modules": ("q_proj", "v_proj", "up_proj")}])
def test_layers_without_an_adapter_are_left_alone(settings: dict[str, Any]) -> None:
    model = network(**settings)
    expected = outputs_and_gradients(model)
    assert merge_projections(model) == (7 if "layers" in settings else 3 * NUM_LAYERS)
    assert largest_difference(outputs_and_gradients(model), expected) < 1e-5


def test_under_autocast_the_difference_is_that_of_rounding() -> None:
    errors = {"peft": 0.0, "together": 0.0}
    for seed in range(4):
        model = network(seed=seed)
        exact = outputs_and_gradients(model)
        for name in errors:
            if name == "together":
                merge_projections(model)
            found = outputs_and_gradients(model, bf16=True)
            assert found.pop("logits").dtype == torch.bfloat16
            assert all(gradient.dtype == torch.float32 for gradient in found.values())
            squares = [float((found[key] - exact[key]).square().sum()) for key in found]
            errors[name] += sum(squares) ** 0.5 / sum(float(exact[key].square().sum()) for key in found) ** 0.5
    assert errors["together"] < 1.5 * errors["peft"] < 4 * 0.1


def test_what_is_not_the_same_tensor_any_more_is_computed_anew() -> None:
    model = network()
    merge_projections(model)
    attention: Any = next(part for name, part in model.named_modules() if name.endswith("layers.0.self_attn"))
    x = torch.randn(1, 5, 32)
    plain = {name: LoraLinear.forward(getattr(attention, name), x) for name in ("q_proj", "k_proj", "v_proj")}
    torch.testing.assert_close(attention.k_proj(x), plain["k_proj"])
    torch.testing.assert_close(attention.k_proj(x), plain["k_proj"])
    torch.testing.assert_close(attention.q_proj(x), plain["q_proj"])
    x.mul_(2)
    torch.testing.assert_close(attention.v_proj(x), LoraLinear.forward(attention.v_proj, x))
    other = x.clone()
    torch.testing.assert_close(attention.q_proj(other), LoraLinear.forward(attention.q_proj, other))


def test_layers_that_drop_inputs_or_are_not_plain_stay_with_peft() -> None:
    assert merge_projections(network(dropout=0.1)) == 0
    model = network()
    for part in model.modules():
        if isinstance(part, LoraLinear):
            part.base_layer.weight.requires_grad_(True)
    assert merge_projections(model) == 0


def test_without_gradients_or_with_the_adapter_off_peft_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    merge_projections(model)

    def fails(self: SharedInput, x: Tensor) -> Any:
        raise AssertionError("computed together")

    monkeypatch.setattr(SharedInput, "_compute", fails)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        adapted = model(input_ids=ids, use_cache=False).logits
    with cast(Any, model).disable_adapter():
        base = model(input_ids=ids, use_cache=False).logits
    assert (adapted - base).norm() > 0.1 * base.norm()
    # Weights of a base in 16 bits below an adapter in 32.
    for name, weights in model.named_parameters():
        weights.data = weights.data.to(torch.float32 if "lora_" in name else torch.bfloat16)
    assert model(input_ids=ids, use_cache=False).logits.dtype == torch.bfloat16


@pytest.fixture(name="settings")
def _settings(tmp_path: Path) -> list[str]:
    tokenizer, base = byte_level_bpe(), tmp_path / "base"
    tiny_model(vocabulary_size=len(tokenizer)).save_pretrained(str(base))
    tokenizer.save_pretrained(str(base))
    return [
        "model.from_scratch=null",
        f"model.base={base}",
        "model.lora={rank: 2}",
        "sequences.max_context_tokens=100",
    ]


def adapter_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_a_run_computes_together_and_saves_what_peft_saves(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert merged_layers(starting_point(small_recipe(tmp_path / "any", *settings), small_tasks().train).model)
    trained, configs = {}, []
    for name in ("together", "apart"):
        if name == "apart":
            monkeypatch.setattr("manyicl.training.start.merge_projections", lambda model: 0)
        ensure_trained(small_recipe(tmp_path / name, *settings, "training.evaluate_every=null"), small_tasks())
        trained[name] = adapter_in(tmp_path / name)
        configs.append(json.loads((tmp_path / name / "adapter_config.json").read_text(encoding="utf-8")))
        configs[-1]["target_modules"].sort()
    assert configs[0] == configs[1]
    assert largest_difference(trained["together"], trained["apart"]) < 1e-2


def test_a_run_that_resumes_ends_with_the_weights_of_an_unbroken_one(settings: list[str], tmp_path: Path) -> None:
    num_evaluations = 0

    def interrupts(loaded: LoadedModel) -> dict[str, float]:
        nonlocal num_evaluations
        num_evaluations += 1
        if num_evaluations == 2:
            raise KeyboardInterrupt
        return {"score": 0.5}

    changes = [*settings, "training.evaluate_every=2"]
    broken = small_recipe(tmp_path / "broken", *changes)
    with pytest.raises(RunInterrupted):
        ensure_trained(broken, small_tasks(), measuring(interrupts))
    assert ensure_trained(broken, small_tasks(), measuring(interrupts)).finished
    ensure_trained(
        small_recipe(tmp_path / "unbroken", *changes), small_tasks(), measuring(lambda loaded: {"score": 0.5})
    )
    found, expected = adapter_in(tmp_path / "broken"), adapter_in(tmp_path / "unbroken")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
