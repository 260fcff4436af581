"""Parts merged = the softmax over all keys at once, in each way a part can be made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manyicl.model.partial_attention import Part, attend_causally, attend_to_all, attend_where, merge

SCALE = 0.3


def states(heads: int, num_tokens: int, seed: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, heads, num_tokens, 8, generator=torch.Generator().manual_seed(seed))


def judge(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Attention with every score written out in float64, heads repeated; output and log of the denominator."""
    groups = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(groups, dim=1) for part in (key, value))
    scores = query.double() @ key.transpose(2, 3) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ value).float(), scores.logsumexp(-1).float()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize(("num_tokens", "num_keys"), [(3, 47), (31, 1), (1, 31)])
def test_attention_to_all_keys_and_its_denominator(
    num_tokens: int, num_keys: int, key_heads: int, softcap: float | None
) -> None:
    query, key, value = states(4, num_tokens, 0), states(key_heads, num_keys, 1), states(key_heads, num_keys, 2)
    part = attend_to_all(query, key, value, SCALE, softcap)
    output, lse = judge(query, key, value, torch.ones(num_tokens, num_keys, dtype=torch.bool), softcap)
    torch.testing.assert_close(part.output, output, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(part.lse, lse, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 5, 31, 40])
def test_causal_attention_behind_a_window(window: int | None, softcap: float | None) -> None:
    query, key, value = states(4, 31, 0), states(2, 31, 1), states(2, 31, 2)
    part = attend_causally(query, key, value, SCALE, softcap, window)
    place = torch.arange(31)
    visible = place <= place[:, None]
    if window is not None:
        visible &= place[:, None] - place < window
    output, lse = judge(query, key, value, visible, softcap)
    torch.testing.assert_close(part.output, output, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(part.lse, lse, rtol=1e-5, atol=2e-6)


def test_scores_made_a_few_tokens_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from manyicl.model import partial_attention

    query, key, value = states(4, 31, 0), states(2, 47, 1), states(2, 47, 2)
    visible = torch.rand(2, 31, 47, generator=torch.Generator().manual_seed(3)) < 0.5
    whole = attend_where(query, key, value, visible, SCALE)
    monkeypatch.setitem(partial_attention.EXPLICIT_SCORE_BYTES, "cpu", 4096)
    few = attend_where(query, key, value, visible, SCALE)
    torch.testing.assert_close(whole.output, few.output, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.lse, few.lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_parts_are_the_softmax_over_all_keys(dtype: torch.dtype) -> None:
    query, key, value = (states(heads, n, s).to(dtype) for heads, n, s in ((4, 5, 0), (2, 60, 1), (2, 60, 2)))
    cuts = [(0, 3), (3, 50), (50, 60)]
    merged = merge([attend_to_all(query, key[:, :, a:b], value[:, :, a:b], SCALE) for a, b in cuts])
    assert merged.dtype == dtype
    output, _ = judge(query, key, value, torch.ones(5, 60, dtype=torch.bool), None)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(merged.float(), output, rtol=tolerance, atol=tolerance)


def test_a_token_that_sees_nothing_of_a_part_takes_nothing_from_it() -> None:
    query, key, value = states(4, 2, 0), states(2, 6, 1), states(2, 6, 2)
    visible = torch.tensor([[True] * 6, [False] * 6]).expand(2, -1, -1)
    blind = attend_where(query, key, value, visible, SCALE)
    assert torch.equal(blind.output[:, :, 1], torch.zeros(2, 4, 8))
    assert bool((blind.lse[:, :, 1] == float("-inf")).all())
    seen: Part = attend_to_all(query, states(2, 3, 3), states(2, 3, 4), SCALE)
    torch.testing.assert_close(merge([blind, seen])[:, :, 1], seen.output[:, :, 1], rtol=1e-6, atol=1e-6)
