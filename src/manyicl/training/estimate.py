"""Estimate what a run will cost before it starts: sequences, answers, hours, memory."""

from __future__ import annotations

import time
from statistics import fmean
from typing import NamedTuple, cast

import psutil  # type: ignore[import-untyped]
import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.benchmark import Timer
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from manyicl.episodes.packed_sequence import PackedSequence, PackedSequences
from manyicl.model.load import DTYPES, model_config
from manyicl.training.batch import Batch, sequence_tensors
from manyicl.training.loss import sequence_loss
from manyicl.training.recipe import ObjectiveSettings, Recipe
from manyicl.training.start import StartingPoint, with_adapter

NUM_SAMPLED_SEQUENCES = 32
NUM_MEASURED_SEQUENCES = 2
# Larger models are estimated from their configuration instead of being run.
MOST_PARAMETERS_MEASURED = 300_000_000
# Share of the measured matrix rate that a whole training step reaches; a rule of thumb, said where it is used.
ASSUMED_EFFICIENCY = 0.4
# Half a byte, a scale of one byte for 64 weights, and a second scale of four bytes for 256 of these.
BYTES_PER_4_BIT_WEIGHT = 1 / 2 + 1 / 64 + 4 / (64 * 256)


class SequenceStatistics(NamedTuple):
    """Means over a sample of the packed sequences of a run.

    Attributes:
        num_sampled: Number of sequences in the sample.
        tokens: Tokens per sequence.
        answers: Supervised answers per sequence.
        targets: Supervised tokens per sequence.
        episodes: Episodes per sequence.
        unused_share: Share of the context that holds no token.
        most_shots: Most demonstrations before an answer in the sample; the whole run may hold more.
        shots_dropped: Shots per sequence that were drawn and did not fit.
        shots_too_long: Shots per sequence that are longer than a whole context.
    """

    num_sampled: int
    tokens: float
    answers: float
    targets: float
    episodes: float
    unused_share: float
    most_shots: int
    shots_dropped: float
    shots_too_long: float

    def sentence(self) -> str:
        """Say what a sequence holds, and what is dropped."""
        text = (
            f"A packed sequence holds {self.tokens:,.0f} tokens in {self.episodes:.1f} episodes with "
            f"{self.answers:,.1f} supervised answers ({self.targets:,.0f} tokens); {self.unused_share:.1%} of it stays "
            f"unused (means over {self.num_sampled} sequences)."
        )
        if self.shots_too_long:
            text += f" {self.shots_too_long:.1f} examples per sequence are skipped: longer than a whole sequence."
        if self.shots_dropped:
            text += f" {self.shots_dropped:.1f} shots per sequence were drawn and did not fit."
        return text


def sample_sequences(sequences: PackedSequences, objective: ObjectiveSettings) -> SequenceStatistics:
    """Build some sequences of a run and take means.

    Args:
        sequences: Packed sequences of the run.
        objective: Which answers are supervised.
    """
    sample = [sequences[index] for index in range(min(len(sequences), NUM_SAMPLED_SEQUENCES))]
    batches = [sequence_tensors(sequence, objective) for sequence in sample]
    return SequenceStatistics(
        num_sampled=len(sample),
        tokens=fmean(sequence.num_tokens for sequence in sample),
        answers=fmean(batch["counts"].num_answers for batch in batches),
        targets=fmean(len(batch["targets"]) for batch in batches),
        episodes=fmean(len(sequence.episodes) for sequence in sample),
        unused_share=fmean(sequence.unused_share for sequence in sample),
        most_shots=max(batch["counts"].most_shots for batch in batches),
        shots_dropped=fmean(sequence.num_shots_dropped for sequence in sample),
        shots_too_long=fmean(sequence.num_shots_too_long for sequence in sample),
    )


class Cost(NamedTuple):
    """Time and memory of training on this machine, evaluation aside.

    Attributes:
        hours: Hours of the whole run in one process.
        memory_gib: Peak memory.
        num_parameters: Number of all weights.
        num_trainable: Number of weights that training changes.
        how: How time and memory were measured or estimated.
    """

    hours: float
    memory_gib: float
    num_parameters: int
    num_trainable: int
    how: str


def measured_cost(recipe: Recipe, start: StartingPoint, sequences: PackedSequences) -> Cost:
    """Run forward and backward on the first sequences of the run, without changing a weight."""
    model = start.model
    device, name = torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device, name = torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
    nn.Module.to(model, device)
    model.train()
    sample = [sequences[index % len(sequences)] for index in range(NUM_MEASURED_SEQUENCES + 1)]
    # The first sequence warms up caches.
    _forward_and_backward(recipe, model, sample[0], device)
    started = time.perf_counter()
    for sequence in sample[1:]:
        _forward_and_backward(recipe, model, sequence, device)
    seconds_per_sequence = (time.perf_counter() - started) / NUM_MEASURED_SEQUENCES
    model.zero_grad(set_to_none=True)
    num_parameters, num_trainable = num_weights(model)
    return Cost(
        hours=seconds_per_sequence * recipe.num_sequences / 3600,
        memory_gib=(_peak_bytes(device) + 8 * num_trainable) / 2**30,
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        how=f"measured: {NUM_MEASURED_SEQUENCES} sequences forward and backward on {name}",
    )


def _forward_and_backward(recipe: Recipe, model: nn.Module, sequence: PackedSequence, device: torch.device) -> None:
    batch = cast(Batch, send_to_device(sequence_tensors(sequence, recipe.objective), device))
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.training.bf16):
        loss = sequence_loss(model, batch, 1.0)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    # Windows tells the peak here; what this system calls it, where it is there, is in the module `resource`.
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)
    try:
        import resource
    except ImportError:
        return int(memory.rss)
    # macOS counts in bytes, other systems in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if psutil.MACOS else 1024)


def parameter_counts(recipe: Recipe, config: PreTrainedConfig) -> tuple[int, int, int]:
    """Count from its configuration alone all weights of a model, those that training changes, and those in 4 bits.

    Raises:
        UserError: If the recipe puts an adapter over layers that the model does not have.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        head = model.get_output_embeddings()
        linear = [part for part in model.modules() if isinstance(part, nn.Linear) and part is not head]
        num_in_4_bits = sum(part.weight.numel() for part in linear) if recipe.model.quantize else 0
        if recipe.model.lora is not None:
            model = with_adapter(model, recipe.model.lora)
    return *num_weights(model), num_in_4_bits


def num_weights(model: nn.Module) -> tuple[int, int]:
    """Count the weights of a model, and those of them that training changes."""
    sizes = [(weights.numel(), weights.requires_grad) for weights in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def estimated_cost(recipe: Recipe, statistics: SequenceStatistics, config: PreTrainedConfig | None = None) -> Cost:
    """Estimate time from the matrix rate of this machine, memory from counts of weights and activations.

    A token costs 2 operations per weight forward, 2 more for the gradients of activations and 2 for those of
    trainable weights; checkpointing repeats the forward pass. Attention is not counted.

    Args:
        recipe: The run.
        statistics: Means over some of its sequences.
        config: Configuration of the model; None for that of the base.

    Raises:
        UserError: If the configuration is not available.
    """
    if config is None:
        assert recipe.model.base is not None
        config = model_config(recipe.model.base)
    num_parameters, num_trainable, num_in_4_bits = parameter_counts(recipe, config)
    low_precision = recipe.training.bf16 or recipe.model.dtype == "bfloat16"
    rate = matrix_rate(torch.bfloat16 if low_precision else torch.float32)
    per_token = 4 * num_parameters + 2 * num_trainable
    if recipe.training.gradient_checkpointing:
        per_token += 2 * num_parameters
    seconds = per_token * statistics.tokens * recipe.num_sequences / (rate * ASSUMED_EFFICIENCY)
    config = config.get_text_config()
    bytes_per_weight = torch.finfo(DTYPES[recipe.model.dtype]).bits // 8
    bytes_per_activation = 2 if low_precision else 4
    # About 17 values of the hidden size per token and layer are kept without checkpointing (34 bytes in 16 bits:
    # Korthikanti et al. 2022, arXiv:2205.05198); with it one, and those of the layer at work.
    num_layers = config.num_hidden_layers
    num_kept = num_layers + 17 if recipe.training.gradient_checkpointing else 17 * num_layers
    activations = num_kept * config.hidden_size * statistics.tokens * bytes_per_activation
    # Logits, their softmax and its gradient, in float32.
    activations += 3 * 4 * statistics.targets * config.vocab_size
    weights = float(num_parameters * bytes_per_weight + num_trainable * (4 + 8))
    weights -= num_in_4_bits * (bytes_per_weight - BYTES_PER_4_BIT_WEIGHT)
    return Cost(
        hours=seconds / 3600,
        memory_gib=(weights + activations) / 2**30,
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        how=f"estimated from the configuration: {ASSUMED_EFFICIENCY:.0%} of this machine's matrix rate, "
        f"{rate / 1e12:.2f} TFLOP/s",
    )


def matrix_rate(dtype: torch.dtype) -> float:
    """Measure operations per second of a matrix product on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    matrix = {"a": torch.randn(size, size, device=device, dtype=dtype)}
    timer = Timer("a @ a", globals=matrix, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.timeit(1).mean for _ in range(4))
