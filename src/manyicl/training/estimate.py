"""Estimate what a run will cost before it starts: sequences, answers, hours, memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple, cast

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from manyicl.episodes.packed_sequence import PackedSequence, PackedSequences
from manyicl.episodes.replay import SHARE_KEY
from manyicl.errors import UserError, pluralized
from manyicl.model.load import DTYPES, model_config
from manyicl.training.batch import Batch, first_tokens, sequence_tensors
from manyicl.training.loss import caps_or_scales_logits, head_is_separable, most_logits_at_once, sequence_loss
from manyicl.training.memory import kept_bytes
from manyicl.training.recipe import ObjectiveSettings, Recipe
from manyicl.training.start import StartingPoint, with_adapter
from manyicl.training.throughput import TrainingFlops, matrix_rate, peak_bytes

NUM_SAMPLED_SEQUENCES = 32
# Passes over the first tokens of a sequence are timed, each twice as long as the one before, for so long in all.
SECONDS_MEASURED = 10.0
FEWEST_TOKENS_MEASURED = 16
# Another type is recommended where its matrix products are so many times as fast.
MUCH_FASTER = 4.0
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
        segment_lengths: Tokens of each episode and piece of text, for each sequence of the sample.
        replayed_tokens: Tokens of replayed text per sequence.
        replayed_targets: Those of them that are supervised.
        replayed_loss_share: Share of the weight of all targets that those of replayed text have.
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
    segment_lengths: tuple[tuple[int, ...], ...]
    replayed_tokens: float = 0.0
    replayed_targets: float = 0.0
    replayed_loss_share: float = 0.0

    def flops(self, formula: TrainingFlops) -> float:
        """Return the operations per sequence, with those that are repeated."""
        targets = self.targets
        return fmean(formula(each, targets) + formula.recomputed(each, targets) for each in self.segment_lengths)

    def sentence(self) -> str:
        """Say what a sequence holds, and what is dropped."""
        num_answer_tokens = self.targets - self.replayed_targets
        text = (
            f"A packed sequence holds {self.tokens:,.0f} tokens in {self.episodes:.1f} episodes with "
            f"{self.answers:,.1f} supervised answers ({num_answer_tokens:,.0f} tokens); {self.unused_share:.1%} of it "
            f"stays unused (means over {self.num_sampled} sequences)."
        )
        if self.replayed_tokens:
            text += (
                f" {self.replayed_tokens:,.0f} of the tokens are replayed text, whose targets have "
                f"{self.replayed_loss_share:.1%} of the weight in the loss."
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

    Raises:
        UserError: If replayed text leaves no answer in the sample, or the whole run holds less text than a piece of it.
    """
    if sequences.replay is not None:
        sequences.replay.require_a_piece(len(sequences))
    sample = [sequences[index] for index in range(min(len(sequences), NUM_SAMPLED_SEQUENCES))]
    batches = [sequence_tensors(sequence, objective) for sequence in sample]
    if sequences.replay is not None and not any(batch["counts"].num_answers for batch in batches):
        what = f"the first {pluralized(len(sample), 'packed sequence')} of the run would hold no supervised answer"
        why = f"text takes {fmean(sequence.num_replayed_tokens for sequence in sample):,.0f} of"
        found, remedy = f"{why} {sequences.max_context_tokens:,} tokens", f"Lower {SHARE_KEY}."
        raise UserError("no_answers", what, found=found, remedy=remedy, field=SHARE_KEY)
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
        segment_lengths=tuple(batch["segment_lengths"] for batch in batches),
        replayed_tokens=fmean(sequence.num_replayed_tokens for sequence in sample),
        replayed_targets=fmean(sequence.num_replayed_tokens - len(sequence.replayed) for sequence in sample),
        replayed_loss_share=_replayed_weight(sample) / (sum(float(batch["weights"].sum()) for batch in batches) or 1.0),
    )


def _replayed_weight(sequences: Sequence[PackedSequence]) -> float:
    """Sum the weights of all targets in replayed text."""
    segments = chain.from_iterable(sequence.replayed for sequence in sequences)
    return sum(segment.weight * (len(segment.token_ids) - 1) for segment in segments)


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


def measuring_device() -> tuple[torch.device, str]:
    """Return where a run is measured, and its name."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device()), torch.cuda.get_device_name()
    return torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads"


def computing_dtype(recipe: Recipe) -> torch.dtype:
    """Return the type in which matrices are multiplied."""
    return torch.bfloat16 if recipe.training.bf16 else DTYPES[recipe.model.dtype]


def remark_on_speed(recipe: Recipe) -> str | None:
    """Recommend another type where this machine multiplies matrices of it much faster; both are timed."""
    device, _ = measuring_device()
    dtype = computing_dtype(recipe)
    other, setting = torch.bfloat16, "training.bf16: true"
    if dtype != torch.float32:
        other, setting = torch.float32, "model.dtype: float32 without training.bf16"
    rate, other_rate = matrix_rate(dtype, device), matrix_rate(other, device)
    if other_rate < MUCH_FASTER * rate:
        return None
    names = [str(each).removeprefix("torch.") for each in (other, dtype)]
    return (
        f"Matrix products in {names[0]} are {other_rate / rate:.0f} times as fast on this machine as in {names[1]} "
        f"({other_rate / 1e12:.3f} and {rate / 1e12:.3f} TFLOP/s). Consider {setting}."
    )


def measured_cost(
    recipe: Recipe, start: StartingPoint, sequences: PackedSequences, statistics: SequenceStatistics
) -> Cost:
    """Time forward and backward passes over the first tokens of the run, without changing a weight, and scale them.

    The passes grow up to a whole sequence as long as all of them together take about `SECONDS_MEASURED`.
    """
    model = start.model
    device, name = measuring_device()
    nn.Module.to(model, device)
    model.train()
    whole = sequence_tensors(sequences[0], recipe.objective)
    most_logits = _most_logits(recipe, model.config)
    if most_logits is not None and not _has_separable_head(recipe, model, whole, device):
        most_logits = None
    recomputes = recipe.training.gradient_checkpointing
    formula = TrainingFlops.of(model, recomputes=recomputes, most_logits=most_logits)
    num_tokens, length, left = whole["input_ids"].shape[1], FEWEST_TOKENS_MEASURED, SECONDS_MEASURED
    while True:
        batch = first_tokens(whole, length)
        held = batch["segment_lengths"], len(batch["targets"])
        flops = formula(*held) + formula.recomputed(*held)
        seconds = _forward_and_backward(recipe, model, batch, device, most_logits)
        left -= seconds
        # Attention grows faster than the length, all else as fast.
        if length >= num_tokens or 2.5 * seconds > left:
            break
        length *= 2
    if seconds < left:
        # Once more, with warm caches.
        seconds = min(seconds, _forward_and_backward(recipe, model, batch, device, most_logits))
    model.zero_grad(set_to_none=True)
    num_parameters, num_trainable = num_weights(model)
    memory = peak_bytes(device) + 8 * num_trainable
    if length < num_tokens:
        memory += activation_bytes(recipe, model.config, statistics.tokens, statistics.targets, most_logits)
        memory -= activation_bytes(recipe, model.config, length, len(batch["targets"]), most_logits)
    dtype = str(computing_dtype(recipe)).removeprefix("torch.")
    return Cost(
        hours=seconds * statistics.flops(formula) / flops * recipe.num_sequences / 3600,
        memory_gib=memory / 2**30,
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        how=f"measured: forward and backward over {min(length, num_tokens):,} tokens in {dtype} on {name}, scaled by "
        "the operations of whole sequences",
    )


def _most_logits(recipe: Recipe, config: PreTrainedConfig) -> int | None:
    """Return how many positions have logits at the same time, as the trainer chooses it; None for all.

    Whether the head may really be called by itself shows in a comparison of logits alone.
    """
    most = most_logits_at_once(config.get_text_config().vocab_size)
    makes_all = recipe.sequences.max_context_tokens <= most or caps_or_scales_logits(config)
    return None if makes_all else most


def _has_separable_head(recipe: Recipe, model: nn.Module, batch: Batch, device: torch.device) -> bool:
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.training.bf16):
        return head_is_separable(model, cast(Batch, send_to_device(batch, device)))


def _forward_and_backward(
    recipe: Recipe, model: nn.Module, batch: Batch, device: torch.device, most_logits: int | None
) -> float:
    """Return the seconds of both passes."""
    batch = cast(Batch, send_to_device(batch, device))
    started = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.training.bf16):
        loss = sequence_loss(model, batch, 1.0, most_logits)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def num_weights(model: nn.Module) -> tuple[int, int]:
    """Count the weights of a model, and those of them that training changes."""
    sizes = [(weights.numel(), weights.requires_grad) for weights in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)


def estimated_cost(recipe: Recipe, statistics: SequenceStatistics, config: PreTrainedConfig | None = None) -> Cost:
    """Estimate time from the matrix rate of this machine, memory from counts of weights and activations.

    Args:
        recipe: The run.
        statistics: Means over some of its sequences.
        config: Configuration of the model; None for that of the base.

    Raises:
        UserError: If the configuration is not available, or the recipe puts an adapter over layers that the model does
            not have.
    """
    if config is None:
        assert recipe.model.base is not None
        config = model_config(recipe.model.base)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        head = model.get_output_embeddings()
        linear = [part for part in model.modules() if isinstance(part, nn.Linear) and part is not head]
        num_in_4_bits = sum(part.weight.numel() for part in linear) if recipe.model.quantize else 0
        if recipe.model.lora is not None:
            model = with_adapter(model, recipe.model.lora)
    num_parameters, num_trainable = num_weights(model)
    most_logits = _most_logits(recipe, config)
    formula = TrainingFlops.of(model, recomputes=recipe.training.gradient_checkpointing, most_logits=most_logits)
    rate = matrix_rate(computing_dtype(recipe), measuring_device()[0])
    seconds = statistics.flops(formula) * recipe.num_sequences / (rate * ASSUMED_EFFICIENCY)
    bytes_per_weight = DTYPES[recipe.model.dtype].itemsize
    weights = float(num_parameters * bytes_per_weight + num_trainable * (4 + 8))
    weights -= num_in_4_bits * (bytes_per_weight - BYTES_PER_4_BIT_WEIGHT)
    activations = activation_bytes(recipe, config, statistics.tokens, statistics.targets, most_logits)
    return Cost(
        hours=seconds / 3600,
        memory_gib=(weights + activations) / 2**30,
        num_parameters=num_parameters,
        num_trainable=num_trainable,
        how=f"estimated from the configuration: {ASSUMED_EFFICIENCY:.0%} of this machine's matrix rate, "
        f"{rate / 1e12:.2f} TFLOP/s",
    )


def activation_bytes(
    recipe: Recipe, config: PreTrainedConfig, num_tokens: float, num_targets: float, most_logits: int | None
) -> int:
    """Estimate the memory of what the forward pass over a sequence keeps, and of its logits.

    Args:
        recipe: The run.
        config: Configuration of the model.
        num_tokens: Tokens of the sequence.
        num_targets: Supervised positions in it.
        most_logits: How many of these have logits at the same time; None for all.
    """
    text_config: Any = config.get_text_config()
    num_at_once = min(num_targets, most_logits or num_targets)
    layers, width, vocabulary = (text_config.num_hidden_layers, text_config.hidden_size, text_config.vocab_size)
    return int(kept_bytes(recipe, layers, width, vocabulary, num_tokens=num_tokens, num_logits=num_at_once))
