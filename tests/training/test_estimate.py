"""The memory that is estimated for a step, compared with what a step takes."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from manyicl.model.attention import ATTENTION, packed_arguments
from manyicl.training import estimate, loss
from manyicl.training.batch import Batch
from manyicl.training.counts import SequenceCounts
from manyicl.training.estimate import activation_bytes, estimated_cost
from manyicl.training.loss import sequence_loss
from manyicl.training.recipe import LoraSettings
from manyicl.training.start import with_adapter
from manyicl.training.throughput import peak_bytes
from tests.training.recipes import small_recipe

VOCABULARY, NUM_TOKENS, MOST_LOGITS = 40_000, 1_500, 200
CPU = torch.device("cpu")
# (changes to the shape, settings of the adapter, positions with logits at the same time)
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, int | None]] = {
    "all logits at once": ({}, None, None),
    "logits in chunks": ({}, None, MOST_LOGITS),
    "an adapter": ({"hidden_size": 256, "num_hidden_layers": 8}, {}, MOST_LOGITS),
    "an adapter on two layers": ({"hidden_size": 256, "num_hidden_layers": 8}, {"layers": 2}, MOST_LOGITS),
}
SELDOM_MEASURED = ("all logits at once", "logits in chunks", "an adapter on two layers")


def configuration(**changes: Any) -> PreTrainedConfig:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY, **changes}
    config: PreTrainedConfig = AutoConfig.for_model("llama", intermediate_size=2 * shape["hidden_size"], **shape)
    return config


def take_step(name: str, answer: Connection) -> None:
    """Take a forward and backward pass and send what it needed above the model and its gradients."""
    changes, lora, most_logits = STEPS[name]
    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_config(configuration(**changes), attn_implementation=ATTENTION).train()
    if lora is not None:
        model = with_adapter(model, LoraSettings(rank=2, **lora))
    ids = torch.randint(VOCABULARY, (1, NUM_TOKENS))
    batch = Batch(
        input_ids=ids,
        packed=packed_arguments([NUM_TOKENS]),
        segment_lengths=(NUM_TOKENS,),
        supervised_positions=torch.arange(NUM_TOKENS - 1),
        targets=ids[0, 1:],
        weights=torch.ones(NUM_TOKENS - 1),
        counts=SequenceCounts(),
        task_names=(),
    )
    gradients = [torch.zeros_like(weights) + 1 for weights in model.parameters() if weights.requires_grad]
    before = peak_bytes(CPU)
    del gradients
    sequence_loss(model, batch, 1.0, most_logits).backward()
    answer.send(peak_bytes(CPU) - before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SELDOM_MEASURED else ()) for name in STEPS]
)
def test_a_step_takes_the_memory_that_is_estimated(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Left to itself, glibc raises the size from which it returns memory, and the peak of the process says little.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(2**20))
    changes, lora, most_logits = STEPS[name]
    answer, end = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=take_step, args=(name, end))
    process.start()
    measured = answer.recv()
    process.join()
    settings = [] if lora is None else ["model.from_scratch=null", "model.base=unused", f"model.lora={lora}"]
    expected = activation_bytes(
        small_recipe(tmp_path, *settings), configuration(**changes), NUM_TOKENS, NUM_TOKENS, most_logits
    )
    assert measured == pytest.approx(expected, rel=0.25)


def test_the_estimate_counts_logits_as_training_will_make_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(tmp_path, "sequences.max_context_tokens=2000")
    statistics = estimate.SequenceStatistics(1, 1500, 9, 1500, 1, 0, 9, 0, 0, ((1500,),))
    monkeypatch.setattr(loss, "BYTES_OF_LOGITS", 4 * VOCABULARY * MOST_LOGITS)

    def bytes_above_one_target(config: PreTrainedConfig, lengthened: int = 1500) -> float:
        few, many = (statistics._replace(targets=targets) for targets in (1, lengthened))
        gib = estimated_cost(recipe, many, config).memory_gib - estimated_cost(recipe, few, config).memory_gib
        return gib * 2**30 / (12 * VOCABULARY)

    assert bytes_above_one_target(configuration()) == pytest.approx(MOST_LOGITS - 1, abs=0.01)
    capped = configuration()
    capped.final_logit_softcapping = 30.0
    assert bytes_above_one_target(capped) == pytest.approx(1499, abs=0.01)
