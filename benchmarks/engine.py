"""What a query costs after a shared prefix, beside the ways it is done elsewhere.

    python benchmarks/engine.py                      # everything, Markdown; about 20 minutes on two cores
    python benchmarks/engine.py --only queries       # or: labels, curve, memory, lengths, compiled

A Llama shape of 135M parameters with random weights in bfloat16; 4,096 tokens of demonstrations, 64 queries of 16
tokens. Everything compared is measured in this run, on an otherwise idle machine. Random weights are the hard case of
the label search: every label is about as likely as any other, so little can be left out; ``--only labels`` adds a
sharpened head, whose predictions are as sure as those of a fine-tuned model.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from manyicl.engine.backend import ScoreScope
from manyicl.engine.engine import Engine
from manyicl.engine.label_trie import tries_of
from manyicl.engine.packing import ActivationBudget
from manyicl.engine.prefix_cache import extend_blocks
from manyicl.engine.scoring import LabelSearch, Strategy, score_labels
from manyicl.model.attention import ATTENTION
from manyicl.model.continuation import Block
from manyicl.model.load import LoadedModel, fingerprint
from manyicl.model.manifest import library_versions
from manyicl.tasks.task import Example, Query, Task, TaskSpec

NUM_PREFIX, NUM_QUERIES, QUERY_TOKENS = 4096, 64, 16
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32768,
}
ACTIVATION_BUDGET_MIB = 64
STRATEGIES: tuple[Strategy, ...] = ("best_first", "full_pass")


def make_model() -> PreTrainedModel:
    """Make the random model, in evaluation mode."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation=ATTENTION, dtype=torch.bfloat16
    )
    model.eval()
    return model


def random_ids(num_tokens: int, seed: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(1000, 49152) for _ in range(num_tokens))


def queries(num_queries: int = NUM_QUERIES) -> list[tuple[int, ...]]:
    return [random_ids(QUERY_TOKENS, 1000 + i) for i in range(num_queries)]


def best_of(times: int, run: Callable[[], object]) -> float:
    """Run once to warm up, then return the fewest seconds of several runs."""
    run()
    return min(seconds_of(run) for _ in range(times))


def seconds_of(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def memory_for(model: PreTrainedModel, mib: int = ACTIVATION_BUDGET_MIB) -> ActivationBudget:
    return ActivationBudget.of(model, mib * 2**20)


def search(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    asked: Sequence[tuple[int, ...]],
    labels: Sequence[tuple[int, ...]],
    scope: ScoreScope = "best",
    strategy: Strategy | None = None,
) -> list[LabelSearch]:
    memory = memory_for(model)
    tries = tries_of(labels, memory.slots_per_query())
    return score_labels(model, blocks, asked, [tries] * len(asked), memory, scope, strategy)


# --- One-token answers, beside recomputation and copied caches


def copied_cache_pass(model: PreTrainedModel, cache: DynamicCache, asked: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Do what transformers documents for reusing a prefix: a copy of the cache, repeated over the batch."""
    own = copy.deepcopy(cache)
    if len(asked) > 1:
        own.batch_repeat_interleave(len(asked))
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=torch.tensor(asked), past_key_values=own, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
    return logits


def floor_seconds(model: PreTrainedModel) -> tuple[float, float, float]:
    """Return seconds of the bare linear layers, of the bare attention calls, and the matrix rate in FLOP/s.

    The linear layers count their operations at the rate of one large product measured here; the attention calls
    are `scaled_dot_product_attention` of the same shapes, without projections, norms or merging.
    """
    rows = NUM_QUERIES * QUERY_TOKENS
    one, other = torch.randn(2048, 2048, dtype=torch.bfloat16), torch.randn(2048, 2048, dtype=torch.bfloat16)
    rate = 2 * 2048**3 / best_of(5, lambda: one @ other)
    weights = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    operations = 2 * rows * sum(p.numel() for p in weights)
    operations += 2 * NUM_QUERIES * SHAPE["hidden_size"] * SHAPE["vocab_size"]
    heads, key_heads = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
    size = SHAPE["hidden_size"] // heads
    query = torch.randn(1, key_heads, heads // key_heads * rows, size, dtype=torch.bfloat16)
    keys = torch.randn(1, key_heads, NUM_PREFIX, size, dtype=torch.bfloat16)
    own_query = torch.randn(NUM_QUERIES, heads, QUERY_TOKENS, size, dtype=torch.bfloat16)
    own_keys = torch.randn(NUM_QUERIES, key_heads, QUERY_TOKENS, size, dtype=torch.bfloat16)

    def attention() -> None:
        F.scaled_dot_product_attention(query, keys, keys)
        F.scaled_dot_product_attention(own_query, own_keys, own_keys, is_causal=True, enable_gqa=True)

    return operations / rate, SHAPE["num_hidden_layers"] * best_of(5, attention), rate


def measure_queries(model: PreTrainedModel) -> None:
    """One-token answers: milliseconds per query."""
    prefix, asked = random_ids(NUM_PREFIX, 0), queries()
    labels = [(token,) for token in range(2000, 2006)]
    blocks = extend_blocks(model, (), prefix)
    ours = best_of(5, lambda: search(model, blocks, asked, labels))
    with_terminator = best_of(3, lambda: search(model, blocks, asked, [(*label, 7) for label in labels]))
    answers = [one.best for one in search(model, blocks, asked, labels)]
    single = best_of(5, lambda: search(model, blocks, asked[:1], labels))

    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        cache = DynamicCache()
        model(input_ids=torch.tensor([prefix]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    seconds = {batch: best_of(3, partial(copied_cache_pass, model, cache, asked[:batch])) / batch for batch in (1, 8)}
    copied = torch.cat([copied_cache_pass(model, cache, [one]) for one in asked])

    def recompute() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(
                input_ids=torch.tensor([[*prefix, *asked[0]]]), use_cache=False, logits_to_keep=1
            ).logits
        return logits

    recomputed = best_of(1, recompute)
    model.set_attn_implementation(ATTENTION)
    linear, attention, rate = floor_seconds(model)
    floor = (linear + attention) / NUM_QUERIES
    label_tokens = torch.tensor([label[0] for label in labels])
    same = sum(int(a == int(row.argmax())) for a, row in zip(answers, copied[:, label_tokens].float(), strict=True))
    per_query = ours / NUM_QUERIES
    print(f"\n## One-token answers: {NUM_PREFIX:,} prefix tokens, {NUM_QUERIES} queries of {QUERY_TOKENS} tokens\n")
    print("| Way | ms per query | times ours |\n| --- | ---: | ---: |")
    for name, value in (
        ("floor: bare linear layers and attention calls", floor),
        ("packed after one prefix (manyicl)", per_query),
        ("the same, answers of one token and an end-of-answer token", with_terminator / NUM_QUERIES),
        ("the same, one query alone", single),
        ("transformers, copied cache, batch 8", seconds[8]),
        ("transformers, copied cache, batch 1", seconds[1]),
        ("transformers, everything recomputed", recomputed),
    ):
        print(f"| {name} | {1000 * value:,.1f} | {value / per_query:.2f} |")
    print(
        f"\nMatrix rate measured here: {rate / 1e12:.2f} TFLOP/s. Floor: {1000 * linear / NUM_QUERIES:.1f} ms linear "
        f"layers, {1000 * attention / NUM_QUERIES:.1f} ms attention. Ours is {per_query / floor:.2f} times the floor. "
        f"{same} of {NUM_QUERIES} answers equal those of the copied cache (bfloat16, random weights)."
    )


# --- Label sets: best first against one full pass


def label_set(num_labels: int, most_tokens: int = 5) -> list[tuple[int, ...]]:
    """Draw labels of one to five tokens and a terminator; about half share their first token with another."""
    rng = random.Random(num_labels)
    firsts = [rng.randrange(1000, 49152) for _ in range(max(2, 3 * num_labels // 4))]
    labels: dict[tuple[int, ...], None] = {}
    while len(labels) < num_labels:
        rest = tuple(rng.randrange(1000, 49152) for _ in range(rng.randint(0, most_tokens - 1)))
        labels[(rng.choice(firsts), *rest, 7)] = None
    return list(labels)


def measure_labels(model: PreTrainedModel) -> None:
    """Best-first expansion and one full pass over the trie."""
    prefix, asked = random_ids(NUM_PREFIX, 0), queries()
    head = model.get_output_embeddings().weight
    print("\n## The best of a label set: most probable first, or the whole trie at once\n")
    print(
        "| Labels | Inner nodes | Queries | Head | best-first, ms per query | tokens read | full pass, ms per query "
        "| ratio | same answers |\n| ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for num_in_flight, sharpness in ((64, 1.0), (64, 10.0), (1, 1.0), (1, 10.0)):
        with torch.no_grad():
            # Tied to the embeddings: norms undo the scale on the way in.
            head.mul_(sharpness)
        blocks = extend_blocks(model, (), prefix)
        for num_labels in (2, 6, 16, 77, 150):
            labels = label_set(num_labels)
            some = asked[: min(num_in_flight, 8 if num_labels >= 77 else num_in_flight)]
            inner = len(tries_of(labels, 10**6)[0].inner_nodes)
            found = search(model, blocks, some, labels, "best", "best_first")  # warms up, too
            seconds = {
                strategy: seconds_of(partial(search, model, blocks, some, labels, "best", strategy)) / len(some)
                for strategy in STRATEGIES
            }
            full = search(model, blocks, some, labels, "best", "full_pass")
            same = sum(a.best == b.best for a, b in zip(found, full, strict=True))
            read = sum(one.num_read for one in found) / len(found)
            print(
                f"| {num_labels} | {inner} | {len(some)} | {'flat' if sharpness == 1.0 else 'sharp'} "
                f"| {1000 * seconds['best_first']:.1f} | {read:.1f} | {1000 * seconds['full_pass']:.1f} "
                f"| {seconds['full_pass'] / seconds['best_first']:.2f} | {same} of {len(some)} |",
                flush=True,
            )
        with torch.no_grad():
            head.div_(sharpness)


# --- Curves, lengths, memory


def measure_curve(model: PreTrainedModel) -> None:
    """Prefill of a nested curve against its longest point."""
    prefix = random_ids(NUM_PREFIX, 0)
    points = [NUM_PREFIX * shots // 256 for shots in (1, 4, 16, 64, 256)]

    def nested() -> None:
        blocks: tuple[Block, ...] = ()
        start = 0
        for end in points:
            blocks = extend_blocks(model, blocks, prefix[start:end])
            start = end

    def longest() -> None:
        extend_blocks(model, (), prefix)

    longest()
    pairs = [(seconds_of(nested), seconds_of(longest)) for _ in range(5)]
    ratios = sorted(a / b for a, b in pairs)
    print("\n## Prefill of the curve 0, 1, 4, 16, 64, 256 against its longest point\n")
    print(
        f"{NUM_PREFIX:,} tokens at 256 shots. Curve {min(a for a, _ in pairs):.2f} s, longest point "
        f"{min(b for _, b in pairs):.2f} s; ratio {ratios[2]:.3f} (median of 5 pairs, {ratios[0]:.3f} to "
        f"{ratios[-1]:.3f}). {NUM_PREFIX / min(b for _, b in pairs):,.0f} tokens per second."
    )


def measure_lengths(model: PreTrainedModel, plot: Path | None) -> None:
    """Time per query over the length of the prefix."""
    asked = queries()
    labels = [(token,) for token in range(2000, 2006)]
    blocks: tuple[Block, ...] = ()
    ids = random_ids(16384, 0)
    lengths: list[int] = []
    ours: list[float] = []
    copied: list[float] = []
    print("\n## Time per query over the prefix\n")
    print("| Prefix tokens | packed, ms per query | transformers, copied cache, batch 8 | ratio |")
    print("| ---: | ---: | ---: | ---: |")
    while (length := 256 << len(lengths)) <= len(ids):
        start = blocks[-1].end if blocks else 0
        blocks = extend_blocks(model, blocks, ids[start:length])
        seconds = best_of(3, partial(search, model, blocks, asked, labels)) / len(asked)
        model.set_attn_implementation("sdpa")
        cache = DynamicCache()
        for layer in range(SHAPE["num_hidden_layers"]):
            cache.update(
                torch.cat([block.keys[layer] for block in blocks], dim=2),
                torch.cat([block.values[layer] for block in blocks], dim=2),
                layer,
            )
        other = best_of(2, partial(copied_cache_pass, model, cache, asked[:8])) / 8
        model.set_attn_implementation(ATTENTION)
        lengths.append(length)
        ours.append(1000 * seconds)
        copied.append(1000 * other)
        print(f"| {length:,} | {ours[-1]:.1f} | {copied[-1]:.1f} | {copied[-1] / ours[-1]:.1f} |", flush=True)
    if plot is not None:
        draw_lengths(lengths, ours, copied, plot)


def draw_lengths(lengths: Sequence[int], ours: Sequence[float], copied: Sequence[float], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    axes.plot(lengths, copied, "o-", color="0.55", label="transformers, copied cache, batch 8")
    axes.plot(lengths, ours, "o-", color="tab:blue", label="packed after one prefix")
    axes.set(xscale="log", yscale="log", xlabel="tokens of demonstrations", ylabel="milliseconds per query")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=30)
    axes.minorticks_off()
    axes.set_yticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1,000"])
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    mpl.rcParams["svg.hashsalt"] = "manyicl"
    figure.savefig(path, metadata={"Date": None})


def resident_mib(field: str) -> float:
    """Read a line of /proc/self/status, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def forget_peak() -> float:
    """Hand freed memory back, reset the peak, and return what is resident, in MiB."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident_mib("VmRSS")


def memory_in_this_process() -> None:
    """Measure peaks above the loaded model; prints JSON for the parent."""
    model = make_model()
    asked = queries()
    labels = [(token,) for token in range(2000, 2006)]
    # Kernels keep buffers of their own from their first call on; that is not memory per query.
    warm = extend_blocks(model, (), random_ids(64, 9))
    search(model, warm, asked[:2], labels)
    del warm
    loaded = forget_peak()
    blocks = extend_blocks(model, (), random_ids(NUM_PREFIX, 0))
    prefill_peak = resident_mib("VmHWM")
    behind = forget_peak()
    search(model, blocks, asked, labels)
    peak = resident_mib("VmHWM")
    per_token = memory_for(model).per_token
    json.dump(
        {
            "prefix": sum(block.num_bytes for block in blocks) / 2**20,
            "prefill": prefill_peak - loaded,
            "queries": peak - loaded,
            "pass": peak - behind,
            "estimate": (per_token * NUM_QUERIES * QUERY_TOKENS + NUM_QUERIES * memory_for(model).per_logits) / 2**20,
        },
        sys.stdout,
    )


def measure_memory() -> None:
    """Peak memory above the loaded model, each in a process of its own."""
    result = subprocess.run(
        [sys.executable, __file__, "--memory-of-this-process"], check=True, capture_output=True, text=True
    )
    mib = json.loads(result.stdout)
    print("\n## Peak memory above the loaded model\n")
    print("| What | MiB | times the prefix's keys and values |\n| --- | ---: | ---: |")
    for name, key in (
        (f"keys and values of {NUM_PREFIX:,} tokens", "prefix"),
        (f"peak with {NUM_QUERIES} queries in flight, prefix included", "queries"),
        ("peak of the prefill", "prefill"),
        ("what the queries add, measured", "pass"),
        ("what the queries add, as the memory bound counts it", "estimate"),
    ):
        print(f"| {name} | {mib[key]:.1f} | {mib[key] / mib['prefix']:.2f} |")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, ``w0`` to ``w49000``, and line breaks."""
    words = ["<unk>", "\n", "\n\n", *(f"w{i}" for i in range(49000))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("\n\n|\n"), "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    # Words are joined by spaces, but not to a line break.
    backend.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(Regex(r" +(?=\n)"), ""),
            decoders.Replace(Regex(r"(?<=\n) +"), ""),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def measure_compiled(model: PreTrainedModel) -> None:
    """Loading a compiled task against prefilling it."""
    rng = random.Random(0)
    labels = tuple(f"w{i}" for i in range(6))
    examples = [
        Example(Query(" ".join(f"w{rng.randrange(10, 49000)}" for _ in range(13))), label, (label,))
        for label in (rng.choice(labels) for _ in range(256))
    ]
    spec = TaskSpec(name="words", family="classification", query_template="{{ text }}", labels=labels)
    task = Task(spec, tuple(examples))
    loaded = LoadedModel(model, word_tokenizer(), None, fingerprint(model), "135M")
    engine = Engine.local(loaded)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words.prefix"
        prefix = engine.prefill(task, task.train)
        prefill = best_of(2, lambda: engine.prefill(task, task.train))
        compiling = seconds_of(lambda: engine.save(engine.compile(task, task.train), path))
        loading = best_of(5, lambda: engine.load(path))
        print(f"\n## A compiled task of {prefix.num_tokens:,} tokens, {path.stat().st_size / 2**20:.0f} MiB\n")
    print(
        f"Prefilling {prefill:.2f} s; compiling and saving, with the score of every demonstration, {compiling:.2f} s; "
        f"loading, hash compared, {1000 * loading:.0f} ms: {prefill / loading:.0f} times faster than prefilling."
    )


MEASUREMENTS = ("queries", "labels", "curve", "memory", "lengths", "compiled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plot", type=Path, help="Write the plot of --only lengths here (SVG).")
    parser.add_argument("--memory-of-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of_this_process:
        memory_in_this_process()
        return
    model = make_model()
    num_weights = sum(p.numel() for p in model.parameters())
    print(
        f"Llama shape of {num_weights / 1e6:.0f}M weights, bfloat16, random; {arguments.threads} thread(s), "
        f"{platform.processor() or platform.machine()}; "
        + ", ".join(f"{name} {version}" for name, version in library_versions().items())
    )
    if "queries" in arguments.only:
        measure_queries(model)
    if "labels" in arguments.only:
        measure_labels(model)
    if "curve" in arguments.only:
        measure_curve(model)
    if "memory" in arguments.only:
        measure_memory()
    if "compiled" in arguments.only:
        measure_compiled(model)
    if "lengths" in arguments.only:
        measure_lengths(model, arguments.plot)


if __name__ == "__main__":
    main()
