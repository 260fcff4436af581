from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from manyicl.model.attention import packed_arguments
from manyicl.model.decoder_layers import decoder_layers
from manyicl.training import throughput
from manyicl.training.batch import Batch, sequence_tensors
from manyicl.training.counts import SequenceCounts
from manyicl.training.job import ensure_trained
from manyicl.training.loss import sequence_loss
from manyicl.training.recipe import LoraSettings
from manyicl.training.run_folder import RunFolder
from manyicl.training.start import recompute_activations, starting_point, with_adapter
from manyicl.training.throughput import Throughput, TrainingFlops, matrix_rate, throughput_text
from manyicl.training.train import packed_sequences, training_arguments
from manyicl.training.trainer import ManyShotTrainer
from tests.training.recipes import small_recipe, small_tasks

NUM_TOKENS, NUM_TARGETS, NUM_LAYERS = 47, 7, 3


def small_network(
    *, adapter: bool = False, tied: bool = False, layers: int | None = None, names: tuple[str, ...] | None = None
) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        tie_word_embeddings=tied,
    )
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if adapter:
        model = with_adapter(model, LoraSettings(rank=4, layers=layers, target_modules=names or "all-linear"))
    # As the formula counts: gradients reach the input of the lowest layer with a trained weight.
    found = decoder_layers(model)
    assert found is not None
    found.layers[NUM_LAYERS - (layers or NUM_LAYERS)].register_forward_pre_hook(needs_gradient)
    return cast(PreTrainedModel, model.train())


def needs_gradient(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    inputs[0].requires_grad_(True)


def counted_flops(model: PreTrainedModel) -> int:
    """What torch counts in one forward and backward pass; its eager attention multiplies masked pairs as well."""
    with FlopCounterMode(display=False) as counter:
        logits = model(
            input_ids=torch.randint(300, (1, NUM_TOKENS)),
            logits_to_keep=torch.arange(NUM_TARGETS),
            use_cache=False,
        ).logits
        logits.sum().backward()
    return int(counter.get_total_flops())


def masked_flops(formula: TrainingFlops, num_layers: int) -> int:
    """Operations of a forward pass through so many layers for pairs that a causal mask hides."""
    return formula.forward_per_pair * num_layers * NUM_TOKENS * (NUM_TOKENS - 1) // 2


KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "tied": {"tied": True},
    "adapter": {"adapter": True},
    "upper two layers": {"adapter": True, "layers": 2},
    "uppermost layer": {"adapter": True, "layers": 1},
    "parts of the uppermost layer": {"adapter": True, "layers": 1, "names": ("q_proj",)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_formula_counts_the_operations_that_torch_counts(kind: str) -> None:
    model, num_reached = small_network(**KINDS[kind]), KINDS[kind].get("layers", NUM_LAYERS)
    formula = TrainingFlops.of(model)
    masked = masked_flops(formula, NUM_LAYERS) + 2 * masked_flops(formula, num_reached)
    assert formula([NUM_TOKENS], NUM_TARGETS) == pytest.approx(counted_flops(model) - masked, rel=1e-3)
    assert formula.recomputed([NUM_TOKENS], NUM_TARGETS) == 0


@pytest.mark.parametrize("kind", ["full", "adapter", "upper two layers"])
def test_recomputed_operations_are_those_that_checkpointing_adds(kind: str) -> None:
    model, num_reached = small_network(**KINDS[kind]), KINDS[kind].get("layers", NUM_LAYERS)
    formula = TrainingFlops.of(model, recomputes=True)
    without = counted_flops(model)
    recompute_activations(model)
    added = counted_flops(model) - without - masked_flops(formula, num_reached)
    # torch stops before the last product of a layer, whose result nothing needs; with an adapter that is a small one.
    skipped = 2 * num_reached * NUM_TOKENS * (96 if kind == "full" else 4) * 64
    assert formula.recomputed([NUM_TOKENS], NUM_TARGETS) == pytest.approx(added + skipped, rel=1e-3)


def test_logits_in_chunks_repeat_the_forward_pass_of_the_head() -> None:
    model, counts = small_network(), []
    formula = TrainingFlops.of(model, most_logits=3)
    batch = Batch(
        input_ids=torch.randint(300, (1, NUM_TOKENS)),
        packed=packed_arguments([NUM_TOKENS]),
        segment_lengths=(NUM_TOKENS,),
        supervised_positions=torch.arange(NUM_TARGETS),
        targets=torch.arange(NUM_TARGETS),
        weights=torch.ones(NUM_TARGETS),
        counts=SequenceCounts(),
        task_names=(),
    )
    for most_logits in (None, 3):
        with FlopCounterMode(display=False) as counter:
            sequence_loss(model, batch, 1.0, most_logits).backward()
        counts.append(int(counter.get_total_flops()))
    assert formula.recomputed([NUM_TOKENS], NUM_TARGETS) == counts[1] - counts[0] > 0
    assert formula.recomputed([NUM_TOKENS], 3) == 0


@pytest.mark.parametrize("window", [None, 1, 5, 47])
def test_attention_counts_the_pairs_that_see_each_other(window: int | None) -> None:
    lengths = (3, 47, 31)
    pairs = sum(1 for n in lengths for i in range(n) for j in range(i + 1) if window is None or i - j < window)
    formula = TrainingFlops(0, 0, 0, 0, 0, 4, windows=(None, window, window), num_reached=2)
    below = sum(n * (n + 1) // 2 for n in lengths)
    assert formula(lengths, 5) == 3 * 4 * 2 * pairs + 4 * below


def test_only_layers_with_a_window_are_counted_with_it() -> None:
    config = AutoConfig.for_model(
        "gemma2", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, vocab_size=50
    )
    config.head_dim, config.num_key_value_heads, config.sliding_window = 16, 1, 8
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert TrainingFlops.of(model).windows == [8, None, 8]


def trainer_for(folder: Path, *overrides: str) -> ManyShotTrainer:
    recipe = small_recipe(folder, "training.log_every=2", *overrides)
    tasks = small_tasks()
    start = starting_point(recipe, tasks.train)
    return ManyShotTrainer(
        start.model,
        training_arguments(recipe, RunFolder(folder), evaluates=False),
        packed_sequences(recipe, tasks.train, start.tokenizer),
        recipe.objective,
    )


def test_a_run_logs_its_speed_and_sums_its_operations_by_the_formula(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    assert trainer.train_until_stopped()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert 0 < line["flop_utilisation"] < 1
        assert "flop_utilisation_with_recomputed" not in line
        assert 0 < line["data_waiting_share"] < 1
        assert line["peak_memory_gib"] > 0.05
        assert line["tokens_per_second"] > line["answers_per_second"] > 0
    recipe = small_recipe(tmp_path)
    formula = TrainingFlops.of(cast(PreTrainedModel, trainer.model))
    sequences = [sequence_tensors(sequence, recipe.objective) for sequence in cast(Any, trainer.train_dataset)]
    expected = sum(formula(batch["segment_lengths"], len(batch["targets"])) for batch in sequences)
    assert trainer.state.total_flos == expected > 0


def test_with_checkpointing_the_utilisation_is_also_logged_with_recomputed_work(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, "training.gradient_checkpointing=true")
    trainer.train_until_stopped()
    figures = trainer.throughput()
    assert 1.1 < figures["flop_utilisation_with_recomputed"] / figures["flop_utilisation"] < 4 / 3
    assert "with recomputed work" in trainer.throughput_sentence()


def test_counting_operations_asks_the_device_nothing(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    batch = sequence_tensors(cast(Any, trainer.train_dataset)[0], small_recipe(tmp_path).objective)
    # Tensors of the meta device have no values to wait for.
    assert trainer.floating_point_ops(send_to_device(batch, "meta")) == trainer.floating_point_ops(batch) > 0


def test_the_finished_model_remembers_the_speed_of_its_training(tmp_path: Path) -> None:
    ensure_trained(small_recipe(tmp_path / "run", "training.evaluate_every=null"), small_tasks())
    record = json.loads((tmp_path / "run" / "manyicl.json").read_text(encoding="utf-8"))["throughput"]
    assert {"tokens_per_second", "answers_per_second", "flop_utilisation", "peak_memory_gib"} < set(record)


def test_where_no_rate_can_be_measured_the_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(dtype: torch.dtype, device: torch.device) -> float:
        raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr("manyicl.training.trainer.matrix_rate", fails)
    trainer = trainer_for(tmp_path)
    trainer.train_until_stopped()
    assert "flop_utilisation" not in trainer.throughput()
    assert trainer.throughput_sentence().endswith("The matrix rate could not be measured: CUDA out of memory.")


def test_processes_side_by_side_share_a_time_and_add_up_their_work() -> None:
    one = Throughput(flops=30, seconds=2.0, seconds_waiting=0.5)
    figures = (one + one).figures(torch.device("cpu"), 20.0, num_processes=2)
    assert figures["flop_utilisation"] == pytest.approx(0.75)
    assert figures["data_waiting_share"] == pytest.approx(0.25)
    assert Throughput().figures(torch.device("cpu"), 20.0) == {}


def test_figures_are_written_on_one_line() -> None:
    figures = {
        "tokens_per_second": 1234.4,
        "answers_per_second": 56.7,
        "flop_utilisation": 0.412,
        "flop_utilisation_with_recomputed": 0.54,
        "data_waiting_share": 0.0021,
        "peak_memory_gib": 1.25,
    }
    assert throughput_text(figures) == (
        "57 answers/s  1,234 tokens/s  41% of the matrix rate (54% with recomputed work)  0.2% waiting for data  "
        "1.2 GiB"
    )


@pytest.mark.parametrize("seconds", [1e-6, 0.05, 100.0])
def test_the_matrix_rate_is_measured_in_a_bounded_time(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of the smallest product; larger ones cost as many times more as they have operations."""
    timed = []

    def product_seconds(matrix: torch.Tensor) -> float:
        timed.append(seconds * (len(matrix) / throughput.SMALLEST_SIDE) ** 3)
        return timed[-1]

    monkeypatch.setattr(throughput, "_product_seconds", product_seconds)
    monkeypatch.setattr(throughput, "LARGEST_SIDE", 1024)
    assert matrix_rate(torch.float32, torch.device("cpu")) == pytest.approx(2 * 256**3 / seconds)
    assert sum(timed) < 0.3 or len(timed) == 3
