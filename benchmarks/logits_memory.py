"""Peak memory of a step on a CPU with a vocabulary of 131,072 and every token supervised.

    python benchmarks/logits_memory.py             # 1,024 to 32,768 tokens; each length in a process of its own

The network has two small layers. Prints the memory above that of the model: with logits for all positions at once up
to 2,048 tokens, and in chunks.
"""

from __future__ import annotations

import multiprocessing
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manyicl.model.attention import ATTENTION, packed_arguments
from manyicl.training.batch import Batch
from manyicl.training.counts import SequenceCounts
from manyicl.training.loss import most_logits_at_once, sequence_loss
from manyicl.training.throughput import peak_bytes

VOCABULARY, SEGMENT_TOKENS = 131_072, 512


def measure(num_tokens: int, in_chunks: bool) -> float:
    """Take one forward and backward pass, print what it needed and return it, in GiB."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, tie_word_embeddings=True, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).train()
    ids = torch.randint(VOCABULARY, (1, num_tokens))
    lengths = (SEGMENT_TOKENS,) * (num_tokens // SEGMENT_TOKENS)
    batch = Batch(
        input_ids=ids,
        packed=packed_arguments(lengths),
        segment_lengths=lengths,
        supervised_positions=torch.arange(num_tokens - 1),
        targets=ids[0, 1:],
        weights=torch.ones(num_tokens - 1),
        counts=SequenceCounts(),
        task_names=(),
    )
    before = peak_bytes(torch.device("cpu"))
    sequence_loss(model, batch, 1.0, most_logits_at_once(VOCABULARY) if in_chunks else None).backward()
    added = (peak_bytes(torch.device("cpu")) - before) / 2**30
    print(f"| {num_tokens:,} | {'in chunks' if in_chunks else 'all at once'} | {added:.2f} |", flush=True)
    return added


def main() -> None:
    """Measure every length."""
    print(f"| Tokens | Logits | GiB |\n| ---: | --- | ---: |\ntorch {torch.__version__}", file=sys.stderr)
    for in_chunks, lengths in ((False, (1024, 2048)), (True, (1024, 2048, 4096, 8192, 16_384, 32_768))):
        for num_tokens in lengths:
            process = multiprocessing.get_context("spawn").Process(target=measure, args=(num_tokens, in_chunks))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
