from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from manyicl.errors import UserError
from manyicl.training import dry_run as module
from manyicl.training import estimate
from manyicl.training.batch import Batch, first_tokens, sequence_tensors
from manyicl.training.dry_run import dry_run
from manyicl.training.estimate import measured_cost, sample_sequences
from manyicl.training.loss import sequence_loss
from manyicl.training.recipe import Recipe
from manyicl.training.start import starting_point
from manyicl.training.train import packed_sequences, prepare_run
from tests.builders import byte_level_bpe
from tests.training.recipes import small_recipe, small_tasks


def test_a_small_model_is_measured_and_nothing_is_written(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run")
    text = "\n".join(dry_run(recipe, small_tasks()))
    assert "2 to train on with 80 rows, 1 held out" in text
    assert "4 steps of 4 sequences of at most 60 tokens" in text
    assert "supervised answers" in text
    assert "stays unused" in text
    assert "Timing forward and backward passes for about 10 seconds" in text
    assert "measured: forward and backward over " in text
    assert " tokens in float32 on CPU, " in text
    assert not (tmp_path / "run").exists()


def test_a_large_new_model_is_estimated_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PARAMETERS_MEASURED", 1000)
    text = "\n".join(dry_run(small_recipe(tmp_path / "run"), small_tasks()))
    assert "estimated from the configuration: 40% of this machine's matrix rate" in text


def test_on_a_slow_machine_fewer_tokens_are_timed_and_scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def slow(recipe: Recipe, model: object, batch: Batch, device: object, most_logits: int | None) -> float:
        timed.append(batch["input_ids"].shape[1])
        assert sum(batch["segment_lengths"]) == timed[-1] == batch["packed"]["position_ids"].shape[1]
        assert all(batch["supervised_positions"] < timed[-1])
        return 0.15 * timed[-1]

    monkeypatch.setattr(estimate, "_forward_and_backward", slow)
    recipe = small_recipe(
        tmp_path / "run", "sequences.max_context_tokens=600", "sequences.examples_per_episode=[90,99]"
    )
    *_, last = dry_run(recipe, small_tasks())
    assert timed == [16, 32]
    assert "over 32 tokens in float32 on CPU" in last
    run = prepare_run(recipe, small_tasks())
    cost = measured_cost(recipe, run.start, run.sequences, run.statistics)
    # Sequences of so small a model cost a little more per token than their beginnings, for their attention.
    assert 1 < cost.hours * 3600 / (0.15 * run.statistics.tokens * recipe.num_sequences) < 2


def test_the_first_tokens_of_a_sequence_give_the_logits_that_they_have_in_it(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    run = prepare_run(recipe, small_tasks())
    whole = sequence_tensors(run.sequences[0], recipe.objective)
    first, *others = whole["segment_lengths"]
    assert others
    for length in (first - 1, first, first + 1):
        part = first_tokens(whole, length)
        assert part["segment_lengths"] == ((length,) if length <= first else (first, 1))
        kept = (whole["supervised_positions"] < length).float()
        weighted: Batch = {**whole, "weights": whole["weights"] * kept}
        losses = [sequence_loss(run.start.model.eval(), batch, 1.0).item() for batch in (part, weighted)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("override", "ratio", "advice"),
    [
        ("model.dtype=bfloat16", 50, "Matrix products in float32 are 50 times as fast"),
        ("training.bf16=true", 50, "Consider model.dtype: float32 without training.bf16"),
        ("model.dtype=float32", 1 / 50, "Matrix products in bfloat16 are 50 times as fast"),
        ("model.dtype=float32", 1 / 3, None),
        ("training.bf16=true", 3, None),
    ],
)
def test_a_type_that_is_much_faster_here_is_recommended(
    override: str, ratio: float, advice: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {torch.float32: 1e11 * ratio, torch.bfloat16: 1e11}
    monkeypatch.setattr(estimate, "matrix_rate", lambda dtype, device: rates[dtype])
    remark = estimate.remark_on_speed(small_recipe(tmp_path, override))
    assert advice in remark if advice and remark else advice is remark


def test_memory_is_measured_on_systems_without_the_module_resource(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert "GiB of memory (measured" in "\n".join(dry_run(small_recipe(tmp_path / "run"), small_tasks()))


def test_weights_that_are_updated_in_bfloat16_are_remarked(tmp_path: Path) -> None:
    lines = list(dry_run(small_recipe(tmp_path / "run", "model.dtype=bfloat16"), small_tasks()))
    assert any("updated in bfloat16, without float32 copies" in line for line in lines)


def test_what_the_rows_hold_is_counted(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, "objective.supervise=last_answer")
    tasks = small_tasks()
    sequences = packed_sequences(recipe, tasks.train, starting_point(recipe, tasks.train).tokenizer)
    statistics = sample_sequences(sequences, recipe.objective)
    assert statistics.num_sampled == recipe.num_sequences == 16
    assert statistics.answers == statistics.episodes == sum(len(sequence.episodes) for sequence in sequences) / 16
    assert statistics.tokens == sum(sequence.num_tokens for sequence in sequences) / 16
    assert statistics.unused_share == pytest.approx(1 - statistics.tokens / 60)
    assert statistics.most_shots <= 5


def test_a_model_of_the_hub_is_estimated_from_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=4, hidden_size=64, intermediate_size=128, vocab_size=500)
    monkeypatch.setattr(module, "_is_available", lambda name: True)
    monkeypatch.setattr(module, "load_tokenizer", lambda reference: byte_level_bpe())
    monkeypatch.setattr(estimate, "model_config", lambda reference: config)
    changes = ["model.from_scratch=null", "model.base=hf:owner/name", "sequences.max_context_tokens=300"]
    text = "\n".join(dry_run(small_recipe(tmp_path, *changes, "model.lora={rank: 4}"), small_tasks()))
    assert "estimated from the configuration: 40% of this machine's matrix rate" in text
    # Rank 4, in each of 4 layers: four square projections of 64 and three between 64 and 128.
    assert f"weights, {4 * 4 * (4 * 128 + 3 * 192):,} of them trained" in text
    assert "GiB of memory" in text
    names = "model.lora={rank: 3, target_modules: [q_proj, down_proj]}"
    text = "\n".join(dry_run(small_recipe(tmp_path, *changes, names), small_tasks()))
    assert f"weights, {3 * 4 * (128 + 192):,} of them trained" in text


def test_a_model_that_is_not_at_hand_says_what_cannot_be_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(reference: str) -> None:
        raise UserError("unavailable", f"The tokenizer {reference!r} cannot be loaded: gated.")

    monkeypatch.setattr(module, "load_tokenizer", refused)
    for reachable, reason in ((False, "the Hub cannot be reached"), (True, "could not be fetched")):
        monkeypatch.setattr(module, "_is_available", lambda name, reachable=reachable: reachable)
        changes = ["model.from_scratch=null", "model.base=hf:owner/name"]
        *_, last = dry_run(small_recipe(tmp_path, *changes), small_tasks())
        assert last.startswith("Tokens: at most 960. Answers, unused share, hours and memory cannot be known")
        assert reason in last
