"""Packed = alone, in values and gradients; and the same as transformers' own attention on one segment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from manyicl.errors import UserError
from manyicl.model.attention import ATTENTION, isolated_attention, packed_arguments, visible_keys
from manyicl.model.isolation import attention_error, continuation_error, leakage_error, packing_error, require_isolation
from manyicl.model.load import load_model
from tests.builders import ARCHITECTURES, byte_level_bpe, tiny_model
from tests.model.exports import save_adapter, save_model

# peft 0.21 asks transformers 5.23 for a property by its deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTHS = (3, 47, 31)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_segment_scores_as_with_the_eager_attention_of_transformers(architecture: str) -> None:
    ids = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(1))
    ours = tiny_model(architecture)(input_ids=ids, use_cache=False).logits
    theirs = tiny_model(architecture, attention="eager")(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_segments_equal_each_alone_in_values_and_gradients(architecture: str) -> None:
    generator = torch.Generator().manual_seed(1)
    segments = [torch.randint(97, (1, length), generator=generator) for length in LENGTHS]
    model = tiny_model(architecture)

    packed = model(input_ids=torch.cat(segments, 1), use_cache=False, **packed_arguments(LENGTHS)).logits
    packed.float().log_softmax(-1)[..., 5].sum().backward()
    packed_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = [model(input_ids=ids, use_cache=False).logits for ids in segments]
    sum(part.float().log_softmax(-1)[..., 5].sum() for part in alone).backward()

    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-5, atol=3e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max()) + 1e-6
            torch.testing.assert_close(packed_gradients[name], parameter.grad, rtol=1e-4, atol=3e-6 * scale + 1e-6)


def test_gradient_checkpointing_keeps_segments_apart() -> None:
    model = tiny_model().train()
    ids = torch.randint(97, (1, sum(LENGTHS)))
    plain = model(input_ids=ids, use_cache=False, **packed_arguments(LENGTHS)).logits
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    checkpointed = model(input_ids=ids, use_cache=False, **packed_arguments(LENGTHS)).logits
    torch.testing.assert_close(plain, checkpointed, rtol=0, atol=0)
    checkpointed.sum().backward()


def test_a_window_counts_the_token_itself() -> None:
    assert visible_keys(2, 5, window=2).tolist() == [
        [False, False, True, True, False],
        [False, False, False, True, True],
    ]
    assert visible_keys(2, 4, window=None).tolist() == [[True, True, True, False], [True, True, True, True]]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen2"])
def test_models_that_isolate_pass_the_comparison(architecture: str) -> None:
    model = tiny_model(architecture)
    assert packing_error(model) < 1e-4
    assert leakage_error(model) == 0
    require_isolation(model)


def test_a_model_that_mixes_segments_is_refused_with_the_reason() -> None:
    model = tiny_model("bloom", n_layer=2, n_head=4)
    with pytest.raises(UserError, match="mixes the episodes"):
        require_isolation(model)


def test_a_model_with_recurrent_layers_is_refused_by_name() -> None:
    model = tiny_model("mamba", attention="eager", state_size=4)
    with pytest.raises(UserError, match="'linear_attention'"):
        require_isolation(model)


def test_a_model_with_chunked_layers_is_refused_by_name() -> None:
    model = tiny_model("llama")
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(UserError, match="'chunked_attention'"):
        require_isolation(model)


def test_a_model_whose_own_attention_scores_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from manyicl.model import isolation

    monkeypatch.setattr(isolation, "attention_error", lambda model: 1.9)
    with pytest.raises(UserError, match=r"found 1\.9 standard deviations"):
        require_isolation(tiny_model())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_comparison_with_the_librarys_own_attention_passes_and_leaves_ours_in_place(architecture: str) -> None:
    model = tiny_model(architecture)
    assert attention_error(model) < 1e-4
    assert continuation_error(model) < 1e-4
    assert model.config._attn_implementation == ATTENTION


def test_terms_that_are_not_known_are_refused_rather_than_left_out() -> None:
    from manyicl.model.attention import isolated_attention

    states = torch.zeros(1, 4, 3, 8)
    with pytest.raises(UserError, match="s_aux"):
        isolated_attention(torch.nn.Identity(), states, states, states, None, s_aux=torch.zeros(4))


def test_a_mask_is_refused_rather_than_ignored() -> None:
    model = tiny_model()
    layer = model.get_submodule("model.layers.0.self_attn")
    from manyicl.model.attention import isolated_attention

    states = torch.zeros(1, 4, 3, 8)
    with pytest.raises(UserError, match="attention_mask"):
        isolated_attention(layer, states, states, states, torch.ones(1, 1, 3, 3))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_in_half_precision_is_not_mistaken_for_another_attention(dtype: str) -> None:
    load_model("builtin:nano", dtype=dtype, device="cpu")


def test_a_model_that_mixes_segments_is_refused_in_half_precision() -> None:
    model = tiny_model("bloom", n_layer=2, n_head=4)
    with pytest.raises(UserError, match="mixes the episodes"):
        require_isolation(model.bfloat16())


def test_logits_that_are_no_numbers_are_not_called_mixed(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][3] = 0
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    save_adapter(tmp_path / "plain", base)
    load_model(tmp_path / "plain", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(use_dora=True, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "dora"))
    byte_level_bpe().save_pretrained(tmp_path / "dora")
    with pytest.raises(UserError, match="DoRA divides by zero") as refused:
        load_model(tmp_path / "dora", device="cpu")
    assert refused.value.code == "logits_not_finite"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_layers_do_not_pass_the_prefix_on_is_refused(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model = tiny_model()
    torch.nn.Module.to(model, dtype)
    attention = model.get_submodule("model.layers.1.self_attn")
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *a, continuation=None, **k: forward(*a, **k))
    assert continuation_error(model) > 1e-2
    with pytest.raises(UserError, match="scores otherwise after a cached prefix"):
        require_isolation(model)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_positions_that_depend_on_the_longest_text_of_a_pass_are_refused(kind: str) -> None:
    model = tiny_model("phi3")
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": kind}
    with pytest.raises(UserError, match=kind):
        require_isolation(model)


def test_a_window_that_does_not_reach_the_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mistral", sliding_window=40)
    require_isolation(model)
    from manyicl.model import isolation

    monkeypatch.setattr(isolation, "_windows_seen", lambda model: False)
    with pytest.raises(UserError, match="sliding window that does not reach"):
        require_isolation(model)
    require_isolation(tiny_model("llama"))


def test_segments_with_keys_before_them_are_refused() -> None:
    module = torch.nn.Module()
    query, key = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 6, 8)
    ends = torch.tensor([0, 2, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="divides 4 tokens, but there are 6 keys"):
        isolated_attention(module, query, key, key, None, cu_seq_lens_q=ends)
    isolated_attention(module, query, key, key, None)
