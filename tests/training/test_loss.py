"""Logits in chunks: the same loss and gradients, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from manyicl.model.attention import ATTENTION
from manyicl.training import loss as module
from manyicl.training.batch import Batch, sequence_tensors
from manyicl.training.loss import caps_or_scales_logits, head_is_separable, most_logits_at_once, sequence_loss
from manyicl.training.recipe import LoraSettings, ObjectiveSettings
from manyicl.training.start import recompute_activations, with_adapter
from manyicl.training.train import prepare_run
from tests.training.recipes import small_recipe, small_tasks
from tests.training.test_throughput import trainer_for

VOCABULARY = 300


def network(architecture: str = "llama", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        architecture, **{**shape, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": VOCABULARY, **changes}
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    model.train()
    return model


@pytest.fixture(name="batch")
def _batch(tmp_path: Path) -> Batch:
    recipe = small_recipe(tmp_path)
    batch = sequence_tensors(
        prepare_run(recipe, small_tasks()).sequences[0], ObjectiveSettings(supervise="every_token")
    )
    assert len(batch["targets"]) > 47
    return batch


def loss_and_gradients(model: PreTrainedModel, batch: Batch, most_logits: int | None) -> list[Tensor]:
    model.zero_grad()
    loss = sequence_loss(model, batch, 7.0, most_logits)
    loss.backward()
    return [loss.detach(), *(weights.grad for weights in model.parameters() if weights.grad is not None)]


@pytest.mark.parametrize("kind", ["untied", "tied", "adapter", "adapter on the head", "checkpointed", "gemma"])
@pytest.mark.parametrize("most_logits", [1, 7, 47])
def test_chunks_give_the_loss_and_the_gradients_of_all_logits_at_once(
    kind: str, most_logits: int, batch: Batch
) -> None:
    model = network("gemma" if kind == "gemma" else "llama", tie_word_embeddings=kind == "tied")
    if "adapter" in kind:
        names = ("q_proj", "lm_head") if "head" in kind else "all-linear"
        model = with_adapter(model, LoraSettings(rank=4, dropout=0.0, target_modules=cast(Any, names)))
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weights)
    if kind == "checkpointed":
        recompute_activations(model)
    assert head_is_separable(model, batch)
    expected = loss_and_gradients(model, batch, None)
    found = loss_and_gradients(model, batch, most_logits)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("gemma2", {}), ("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.0625})],
)
def test_a_head_that_caps_or_scales_is_not_called_by_itself(
    architecture: str, changes: dict[str, Any], batch: Batch
) -> None:
    if architecture == "cohere":
        changes = {**changes, "pad_token_id": 0}
    assert not head_is_separable(network(architecture, **changes), batch)


def test_logits_that_are_all_zero_tell_nothing(batch: Batch) -> None:
    model = network()
    torch.nn.init.zeros_(cast(Any, model.get_output_embeddings()).weight)
    assert not head_is_separable(model, batch)


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest result of an operation holds."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel())
        return result


def test_no_tensor_grows_with_vocabulary_times_positions(batch: Batch) -> None:
    model = network(vocab_size=5000)
    sizes = []
    for most_logits in (None, 4):
        with LargestTensor() as largest:
            loss_and_gradients(model, batch, most_logits)
        sizes.append(largest.size)
    assert sizes[0] == 5000 * len(batch["targets"])
    # The weights of embeddings and head, and their gradients.
    assert sizes[1] == 5000 * 32


def test_the_bound_is_on_the_memory_of_logits() -> None:
    assert most_logits_at_once(131_072) == 1024
    assert most_logits_at_once(10**12) == 1


def test_a_run_says_whether_logits_are_made_in_chunks_and_trains_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer_for(tmp_path / "plain", "model.from_scratch.config.attention_dropout=0")
    assert plain.chunk_logits() is None
    plain.train_until_stopped()
    monkeypatch.setattr(module, "BYTES_OF_LOGITS", 4 * 200 * 3)
    chunked = trainer_for(tmp_path / "chunked", "model.from_scratch.config.attention_dropout=0")
    sentence = chunked.chunk_logits()
    assert sentence is not None
    assert sentence.startswith("Logits are made for at most ")
    assert 0 < cast(int, chunked.most_logits) < 20
    chunked.train_until_stopped()
    losses = [[line["loss"] for line in run.state.log_history if "loss" in line] for run in (plain, chunked)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    monkeypatch.setattr("manyicl.training.trainer.head_is_separable", lambda model, batch: False)
    capped = trainer_for(tmp_path / "capped")
    assert capped.chunk_logits() == (
        "Logits are made for all supervised positions of a sequence at once, because the model caps or scales them."
    )
    assert capped.most_logits is None


def test_the_head_is_compared_on_tokens_that_are_not_supervised_too(batch: Batch) -> None:
    """A sequence may begin with a query that is longer than what is compared."""
    late = batch["supervised_positions"] >= batch["input_ids"].shape[1]
    assert not late.any()
    nothing: Any = {name: batch[name][late] for name in ("supervised_positions", "targets", "weights")}
    assert head_is_separable(network(), cast(Batch, {**batch, **nothing}))
    assert not head_is_separable(
        network("cohere", logit_scale=0.0625, pad_token_id=0), cast(Batch, {**batch, **nothing})
    )


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("granite", {"logits_scaling": 1.0}),
    ],
)
def test_models_without_caps_and_scales_are_known_by_their_configuration(
    architecture: str, changes: dict[str, Any]
) -> None:
    assert not caps_or_scales_logits(AutoConfig.for_model(architecture, **changes))


def test_a_scale_under_an_unknown_name_shows_in_the_comparison(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAPS_AND_SCALES", {})
    assert not head_is_separable(network("granite", logits_scaling=8.0), batch)
    assert head_is_separable(network("granite", logits_scaling=1.0), batch)
