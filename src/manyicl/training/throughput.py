"""How many operations training costs, how many the device can do, and what share of them a run reaches."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from manyicl.model.decoder_layers import decoder_layers
from manyicl.training.counts import SequenceCounts

# Sides of the square matrices that are multiplied: from what the slowest machine can do to what fills the fastest.
SMALLEST_SIDE, LARGEST_SIDE = 256, 8192
SECONDS_OF_MATRIX_PRODUCTS = 0.25


@dataclass(frozen=True)
class TrainingFlops:
    """Floating-point operations of forward and backward passes of one model over packed sequences.

    A product with a matrix of n weights costs 2n operations per token forward, 2n for the gradient of its input and, if
    it is trained, 2n for its own. Only supervised positions meet the head. Attention costs 4 x heads x head size for
    each pair of a token and one that it sees, and twice that backward; other segments are not seen, nor what lies
    outside a window. The backward pass reaches the input of the lowest layer with a trained weight; what is below it
    costs a forward pass alone.

    Attributes:
        forward_per_token: Operations per token in all layers, attention aside.
        reached_per_token: Those of the forward pass in layers that the backward pass reaches.
        backward_per_token: Those of the backward pass.
        forward_per_target: Operations of the head per supervised position.
        backward_per_target: The same for the backward pass.
        forward_per_pair: Operations of attention in one layer for a token and one that it sees.
        windows: How many tokens one of theirs sees in each layer, itself included, the lowest first; None for all
            before it.
        num_reached: Number of layers that the backward pass reaches, the uppermost.
        recomputes: Whether gradient checkpointing repeats the forward pass of the layers.
        most_logits: Where more positions are supervised, the backward pass repeats the forward pass of the head; None:
            never.
    """

    forward_per_token: int
    reached_per_token: int
    backward_per_token: int
    forward_per_target: int
    backward_per_target: int
    forward_per_pair: int
    windows: Sequence[int | None]
    num_reached: int
    recomputes: bool = False
    most_logits: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, *, recomputes: bool = False, most_logits: int | None = None) -> TrainingFlops:
        """Count the weights of a model, which may be on the meta device or have an adapter."""
        output = model.get_output_embeddings()
        head = set(output.modules()) if isinstance(output, nn.Module) else set()
        config = model.config.get_text_config()
        windows, found = _windows(config), decoder_layers(model)
        # Where they are not found, all are taken for reached.
        layers = list(found.layers) if found else []
        num_reached = _num_reached(model, layers) if layers else len(windows)
        below = {part for layer in layers[: len(layers) - num_reached] for part in layer.modules()}
        forward: Counter[str] = Counter()
        backward: Counter[str] = Counter()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                continue
            where = "head" if module in head else "below" if module in below else "reached"
            for weights in module.parameters(recurse=False):
                operations = 2 * _num_multiplied(module, weights, config)
                forward[where] += operations
                backward[where] += operations * (1 + weights.requires_grad)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            forward_per_token=forward["below"] + forward["reached"],
            reached_per_token=forward["reached"],
            backward_per_token=backward["reached"],
            forward_per_target=forward["head"],
            backward_per_target=backward["head"],
            forward_per_pair=4 * config.num_attention_heads * head_size,
            windows=windows,
            num_reached=num_reached,
            recomputes=recomputes,
            most_logits=most_logits,
        )

    def __call__(self, segment_lengths: Sequence[int], num_targets: float) -> int:
        """Count the model's own operations for one packed sequence.

        Args:
            segment_lengths: Tokens of each isolated episode.
            num_targets: Supervised positions.
        """
        per_token, per_target = (
            self.forward_per_token + self.backward_per_token,
            self.forward_per_target + self.backward_per_target,
        )
        attention = self._forward_attention(segment_lengths, len(self.windows))
        attention += 2 * self._forward_attention(segment_lengths, self.num_reached)
        return per_token * sum(segment_lengths) + int(per_target * num_targets) + attention

    def recomputed(self, segment_lengths: Sequence[int], num_targets: float) -> int:
        """Count the operations that the backward pass repeats.

        With gradient checkpointing these are the forward pass of the layers that it reaches, to its end, and where
        logits are made in chunks that of the head.
        """
        repeated = 0
        if self.recomputes:
            repeated += self.reached_per_token * sum(segment_lengths)
            repeated += self._forward_attention(segment_lengths, self.num_reached)
        if self.most_logits is not None and num_targets > self.most_logits:
            repeated += int(self.forward_per_target * num_targets)
        return repeated

    def _forward_attention(self, segment_lengths: Sequence[int], num_layers: int) -> int:
        """Count the operations of attention in so many of the uppermost layers."""
        pairs = 0
        for window, count in Counter(self.windows[len(self.windows) - num_layers :]).items():
            for length in segment_lengths:
                seen = min(length, window or length)
                pairs += count * (seen * (seen + 1) // 2 + (length - seen) * seen)
        return self.forward_per_pair * pairs


def _num_reached(model: PreTrainedModel, layers: Sequence[nn.Module]) -> int:
    """Count the layers that the backward pass reaches: all from the lowest with a trained weight."""
    if _is_trained(model.get_input_embeddings()):
        return len(layers)
    lowest = next((number for number, layer in enumerate(layers) if _is_trained(layer)), len(layers))
    return len(layers) - lowest


def _is_trained(module: nn.Module) -> bool:
    return any(weights.requires_grad for weights in module.parameters())


def _num_multiplied(module: nn.Module, weights: nn.Parameter, config: PreTrainedConfig) -> int:
    """Count the weights of a parameter that multiply each token; vectors do not count, being cheap."""
    if weights.ndim < 2:
        return 0
    if isinstance(module, nn.Linear):
        # In 4 bits two weights share an element.
        return module.in_features * module.out_features
    if weights.ndim == 3 and (num_chosen := getattr(config, "num_experts_per_tok", None)):
        return weights.numel() * int(num_chosen) // len(weights)
    return weights.numel()


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """Return the attention window of each layer."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", None) is False:
        window = None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


@dataclass(frozen=True)
class Throughput:
    """What was trained in some time, evaluations and checkpoints aside. Everything is summed over processes.

    Attributes:
        counts: What the packed sequences held.
        flops: The model's own operations.
        recomputed_flops: Operations that the backward pass repeated.
        seconds: Time of the steps.
        seconds_waiting: Part of it spent waiting for packed sequences.
    """

    counts: SequenceCounts = field(default_factory=SequenceCounts)
    flops: int = 0
    recomputed_flops: int = 0
    seconds: float = 0.0
    seconds_waiting: float = 0.0

    def __add__(self, other: Throughput) -> Throughput:
        """Add up both."""
        return Throughput(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def figures(self, device: torch.device, rate: float | None, num_processes: int = 1) -> dict[str, float]:
        """Return what is logged; nothing for no steps.

        Args:
            device: Where this process trains.
            rate: Operations per second of a matrix product on it; None leaves the utilisation out.
            num_processes: Processes that trained side by side.
        """
        if not self.seconds:
            return {}
        figures = {
            "tokens_per_second": self.counts.num_tokens / self.seconds * num_processes,
            "answers_per_second": self.counts.num_answers / self.seconds * num_processes,
        }
        if rate:
            figures["flop_utilisation"] = self.flops / (self.seconds * rate)
            if self.recomputed_flops:
                with_recomputed = self.flops + self.recomputed_flops
                figures["flop_utilisation_with_recomputed"] = with_recomputed / (self.seconds * rate)
        figures["data_waiting_share"] = self.seconds_waiting / self.seconds
        figures["peak_memory_gib"] = peak_bytes(device) / 2**30
        return figures


def throughput_text(figures: Mapping[str, float]) -> str:
    """Write figures of a run on one short line."""
    parts = [f"{figures['answers_per_second']:,.0f} answers/s", f"{figures['tokens_per_second']:,.0f} tokens/s"]
    if "flop_utilisation" in figures:
        parts.append(f"{figures['flop_utilisation']:.0%} of the matrix rate")
    if "flop_utilisation_with_recomputed" in figures:
        parts[-1] += f" ({figures['flop_utilisation_with_recomputed']:.0%} with recomputed work)"
    parts.append(f"{figures['data_waiting_share']:.1%} waiting for data")
    return "  ".join([*parts, f"{figures['peak_memory_gib']:.1f} GiB"])


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Measure operations per second of a matrix product, in at most 0.3 seconds unless one small product takes longer.

    Raises:
        RuntimeError: If the device cannot multiply such matrices, or has no memory for them.
    """
    tile = torch.randn(SMALLEST_SIDE, SMALLEST_SIDE, device=device).to(dtype)
    _product_seconds(tile)
    best, side, left = 0.0, SMALLEST_SIDE, SECONDS_OF_MATRIX_PRODUCTS
    while True:
        matrix = tile.repeat(side // SMALLEST_SIDE, side // SMALLEST_SIDE)
        seconds = min(_product_seconds(matrix) for _ in range(2))
        best = max(best, 2 * side**3 / seconds)
        left -= 2 * seconds
        if side == LARGEST_SIDE or 2 * 8 * seconds > left:
            return best
        side *= 2


def _product_seconds(matrix: torch.Tensor) -> float:
    started = time.perf_counter()
    matrix @ matrix
    if matrix.device.type == "cuda":
        torch.cuda.synchronize(matrix.device)
    return max(time.perf_counter() - started, 1e-9)


def forget_peak() -> None:
    """Let the peak of memory begin anew, where the system allows it, so that it is that of the next training."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Linux sets the peak back to what is used now.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has used: of its GPU, or on a CPU as the system counts it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    memory = psutil.Process().memory_info()
    # What `resource` tells of a process on Linux begins with the peak of the one that started it.
    if (status := Path("/proc/self/status")).is_file() and (
        peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    ):
        return int(peak[1]) * 1024
    # Windows tells the peak here; what this system calls it, where it is there, is in the module `resource`.
    if hasattr(memory, "peak_wset"):
        return int(memory.peak_wset)
    try:
        import resource
    except ImportError:
        return int(memory.rss)
    # macOS counts in bytes, other systems in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if psutil.MACOS else 1024)
