"""Processor time of a training step with peft's own layers, and with layers that share their input computed together.

    manyicl models get smollm2
    python benchmarks/merged_projections.py                  # 2,048 tokens in 4 segments, float32 and bfloat16 autocast

LoRA of rank 16 on all linear layers of SmolLM2-135M, every sixteenth token supervised, one thread. Both take turns, so
that other work on the machine slows them alike; the least of the rounds counts. The floor is the base without an
adapter, with the gradient of its input.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from manyicl.model.attention import packed_arguments
from manyicl.model.load import load_model
from manyicl.training.batch import Batch
from manyicl.training.counts import SequenceCounts
from manyicl.training.loss import sequence_loss
from manyicl.training.merged_projections import MergedLinear, merge_projections
from manyicl.training.recipe import LoraSettings
from manyicl.training.start import with_adapter

NUM_SEGMENTS, EVERY = 4, 16


def base_alone(part: LoraLinear, x: Tensor) -> Any:
    """Compute a layer without its update."""
    return part.base_layer(x)


FORWARDS: dict[str, Any] = {"peft": LoraLinear.forward, "together": MergedLinear.forward, "floor": base_alone}


def random_batch(num_tokens: int) -> Batch:
    """Draw a packed sequence."""
    ids = torch.randint(1000, 40_000, (1, num_tokens))
    positions = torch.arange(0, num_tokens - 1, EVERY)
    lengths = (num_tokens // NUM_SEGMENTS,) * NUM_SEGMENTS
    return Batch(
        input_ids=ids,
        packed=packed_arguments(lengths),
        segment_lengths=lengths,
        supervised_positions=positions,
        targets=ids[0, positions + 1],
        weights=torch.ones(len(positions)),
        counts=SequenceCounts(),
        task_names=(),
    )


def step_seconds(model: Any, batch: Batch, name: str, *, bf16: bool) -> tuple[float, float]:
    """Return the processor time of a forward and of a backward pass."""
    MergedLinear.forward = FORWARDS[name]  # type: ignore[method-assign]
    model.zero_grad(set_to_none=True)
    needs_gradient = model.get_input_embeddings().register_forward_hook(lambda *given: given[-1].requires_grad_(True))
    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = sequence_loss(model, batch, float(len(batch["targets"])))
    between = time.process_time()
    loss.backward()
    needs_gradient.remove()
    return between - started, time.process_time() - between


def main() -> None:
    """Time all, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = load_model("builtin:smollm2", dtype="float32", device="cpu", check_isolation=False).model
    model = with_adapter(base, LoraSettings(rank=16)).train()
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weights, std=0.02)
    merge_projections(model)
    batch = random_batch(arguments.tokens)
    print(
        f"torch {torch.__version__}, {arguments.tokens:,} tokens\n| Type | Layers | forward s | backward s | step s |"
    )
    print("| --- | --- | ---: | ---: | ---: |")
    for bf16 in (False, True):
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in FORWARDS}
        for _ in range(arguments.rounds):
            for name, found in seconds.items():
                found.append(step_seconds(model, batch, name, bf16=bf16))
        for name, found in seconds.items():
            best = [min(each) for each in zip(*found, strict=True)]
            step = min(map(sum, found))
            kind = "bfloat16" if bf16 else "float32"
            print(f"| {kind} | {name} | {best[0]:.2f} | {best[1]:.2f} | {step:.2f} |", flush=True)


if __name__ == "__main__":
    main()
