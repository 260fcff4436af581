"""Kernels of other libraries, with stand-ins that do on a CPU what the libraries document."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, modeling_flash_attention_utils

from manyicl.errors import UserError
from manyicl.model import attention
from manyicl.model.attention import VARIABLE_LENGTH_ATTENTION, packed_arguments
from manyicl.model.kernels import use_flash_attention, use_liger_kernels
from manyicl.model.load import load_model, load_quantized
from tests.builders import ARCHITECTURES, byte_level_bpe, tiny_model

LENGTHS = (3, 47, 31)


def slow_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """flash_attn_varlen_func as its documentation says: (T, heads, size), one query after the other."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q == max_seqlen_k
    assert int(cu_seqlens_q[-1]) == len(q) == len(k) == len(v)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = window_size
    groups = q.shape[1] // k.shape[1]
    rows = []
    for begin, end in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False):
        for i in range(begin, end):
            first = begin if left < 0 else max(begin, i - left)
            last = i if causal else (end - 1 if right < 0 else min(end - 1, i + right))
            heads = []
            for head in range(q.shape[1]):
                keys, values = k[first : last + 1, head // groups], v[first : last + 1, head // groups]
                scores = keys @ q[i, head] * scale
                if softcap > 0:
                    scores = torch.tanh(scores / softcap) * softcap
                heads.append(scores.softmax(0) @ values)
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def install(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor], *, any_dtype: bool = True) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    # What transformers finds in flash-attn, and that it looks for it anew.
    functions = (None, kernel, None, None, None)
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", lambda *arguments, **options: functions)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    if any_dtype:
        # So that the stand-in is compared to the last digit.
        monkeypatch.setattr(attention, "KERNEL_DTYPES", (torch.float32,))


def in_bfloat16() -> PreTrainedModel:
    model = tiny_model()
    torch.nn.Module.to(model, torch.bfloat16)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_row_in_one_call_equals_its_segments_one_by_one_in_values_and_gradients(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, slow_kernel)
    ids = torch.randint(97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    found = {}
    for name in ("split", "flash"):
        model = tiny_model(architecture)
        if name == "flash":
            use_flash_attention(model)
        logits = model(input_ids=ids, use_cache=False, **packed_arguments(LENGTHS)).logits
        logits.float().log_softmax(-1)[..., 5].sum().backward()
        found[name] = logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found["flash"][0], found["split"][0], rtol=1e-5, atol=3e-5)
    for name, gradient in found["split"][1].items():
        scale = float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(found["flash"][1][name], gradient, rtol=1e-4, atol=3e-6 * scale + 1e-6)


def slow_torch_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    longest_q: int,
    longest_k: int,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, None]:
    """torch's FlashAttention operator, by the stand-in above."""
    dropout, causal, returns_mask = rest
    assert not dropout
    assert not returns_mask
    left, right = options["window_size_left"], options["window_size_right"]
    attended = slow_kernel(
        q,
        k,
        v,
        cu_seqlens_q=ends_q,
        cu_seqlens_k=ends_k,
        max_seqlen_q=longest_q,
        max_seqlen_k=longest_k,
        softmax_scale=options["scale"],
        causal=causal,
        window_size=(-1 if left is None else left, -1 if right is None else right),
    )
    return attended, None


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_torchs_own_kernel_takes_a_packed_sequence_in_one_call(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    found = {}
    for name in ("split", "kernel"):
        if name == "kernel":
            monkeypatch.setattr(attention, "_has_variable_length_kernel", lambda states, softcap: softcap is None)
            monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", slow_torch_kernel)
        model = tiny_model(architecture)
        logits = model(input_ids=ids, use_cache=False, **packed_arguments(LENGTHS)).logits
        logits.float().log_softmax(-1)[..., 5].sum().backward()
        found[name] = logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found["kernel"][0], found["split"][0], rtol=1e-5, atol=3e-5)
    for name, gradient in found["split"][1].items():
        scale = float(gradient.abs().max()) + 1e-6
        torch.testing.assert_close(found["kernel"][1][name], gradient, rtol=1e-4, atol=3e-6 * scale + 1e-6)


def test_no_layer_asks_the_device_how_long_the_segments_are(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Tensor, Tensor, int, int]] = []
    asked: list[str] = []

    def records(q: Tensor, k: Tensor, v: Tensor, *metadata: Any, **options: Any) -> tuple[Tensor, None]:
        calls.append(metadata[:4])
        return torch.zeros_like(q), None

    model = tiny_model()
    ids = torch.randint(97, (1, sum(LENGTHS)))
    packed = packed_arguments(LENGTHS)
    monkeypatch.setattr(attention, "_has_variable_length_kernel", lambda states, softcap: True)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", records)
    for name in ("item", "tolist", "cpu", "__bool__", "__int__"):
        method = getattr(Tensor, name)

        def noted(*arguments: Any, name: str = name, method: Any = method, **options: Any) -> Any:
            asked.append(name)
            return method(*arguments, **options)

        monkeypatch.setattr(Tensor, name, noted)
    model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor([3]), **packed)
    assert len(calls) == model.config.num_hidden_layers
    assert {(id(q), id(k), longest_q, longest_k) for q, k, longest_q, longest_k in calls} == {
        (id(packed["cu_seq_lens_q"]), id(packed["cu_seq_lens_q"]), 47, 47)
    }
    assert asked == []


def test_a_kernel_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    @wraps(slow_kernel)
    def sees_what_follows(*parts: Tensor, **options: Any) -> Tensor:
        return slow_kernel(*parts, **{**options, "causal": False})

    @wraps(slow_kernel)
    def mixes(*parts: Tensor, **options: Any) -> Tensor:
        whole = options["cu_seqlens_q"][[0, -1]]
        length = int(whole[-1])
        changes = {"cu_seqlens_q": whole, "cu_seqlens_k": whole, "max_seqlen_q": length, "max_seqlen_k": length}
        return slow_kernel(*parts, **{**options, **changes})

    install(monkeypatch, sees_what_follows)
    with pytest.raises(UserError, match="scores otherwise with the kernels of flash-attn than without"):
        use_flash_attention(tiny_model())

    @wraps(slow_kernel)
    def stumbles(*parts: Tensor, **options: Any) -> Tensor:
        raise RuntimeError("head dimension must be a multiple of 8\nat line 5")

    @wraps(slow_kernel)
    def runs_out(*parts: Tensor, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    install(monkeypatch, stumbles)
    with pytest.raises(UserError, match=r"a multiple of 8\. Use model\.attention: split"):
        use_flash_attention(tiny_model())
    install(monkeypatch, runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        use_flash_attention(tiny_model())
    install(monkeypatch, mixes)
    with pytest.raises(UserError, match="mixes the episodes of a packed sequence"):
        use_flash_attention(tiny_model())


def test_flash_attention_is_handed_16_bits_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, slow_kernel, any_dtype=False)
    with pytest.raises(UserError, match=r"found float32\. Use model\.dtype: bfloat16"):
        use_flash_attention(tiny_model())
    model = in_bfloat16()
    use_flash_attention(model)
    assert model.config._attn_implementation == VARIABLE_LENGTH_ATTENTION


def test_a_missing_flash_attn_is_never_replaced_in_silence() -> None:
    with pytest.raises(UserError, match="The library flash_attn cannot be imported"):
        use_flash_attention(in_bfloat16())


def test_a_saved_model_does_not_name_the_kernels_it_was_trained_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, slow_kernel)
    model = tiny_model()
    use_flash_attention(model)
    model.save_pretrained(tmp_path)
    assert "manyicl" not in (tmp_path / "config.json").read_text(encoding="utf-8")


def install_liger(monkeypatch: pytest.MonkeyPatch, apply: Callable[..., None]) -> None:
    for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["liger_kernel.transformers"]._apply_liger_kernel_to_instance = apply  # type: ignore[attr-defined]
    patches = sys.modules["liger_kernel.transformers.monkey_patch"]
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply, "qwen3": apply}  # type: ignore[attr-defined]


def test_liger_gets_the_layers_and_never_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    install_liger(monkeypatch, lambda **options: calls.append(options))
    model = tiny_model()
    use_liger_kernels(model)
    (options,) = calls
    assert options.pop("model") is model
    assert {name for name, wanted in options.items() if wanted} == {"rope", "rms_norm", "swiglu", "geglu"}
    assert {name for name, wanted in options.items() if not wanted} == {"cross_entropy", "fused_linear_cross_entropy"}


def test_liger_without_kernels_for_an_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install_liger(monkeypatch, lambda **options: None)
    with pytest.raises(UserError, match="expected one of llama, qwen3, found mistral"):
        use_liger_kernels(tiny_model("mistral"))


def test_a_liger_kernel_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(model: LlamaForCausalLM, **options: bool) -> None:
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight *= 2

    def lacks(**options: object) -> None:
        raise NotImplementedError("no rope")

    install_liger(monkeypatch, breaks)
    with pytest.raises(UserError, match="scores otherwise with the kernels of liger-kernel"):
        use_liger_kernels(tiny_model())
    install_liger(monkeypatch, lacks)
    with pytest.raises(UserError, match=r"does not run with this model: no rope\. Remove training\.liger"):
        use_liger_kernels(tiny_model())


def test_a_base_in_4_bits_is_asked_for_as_qlora_describes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tokenizer = byte_level_bpe()
    tiny_model(vocabulary_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked: dict[str, Any] = {}
    plain = load_model(str(tmp_path), dtype="bfloat16").model

    def from_pretrained(path: str, **options: Any) -> tuple[object, dict[str, list[str]]]:
        asked.update(options)
        return plain, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    monkeypatch.setattr("transformers.BitsAndBytesConfig", lambda **options: options)
    monkeypatch.setattr("manyicl.model.load.AutoModelForCausalLM.from_pretrained", from_pretrained)
    load_quantized(str(tmp_path), "bfloat16", "cpu")
    assert asked["quantization_config"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    assert asked["device_map"] == {"": torch.device("cpu")}
    assert asked["dtype"] is torch.bfloat16
